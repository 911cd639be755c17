"""The programs that start servers, with sizes so small that they prove that they work and measure nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm_restart.py"
pytestmark = pytest.mark.timeout(900)


def run(arguments: list[str], folder: Path) -> str:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    program = subprocess.Popen(
        [sys.executable, *arguments],
        env=keep,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = program.communicate(timeout=600)
    except BaseException:  # as Ctrl-C: its servers have to end, too
        program.send_signal(signal.SIGINT)
        program.communicate()
        raise
    assert program.returncode == 0, out + err[-6000:]
    return out


def test_the_example_restores_a_prompt_after_a_restart(tmp_path: Path) -> None:
    said = run([str(EXAMPLE), "--tokens", "1025"], tmp_path)
    lines = {line.split("  ")[0]: line for line in said.splitlines()}
    assert " 0 tokens of the prompt not computed" in lines["computed"]
    assert " 1024 tokens of the prompt not computed" in lines["from disk, after a restart"]
    assert "the same answer as from the device" in said


def test_the_benchmark_measures_all_that_it_names(tmp_path: Path) -> None:
    """Most of its time is four starts of a server: each side's, twice."""
    file = tmp_path / "result.json"
    before = shared_memory()
    options = ["--rounds", "1", "--tokens", "257", "--host", "64MiB", "--disk", "128MiB"]
    run(["-m", "kvtier.cli", "bench", "vllm", *options, "--json", str(file)], tmp_path)
    document = json.loads(file.read_text())
    restored = {f"{side}_{what}" for side in ("kvtier", "vllm_native") for what in ("tokens", "restored")}
    assert document["checks"] == dict.fromkeys(restored | {"completed"}, True), document["machine"]["missed"]
    of = {result["name"]: result for result in document["results"]}
    rows = {f"ttft_{kind}/257" for kind in ("cold", "device", "host", "disk_restarted")}
    rows.add("scheduler_lookup_65536")
    for row in rows:
        assert of[row]["limit"] == of[f"vllm_native/{row}"]["value"] > 0
    assert shared_memory() <= before


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("vllm_offload_kvtier-*")}
