"""A disk tier where little memory may be locked, and by a process without the right to lock more."""

import ctypes
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from disk_driver import LOADED, PATIENCE, ROOMY, Tensors, chain_keys, config, payloads

import kvtier

pytestmark = pytest.mark.timeout(120)

LIMIT_BYTES = 64 << 10  # less than any host tier
CAP_IPC_LOCK = 14
PR_CAPBSET_DROP = 24
SEED = 3


def without_locked_memory() -> None:
    """In a child before it executes a program: that one has neither the capability nor the limit."""
    dropped = ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) == 0
    if os.geteuid() == 0 and not dropped:
        raise PermissionError("CAP_IPC_LOCK cannot be dropped")
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (LIMIT_BYTES, LIMIT_BYTES))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=without_locked_memory,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
    )


def test_an_engine_stores_reopens_and_loads_without_locked_memory(tmp_path: Path) -> None:
    for what in ("store", "load"):
        found = run(__file__, str(tmp_path / "disk"), what)
        assert found.returncode == 0, found.stderr


def test_doctor_says_that_buffers_are_ordinary(tmp_path: Path) -> None:
    found = run("-m", "kvtier.cli", "doctor", "--disk", str(tmp_path))
    (queue,) = re.findall("^.*disk queue.*$", found.stdout, re.MULTILINE)
    if "not io_uring" in queue:
        pytest.skip(f"threads have no registered buffers: {queue}")
    assert "ordinary buffers" in queue
    assert "memlock" in queue
    assert "64 KiB; registered buffers" in found.stdout


def main() -> None:
    """A life of an engine, that stores or that loads what another has stored."""
    status = Path("/proc/self/status").read_text()
    (capabilities,) = re.findall(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)
    assert not int(capabilities, 16) >> CAP_IPC_LOCK & 1, "the child may lock memory"
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == LIMIT_BYTES
    keys = np.concatenate([chain_keys(SEED, 6), chain_keys(SEED, 14)])
    with kvtier.open(config(sys.argv[1], ROOMY)) as engine:
        tensors = Tensors(engine, 0)
        if sys.argv[2] == "store":
            tensors.fill(0, payloads(keys, 0))
            ticket = engine.store(keys, tensors.pages, np.arange(len(keys)))
            ticket.wait(PATIENCE)
            engine.flush(PATIENCE)
            assert ticket.durable_blocks == len(keys)
            return
        ticket = engine.load(keys, tensors.pages, np.arange(len(keys)))
        ticket.wait(PATIENCE)
        assert (ticket.result().outcomes == LOADED).all()
        assert (tensors.read(len(keys)) == payloads(keys, 0)).all()
        assert engine.stats().promote_good == len(keys), "from the drive"


if __name__ == "__main__":
    main()
