"""The tables and the figure of `kvtier bench peers`, out of its results."""

from __future__ import annotations

from typing import Any

from kvtier.cli import plots
from kvtier.cli.results import Report, Result, table

_SUFFIX = "/ratio"
_REFERENCE = (
    "of reference: the peer's and kvtier's rate over that of plain calls in the same rounds (machine/...);\n"
    "no upper limit: on a drive these are Python threads"
)
COPIED = "_copied"  # ours with the blocks' bytes, beside a peer's index work, which moves none


def print_tables(report: Report) -> None:
    """Ratios with minimum and maximum; then what was seen after ends, flipped bits and past the cap."""
    rows = [_ratio_row(report, r) for r in ratios(report)]
    if rows:
        header = (
            "what",
            "peer",
            "peer's median (min-max)",
            "kvtier's",
            "kvtier is",
            "min-max",
            "of reference",
            "n",
        )
        print(f"\n{table(header, rows)}", file=report.out)
        print(f"\n{_REFERENCE}", file=report.out)
        print("\nbehind: " + (", ".join(behind(report)) or "nowhere"), file=report.out)
    if seen := _behaviour_rows(report):
        columns = ("store", "after SIGKILL", "after close", "bits flipped", "disk / cap", "newest kept")
        print(f"\n{table(columns, seen)}\n", file=report.out)
    for line in _holders(report):
        print(line, file=report.out)


def ratios(report: Report) -> list[Result]:
    """The results "kvtier/WHAT/SIZE/PEER/ratio"; a restart's SIZE is "2MiB/killed_seconds"."""
    return [r for r in report.results if r.name.endswith(_SUFFIX)]


def behind(report: Report) -> list[str]:
    """Where kvtier is slower in the median, with the ratio."""
    return [
        f"{r.name.removeprefix('kvtier/').removesuffix(_SUFFIX)} ({_times(r.value)} x)"
        for r in ratios(report)
        if r.value < 1
    ]


def _ratio_row(report: Report, ratio: Result) -> tuple[str, ...]:
    what, size, peer = _parts(ratio.name)
    of = {r.name: r for r in report.results}
    theirs, ours = of[f"{peer}/{what.removesuffix(COPIED)}/{size}"], of[ratio.name.removesuffix(_SUFFIX)]
    return (
        f"{what} {size}",
        peer,
        _short(theirs),
        _short(ours),
        f"{_times(ratio.value)} x",
        f"{_times(ratio.min)}-{_times(ratio.max)}",
        _of_machine(theirs, of.get(f"{ours.name}/of_machine")),
        str(ratio.n),
    )


def _times(ratio: float | None) -> str:
    """Two places; of less than 0.1 two digits."""
    return "" if ratio is None else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def _of_machine(theirs: Result, ours: Result | None) -> str:
    """Both rates over the reference, plain calls: the peer's, ours."""
    return "" if theirs.ratio is None or ours is None else f"{theirs.ratio:.2f}, {ours.value:.2f}"


def _short(r: Result) -> str:
    return f"{r.value:.3g} {r.unit} ({r.min:.3g}-{r.max:.3g})"


def _behaviour_rows(report: Report) -> list[tuple[str, ...]]:
    of = {r.name: r for r in report.results}
    names = dict.fromkeys(
        r.name.split("/")[0] for r in report.results if r.name.split("/")[1] in ("restart", "bitflip", "cap")
    )
    return [
        (
            name,
            *(_restart(of, f"{name}/restart/2MiB/{end}") for end in ("killed", "closed")),
            _flipped(of.get(f"{name}/bitflip/2MiB")),
            _number(of.get(f"{name}/cap/2MiB"), "{:.2f} x"),
            _number(of.get(f"{name}/cap/2MiB/newest"), "{:.0f} %"),
        )
        for name in names
    ]


def _holders(report: Report) -> list[str]:
    of = {r.name: r for r in report.results}
    return [
        f"{name.split('/')[0]}: after SIGKILL of the process that holds the values it says that "
        f"{of[f'{name}/found'].value:.0f} % are there; {r.value:.0f} % can be read"
        for name, r in of.items()
        if name.split("/")[1] == "holder_killed" and f"{name}/found" in of
    ]


def _restart(of: dict[str, Result], name: str) -> str:
    if name not in of:
        return "-"
    took = of.get(f"{name}_seconds")
    return f"{of[name].value:.0f} %" + (
        f" in {took.value:.3g} s ({took.min:.3g}-{took.max:.3g})" if took else ""
    )


def _flipped(result: Result | None) -> str:
    return "-" if result is None else f"{result.value:.0f} of {result.n} served wrong"


def _number(result: Result | None, form: str) -> str:
    return "-" if result is None else form.format(result.value)


# --- the figure ---


def plot(report: Report, path: str) -> None:
    """Draws the ratios: a point and its range for each row, 1 is equal."""
    if ratios(report):
        plots.save(draw(report), path)
    else:
        print("no plot: there are no ratios", file=report.out)


def draw(report: Report) -> Any:
    """The figure of `plot`; there are ratios."""
    found = ratios(report)
    drawn, axes = plots.figure(
        "kvtier beside other stores (median and min-max of paired rounds)",
        "how many times faster kvtier is (log; right of 1: kvtier is ahead)",
        "",
    )
    axes.set_xscale("log")
    drawn.set_size_inches(7.2, 1.2 + 0.2 * len(found))
    _points(axes, found)
    return drawn


def _points(axes: Any, found: list[Result]) -> None:
    kinds = list(dict.fromkeys(r.name.split("/")[1] for r in found))
    for kind, name in enumerate(kinds):
        rows = [(i, r) for i, r in enumerate(found) if r.name.split("/")[1] == name]
        values = [r.value for _, r in rows]
        low = [r.value - (r.min or r.value) for _, r in rows]
        high = [(r.max or r.value) - r.value for _, r in rows]
        axes.errorbar(
            values,
            [i for i, _ in rows],
            xerr=[low, high],
            linestyle="none",
            capsize=2,
            label=name.replace("_", " "),
            **plots.style(kind),
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(found)), [_label(r.name) for r in found], fontsize=7)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} x")
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))


def _label(name: str) -> str:
    what, size, peer = _parts(name)
    return f"{peer}  {what.replace('_', ' ')} {size.replace('_', ' ')}"


def _parts(ratio_name: str) -> tuple[str, str, str]:
    """What, size and peer of a ratio."""
    _, what, *size, peer, _ = ratio_name.split("/")
    return what, "/".join(size), peer
