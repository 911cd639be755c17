"""Keeper and worker where something goes wrong between them; whole processes are in crash/test_ranks.py."""

import errno
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier.engine import finish_part
from kvtier.keys import root_key
from kvtier.ranks import Instruction, Keeper, Worker, wire
from kvtier.ranks.session import Session

pytestmark = pytest.mark.timeout(60)

LAYOUT = kvtier.KVLayout(2, 2, 16, "float16", 4)
CONFIG = kvtier.Config(
    groups=[LAYOUT], model="m@1", host="1MiB", block_tokens=4, world_size=1, copy_threads=1
)
KEYS = kvtier.block_keys(np.arange(8), CONFIG)
FAILED = [kvtier.BlockOutcome.FAILED] * 2


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    engine = kvtier.open(CONFIG)
    served = Keeper(engine, tmp_path / "meet")
    yield served
    try:
        served.close(5)  # a part that was lost shows here, and does not hang
    finally:
        engine.close(5)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come true within 30 s"
        time.sleep(0.005)


def attached(worker: Worker) -> Any:
    return worker.attach([np.zeros((8, 2, 4, 2, 16), np.float16) for _ in range(2)])


def joined_socket(meet: Path) -> socket.socket:
    """A rank 0 of this process that knows no more than how to join."""
    directory = wire.open_directory(meet)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(wire.address(directory))
    os.close(directory)
    names = {"version": wire.VERSION, "rank": 0, "start": wire.start_time(), "world_size": 1}
    wire.send(connection, {"type": "join", **names, "fingerprint": root_key(CONFIG).hex()})
    received = wire.receive(connection)
    assert received is not None
    message, fd = received
    assert message["type"] == "welcome"
    assert fd is not None
    os.close(fd)
    return connection


def test_cancel_of_a_closed_keeper_touches_no_foreign_descriptor(keeper: Keeper) -> None:
    instruction = keeper.store(KEYS).instruction
    number = keeper._server._wake_fd
    keeper.close()
    mine = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        if mine != number:
            os.dup2(mine, number)
        keeper.cancel(instruction)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(mine)
    finally:
        for fd in {mine, number}:
            os.close(fd)
    assert keeper._server._wake_fd == -1


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "a-child-has-the-socket"])
def test_join_that_fails_after_the_welcome_can_be_repeated(
    keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, forked: bool
) -> None:
    copies: list[socket.socket] = []
    peer_pidfd = wire.peer_pidfd

    def copied(connection: socket.socket, start: str) -> int:
        if forked:
            copies.append(connection.dup())
        return peer_pidfd(connection, start)

    monkeypatch.setattr(wire, "peer_pidfd", copied)
    with Worker(tmp_path / "meet", 0, CONFIG) as worker:
        native = worker._native

        class Refuses:
            def join(self, **_: Any) -> None:
                raise kvtier.ResourceError("no room for the arena")

            def __getattr__(self, name: str) -> Any:
                return getattr(native, name)

        worker._native = Refuses()  # type: ignore[assignment]
        for _ in range(2):
            with pytest.raises(kvtier.ResourceError, match="no room"):
                worker.join(10)
        worker._native = native
        worker.join(10)
        assert worker.joined
        assert keeper.workers() == [os.getpid()]
    for connection in copies:
        connection.close()


def test_rank_of_a_living_process_that_hung_up_is_free_when_it_owes_nothing(
    keeper: Keeper, tmp_path: Path
) -> None:
    joined_socket(tmp_path / "meet").close()
    with Worker(tmp_path / "meet", 0, CONFIG) as worker:
        worker.join(10)
        assert keeper.workers() == [os.getpid()]


@pytest.mark.parametrize("text", ['["io", 99999999999, "x"]', '["io", 5, "\\ud800"]', '["\\ud800", 5, "x"]'])
def test_report_that_the_core_could_not_take_does_not_lose_the_part(
    keeper: Keeper, tmp_path: Path, text: str
) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_rank_faults import joined_socket, Path
        connection = joined_socket(Path({str(tmp_path / "meet")!r}))
        print("joined", flush=True)
        grant = input()
        connection.send(b'{{"type": "ended", "grant": %s, "drained": true, "status": %s}}' % (
            grant.encode(), {text.encode()!r}))
        input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
            keeper.wait_for_workers(30)
            instruction, ticket = keeper.store(KEYS)
            process.stdin.write(f"{instruction.grant}\n")
            process.stdin.flush()
            eventually(lambda: not keeper.complete)  # it does not speak our protocol
            assert not ticket.done()
            with (
                Worker(tmp_path / "meet", 0, CONFIG) as worker,
                pytest.raises(kvtier.ConfigError, match=f"taken by process {process.pid}"),
            ):
                worker.join(10)  # copies of that process may run
        finally:
            process.kill()
        ticket.wait(30)
    assert ticket.result().outcomes.tolist() == FAILED


