"""How long lookups, keys, stores and evictions take when the index holds a million blocks.

A dict of bytes is timed beside it, twice: with ready bytes objects that nobody has hashed yet, as they come
from a hash function, and with keys that are sliced out of one buffer, as a batch of keys has to be.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import kvtier
from kvtier.cli import machine
from kvtier.cli.bench import seconds
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, Result, measured, results_table
from kvtier.config import EVICTIONS
from kvtier.layout import check_extent

KEY_BYTES = 32
_SLOT_BYTES = 8192  # a header of 4096 and a payload rounded up to as much
_GHOST_ROUNDS = 10  # for each round of the others: a percent is to be told
_GHOST_PARTS = 64  # lookups of a round with ghost caches, and as many without: one in eight is measured
_READY = 2  # BlockState
_STORED = 1  # BlockOutcome

TARGETS = {
    "lookup_in_order": "<= 2 ms, >= 10 x dict",
    "lookup_random": "<= 4 ms, >= 10 x dict",
    "keys_1m_tokens": "<= 20 ms",
    "index_bytes_per_block": "<= 128 B",
    "lookup_ghosts_cost": "<= 1 % of lookup_in_order",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench index`."""
    parser.add_argument("--blocks", type=int, default=1_000_000, help="in the index (default: 1 M)")
    parser.add_argument("--batch", type=int, default=65_536, help="keys at once (default: 65,536)")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="hashed (default: 1 M)")
    parser.add_argument(
        "--eviction", choices=EVICTIONS, default=EVICTIONS[0], help="policy (default: %(default)s)"
    )


@dataclass
class _Bench:
    engine: kvtier.Engine
    pages: kvtier.Pages
    memory: Any  # [2 * batch, 2, 1, 1, 16] uint8: pages to store from, then pages to load into
    keys: Any  # [blocks, 32] uint8
    table: dict[bytes, int]
    batch: int
    rng: np.random.Generator
    report: Report
    ms: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, action: Any) -> None:
        self.ms.setdefault(name, []).append(1e3 * seconds(action))

    def check(self, name: str, passed: bool) -> None:
        self.report.checks[name] = self.report.checks.get(name, True) and bool(passed)


def check(args: argparse.Namespace) -> None:
    """Refuses wrong options.

    Raises:
        ConfigError: The message names them.
    """
    check_extent("--seed", args.seed, 0)
    check_extent("--blocks", args.blocks)
    check_extent("--batch", args.batch, 1, args.blocks)
    check_extent("--tokens", args.tokens, 16)


def measure(args: argparse.Namespace, report: Report) -> None:
    """Runs the benchmark into `report`."""
    blocks = min(args.blocks, int(0.8 * machine.available_bytes()) // _SLOT_BYTES)
    if blocks < args.blocks:
        text = f"only {blocks} blocks instead of {args.blocks}: the machine has too little memory free"
        print(text, file=report.out)
        args.batch = min(args.batch, blocks)
    layout = kvtier.KVLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="uint8", page_tokens=1)
    config = kvtier.Config(
        groups=[layout],
        block_tokens=1,
        model="kvtier-bench@1",
        host=blocks * _SLOT_BYTES,
        eviction=args.eviction,
    )
    rng = np.random.default_rng(args.seed)
    with kvtier.open(config) as engine, _no_garbage_collection():
        _wait_until_whole(engine)
        capacity = engine.stats().host[0].capacity
        report.machine["blocks"] = capacity
        report.machine["eviction"] = args.eviction
        print(f"{capacity} blocks in the index, {args.batch} keys at once", file=report.out)
        memory = rng.integers(0, 256, (2 * args.batch, 2, 1, 1, 16), np.uint8)
        pages = engine.attach([memory])
        keys = rng.integers(0, 256, (capacity, KEY_BYTES), np.uint8)
        flat = keys.tobytes()
        table = {flat[i * KEY_BYTES : (i + 1) * KEY_BYTES]: i for i in range(capacity)}
        bench = _Bench(engine, pages, memory, keys, table, args.batch, rng, report)
        try:
            with Progress(report.out, 2 * (args.rounds + 1) + 3) as progress:
                progress.phase("filling the index")
                _fill(bench)
                progress.step()
                progress.phase("lookups")
                for i in range(args.rounds + 1):
                    _lookup_round(bench, i)
                    progress.step()
                progress.phase("ghost caches")
                for i in range(_GHOST_ROUNDS * args.rounds + 1):
                    _ghost_round(bench, i)
                progress.step()
                progress.phase("keys")
                _key_rounds(bench, args)
                progress.step()
                progress.phase("stores that evict")
                for _ in range(args.rounds + 1):
                    _evicting_round(bench)
                    progress.step()
        finally:
            _record(bench)
        pages.detach()


