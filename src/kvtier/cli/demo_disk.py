"""The demo's disk row: a process computes and saves the prefix, and is killed; others restore it.

Each is killed with SIGKILL while its engine is open: every restored run is of a new process that opens what a
killed one has left. None is the process that measures the other rows: they share with it the model, the
prompt and the files of the disk tier, and their logits are compared with its own, bit by bit. Starting a
process, its model and opening the engine (the result `reopen`) are not in their times.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.cli.demo import SLOT_OVERHEAD
from kvtier.cli.demo_life import Life
from kvtier.cli.demo_run import SUFFIX_TOKENS
from kvtier.cli.lives import live
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, measured
from kvtier.config import Config

_SPARE_BLOCKS = 16
_SPARE_BYTES = 32 << 20  # of the capacity: catalog, superblock, directories


@contextmanager
def folder_for(given: str | None) -> Iterator[Path]:
    """A new directory below `given` or the current one, removed afterwards.

    Raises:
        OSError: It cannot be made.
    """
    parent = Path.cwd() if given is None else Path(given).absolute()
    folder = Path(tempfile.mkdtemp(prefix="kvtier-demo-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def capacity(config: Config, prefix: int) -> int:
    """Bytes of a drive for the blocks of the prefix, and little more."""
    slot_bytes = config.groups[0].block_bytes(config.block_tokens) + SLOT_OVERHEAD
    return (prefix // config.block_tokens + _SPARE_BLOCKS) * slot_bytes + _SPARE_BYTES


def measure(
    args: argparse.Namespace, config: Config, token_ids: Any, expected: Any, folder: Path, report: Report
) -> None:
    """Runs the processes and adds their checks, and where all hold their results, to the report.

    Args:
        args: Of the command line.
        config: With the disk.
        token_ids: The prompt.
        expected: Logits of the cold run, a NumPy array.
        folder: Where they put what they tell each other.
        report: Receives results and checks.
    """
    np.save(folder / "tokens.npy", token_ids)
    life = Life(
        folder=str(folder),
        model=args.model,
        size=args.size,
        block_tokens=args.block_tokens,
        chunk_tokens=args.chunk,
        copy_threads=args.copy_threads,
        host_bytes=config.host_bytes,
        disk_bytes=config.disks[0].capacity_bytes,
    )
    restored = []
    identical = True
    work = len(token_ids) + 2 * args.runs * SUFFIX_TOKENS
    with Progress(report.out, work) as progress:
        saved = live("kvtier.cli.demo_life", "save", asdict(life), progress)
        report.checks["disk_saved_whole_prefix"] = bool(saved["durable"])
        report.checks["disk_cold_identical_logits"] = _equal(folder / "save.npy", expected)
        if not saved["durable"]:
            print("the prefix is not on disk as a whole: nothing is restored from it", file=report.out)
            return
        for _ in range(args.runs):
            progress.phase("killed with SIGKILL; a new process starts")
            restored.append(live("kvtier.cli.demo_life", "restore", asdict(life), progress))
            identical = identical and _equal(folder / "restore.npy", expected)
    report.checks["disk_restored_whole_prefix"] = all(run["restored"] for run in restored)
    report.checks["disk_identical_logits"] = identical and all(run["identical"] for run in restored)
    report.checks["disk_control_differs"] = all(run["control_differs"] for run in restored)
    if not all(passed for name, passed in report.checks.items() if name.startswith("disk_")):
        print("a check failed: figures of the disk tier are not reported", file=report.out)
        return
    cold = next(result.value for result in report.results if result.name == "ttft_cold")
    report.add(
        measured("ttft_disk_after_sigkill", [run["ttft"] for run in restored], "s", [cold] * args.runs),
        measured("restore_disk", [run["kv_bytes"] / run["restore"] / 1e9 for run in restored], "GB/s"),
        measured("reopen", [run["open"] for run in restored], "s"),
    )


def _equal(file: Path, expected: Any) -> bool:
    return bool(np.array_equal(np.load(file), expected))
