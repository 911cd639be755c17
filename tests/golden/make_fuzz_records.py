"""Writes fuzz/catalog/, fuzz/superblock/ and fuzz/ledger/ from docs/formats/, with none of kvtier's code.

Each file is named <verdict>-<what>.bin. A catalog record is its key (34 bytes) and its value (88) as they
stand in LMDB; the other two are whole files.

Usage: python tests/golden/make_fuzz_records.py
"""

import struct
from pathlib import Path
from typing import Any

from make_slots import checksum

KEY = bytes(range(32))
PARENT = bytes(range(100, 132))
NAMES = [f"{n:016x}-{n}".encode() for n in range(6)]


def sealed(body: bytes) -> bytes:
    return body + checksum(body)


def catalog(**given: Any) -> bytes:
    fields: dict[str, Any] = {
        "group": 1,
        "place": (0, 7),
        "generation": 3 << 40 | 5,
        "payload": 4096,
        "last_use": 1_700_000_000,
        "depth": 2,
        "has_parent": 1,
        "zero": b"\0\0\0",
        "parent": PARENT,
        **given,
    }
    key = KEY + struct.pack("<H", fields["group"])
    value = struct.pack(">II", *fields["place"])
    value += struct.pack("<QQq", fields["generation"], fields["payload"], fields["last_use"])
    value += bytes(range(16)) + struct.pack("<IB", fields["depth"], fields["has_parent"])
    return key + value + fields["zero"] + fields["parent"]


def superblock(
    version: int = 1,
    length: int = 4096,
    clean: int = 1,
    strides: tuple[int, ...] = (8192, 2_101_248),
    classes: int | None = None,
    magic: bytes = b"\x89KVSUPB\n",
    tail: bytes = b"",
) -> bytes:
    head = struct.pack("<8sII16s32sIB3x", magic, version, length, bytes(range(16)), PARENT, 77, clean)
    count = len(strides) if classes is None else classes
    body = head + struct.pack(f"<I4x{len(strides)}Q", count, *strides)
    return sealed(body.ljust(4080 - len(tail), b"\0") + tail)


def ledger(
    version: int = 1,
    names: list[bytes] = NAMES,
    count: int | None = None,
    zero: bytes = bytes(8),
    magic: bytes = b"\x89KVLEDG\n",
) -> bytes:
    head = struct.pack("<8sIIQ", magic, version, len(names) if count is None else count, 1 << 30) + zero
    entries = (struct.pack("<32sQq", name, 1 << 20, 1_700_000_000) for name in names)
    return sealed(head + b"".join(entries))


def flipped(record: bytes, bit: int) -> bytes:
    changed = bytearray(record)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


CORPUS: dict[str, dict[str, bytes]] = {
    "catalog": {
        "good-child": catalog(),
        "good-root": catalog(has_parent=0, parent=bytes(32), depth=0),
        "good-before_1970": catalog(last_use=-1),
        "good-all_bits": catalog(
            group=0xFFFF, place=(2**32 - 1, 2**32 - 1), generation=2**64 - 1, payload=2**64 - 1
        ),
        "damaged-has_parent_2": catalog(has_parent=2),
        "damaged-has_parent_255": catalog(has_parent=255),
        "damaged-parent_of_a_root": catalog(has_parent=0),
        "damaged-last_byte_of_a_roots_parent": catalog(has_parent=0, parent=bytes(31) + b"\1"),
        "damaged-first_zero": catalog(zero=b"\1\0\0"),
        "damaged-last_zero": catalog(zero=b"\0\0\1"),
    },
    "superblock": {
        "good-two_classes": superblock(),
        "good-64_classes": superblock(strides=tuple(range(1, 65))),
        "good-unclean": superblock(clean=0),
        "newer_version-2": superblock(version=2),
        "newer_version-with_unknown_fields": superblock(version=2**32 - 1, clean=9, tail=b"\xff"),
        "damaged-version_0": superblock(version=0),
        "damaged-version_bit": flipped(superblock(), 8 * 8 + 1),
        "damaged-magic": superblock(magic=b"\x89KVSUPB\r"),
        "damaged-length": superblock(length=4095),
        "damaged-clean_2": superblock(clean=2),
        "damaged-no_class": superblock(strides=()),
        "damaged-65_classes": superblock(classes=65),
        "damaged-all_classes": superblock(classes=2**32 - 1),
        "damaged-stride_0": superblock(strides=(8192, 0)),
        "damaged-one_class_more": superblock(classes=1),
        "damaged-reserved_last": superblock(tail=b"\1"),
        "damaged-short": superblock()[:-1],
        "damaged-long": superblock() + b"\0",
        "damaged-empty": b"",
    },
    "ledger": {
        "good-six_stores": ledger(),
        "newer_version-2": ledger(version=2),
        "newer_version-other_length": ledger(version=2, count=9),
        "damaged-version_0": ledger(version=0),
        "damaged-version_bit": flipped(ledger(), 8 * 8 + 1),
        "damaged-magic": ledger(magic=b"\x89KVLEDG\r"),
        "damaged-one_entry_more": ledger(count=7),
        "damaged-one_entry_less": ledger(count=5),
        "damaged-all_entries": ledger(count=2**32 - 1),
        "damaged-not_sorted": ledger(names=[NAMES[1], NAMES[0], *NAMES[2:]]),
        "damaged-twice": ledger(names=[NAMES[0], *NAMES[:5]]),
        "damaged-zero": ledger(zero=bytes(7) + b"\1"),
        "damaged-upper_case": ledger(names=[*NAMES[:5], b"AA11223344556677-9"]),
        "damaged-dots": ledger(names=[*NAMES[:5], b"../../etc/passwd-0"]),
        "damaged-behind_the_name": ledger(names=[*NAMES[:5], NAMES[5] + b"\0x"]),
        "damaged-leading_zero": ledger(names=[*NAMES[:5], b"aa11223344556677-01"]),
        "damaged-number_too_large": ledger(names=[*NAMES[:5], b"aa11223344556677-4294967296"]),
        "damaged-cut": ledger()[:-1],
        "damaged-head_alone": ledger()[:32],
    },
}


def main() -> None:
    for kind, records in CORPUS.items():
        folder = Path(__file__).parent / "fuzz" / kind
        folder.mkdir(exist_ok=True)
        for name, record in records.items():
            (folder / f"{name}.bin").write_bytes(record)


if __name__ == "__main__":
    main()