@pytest.mark.parametrize("times", [1, 2])
def test_part_whose_report_could_not_be_handed_on_ends_as_failed(
    keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    calls = [0]

    def fails(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] <= times:
            raise MemoryError
        finish_part(*arguments)

    monkeypatch.setattr("kvtier.ranks.keeper.finish_part", fails)
    worker = Worker(tmp_path / "meet", 0, CONFIG)
    pages = attached(worker)
    worker.join(10)
    instruction, ticket = keeper.store(KEYS)
    worker.execute(instruction, pages, [0, 1]).wait(30)
    eventually(lambda: calls[0] >= min(times + 1, 2))
    worker.close(30)  # what it owes ends here at the latest
    ticket.wait(30)
    assert ticket.result().outcomes.tolist() == FAILED
    keeper.close(30)


def test_text_of_any_kind_reaches_the_keeper_as_text() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        session = Session(b"e" * 16, 1, 0, ours, -1)
        session.ended(1, ("io", 5, "no file '\udcff'"), drained=True)
        assert session.outbox.flush()
        json.loads(theirs.recv(1 << 16))["status"][2].encode()


@pytest.mark.parametrize(
    ("number", "kept"), [(errno.ENOBUFS, True), (errno.ENOMEM, True), (errno.EPIPE, False)]
)
def test_outbox_drops_only_what_nobody_will_read(number: int, *, kept: bool) -> None:
    class Connection:
        def __init__(self) -> None:
            self.sent: deque[dict[str, Any]] = deque()
            self.faults = 1

        def sendmsg(self, data: list[bytes], *_: Any) -> None:
            if self.faults:
                self.faults -= 1
                raise OSError(number, os.strerror(number))
            self.sent.append(json.loads(data[0]))

    connection = Connection()
    outbox = wire.Outbox(connection)  # type: ignore[arg-type]
    outbox.put({"type": "ended"})
    outbox.put({"type": "leave"})
    assert outbox.flush() is not kept
    assert outbox.flush()
    assert [message["type"] for message in connection.sent] == (["ended", "leave"] if kept else [])


def test_fault_while_flushing_does_not_end_the_keepers_thread(keeper: Keeper, tmp_path: Path) -> None:
    flush, faults = keeper._server._flush, [KeyError("not registered")]

    def fails(member: Any) -> None:
        if faults:
            raise faults.pop()
        flush(member)

    keeper._server._flush = fails  # type: ignore[method-assign]
    for _ in range(2):
        with Worker(tmp_path / "meet", 0, CONFIG) as worker:
            worker.join(10)
            eventually(lambda: not faults)
        eventually(lambda: keeper.workers() == [None])


def test_forked_child_gets_closed_errors_whatever_was_locked() -> None:
    # In a process of its own: pytest has threads, and fork() is not for programs that have.
    code = """
        import os, signal, tempfile, threading, warnings
        import numpy as np
        import kvtier
        from kvtier.ranks import Keeper, Worker
        warnings.simplefilter("ignore", DeprecationWarning)
        layout = kvtier.KVLayout(2, 2, 16, "float16", 4)
        config = kvtier.Config(groups=[layout], model="m@1", host="1MiB", block_tokens=4)
        keys = kvtier.block_keys(range(8), config)
        with tempfile.TemporaryDirectory() as place, kvtier.open(config) as engine:
            keeper, worker = Keeper(engine, place + "/meet"), Worker(place + "/meet", 0, config)
            pages = worker.attach([np.zeros((8, 2, 4, 2, 16), np.float16) for _ in range(2)])
            worker.join(10)
            instruction, ticket = keeper.store(keys)
            taken, over = threading.Event(), threading.Event()
            def hold():
                with keeper._changed, worker._joining, worker._lock:
                    taken.set()
                    over.wait()
            thread = threading.Thread(target=hold)
            thread.start()
            taken.wait()
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                calls = [lambda: keeper.complete, keeper.workers, lambda: keeper.wait_for_workers(1),
                         lambda: keeper.store(keys), lambda: keeper.load(keys),
                         lambda: keeper.cancel(instruction), keeper.close,
                         lambda: worker.joined, worker.join, worker.close, pages.detach,
                         lambda: worker.execute(instruction, pages, [0, 1]),
                         lambda: worker.attach([np.zeros((8, 2, 4, 2, 16), np.float16) for _ in range(2)])]
                for i, call in enumerate(calls):
                    try:
                        call()
                    except kvtier.ClosedError:
                        continue
                    os._exit(i + 1)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            over.set()
            thread.join()
            worker.execute(instruction, pages, [0, 1])
            ticket.wait(10)
            worker.close()
            keeper.close()
        print(status)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


def test_execute_waits_no_longer_than_join_timeout_for_a_thread_that_joins(tmp_path: Path) -> None:
    nobody = tmp_path / "nobody"
    none = np.empty(0, np.uint32)
    instruction = Instruction(b"e" * 16, 1, 1, True, 0, 1, 0, (1,), none.astype(np.uint8), none)
    refused: list[kvtier.KVTierError] = []
    with Worker(nobody, 0, CONFIG, join_timeout=0.05) as worker:

        def join() -> None:
            try:
                worker.join()
            except kvtier.ClosedError as error:
                refused.append(error)

        thread = threading.Thread(target=join)
        thread.start()
        eventually(worker._joining.locked)
        with pytest.raises(kvtier.TimeoutError, match="another thread"):
            worker.execute(instruction, attached(worker), [])
    thread.join(30)
    assert len(refused) == 1
