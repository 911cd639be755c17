"""kvtier beside other stores of KV blocks, in one run, taking turns: `kvtier bench peers`.

Each side is a process in an environment of its own (peer_list.py, benchmarks/peers). Values begin and end in
the framework's pages on every side, contiguous and in huge pages. A round is: put by one, put by the other,
get by one, get by the other; who is first changes. A put of a side with files ends with syncfs(), a get
begins with the page cache dropped; kvtier's put to disk waits until the blocks are durable and checksummed,
which no file of the others is. docs/peers.md says what each figure means.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from kvtier.cli import machine, peer_tables, plots
from kvtier.cli.peer_limits import plain_rates
from kvtier.cli.peer_list import KVTIER, PEERS, Peer, default_cache, environment_folder, python_of
from kvtier.cli.peer_side import HangError, Side, SideError
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, Result, measured
from kvtier.errors import ConfigError, ResourceError
from kvtier.layout import check_extent

SIZES = {"2MiB": 2 << 20, "32MiB": 32 << 20}
METHOD = {
    "sides": "a process each; values contiguous",
    "memory": "pages, and staging memory that a peer allocates, in transparent huge pages; how much is, "
    "by /proc/PID/smaps, stands for both sides in machine.peers, huge_pages",
    "disk": "puts end with syncfs(), gets begin with the page cache dropped; kvtier's puts are durable",
    "limit": "of a kvtier row: the peer's median in the same rounds; of a peer's put or get a "
    "reference: what plain calls did with as many bytes (machine/...): a copy, or O_DIRECT writes by 16 "
    "Python threads and fdatasync, or reads; not the most that the machine can do, so a ratio may be above 1",
}
_KEYS = 65_536
_BEHAVIOUR_SIZE = "2MiB"
_SECONDS_BEFORE_KILL = 2.0
_RESTARTS = 3  # of each end
_CAP_ROUNDS = 8
_SLACK_BYTES = 256 << 20
_MOSTLY = 0.9  # of what a side allocated in huge pages: with less it is said in the output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench peers`."""
    parser.add_argument("--dir", default=".", metavar="D", help="a directory on the drive (default: here)")
    parser.add_argument("--only", action="append", metavar="PEER", help="only this one; may be repeated")
    parser.add_argument("--list", action="store_true", help="say which peers there are, and measure nothing")
    parser.add_argument("--mib", type=int, default=256, help="moved by each pass (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratios there")
    parser.add_argument("--cache", metavar="D", help="where the peers' environments are kept")
    parser.set_defaults(rounds=5)


