"""What every measuring command writes with `--json FILE`: one schema, complete even when interrupted.

    {"schema": 1, "command": "bench copy", "commit": "...", "machine": {...},
     "results": [{"name": ..., "value": ..., "unit": ..., "limit": ..., "ratio": ...,
                  "n": ..., "min": ..., "max": ...}],
     "checks": {"bytes": true, "completed": true}}

A result's `value` is the median of `n` measurements between `min` and `max`. `limit` is what it is held
against, measured in the same run and in the same unit (the machine's own copy, a Python dict), or null;
`ratio` is the median of the paired quotients, so turned that more is better: value / limit for a rate,
limit / value for a time. A check that is false makes the command's exit status 1; `completed` is false when
somebody pressed Ctrl-C or sent SIGTERM, or an error came in between, and the results are then those that were
finished. What failed before it had any result or check writes nothing. A figure that was computed from
others and not measured has `"extrapolated": true` and n = 0; the key is absent otherwise. `machine` says what
the figures were measured on and, under `method`, how.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import math
import os
import re
import stat
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from kvtier.cli import machine

SCHEMA = 1

# Units in which less is better.
_TIMES = {"s", "ms", "us", "ns"}

# What check_json() has opened, by path, until write_json() writes into it: no regular files.
_streams: dict[str, int] = {}


@dataclass(frozen=True)
class Result:
    """One figure; see the module."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    ratio: float | None = None
    n: int = 1
    min: float | None = None
    max: float | None = None
    extrapolated: bool = False

    def as_json(self) -> dict[str, Any]:
        """As it is written."""
        found = asdict(self)
        if not found.pop("extrapolated"):
            return found
        return found | {"extrapolated": True}


def measured(name: str, values: Sequence[float], unit: str, limits: Sequence[float] | None = None) -> Result:
    """The Result of repeated measurements.

    Args:
        name: What scripts look for.
        values: At least one.
        unit: "s", "ms", "us" and "ns" are times; of anything else more is better.
        limits: What each value is held against, measured in the same round.
    """
    limit = ratio = None
    if limits is not None:
        limit = statistics.median(limits)
        pairs = zip(values, limits, strict=True)
        ratio = statistics.median(b / a if unit in _TIMES else a / b for a, b in pairs)
    return Result(
        name, statistics.median(values), unit, limit, ratio, n=len(values), min=min(values), max=max(values)
    )


@dataclass
class Report:
    """Collects the results and checks of one run; a context manager that writes them whatever happens.

    Attributes:
        command: As typed: "demo", "bench copy".
        path: Where the JSON goes: a file's path, "-" for standard output, None for nowhere.
        machine: What the figures were measured on; commands may add to it.
    """

    command: str
    path: str | None = None
    machine: dict[str, Any] = field(default_factory=machine.facts)
    results: list[Result] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)

    @property
    def out(self) -> TextIO:
        """Where to print for people: standard error when the JSON goes to standard output."""
        return out_of(self.path)

    @property
    def status(self) -> int:
        """The exit status so far: 1 if a check failed."""
        return 0 if all(self.checks.values()) else 1

    def add(self, *results: Result) -> None:
        """Adds finished results."""
        self.results.extend(results)

    def document(self) -> dict[str, Any]:
        """What is written, as JSON types."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "commit": machine.commit(),
            "machine": self.machine,
            "results": [result.as_json() for result in self.results],
            "checks": dict(self.checks),
        }

    def write(self) -> None:
        """Writes the JSON now. A file is replaced as a whole: a reader never sees half of it."""
        write_json(self.path, self.document())

    def save(self) -> None:
        """Writes to a file what there is so far, as of an interrupted run: whatever comes, it is kept."""
        if self.path not in (None, "-", *_streams):
            document = self.document()
            write_json(self.path, document | {"checks": document["checks"] | {"completed": False}})

    def __enter__(self) -> Report:
        check_json(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = kind is not None and issubclass(kind, Exception)  # Ctrl-C is none
        if failed and not self.results and not self.checks:  # what an earlier run left is worth more
            forget_json(self.path)
            return
        self.checks["completed"] = kind is None
        self.write()


def told(command: str, found: dict[str, Any], **checks: bool) -> dict[str, Any]:
    """A document of the schema by a command that tells of a trace or of drives.

    Args:
        command: As typed.
        found: All that it tells, under `machine.<command>`; its own numbers are results too.
        checks: Of what it found.
    """
    report = Report(command)
    report.machine[command] = found
    for name, value in found.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            unit = "B" if name.endswith("_bytes") else "s" if name == "seconds" else ""
            report.add(Result(name, value, unit))
    report.checks |= checks | {"completed": True}
    return report.document()


def out_of(json_path: str | None) -> TextIO:
    """Where to print for people: standard error when the JSON goes to standard output."""
    return sys.stderr if json_path == "-" else sys.stdout


def check_json(path: str | None) -> None:
    """Says before the work that write_json() could not write there.

    What is there and is no regular file (a pipe, a character device, /dev/fd/3) is opened here and kept open.

    Raises:
        OSError: There is no such folder, it may not be written into, the name is too long, or what is there
            is a folder, a block device or a socket.
    """
    if path is None or path == "-" or path in _streams:
        return
    try:
        stream = _stream(path)
        if stream is not None:
            _streams[path] = stream
            return
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "its folder may not be written into")
        part = _part(target)
        part.touch(exist_ok=False)
        part.unlink()
    except OSError as error:
        raise type(error)(f"--json {path}: {error.strerror or error}") from None


def forget_json(path: str | None) -> None:
    """Nothing will be written there: closes what check_json() has opened."""
    if path is not None and (stream := _streams.pop(path, None)) is not None:
        os.close(stream)


def write_json(path: str | None, document: Any) -> None:
    """Writes a document to a file, which is replaced as a whole, to standard output for "-", or nowhere.

    Of a symbolic link its target is replaced. What is no regular file is written into.
    """
    if path is None:
        return
    try:
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    except ValueError:  # what was measured is not lost for one figure
        text = json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    stream = _streams.pop(path, None)
    if stream is None:
        stream = _stream(path)
    if stream is not None:
        sys.stdout.flush()  # which may be the same
        with os.fdopen(stream, "w", encoding="utf-8") as file:
            file.write(text)
        return
    target = Path(os.path.realpath(path))
    part = _part(target)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _part(target: Path) -> Path:
    """What becomes the file; its name is short, whatever the file's is. None is there."""
    part = target.with_name(f".kvtier-json.{os.getpid()}")
    part.unlink(missing_ok=True)
    return part


