"""The plot of `kvtier replay --plot`: hit rate against the host tier's capacity."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.cli import plots
from kvtier.replay import Replay

_SIZE_INCHES = (6.4, 4.2)  # a picture of all policies has less than 120 KB
_LARGEST, _STEP = 10, 0.7  # markers shrink from line to line, so that one shows through those drawn over it


def plot(path: str, title: str, rows: Sequence[tuple[Replay, float | None]]) -> None:
    """Draws one line for each policy, and Belady's ceiling where it is known. Needs matplotlib.

    Args:
        path: Where the picture goes; the suffix says which kind.
        title: Of the picture.
        rows: Replays with their ceiling, 0 to 1.
    """
    lines: dict[str, set[tuple[int, float]]] = {}
    ceiling = set()
    for replay, belady in rows:
        host = replay.tiers.host_blocks
        lines.setdefault(replay.tiers.policy, set()).add((host, 100 * replay.hit_rate))
        if belady is not None:
            ceiling.add((host, 100 * belady))
    drawn, axes = plots.figure(title, "host tier, blocks", "blocks hit, %", log_x=True)
    drawn.set_size_inches(*_SIZE_INCHES)
    for index, (name, points) in enumerate(lines.items()):
        size = max(_LARGEST - _STEP * index, 5)
        axes.plot(*zip(*sorted(points), strict=True), label=name, markersize=size, **plots.style(index))
    if ceiling:
        axes.plot(*zip(*sorted(ceiling), strict=True), label="Belady", color="#000000", linestyle="--")
    hosts = sorted({replay.tiers.host_blocks for replay, _ in rows})
    axes.set_xticks(hosts, [f"{host:,}" for host in hosts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend()
    plots.save(drawn, path)
