"""Ordering against a framework that is busy: streams, graphs, the default stream, a lost context."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import kvtier
from kvtier import Config, KVLayout

LAYERS, PAGES, BLOCKS = 4, 128, 48
LONG = 50_000_000  # clock cycles: some 30 ms
PATHS = ("merged", "batched", "kernel", "staged", "bulk")


class World:
    def __init__(self, path: str) -> None:
        layout = KVLayout(LAYERS, 2, 64, "int16", 16)
        self.config = Config(groups=[layout], host="64MiB", model="m@1", gpu_copy_path=path)
        self.tensors = [
            torch.zeros((PAGES, 2, 16, 2, 64), dtype=torch.int16, device="cuda") for _ in range(LAYERS)
        ]
        self.keys = kvtier.block_keys(np.arange(16 * BLOCKS), self.config)
        self.engine = kvtier.open(self.config)
        self.pages = self.engine.attach(self.tensors)
        torch.cuda.synchronize()

    def fill(self, value: int, pages: slice) -> None:
        for tensor in self.tensors:
            tensor[pages].fill_(value)

    def all_are(self, value: int, pages: slice) -> bool:
        return all(bool((tensor[pages] == value).all()) for tensor in self.tensors)


@pytest.fixture(params=PATHS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.pages.detach(30)
    made.engine.close(30)


SOURCE, TARGET = slice(0, BLOCKS), slice(64, 64 + BLOCKS)
SOURCE_IDS, TARGET_IDS = np.arange(BLOCKS), np.arange(64, 64 + BLOCKS)


@pytest.mark.parametrize("default", [False, True])
def test_a_store_sees_the_kernels_before_it_and_a_load_is_seen_by_those_behind(
    world: World, default: bool
) -> None:
    stream: Any = torch.cuda.default_stream() if default else torch.cuda.Stream()
    for value in range(1, 6):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
            world.fill(value, SOURCE)
            store = world.engine.store(world.keys, world.pages, SOURCE_IDS, stream=stream)
            store.wait_stream(stream)
            world.fill(-1, SOURCE)  # the pages may be reused behind wait_stream()
        assert store.result().stored == BLOCKS
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
            world.fill(-2, TARGET)  # what the load overwrites, though submitted before it has run
            load = world.engine.load(world.keys, world.pages, TARGET_IDS, stream=stream)
            load.wait_stream(stream)
            copies = [tensor[TARGET].clone() for tensor in world.tensors]
        stream.synchronize()
        assert all(bool((copy == value).all()) for copy in copies)
        assert load.result().valid_blocks == BLOCKS
        world.engine.drop(world.keys)


def test_both_directions_run_beside_compute(world: World) -> None:
    stream = torch.cuda.Stream()
    world.fill(7, SOURCE)
    torch.cuda.synchronize()
    assert world.engine.store(world.keys, world.pages, SOURCE_IDS).result().stored == BLOCKS
    other = kvtier.block_keys(np.arange(5000, 5000 + 16 * 16), world.config)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20 * LONG)
        busy = torch.cuda.Event()
        busy.record()
    # Streams that have nothing to do with `stream` do not wait for it.
    side = torch.cuda.Stream()
    load = world.engine.load(world.keys, world.pages, TARGET_IDS, stream=side)
    store = world.engine.store(other, world.pages, np.arange(48, 64), stream=side)
    assert load.result().valid_blocks == BLOCKS
    assert store.result().stored == 16
    assert not busy.query()
    stream.synchronize()
    assert world.all_are(7, TARGET)


def test_a_stream_that_captures_is_refused_without_harm_and_other_streams_go_on(world: World) -> None:
    world.fill(3, SOURCE)
    torch.cuda.synchronize()
    assert world.engine.store(world.keys, world.pages, SOURCE_IDS).result().stored == BLOCKS
    other = kvtier.block_keys(np.arange(9000, 9000 + 16), world.config)
    scratch = torch.zeros(64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    found: dict[str, Any] = {}

    def beside() -> None:
        side = torch.cuda.Stream()
        found["load"] = world.engine.load(world.keys, world.pages, TARGET_IDS, stream=side).result()

    thread = threading.Thread(target=beside)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        scratch.add_(1)
        captured = world.engine.store(other, world.pages, [0], stream=torch.cuda.current_stream())
        thread.start()
        thread.join(60)
    result = captured.result()
    assert result.stored == 0  # failed, and said so; nothing was captured
    assert found["load"].valid_blocks == BLOCKS
    graph.replay()
    torch.cuda.synchronize()
    assert float(scratch[0]) == 1.0
    assert world.all_are(3, TARGET)
    assert world.engine.store(other, world.pages, [0]).result().stored == 1


def test_a_lost_context_ends_requests_with_errors_and_hangs_nothing() -> None:
    code = """
import numpy as np, torch, kvtier
from kvtier import Config, KVLayout
layout = KVLayout(2, 2, 64, "int16", 16)
config = Config(groups=[layout], host="16MiB", model="m@1")
tensors = [torch.zeros((32, 2, 16, 2, 64), dtype=torch.int16, device="cuda") for _ in range(2)]
keys = kvtier.block_keys(np.arange(16 * 8), config)
engine = kvtier.open(config)
pages = engine.attach(tensors)
assert engine.store(keys, pages, np.arange(8)).result().stored == 8
bad = torch.zeros(4, device="cuda")
index = torch.full((4,), 1 << 40, dtype=torch.int64, device="cuda")
import ctypes
try:
    torch.cuda._sleep(1000)
    torch.index_select(bad, 0, index)
    torch.cuda.synchronize()
except Exception as error:
    print("lost:", type(error).__name__)
result = engine.load(keys, pages, np.arange(8, 16)).result()
print("valid:", result.valid_blocks)
try:
    engine.close(20)
except kvtier.KVTierError as error:
    print("close:", type(error).__name__)
print("over", flush=True)
import os
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert "lost:" in done.stdout, done.stdout + done.stderr
    assert "valid: 0" in done.stdout, done.stdout + done.stderr
    assert done.stdout.endswith("over\n"), done.stdout + done.stderr
