"""One HTML page out of the result files, with nothing outside of it; and the figures of README and docs.

Of every subject on every machine the newest file counts. Figures and tables are made out of the files, by the
subject's `figures(document)` and `tables(document)` where it has them.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kvtier.cli import machine, plots
from kvtier.cli.figures import RESULTS, refresh, short
from kvtier.cli.results import Report, Result, add_json_argument, problems
from kvtier.errors import ConfigError, UnsupportedError

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { border-top: 1px solid #999; padding-top: 1rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; font-size: 13px; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.failed { color: #b00020; font-weight: 700; }
details { margin: .6rem 0; } summary { cursor: pointer; }
@media print { details { display: block; } body { margin: 0; } h2 { break-before: page; } }
"""
_ABOUT = """
Times and rates are medians with minimum and maximum over n measurements; limit is what the machine itself did
in the same run, in the same unit, and ratio the median of the paired quotients, so turned that more is
better. An extrapolated figure was not measured. Compare figures of one run with each other; between runs and
machines compare ratios to the limit. docs/benchmarks.md is the whole protocol.
"""
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench report`."""
    parser.add_argument("--results", metavar="DIR", help=f"the result files (default: {RESULTS})")
    parser.add_argument(
        "--html", metavar="FILE", help="where to write (default: report.html among the results)"
    )
    parser.add_argument(
        "--readme", action="store_true", help="also write the figures of README.md and docs/ anew"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the page; returns the exit status: 1 if a file is not what it should be."""
    folder = Path(args.results or (machine.checkout() or Path.cwd()) / RESULTS)
    target = Path(args.html or folder / "report.html")
    root = machine.checkout()
    if args.readme and root is None:
        raise ConfigError("--readme: kvtier does not run from its source tree")
    if args.readme and root is not None and folder.resolve() != (root / RESULTS).resolve():
        raise ConfigError(f"--readme with --results {folder}: the documents quote those in {root / RESULTS}")
    found, wrong = collect(folder)
    if not found:
        raise ConfigError(f"--results {folder}: no result files")
    with Report("bench report", args.json) as report, contextlib.redirect_stdout(report.out):
        target.write_text(page(found), encoding="utf-8")
        size = target.stat().st_size
        print(f"{target}: {len(found)} files, {size >> 10} KiB")
        for problem in wrong:
            print(f"left out: {problem}")
        report.machine |= {"files": list(found), "left_out": wrong}
        report.add(Result("files", len(found), "files"), Result("page", size, "B"))
        report.checks["files"] = not wrong
        if args.readme and root is not None:
            for path in refresh(root):
                print(f"figures written anew: {path}")
    return report.status


def collect(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The newest file of each subject and machine, by name; and what is wrong with others.

    A file without a date in its name counts for itself.
    """
    newest: dict[str, str] = {}
    documents: dict[str, dict[str, Any]] = {}
    wrong = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            wrong.append(f"{path.name}: not JSON: {error}")
            continue
        if found := problems(document):
            wrong.append(f"{path.name}: {found[0]}")
            continue
        newest[_DATE.sub("", path.stem)] = path.name  # sorted: the last is the newest
        documents[path.name] = document
    return {name: documents[name] for name in newest.values()}, wrong


def page(documents: dict[str, dict[str, Any]]) -> str:
    """The page for documents by the names of their files."""
    made = datetime.now(timezone.utc).date().isoformat()
    links = "".join(f'<li><a href="#{i}">{_e(name)}</a></li>' for i, name in enumerate(documents))
    sections = "".join(_section(i, name, document) for i, (name, document) in enumerate(documents.items()))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>kvtier: benchmarks</title>'
        f"<style>{_STYLE}</style></head><body><h1>kvtier: benchmarks</h1><p>{_ABOUT}</p>"
        f"<p>Made on {made} at commit {_e(machine.commit())}.</p><ul>{links}</ul>{sections}</body></html>\n"
    )


def _section(index: int, name: str, document: dict[str, Any]) -> str:
    failed = [check for check, passed in document["checks"].items() if not passed]
    verdict = f"{len(document['checks'])} checks passed"
    if failed:
        verdict = f'<span class="failed">FAILED: {_e(", ".join(failed))}</span>'
    own = _module(document)
    pictures = "".join(f'<p><img alt="{_e(name)}" src="{uri}"></p>' for uri in _pictures(own, document))
    summary = ""
    for title, header, rows, legend in own.tables(document) if hasattr(own, "tables") else ():
        summary += f"<h3>{_e(title)}</h3>{_table(header, rows)}<p><small>{_e(legend)}</small></p>"
    facts = document["machine"]
    method = facts.get("method", {})
    rest = {key: value for key, value in facts.items() if key != "method"}
    return (
        f'<h2 id="{index}">kvtier {_e(document["command"])}</h2>'
        f"<p>{_e(name)}, commit {_e(document['commit'])}; {verdict}</p>{pictures}{summary}"
        f"{_results(document['results'])}"
        f"<details><summary>Method</summary>{_list(method)}</details>"
        f"<details><summary>Machine</summary>{_list(rest)}</details>"
    )


def _module(document: dict[str, Any]) -> Any:
    """What measured it; None if this version has no such command."""
    name = f"kvtier.cli.{document['command'].replace(' ', '_')}"
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None


def _pictures(own: Any, document: dict[str, Any]) -> Iterator[str]:
    """The subject's own figures; none where it draws none, or nothing can be drawn here."""
    if hasattr(own, "figures"):
        try:
            plots.need()
        except UnsupportedError as error:
            print(f"no figures: {error}")
            return
        yield from (plots.data_uri(drawn) for drawn in own.figures(document))


def _results(results: list[dict[str, Any]]) -> str:
    header = ("name", "median", "unit", "min", "max", "limit", "ratio", "n")
    rows = []
    for r in results:
        numbers = [
            "" if r[key] is None else short(r[key]) for key in ("value", "min", "max", "limit", "ratio")
        ]
        count = "extrapolated" if r.get("extrapolated") else str(r["n"])
        rows.append((r["name"], numbers[0], r["unit"], *numbers[1:], count))
    text = _table(header, rows)
    return text if len(rows) <= 40 else f"<details><summary>{len(rows)} results</summary>{text}</details>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_e(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _list(facts: dict[str, Any]) -> str:
    return "<dl>" + "".join(f"<dt>{_e(k)}</dt><dd>{_e(_plain(v))}</dd>" for k, v in facts.items()) + "</dl>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _e(text: object) -> str:
    return html.escape(str(text))
