"""return-hazard beside the other policies, on the conversation trace and on traffic of other kinds."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.config import EVICTIONS
from kvtier.replay import Tiers, simulate
from kvtier.traces import Trace, load_trace

ROOT = Path(__file__).resolve().parents[3]
CONVERSATION = "mooncake_conversation.jsonl"
OURS = "return-hazard"
BESIDE_LRU = 0.2  # points that it may stay behind LRU anywhere


def rate(trace: Trace, blocks: int, policy: str, *, plain: bool = False) -> float:
    """In %."""
    return 100 * simulate(trace, Tiers(blocks, policy=policy, plain=plain)).hit_rate


@pytest.fixture(scope="module")
def conversation() -> Trace:
    folder = Path(os.environ.get("KVTIER_TRACES", ROOT.parent / "shared" / "traces"))
    if not (folder / CONVERSATION).is_file():
        pytest.skip(
            f"THE TARGETS OF {OURS} WERE NOT CHECKED: {folder / CONVERSATION} is not there; set "
            "KVTIER_TRACES to the folder with it (Mooncake, FAST'25 release)"
        )
    return load_trace(folder / CONVERSATION)


@pytest.mark.parametrize("plain", [False, True])
def test_it_is_ahead_of_every_other_on_the_conversation_trace(conversation: Trace, plain: bool) -> None:
    others = [name for name in EVICTIONS if name != OURS]
    for blocks, ahead in ((3_000, 2.0), (10_000, 0.5)):
        best = max(rate(conversation, blocks, name, plain=plain) for name in others)
        assert rate(conversation, blocks, OURS, plain=plain) >= best + ahead, f"with {blocks} blocks"
    for blocks in (1_000, 30_000, 100_000):
        lru = rate(conversation, blocks, "lru", plain=plain)
        assert rate(conversation, blocks, OURS, plain=plain) >= lru - BESIDE_LRU, f"with {blocks} blocks"


def test_it_never_leaves_an_orphan(conversation: Trace) -> None:
    assert simulate(conversation, Tiers(3_000, policy=OURS)).orphans == 0


# The policy was made with seed 1.
@pytest.mark.parametrize("family", ["chat", "slow-chat", "agents", "retrieval", "scans", "mix", "shift"])
def test_it_does_not_stay_behind_lru_on_other_traffic(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    workloads: Any = importlib.import_module("benchmarks.workloads")
    with (tmp_path / "trace.jsonl").open("w") as out:
        workloads.write(workloads.generate(family, 30, 2), out)
    trace = load_trace(tmp_path / "trace.jsonl")
    capacities = (300, 1_000, 3_000, 10_000)
    ahead = [rate(trace, blocks, OURS) - rate(trace, blocks, "lru") for blocks in capacities]
    assert min(ahead) >= -BESIDE_LRU, f"at {capacities}: {np.round(ahead, 2)}"
    assert max(ahead) > 1, "it learned nothing"


def test_the_same_trace_gives_the_same_hits(conversation: Trace) -> None:
    first, second = (simulate(conversation, Tiers(3_000, policy=OURS)) for _ in range(2))
    assert (first.host_of_request == second.host_of_request).all()
