"""The driver processes of disk_campaign.py: a server that imports kvtier once and forks one driver per cycle.

    python disk_driver.py SEED

The server reads one plan (JSON) a line. It forks; the child opens an engine on plan["directory"], checks what
the plan names, and then stores, drops and reads until it is killed (or, with plan["close"], closes in order).
Every line on standard output is whole: "<word> <number> ...", written at once.

    pid P            the child of this plan              end S            it has ended, with this wait status
    open SOURCE      its engine is open                  checked H E W R S  blocks: hits, expected, wrong,
                                                         revived, and served without a promise
    store C          chain C is about to be stored       durable C        the engine has said so
    drop C           chain C is about to be dropped      dropped C        the engine has said so
    wrong C          wrong bytes of chain C              missing C        it was to be there, and is not
"""

import faulthandler
import hashlib
import json
import os
import signal
import sys
import time
from typing import Any

import numpy as np

import kvtier

BLOCK_TOKENS = 16
GROUPS = [
    kvtier.KVLayout(1, 1, 128, "uint8", BLOCK_TOKENS, name="small"),  # 4 KiB
    kvtier.KVLayout(2, 1, 192, "uint8", BLOCK_TOKENS, name="large"),  # 12 KiB
]
LONGEST_CHAIN = 4
ROOMY = 24 << 20  # a disk on which nothing is evicted
TIGHT = 5 << 20  # 37 blocks of each group
HOST = "1MiB"
AT_ONCE = 24  # blocks of one load: fewer than host slots of a group
PAGES = 32
LOADED = kvtier.BlockOutcome.LOADED
SCAN_PATIENCE = 5.0  # seconds in which the scan after an unclean end must have found what is there
PATIENCE = 20.0


def config(directory: str, capacity: int, **others: Any) -> kvtier.Config:
    """Of all drivers. Nothing is refused by admission or budget, and commits are frequent."""
    given: dict[str, Any] = {
        "groups": GROUPS,
        "model": "crash@1",
        "host": HOST,
        "block_tokens": BLOCK_TOKENS,
        "copy_threads": 1,
        "disk": kvtier.Disk(directory, capacity),
        "disk_admission": "all",
        "disk_write_budget": "unlimited",
        "disk_commit_seconds": 0.01,
    }
    return kvtier.Config(**{**given, **others})


def group_of(chain: int) -> int:
    return chain % 2


def chain_keys(seed: int, chain: int) -> np.ndarray:
    """1 to LONGEST_CHAIN keys, each the next one's parent."""
    blocks = 1 + chain // 2 % LONGEST_CHAIN
    texts = (f"{seed}/{chain}/{i}".encode() for i in range(blocks))
    return np.frombuffer(b"".join(hashlib.sha256(t).digest() for t in texts), np.uint8).reshape(-1, 32)


def payloads(keys: np.ndarray, group: int, version: int = 0) -> np.ndarray:
    """The bytes that belong to keys [n, 32]: [n, bytes of a block]."""
    words = GROUPS[group].block_bytes(BLOCK_TOKENS) // 8
    seeds = np.ascontiguousarray(keys).view(np.uint64).reshape(len(keys), 4)
    steps = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = seeds[:, :1] ^ (seeds[:, 1:2] + np.uint64(version)) * steps
    return np.ascontiguousarray(mixed ^ (mixed >> np.uint64(29))).view(np.uint8)


class Tensors:
    """The pages of one group."""

    def __init__(self, engine: kvtier.Engine, group: int) -> None:
        layout = GROUPS[group]
        self.layers = [
            np.zeros((PAGES, 2, BLOCK_TOKENS, 1, layout.head_dim), np.uint8) for _ in range(layout.num_layers)
        ]
        self.pages = engine.attach(self.layers, group)

    def fill(self, at: int, blocks: np.ndarray) -> None:
        parts = blocks.reshape(len(blocks), len(self.layers), *self.layers[0].shape[1:])
        for i, layer in enumerate(self.layers):
            layer[at : at + len(blocks)] = parts[:, i]

    def read(self, count: int) -> np.ndarray:
        return np.stack([layer[:count] for layer in self.layers], axis=1).reshape(count, -1)


