"""Every benchmark that this machine can run, one after the other, and the report.

Each is a process of its own and writes SUBJECT-MACHINE-DATE.json into the results. What cannot run here is
left out, with its reason, and so is what would not be over in the time given. What is cut short leaves what
it has finished, unless there is a complete file of the same subject and machine already.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kvtier.cli import machine
from kvtier.cli.arguments import finite
from kvtier.cli.figures import RESULTS
from kvtier.cli.processes import Terminated, bound
from kvtier.cli.results import Report, Result, add_json_argument, write_json
from kvtier.errors import ConfigError, KVTierError
from kvtier.gpus import cuda_facts

_VLLM_PYTHON = Path(".venv-vllm") / "bin" / "python"
_INTERRUPTED = 130
_TERMINATED = 143
_OUT_OF_TIME = 124  # as of timeout(1)
_MOST_MINUTES = 100_000.0
_KEPT_SECONDS = 60.0  # of the time given, for a step that is stopped
_STOP_SECONDS = 300.0  # two servers, a minute and their children's end for each, and as much again
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}\.json$")


@dataclass(frozen=True)
class Step:
    """One of them.

    Attributes:
        name: Of the result file.
        command: Behind `kvtier`; "{dir}" is the directory of the drive.
        minutes: How long it takes on a machine with 2 cores, about.
        missing: Why it cannot run here; None: it can.
        python: Which Python runs it.
        unless: The step that runs in its place where both could.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    missing: Callable[[], str | None] = lambda: None
    python: Callable[[], str] = lambda: sys.executable
    unless: str = ""


def _no_fio() -> str | None:
    return (
        None if shutil.which("fio") else "fio is not installed (Debian: fio); it is what disk is held against"
    )


def _no_module(*names: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else None

    return missing


def _no_gpu() -> str | None:
    try:
        return None if cuda_facts().gpus else "no GPU that CUDA can use"
    except KVTierError as error:
        return str(error)


def _no_gpu_torch() -> str | None:
    if why := _no_gpu() or _no_module("torch")():
        return why
    probe = "import torch; raise SystemExit(not torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", probe], check=False, timeout=120)  # noqa: S603
    return "this torch sees no GPU" if done.returncode else None


def _vllm_python() -> str:
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    root = machine.checkout() or Path.cwd()
    return str(root / _VLLM_PYTHON)


def _no_vllm() -> str | None:
    python = _vllm_python()
    return (
        None if python == sys.executable or Path(python).exists() else "vLLM is not installed (make vllm-env)"
    )


