"""Mooncake store over TCP on loopback: a master, a process that holds the memory, and this client."""

# ruff: noqa: ARG002 - every side has the harness' methods

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from harness import Store, keys_of, serve

TINY = 64


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _client(name, master, segment):
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    code = store.setup(name, "P2PHANDSHAKE", segment, 64 << 20, "tcp", "", master)
    if code != 0:
        raise RuntimeError(f"Mooncake's setup() returned {code}")
    return store


def hold(master, segment):
    """The process that holds the memory; ends with its standard input."""
    store = _client("127.0.0.1", master, segment)
    print("ready", flush=True)
    sys.stdin.read()
    store.close()


class Mooncake(Store):
    packages = ("mooncake-transfer-engine-non-cuda",)

    def open(self, home, size, blocks, capacity, options):
        os.environ["MC_TCP_BIND_ADDRESS"] = "127.0.0.1"
        port, metrics = _port(), _port()
        binary = Path(sys.executable).with_name("mooncake_master")
        self.master = f"127.0.0.1:{port}"
        arguments = [f"--rpc_port={port}", "--rpc_address=127.0.0.1", f"--metrics_port={metrics}"]
        self.children = [subprocess.Popen([binary, *arguments], stdin=subprocess.DEVNULL, stdout=2)]
        time.sleep(1)
        segment = (2 * blocks * size + (512 << 20)) // (64 << 20) * (64 << 20)
        self.holder = holder = subprocess.Popen(
            [sys.executable, __file__, "hold", self.master, str(segment)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.children.append(holder)
        while (line := holder.stdout.readline()) and line.strip() != b"ready":
            continue
        if not line:
            raise RuntimeError("the process that holds Mooncake's memory ended")
        self.store = _client("127.0.0.1", self.master, 0)
        self.store.register_buffer(self.pages.both.ctypes.data, self.pages.both.nbytes)
        self.size = size
        return {"config": "batch_put_from and batch_get_into, memory in another process, TCP on loopback"}

    def _places(self, memory):
        base = memory.ctypes.data
        return [base + i * self.size for i in range(len(memory))], [self.size] * len(memory)

    def put(self, keys):
        codes = self.store.batch_put_from([key.hex() for key in keys], *self._places(self.pages.source))
        if any(code != 0 for code in codes):
            raise RuntimeError(f"batch_put_from returned {sorted(set(codes))}")

    def get(self, keys):
        codes = self.store.batch_get_into([key.hex() for key in keys], *self._places(self.pages.target))
        return [code == self.size for code in codes]

    def found(self, keys):
        return sum(code == 1 for code in self.store.batch_is_exist([key.hex() for key in keys]))

    def forget(self, keys):
        for key in keys:
            self.store.remove(key.hex(), True)

    def lose_holder(self):
        self.holder.kill()
        self.holder.wait()

    def close(self):
        self.store.close()
        for child in self.children:
            child.terminate()

    def steps_open(self, count, options):
        from harness import Pages

        self.pages = Pages(8, 2 << 20, 1)
        self.open(self.home, 2 << 20, 8, 0, options)
        self.present = [key.hex() for key in keys_of(-1, count)]
        base = self.pages.source.ctypes.data
        for i in range(0, count, 128):
            some = self.present[i : i + 128]
            codes = self.store.batch_put_from(
                some, [base + j * TINY for j in range(len(some))], [TINY] * len(some)
            )
            if any(code != 0 for code in codes):
                raise RuntimeError(f"batch_put_from returned {sorted(set(codes))}")

    def steps(self, number):
        begin = time.perf_counter()
        found = sum(code == 1 for code in self.store.batch_is_exist(self.present))
        took = time.perf_counter() - begin
        if found != len(self.present):
            raise RuntimeError(f"found {found}")
        return {"lookup": took}


if __name__ == "__main__":
    if sys.argv[1:2] == ["hold"]:
        hold(sys.argv[2], int(sys.argv[3]))
    else:
        serve(Mooncake)
