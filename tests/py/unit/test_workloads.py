"""benchmarks/workloads: the generator's traffic is what its seed says, and what its families claim."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

# The first ten minutes of seed 1: another Python, or a careless change, would give other traffic. Who changes
# the traffic on purpose changes these too, and the figures of docs/policies.md.
FINGERPRINTS = {
    "chat": "a3b139ba2d027bcb",
    "slow-chat": "42f3036e20abb4cd",
    "agents": "71e07d770d927a16",
    "retrieval": "b3edb595bc4c5949",
    "scans": "0883dfb7154eeec2",
    "mix": "d664756640f4a4d8",
    "shift": "b4bed5b14830b84a",
}


@pytest.fixture
def workloads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.workloads")


def fingerprint(requests: Any) -> str:
    said = [(round(r.at_s * 1000), r.input_tokens, r.output_tokens, r.block_ids) for r in requests]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def test_a_seed_gives_the_same_traffic_everywhere(workloads: Any) -> None:
    families = list(workloads.FAMILIES)
    assert {f: fingerprint(workloads.generate(f, 10, 1)) for f in families} == FINGERPRINTS


def test_another_seed_gives_other_traffic(workloads: Any) -> None:
    assert fingerprint(workloads.generate("chat", 5, 1)) != fingerprint(workloads.generate("chat", 5, 2))


@pytest.mark.parametrize("block_tokens", [16, 512])
def test_equal_ids_mean_an_equal_prefix(workloads: Any, block_tokens: int) -> None:
    parents: dict[int, int] = {}
    for request in workloads.generate("mix", 4, 3, block_tokens):
        assert len(request.block_ids) == -(-request.input_tokens // block_tokens)
        for above, block in zip((-1, *request.block_ids), request.block_ids, strict=False):
            assert parents.setdefault(block, above) == above


def test_requests_come_in_order_of_time_and_turn(workloads: Any) -> None:
    requests = workloads.generate("shift", 20, 4)
    times = [request.at_s for request in requests]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 20 * 60
    turns: Counter[int] = Counter()
    for request in requests:
        turns[request.session] += 1
        assert request.turn == turns[request.session]


def reuse(requests: Any) -> float:
    seen: set[int] = set()
    hits = references = 0
    for request in requests:
        references += len(request.block_ids)
        hits += sum(block in seen for block in request.block_ids)
        seen.update(request.block_ids)
    return hits / references


def test_families_are_what_they_are_called(workloads: Any) -> None:
    traffic = {family: workloads.generate(family, 20, 1) for family in ("agents", "scans", "retrieval")}
    assert reuse(traffic["agents"]) > 0.8  # every step repeats the whole history
    assert reuse(traffic["scans"]) < 0.6
    one_shot = [request for request in traffic["scans"] if request.kind == "scan"]
    assert all(request.turn == 1 for request in one_shot)
    assert sum(len(r.block_ids) for r in one_shot) > 0.4 * sum(len(r.block_ids) for r in traffic["scans"])
    first_of_sessions = [request for request in traffic["retrieval"] if request.turn == 1]
    assert reuse(first_of_sessions) > 0.6  # the documents are shared between sessions


@pytest.mark.parametrize(("form", "block_tokens"), [("mooncake", 512), ("bailian", 16)])
def test_the_command_writes_a_trace(workloads: Any, form: str, block_tokens: int) -> None:
    command = [sys.executable, "-m", "benchmarks.workloads", "chat", "--minutes", "1", "--format", form]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = [json.loads(line) for line in out.splitlines()]
    expected = workloads.generate("chat", 1, 1, block_tokens)
    assert [tuple(line["hash_ids"]) for line in lines] == [request.block_ids for request in expected]
    assert [line["input_length"] for line in lines] == [request.input_tokens for request in expected]
    if form == "bailian":
        sessions = {request.session for request in expected}
        assert sum(line["parent_chat_id"] == -1 for line in lines) == len(sessions)
        by_id = {line["chat_id"]: line for line in lines}
        assert all(
            by_id[line["parent_chat_id"]]["turn"] == line["turn"] - 1 for line in lines if line["turn"] > 1
        )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("rain", 5, 1), "rain"), (("chat", 0, 1), "0"), (("chat", 1, 1, 0), "block_tokens")],
)
def test_what_cannot_be_generated_is_refused(workloads: Any, arguments: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        workloads.generate(*arguments)
