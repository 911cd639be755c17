"""LMCache's backends: local CPU, local disk (buffered, O_DIRECT), raw block (POSIX, io_uring).

Chunks begin and end in the framework's pages, as with everybody: allocate in LMCache's CPU pool and copy in
with torch, or read into the pool and copy out. The pool is put into huge pages.
"""

# ruff: noqa: ARG002 - every side has the harness' methods

import asyncio
import os
import sys
import threading
import time

import torch
from harness import Store, collapse, keys_of, serve
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend
from lmcache.v1.storage_backend.plugins.rust_raw_block_backend import RustRawBlockBackend

BATCH_BYTES = 32 << 20  # handed over at once, so that copies and writes overlap


def _key(key):
    return CacheEngineKey("bench", 1, 0, int.from_bytes(key[:8], "big") >> 1, torch.bfloat16)


class LMCache(Store):
    def __init__(self):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def prepare(self, home, size, blocks, capacity, options):
        """Makes the CPU pool, which it needs whatever is on the drive."""
        tokens = size // (32 * 2 * 8 * 128 * 2)
        self.shape, self.fmt = torch.Size([2, 32, tokens, 1024]), MemoryFormat.KV_2LTD
        extra = dict(options.get("extra", {}))
        kind = options["kind"]
        if kind == "raw":
            device = home / "raw"
            with device.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, capacity)
            extra |= {
                "rust_raw_block.device_path": str(device),
                "rust_raw_block.capacity_bytes": capacity,
                "rust_raw_block.use_odirect": True,
            }
        config = {"chunk_size": tokens, "local_cpu": kind == "cpu", "extra_config": extra or None}
        config["max_local_cpu_size"] = (2 * blocks * size + (256 << 20)) / 2**30
        if kind == "disk":
            (home / "disk").mkdir(exist_ok=True)
            config |= {"local_disk": str(home / "disk"), "max_local_disk_size": capacity / 2**30}
        config = LMCacheEngineConfig.from_defaults(**config)
        metadata = LMCacheMetadata(
            "bench", 1, 1, 0, 0, torch.bfloat16, (32, 2, tokens, 8, 128), chunk_size=tokens
        )
        self.cpu = LocalCPUBackend(config, metadata, "cpu")
        pool = self.cpu.memory_allocator.buffer
        self.huge = collapse(pool.data_ptr(), pool.numel() * pool.element_size())
        self.kind, self.backend = kind, self.cpu
        self.config, self.metadata = config, metadata
        self.each = max(1, BATCH_BYTES // size)
        self.source = torch.from_numpy(self.pages.source).view(torch.bfloat16)
        self.target = torch.from_numpy(self.pages.target).view(torch.bfloat16)

    def open(self, home, size, blocks, capacity, options):
        if self.kind == "disk":
            self.backend = LocalDiskBackend(self.config, self.loop, self.cpu, "cpu", metadata=self.metadata)
        elif self.kind == "raw":
            self.backend = RustRawBlockBackend(self.config, self.metadata, self.cpu, self.loop, "cpu")
        return {"config": f"{options}, {torch.get_num_threads()} torch threads", "huge_pages": self.huge}

    def _fill(self, i):
        obj = self.cpu.allocate(self.shape, torch.bfloat16, self.fmt)
        if obj is None:
            raise MemoryError("LMCache's CPU pool is full")
        obj.tensor.copy_(self.source[i].view(self.shape))
        return obj

    def put(self, keys):
        written = threading.Semaphore(0)
        futures = []
        for begin in range(0, len(keys), self.each):
            some = [_key(key) for key in keys[begin : begin + self.each]]
            objs = [self._fill(begin + i) for i in range(len(some))]
            if self.kind == "disk":
                for key, obj in zip(some, objs, strict=True):
                    self.backend.submit_put_task(key, obj, lambda _: written.release())
            else:
                futures += self.backend.batched_submit_put_task(some, objs) or []
            for obj in objs:
                obj.ref_count_down()
        for future in futures:
            future.result(60)
        if self.kind == "disk":
            for i in range(len(keys)):
                if not written.acquire(timeout=60):
                    raise TimeoutError(f"{i} of {len(keys)} chunks were written in 60 s")

    def get(self, keys):
        # All at once to the threads, or batches so that the pool is not needed twice.
        found = []
        for begin in range(0, len(keys), self.each * 4):
            some = [_key(key) for key in keys[begin : begin + self.each * 4]]
            if self.kind == "cpu":
                objs = [self.backend.get_blocking(key) for key in some]
            else:
                objs = self._read(some)
            for i, obj in enumerate(objs, begin):
                found.append(obj is not None)
                if obj is not None:
                    self.target[i].view(self.shape).copy_(obj.tensor)
                    obj.ref_count_down()
        return found

    def _read(self, keys):
        if self.kind == "disk" and len(keys) > 1:
            keys = [key if self.backend.contains(key) else None for key in keys]
            objs = iter(self.backend.batched_get_blocking([key for key in keys if key is not None]))
            return [next(objs) if key is not None else None for key in keys]
        return self.backend.batched_get_blocking(keys)

    def found(self, keys):
        return sum(self.backend.contains(_key(key)) for key in keys)

    def forget(self, keys):
        for key in keys:
            size = 0
            if self.kind == "disk" and (meta := self.backend.dict.get(_key(key))) is not None:
                size = meta.size
            self.backend.remove(_key(key))
            if self.kind == "disk":
                self.backend.current_cache_size -= size  # remove() leaves it to its caller

    def close(self):
        if self.backend is not self.cpu:
            self.backend.close()
        self.cpu.close()
        self.loop.call_soon_threadsafe(self.loop.stop)

    def steps_open(self, count, options):
        tokens = 16
        config = LMCacheEngineConfig.from_defaults(chunk_size=tokens, local_cpu=True, max_local_cpu_size=1.0)
        shape = (1, 2, tokens, 1, 16)
        metadata = LMCacheMetadata("bench", 1, 1, 0, 0, torch.bfloat16, shape, chunk_size=tokens)
        self.backend = self.cpu = LocalCPUBackend(config, metadata, "cpu")
        self.present = [_key(key) for key in keys_of(-1, count)]
        for key in self.present:
            obj = self.cpu.allocate(torch.Size([2, 1, tokens, 16]), torch.bfloat16, MemoryFormat.KV_2LTD)
            self.cpu.submit_put_task(key, obj)
            obj.ref_count_down()

    def steps(self, number):
        lookup = self.cpu.batched_async_contains("bench", self.present)
        begin = time.perf_counter()
        found = asyncio.run(lookup)
        took = time.perf_counter() - begin
        if found != len(self.present):
            raise RuntimeError(f"found {found}")
        return {"lookup": took}


if __name__ == "__main__":
    sys.argv = sys.argv[:1]
    serve(LMCache)
