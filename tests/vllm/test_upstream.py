"""vLLM's own connector tests pass against ours. They come from its source distribution (see the Makefile)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = Path(sys.prefix) / "vllm-sources"
CONNECTOR = "tests/v1/kv_connector/unit"
pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(
    ("files", "which", "least"),
    [
        (
            [
                f"{CONNECTOR}/test_{name}.py"
                for name in (
                    "kv_load_failure_recovery",
                    "invalid_blocks_correctness",
                    "cache_pollution_prevention",
                    "error_propagation",
                    "kv_connector_lifecycle",
                    "hma_auto_config",
                )
            ],
            "",
            26,
        ),
        (
            ["tests/v1/core/test_scheduler.py"],
            "(connector or remote_kvs or recving) and not ec_",
            21,
        ),
        (
            ["tests/v1/kv_offload/tiering/test_fs_tier.py"],
            "lookup_empty or store_creates or store_then_load or failed_load_missing or tracked_independently"
            " or partial_failure or data_integrity or lookup_dispatch",
            16,
        ),
    ],
    ids=["connector", "scheduler", "tier"],
)
def test_vllms_own_tests_pass_against_ours(tmp_path: Path, files: list[str], which: str, least: int) -> None:
    if not (SOURCES / ".ready").exists():
        pytest.skip(f"VLLM'S OWN TESTS DID NOT RUN: {SOURCES} is missing; make test-vllm-full fetches it")
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hub"),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((str(SOURCES), str(HERE / "upstream"))),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pointed_at_kvtier"]
    command += ["--confcutdir", "tests/v1", "--timeout", "300", "-k", which, *files]
    run = subprocess.run(command, cwd=SOURCES, env=environment, capture_output=True, text=True, check=False)
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert passed is not None
    assert int(passed[1]) >= least, run.stdout[-2000:]