def _fill(bench: _Bench) -> None:
    page_ids = np.arange(bench.batch)
    for begin in range(0, len(bench.keys) - bench.batch + 1, bench.batch):
        keys = bench.keys[begin : begin + bench.batch]
        bench.time("store_filling", lambda keys=keys: bench.engine.store(keys, bench.pages, page_ids).wait())
    rest = bench.keys[len(bench.keys) // bench.batch * bench.batch :]
    if len(rest):
        bench.engine.store(rest, bench.pages, page_ids[: len(rest)]).wait()
    stats = bench.engine.stats()
    full = stats.host[0].ready == len(bench.keys) and stats.evictions == 0
    bench.check("index_full", full)
    if full:
        bench.report.add(Result("index_bytes_per_block", stats.index_bytes_per_block, "B", n=1))


def _lookup_round(bench: _Bench, index: int) -> None:
    # Another part of the index every round: what one round touched would fit into the L3 cache.
    begin = index % (len(bench.keys) // bench.batch) * bench.batch
    chosen = bench.rng.choice(len(bench.keys), bench.batch, replace=False)
    unknown = bench.rng.integers(0, 256, (bench.batch, KEY_BYTES), np.uint8)
    for name, keys, expected in (
        ("in_order", bench.keys[begin : begin + bench.batch], _READY),
        ("random", np.ascontiguousarray(bench.keys[chosen]), _READY),
        ("miss", unknown, 0),
    ):
        found: list[Any] = []
        bench.time(f"lookup_{name}", lambda keys=keys, found=found: found.append(bench.engine.lookup(keys)))
        bench.check("lookup_states", bool((found[0].states(0) == expected).all()))

        flat = keys.tobytes()
        ready = [flat[i : i + KEY_BYTES] for i in range(0, len(flat), KEY_BYTES)]
        get = bench.table.get
        bench.time(f"dict_{name}", lambda ready=ready, get=get: list(map(get, ready)))
        bench.time(
            f"dict_{name}_sliced",
            lambda flat=flat, get=get: [get(flat[i : i + KEY_BYTES]) for i in range(0, len(flat), KEY_BYTES)],
        )


def _ghost_round(bench: _Bench, index: int) -> None:
    """The same short lookups with and without ghost caches in turn; which goes first takes turns too."""
    begin = index % (len(bench.keys) // bench.batch) * bench.batch
    keys = bench.keys[begin : begin + bench.batch]
    bench.engine.lookup(keys)  # the records are in the caches as far as they fit, for both
    spent = {"ghosts_on": 0.0, "ghosts_off": 0.0}
    for number, part in enumerate(np.array_split(keys, min(_GHOST_PARTS, len(keys)))):
        for name in spent if (index + number) % 2 else reversed(spent):
            off = name == "ghosts_off"
            with bench.engine._without_ghosts() if off else contextlib.nullcontext():
                spent[name] += seconds(functools.partial(bench.engine.lookup, part))
    for name, value in spent.items():
        bench.ms.setdefault(name, []).append(1e3 * value)


def _key_rounds(bench: _Bench, args: argparse.Namespace) -> None:
    layout = kvtier.KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", page_tokens=16)
    config = kvtier.Config(groups=[layout], block_tokens=16, model="kvtier-bench@1", host="1GiB")
    tokens = bench.rng.integers(0, 128_000, args.tokens).astype(np.int32)
    name = "keys_1m_tokens" if args.tokens == 1_000_000 else f"keys_{args.tokens}_tokens"
    for _ in range(args.rounds + 1):
        bench.time(name, lambda: kvtier.block_keys(tokens, config))


def _evicting_round(bench: _Bench) -> None:
    keys = bench.rng.integers(0, 256, (bench.batch, KEY_BYTES), np.uint8)
    page_ids = np.arange(bench.batch)
    evictions = bench.engine.stats().evictions
    tickets: list[Any] = []
    begin = time.perf_counter()
    tickets.append(bench.engine.store(keys, bench.pages, page_ids))
    middle = time.perf_counter()
    tickets[0].wait()
    bench.ms.setdefault("store_evicting", []).append(1e3 * (time.perf_counter() - begin))
    bench.ms.setdefault("store_evicting_submit", []).append(1e3 * (middle - begin))
    stored = bool((tickets[0].result().outcomes == _STORED).all())
    bench.check("every_store_evicted", stored and bench.engine.stats().evictions - evictions == bench.batch)

    bench.memory[bench.batch :] = 0
    bench.engine.load(keys, bench.pages, page_ids + bench.batch).wait()
    bench.check("bytes", np.array_equal(bench.memory[: bench.batch], bench.memory[bench.batch :]))


def _record(bench: _Bench) -> None:
    # The first warms up; of what was interrupted behind it, or has no second, nothing is left.
    ms = {name: values[1:] for name, values in bench.ms.items() if len(values) > 1}
    per_block = 1e3 / bench.batch
    if bench.report.status:
        print("a check failed: its figures are not reported", file=bench.report.out)
        return
    for name, values in ms.items():
        beside = ms.get(name.replace("lookup", "dict")) if name.startswith("lookup") else None
        paired = beside if beside is not None and len(beside) == len(values) else None
        bench.report.add(measured(name, values, "ms", paired))
    if "ghosts_on" in ms and len(ms["ghosts_on"]) == len(ms.get("ghosts_off", ())):
        cost = [
            100 * (on / off - 1) for on, off in zip(ms.pop("ghosts_on"), ms.pop("ghosts_off"), strict=True)
        ]
        bench.report.add(measured("lookup_ghosts_cost", cost, "%"))
    if "store_filling" in ms:
        bench.report.add(measured("store_per_block", [v * per_block for v in ms["store_filling"]], "us"))
    if "store_evicting" in ms and "store_filling" in ms:
        filling = statistics.median(ms["store_filling"])
        extra = [(v - filling) * per_block for v in ms["store_evicting"]]
        bench.report.add(measured("eviction_per_block", extra, "us"))
    print(
        f"\ntimes are for {bench.batch} keys. lookup_*: limit is dict_*, ratio how many times faster.\n"
        "dict_*: ready bytes objects, not hashed before; dict_*_sliced: cut out of one buffer while timed.\n"
        "store_*: until the blocks can be hit, 32 bytes copied for each; eviction: what it adds, a block.\n",
        file=bench.report.out,
    )
    print(results_table(bench.report.results, TARGETS), file=bench.report.out)


def _wait_until_whole(engine: kvtier.Engine) -> None:
    while (stats := engine.stats()).host_prefaulted_bytes < stats.host_bytes and stats.health == "ok":
        time.sleep(0.05)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
