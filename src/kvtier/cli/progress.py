"""A progress bar where somebody watches, plain lines where nobody does."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, TextIO

# Without a terminal: a line at every new phase, and inside a phase not more often than this.
_SECONDS_BETWEEN_LINES = 5.0
# Before that much is done, the time left is a guess.
_SURE_SECONDS, _SURE_SHARE = 2.0, 0.02


class Progress:
    """Progress of a run through named phases; a context manager.

    With `rich` installed and a terminal at `out`: a bar. Otherwise lines.

    Args:
        out: Where to draw.
        total: Units of work altogether.
    """

    def __init__(self, out: TextIO, total: float) -> None:
        self._out = out
        self._total = max(total, 1)
        self._done = 0.0
        self._began_at = time.monotonic()
        self._phase = ""
        self._over = False
        self._printed_at = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        if out.isatty():
            try:
                from rich.console import Console
                from rich.progress import Progress as RichProgress
            except ImportError:
                return
            self._bar = RichProgress(console=Console(file=out), transient=True)
            self._task = self._bar.add_task("", total=self._total)

    def phase(self, name: str) -> None:
        """Begins a phase."""
        self._phase = name
        if self._bar is not None:
            self._bar.update(self._task, description=name)
        else:
            self._line()

    @property
    def done(self) -> float:
        """Units of work so far."""
        return self._done

    def expect(self, total: float) -> None:
        """More, or less, is to be done than was thought."""
        self._total = max(total, 1)
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def step(self, units: float = 1) -> None:
        """Some units of work are done."""
        self._done += units
        if self._bar is not None:
            self._bar.update(self._task, advance=units)
        elif time.monotonic() - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._line()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._phase, self._over = "done", True
            self._line()

    def _line(self) -> None:
        self._printed_at = time.monotonic()
        share = min(1.0, self._done / self._total)
        print(f"[{int(100 * share):3d} %] {self._phase}{self._left(share)}", file=self._out, flush=True)

    def _left(self, share: float) -> str:
        took = time.monotonic() - self._began_at
        if self._over or not _SURE_SHARE <= share < 1 or took < _SURE_SECONDS:
            return ""
        return f" (about {took * (1 / share - 1):.0f} s left)"
