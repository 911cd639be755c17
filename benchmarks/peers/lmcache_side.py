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
from concurrent.futures import Future, wait

import torch
from harness import Store, batches, collapse, keys_of, serve
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend
from lmcache.v1.storage_backend.plugins.rust_raw_block_backend import RustRawBlockBackend

BATCH_BYTES = 32 << 20  # handed over at once, so that copies and writes overlap
# Of lookups: 1 layer, 16 tokens, 64 wide, 4 KiB a chunk, which O_DIRECT takes.
STEP_SHAPE = (1, 2, 16, 1, 64)
STEP_SLOT_BYTES = 8192  # raw block: a header and the chunk
STEP_SLACK_BYTES = 256 << 20  # its table of keys, and room
STEP_BATCH = 256  # the disk backend looks for a key in a list of the running writes


def _key(key):
    return CacheEngineKey("bench", 1, 0, int.from_bytes(key[:8], "big") >> 1, torch.bfloat16)


class LMCache(Store):
    packages = ("lmcache", "lmcache-rust-raw-block-io", "torch")

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def prepare(self, home, size, blocks, capacity, options):
        """Makes the CPU pool, which it needs whatever is on the drive."""
        tokens = size // (32 * 2 * 8 * 128 * 2)
        self._configure(home, (32, 2, tokens, 8, 128), 2 * blocks * size + (256 << 20), capacity, options)
        pool = self.cpu.memory_allocator.buffer
        self.huge = collapse(pool.data_ptr(), pool.numel() * pool.element_size())
        self.each = max(1, BATCH_BYTES // size)
        self.source = torch.from_numpy(self.pages.source).view(torch.bfloat16)
        self.target = torch.from_numpy(self.pages.target).view(torch.bfloat16)

    def _configure(self, home, kv_shape, pool_bytes, capacity, options):
        """kv_shape: layers, 2, tokens of a chunk, heads, width of a head."""
        layers, parts, tokens, heads, width = kv_shape
        self.shape, self.fmt = torch.Size([parts, layers, tokens, heads * width]), MemoryFormat.KV_2LTD
        extra = dict(options.get("extra", {}))
        self.kind = kind = options["kind"]
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
        config["max_local_cpu_size"] = pool_bytes / 2**30
        if kind == "disk":
            (home / "disk").mkdir(exist_ok=True)
            config |= {"local_disk": str(home / "disk"), "max_local_disk_size": capacity / 2**30}
        self.config = LMCacheEngineConfig.from_defaults(**config)
        self.metadata = LMCacheMetadata("bench", 1, 1, 0, 0, torch.bfloat16, kv_shape, chunk_size=tokens)
        self.backend = self.cpu = LocalCPUBackend(self.config, self.metadata, "cpu")

    def open(self, home, size, blocks, capacity, options):
        self._start()
        return {"config": f"{options}, {torch.get_num_threads()} torch threads", "huge_pages": self.huge}

    def _start(self):
        if self.kind == "disk":
            self.backend = LocalDiskBackend(self.config, self.loop, self.cpu, "cpu", metadata=self.metadata)
        elif self.kind == "raw":
            self.backend = RustRawBlockBackend(self.config, self.metadata, self.cpu, self.loop, "cpu")

    def _allocate(self):
        obj = self.cpu.allocate(self.shape, torch.bfloat16, self.fmt)
        if obj is None:
            raise MemoryError("LMCache's CPU pool is full")
        return obj

    def _fill(self, i):
        obj = self._allocate()
        obj.tensor.copy_(self.source[i].view(self.shape))
        return obj

    def put(self, keys):
        running = []
        for begin in range(0, len(keys), self.each):
            some = [_key(key) for key in keys[begin : begin + self.each]]
            running += self._submit(some, [self._fill(begin + i) for i in range(len(some))])
        self._finish(running)

    def _submit(self, keys, objs):
        """Hands chunks over, which it takes; futures of what is not in yet."""
        if self.kind == "disk":
            futures = [Future() for _ in keys]
            for key, obj, future in zip(keys, objs, futures, strict=True):
                self.backend.submit_put_task(key, obj, lambda _, done=future: done.set_result(None))
        else:
            futures = self.backend.batched_submit_put_task(keys, objs) or []
        for obj in objs:
            obj.ref_count_down()
        return futures

    @staticmethod
    def _finish(futures):
        done, left = wait(futures, 60)
        if left:
            raise TimeoutError(f"{len(left)} of {len(futures)} writes were not over after 60 s")
        for future in done:
            future.result()

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
        pool = (count if options["kind"] == "cpu" else STEP_BATCH) * STEP_SLOT_BYTES + STEP_SLACK_BYTES
        self._configure(self.home, STEP_SHAPE, pool, count * STEP_SLOT_BYTES + STEP_SLACK_BYTES, options)
        self._start()
        self.present = [_key(key) for key in keys_of(-1, count)]
        for some in batches(self.present, STEP_BATCH):
            self._finish(self._submit(some, [self._allocate() for _ in some]))

    def steps(self, number):
        lookup = self.backend.batched_async_contains("bench", self.present)
        begin = time.perf_counter()
        found = asyncio.run(lookup)
        took = time.perf_counter() - begin
        if found != len(self.present):
            raise RuntimeError(f"found {found} of {len(self.present)}")
        return {"lookup": took}


if __name__ == "__main__":
    sys.argv = sys.argv[:1]
    serve(LMCache)
