"""One life of a process of the demo's disk row; `python -m kvtier.cli.demo_life save|restore ARGUMENTS`.

What it says, and how it ends: `kvtier.cli.lives`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.cli.lives import Lines, end, say

_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Life:
    """What such a process is told; the names are those of the demo's options."""

    folder: str
    model: str | None
    size: str
    block_tokens: int
    chunk_tokens: int
    copy_threads: int
    runs: int
    host_bytes: int
    disk_bytes: int


def _config(life: Life, model: Any) -> Any:
    import kvtier
    from kvtier.adapters.transformers import layout_of

    return kvtier.Config(
        groups=[layout_of(model.module, page_tokens=life.block_tokens, dtype="float32")],
        block_tokens=life.block_tokens,
        model=model.identity,
        host=life.host_bytes,
        copy_threads=life.copy_threads,
        disk=kvtier.Disk(str(Path(life.folder) / "disk"), life.disk_bytes),
        disk_admission="all",
        disk_write_budget="unlimited",
    )


def _run(life: Life, model: Any, cache: Any, tokens: Any) -> Any:
    from kvtier.cli.demo_run import Run

    lines: Any = Lines()
    return Run(model.module, cache, tokens, life.chunk_tokens, life.copy_threads, lines)


def wait_for_room(engine: Any) -> None:
    """Until the drive takes blocks; its files then grow as they come."""
    from kvtier.errors import StorageError

    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        disk = engine.stats().disks[0]
        if disk.health != "ok":
            raise StorageError(0, f"{disk.path}: {disk.health}")
        if disk.classes[0].usable:
            return
        if time.monotonic() > deadline:
            raise StorageError(0, f"{disk.path}: no room within {_PATIENCE_SECONDS:.0f} s")
        time.sleep(0.01)


def save(life: Life, model: Any, tokens: Any) -> None:
    """Computes everything, saves the prefix and waits until it is durable."""
    import kvtier
    from kvtier.adapters.transformers import KVTierCache

    config = _config(life, model)
    with kvtier.open(config) as engine, KVTierCache(engine, model.module, len(tokens)) as cache:
        run = _run(life, model, cache, tokens)
        run.warm_up()
        run.cold()
        wait_for_room(engine)
        run.save()
        say(phase="waiting until the prefix is durable")
        engine.flush(_PATIENCE_SECONDS)
        durable = engine.stats().disk_durable
        np.save(Path(life.folder) / "save.npy", run.expected.numpy())
        end({"durable": durable >= run.prefix // life.block_tokens})


def restore(life: Life, model: Any, tokens: Any) -> None:
    """Opens the disk tier, restores the prefix from it and computes the suffix; several times."""
    import torch

    import kvtier
    from kvtier.adapters.transformers import KVTierCache

    config = _config(life, model)
    opens: list[float] = []
    ttft: list[float] = []
    seconds: list[float] = []
    checks: dict[str, bool] = {}
    expected = torch.from_numpy(np.load(Path(life.folder) / "save.npy"))
    logits = expected
    for i in range(life.runs):
        begin = time.perf_counter()
        # The first opening is the one after SIGKILL. Each begins with an empty host tier.
        with kvtier.open(config) as engine:
            opens.append(time.perf_counter() - begin)
            with KVTierCache(engine, model.module, len(tokens)) as cache:
                run = _run(life, model, cache, tokens)
                if i == 0:
                    run.warm_up()
                run.expected = expected
                logits = run.restored("disk")
                ttft += run.times.disk
                seconds += run.times.restore
                if i + 1 == life.runs:
                    run.control(life.block_tokens)
                for name, passed in run.checks.items():
                    checks[name] = checks.get(name, True) and passed
                kv_bytes = config.groups[0].block_bytes(run.prefix)
    np.save(Path(life.folder) / "restore.npy", logits.numpy())
    found = {
        "open": opens,
        "ttft": ttft,
        "restore": seconds,
        "kv_bytes": kv_bytes,
        "restored": checks["restored_whole_prefix"],
        "identical": checks["identical_logits"],
        "control_differs": checks["control_differs"],
    }
    end(found)


def main(what: str, arguments: str) -> None:
    """Lives."""
    life = Life(**json.loads(arguments))
    say(phase="a process starts")
    from kvtier.cli.demo_model import load_model

    model = load_model(life.model, life.size)
    tokens = np.load(Path(life.folder) / "tokens.npy")
    {"save": save, "restore": restore}[what](life, model, tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
