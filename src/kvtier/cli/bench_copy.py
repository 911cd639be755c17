"""How fast blocks move between pages and host slots, beside the machine's own copy of the same bytes.

The limit is a plain copy of the same bytes by as many threads as the engine has, run by run between the same
pages and as many images as we write: the faster, by its median, of the C library's memcpy and a non-temporal
copy. Beside it (`*_contiguous`) stands the same of as many bytes in one contiguous piece, which no plain copy
of scattered runs reaches. Both are measured right before each of our copies, by threads on the processors
that the engine's copy threads have: ratios are of neighbours. (On a shared machine one processor can be a
fifth slower than another for minutes: an only copy thread beside a limit of the other read 0.8 or 1.05.)
The thread that calls store and load has a processor of its own where one is left, as the kernel would find it
one if the copy threads were free to go elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import kvtier
from kvtier.cli import machine
from kvtier.cli.bench import seconds
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, measured, results_table
from kvtier.engine import copy_limit, copy_runs_limit
from kvtier.errors import ConfigError, ResourceError

METHODS = ("memcpy", "streaming")
_HUGE_PAGE = 2 << 20
TARGETS = dict.fromkeys(("store", "load"), "ratio >= 0.95")


@dataclass(frozen=True)
class Shape:
    """A model's blocks of 16 tokens in bfloat16, keys and values apart in every layer."""

    suffix: str
    num_layers: int
    num_kv_heads: int

    @property
    def layout(self) -> kvtier.KVLayout:
        """Of the group."""
        return kvtier.KVLayout(self.num_layers, self.num_kv_heads, 128, "bfloat16", 16)

    @property
    def about(self) -> str:
        """In words."""
        runs = 2 * self.num_layers
        kib = self.layout.block_bytes(16) >> 10
        return f"blocks of {kib} KiB, {runs} runs of {kib // runs} KiB"


SHAPES = (Shape("", 32, 8), Shape("_4k", 80, 1))  # an 8B model; one of eight ranks of a 70B model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench copy`."""
    parser.add_argument("--mib", type=int, default=512, help="moved by each copy (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="copy threads (default: 2 1)")


@dataclass
class _Bench:
    threads: int
    engine: kvtier.Engine
    pages: kvtier.Pages
    memory: Any  # [num_layers, 2, num_pages, 16, num_kv_heads, 128] uint16
    source_ids: Any
    target_ids: Any
    keys: Any
    limit_source: Any
    limit_target: Any
    run_bytes: int
    image_offsets: Any  # of every run, in as many contiguous images
    processors: set[int]  # where the engine's copy threads are
    callers: set[int]  # where the thread that calls the engine is
    bytes_right: bool = True
    s: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, took: float) -> None:
        self.s.setdefault(name, []).append(took)


def check(args: argparse.Namespace) -> None:
    """Refuses wrong options; the same number of threads twice is once.

    Raises:
        ConfigError: The message names them.
    """
    if args.mib < 1 or not all(1 <= t <= 64 for t in args.threads):
        raise ConfigError(f"--mib {args.mib} --threads {args.threads}: at least 1 MiB, 1 to 64 threads")
    args.threads = list(dict.fromkeys(args.threads))


def measure(args: argparse.Namespace, report: Report) -> None:
    """Runs the benchmark into `report`."""
    if 6 * (args.mib << 20) > machine.available_bytes():
        raise ResourceError(f"--mib {args.mib}: needs about six times as much free memory")
    if (args.mib << 20) < 4 * report.machine["l3_bytes"]:
        text = f"{args.mib} MiB are not far larger than the L3 cache: the figures flatter"
        print(text, file=report.out)
    targets: dict[str, str] = {}
    with Progress(report.out, len(SHAPES) * len(args.threads) * (args.rounds + 1)) as progress:
        for shape in SHAPES:
            for threads in args.threads:
                suffix = shape.suffix
                if threads != args.threads[0]:
                    suffix += f"_{threads}_thread" + ("s" if threads > 1 else "")
                progress.phase(f"{shape.about}, {threads} threads: *{suffix or ' without suffix'}")
                targets |= {name + suffix: text for name, text in TARGETS.items()}
                _measure_shape(args, shape, threads, suffix, report, progress)
    print(
        "\nstore, load: one ticket for all blocks, from the call until it is done; pages are scattered.\n"
        "limit: the faster of memcpy (C library) and a non-temporal copy of the same bytes, run by run;\n"
        "*_contiguous: of as many bytes in one piece. ticket: what a block adds when it has a ticket of\n"
        "its own, waited for before the next, over its share of one for all.\n",
        file=report.out,
    )
    print(results_table(report.results, targets), file=report.out)


