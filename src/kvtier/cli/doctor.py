"""`kvtier doctor`: what there is on this machine, and whether kvtier works here.

A line is ok, a note (it works, but slower or with less), or FAILED; FAILED makes the exit status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvtier
from kvtier import stores
from kvtier.cli import machine
from kvtier.cli.results import Report, add_json_argument
from kvtier.disk_keys import read_keys
from kvtier.engine import copy_limit, stream_isa
from kvtier.errors import ConfigError, KVTierError, UnsupportedError
from kvtier.gpus import cuda_facts

_MOST_SECONDS = 10.0  # for the headers of what is on a disk
_OPTIONAL = {
    "torch": "kvtier demo",
    "transformers": "kvtier demo and its cache class",
    "rich": "progress bars",
}


@dataclass(frozen=True)
class Finding:
    """One line: `passed` is None for a note."""

    name: str
    text: str
    passed: bool | None = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier doctor`."""
    parser.add_argument("--disk", metavar="DIR", help="also: what the disk tier finds there")
    parser.add_argument("--key", metavar="PLACES", help="as Config.disk_key: which blocks there it can read")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Runs every check; returns the exit status: 2 where --key has no --disk."""
    if args.key is not None and args.disk is None:
        print("kvtier doctor: --key needs --disk DIR, whose blocks it reads", file=sys.stderr)
        return 2
    with Report("doctor", args.json) as report:
        print(machine.describe(report.machine), file=report.out)
        checks = CHECKS
        if args.disk is not None:
            checks = (*CHECKS, lambda: _disk(args.disk), lambda: _disk_blocks(args.disk, args.key))
        for check in checks:
            for finding in check():
                mark = {True: "ok    ", None: "note  ", False: "FAILED"}[finding.passed]
                print(f"{mark} {finding.name}: {finding.text}", file=report.out)
                if finding.passed is not None:
                    report.checks[finding.name] = finding.passed
                report.machine.setdefault("findings", {})[finding.name] = finding.text
    return report.status


def _devices() -> list[Finding]:
    try:
        facts = cuda_facts()
    except UnsupportedError as error:
        nvidia = Path("/proc/driver/nvidia/version").exists()  # a GPU that kvtier cannot use
        return [Finding("devices", f"cpu; {error}", None if nvidia else True)]
    driver, runtime = (f"{v // 1000}.{v % 1000 // 10}" for v in (facts.driver_version, facts.runtime_version))
    gpus = [
        f"cuda:{gpu.ordinal} {gpu.name} ({gpu.memory_bytes >> 30} GiB, {gpu.link}, NUMA node {gpu.numa_node})"
        for gpu in facts.gpus
    ]
    text = f"cpu, {', '.join(gpus)}; driver for CUDA {driver}, built with {runtime}"
    return [Finding("devices", text)]


def _copies() -> list[Finding]:
    isa = stream_isa()
    source = np.random.default_rng(0).integers(0, 256, 64 << 20, np.uint8)
    target = np.ones_like(source)
    times = {
        m: min(copy_limit(target, source, method=m, threads=1) for _ in range(3))
        for m in ("memcpy", "streaming")
    }
    rates = ", ".join(f"{m} {source.nbytes / s / 1e9:.1f} GB/s" for m, s in times.items())
    right = np.array_equal(source, target)
    return [
        Finding("copies", f"{rates} (64 MiB, one thread)" if right else "wrong bytes", right),
        Finding("streaming stores", isa, None if isa == "none" else True),
    ]


def _memory() -> list[Finding]:
    free = machine.available_bytes()
    huge = machine.facts()["transparent_hugepages"]
    pinned = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = "without limit" if pinned == resource.RLIM_INFINITY else f"{pinned >> 20} MiB"
    return [
        Finding(
            "memory", f"{free / 2**30:.1f} GiB free for the host tier", True if free >= 1 << 30 else None
        ),
        Finding("huge pages", f"transparent: {huge or 'unknown'}", None if huge in ("", "never") else True),
        Finding("locked memory", f"{text} (only GPUs and disks need it)"),
    ]


def _packages() -> list[Finding]:
    there = {name: importlib.util.find_spec(name) is not None for name in _OPTIONAL}
    return [
        Finding(
            name, "installed" if there[name] else f"not installed; only {use} needs it", there[name] or None
        )
        for name, use in _OPTIONAL.items()
    ]


def _round_trip() -> list[Finding]:
    layout = kvtier.KVLayout(num_layers=4, num_kv_heads=2, head_dim=64, dtype="float16", page_tokens=16)
    config = kvtier.Config(groups=[layout], model="kvtier-doctor@1", host="4MiB", chunk="4MiB")
    memory = np.random.default_rng(0).integers(0, 1 << 16, (4, 8, 2, 16, 2, 64), np.uint16)
    try:
        with kvtier.open(config) as engine:
            pages = engine.attach(list(memory))
            keys = kvtier.block_keys(np.arange(64, dtype=np.int32), config)
            engine.store(keys, pages, np.arange(4)).wait(30)
            found = engine.lookup(keys).ready_blocks
            loaded = engine.load(keys, pages, np.arange(4, 8)).result().valid_blocks
            pages.detach(30)
    except (KVTierError, OSError) as error:
        return [Finding("round trip", f"{type(error).__name__}: {error}", passed=False)]
    right = bool(np.array_equal(memory[:, :4], memory[:, 4:]))
    text = f"stored 4 blocks, found {found}, loaded {loaded}, bytes {'right' if right else 'WRONG'}"
    return [Finding("round trip", text, right and found == loaded == 4)]


def _disk(directory: str) -> list[Finding]:
    path = Path(directory).absolute()
    try:
        path.stat()  # probe() makes what is not there
        found = stores.probe(str(path))
        space = os.statvfs(path)
    except FileNotFoundError:
        return [Finding("disk", f"{path} is not there", passed=False)]
    except (KVTierError, OSError) as error:
        return [Finding("disk", f"{path}: {error}", passed=False)]
    queue = found["queue"]
    if found["queue_problem"]:  # which has no registered buffers either
        queue += f"; not io_uring: {found['queue_problem']}"
    elif found["buffers_problem"]:
        queue += f"; ordinary buffers, which are slower: {found['buffers_problem']}"
    direct = "O_DIRECT" if found["direct"] else "buffered: the file system takes no O_DIRECT"
    alignment = f", requests aligned to {found['alignment']} bytes" if found["direct"] else ""
    helper = stores.catalog_helper()
    helper_there = os.access(helper, os.X_OK)
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    free = space.f_bavail * space.f_frsize
    memlock = "without limit" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    return [
        Finding("disk queue", queue, None if found["queue_problem"] or found["buffers_problem"] else True),
        Finding("disk files", direct + alignment, True if found["direct"] else None),
        Finding("disk file system", f"{machine.file_system(path)}, {free / 2**30:.1f} GiB free"),
        Finding("disk memlock", f"{memlock}; registered buffers are charged to it, else ordinary ones serve"),
        Finding(
            "catalog helper",
            str(helper) if helper_there else f"{helper} is missing: restarts read all headers",
            helper_there,
        ),
    ]


def _disk_blocks(directory: str, places: str | None) -> list[Finding]:
    """Whether the blocks there can be read with the keys that are given; nothing where there are none."""
    until = time.monotonic() + _MOST_SECONDS

    def progress(done: int, total: int) -> None:
        if time.monotonic() > until:
            raise TimeoutError(f"only {done / max(total, 1):.0%} of them were read in {_MOST_SECONDS} s")

    try:
        keys = read_keys(places)
    except ConfigError as error:
        return [Finding("disk blocks", str(error), passed=False)]
    try:
        counts = stores.headers(directory, keys=keys, progress=progress)
    except TimeoutError as error:
        return [Finding("disk blocks", f"{error}; kvtier verify reads all", passed=None)]
    except ConfigError:
        return []  # no store was ever made there
    except KVTierError as error:
        return [Finding("disk blocks", str(error), passed=False)]
    blocks, unreadable = counts["good"] + counts["unreadable"], counts["unreadable"]
    if blocks == 0:
        return []
    if unreadable == 0:
        return [Finding("disk blocks", f"{blocks}, all readable", passed=True)]
    text = f"{unreadable} of {blocks} are encrypted under a key that was not given (--key): they are misses"
    return [Finding("disk blocks", text, passed=None if places is None else False)]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (_devices, _copies, _memory, _packages, _round_trip)
