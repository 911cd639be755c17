"""`kvtier bench SUBJECT`: figures beside what the machine can do, from the same run.

Common to all: buffers are written once before anything is measured; every round runs all candidates in turn,
so that what slows the machine down meets all of them; the first round warms up and does not count; figures
are medians over the other rounds, with their extremes. Bytes are compared, and a figure whose bytes were
wrong is not reported.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

from kvtier.cli import machine
from kvtier.cli.results import Report, add_json_argument
from kvtier.errors import ConfigError

SUBJECTS = {
    "index": "lookups, keys, stores and evictions in an index of a million blocks, beside a Python dict",
    "copy": "pages to host slots and back, beside the machine's own copy of the same bytes",
    "disk": "slots of the disk tier, written and read beside fio on the same file",
    "reopen": "an engine's time to be ready again with what its disk tier holds",
    "device": "a GPU's pages to host slots and back by every path, beside plain pinned copies",
    "vllm": "time to the first token of a real vLLM server: cold, on the device, restored from host memory",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench`."""
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, text in SUBJECTS.items():
        sub = subjects.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.add_argument("--rounds", type=int, default=9, help="that count (default: %(default)s)")
        sub.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
        importlib.import_module(f"kvtier.cli.bench_{name}").add_arguments(sub)
        add_json_argument(sub)


def run(args: argparse.Namespace) -> int:
    """Runs a benchmark; returns the exit status."""
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds}: must be at least 1")
    subject: Any = importlib.import_module(f"kvtier.cli.bench_{args.subject}")
    with Report(f"bench {args.subject}", args.json) as report:
        report.machine["seed"] = args.seed
        print(machine.describe(report.machine), file=report.out)
        print(f"seed {args.seed}, one round of warm-up, {args.rounds} rounds that count", file=report.out)
        subject.measure(args, report)
        for name, passed in report.checks.items():
            print(f"{'ok    ' if passed else 'FAILED'} {name}", file=report.out)
    return report.status


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