def _stream(path: str) -> int | None:
    """Opens what is there and is no regular file; None where a file is to be made or replaced."""
    number = _descriptor(path)
    if number is not None:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "is open for reading alone")
        return os.dup(number)
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - one for all that open()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder; allowed: a file, or - for standard output")
    if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        raise OSError(
            errno.EINVAL, "is a block device or a socket; allowed: a file, or - for standard output"
        )
    return os.open(path, os.O_WRONLY | os.O_NOCTTY)


def _descriptor(path: str) -> int | None:
    """The number behind /dev/fd/3, /dev/stdout and their like, which a shell has opened for us."""
    at = Path(path).absolute()
    for _ in range(40):  # as many links as the kernel follows
        folder = os.path.realpath(at.parent)
        if re.fullmatch(rf"/proc/{os.getpid()}(/task/\d+)?/fd", folder):
            return int(at.name) if at.name.isdecimal() else None
        at = Path(folder, at.name)
        try:
            at = Path(folder, os.readlink(at))  # noqa: PTH115 - may be relative
        except OSError:
            return None
    return None


def _finite(document: Any) -> Any:
    """The same with text where JSON has no number: "inf", "nan"."""
    if isinstance(document, dict):
        return {key: _finite(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [_finite(value) for value in document]
    return str(document) if isinstance(document, float) and not math.isfinite(document) else document


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--json FILE`."""
    parser.add_argument("--json", metavar="FILE", help="write the results there too; - is standard output")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, *rows)
    )
    return "\n".join(lines)


def results_table(results: Sequence[Result], targets: dict[str, str] | None = None) -> str:
    """One line a result; `targets` says in words what is wanted of some."""
    rows = []
    for r in results:
        numbers = [_short(x) for x in (r.value, r.min, r.max, r.limit, r.ratio)]
        how_many = "extrapolated" if r.extrapolated else str(r.n)
        rows.append((r.name, numbers[0], r.unit, *numbers[1:], how_many, (targets or {}).get(r.name, "")))
    return table(("name", "median", "unit", "min", "max", "limit", "ratio", "n", "target"), rows)


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def problems(document: Any) -> list[str]:
    """What is wrong with a document of this schema; empty if nothing is."""
    if not isinstance(document, dict):
        return ["not an object"]
    found = []
    kinds = {"schema": int, "command": str, "commit": str, "machine": dict, "results": list, "checks": dict}
    if set(document) != set(kinds):
        found.append(f"keys are {sorted(document)}; must be {sorted(kinds)}")
    found += [
        f"{k} is not of type {t.__name__}" for k, t in kinds.items() if not isinstance(document.get(k), t)
    ]
    if found:
        return found
    if document["schema"] != SCHEMA:
        found.append(f"schema is {document['schema']}; known is {SCHEMA}")
    found += [f"check {k} is {v!r}" for k, v in document["checks"].items() if not isinstance(v, bool)]
    for result in document["results"]:
        found += _result_problems(result)
    names = [r.get("name") for r in document["results"] if isinstance(r, dict)]
    found += [
        f"result {name} is there twice" for name in sorted({str(n) for n in names if names.count(n) > 1})
    ]
    return found


def _result_problems(result: Any) -> list[str]:
    if not isinstance(result, dict) or {*result, "extrapolated"} != set(Result.__dataclass_fields__):
        return [f"result {result!r} has other keys than {list(Result.__dataclass_fields__)}"]
    found = [
        f"{k} of {result['name']} is not text" for k in ("name", "unit") if not isinstance(result[k], str)
    ]
    for key in ("value", "limit", "ratio", "n", "min", "max"):
        value = result[key]
        if value is None and key in ("limit", "ratio", "min", "max"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            found.append(f"{key} of {result['name']} is {value!r}")
    if result.get("extrapolated", True) is not True or (result["n"] == 0) != ("extrapolated" in result):
        found.append(f"{result['name']}: extrapolated is either true, and then n is 0, or absent")
    return found
