"""The demo's disk row: a process computes and saves the prefix, and is killed; another one restores it.

Killed with SIGKILL. Neither is the process that measures the other rows: they share with it the model, the
prompt and the files of the disk tier, and their logits are compared with its own, bit by bit.
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

from kvtier.cli.demo_life import Life
from kvtier.cli.demo_run import SUFFIX_TOKENS
from kvtier.cli.lives import live
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, measured
from kvtier.config import Config, Disk

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


def disk_for(folder: Path, num_blocks: int, slot_bytes: int) -> Disk:
    """A drive for so many blocks, and little more."""
    return Disk(str(folder / "disk"), (num_blocks + _SPARE_BLOCKS) * slot_bytes + _SPARE_BYTES)


def measure(
    args: argparse.Namespace, config: Config, token_ids: Any, expected: Any, folder: Path, report: Report
) -> None:
    """Runs both processes and adds their results and checks to the report.

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
        runs=args.runs,
        host_bytes=config.host_bytes,
        disk_bytes=config.disks[0].capacity_bytes,
    )
    work = len(token_ids) + (args.runs + 1) * SUFFIX_TOKENS
    with Progress(report.out, work) as progress:
        saved = live("kvtier.cli.demo_life", "save", asdict(life), progress)
        report.checks["disk_saved_whole_prefix"] = bool(saved["durable"])
        report.checks["disk_cold_identical_logits"] = _equal(folder / "save.npy", expected)
        progress.phase("killed with SIGKILL; a new process starts")
        restored = live("kvtier.cli.demo_life", "restore", asdict(life), progress)
    report.checks["disk_restored_whole_prefix"] = bool(restored["restored"])
    report.checks["disk_identical_logits"] = bool(restored["identical"]) and _equal(
        folder / "restore.npy", expected
    )
    report.checks["disk_control_differs"] = bool(restored["control_differs"])
    cold = next(result.value for result in report.results if result.name == "ttft_cold")
    ttft, seconds = restored["ttft"], restored["restore"]
    report.add(
        measured("ttft_disk_after_sigkill", ttft, "s", [cold] * len(ttft)),
        measured("restore_disk", [restored["kv_bytes"] / s / 1e9 for s in seconds], "GB/s"),
        measured("reopen", restored["open"], "s"),
    )


def _equal(file: Path, expected: Any) -> bool:
    return bool(np.array_equal(np.load(file), expected))