@dataclass
class Run:
    """What the parts of one run share."""

    args: argparse.Namespace
    report: Report
    progress: Progress
    root: Path
    home: Path
    cache: Path
    pythons: dict[str, str] = field(default_factory=dict)
    sides: dict[str, Side] = field(default_factory=dict)
    hung: set[str] = field(default_factory=set)
    count: int = 0

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty one for a store, removed in the end."""
        self.count += 1
        path = self.home / str(self.count)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def side(self, peer: Peer) -> Side:
        """The peer's process: the one that runs, or a new one. It serves one store after the other."""
        if peer.name not in self.sides:
            script, *rest = peer.script
            path = self.root / "benchmarks" / "peers" / script
            self.count += 1
            log = self.home / f"{self.count}.log"
            self.sides[peer.name] = Side([self.pythons[peer.name], str(path), *rest], log, name=peer.name)
        return self.sides[peer.name]

    def kill(self, *names: str) -> None:
        """Kills these peers' processes, with what they started; without names, all."""
        for name in names or tuple(self.sides):
            if (side := self.sides.pop(name, None)) is not None:
                side.close()

    def open(self, peer: Peer, home: Path, size: int) -> tuple[Side, dict[str, Any]]:
        """Opens a store for values of `size` bytes; what is there already is found again."""
        side = self.side(peer)
        opened = side.ask(
            "open",
            home=str(home),
            size=size,
            blocks=self.blocks(size),
            capacity=self.capacity(size),
            seed=self.args.seed,
            on_disk=peer.tier == "disk",
            options=dict(peer.options),
        )
        self.note_versions(peer, opened)
        return side, opened

    def note_versions(self, peer: Peer, opened: dict[str, Any]) -> None:
        """Keeps the versions that a side says it is of."""
        self.report.machine["peers"].setdefault(peer.name, {})["versions"] = opened["versions"]

    def capacity(self, size: int) -> int:
        """What stores with files are told to stay below: about four passes."""
        return 3 * self.blocks(size) * size + _SLACK_BYTES

    def blocks(self, size: int) -> int:
        """Values of a pass."""
        mib: int = self.args.mib
        return max(4, (mib << 20) // size)

    def skip(self, name: str, reason: str) -> None:
        """Notes what was left out and why."""
        for path, word in ((self.home, "DIR"), (self.cache, "CACHE"), (self.root, "CHECKOUT")):
            reason = reason.replace(str(path), word)
        self.report.machine["skipped"][name] = reason[:300]
        print(f"left out: {name}: {reason[:300]}", file=self.report.out)

    def failed(self, what: str, error: SideError) -> None:
        """Notes a part that is not there: for the peer's sake, or for kvtier's, which fails the run."""
        if error.side == KVTIER.name:
            self.report.checks["kvtier_ran"] = False
            self.skip(what, f"kvtier itself: {error}")
        else:
            self.skip(what, str(error))

    def check(self, peer: Peer, name: str, passed: bool) -> None:
        """A check of kvtier's own side; what a peer does is a result alone."""
        if peer.name == KVTIER.name:
            self.report.checks[name] = self.report.checks.get(name, True) and passed

    def wrong(self, name: str, what: str) -> None:
        """Notes wrong bytes: no figure. kvtier's own fail the run."""
        self.report.machine["wrong_bytes"][name] = what
        print(f"WRONG BYTES: {name}: {what}", file=self.report.out)
        if name.startswith("kvtier/"):
            self.report.checks["kvtier_bytes"] = False


def figures(document: dict[str, Any]) -> list[Any]:
    """What `kvtier bench report` shows of a document: the ratios, if there are any."""
    results = [Result(**result) for result in document["results"]]
    report = Report(document["command"], machine=document["machine"], results=results)
    return [peer_tables.draw(report)] if peer_tables.ratios(report) else []


def check(args: argparse.Namespace) -> None:
    """Refuses wrong options; a peer that is named twice is measured once.

    Raises:
        ConfigError: The message names them.
    """
    check_extent("--seed", args.seed, 0)
    known = [peer.name for peer in PEERS]
    args.only = list(dict.fromkeys(args.only)) if args.only else None
    for name in args.only or []:
        if name not in known:
            raise ConfigError(f"--only {name}: allowed: {', '.join(known)}")
    if not 8 <= args.mib <= 4096:
        raise ConfigError(f"--mib {args.mib}: allowed: 8 to 4096")


def measure(args: argparse.Namespace, report: Report) -> None:
    """Runs the benchmark into `report`."""
    report.machine["method"]["options"] = {"mib": args.mib, "only": args.only}
    root = machine.checkout()
    if root is None or not (root / "benchmarks" / "peers").is_dir():
        raise ResourceError("bench peers needs a checkout: its scripts are in benchmarks/peers")
    known = {peer.name: peer for peer in PEERS}
    chosen = [known[name] for name in args.only] if args.only else list(PEERS)
    cache = Path(args.cache).resolve() if args.cache else default_cache()
    if args.list:
        _list(chosen, root, cache, report)
        return
    plots.check(args.plot)
    _check_room(args)
    report.machine |= {"drive": machine.drive(Path(args.dir)), "skipped": {}, "wrong_bytes": {}, "peers": {}}
    report.checks |= {"kvtier_bytes": True, "kvtier_ran": True}
    home = Path(tempfile.mkdtemp(prefix="kvtier-peers.", dir=args.dir)).resolve()
    try:
        with Progress(report.out, sum(map(_units, chosen)) + 6) as progress:
            run = Run(args, report, progress, root, home, cache)
            try:
                _everything(run, chosen)
            finally:
                run.kill()
    finally:
        shutil.rmtree(home, ignore_errors=True)
        peer_tables.print_tables(report)
    if args.plot:
        peer_tables.plot(report, args.plot)


def _everything(run: Run, chosen: list[Peer]) -> None:
    run.pythons[KVTIER.name] = python_of(KVTIER, run.root, run.cache)
    behaviour(run, KVTIER)
    for peer in chosen:
        run.progress.phase(f"{peer.name}: environment")
        try:
            run.pythons[peer.name] = python_of(peer, run.root, run.cache)
        except SideError as error:
            run.skip(peer.name, str(error))
            run.progress.step(_units(peer))
            continue
        run.report.machine["peers"][peer.name] = {"about": peer.about}
        for size in SIZES if peer.moves else ():
            _part(run, peer, size, partial(throughput, run, peer, size))
        if peer.steps:
            _part(run, peer, "lookup", partial(index_work, run, peer))
        behaviour(run, peer)
        run.kill()


def _units(peer: Peer) -> int:
    return len(SIZES) * 2 * bool(peer.moves) + bool(peer.steps) + _behaviours(peer)


def _behaviours(peer: Peer) -> int:
    return 2 * peer.survives + peer.holder + 2 * (peer.bounded and peer.tier == "disk")


def _part(run: Run, peer: Peer, what: str, measure: Callable[[], None]) -> None:
    """Runs one part of a peer. Once a side hung, nothing else with it is tried: that would be over late."""
    run.progress.phase(f"{peer.name}: {what}")
    name = f"{peer.name}/{what}"
    try:
        if peer.name in run.hung:
            run.skip(name, "it hung before")
        elif KVTIER.name in run.hung:
            run.skip(name, "kvtier itself hung before")
        else:
            measure()
    except SideError as error:
        if isinstance(error, HangError):
            run.hung.add(error.side)
        run.failed(name, error)
        run.kill()
    run.progress.step(2 if what in SIZES else 1)


def _check_room(args: argparse.Namespace) -> None:
    free, needed = shutil.disk_usage(args.dir).free, 16 * (args.mib << 20) + 8 * _SLACK_BYTES
    if free < needed:
        raise ResourceError(f"--dir {args.dir}: {free >> 20} MiB are free; needs {needed >> 20} MiB")
    if (needed := 12 * (args.mib << 20) + (2 << 30)) > machine.available_bytes():
        raise ResourceError(f"--mib {args.mib}: needs {needed >> 20} MiB of free memory")


def _list(chosen: list[Peer], root: Path, cache: Path, report: Report) -> None:
    for peer in chosen:
        state = "there"
        if peer.environment == "vllm":
            state = "there" if (root / ".venv-vllm" / "bin" / "python").exists() else "missing: make vllm-env"
        elif peer.environment != "kvtier":
            folder = environment_folder(peer.environment, root, cache)
            state = "there" if (folder / ".ready").exists() else "made when it is needed"
        if peer.program is not None and shutil.which(peer.program) is None:
            state = f"missing: {peer.program} is not installed"
        print(f"{peer.name:20} {peer.about}; environment: {state}", file=report.out)


# --- put and get ---


def throughput(run: Run, peer: Peer, size_name: str) -> None:
    """Rounds of put and get by both sides in turn."""
    size = SIZES[size_name]
    moved = run.blocks(size) * size
    ours = replace(KVTIER, tier=peer.tier, options={"tier": peer.tier})
    rates: dict[str, dict[str, list[float]]] = {
        what: {KVTIER.name: [], peer.name: []} for what in ("put", "get")
    }
    plain: dict[str, list[float]] = {what: [] for what in rates}
    with contextlib.ExitStack() as stack:
        sides = []
        for each in (ours, peer):
            side, opened = run.open(each, stack.enter_context(run.folder()), size)
            configs = run.report.machine["peers"].setdefault(each.name, {})
            configs[f"{each.tier} {size_name}"] = opened["about"]
            sides.append((each, side))
        machine_itself = stack.enter_context(plain_rates(peer.tier, stack.enter_context(run.folder()), moved))
        for number in range(run.args.rounds + 1):
            turns = sides if number % 2 == 0 else sides[::-1]
            for what in rates:
                plain[what].append(machine_itself[what]())
                for each, side in turns:
                    took = _pass(run, each, side, what, number, size)
                    if took is None:
                        run.kill()
                        return
                    if number > 0:  # the first warms up
                        rates[what][each.name].append(moved / took / 1e9)
            for _, side in turns:
                side.ask("forget", number=number)
        _huge_pages(run, peer, size_name, sides)
        for _, side in sides:
            side.ask("close")
    for what in peer.moves:
        of = rates[what]
        _record(run, f"{what}/{size_name}", peer, of[KVTIER.name], of[peer.name], "GB/s", plain[what][1:])


def _huge_pages(run: Run, peer: Peer, size_name: str, sides: list[tuple[Peer, Side]]) -> None:
    """Notes for both sides how much of what they allocated is in huge pages."""
    found = {each.name: side.ask("memory") for each, side in sides}
    run.report.machine["peers"][peer.name].setdefault("huge_pages", {})[size_name] = found
    for name, memory in found.items():
        if memory["in_huge_pages"] < _MOSTLY:
            text = f"{100 * memory['in_huge_pages']:.0f} % of {memory['mib']} MiB are in huge pages"
            print(f"{peer.name}/{size_name}: {name}: {text}", file=run.report.out)


def _pass(run: Run, peer: Peer, side: Side, what: str, number: int, size: int) -> float | None:
    """Seconds of one; None after a note if the bytes were wrong or not there."""
    if what == "put":
        return float(side.ask("put", number=number)["seconds"])
    answer = side.ask("get", number=number, cold=peer.tier == "disk")
    blocks = run.blocks(size)
    if answer["wrong"]:
        run.wrong(f"{peer.name}/get/{size >> 20}MiB", f"{answer['wrong']} of {blocks} values")
        return None
    if answer["right"] != blocks:
        what = f"get: {peer.name} had {answer['right']} of {blocks} values that were just put"
        raise SideError(what, peer.name)
    return float(answer["seconds"])


def _record(
    run: Run,
    name: str,
    peer: Peer,
    ours: list[float],
    theirs: list[float],
    unit: str,
    plain: list[float] | None = None,
) -> None:
    """Adds both sides' rows and the ratio; `plain` is what the machine itself did in the same rounds."""
    row = measured(f"{KVTIER.name}/{name}/{peer.name}", ours, unit, theirs)
    pairs = zip(ours, theirs, strict=True)
    ratios = [b / a if unit in ("ms", "s") else a / b for a, b in pairs]
    if peer_tables.COPIED not in name:  # that one stands beside the peer's row of index work alone
        run.report.add(measured(f"{peer.name}/{name}", theirs, unit, plain))
    run.report.add(row, measured(f"{row.name}/ratio", ratios, "x"))
    if plain is not None:
        shares = [a / b for a, b in zip(ours, plain, strict=True)]
        run.report.add(
            measured(f"machine/{name}/{peer.name}", plain, unit),
            measured(f"{row.name}/of_machine", shares, "x"),
        )


# --- index work ---


def index_work(run: Run, peer: Peer) -> None:
    """Rounds of lookups, and of what else both can do, on keys of small values in the peer's tier."""
    ours = replace(KVTIER, tier=peer.tier, options={"tier": peer.tier})
    ms: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        sides = []
        for each in (ours, peer):
            side = run.side(each)
            options = {**each.options, "steps": peer.steps, "slots": peer.slots or _KEYS}
            folder = stack.enter_context(run.folder())
            run.note_versions(each, side.ask("steps_open", home=str(folder), count=_KEYS, options=options))
            sides.append((each, side))
        for number in range(run.args.rounds + 1):
            for each, side in sides if number % 2 == 0 else sides[::-1]:
                for step, took in side.ask("steps", number=number)["steps"].items():
                    if number > 0:
                        ms.setdefault(step, {}).setdefault(each.name, []).append(1e3 * took)
        for _, side in sides:
            side.ask("close")
    for step, of in ms.items():
        base = ms[step.removesuffix(peer_tables.COPIED)]
        if KVTIER.name in of and peer.name in base:
            _record(run, f"{step}/{_KEYS}", peer, of[KVTIER.name], base[peer.name], "ms")


# --- behaviour ---


def behaviour(run: Run, peer: Peer) -> None:
    """What becomes of a flipped bit, how far files grow, what is left after an end."""
    if peer.bounded and peer.tier == "disk":
        _part(run, peer, "bitflip", partial(_bitflip, run, peer))
        _part(run, peer, "cap", partial(_cap, run, peer))
    if peer.survives:
        for end in ("killed", "closed"):
            _part(run, peer, f"restart/{end}", partial(_restart, run, peer, end))
    if peer.holder:
        _part(run, peer, "holder", partial(_holder, run, peer))


class _Restarted:
    """A store with one pass of values that is ended, and opened again by another process each time."""

    def __init__(self, run: Run, peer: Peer, end: str, home: Path) -> None:
        self.seconds: list[float] = []
        self.right: list[int] = []
        self._run, self._peer, self._end, self._home = run, peer, end, home
        self._size = SIZES[_BEHAVIOUR_SIZE]
        side, _ = run.open(peer, home, self._size)
        side.ask("put", number=7)
        if end == "killed":
            time.sleep(_SECONDS_BEFORE_KILL)
        self._finish(side)

    def again(self) -> bool:
        """Opens it, asks for all keys, reads all values and ends it; False after a note on wrong bytes."""
        run, peer, blocks = self._run, self._peer, self._run.blocks(self._size)
        side, opened = run.open(peer, self._home, self._size)
        found = side.ask("found", number=7)
        # Nothing is in the new process' memory; the page cache stays as the next opening is to meet it.
        back = side.ask("get", number=7, cold=False)
        self._finish(side)
        run.check(peer, "kvtier_restarts", found["found"] == back["right"] == blocks)
        if back["wrong"]:
            name = f"{peer.name}/restart/{_BEHAVIOUR_SIZE}"
            run.wrong(name, f"{self._end}: {back['wrong']} of {blocks} values")
            return False
        self.right.append(back["right"])
        self.seconds.append(opened["seconds"] + found["seconds"])
        return True

    def _finish(self, side: Side) -> None:
        if self._end == "closed":
            side.ask("close")
        self._run.kill(self._peer.name)


def _restart(run: Run, peer: Peer, end: str) -> None:
    """What is there after an end, and how soon; kvtier in turn with a peer on disk that has anything left."""
    name = f"restart/{_BEHAVIOUR_SIZE}/{end}"
    blocks = run.blocks(SIZES[_BEHAVIOUR_SIZE])
    with contextlib.ExitStack() as stack:
        theirs = _Restarted(run, peer, end, stack.enter_context(run.folder()))
        stores = [theirs]
        if not theirs.again():
            return
        if theirs.right[0]:
            if peer.name != KVTIER.name and peer.tier == "disk" and KVTIER.survives:
                ours = _Restarted(run, KVTIER, end, stack.enter_context(run.folder()))
                stores.append(ours)
                if not ours.again():
                    return
            for number in range(1, _RESTARTS):
                for store in stores if number % 2 == 0 else stores[::-1]:
                    if not store.again():
                        return
    run.report.add(Result(f"{peer.name}/{name}", 100 * min(theirs.right) / blocks, "%", n=blocks))
    if len(stores) == 2:
        _record(run, f"{name}_seconds", peer, ours.seconds, theirs.seconds, "s")
    elif theirs.right[0]:
        run.report.add(measured(f"{peer.name}/{name}_seconds", theirs.seconds, "s"))


def _holder(run: Run, peer: Peer) -> None:
    """The process that holds the values is killed, its client lives on: what is said to be there, and is."""
    size = SIZES[_BEHAVIOUR_SIZE]
    blocks = run.blocks(size)
    with run.folder() as home:
        side, _ = run.open(peer, home, size)
        side.ask("put", number=7)
        side.ask("lose_holder")
        found = side.ask("found", number=7)["found"]
        back = side.ask("get", number=7, cold=False)
        run.kill(peer.name)
    name = f"{peer.name}/holder_killed/{_BEHAVIOUR_SIZE}"
    if back["wrong"]:
        run.wrong(name, f"{back['wrong']} of {blocks} values")
        return
    run.report.add(
        Result(f"{name}/found", 100 * found / blocks, "%", n=blocks),
        Result(name, 100 * back["right"] / blocks, "%", n=blocks),
    )


def _bitflip(run: Run, peer: Peer) -> None:
    size = SIZES[_BEHAVIOUR_SIZE]
    blocks = run.blocks(size)
    flips = (1, blocks // 2, blocks - 1)
    with run.folder() as home:
        side, _ = run.open(peer, home, size)
        side.ask("put", number=3)
        for block in flips:
            if not side.ask("flip", number=3, block=block)["flipped"]:
                raise SideError("its bytes were not found in its files", peer.name)
        answer = side.ask("get", number=3, cold=True)
        side.ask("close")
    name = f"{peer.name}/bitflip/{_BEHAVIOUR_SIZE}"
    run.report.add(Result(name, answer["wrong"], "wrong values served", n=len(flips)))
    run.check(peer, "kvtier_bytes", answer["wrong"] == 0)
    run.check(peer, "kvtier_misses_only_flipped", answer["right"] == blocks - len(flips))


def _cap(run: Run, peer: Peer) -> None:
    size = SIZES[_BEHAVIOUR_SIZE]
    most, refused, newest = 0, "", 0
    with run.folder() as home:
        side, _ = run.open(peer, home, size)
        for number in range(_CAP_ROUNDS):
            try:
                side.ask("put", number=number)
            except HangError:
                raise
            except SideError as error:
                refused = str(error)
            most = max(most, side.ask("usage")["bytes"])
            if refused:
                break
        if not refused:
            newest = side.ask("get", number=_CAP_ROUNDS - 1, cold=True)["right"]
        side.ask("close")
    name = f"{peer.name}/cap/{_BEHAVIOUR_SIZE}"
    blocks = run.blocks(size)
    run.check(peer, "kvtier_within_cap", not refused and most <= run.capacity(size))
    run.report.add(Result(name, most / run.capacity(size), "x of the cap"))
    run.report.add(Result(f"{name}/newest", 100 * newest / blocks, "%", n=blocks))
    if refused:
        run.report.machine["peers"].setdefault(peer.name, {})["at the cap"] = refused[:200]
