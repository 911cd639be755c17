"""Figures in documents that come from the result files, and stay as they are there.

A document holds blocks of this form; what is between the comments is made out of the first one:

    <!-- figures epyc-2core
    | lookup | {index lookup_in_order} | {index lookup_in_order ratio:.0f} x |
    -->
    | lookup | 1.57 ms (1.44-1.83) | 9 x |
    <!-- end of figures -->

After `figures` comes the machine. In braces: the subject, a result's name, and if wanted one of value, min,
max, limit, ratio, n, with a format; without it the median with its unit and, where measured more than once,
its range. `{SUBJECT file}` is the path of the file. The subject's newest file of that machine in
benchmarks/results, SUBJECT-MACHINE-DATE.json, is meant. A figure that was extrapolated has a "~".
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError

RESULTS = Path("benchmarks") / "results"
_BLOCK = re.compile(r"(<!-- figures (\S+)\n(.*?)-->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)
_FIELD = re.compile(r"\{([\w-]+) ([^\s}]+)(?: (\w+)(?::([^}]*))?)?\}")
_FIELDS = ("value", "min", "max", "limit", "ratio", "n")
_DATE = "[0-9]" * 4 + "-" + "[0-9]" * 2 + "-" + "[0-9]" * 2


class Figures:
    """The result files below a project's root."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._documents: dict[Path, dict[str, Any]] = {}

    def newest(self, subject: str, machine: str) -> Path:
        """The subject's newest file of a machine, relative to the root.

        Raises:
            ConfigError: There is none.
        """
        pattern = f"{subject}-{machine}-{_DATE}.json"
        found = sorted((self._root / RESULTS).glob(pattern))
        if not found:
            raise ConfigError(f"{RESULTS}: no file {subject}-{machine}-DATE.json")
        return found[-1].relative_to(self._root)

    def filled(self, text: str) -> str:
        """A document with its blocks made anew.

        Raises:
            ConfigError: A block names a file or a result that is not there, or cannot be read.
        """
        if text.count("<!-- figures ") != len(_BLOCK.findall(text)):
            raise ConfigError("a block of figures without its end, or inside another")
        return _BLOCK.sub(lambda m: f"{m[1]}{self._block(m[3], m[2])}{m[5]}", text)

    def _block(self, template: str, machine: str) -> str:
        def fill(match: re.Match[str]) -> str:
            subject, name, field, form = match.groups()
            file = self.newest(subject, machine)
            if name == "file":
                return file.as_posix()
            result = self._result(file, name)
            return _whole(result) if field is None else _one(result, field, form or ".3g")

        return _FIELD.sub(fill, template)

    def _result(self, file: Path, name: str) -> dict[str, Any]:
        if file not in self._documents:
            self._documents[file] = json.loads((self._root / file).read_text(encoding="utf-8"))
        document = self._documents[file]
        if not all(document["checks"].values()):
            failed = ", ".join(check for check, passed in document["checks"].items() if not passed)
            raise ConfigError(f"{file}: its check {failed} failed: no figures to quote")
        for result in document["results"]:
            if result["name"] == name:
                found: dict[str, Any] = result
                return found
        raise ConfigError(f"{file}: no result {name!r}")


def _one(result: dict[str, Any], field: str, form: str) -> str:
    value = result.get(field) if field in _FIELDS else None
    if value is None:
        raise ConfigError(
            f"{result['name']}: no {field!r}; allowed: {', '.join(_FIELDS)}, as far as measured"
        )
    return f"{_mark(result)}{value:{form}}"


def _whole(result: dict[str, Any]) -> str:
    text = f"{_mark(result)}{short(result['value'])} {result['unit']}"
    if result["n"] > 1:
        text += f" ({short(result['min'])}-{short(result['max'])})"
    return text


def _mark(result: dict[str, Any]) -> str:
    return "~" if result.get("extrapolated") else ""


def short(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{float(f'{value:.3g}'):#.3g}".rstrip(".")


def refresh(root: Path, *, check_only: bool = False) -> list[Path]:
    """Writes the figures into README.md and docs/ anew.

    Args:
        root: Of the project.
        check_only: Change nothing.

    Returns:
        The files whose figures were not those of the result files.

    Raises:
        ConfigError: The message names the document.
    """
    figures, changed = Figures(root), []
    for path in [
        root / "README.md",
        root / "benchmarks" / "README.md",
        *sorted((root / "docs").rglob("*.md")),
    ]:
        text = path.read_text(encoding="utf-8")
        try:
            filled = figures.filled(text)
        except ConfigError as error:
            raise ConfigError(f"{path.relative_to(root)}: {error}") from error
        if filled != text:
            changed.append(path.relative_to(root))
            if not check_only:
                path.write_text(filled, encoding="utf-8")
    return changed
