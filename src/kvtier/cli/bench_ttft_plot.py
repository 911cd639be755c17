"""The figure of `kvtier bench ttft`: seconds to the first token against tokens of context, log-log."""

from __future__ import annotations

from typing import Any

from kvtier.cli import plots

TIERS = {
    "recompute": "recompute",
    "device": "from device",
    "host": "from host",
    "disk": "from disk",
    "disk_restarted": "from disk, new process after SIGKILL",
}
LIMITS = {
    "host": ("limit of host: bytes / plain copy", ":"),
    "disk": ("limit of disk: bytes / plain read", "-."),
}


def shapes_of(document: dict[str, Any]) -> list[str]:
    """The shapes that results are there for, in order."""
    names = [r["name"].split("/") for r in document["results"]]
    return list(dict.fromkeys(parts[1] for parts in names if parts[0] == "ttft" and len(parts) == 4))


def rows_of(document: dict[str, Any], shape: str) -> dict[str, dict[int, dict[str, Any]]]:
    """The results of one shape by tier and tokens."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for result in document["results"]:
        parts = result["name"].split("/")
        if parts[:2] == ["ttft", shape] and len(parts) == 4:
            found.setdefault(parts[3], {})[int(parts[2])] = result
    return found


def on_gpu(document: dict[str, Any]) -> bool:
    """Whether the device that computed was a GPU."""
    return _device(document.get("machine", {})) != "cpu"


def _device(machine: dict[str, Any]) -> str:
    return str(machine.get("method", {}).get("options", {}).get("device", "cpu"))


def device_name(machine: dict[str, Any], shape: str) -> str:
    """What computed, for people."""
    device = _device(machine)
    if device == "cpu":
        return f"{machine['cpu']}, {machine['cores']} cores"
    if said := machine.get("ttft", {}).get(shape, {}).get("device"):
        return str(said)
    index, gpus = int(device.partition(":")[2] or 0), machine.get("gpus", [])
    return str(gpus[index]["name"]) if index < len(gpus) else device


def draw(document: dict[str, Any], shape: str) -> Any:
    """The figure of one shape out of a document of `kvtier bench ttft --json`."""
    rows = rows_of(document, shape)
    drawn, axes = plots.figure(
        f"{shape}, new suffix of 128 tokens\n{device_name(document['machine'], shape)}",
        "tokens of context (prefix)",
        "time to first token (s)",
        log_x=True,
        log_y=True,
    )
    for index, (tier, label) in enumerate(TIERS.items()):
        points = sorted(rows.get(tier, {}).items())
        real = [(n, r["value"]) for n, r in points if not r.get("extrapolated")]
        guessed = [(n, r["value"]) for n, r in points if r.get("extrapolated")]
        look = plots.style(index) | {"linewidth": 1.6, "markersize": 5}
        if real:
            axes.plot(*zip(*real, strict=True), label=label, **look)
        if guessed:
            axes.plot(
                *zip(*real[-1:], *guessed, strict=True),
                label=f"{label}, extrapolated",
                markevery=slice(len(real[-1:]), None),
                **look | {"linestyle": "--", "markerfacecolor": "white", "linewidth": 1.2},
            )
    for index, (tier, (label, dashes)) in enumerate(LIMITS.items()):
        bound = sorted((n, r["limit"]) for n, r in rows.get(tier, {}).items() if r["limit"])
        if bound:
            colour = plots.style(2 + index)["color"]
            alone = {"marker": "_", "markersize": 14} if len(bound) == 1 else {}  # no line through one point
            axes.plot(
                *zip(*bound, strict=True),
                label=label,
                color=colour,
                linestyle=dashes,
                linewidth=1.4,
                **alone,
            )
    plots.token_ticks(axes, (n for tier in rows.values() for n in tier))
    drawn.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    return drawn
