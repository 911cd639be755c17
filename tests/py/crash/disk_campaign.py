"""Campaigns of crashes: a driver process works on a disk tier and is killed; a book says what must be left.

The book is kept here, in the process that survives, from the lines that the driver wrote before it died (a
pipe keeps what was written to it). What the engine called durable must be served, what it called dropped must
never be, what is in between may be either, and bytes are right or not there.
"""

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disk_driver import LONGEST_CHAIN, ROOMY, chain_keys, group_of

DRIVER = Path(__file__).with_name("disk_driver.py")
PATIENCE = 40.0
NEVER_EVICTED = 12  # blocks of a group: with no more stored since, none of 37 slots is given away


@dataclass
class Tally:
    """What a campaign has seen."""

    cycles: int = 0
    killed: int = 0
    checks: int = 0  # cycles that lived long enough to check everything
    blocks_checked: int = 0
    hits: int = 0
    hits_expected: int = 0
    served: int = 0  # without a promise
    not_served: int = 0  # the same, and as it may be
    wrong_bytes: int = 0
    revived: int = 0
    sabotages: int = 0
    most_bytes: int = 0  # under the directory, at any moment that was looked at
    opened_from: dict[str, int] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Tally") -> "Tally":
        for name in ("cycles", "killed", "checks", "blocks_checked", "hits", "hits_expected"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("served", "not_served", "wrong_bytes", "revived", "sabotages"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.most_bytes = max(self.most_bytes, other.most_bytes)
        for source, times in other.opened_from.items():
            self.opened_from[source] = self.opened_from.get(source, 0) + times
        self.troubles += other.troubles
        return self

    @property
    def good(self) -> bool:
        """Right bytes, nothing revived, no crash, and at least 99 % of what was durable."""
        kept = self.hits >= 0.99 * self.hits_expected
        return kept and not (self.wrong_bytes or self.revived or self.troubles)


class Server:
    """The process that forks drivers. Every wait has a deadline: what hangs is a trouble."""

    def __init__(self, seed: int, log: Path) -> None:
        self._log = log.open("ab")
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(
            [sys.executable, str(DRIVER), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        assert self.popen.stdout is not None
        self._out = self.popen.stdout.fileno()
        self._rest = b""
        self.lines: list[list[str]] = []  # said, and not yet taken by line()

    def begin(self, plan: dict[str, Any]) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(plan).encode() + b"\n")
        self.popen.stdin.flush()

    def line(self, until: float) -> list[str] | None:
        """The next line's words; None when the time is over."""
        while not self.lines:
            if not self._gather(max(0.0, until - time.monotonic())):
                return None
        return self.lines.pop(0)

    def gather(self) -> None:
        """Into `lines` comes whatever has been said so far."""
        while self._gather(0):
            pass

    def _gather(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._out], [], [], seconds)
        if not ready:
            return False
        got = os.read(self._out, 1 << 16)
        if not got:
            raise RuntimeError("the server of the drivers has ended")
        *whole, self._rest = (self._rest + got).split(b"\n")
        self.lines += [one.decode().split() for one in whole]
        return True

    def close(self) -> None:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.close()
        try:
            self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self.popen.stdout.close()
        self._log.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Book:
    """Chains by what is known of them."""

    live: set[int] = field(default_factory=set)  # durable
    maybe: set[int] = field(default_factory=set)  # stored, or dropped, without an answer; or harmed
    gone: set[int] = field(default_factory=set)  # dropped
    harmed: set[int] = field(default_factory=set)  # somebody has damaged what holds them, or may have
    next_chain: int = 0

    def note(self, words: list[str]) -> None:
        word, chain = words[0], int(words[1])
        if word == "store":
            self.maybe.add(chain)
            self.next_chain = chain + 1
        elif word == "durable" and chain not in self.harmed:
            self.maybe.discard(chain)
            self.live.add(chain)
        elif word == "drop":
            self.live.discard(chain)
            self.maybe.add(chain)
        elif word == "dropped" and chain not in self.harmed:
            self.maybe.discard(chain)
            self.gone.add(chain)

    def harm(self, chains: set[int]) -> None:
        """Of these nothing is promised any more, not even that a drop reaches them: right bytes or a miss."""
        self.harmed |= chains
        self.maybe |= (self.live | self.gone) & chains
        self.live -= chains
        self.gone -= chains

    def newest(self, blocks: int) -> set[int]:
        """The durable chains after which at most so many blocks of their group were stored."""
        found = set()
        for group in range(2):
            after = 0
            for chain in reversed(range(self.next_chain)):
                if group_of(chain) != group:
                    continue
                if chain in self.live:
                    found.add(chain)
                after += blocks_of(chain)
                if after > blocks:
                    break
        return found


@dataclass
class Harm:
    """What a damage has done."""

    chains: set[int]  # whose slots it touched
    lasting: bool = False  # what the running driver goes on to write is harmed, too


def blocks_of(chain: int) -> int:
    return 1 + chain // 2 % LONGEST_CHAIN


class Campaign:
    """Cycles on one directory.

    Args:
        home: An empty directory.
        seed: Of all that is random here and in the drivers.
        capacity: Of the disk: ROOMY or TIGHT.
        between: Called between two cycles, to do damage. Returns what it did, or None for nothing.
        during: The same, called while a driver works.
    """

    def __init__(
        self,
        home: Path,
        seed: int,
        capacity: int = ROOMY,
        between: "Callable[[Campaign], Harm | None] | None" = None,
        during: "Callable[[Campaign], Harm | None] | None" = None,
    ) -> None:
        self.home = home
        self.disk = home / "disk"
        self.seed = seed
        self.capacity = capacity
        self.between = between
        self.during = during
        self.random = random.Random(seed)
        self.book = Book()
        self.tally = Tally()
        self.cycle = 0
        self.old_catalogs: list[tuple[Path, set[int]]] = []
        self._chain_of_key: dict[bytes, int] = {}
        self._keys_known = 0  # of so many chains

    @property
    def store(self) -> Path | None:
        """The directory of the one store, once there is one."""
        found = sorted((self.disk / "stores").glob("*-*"))
        return found[0] if found else None

    def chain_of(self, key: bytes) -> int | None:
        """Of a key that this campaign has stored so far."""
        while self._keys_known < self.book.next_chain:
            for one in chain_keys(self.seed, self._keys_known):
                self._chain_of_key[bytes(one)] = self._keys_known
            self._keys_known += 1
        return self._chain_of_key.get(key)

    def run(self, cycles: int) -> Tally:
        with Server(self.seed, self.home / "drivers.log") as server:
            for _ in range(cycles):
                self._one_cycle(server, last=False)
                if self.tally.troubles:
                    return self.tally
                if self.between is not None and (harm := self.between(self)) is not None:
                    self.tally.sabotages += 1
                    self.book.harm(harm.chains)
            self._one_cycle(server, last=True)
        return self.tally

    def _plan(self, last: bool) -> dict[str, Any]:
        roomy = self.capacity == ROOMY
        # A disk that evicts owes those that were stored last, whatever was read in between.
        promised = self.book.live if roomy else self.book.newest(NEVER_EVICTED)

        def some(chains: set[int], most: int) -> list[int]:
            ordered = sorted(chains)
            if last or len(ordered) <= most:
                return ordered
            newest = ordered[-most // 2 :]
            return newest + self.random.sample(ordered[: -len(newest)], most - len(newest))

        # What is checked every time: the newest and some of the others; all of it every eighth time.
        most = 1 << 30 if self.cycle % 8 == 7 else 40
        check = some(promised, most)
        return {
            "directory": str(self.disk),
            "capacity": self.capacity,
            "cycle": self.cycle,
            "live": sorted(self.book.live),
            "next_chain": self.book.next_chain,
            "check": check,
            "maybe": some(self.book.maybe, most // 4) + some(self.book.live - promised, most),
            "gone": some(self.book.gone, most // 2),
            "keep": 60 if roomy else 1000,
            "operations": 0 if last else self.random.choice([8, 10**6, 10**6, 10**6, 10**6, 10**6]),
        }

    def _one_cycle(self, server: Server, last: bool) -> None:
        self.cycle += 1
        self.tally.cycles += 1
        plan = self._plan(last)
        server.begin(plan)
        # Killed: a while after its beginning (opening, checking), a while after its checks (working), or
        # right after the n-th thing that it said from then on.
        kind = "never" if last else self.random.choice(["early", "later", "later", "later", "said", "said"])
        begun = time.monotonic()
        kill_at = begun + self.random.uniform(0, 0.08) if kind == "early" else None
        kill_after = self.random.randint(1, 12) if kind == "said" else None
        damage_at: float | None = None
        pid, killed, lasting = 0, False, False
        deadline = begun + PATIENCE
        while True:
            until = min(deadline, *(t for t in (kill_at, damage_at) if t is not None), deadline)
            words = server.line(until)
            now = time.monotonic()
            if words is None or words[0] in ("checked", "end"):
                self._note_room()
            if words is None:
                if damage_at is not None and now >= damage_at and self.during is not None:
                    damage_at = None
                    lasting |= self._damage_while_running(server)
                elif kill_at is not None and now >= kill_at and pid:
                    kill_at, killed = None, True
                    _kill(pid)
                elif now >= deadline:
                    self._hung(pid)
                    return
                continue
            if words[0] == "pid":
                pid = int(words[1])
            elif words[0] == "open":
                source = words[1].split(":")[0]
                self.tally.opened_from[source] = self.tally.opened_from.get(source, 0) + 1
            elif words[0] == "checked":
                self._note_checked(words, plan)
                now = time.monotonic()
                if kind == "later":
                    kill_at = now + self.random.uniform(0, 0.06)
                if self.during is not None and not last and self.random.random() < 0.6:
                    damage_at = now + self.random.uniform(0, 0.03)
            elif words[0] in ("wrong", "missing", "revived"):
                self._note_bad(words)
            elif words[0] == "end":
                self._note_end(int(words[1]), killed)
                if lasting:
                    self.book.harm(set(range(self.book.next_chain)))
                return
            else:
                self.book.note(words)
                if kill_after is not None:
                    kill_after -= 1
                    if kill_after == 0 and pid and not killed:
                        killed = True
                        _kill(pid)

    def _damage_while_running(self, server: Server) -> bool:
        """Returns whether what the driver goes on to write is harmed."""
        assert self.during is not None
        settled = set(self.book.live)
        harm = self.during(self)
        if harm is None:
            return False
        self.tally.sabotages += 1
        # What was under way meanwhile may have been touched as well.
        server.gather()
        stored = [int(words[1]) for words in server.lines if words[0] == "store"]
        until = max([self.book.next_chain - 1, *stored]) + 1
        self.book.harm(harm.chains | (set(range(until)) - settled - self.book.gone))
        return harm.lasting

    def _note_checked(self, words: list[str], plan: dict[str, Any]) -> None:
        hits, expected, _, revived, served = map(int, words[1:])
        self.tally.served += served
        self.tally.not_served += sum(map(blocks_of, plan["maybe"])) - served
        self.tally.checks += 1
        self.tally.hits += hits
        self.tally.hits_expected += expected
        self.tally.revived += revived
        self.tally.blocks_checked += sum(
            blocks_of(chain) for chain in (*plan["check"], *plan["maybe"], *plan["gone"])
        )

    def _note_room(self) -> None:
        self.tally.most_bytes = max(self.tally.most_bytes, allocated_bytes(self.disk))
        if self.tally.most_bytes > self.capacity:
            self.tally.troubles.append(
                f"{self.tally.most_bytes} bytes in cycle {self.cycle}, above the capacity of {self.capacity}"
            )

    def _note_bad(self, words: list[str]) -> None:
        if words[0] == "wrong":
            self.tally.wrong_bytes += 1
        if words[0] != "missing":
            self.tally.troubles.append(f"{words[0]} bytes of chain {words[1]} in cycle {self.cycle}")
        sys.stderr.write(f"seed {self.seed}, cycle {self.cycle}: {' '.join(words)}\n")

    def _note_end(self, status: int, killed: bool) -> None:
        if killed and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self.tally.killed += 1
        elif status != 0:
            self.tally.troubles.append(f"the driver of cycle {self.cycle} ended with wait status {status}")

    def _hung(self, pid: int) -> None:
        self.tally.troubles.append(f"the driver of cycle {self.cycle} said nothing for {PATIENCE:.0f} s")
        if pid:
            _kill(pid, signal.SIGUSR1)  # its stacks into the log
            time.sleep(0.5)
            _kill(pid)

    def tail(self) -> str:
        """The end of what the drivers wrote to standard error."""
        return (self.home / "drivers.log").read_text(errors="replace")[-4000:]


def allocated_bytes(directory: Path) -> int:
    """Of everything below it, as the file system counts (st_blocks)."""
    total = 0
    for path in (directory, *directory.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # replaced just now
            total += path.lstat().st_blocks * 512
    return total


def _kill(pid: int, signum: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was closed in order meanwhile
        os.kill(pid, signum)
