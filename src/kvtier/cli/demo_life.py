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
    """Opens the disk tier that a killed process has left, restores the prefix and computes the suffix."""
    import torch

    import kvtier
    from kvtier.adapters.transformers import KVTierCache

    config = _config(life, model)
    expected = torch.from_numpy(np.load(Path(life.folder) / "save.npy"))
    begin = time.perf_counter()
    with kvtier.open(config) as engine:
        opened = time.perf_counter() - begin
        with KVTierCache(engine, model.module, len(tokens)) as cache:
            run = _run(life, model, cache, tokens)
            run.warm_up()
            run.expected = expected
            logits = run.restored("disk")
            run.control(life.block_tokens)
            np.save(Path(life.folder) / "restore.npy", logits.numpy())
            found = {
                "open": opened,
                "ttft": run.times.disk[0],
                "restore": run.times.restore[0],
                "kv_bytes": config.groups[0].block_bytes(run.prefix),
                "restored": run.checks["restored_whole_prefix"],
                "identical": run.checks["identical_logits"],
                "control_differs": run.checks["control_differs"],
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
