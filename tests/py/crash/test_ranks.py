"""A keeper and two ranks in three processes, any of which may be killed: right bytes or a miss (I7)."""

import contextlib
import json
import os
import queue
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier.ranks import Instruction, Keeper, Worker

pytestmark = pytest.mark.timeout(120)

DRIVER = Path(__file__).parent / "rank_driver.py"
STORED, DECLINED, LOADED, MISSED, FAILED = (
    kvtier.BlockOutcome.STORED,
    kvtier.BlockOutcome.DECLINED,
    kvtier.BlockOutcome.LOADED,
    kvtier.BlockOutcome.MISSED,
    kvtier.BlockOutcome.FAILED,
)


class Process:
    """A driver process. Every answer has a deadline: what hangs fails."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, str(DRIVER), *map(str, arguments)]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.pid = self.answer()["pid"]

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._answers.put(line)
        self._answers.put("")

    def answer(self, timeout: float = 40) -> Any:
        line = self._answers.get(timeout=timeout)
        assert line, "the process has ended"
        return json.loads(line)

    def begin(self, do: str, **arguments: object) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.popen.stdin.flush()

    def __call__(self, do: str, **arguments: object) -> Any:
        self.begin(do, **arguments)
        answer = self.answer()
        assert "error" not in answer, answer
        return answer["ok"]

    def refused(self, do: str, **arguments: object) -> tuple[str, str]:
        self.begin(do, **arguments)
        answer = self.answer()
        return answer["error"], answer["message"]

    def stop_in(self, do: str, **arguments: object) -> None:
        """Begins something in whose middle the process stops itself, and waits until it has."""
        self.begin(do, stop=True, **arguments)
        assert self.answer() == {"stopped": True}
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.002)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(30)

    def end(self) -> None:
        self.kill()
        for stream in (self.popen.stdin, self.popen.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[Process] = []

    def make(*arguments: object) -> Process:
        processes.append(Process(*arguments))
        return processes[-1]

    shared = sorted(Path("/dev/shm").iterdir())
    yield make
    for process in processes:
        process.end()
    assert sorted(Path("/dev/shm").iterdir()) == shared


@pytest.fixture
def trio(start: Start, tmp_path: Path) -> tuple[Process, Process, Process]:
    """Keeper and both ranks, joined. The workers are there before the keeper."""
    meet = tmp_path / "meet"
    first, second = start("worker", meet, 0), start("worker", meet, 1)
    keeper = start("keeper", meet)
    for worker in (first, second):
        worker("join")
    keeper("wait_for_workers")
    return keeper, first, second


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come true within 30 s"
        time.sleep(0.01)


def check_conserved(keeper: Process) -> None:
    """Nothing runs, nothing is pinned, and no slot is lost (I1)."""
    eventually(lambda: keeper("stats")["running"] == 0)
    stats = keeper("stats")
    assert stats["pins"] == 0
    for free, filling, ready, leaving, capacity in stats["host"]:
        assert free + ready == capacity
        assert (filling, leaving) == (0, 0)


def store(keeper: Process, workers: list[Process], prompt: int, blocks: int, group: int = 0) -> None:
    order = keeper("order", direction="store", prompt=prompt, blocks=blocks, group=group)
    for worker in workers:
        worker("fill", prompt=prompt, blocks=blocks, at=0, group=group)
        worker("execute", instruction=order["instruction"], at=0, group=group)
    assert keeper("result", number=order["number"])["outcomes"] == [STORED] * blocks


def load_and_check(keeper: Process, workers: list[Process], prompt: int, blocks: int, group: int = 0) -> None:
    order = keeper("order", direction="load", prompt=prompt, blocks=blocks, group=group)
    for worker in workers:
        worker("fill", prompt=999, blocks=blocks, at=32, group=group)
        assert worker("execute", instruction=order["instruction"], at=32, group=group) == [LOADED] * blocks
        assert worker("check", prompt=prompt, blocks=blocks, at=32, group=group)
    assert keeper("result", number=order["number"])["outcomes"] == [LOADED] * blocks


def test_every_rank_gets_back_its_own_bytes(trio: tuple[Process, Process, Process], tmp_path: Path) -> None:
    keeper, first, second = trio
    assert keeper("workers") == [first.pid, second.pid]
    assert keeper("complete")
    store(keeper, [first, second], 1, 6)
    store(keeper, [first, second], 2, 6, group=1)
    load_and_check(keeper, [first, second], 1, 6)
    load_and_check(keeper, [second, first], 2, 6, group=1)
    check_conserved(keeper)
    first("close")
    second("close")
    eventually(lambda: keeper("workers") == [None, None])
    keeper("close")
    assert list((tmp_path / "meet").iterdir()) == []


def test_block_is_visible_only_when_every_rank_has_stored_its_part(
    trio: tuple[Process, Process, Process],
) -> None:
    keeper, first, second = trio
    order = keeper("order", direction="store", prompt=1, blocks=3)
    assert first("execute", instruction=order["instruction"], at=0) == [STORED] * 3
    assert keeper("ready", prompt=1, blocks=3) == 0
    assert not keeper("done", number=order["number"])
    load = keeper("order", direction="load", prompt=1, blocks=3)
    assert load["grant"] == 0
    second("execute", instruction=order["instruction"], at=0)
    keeper("result", number=order["number"])
    assert keeper("ready", prompt=1, blocks=3) == 3


@pytest.mark.parametrize("victim", [0, 1])
def test_worker_killed_in_the_middle_of_a_store(
    trio: tuple[Process, Process, Process], victim: int, start: Start, tmp_path: Path
) -> None:
    keeper, *workers = trio
    order = keeper("order", direction="store", prompt=1, blocks=4)
    workers[victim].stop_in("execute", instruction=order["instruction"], at=0)
    workers[1 - victim]("execute", instruction=order["instruction"], at=0)
    time.sleep(0.2)  # stopped is not dead: nothing may be given up
    assert not keeper("done", number=order["number"])
    assert sum(filling for _, filling, *_ in keeper("stats")["host"]) == 4
    workers[victim].kill()
    result = keeper("result", number=order["number"])
    assert result["outcomes"] == [FAILED] * 4
    assert f"rank {victim}" in result["error"]
    assert keeper("ready", prompt=1, blocks=4) == 0
    check_conserved(keeper)
    # Without that rank nobody could finish a store; another process may take its place.
    declined = keeper("order", direction="store", prompt=2, blocks=4)
    assert keeper("result", number=declined["number"])["outcomes"] == [DECLINED] * 4
    workers[victim] = start("worker", tmp_path / "meet", victim)
    workers[victim]("join")
    store(keeper, workers, 1, 4)
    load_and_check(keeper, workers, 1, 4)
    check_conserved(keeper)


def test_worker_killed_in_the_middle_of_a_load(
    trio: tuple[Process, Process, Process], start: Start, tmp_path: Path
) -> None:
    keeper, first, second = trio
    store(keeper, [first, second], 1, 4)
    order = keeper("order", direction="load", prompt=1, blocks=4)
    second.stop_in("execute", instruction=order["instruction"], at=32)
    assert first("execute", instruction=order["instruction"], at=32) == [LOADED] * 4
    assert keeper("stats")["pins"] == 4
    second.kill()
    assert keeper("result", number=order["number"])["outcomes"] == [FAILED] * 4
    check_conserved(keeper)
    second = start("worker", tmp_path / "meet", 1)
    second("join")
    load_and_check(keeper, [first, second], 1, 4)
    check_conserved(keeper)


def test_open_socket_in_a_forked_child_does_not_keep_a_dead_workers_slots(
    trio: tuple[Process, Process, Process],
) -> None:
    keeper, first, second = trio
    child = second("fork")
    try:
        order = keeper("order", direction="store", prompt=1, blocks=2)
        first("execute", instruction=order["instruction"], at=0)
        second.kill()
        assert keeper("result", number=order["number"])["outcomes"] == [FAILED] * 2
        check_conserved(keeper)
    finally:
        os.kill(child, signal.SIGKILL)


def test_closed_socket_gives_up_nothing_of_a_worker_that_lives(
    trio: tuple[Process, Process, Process],
) -> None:
    keeper, first, second = trio
    order = keeper("order", direction="store", prompt=1, blocks=2)
    first("execute", instruction=order["instruction"], at=0)
    second("hang_up")
    eventually(lambda: keeper("workers")[1] is None)
    eventually(lambda: not keeper("complete"))  # it hears of it a moment later
    assert not keeper("done", number=order["number"])
    declined = keeper("order", direction="store", prompt=2, blocks=2)
    assert keeper("result", number=declined["number"])["outcomes"] == [DECLINED] * 2
    second.kill()
    assert keeper("result", number=order["number"])["outcomes"] == [FAILED] * 2
    check_conserved(keeper)


def test_instruction_for_a_dead_process_is_refused_by_its_successor(
    trio: tuple[Process, Process, Process], start: Start, tmp_path: Path
) -> None:
    keeper, first, second = trio
    order = keeper("order", direction="store", prompt=1, blocks=2)
    second.kill()
    second = start("worker", tmp_path / "meet", 1)
    second("join")
    assert second.refused("execute", instruction=order["instruction"], at=0)[0] == "ClosedError"
    first("execute", instruction=order["instruction"], at=0)
    assert keeper("result", number=order["number"])["outcomes"] == [FAILED] * 2
    store(keeper, [first, second], 1, 2)
    # Neither may one be executed twice, nor after it was over: its slots may be others' by now.
    assert first.refused("execute", instruction=order["instruction"], at=0)[0] == "ClosedError"
    check_conserved(keeper)


def test_part_that_a_worker_cannot_begin_is_reported_at_once(trio: tuple[Process, Process, Process]) -> None:
    keeper, first, second = trio
    order = keeper("order", direction="store", prompt=1, blocks=2)
    assert first.refused("execute", instruction=order["instruction"], at=1000)[0] == "ConfigError"
    second("execute", instruction=order["instruction"], at=0)
    assert keeper("result", number=order["number"])["outcomes"] == [FAILED] * 2
    check_conserved(keeper)


def test_cancel_ends_what_no_rank_has_begun_and_waits_for_the_rest(
    trio: tuple[Process, Process, Process],
) -> None:
    keeper, first, second = trio
    order = keeper("order", direction="store", prompt=1, blocks=2)
    first("execute", instruction=order["instruction"], at=0)
    assert not keeper("done", number=order["number"])
    keeper("cancel", number=order["number"])
    assert keeper("result", number=order["number"])["outcomes"] == [FAILED] * 2
    assert second.refused("execute", instruction=order["instruction"], at=0)[0] == "ClosedError"
    check_conserved(keeper)
    keeper("order", direction="store", prompt=2, blocks=2)
    keeper("close")  # cancels by itself
    eventually(lambda: not first("joined"))


def test_worker_that_leaves_gives_back_what_it_had_not_begun(trio: tuple[Process, Process, Process]) -> None:
    keeper, first, second = trio
    order = keeper("order", direction="store", prompt=1, blocks=2)
    first("execute", instruction=order["instruction"], at=0)
    second("close")
    assert keeper("result", number=order["number"])["outcomes"] == [FAILED] * 2
    check_conserved(keeper)


def test_keeper_killed_and_restarted(
    trio: tuple[Process, Process, Process], start: Start, tmp_path: Path
) -> None:
    keeper, first, second = trio
    store(keeper, [first, second], 1, 4)
    old = keeper("order", direction="load", prompt=1, blocks=4)
    keeper.kill()
    # The arena outlives its keeper: what was accepted ends by itself, or is refused.
    eventually(lambda: not first("joined"))
    keeper = start("keeper", tmp_path / "meet")  # the old socket and lock are still there
    new = keeper("order", direction="store", prompt=1, blocks=4)
    assert keeper("result", number=new["number"])["outcomes"] == [DECLINED] * 4
    for worker in (first, second):  # lazily, with the first instruction; pages are still attached
        assert worker("execute", instruction=new["instruction"], at=0) == [DECLINED] * 4
        assert worker.refused("execute", instruction=old["instruction"], at=32)[0] == "ClosedError"
    keeper("wait_for_workers")
    store(keeper, [first, second], 3, 4)
    load_and_check(keeper, [first, second], 3, 4)
    check_conserved(keeper)
    for process in (first, second, keeper):
        process("close")
    assert list((tmp_path / "meet").iterdir()) == []


def test_keeper_killed_in_the_middle_of_a_store(
    trio: tuple[Process, Process, Process], start: Start, tmp_path: Path
) -> None:
    keeper, first, second = trio
    order = keeper("order", direction="store", prompt=1, blocks=4)
    first.stop_in("execute", instruction=order["instruction"], at=0)
    keeper.kill()
    keeper = start("keeper", tmp_path / "meet")
    first.kill()
    first = start("worker", tmp_path / "meet", 0)
    for worker in (first, second):
        worker("join")
    assert second.refused("execute", instruction=order["instruction"], at=0)[0] == "ClosedError"
    store(keeper, [first, second], 1, 4)
    load_and_check(keeper, [first, second], 1, 4)
    check_conserved(keeper)


def test_taken_rank_other_config_and_second_keeper_are_refused(
    trio: tuple[Process, Process, Process], start: Start, tmp_path: Path
) -> None:
    _, first, _ = trio
    twin = start("worker", tmp_path / "meet", 0)
    name, message = twin.refused("join")
    assert name == "ConfigError"
    assert f"rank 0 is taken by process {first.pid}" in message

    layout = kvtier.KVLayout(2, 2, 16, "float16", 4)
    other = kvtier.Config(groups=[layout], model="other@1", host="1MiB", block_tokens=4, world_size=2)
    with (
        Worker(tmp_path / "meet", 1, other) as worker,
        pytest.raises(kvtier.ConfigError, match="not the keeper's"),
    ):
        worker.join(10)
    with kvtier.open(other) as engine, pytest.raises(kvtier.ConfigError, match="serves it already"):
        Keeper(engine, tmp_path / "meet")


def test_directory_that_others_can_reach_is_refused(tmp_path: Path) -> None:
    layout = kvtier.KVLayout(2, 2, 16, "float16", 4)
    config = kvtier.Config(groups=[layout], model="m@1", host="1MiB", block_tokens=4, world_size=2)
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o750)
    with kvtier.open(config) as engine:
        with pytest.raises(kvtier.ConfigError, match="0750"):
            Keeper(engine, loose)
        with Keeper(engine, tmp_path / "own") as keeper:
            assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
            with pytest.raises(kvtier.ConfigError, match="this process"):
                Keeper(engine, tmp_path / "own")
            with pytest.raises(kvtier.TimeoutError, match=r"\[0, 1\]"):
                keeper.wait_for_workers(0.01)
        assert list((tmp_path / "own").iterdir()) == []
    with Worker(loose, 0, config) as worker, pytest.raises(kvtier.ConfigError, match="0750"):
        worker.join(1)
    with Worker(tmp_path / "nowhere", 0, config) as worker, pytest.raises(kvtier.TimeoutError):
        worker.join(0.1)


def test_instruction_survives_bytes() -> None:
    outcomes = np.array([0, 2, 0], np.uint8)
    slots = np.array([7, 70000], np.uint32)
    made = Instruction(b"e" * 16, 9, 3, True, 1, 2, 5, (4, 6), outcomes, slots)
    read = Instruction.from_bytes(made.to_bytes())
    assert read.to_bytes() == made.to_bytes()
    assert read.members == (4, 6)
    assert read.slots.tolist() == [7, 70000]
    for broken in (b"", made.to_bytes()[:40], b"x" + made.to_bytes()[1:], made.to_bytes() + b"z"):
        with pytest.raises(kvtier.ConfigError):
            Instruction.from_bytes(broken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_workers_killed_at_any_moment_leave_right_bytes_or_misses(
    trio: tuple[Process, Process, Process], start: Start, tmp_path: Path, seed: int
) -> None:
    """Kills that no gate places: some before a copy, some in it, some between the copy and its report."""
    keeper, *workers = trio
    random = np.random.default_rng(seed)
    for round_ in range(5):
        prompt, victim = 100 * seed + round_, int(random.integers(2))
        for worker in workers:
            worker("fill", prompt=prompt, blocks=12, at=0)
        orders = [keeper("order", direction="store", prompt=prompt, blocks=12)]
        if round_:
            orders.append(keeper("order", direction="load", prompt=prompt - 1, blocks=12))
        for worker in workers:
            for order, at in zip(orders, (0, 32), strict=False):
                worker.begin("execute", instruction=order["instruction"], at=at)
        time.sleep(float(random.uniform(0, 0.004)))
        workers[victim].kill()
        for _ in orders:
            workers[1 - victim].answer()
        outcomes = [keeper("result", number=order["number"])["outcomes"] for order in orders]
        assert set(outcomes[0]) in ({int(STORED)}, {int(FAILED)})
        check_conserved(keeper)
        workers[victim] = start("worker", tmp_path / "meet", victim)
        workers[victim]("join")
        keeper("wait_for_workers")
        if outcomes[0][0] == STORED:
            load_and_check(keeper, workers, prompt, 12)
    check_conserved(keeper)


def test_what_strangers_send_does_not_end_the_keeper(
    trio: tuple[Process, Process, Process], tmp_path: Path
) -> None:
    """Messages that are not ours, from one who has not joined; the keeper goes on hearing of its ranks."""
    keeper, first, second = trio
    (path,) = (entry for entry in (tmp_path / "meet").iterdir() if stat.S_ISSOCK(entry.stat().st_mode))
    for message in (
        b"[" * 50_000,
        b"\xff\x00",
        b"{}",
        b'{"type": "join", "rank": [1]}',
        b'{"type": "ended"}',
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(20)
            stranger.connect(str(path))
            stranger.send(message)
            with contextlib.suppress(ConnectionError):
                while stranger.recv(1 << 16):
                    pass
    store(keeper, [first, second], 1, 4)
    load_and_check(keeper, [first, second], 1, 4)
