"""The table of `kvtier bench ttft`, for the terminal and the report."""

from __future__ import annotations

from typing import Any

from kvtier.cli import plots
from kvtier.cli.bench_ttft_plan import SUFFIX_TOKENS
from kvtier.cli.bench_ttft_plot import on_gpu

LEGEND = (
    "Seconds to the first token, medians; ~ extrapolated. restarted: from disk in a new process after\n"
    "SIGKILL. x: recompute over it. GB/s: restored / plain copy or read in the same round. over: above\n"
    f"the limit, the suffix's {SUFFIX_TOKENS} tokens included. even: slower than that, recompute wins."
)
_TARGET_RATE, _TARGET_MS = 0.97, 60.0  # on a GPU: bytes / (0.97 x the plain rate) + 60 ms
_LEGEND_GPU = (
    f"\ntarget: of over, for a first token within bytes / ({_TARGET_RATE} x plain) + {_TARGET_MS:.0f} ms."
)
_TIERS = ("device", "host", "disk", "disk_restarted")
_HEADER = ["tokens", "KV MiB", "recompute s", "device", "host", "disk", "restarted", "host x", "disk x"]


def legend(document: dict[str, Any]) -> str:
    """What the columns of a document are."""
    return LEGEND + (_LEGEND_GPU if on_gpu(document) else "")


def cells(document: dict[str, Any], shape: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one shape out of a document of `kvtier bench ttft --json`, a row for each length."""
    found = {result["name"]: result for result in document["results"]}
    with_energy = any(name.startswith(f"energy/{shape}/") for name in found)
    prefix = f"kv_bytes/{shape}/"
    lengths = sorted(int(name[len(prefix) :]) for name in found if name.startswith(prefix))
    gpu = on_gpu(document)
    header = list(_HEADER)
    for tier in ("host", "disk"):
        header += [f"{tier} GB/s", "over ms", *(["target ms"] if gpu else [])]
    header += ["even GB/s", *(["recompute J", "host J", "disk J"] if with_energy else [])]
    return header, [_row(found, f"{shape}/{tokens}", tokens, with_energy, gpu) for tokens in lengths]


def _row(found: dict[str, dict[str, Any]], at: str, tokens: int, with_energy: bool, gpu: bool) -> list[str]:
    def cell(name: str, form: str, key: str = "value") -> str:
        result = found.get(name)
        if result is None or result[key] is None:
            return ""
        return f"{'~' if result.get('extrapolated') else ''}{result[key]:{form}}"

    row = [plots.tokens_text(tokens), f"{found[f'kv_bytes/{at}']['value'] / 2**20:.0f}"]
    row += [cell(f"ttft/{at}/{tier}", ".3g") for tier in ("recompute", *_TIERS)]
    row += [cell(f"speedup/{at}/{tier}", ".1f") for tier in ("host", "disk")]
    for tier in ("host", "disk"):
        rate, plain = (cell(f"restore/{at}/{tier}", ".3g", key) for key in ("value", "limit"))
        row += [f"{rate} / {plain}" if rate else "", cell(f"overhead/{at}/{tier}", ".0f")]
        if gpu:
            limit = found.get(f"ttft/{at}/{tier}", {}).get("limit")
            row.append("" if limit is None else f"{1e3 * limit * (1 / _TARGET_RATE - 1) + _TARGET_MS:.0f}")
    row.append(cell(f"break_even/{at}", ".2g"))
    if with_energy:
        row += [cell(f"energy/{at}/{tier}", ".3g") for tier in ("recompute", "host", "disk")]
    return row
