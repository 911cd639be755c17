"""How fast the disk tier's slots are written and read, beside fio on the same file in the same run.

Both sides read and write the same file with io_uring and O_DIRECT at the same depth, whole blocks in random
order, each block once; rates count payload bytes. Ours moves and checks 4096 bytes of header with each block,
checksums included. A pass of writes goes three times round the file, as a server writes on and on; syncs are
part of the time on both sides (fio: after each round; ours: every half second, with the catalog's commits).
*_flush is what of our time comes behind the last write: the sync and the commit that end a pass.

Pairs come in ABBA order with a second fio beside the first: fio against fio is the noise floor. Intervals are
of the paired median, by bootstrap, 95 %.

fio is given what makes it fastest: registered files, and registered buffers in huge pages, as ours are
(measured for reads of 2 MiB: 1.6 GB/s without, 2.9 with).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import kvtier
from kvtier.cli import machine
from kvtier.cli.bench import seconds
from kvtier.cli.bench_reopen import store_durably
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, Result, measured, results_table
from kvtier.engine import DiskBench
from kvtier.errors import ConfigError, ResourceError
from kvtier.layout import check_extent

SIZES = {"2MiB": 2 << 20, "256KiB": 256 << 10}
TARGETS = {
    "read_2MiB": "ratio >= 0.97",
    "write_2MiB": "ratio >= 0.95",
    "read_256KiB": "ratio >= 0.97",
    "write_256KiB": "ratio >= 0.95",
    "load_to_device": "ratio >= 0.9",
}
METHOD = {
    "warm_up": "a pass of each side, or a round of load_to_device and encryption, which does not count",
    "repetitions": "n of each result: reads and writes beside fio --pairs, in ABBA order with a second fio; "
    "encryption and load_to_device --rounds",
    "lossless": "yes: every block read is proved by its checksums; load_to_device's bytes are compared",
    "limit": "fio on the same file, beside each pass; of encryption the same without; of load_to_device a "
    "plain read of as many blocks in the same round",
}
_RESAMPLES = 2000
_WRITE_ROUNDS = 3  # of a pass
_LOADED_BLOCKS = 512
_SLACK_BYTES = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench disk`."""
    parser.add_argument("--dir", required=True, metavar="D", help="a directory on the drive to be measured")
    parser.add_argument("--pairs", type=int, default=15, help="of each kind (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=2048, help="moved by each pass (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=32, help="requests in flight (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=_LOADED_BLOCKS, help="of a load (default: %(default)s)")


@dataclass
class _Side:
    """Passes of one side: payload bytes a second and CPU seconds per GB of each."""

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    flush: list[float] = field(default_factory=list)

    def note(self, moved: int, took: float, cpu: float, flush: float = 0.0) -> None:
        self.rates.append(moved / took / 1e9)
        self.cpu.append(cpu / (moved / 1e9))
        self.flush.append(flush)

    def clear(self) -> None:
        for values in (self.rates, self.cpu, self.flush):
            values.clear()


@dataclass
class _Run:
    args: argparse.Namespace
    report: Report
    progress: Progress
    home: Path
    rng: np.random.Generator
    right: bool = True  # of what is measured now: else it has no figure

    def part(self, name: str, *, right: bool = True) -> None:
        """Another part begins, which has its figures if all of its own checks pass."""
        self.progress.phase(name)
        self.right = right

    def check(self, name: str, passed: bool) -> bool:
        self.report.checks[name] = self.report.checks.get(name, True) and passed
        self.right &= passed
        return passed

    def add(self, *results: Result) -> None:
        """Adds what the part measured, unless one of its checks failed."""
        if self.right:
            self.report.add(*results)
        else:
            names = ", ".join(result.name for result in results)
            print(f"a check failed: not reported: {names}", file=self.report.out)


def check(args: argparse.Namespace) -> None:
    """Refuses wrong options.

    Raises:
        ConfigError: The message names them.
        ResourceError: There is no fio.
    """
    check_extent("--seed", args.seed, 0)
    if args.pairs < 1 or args.mib < 16 or not 1 <= args.depth <= 1024 or args.blocks < 1:
        raise ConfigError(
            f"--pairs {args.pairs} --mib {args.mib} --depth {args.depth} --blocks {args.blocks}: "
            "allowed: at least 1, 16, 1 (at most 1024) and 1"
        )
    if shutil.which("fio") is None:
        raise ResourceError("fio is not installed; it is what the figures are held against (Debian: fio)")


def measure(args: argparse.Namespace, report: Report) -> None:
    """Runs the benchmark into `report`."""
    _check_room(args)
    report.machine |= {"pairs": args.pairs, "depth": args.depth, "mib": args.mib, "fio": _fio_version()}
    report.machine["drive"] = machine.drive(Path(args.dir))
    # A pair is three passes, a measured size takes as many pairs for reads and for writes.
    total = len(SIZES) * 2 * (2 + 3 * args.pairs) + 4 * args.rounds + 2 * args.rounds
    with _home(args.dir) as home, Progress(report.out, total) as progress:
        run = _Run(args, report, progress, home, np.random.default_rng(args.seed))
        for name, payload_bytes in SIZES.items():
            _against_fio(run, name, payload_bytes)
        _encryption(run)
        _load_to_device(run)
    print(
        "\nlimit: fio on the same file; ratio: median of the pairs. *_ratio: with its bootstrap interval of\n"
        "95 % (min, max), beside fio against fio (*_noise). *_cpu: CPU seconds per GB, limit is fio's.\n"
        "load_to_device: one load of blocks that are on disk alone; limit is a plain read of as many.\n"
        "*_encrypted: limit is the same without encryption.\n",
        file=report.out,
    )
    print(results_table(report.results, TARGETS), file=report.out)


def _check_room(args: argparse.Namespace) -> None:
    free = shutil.disk_usage(args.dir).free
    needed = max(2 * (args.mib << 20), 4 * args.blocks * (2 << 20)) + 4 * _SLACK_BYTES
    if free < needed:
        raise ResourceError(f"--dir {args.dir}: {free >> 20} MiB are free; needs {needed >> 20} MiB")
    if 3 * args.blocks * (2 << 20) > machine.available_bytes():
        raise ResourceError(f"--blocks {args.blocks}: needs about three times as much free memory")


@contextlib.contextmanager
def _home(directory: str) -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="kvtier-bench.", dir=directory)).resolve()
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _open(run: _Run, name: str, payload_bytes: int, key: bytes | None = None) -> DiskBench:
    blocks = max(8, (run.args.mib << 20) // payload_bytes)
    # As many images beyond the drive's depth as keep it full while others are checked.
    window = min(blocks, run.args.depth + max(8, run.args.depth // 2))
    path = run.home / name
    return DiskBench(
        path=str(path),
        payload_bytes=payload_bytes,
        num_slots=blocks,
        queue_depth=run.args.depth,
        window=window,
        key=key,
    )


def _ours(
    run: _Run, bench: DiskBench, direction: str, payload_bytes: int, blocks: int
) -> tuple[int, float, float, float]:
    order = run.rng.permutation(blocks).astype(np.uint32)
    rounds = _WRITE_ROUNDS if direction == "write" else 1
    took, cpu, good, flush = bench.read(order) if direction == "read" else bench.write(order, rounds)
    run.check("blocks_good", good == rounds * blocks)
    return good * payload_bytes, took, cpu, flush


def _against_fio(run: _Run, name: str, payload_bytes: int) -> None:
    run.part(f"{name}: preparing")
    bench = _open(run, name, payload_bytes)
    about = bench.about()
    run.report.machine[f"queue_{name}"] = about["queue"]
    io_uring = str(about["queue"]).startswith("io_uring")
    same_engine = run.check("same_engine", io_uring and bool(about["direct_io"]))
    blocks = max(8, (run.args.mib << 20) // payload_bytes)
    try:
        for direction in ("read", "write"):
            run.part(f"{direction} {name}", right=same_engine)
            _ours(run, bench, "write", payload_bytes, blocks)  # random data, and images that prove it
            mine, fio, other_fio = _Side(), _Side(), _Side()

            def our_pass(mine: _Side = mine, direction: str = direction) -> None:
                mine.note(*_ours(run, bench, direction, payload_bytes, blocks))
                run.progress.step()

            def fio_pass(side: _Side, direction: str = direction) -> None:
                side.note(*_fio(run, about["file"], direction, payload_bytes, blocks))
                run.progress.step()

            our_pass()  # both warm up, and do not count
            fio_pass(fio)
            mine.clear()
            fio.clear()
            for pair in range(run.args.pairs):
                if pair % 2 == 0:
                    our_pass()
                    fio_pass(fio)
                    fio_pass(other_fio)
                else:
                    fio_pass(other_fio)
                    fio_pass(fio)
                    our_pass()
            _record_pairs(run, f"{direction}_{name}", mine, fio, other_fio)
    finally:
        bench.close()
        shutil.rmtree(run.home / name, ignore_errors=True)


def _record_pairs(run: _Run, name: str, mine: _Side, fio: _Side, other_fio: _Side) -> None:
    run.add(measured(name, mine.rates, "GB/s", fio.rates))
    for suffix, ours, theirs in (("ratio", mine, fio), ("noise", other_fio, fio)):
        ratios = [a / b for a, b in zip(ours.rates, theirs.rates, strict=True)]
        low, high = _interval(ratios, run.rng)
        middle = statistics.median(ratios)
        run.add(Result(f"{name}_{suffix}", middle, "x", n=len(ratios), min=low, max=high))
    if name.startswith("write"):
        run.add(measured(f"{name}_flush", mine.flush, "s"))
    spent, theirs_spent = statistics.median(mine.cpu), statistics.median(fio.cpu)
    run.add(
        Result(
            f"{name}_cpu",
            spent,
            "s/GB",
            limit=theirs_spent,
            ratio=theirs_spent / spent if spent > 0 else None,
            n=len(mine.cpu),
            min=min(mine.cpu),
            max=max(mine.cpu),
        )
    )


def _interval(values: list[float], rng: np.random.Generator) -> tuple[float, float]:
    """The bootstrap interval of the median, 95 %."""
    drawn = rng.choice(np.array(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def _fio(run: _Run, file: str, direction: str, payload_bytes: int, blocks: int) -> tuple[int, float, float]:
    writes = ["--end_fsync=1", f"--io_size={_WRITE_ROUNDS * blocks * payload_bytes}"]
    command = [
        "fio",
        "--name=kvtier",
        f"--filename={file}",
        f"--rw=rand{direction}",
        f"--bs={payload_bytes}",
        f"--size={blocks * payload_bytes}",
        f"--iodepth={run.args.depth}",
        "--ioengine=io_uring",
        "--direct=1",
        "--allow_file_create=0",
        "--invalidate=0",
        "--fixedbufs=1",
        "--registerfiles=1",
        "--output-format=json",
        *(writes if direction == "write" else []),
    ]
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # its buffers in huge pages
    found = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, timeout=600, env=environment
    )
    if found.returncode != 0:
        raise ResourceError(f"fio failed: {(found.stderr or found.stdout).strip()[-500:]}")
    job = json.loads(found.stdout[found.stdout.index("{") :])["jobs"][0]
    took = job["job_runtime"] / 1e3
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * took
    moved = int(job[direction]["io_bytes"])
    # fio's own rate, without what comes before its first request.
    return moved, moved / job[direction]["bw_bytes"], cpu


def _fio_version() -> str:
    found = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False)  # noqa: S607
    return found.stdout.strip()


def _encryption(run: _Run) -> None:
    """The cost of encryption: passes without and with it, in turn."""
    run.part("encryption")
    payload_bytes = SIZES["2MiB"]
    blocks = max(8, (run.args.mib << 20) // payload_bytes)
    plain = _open(run, "plain", payload_bytes)
    secret = _open(run, "secret", payload_bytes, run.rng.bytes(32))
    sides = {(kind, d): _Side() for kind in ("plain", "secret") for d in ("write", "read")}
    try:
        for i in range(run.args.rounds + 1):
            order = [("plain", plain), ("secret", secret)]
            for kind, bench in order if i % 2 == 0 else order[::-1]:
                for direction in ("write", "read"):
                    pass_ = _ours(run, bench, direction, payload_bytes, blocks)
                    if i > 0:  # the first warms up
                        sides[kind, direction].note(*pass_)
                        run.progress.step()
    finally:
        plain.close()
        secret.close()
        shutil.rmtree(run.home / "plain", ignore_errors=True)
        shutil.rmtree(run.home / "secret", ignore_errors=True)
    for direction in ("read", "write"):
        secret_rates, plain_rates = sides["secret", direction].rates, sides["plain", direction].rates
        run.add(measured(f"{direction}_encrypted", secret_rates, "GB/s", plain_rates))


def _load_to_device(run: _Run) -> None:
    """Blocks that are on disk alone, into pages of the CPU device, through a whole engine.

    Of two sets of blocks the host tier holds one: each load pushes the other out, whose turn is next.
    """
    run.part("load to device: preparing")
    layout = kvtier.KVLayout(32, 8, 128, "bfloat16", 16)  # 2 MiB, an 8B model's
    blocks, block_bytes = run.args.blocks, layout.block_bytes(16)
    moved = blocks * block_bytes
    config = kvtier.Config(
        groups=[layout],
        model="kvtier-bench@1",
        host=blocks * (block_bytes + 4096),
        disk=kvtier.Disk(str(run.home / "engine"), 3 * moved + _SLACK_BYTES),
        disk_admission="all",
        disk_write_budget="unlimited",
        disk_queue_depth=run.args.depth,
    )
    shape = (32, 2, blocks, 16, 8, 128)
    source = run.rng.integers(0, 1 << 16, shape[1:], np.uint16)
    memory = np.empty(shape, np.uint16)
    sets = []
    ids = np.arange(blocks)
    # The same number of the same bytes.
    bench = DiskBench(
        path=str(run.home / "limit"),
        payload_bytes=block_bytes,
        num_slots=blocks,
        queue_depth=run.args.depth,
        window=min(blocks, run.args.depth + max(8, run.args.depth // 2)),
        key=None,
    )
    rates, limits = [], []
    try:
        bench.write(np.arange(blocks, dtype=np.uint32), 1)
        with kvtier.open(config) as engine:
            pages = engine.attach(list(memory), axes="KPTHD")
            for n in range(2):
                memory[:] = source ^ np.uint16(n)
                memory ^= np.arange(32, dtype=np.uint16).reshape(-1, 1, 1, 1, 1, 1)
                sets.append(run.rng.integers(0, 256, (blocks, 32), np.uint8))
                store_durably(engine, pages, sets[n])
            run.progress.phase("load to device")
            for i in range(run.args.rounds + 1):
                n = i % 2
                memory[:] = 0
                limit = _plain_read(run, bench, ids) if n == 0 else 0.0
                read_before = engine.stats().promote_good
                tickets: list[Any] = []

                def load(keys: Any = sets[n], tickets: list[Any] = tickets) -> None:
                    tickets.append(engine.load(keys, pages, ids).wait())

                took = seconds(load)
                run.check("load_complete", tickets[0].result().valid_blocks == blocks)
                run.check("load_from_disk_alone", engine.stats().promote_good - read_before == blocks)
                if n == 1:
                    limit = _plain_read(run, bench, ids)
                run.check("bytes", _loaded(memory, source, n))
                if i > 0:  # the first warms up
                    rates.append(moved / took / 1e9)
                    limits.append(moved / limit / 1e9)
                    run.progress.step(2)
    finally:
        bench.close()
    run.add(measured("load_to_device", rates, "GB/s", limits))


def _plain_read(run: _Run, bench: DiskBench, ids: Any) -> float:
    """Seconds of reading these blocks as they lie on the drive."""
    took, _, good, _ = bench.read(ids.astype(np.uint32))
    run.check("blocks_good", good == len(ids))
    return took


def _loaded(memory: Any, source: Any, n: int) -> bool:
    """Whether the pages hold set `n`, each layer what was stored of it."""
    return all(np.array_equal(pages ^ np.uint16(layer ^ n), source) for layer, pages in enumerate(memory))
