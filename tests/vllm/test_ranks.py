"""Two ranks of which one is killed while it stores."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import BEFORE_0_32, BLOCK
from run_rank_dies import DURABLE, HERE, KILLED, STORES
from test_server import environment

HITS = [(len(p) - 1) // BLOCK * BLOCK for p in DURABLE]
EACH = 256 // BLOCK  # blocks of a step


def run(model: Path, folder: Path, when: str) -> Any:
    meeting = folder / "run"
    meeting.mkdir(mode=0o700, exist_ok=True)
    result = folder / f"{when}.json"
    variables = environment(
        meeting,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="0|1",
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(HERE),
    )
    with (folder / "log").open("w+") as log:
        arguments = [str(model), str(folder / "disk"), when, str(result)]
        ended = subprocess.run(
            [sys.executable, str(HERE / "run_rank_dies.py"), *arguments],
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=200,
            check=False,
        )
        log.seek(0)
        assert ended.returncode == 0, log.read()[-6000:]
    return json.loads(result.read_text())


@pytest.mark.skipif(BEFORE_0_32, reason="vLLM 0.31 waits for ever in ZeroMQ when it ends without a rank")
@pytest.mark.timeout(500)
@pytest.mark.parametrize("when", ["before", "begun", "copied"])
def test_a_rank_killed_while_it_stores_leaves_nothing_wrong(llama: Path, tmp_path: Path, when: str) -> None:
    told = run(llama, tmp_path, when)
    assert told["error"]
    # What both ranks had stored is visible; what one of them had not, is not, and its slots are free again.
    whole = (STORES - 1) * EACH
    assert told["visible"] in ((whole,) if when == "before" else (whole, whole + EACH))
    before, stored = told["stored"]
    assert stored == before + told["visible"]
    assert told["pinned"] == [0, 0, 0]
    assert told["slots"] == {"filling": 0, "leaving": 0, "ready": stored}
    assert told["later"] == ["DECLINED"]  # nothing is granted where a rank is missing
    after = run(llama, tmp_path, "restored")
    assert [tokens for tokens, _ in after["durable"]] == [tokens for tokens, _ in told["durable"]]
    assert [cached for _, cached in after["durable"]] == HITS
    ((found, cached),), ((computed, nothing),) = after["killed"], after["computed"]
    assert (cached, nothing) == (told["visible"] * BLOCK, 0)
    assert found == computed
    assert len(KILLED) > cached + EACH
    assert after["failures"] == 0
