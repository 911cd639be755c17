"""Every eviction policy under random use of a real engine: pins hold, bytes are right, books balance.

The order of evictions is held to simple models in tests/cpp/index and, through whole traces, to the
simulation in tests/py/unit/test_replay.py; test_engine_model.py predicts it exactly for LRU.
"""

import random
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier.config import EVICTIONS

NUM_KEYS = 60
HOST_BLOCKS = 24
LAYOUT = kvtier.KVLayout.mla(num_layers=1, latent_dim=64, dtype="uint8", page_tokens=1)


class Run:
    """An engine whose blocks hold their key's number."""

    def __init__(self, policy: str, seed: int) -> None:
        self.rng = random.Random(seed)
        stride = 8192  # header and payload, in whole pages
        config = kvtier.Config(
            groups=[LAYOUT], host=HOST_BLOCKS * stride, model="m@1", block_tokens=1, eviction=policy
        )
        self.engine = kvtier.open(config)
        self.engine.wait_until_whole()
        self.memory = np.zeros((NUM_KEYS, 1, 64), np.uint8)
        self.pages = self.engine.attach([self.memory])
        # Prompts: block n hangs on block n - 1 of the same ten.
        self.keys = np.concatenate(
            [kvtier.block_keys(np.arange(10) + 100 * p, config) for p in range(NUM_KEYS // 10)]
        )
        self.leases: list[tuple[Any, int, int]] = []

    def prompt(self) -> tuple[int, int]:
        begin = self.rng.randrange(NUM_KEYS // 10) * 10
        return begin, begin + self.rng.randint(1, 10)

    def step(self) -> None:
        begin, end = self.prompt()
        keys, ids = self.keys[begin:end], np.arange(begin, end)
        what = self.rng.randrange(10)
        if what < 5:
            self.memory[begin:end] = np.arange(begin, end, dtype=np.uint8)[:, None, None]
            self.engine.store(keys, self.pages, ids).result()
        elif what < 7:
            self.memory[begin:end] = 255
            valid = self.engine.load(keys, self.pages, ids).result().valid_blocks
            loaded = self.memory[begin : begin + valid, 0]
            assert (loaded == np.arange(begin, begin + valid, dtype=np.uint8)[:, None]).all()
        elif what == 7 and len(self.leases) < 3:
            match = self.engine.lookup(keys)
            if match.ready_blocks:
                self.leases.append((match.pin(), begin, begin + match.ready_blocks))
        elif what == 8 and self.leases:
            self.leases.pop(self.rng.randrange(len(self.leases)))[0].release()
        elif self.rng.random() < 0.3:
            held = {key for _, first, last in self.leases for key in range(first, last)}
            if not held & set(range(begin, end)):
                self.engine.drop(keys[-1:])
        else:
            self.engine.touch(keys)

    def check(self, policy: str) -> None:
        for _, begin, end in self.leases:
            assert self.engine.lookup(self.keys[begin:end]).ready_blocks == end - begin, "a pinned block went"
        stats = self.engine.stats()
        host = stats.host[0]
        assert host.free + host.filling + host.ready + host.leaving == host.capacity == HOST_BLOCKS
        assert stats.health == "ok"
        if policy == EVICTIONS[0]:
            assert stats.orphans == 0


@pytest.mark.parametrize("policy", EVICTIONS)
def test_pins_bytes_and_books_under_random_use(policy: str) -> None:
    evicted = 0
    for seed in range(4):
        run = Run(policy, seed)
        with run.engine:
            for _ in range(300):
                run.step()
                run.check(policy)
            evicted += run.engine.stats().evictions
    assert evicted > 500
