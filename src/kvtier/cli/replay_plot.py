"""The plot of `kvtier replay --plot`: hit rate against the host tier's capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtier.replay import Replay

_SIZE_INCHES = (8, 5)


def plot(path: str, title: str, rows: Sequence[tuple[Replay, float | None]]) -> None:
    """Draws one line for each policy, and Belady's ceiling where it is known. Needs matplotlib.

    Args:
        path: Where the picture goes; the suffix says which kind.
        title: Of the picture.
        rows: Replays with their ceiling, 0 to 1.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[int, float]]] = {}
    for replay, belady in rows:
        lines.setdefault(replay.tiers.policy, []).append((replay.tiers.host_blocks, 100 * replay.hit_rate))
        if belady is not None:
            lines.setdefault("Belady", []).append((replay.tiers.host_blocks, 100 * belady))
    figure: Any
    figure, axes = pyplot.subplots(figsize=_SIZE_INCHES)
    for name, points in lines.items():
        xs, ys = zip(*sorted(set(points)), strict=True)
        style = (
            {"color": "black", "linestyle": "--"} if name == "Belady" else {"marker": "o", "markersize": 3}
        )
        axes.plot(xs, ys, label=name, **style)
    axes.set(xscale="log", xlabel="host tier, blocks", ylabel="hit rate, %", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