def _measure_shape(
    args: argparse.Namespace, shape: Shape, threads: int, suffix: str, report: Report, progress: Progress
) -> None:
    layout = shape.layout
    block_bytes = layout.block_bytes(16)
    num_blocks = max(2, (args.mib << 20) // block_bytes)
    moved = num_blocks * block_bytes
    rng = np.random.default_rng(args.seed)
    config = kvtier.Config(
        groups=[layout],
        model="kvtier-bench@1",
        host=(num_blocks + 2) * (block_bytes + 8192),
        copy_threads=threads,
    )
    processors = _processors(threads)
    with _on(processors):
        opened = kvtier.open(config)
    with opened as engine:
        dims = (shape.num_layers, 2, 2 * num_blocks, 16, shape.num_kv_heads, 128)
        memory = _aligned(2 * math.prod(dims)).view(np.uint16).reshape(dims)
        memory[:] = rng.integers(0, 1 << 16, memory.shape[1:], np.uint16)
        memory ^= np.arange(shape.num_layers, dtype=np.uint16).reshape(-1, 1, 1, 1, 1, 1)
        ids = rng.permutation(2 * num_blocks)
        bench = _Bench(
            threads=threads,
            engine=engine,
            pages=engine.attach(list(memory), axes="KPTHD"),
            memory=memory,
            source_ids=ids[:num_blocks],
            target_ids=ids[num_blocks:],
            keys=rng.integers(0, 256, (num_blocks, 32), np.uint8),
            limit_source=_aligned(moved),
            limit_target=_aligned(moved),
            run_bytes=block_bytes // (2 * shape.num_layers),
            image_offsets=np.arange(0, moved, block_bytes // (2 * shape.num_layers)),
            processors=processors,
            callers=(os.sched_getaffinity(0) - processors) or processors,
        )
        bench.limit_source[:] = rng.integers(0, 256, moved, np.uint8)
        bench.limit_target[:] = 1
        try:
            for _ in range(args.rounds + 1):
                _round(bench)
                progress.step()
        finally:
            _record(bench, moved, suffix, report)
        bench.pages.detach()


def _aligned(size: int) -> Any:
    """Bytes that begin with a huge page, as device memory does.

    NumPy's own arrays begin 16 bytes behind the start of a page: every page of KV would share its first and
    its last cache line with its neighbours.
    """
    room = np.empty(size + _HUGE_PAGE, np.uint8)
    begin = -room.ctypes.data % _HUGE_PAGE
    return room[begin : begin + size]


def _processors(threads: int) -> set[int]:
    """As many as threads, of different cores as far as there are; or all."""
    seen: set[str] = set()
    first: list[int] = []
    second: list[int] = []
    for processor in sorted(os.sched_getaffinity(0)):
        core = _core_of(processor)
        (second if core in seen else first).append(processor)
        seen.add(core)
    return set((first + second)[:threads])


def _core_of(processor: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text()
    except OSError:  # not told: each is taken for a core
        return str(processor)


@contextlib.contextmanager
def _on(processors: set[int]) -> Iterator[None]:
    """The calling thread, and for good those that it starts meanwhile, on these processors."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _round(bench: _Bench) -> None:
    engine, keys, pages = bench.engine, bench.keys, bench.pages
    engine.drop(keys)
    _limits(bench, "store")
    for method in METHODS:
        _same_runs(bench, "store", method)
    with _on(bench.callers):
        bench.time("store", seconds(lambda: engine.store(keys, pages, bench.source_ids).wait()))

    bench.memory[:, :, bench.target_ids] = 0
    _limits(bench, "load")
    for method in METHODS:
        _same_runs(bench, "load", method)
    with _on(bench.callers):
        bench.time("load", seconds(lambda: engine.load(keys, pages, bench.target_ids).wait()))
    _compare(bench)

    bench.memory[:, :, bench.target_ids] = 0
    with _on(bench.callers):
        bench.time("single", seconds(lambda: _one_by_one(bench)))
    _compare(bench)


def _limits(bench: _Bench, beside: str) -> None:
    for method in METHODS:
        with _on(bench.processors):
            took = copy_limit(bench.limit_target, bench.limit_source, method=method, threads=bench.threads)
        bench.time(f"{method} beside {beside}", took)


def _same_runs(bench: _Bench, beside: str, method: str) -> None:
    """The pages to (store) or from (load) a copy of what the slots hold: the engine's runs, in its order."""
    ids = bench.source_ids if beside == "store" else bench.target_ids
    rows = np.arange(bench.memory.shape[0] * 2) * bench.memory.shape[2]
    page_offsets = ((ids[:, np.newaxis] + rows) * bench.run_bytes).reshape(-1)
    pages = bench.memory.reshape(-1).view(np.uint8)
    stored = beside == "store"
    with _on(bench.processors):
        took = copy_runs_limit(
            bench.limit_target if stored else pages,
            pages if stored else bench.limit_source,
            bench.image_offsets if stored else page_offsets,
            page_offsets if stored else bench.image_offsets,
            bench.run_bytes,
            method=method,
            threads=bench.threads,
        )
    bench.time(f"{method} runs beside {beside}", took)


def _one_by_one(bench: _Bench) -> None:
    for i in range(len(bench.keys)):
        bench.engine.load(bench.keys[i : i + 1], bench.pages, bench.target_ids[i : i + 1]).wait()


def _compare(bench: _Bench) -> None:
    for layer in bench.memory:  # one at a time: indexing makes copies
        if not np.array_equal(layer[:, bench.source_ids], layer[:, bench.target_ids]):
            bench.bytes_right = False


def _faster(took: dict[str, list[float]]) -> str:
    return min((statistics.median(values), method) for method, values in took.items())[1]


def _record(bench: _Bench, moved: int, suffix: str, report: Report) -> None:
    report.checks["bytes"] = report.checks.get("bytes", True) and bench.bytes_right
    if not bench.bytes_right:
        print("wrong bytes: these figures are not reported", file=report.out)
        return
    complete = min((len(values) for values in bench.s.values()), default=0)
    s = {name: values[1:complete] for name, values in bench.s.items()}  # the first warms up
    if complete < 2 or "single" not in s:
        return
    for kind, of in (("", " runs"), ("_contiguous", "")):
        for name in ("store", "load"):
            took = {m: s[f"{m}{of} beside {name}"] for m in METHODS}
            method = _faster(took)
            report.machine[f"limit{kind}{suffix}"] = method
            rates, limits = ([moved / v / 1e9 for v in values] for values in (s[name], took[method]))
            report.add(measured(name + kind + suffix, rates, "GB/s", limits))
    pairs = zip(s["single"], s["load"], strict=True)
    adds = [1e6 * (single - together) / len(bench.keys) for single, together in pairs]
    report.add(measured(f"ticket{suffix}", adds, "us"))
