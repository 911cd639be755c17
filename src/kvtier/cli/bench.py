"""`kvtier bench SUBJECT`: figures beside what the machine can do, from the same run.

Common to all: buffers are written once before anything is measured; every round runs all candidates in turn,
so that what slows the machine down meets all of them; the first round warms up and does not count; figures
are medians over the other rounds, with their extremes. Bytes are compared, and a figure whose bytes were
wrong is not reported. Only one benchmark runs at a time on a machine.

A subject is a module `bench_SUBJECT` with `add_arguments(parser)` and either `measure(args, report)`, or, if
it measures nothing by itself, `run(args) -> int` like a command of its own. Where it has `check(args)`, that
refuses wrong options before any other benchmark is waited for. With `--list` it measures nothing either.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtier.cli import machine, plots
from kvtier.cli.bench_lock import alone
from kvtier.cli.results import Report, add_json_argument, check_json, out_of
from kvtier.errors import ConfigError

SUBJECTS = {
    "index": "lookups, keys, stores and evictions in an index of a million blocks, beside a Python dict",
    "copy": "pages to host slots and back, beside the machine's own copy of the same bytes",
    "disk": "slots of the disk tier, written and read beside fio on the same file",
    "reopen": "an engine's time to be ready again with what its disk tier holds",
    "ttft": "time to the first token against context length: recomputed, and restored from every tier",
    "device": "a GPU's pages to host slots and back by every path, beside plain pinned copies",
    "vllm": "time to the first token of a real vLLM server: cold, on the device, restored from host memory "
    "and from disk by a new server",
    "peers": "other stores of KV blocks in turn with kvtier: put, get, lookup, restart, flipped bits, cap",
    "report": "one HTML page out of the results, and the figures of README and docs",
    "all": "everything that this machine can do in under an hour, and the report",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench`."""
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, text in SUBJECTS.items():
        sub = subjects.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        module = importlib.import_module(f"kvtier.cli.bench_{name}")
        if hasattr(module, "measure"):
            sub.add_argument("--rounds", type=int, default=9, help="that count (default: %(default)s)")
            sub.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
            add_json_argument(sub)
        module.add_arguments(sub)


def run(args: argparse.Namespace) -> int:
    """Runs a benchmark; returns the exit status."""
    subject: Any = importlib.import_module(f"kvtier.cli.bench_{args.subject}")
    if not hasattr(subject, "measure"):
        status: int = subject.run(args)
        return status
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds}: must be at least 1")
    check_json(args.json)
    plots.check(getattr(args, "plot", None))
    if hasattr(subject, "check"):
        subject.check(args)
    turn = contextlib.nullcontext() if getattr(args, "list", False) else alone(out_of(args.json))
    with turn, Report(f"bench {args.subject}", args.json) as report:
        report.machine |= {"seed": args.seed, "method": method(args, subject)}
        print(machine.describe(report.machine), file=report.out)
        folder: str | None = getattr(args, "dir", None)
        if folder is not None and not getattr(args, "list", False):
            report.machine["drive"] = machine.drive(Path(folder))
            print(machine.describe_drive(report.machine["drive"]), file=report.out)
        print(f"seed: {args.seed}", file=report.out)
        for name, value in report.machine["method"].items():
            print(f"{name}: {value}", file=report.out)
        subject.measure(args, report)
        if folder is None and "drive" in report.machine:  # the subject's own choice
            print(machine.describe_drive(report.machine["drive"]), file=report.out)
        for name, passed in report.checks.items():
            print(f"{'ok    ' if passed else 'FAILED'} {name}", file=report.out)
    return report.status


def method(args: argparse.Namespace, subject: Any) -> dict[str, Any]:
    """How it is measured, for people and for the JSON; a subject may add its own with `METHOD`."""
    hidden = (
        "command",
        "subject",
        "json",
        "dir",
        "seed",
        "rounds",
    )  # said elsewhere, or a path of this machine
    common = {
        "options": {k: v for k, v in vars(args).items() if k not in hidden and not callable(v)},
        "warm_up": "one round, which does not count",
        "repetitions": f"{args.rounds} rounds, candidates in turn; medians with minimum and maximum",
        "lossless": "yes: bytes are compared",
        "limit": "measured in the same round",
    }
    return common | getattr(subject, "METHOD", {})


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
