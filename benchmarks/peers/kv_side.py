"""LMDB and Redis as plain key-value stores."""

# ruff: noqa: ARG002 - every side has the harness' methods

import shutil
import subprocess
import sys
import time

import numpy as np
from harness import Store, keys_of, serve

TRANSACTION_BYTES = 32 << 20


class Lmdb(Store):
    """Transactions of 32 MiB without a sync each, one sync at the end; reads out of the memory map."""

    packages = ("lmdb",)

    def prepare(self, home, size, blocks, capacity, options):
        import lmdb

        self.lmdb = lmdb

    def open(self, home, size, blocks, capacity, options):
        self.home, self.capacity = home, capacity
        self._open()
        self.each = max(1, TRANSACTION_BYTES // size)
        return {"config": "sync=False and env.sync() at the end, 32 MiB/txn"}

    def _open(self):
        self.env = self.lmdb.open(
            str(self.home / "lmdb"), map_size=self.capacity, sync=False, readahead=True, lock=False
        )

    def put(self, keys):
        for begin in range(0, len(keys), self.each):
            with self.env.begin(write=True) as txn:
                for i in range(begin, min(begin + self.each, len(keys))):
                    txn.put(keys[i], self.pages.source[i].data)
        self.env.sync(True)

    def get(self, keys):
        found = []
        with self.env.begin(buffers=True) as txn:
            for i, key in enumerate(keys):
                value = txn.get(key)
                found.append(value is not None)
                if value is not None:
                    self.pages.target[i] = np.frombuffer(value, np.uint8)
        return found

    def found(self, keys):
        with self.env.begin(buffers=True) as txn:
            return sum(txn.get(key) is not None for key in keys)

    def forget(self, keys):
        with self.env.begin(write=True) as txn:
            for key in keys:
                txn.delete(key)
        self.env.sync(True)

    def cold(self):
        self.env.close()
        self._open()

    def close(self):
        self.env.sync(True)
        self.env.close()

    def steps_open(self, count, options):
        import lmdb

        self.present = keys_of(-1, count)
        self.home.mkdir(exist_ok=True)
        self.env = lmdb.open(str(self.home / "lookup"), map_size=1 << 30, sync=False, lock=False)
        with self.env.begin(write=True) as txn:
            for key in self.present:
                txn.put(key, key + key)

    def steps(self, number):
        with self.env.begin(buffers=True) as txn:
            begin = time.perf_counter()
            found = len(txn.cursor().getmulti(self.present))
            took = time.perf_counter() - begin
        if found != len(self.present):
            raise RuntimeError(f"found {found}")
        return {"lookup": took}


class Redis(Store):
    """redis-server on a Unix socket, hiredis parser, one SET and one GET a value."""

    packages = ("redis", "hiredis")

    def versions(self):
        command = ["redis-server", "--version"]  # "Redis server v=7.0.15 sha=..."
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return super().versions() | {"redis-server": said.partition(" v=")[2].split()[0]}

    def prepare(self, home, size, blocks, capacity, options):
        import redis  # noqa: F401 - not a part of the opening

    def open(self, home, size, blocks, capacity, options):
        self._start(home, options.get("append_only", False))
        log = "AOF, everysec" if options.get("append_only") else "no persistence"
        return {"config": f"Unix socket, {log}"}

    def _start(self, home, append_only):
        import redis

        server = shutil.which("redis-server")
        if server is None:
            raise FileNotFoundError("redis-server is not installed")
        home.mkdir(exist_ok=True)
        # A Unix socket's path is limited to 107 bytes: the server runs in the folder and is told a short one.
        command = [server, "--port", "0", "--unixsocket", "redis.sock", "--dir", str(home), "--save", ""]
        command += ["--appendonly", "yes" if append_only else "no", "--appendfsync", "everysec"]
        self.server = subprocess.Popen(command, cwd=home, stdout=2, stdin=subprocess.DEVNULL)
        import os

        os.chdir(home)
        self.client = redis.Redis(unix_socket_path="redis.sock")
        for _ in range(6000):
            try:
                if self.client.ping():
                    return
            except (redis.exceptions.ConnectionError, redis.exceptions.BusyLoadingError):
                time.sleep(0.01)
            if self.server.poll() is not None:
                raise RuntimeError(f"redis-server ended with {self.server.returncode}")
        raise TimeoutError("redis-server did not come up in 60 s")

    def put(self, keys):
        for i, key in enumerate(keys):
            self.client.set(key, self.pages.source[i].data)

    def get(self, keys):
        found = []
        for i, key in enumerate(keys):
            value = self.client.get(key)
            found.append(value is not None)
            if value is not None:
                self.pages.target[i] = np.frombuffer(value, np.uint8)
        return found

    def found(self, keys):
        return self.client.exists(*keys)

    def forget(self, keys):
        self.client.delete(*keys)

    def close(self):
        self.client.shutdown(nosave=True)
        self.server.wait(30)

    def steps_open(self, count, options):
        self._start(self.home, append_only=False)
        self.present = keys_of(-1, count)
        pipe = self.client.pipeline(transaction=False)
        for key in self.present:
            pipe.set(key, key)
        pipe.execute()

    def steps(self, number):
        begin = time.perf_counter()
        found = sum(
            self.client.exists(*self.present[i : i + 4096]) for i in range(0, len(self.present), 4096)
        )
        took = time.perf_counter() - begin
        if found != len(self.present):
            raise RuntimeError(f"found {found}")
        return {"lookup": took}


if __name__ == "__main__":
    serve({"lmdb": Lmdb, "redis": Redis}[sys.argv[1]])
