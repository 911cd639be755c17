"""One process of test_ranks.py: a keeper or a worker that does what it reads, a JSON line at a time.

    python rank_driver.py keeper DIRECTORY
    python rank_driver.py worker DIRECTORY RANK

Each line is {"do": name, ...}; each answer is one line too. A worker told to "stop" does so between accepting
an instruction and copying, which is where the test then kills it.
"""

import base64
import json
import os
import pickle
import signal
import socket
import sys
import threading
from typing import Any

import numpy as np

import kvtier
from kvtier.ranks import Instruction, Keeper, Worker

PAGES = 64
SLOTS = 24
LAYOUT = kvtier.KVLayout(2, 2, 16, "float16", 4, name="full")
LATENT = kvtier.KVLayout.mla(2, 32, "float16", 4, name="latent")
CONFIG = kvtier.Config(
    groups=[LAYOUT, LATENT],
    model="test@1",
    host=SLOTS * (2 * LAYOUT.block_bytes(4) + LATENT.block_bytes(4) + 8192 + 4096),
    block_tokens=4,
    world_size=2,
    copy_threads=1,
)


def tokens_of(prompt: int, blocks: int) -> np.ndarray:
    return np.random.default_rng(prompt).integers(0, 30000, blocks * 4).astype(np.int32)


def keys_of(prompt: int, blocks: int) -> np.ndarray:
    return kvtier.block_keys(tokens_of(prompt, blocks), CONFIG)


def payload(prompt: int, rank: int, group: int, blocks: int) -> np.ndarray:
    """The bytes that a rank computes for a prompt: its own in group 0, everybody's in the latent group."""
    shape = (blocks, 2, 4, 2, 16) if group == 0 else (blocks, 4, 32)
    seed = [prompt, rank if group == 0 else 0, group]
    layers = [np.random.default_rng([*seed, layer]).integers(0, 2**16, shape) for layer in range(2)]
    return np.stack(layers).astype(np.uint16)


def encode(instruction: Instruction) -> str:
    return base64.b64encode(instruction.to_bytes()).decode()


class KeeperDriver:
    def __init__(self, directory: str) -> None:
        self.engine = kvtier.open(CONFIG)
        self.engine.wait_until_whole()
        self.keeper = Keeper(self.engine, directory)
        self.tickets: dict[int, Any] = {}

    def workers(self, **_: Any) -> Any:
        return self.keeper.workers()

    def complete(self, **_: Any) -> Any:
        return self.keeper.complete

    def wait_for_workers(self, **_: Any) -> Any:
        self.keeper.wait_for_workers(30)

    def order(self, direction: str, prompt: int, blocks: int, group: int = 0, **_: Any) -> Any:
        keys = keys_of(prompt, blocks)
        make = self.keeper.store if direction == "store" else self.keeper.load
        instruction, ticket = make(keys, group)
        number = len(self.tickets)
        self.tickets[number] = (instruction, ticket)
        assert pickle.loads(pickle.dumps(instruction)).to_bytes() == instruction.to_bytes()
        return {"number": number, "instruction": encode(instruction), "grant": instruction.grant}

    def cancel(self, number: int, **_: Any) -> Any:
        self.keeper.cancel(self.tickets[number][0])

    def done(self, number: int, **_: Any) -> Any:
        return self.tickets[number][1].done()

    def result(self, number: int, **_: Any) -> Any:
        ticket = self.tickets[number][1]
        ticket.wait(30)
        result = ticket.result()
        return {"outcomes": result.outcomes.tolist(), "error": str(result.error) if result.error else None}

    def ready(self, prompt: int, blocks: int, group: int = 0, **_: Any) -> Any:
        return int(
            (self.engine.lookup(keys_of(prompt, blocks)).states(group) == kvtier.BlockState.READY).sum()
        )

    def stats(self, **_: Any) -> Any:
        stats = self.engine.stats()
        host = [(c.free, c.filling, c.ready, c.leaving, c.capacity) for c in stats.host]
        return {"host": host, "pins": stats.pins, "running": stats.transfers_running}

    def drop(self, prompt: int, blocks: int, **_: Any) -> Any:
        return self.engine.drop(keys_of(prompt, blocks))

    def close(self, timeout: float = 30, **_: Any) -> Any:
        self.keeper.close(timeout)
        self.engine.close(timeout)


class WorkerDriver:
    def __init__(self, directory: str, rank: str) -> None:
        self.worker = Worker(directory, int(rank), CONFIG, join_timeout=20)
        self.rank = int(rank)
        full = [np.zeros((PAGES, 2, 4, 2, 16), np.uint16) for _ in range(2)]
        latent = [np.zeros((PAGES, 4, 32), np.uint16) for _ in range(2)]
        self.tensors = [full, latent]
        self.pages = [self.worker.attach(full, 0), self.worker.attach(latent, 1)]
        self.tickets: list[Any] = []

    def join(self, timeout: float = 20, **_: Any) -> Any:
        self.worker.join(timeout)

    def joined(self, **_: Any) -> Any:
        return self.worker.joined

    def fill(self, prompt: int, blocks: int, at: int, group: int = 0, **_: Any) -> Any:
        for layer, data in enumerate(payload(prompt, self.rank, group, blocks)):
            self.tensors[group][layer][at : at + blocks] = data

    def check(self, prompt: int, blocks: int, at: int, group: int = 0, **_: Any) -> Any:
        found = np.stack([tensor[at : at + blocks] for tensor in self.tensors[group]])
        return bool(np.array_equal(found, payload(prompt, self.rank, group, blocks)))

    def execute(self, instruction: str, at: int, group: int = 0, stop: bool = False, **_: Any) -> Any:
        order = Instruction.from_bytes(base64.b64decode(instruction))
        if stop:
            native = self.worker._native

            class Gate:
                """Accepts, and stops the process before anything is copied."""

                def run(self, *_args: Any, **_kwargs: Any) -> None:
                    say({"stopped": True})
                    os.kill(os.getpid(), signal.SIGSTOP)

                def __getattr__(self, name: str) -> Any:
                    return getattr(native, name)

            self.worker._native = Gate()  # type: ignore[assignment]
        ids = np.arange(at, at + order.num_blocks)
        ticket = self.worker.execute(order, self.pages[group], ids)
        self.tickets.append(ticket)
        ticket.wait(30)
        return ticket.result().outcomes.tolist()

    def hang_up(self, **_: Any) -> Any:
        """Closes the socket under a worker that lives."""
        session = self.worker._session
        assert session is not None
        session._connection.shutdown(socket.SHUT_RDWR)

    def fork(self, **_: Any) -> Any:
        """Leaves a child behind that keeps every socket open."""
        child = os.fork()
        if child == 0:
            signal.pause()
        return child

    def close(self, **_: Any) -> Any:
        self.worker.close(30)


_says = threading.Lock()


def say(answer: Any) -> None:
    with _says:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def main() -> None:
    kind, *arguments = sys.argv[1:]
    driver = KeeperDriver(*arguments) if kind == "keeper" else WorkerDriver(*arguments)
    say({"pid": os.getpid()})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(driver, request.pop("do"))(**request)}
        except kvtier.KVTierError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        say(answer)


if __name__ == "__main__":
    main()
