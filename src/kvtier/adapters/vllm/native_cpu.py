"""vLLM's own offloading on its CPU platform, to be compared with: vLLM has no worker that copies there.

Everything else is vLLM's: scheduler, policies, tiering, the file tier. In kv_connector_extra_config its
spec_name is "NativeCpuTieringSpec", its spec_module_path this module. For vLLM 0.32 or later.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class NativeCpuWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies pages to and from vLLM's own host memory, in the order of submission as its CUDA worker does."""

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, region: Any) -> None:
        self._caches = kv_caches
        self._each = blocks_per_chunk
        self._region = region
        self._host = [
            region.create_next_worker_view(tensor.page_size_bytes * blocks_per_chunk)
            for tensor in kv_caches.tensors
        ]
        self._thread = ThreadPoolExecutor(1)
        self._jobs: dict[int, Future[Any]] = {}

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """See OffloadingWorker."""
        self._jobs[job_id] = self._thread.submit(self._copy, job_id, src_spec, dst_spec.block_ids, store=True)
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """See OffloadingWorker."""
        self._jobs[job_id] = self._thread.submit(
            self._copy, job_id, dst_spec, src_spec.block_ids, store=False
        )
        return True

    def get_finished(self) -> list[Any]:
        """See OffloadingWorker."""
        done = [job_id for job_id, job in self._jobs.items() if job.done()]
        return [self._jobs.pop(job_id).result() for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        """See OffloadingWorker."""
        for job_id in job_ids & self._jobs.keys():
            self._jobs[job_id].result()

    def shutdown(self) -> None:
        """See OffloadingWorker."""
        self._thread.shutdown(wait=True)
        self._host.clear()
        self._region.cleanup()

    def _copy(self, job_id: int, device: Any, host_ids: Any, *, store: bool) -> Any:
        began = time.perf_counter()
        num_bytes = block = chunk = 0
        for group, (count, first) in enumerate(zip(device.group_sizes, device.block_indices, strict=True)):
            skip = first % self._each
            for i in range(count):
                row, part = divmod(i + skip, self._each)
                page, slot = int(device.block_ids[block + i]), int(host_ids[chunk + row])
                for ref in self._caches.group_data_refs[group]:
                    tensor = self._caches.tensors[ref.tensor_idx]
                    size = tensor.page_size_bytes
                    there = tensor.tensor[page, :size]
                    here = self._host[ref.tensor_idx][slot, part * size : (part + 1) * size]
                    if store:
                        here.copy_(there)
                    else:
                        there.copy_(here)
                    num_bytes += size
            block += count
            chunk += -(-(count + skip) // self._each) if count else 0
        return TransferResult(job_id, True, num_bytes, time.perf_counter() - began)


class NativeCpuTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's TieringOffloadingSpec with that worker."""

    _worker: Any

    def get_worker(self, kv_caches: Any) -> Any:
        """See OffloadingSpec."""
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = NativeCpuWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
