"""How long an engine takes to be ready again with what its disk tier holds.

The blocks are stored, made durable and closed once; each round opens an engine on them, looks the keys up and
closes it: with what it reads in the page cache (warm), without (cold), and without a catalog, so that it is
rebuilt from the slots' headers. The time is that of open(): when it returns, every block is a hit. The host
tier is small, since prefaulting it is no part of this.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import kvtier
from kvtier.cli import machine
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, measured, results_table
from kvtier.errors import ConfigError, ResourceError
from kvtier.layout import check_extent

TARGETS = {"reopen_warm": "<= 0.1 s", "reopen_cold": "<= 0.1 s"}
METHOD = {
    "warm_up": "the first opening of each kind, which does not count",
    "repetitions": "n of each result: all openings of one kind, then those of the next: warm, cold, rebuild; "
    "medians with minimum and maximum",
    "lossless": "no block is loaded: every key has to be ready, and the index to come from where it should",
    "limit": "none: nothing comparable is measured beside it",
}
_AT_ONCE = 1024
_SLOT_BYTES = 8192
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench reopen`."""
    parser.add_argument("--dir", metavar="D", help="a directory on the drive (default: a temporary one)")
    parser.add_argument("--blocks", type=int, default=100_000, help="on disk (default: %(default)s)")


def check(args: argparse.Namespace) -> None:
    """Refuses wrong options.

    Raises:
        ConfigError: The message names them.
    """
    check_extent("--seed", args.seed, 0)
    if args.blocks < 1:
        raise ConfigError(f"--blocks {args.blocks}: must be at least 1")


def measure(args: argparse.Namespace, report: Report) -> None:
    """Runs the benchmark into `report`."""
    with contextlib.ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="kvtier-bench.", dir=args.dir)).resolve()
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        capacity = args.blocks * (_SLOT_BYTES + 1024) + (64 << 20)
        free = shutil.disk_usage(home).free
        if free < capacity:
            raise ResourceError(f"{home}: {free >> 20} MiB are free; needs {capacity >> 20} MiB")
        layout = kvtier.KVLayout(1, 1, 128, "uint8", 16)  # 4 KiB
        config = kvtier.Config(
            groups=[layout],
            model="kvtier-bench@1",
            host=2 * _AT_ONCE * _SLOT_BYTES,
            disk=kvtier.Disk(str(home / "disk"), capacity),
            disk_admission="all",
            disk_write_budget="unlimited",
        )
        progress = stack.enter_context(Progress(report.out, args.blocks // _AT_ONCE + 3 * (args.rounds + 1)))
        keys = np.random.default_rng(args.seed).integers(0, 256, (args.blocks, 32), np.uint8)
        progress.phase("writing")
        _write(config, keys, progress)
        report.machine |= {"blocks": args.blocks, "cold_by": _make_cold(home), "drive": machine.drive(home)}
        for kind in ("warm", "cold", "rebuild"):
            progress.phase(kind)
            name = kind if kind == "rebuild" else f"reopen_{kind}"
            took, right = [], True
            for _ in range(args.rounds + 1):
                seconds, passed = _reopen(kind, config, home, keys, report)
                took.append(seconds)
                right &= passed
                progress.step()
            if right:
                report.add(measured(name, took[1:], "s"))  # the first warms up
            else:
                print(f"a check failed: not reported: {name}", file=report.out)
    print(
        f"\n{args.blocks} blocks of 4 KiB. Time of open(); then every block is a hit.\n"
        "rebuild: without a catalog.\n",
        file=report.out,
    )
    print(results_table(report.results, TARGETS), file=report.out)


def _write(config: kvtier.Config, keys: Any, progress: Progress) -> None:
    memory = np.random.default_rng(1).integers(0, 256, (_AT_ONCE, 2, 16, 1, 128), np.uint8)
    with kvtier.open(config) as engine:
        pages = engine.attach([memory])
        for begin in range(0, len(keys), _AT_ONCE):
            some = keys[begin : begin + _AT_ONCE]
            store_durably(engine, pages, some)
            progress.step()


def store_durably(engine: kvtier.Engine, pages: kvtier.Pages, keys: Any) -> None:
    """Blocks that a busy or a growing disk did not take are offered again."""
    until = time.monotonic() + 60
    while True:
        ticket = engine.store(keys, pages, np.arange(len(keys)))
        ticket.wait()
        engine.flush()
        if ticket.durable_blocks == len(keys):
            return
        if time.monotonic() > until:
            raise ResourceError(f"the disk took only {ticket.durable_blocks} of {len(keys)} blocks in 60 s")
        time.sleep(0.05)


def _reopen(kind: str, config: kvtier.Config, home: Path, keys: Any, report: Report) -> tuple[float, bool]:
    """Seconds of an opening, and whether its checks passed."""
    if kind == "rebuild":
        for catalog in home.glob("disk/stores/*/catalog.mdb*"):
            catalog.unlink()
    if kind == "cold":
        _make_cold(home)
    begin = time.perf_counter()
    engine = kvtier.open(config)
    took = time.perf_counter() - begin
    with engine:
        disk = engine.stats().disks[0]
        source = disk.opened_from.split(":")[0]
        ready = engine.lookup(keys).states() == kvtier.BlockState.READY
        checks = {
            "all_blocks_ready": bool(ready.all()),
            f"{kind}_from_expected_source": source == ("headers" if kind == "rebuild" else "catalog"),
        }
        for name, passed in checks.items():
            report.checks[name] = report.checks.get(name, True) and passed
    return took, all(checks.values())


def _make_cold(home: Path) -> str:
    """Takes what an opening reads out of the page cache, as far as this user may; returns how."""
    os.sync()
    try:
        _DROP_CACHES.write_text("3")
    except OSError:
        for path in home.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "posix_fadvise"
    return "drop_caches"