# What only a GPU's machine can run comes first: it is not dropped for what any machine can run.
_GPU_TTFT = ("bench", "ttft", "--device", "cuda", "--minutes", "13", "--dir", "{dir}")
_VLLM_300M = ("bench", "vllm", "--size", "300m", "--tokens", "8193", "--dir", "{dir}")
STEPS = (
    Step("gpu", ("bench", "device"), 3, _no_gpu),
    Step("ttft-gpu", _GPU_TTFT, 14, _no_gpu_torch),
    Step("index", ("bench", "index"), 1),
    Step("copy", ("bench", "copy"), 1),
    Step("demo", ("demo", "--disk", "{dir}"), 2, _no_module("torch", "transformers")),
    Step("reopen", ("bench", "reopen", "--dir", "{dir}"), 1),
    Step("disk", ("bench", "disk", "--dir", "{dir}"), 7, _no_fio),
    Step("vllm-300m", _VLLM_300M, 5, _no_vllm, _vllm_python),
    Step("peers", ("bench", "peers", "--dir", "{dir}"), 18, _no_module("kvtier.cli.bench_peers")),
    Step("vllm", ("bench", "vllm", "--dir", "{dir}"), 7, _no_vllm, _vllm_python),
    Step("ttft", ("bench", "ttft", "--dir", "{dir}"), 10, _no_module("torch"), unless="ttft-gpu"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench all`."""
    parser.add_argument("--results", metavar="DIR", help=f"where the files go (default: {RESULTS})")
    parser.add_argument(
        "--machine", metavar="NAME", help="in the files' names (default: by processor and cores)"
    )
    parser.add_argument(
        "--dir", default=".", metavar="D", help="a directory on the drive (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=finite, default=60.0, help="for all (default: %(default)s)")
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of: {', '.join(names)}")
    parser.add_argument("--without", nargs="+", choices=names, default=[], metavar="NAME", help="of the same")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Runs them; returns the exit status: 1 if one of them failed."""
    folder = Path(args.results or (machine.checkout() or Path.cwd()) / RESULTS)
    if not folder.is_dir():
        raise ConfigError(f"--results {folder}: must be a directory")
    if not 0 < args.minutes <= _MOST_MINUTES:
        raise ConfigError(f"--minutes {args.minutes}: must be above 0, at most {_MOST_MINUTES:.0f}")
    chosen = [s for s in STEPS if (args.only is None or s.name in args.only) and s.name not in args.without]
    with Report("bench all", args.json) as report:
        name = args.machine or machine.slug(report.machine)
        date = datetime.now(timezone.utc).date().isoformat()
        print(machine.describe(report.machine), file=report.out)
        left_out: dict[str, str] = {}
        report.machine["left_out"] = left_out
        ended = _all(chosen, args, lambda step: folder / f"{step.name}-{name}-{date}.json", report)
        html = [sys.executable, "-m", "kvtier.cli", "bench", "report", "--results", str(folder)]
        if any(folder.glob("*.json")):
            done = subprocess.run(html, check=False, stdout=_output(report))  # noqa: S603
            report.checks["report"] = done.returncode == 0
        for subject, why in left_out.items():
            print(f"left out: {subject}: {why}", file=report.out)
        for subject, passed in report.checks.items():
            print(f"{'ok    ' if passed else 'FAILED'} {subject}", file=report.out)
        if ended is not None:
            raise ended
    return report.status


def _output(report: Report) -> int | None:
    """Where processes print for people; None is where we do."""
    report.out.flush()
    return 2 if report.path == "-" else None


def possible(steps: Sequence[Step]) -> tuple[list[Step], dict[str, str]]:
    """The steps that can run here, and why the others cannot."""
    left_out = {step.name: why for step in steps if (why := step.missing())}
    names = {step.name for step in steps} - left_out.keys()
    left_out |= {
        step.name: f"{step.unless} runs in its place (--only {step.name} runs it)"
        for step in steps
        if step.name in names and step.unless in names
    }
    return [step for step in steps if step.name not in left_out], left_out


def _all(
    steps: list[Step], args: argparse.Namespace, target: Callable[[Step], Path], report: Report
) -> KeyboardInterrupt | None:
    """Runs the steps; what ended them before their time, if anything did."""
    left_out: dict[str, str] = report.machine["left_out"]
    can, why_not = possible(steps)
    left_out |= why_not
    begin = time.monotonic()
    for index, step in enumerate(can):
        left = args.minutes - (time.monotonic() - begin) / 60
        if step.minutes > left:
            left_out[step.name] = f"takes about {step.minutes:.0f} min, {max(0.0, left):.0f} are left"
            continue
        behind = sum(s.minutes for s in can[index:])
        print(
            f"\n== {index + 1} of {len(can)}: {step.name}, about {step.minutes:.0f} min; "
            f"all about {min(left, behind):.0f} min left ==",
            file=report.out,
            flush=True,
        )
        started = time.monotonic()
        # What is slower than thought takes what would be left over, and nothing of the steps behind it.
        allowed = max(step.minutes, left - (behind - step.minutes) - _KEPT_SECONDS / 60)
        status, kept = _run(step, args.dir, target(step), 60 * allowed, _output(report))
        if status in (_INTERRUPTED, _TERMINATED):
            left_out[step.name] = f"interrupted; {kept}"
            return Terminated() if status == _TERMINATED else KeyboardInterrupt()
        if status == _OUT_OF_TIME:
            left_out[step.name] = f"stopped after {allowed:.0f} min; {kept}"
        report.checks[step.name] = status == 0
        report.add(Result(f"duration/{step.name}", time.monotonic() - started, "s"))
    return None


def _run(step: Step, directory: str, target: Path, seconds: float, output: int | None) -> tuple[int, str]:
    """Runs one, for so long; its status, and what became of its file."""
    part, begin = target.with_suffix(".part"), time.monotonic()
    words = [word.replace("{dir}", directory) for word in step.command]
    command = bound([step.python(), "-m", "kvtier.cli", *words, "--json", str(part)], signal.SIGTERM)
    try:
        # Ctrl-C reaches the child, too: it writes what was finished and ends. So does it when we are killed.
        child = subprocess.Popen(  # noqa: S603
            command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=output
        )
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            _stop(child, signal.SIGINT)
            status = _OUT_OF_TIME
        except Terminated:
            _stop(child, signal.SIGTERM)
            status = _TERMINATED
        except KeyboardInterrupt:
            child.wait()
            status = _INTERRUPTED
        return status, _keep(part, target, time.monotonic() - begin)
    finally:
        part.unlink(missing_ok=True)


def _keep(part: Path, target: Path, seconds: float) -> str:
    """Makes what a step wrote its file; in words what became of it.

    With how long the step took, and our commit where it knows none.

    An incomplete one replaces nothing, and does not come before a complete one of another day either.
    """
    try:
        document: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "nothing was finished"
    if not _is_complete(document) and (older := _complete_file(target)) is not None:
        return f"{older.name} stays"
    if document["commit"] == "unknown":
        document["commit"] = machine.commit()
    document["machine"]["seconds"] = round(seconds, 1)
    write_json(str(target), document)
    return "what was finished is in its file"


def _is_complete(document: Any) -> bool:
    checks = document.get("checks") if isinstance(document, dict) else None
    return isinstance(checks, dict) and checks.get("completed") is True


def _complete_file(target: Path) -> Path | None:
    """The newest complete file of the same subject and machine."""
    subject = _DATE.sub("", target.name)
    for path in sorted(target.parent.iterdir(), reverse=True):
        if _DATE.sub("", path.name) == subject and path.name != subject:
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if _is_complete(document):
                return path
    return None


def _stop(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Lets it unwind, servers and all; what does not end is killed."""
    child.send_signal(number)
    try:
        child.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
