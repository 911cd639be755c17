"""What was purged stays away, however its process ended: kill -9, and rebuilds without a catalog."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvtier
from kvtier import Config, Disk, KVLayout, Tier, stores

PATIENCE = 60

DRIVER = """
import sys, time
import numpy as np
import kvtier
from kvtier import Config, Disk, KVLayout

config = Config(groups=[KVLayout(2, 2, 8, "float16", 4)], block_tokens=8, host="1MiB", chunk="1MiB",
                model="m@1", disk=Disk(sys.argv[1], "8MiB"), disk_commit_seconds=0.01)
engine = kvtier.open(config)
while any(c.usable < 64 for disk in engine.stats().disks for c in disk.classes):
    time.sleep(0.002)
pages = engine.attach([np.ones((16, 2, 4, 2, 8), np.float16) for _ in range(2)])
for name in ("a", "b"):
    keys = kvtier.block_keys(np.arange(64), config, namespace=name)
    ticket = engine.store(keys, pages, range(16), namespace=name)
    ticket.durable.wait(30)
    assert ticket.durable_blocks == 8
print("ready", flush=True)
sys.stdin.read()
"""


def config_of(path: Path) -> Config:
    return Config(
        groups=[KVLayout(2, 2, 8, "float16", 4)],
        block_tokens=8,
        host="1MiB",
        chunk="1MiB",
        model="m@1",
        disk=Disk(str(path), "8MiB"),
    )


@pytest.fixture
def child(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process with an engine that holds tenants a and b on a disk; killed in the end."""
    argv = [sys.executable, "-c", DRIVER, str(tmp_path / "disk")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE) == -signal.SIGKILL


@pytest.mark.parametrize("catalog", ["catalog", "headers"])
@pytest.mark.parametrize("purged_by", ["its engine", "us"])
def test_a_purged_tenant_stays_away_after_kill_9(
    tmp_path: Path, child: "subprocess.Popen[str]", purged_by: str, catalog: str
) -> None:
    path = tmp_path / "disk"
    if purged_by == "us":
        kill(child)
    (purged,) = stores.purge(str(path), "a")
    assert purged["problem"] == ""
    assert (purged["dropped"], purged["in_use"]) == (8, purged_by == "its engine")
    if purged_by == "its engine":
        kill(child)
    (store,) = (path / "stores").iterdir()
    assert (store / "control").exists()  # of a dead process; the next opening replaces it
    if catalog == "headers":
        (store / "catalog.mdb").unlink()
    config = config_of(path)
    for _ in range(2):
        with kvtier.open(config) as engine:
            for name, tier in (("a", Tier.NONE), ("b", Tier.DISK)):
                keys = kvtier.block_keys(np.arange(64), config, namespace=name)
                assert engine.lookup(keys).tiers().tolist() == [tier] * 8
            assert stores.purge(str(path), "nobody")[0]["problem"] == ""  # the socket is the new one's
    found = stores.verify(str(path))
    assert (found["good"], found["corrupt"], found["foreign"]) == (8, 0, 0)
