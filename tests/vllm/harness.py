"""Server: vLLM's engine in this process, with or without the connector, and what the tests ask of it.

One at a time: the worker's side of a connector is one for each process.
"""

import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vllm
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

BLOCK = 32  # the smallest page of the CPU's attention
BEFORE_0_32 = vllm.__version__.startswith("0.31.")


def prompt(seed: int, length: int) -> list[int]:
    return [(7 * i * (seed + 1) + i * i * (seed + 3)) % 500 + 4 for i in range(length)]


def hide_numba_from_the_kernel_scan() -> None:
    """Has the next engine of this process start after one that speculated.

    vLLM 0.32 looks through the attributes of all loaded modules for kernels whenever an engine begins.
    numba's library, which speculating loads, has any attribute that it is asked for, so a `__dict__` that is
    none.
    """
    library = getattr(sys.modules.get("llvmlite.binding.ffi"), "_lib_wrapper", None)
    if library is None or library.__getattr__.__module__ == __name__:
        return
    find = library.__getattr__

    def find_function(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return find(self, name)

    library.__getattr__ = find_function


class Server:
    """One engine. `scheduler` and `worker` are the connector's sides."""

    def __init__(
        self, model: Path, *, connector: bool = True, extra: dict[str, Any] | None = None, **options: Any
    ) -> None:
        policy = options.pop("policy", "recompute")
        multi = options.pop("multi", False)
        if connector:
            ours = {
                "kv_connector": "KVTierConnector",
                "kv_connector_module_path": "kvtier.adapters.vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"host": "256MiB", "load": "always"} | (extra or {}),
            }
            if multi:
                children = {"connectors": [ours]}
                ours = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
                ours["kv_connector_extra_config"] = children
            options["kv_transfer_config"] = KVTransferConfig(**ours, kv_load_failure_policy=policy)
        defaults = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 4096,
            "enforce_eager": True,
            "seed": 0,
            "block_size": BLOCK,
            "disable_log_stats": False,
            "max_logprobs": 5,
        }
        hide_numba_from_the_kernel_scan()
        self.llm = LLM(**defaults | options)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.vllm_scheduler = self.core.scheduler
        if connector:
            from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

            sides = [self.vllm_scheduler.connector]
            if has_kv_transfer_group():  # else the workers are processes of their own
                sides.append(get_kv_transfer_group())
            if multi:
                sides = [side.sub_connectors[0] for side in sides]
            self.scheduler, self.worker = sides[0]._scheduler, getattr(sides[-1], "_worker", None)
            if self.scheduler is not None:
                self.scheduler._keeper.wait_for_workers(20)

    def generate(
        self, prompts: list[list[int]], tokens: int = 8, *, lora: Any = None, **extra: Any
    ) -> list[Any]:
        """Greedy; each result has `.tokens`, `.logprobs` (of the chosen), `.cached`."""
        asked = [{"prompt_token_ids": p} for p in prompts]
        params = self.params(tokens, **extra)
        outputs = self.llm.generate(asked, params, use_tqdm=False, lora_request=lora)
        return [Result(output) for output in outputs]

    @staticmethod
    def params(tokens: int, **extra: Any) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=1, **extra
        )

    def drain(self, seconds: float = 60.0) -> dict[str, Any]:
        """Steps until nothing is left to do; returns what finished meanwhile, by the name it was given."""
        finished = {}
        end = time.monotonic() + seconds
        while self.llm.llm_engine.has_unfinished_requests() or self.vllm_scheduler.has_requests():
            assert time.monotonic() < end, "the engine does not come to rest"
            for output in self.llm.llm_engine.step():
                if output.finished:
                    finished[output.request_id] = output
        return finished

    def forget_device(self) -> None:
        """Empties vLLM's own prefix cache; the connector keeps its blocks."""
        assert self.llm.reset_prefix_cache()

    def count(self, name: str) -> float:
        """A counter of ours, by vLLM's own metrics."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == f"vllm:kvtier_{name}")

    def wait(self, condition: Any, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "not within the time"
            time.sleep(0.005)

    def check_empty(self) -> None:
        """Nothing of a finished run is left: no request, no page, no pin, no lease, no transfer."""
        scheduler = self.vllm_scheduler
        assert not scheduler.requests
        assert not scheduler.running
        assert not len(scheduler.waiting)
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        ours = self.scheduler
        assert not ours._requests
        assert not ours._loading
        assert not ours.holds.pending
        assert not self.worker._loads
        self.wait(lambda: ours._engine.stats().transfers_running == 0)
        stats = ours._engine.stats()
        assert (stats.pins, stats.leases, stats.quarantined_blocks) == (0, 0, 0)

    def close(self) -> None:
        from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

        self.llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()  # one for each process: the next engine would take this one's
        del self.llm, self.core, self.vllm_scheduler
        gc.collect()


class Result:
    def __init__(self, output: Any) -> None:
        completion = output.outputs[0]
        self.tokens = list(completion.token_ids)
        steps = zip(self.tokens, completion.logprobs, strict=True)
        self.logprobs = [step[token].logprob for token, step in steps]
        self.cached = output.num_cached_tokens
        self.finish_reason = completion.finish_reason


@contextlib.contextmanager
def serving(model: Path, **options: Any) -> Iterator[Server]:
    server = Server(model, **options)
    try:
        yield server
    finally:
        server.close()


def same(left: list[Result], right: list[Result]) -> list[bool]:
    return [a.tokens == b.tokens for a, b in zip(left, right, strict=True)]