class Driver:
    """One cycle's engine."""

    def __init__(self, seed: int, plan: dict[str, Any]) -> None:
        self.seed = seed
        self.plan = plan
        self.random = np.random.default_rng([seed, plan["cycle"]])
        self.engine = kvtier.open(config(plan["directory"], plan["capacity"]))
        self.tensors = [Tensors(self.engine, group) for group in range(len(GROUPS))]
        self.live: list[int] = list(plan["live"])
        self.next_chain: int = plan["next_chain"]

    def check(self, chains: list[int]) -> dict[int, tuple[int, int]]:
        """Loads chains. Returns for each its hits and its wrong blocks."""
        found: dict[int, tuple[int, int]] = {}
        for group in range(len(GROUPS)):
            mine = [chain for chain in chains if group_of(chain) == group]
            while mine:
                batch: list[int] = []
                keys: list[np.ndarray] = []
                while mine and sum(map(len, keys)) + LONGEST_CHAIN <= AT_ONCE:
                    batch.append(mine.pop())
                    keys.append(chain_keys(self.seed, batch[-1]))
                here = np.concatenate(keys)
                tensors = self.tensors[group]
                for layer in tensors.layers:
                    layer[:] = 0xEE
                ticket = self.engine.load(here, tensors.pages, np.arange(len(here)))
                ticket.wait(PATIENCE)
                loaded = ticket.result().outcomes == LOADED
                right = (tensors.read(len(here)) == payloads(here, group)).all(axis=1)
                at = 0
                for chain, one in zip(batch, keys, strict=True):
                    hits = loaded[at : at + len(one)]
                    found[chain] = (int(hits.sum()), int((hits & ~right[at : at + len(one)]).sum()))
                    at += len(one)
        return found

    def check_all(self) -> None:
        """What the plan expects, allows and forbids."""
        expected, gone, maybe = self.plan["check"], self.plan["gone"], self.plan["maybe"]
        wrong, revived, served = 0, 0, 0
        missing = list(expected)
        best: dict[int, int] = {}
        patience = time.monotonic() + SCAN_PATIENCE
        while missing:
            for chain, (there, bad) in self.check(missing).items():
                best[chain] = there
                wrong += bad
                if bad:
                    say("wrong", chain)
            missing = [chain for chain in missing if best[chain] < len(chain_keys(self.seed, chain))]
            if not missing or time.monotonic() > patience:
                break
            time.sleep(0.002)  # the scan of an unclean store goes on in the background
        for chain in missing:
            say("missing", chain)
        hits = sum(best.values())
        hits_expected = sum(len(chain_keys(self.seed, chain)) for chain in expected)
        for chains, may_return in ((maybe, True), (gone, False)):
            for chain, (there, bad) in self.check(chains).items():
                wrong += bad
                revived += 0 if may_return else there
                served += there if may_return else 0
                if bad:
                    say("wrong", chain)
                if there and not may_return:
                    say("revived", chain)
        for chain in expected:  # what is promised is what was used last
            self.engine.touch(chain_keys(self.seed, chain))
        say("checked", hits, hits_expected, wrong, revived, served)

    def store(self, wait: bool) -> None:
        chain = self.next_chain
        self.next_chain += 1
        keys, group = chain_keys(self.seed, chain), group_of(chain)
        at = int(self.random.integers(0, PAGES - LONGEST_CHAIN + 1))
        self.tensors[group].fill(at, payloads(keys, group))
        say("store", chain)
        ticket = self.engine.store(keys, self.tensors[group].pages, np.arange(at, at + len(keys)))
        ticket.released.wait(PATIENCE)
        if wait:
            ticket.wait(PATIENCE)
            self.engine.flush(PATIENCE)
            if ticket.durable_blocks == len(keys):
                say("durable", chain)
                self.live.append(chain)

    def drop(self) -> None:
        chain = self.live.pop(int(self.random.integers(0, len(self.live))))
        say("drop", chain)
        try:
            self.engine.drop(chain_keys(self.seed, chain))
        except kvtier.StorageError:
            return  # gone from memory; the drive did not confirm
        say("dropped", chain)

    def read(self) -> None:
        chains = self.random.choice(self.live, min(4, len(self.live)), replace=False).tolist()
        if self.random.random() < 0.3:
            self.engine.prefetch(chain_keys(self.seed, chains[0]), 1.0)
        for chain, (_, bad) in self.check(chains).items():
            if bad:
                say("wrong", chain)

    def work(self) -> None:
        """Until somebody kills this process, or the plan's operations are done."""
        left = self.plan["operations"]
        while left > 0:
            left -= 1
            what = self.random.random()
            if what < 0.25 and self.live and len(self.live) > self.plan["keep"] * self.random.random():
                self.drop()
            elif what < 0.4 and self.live:
                self.read()
            else:
                self.store(wait=what < 0.85)
        self.engine.close(PATIENCE)


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def drive(seed: int, plan: dict[str, Any]) -> None:
    driver = Driver(seed, plan)
    say("open", driver.engine.stats().disks[0].opened_from.replace(" ", "_"))
    driver.check_all()
    driver.work()


def main() -> None:
    seed = int(sys.argv[1])
    faulthandler.register(signal.SIGUSR1)  # before it is killed for hanging
    for line in sys.stdin:
        plan = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                drive(seed, plan)
                status = 0
            except BaseException:  # noqa: BLE001 - told to the parent by the status
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        say("pid", child)
        _, status = os.waitpid(child, 0)
        say("end", status)


if __name__ == "__main__":
    main()
