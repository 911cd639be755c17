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
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disk_driver import ROOMY

DRIVER = Path(__file__).with_name("disk_driver.py")
PATIENCE = 40.0


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
    wrong_bytes: int = 0
    revived: int = 0
    sabotages: int = 0
    opened_from: dict[str, int] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Tally") -> "Tally":
        for name in ("cycles", "killed", "checks", "blocks_checked", "hits", "hits_expected"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("served", "wrong_bytes", "revived", "sabotages"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
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
        self._lines: list[list[str]] = []

    def begin(self, plan: dict[str, Any]) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(plan).encode() + b"\n")
        self.popen.stdin.flush()

    def line(self, until: float) -> list[str] | None:
        """The next line's words; None when the time is over."""
        while not self._lines:
            ready, _, _ = select.select([self._out], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None
            got = os.read(self._out, 1 << 16)
            if not got:
                raise RuntimeError("the server of the drivers has ended")
            *whole, self._rest = (self._rest + got).split(b"\n")
            self._lines += [one.decode().split() for one in whole]
        return self._lines.pop(0)

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
    maybe: set[int] = field(default_factory=set)  # stored, or dropped, without an answer; or sabotaged
    gone: set[int] = field(default_factory=set)  # dropped
    next_chain: int = 0

    def note(self, words: list[str]) -> None:
        word, chain = words[0], int(words[1])
        if word == "store":
            self.maybe.add(chain)
            self.next_chain = chain + 1
        elif word == "durable":
            self.maybe.discard(chain)
            self.live.add(chain)
        elif word == "drop":
            self.live.discard(chain)
            self.maybe.add(chain)
        elif word == "dropped":
            self.maybe.discard(chain)
            self.gone.add(chain)

    def forget_promises(self, chains: set[int] | None = None) -> None:
        """Somebody has damaged what holds them: right bytes or a miss from now on."""
        lost = set(self.live if chains is None else self.live & chains)
        self.live -= lost
        self.maybe |= lost | self.gone
        self.gone.clear()


class Campaign:
    """Cycles on one directory.

    Args:
        home: An empty directory.
        seed: Of all that is random here and in the drivers.
        capacity: Of the disk: ROOMY or TIGHT.
        between: Called between two cycles, to do damage.
        during: Called while a driver works, to do damage.
    """

    def __init__(
        self,
        home: Path,
        seed: int,
        capacity: int = ROOMY,
        between: "Callable[[Campaign], None] | None" = None,
        during: "Callable[[Campaign], None] | None" = None,
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

    @property
    def store(self) -> Path | None:
        """The directory of the one store, once there is one."""
        found = sorted((self.disk / "stores").glob("*-*"))
        return found[0] if found else None

    def run(self, cycles: int) -> Tally:
        with Server(self.seed, self.home / "drivers.log") as server:
            for _ in range(cycles):
                self._one_cycle(server, last=False)
                if self.tally.troubles:
                    return self.tally
                if self.between is not None:
                    self.between(self)
            self._one_cycle(server, last=True)
        return self.tally

    def _plan(self, last: bool) -> dict[str, Any]:
        promises = self.capacity == ROOMY

        def some(chains: set[int], most: int) -> list[int]:
            ordered = sorted(chains)
            if last or len(ordered) <= most:
                return ordered
            newest = ordered[-most // 2 :]
            return newest + self.random.sample(ordered[: -len(newest)], most - len(newest))

        # What is checked every time: the newest and some of the others; all of it every eighth time.
        most = 1 << 30 if self.cycle % 8 == 7 else 40
        check = some(self.book.live, most)
        return {
            "directory": str(self.disk),
            "capacity": self.capacity,
            "cycle": self.cycle,
            "live": sorted(self.book.live),
            "next_chain": self.book.next_chain,
            "check": check if promises else [],
            "maybe": some(self.book.maybe, most // 4) + ([] if promises else check),
            "gone": some(self.book.gone, most // 2),
            "keep": 60 if promises else 1000,
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
        pid, killed, damaged = 0, False, False
        deadline = begun + PATIENCE
        while True:
            until = min(deadline, *(t for t in (kill_at, damage_at) if t is not None), deadline)
            words = server.line(until)
            now = time.monotonic()
            if words is None:
                if damage_at is not None and now >= damage_at and self.during is not None:
                    damage_at, damaged = None, True
                    self.during(self)
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
                if damaged:
                    self.book.forget_promises()  # what was written before and told after
                return
            else:
                self.book.note(words)
                if kill_after is not None:
                    kill_after -= 1
                    if kill_after == 0 and pid and not killed:
                        killed = True
                        _kill(pid)

    def _note_checked(self, words: list[str], plan: dict[str, Any]) -> None:
        hits, expected, _, revived, served = map(int, words[1:])
        self.tally.served += served
        self.tally.checks += 1
        self.tally.hits += hits
        self.tally.hits_expected += expected
        self.tally.revived += revived
        self.tally.blocks_checked += sum(
            1 + chain // 2 % 4 for chain in (*plan["check"], *plan["maybe"], *plan["gone"])
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


def _kill(pid: int, signum: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was closed in order meanwhile
        os.kill(pid, signum)


# --- damage ---


def damage_catalog(campaign: Campaign) -> None:
    """Deletes, cuts, overwrites or turns back the catalog: it costs hits or time, never right bytes."""
    store = campaign.store
    if store is None or not (store / "catalog.mdb").exists():
        return
    catalog = store / "catalog.mdb"
    older = campaign.home / f"catalog.{campaign.cycle}"
    kinds = {"keep a copy": 4, "delete": 4, "cut": 4, "older": 4, "zero": 1, "garbage": 1}
    what = campaign.random.choices(list(kinds), list(kinds.values()))[0]
    if what == "keep a copy":
        shutil.copyfile(catalog, older)
        campaign.old_catalogs = [*campaign.old_catalogs[-4:], (older, set(campaign.book.live))]
        return
    size = catalog.stat().st_size
    if what == "delete":
        catalog.unlink()
    elif what == "cut":
        os.truncate(catalog, campaign.random.randrange(size + 1))
    elif what in ("zero", "garbage"):
        with catalog.open("r+b") as file:
            begin = campaign.random.choice([0, campaign.random.randrange(size)])
            count = campaign.random.randint(1, size - begin)
            file.seek(begin)
            file.write(bytes(count) if what == "zero" else campaign.random.randbytes(count))
        # A record that lies about a slot costs the block that stands there.
        campaign.book.forget_promises()
    elif campaign.old_catalogs:
        path, then = campaign.random.choice(campaign.old_catalogs)
        shutil.copyfile(path, catalog)
        # What came later may stand in a slot that the older catalog says to hold something else.
        campaign.book.forget_promises(campaign.book.live - then)
    campaign.tally.sabotages += 1


def damage_slots(campaign: Campaign) -> None:
    """Cuts, swaps, zeroes or overwrites slot files: misses, never wrong bytes, no crash, no hang."""
    store = campaign.store
    files = [] if store is None else sorted(store.glob("slots.*"))
    if not files or campaign.random.random() < 0.3:
        return
    chosen = campaign.random.choice(files)
    size = chosen.stat().st_size
    what = campaign.random.choice(["cut", "swap slots", "swap files", "zero", "overwrite", "flip"])
    if size == 0:
        return
    if what == "cut":
        os.truncate(chosen, campaign.random.randrange(size))
    elif what == "swap files" and len(files) > 1:
        aside = chosen.with_suffix(".aside")
        other = files[0] if chosen == files[1] else files[1]
        chosen.rename(aside)
        other.rename(chosen)
        aside.rename(other)
    else:
        stride = 8192 if chosen.name == "slots.0" else 16384
        used = min(size, stride * 200)  # where blocks are
        with chosen.open("r+b") as file:
            if what in ("zero", "overwrite"):
                begin = campaign.random.randrange(used)
                count = campaign.random.randint(1, min(1 << 20, size - begin))
                file.seek(begin)
                file.write(bytes(count) if what == "zero" else campaign.random.randbytes(count))
            else:
                for _ in range(20):
                    a, b = (campaign.random.randrange(max(1, used // stride)) * stride for _ in "ab")
                    file.seek(a)
                    one = bytearray(file.read(stride))
                    file.seek(b)
                    two = file.read(stride)
                    if what == "flip" and one:
                        one[campaign.random.randrange(len(one))] ^= 1 << campaign.random.randrange(8)
                        b = a
                    file.seek(b)
                    file.write(one)
                    if what != "flip":
                        file.seek(a)
                        file.write(two)
    campaign.book.forget_promises()
    campaign.tally.sabotages += 1
