"""Figures for print: every line has its own marker and dash, so that they are told apart without colour."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError, UnsupportedError

# Of Okabe and Ito, told apart by the colour-blind too; then markers and dashes.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SUFFIXES = (".png", ".svg", ".pdf")
_WIDTH_INCHES, _HEIGHT_INCHES, _DOTS_PER_INCH = 7.2, 4.6, 150


def need() -> None:
    """Raises UnsupportedError, with what to install, where figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnsupportedError("figures need matplotlib: pip install 'kvtier[plots]'") from None


def check(path: str | None) -> None:
    """Says before the work that `--plot` could not be written; None is for no figure.

    Raises:
        ConfigError: Not the name of a figure's file, there is no such folder, or it cannot be written.
        UnsupportedError: As need().
    """
    if path is None:
        return
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"--plot is {path!r}; allowed: a file ending in .png, .svg or .pdf")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--plot is {path!r}; there is no such folder")
    target = Path(os.path.realpath(path))
    try:
        there = target.exists()
        if there and not target.is_file():
            raise ConfigError(f"--plot is {path!r}; allowed: a file, and that is none")
        target.open("ab").close()
        if not there:
            target.unlink()
    except OSError as error:
        raise ConfigError(f"--plot is {path!r}; it cannot be written: {error.strerror}") from error
    need()


def figure(title: str, x: str, y: str, *, log_x: bool = False, log_y: bool = False) -> tuple[Any, Any]:
    """An empty figure and its axes; needs no display.

    Args:
        title: Above it.
        x: What the axis says, with its unit.
        y: The same.
        log_x: A logarithmic axis.
        log_y: The same.
    """
    need()
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = drawn.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    if log_x:
        axes.set_xscale("log", base=2)
    if log_y:
        axes.set_yscale("log")
    axes.grid(visible=True, which="major", linewidth=0.5, alpha=0.5)
    return drawn, axes


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the index-th line."""
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}


def token_ticks(axes: Any, tokens: Iterable[int]) -> None:
    """Marks lengths as people say them: 1k, 128k, 1M."""
    ticks = sorted(set(tokens))
    axes.set_xticks(ticks, [tokens_text(n) for n in ticks])
    axes.minorticks_off()


def tokens_text(tokens: int) -> str:
    """131072 is "128k"."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)


def png(drawn: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    return buffer.getvalue()


def save(drawn: Any, path: str | Path) -> None:
    """Writes it as the kind of file that the suffix says."""
    drawn.savefig(path)


def data_uri(drawn: Any) -> str:
    """The figure for an HTML page that needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png(drawn)).decode()
