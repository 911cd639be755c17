"""A catalog that kvtier-catalog wrote, read with the ordinary ``lmdb`` package (docs/formats/catalog.md).

The helper is driven as the C++ client drives it (csrc/storage/catalog_protocol.h): packets on descriptor 3,
items of 128 bytes in a memfd on descriptor 4. The records' bytes are made here, from the document's tables.
"""

import importlib.util
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

lmdb = pytest.importorskip("lmdb")

PUT, FORGET, TOUCH = range(3)
OPEN, APPLY_LAST = 0, 5
ITEM = struct.Struct("<B5x34s88s")
REQUEST = struct.Struct("<IIQ")
REPLY_BYTES = 256


def helper_path() -> Path:
    if given := os.environ.get("KVTIER_CATALOG_HELPER"):
        return Path(given)
    spec = importlib.util.find_spec("kvtier._core")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "kvtier-catalog"


def block(number: int) -> bytes:
    return bytes([number]) * 32 + struct.pack("<H", number % 3)


def place(slot: int, class_index: int = 0) -> bytes:
    return struct.pack(">II", class_index, slot)


def value(number: int, slot: int, last_use_s: int = 0) -> bytes:
    head = place(slot) + struct.pack("<QQq", (3 << 40) | number, 4096 + number, last_use_s)
    parent = bytes([number - 1]) * 32 if number else bytes(32)
    return head + bytes([number]) * 16 + struct.pack("<IB3x", number, 1 if number else 0) + parent


class Helper:
    """One kvtier-catalog process on a directory."""

    def __init__(self, directory: Path) -> None:
        # A shell moves the descriptors to 3 and 4: pass_fds keeps their numbers.
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.memory = os.memfd_create("items")
        command = [str(helper_path()), str(directory), str(64 << 20), str(os.getpid())]
        moves = f'exec "$@" 3<&{theirs.fileno()} 4<>/proc/self/fd/{self.memory}'
        self.process = subprocess.Popen(
            ["bash", "-c", moves, "bash", *command], pass_fds=(theirs.fileno(), self.memory)
        )
        theirs.close()
        self.socket.settimeout(30)
        self.answer()
        self.ask(OPEN)

    def answer(self) -> None:
        reply = self.socket.recv(REPLY_BYTES)
        assert len(reply) == REPLY_BYTES
        protocol, outcome = struct.unpack_from("<II", reply)
        assert (protocol, outcome) == (1, 0), reply

    def ask(self, op: int, count: int = 0) -> None:
        self.socket.send(REQUEST.pack(op, 0, count))
        self.answer()

    def commit(self, *changes: tuple[int, bytes, bytes]) -> None:
        os.pwrite(self.memory, b"".join(ITEM.pack(*change) for change in changes), 0)
        self.ask(APPLY_LAST, len(changes))

    def close(self) -> None:
        self.socket.close()
        os.close(self.memory)
        assert self.process.wait(30) == 0


@pytest.fixture
def helper(tmp_path: Path) -> Iterator[Helper]:
    if not helper_path().exists():
        pytest.skip("built without lmdb: there is no kvtier-catalog")
    process = Helper(tmp_path)
    yield process
    process.close()


def contents(directory: Path) -> tuple[dict[bytes, bytes], dict[bytes, bytes], dict[bytes, bytes]]:
    env = lmdb.open(str(directory / "catalog.mdb"), subdir=False, readonly=True, max_dbs=3)
    try:
        names = (b"blocks", b"slots", b"meta")
        databases = [env.open_db(name, create=False) for name in names]
        with env.begin() as transaction:
            blocks, slots, meta = (dict(transaction.cursor(db)) for db in databases)
        return blocks, slots, meta
    finally:
        env.close()


def test_the_file_is_what_the_document_says(helper: Helper, tmp_path: Path) -> None:
    helper.commit(*((PUT, block(n), value(n, slot=10 + n)) for n in range(5)))
    blocks, slots, meta = contents(tmp_path)  # while the helper has it open
    assert blocks == {block(n): value(n, slot=10 + n) for n in range(5)}
    assert slots == {place(10 + n): block(n) for n in range(5)}
    assert meta == {b"version": (1).to_bytes(4, "little"), b"complete": b"1"}


def test_changes_keep_the_two_databases_together(helper: Helper, tmp_path: Path) -> None:
    helper.commit(*((PUT, block(n), value(n, slot=n)) for n in range(4)))
    empty = bytes(34)
    helper.commit(
        (PUT, block(9), value(9, slot=0)),  # in the place of block 0
        (PUT, block(1), value(1, slot=7)),  # moved
        (FORGET, empty, place(2) + bytes(80)),
        (TOUCH, empty, value(0, slot=3, last_use_s=1_700_000_000)),
    )
    blocks, slots, _ = contents(tmp_path)
    assert blocks == {
        block(9): value(9, slot=0),
        block(1): value(1, slot=7),
        block(3): value(3, slot=3, last_use_s=1_700_000_000),
    }
    assert slots == {place(0): block(9), place(7): block(1), place(3): block(3)}
