"""What a full hit costs the scheduler's process: 65,536 blocks, a prompt of a million tokens; no model.

Ours is everything that vLLM calls for a new request: on_new_request() and get_num_new_matched_tokens(),
keys, lease and the step that ends it included. vLLM's is only its manager's lookup of each key, made
beforehand. Both are CPU time of the calling thread.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvtier.adapters.vllm.groups import CacheGroup, CachePlan
from kvtier.adapters.vllm.options import Options
from kvtier.adapters.vllm.scheduler import SchedulerSide
from kvtier.cli.results import Report, measured
from kvtier.config import Config
from kvtier.errors import InternalError
from kvtier.layout import KVLayout
from kvtier.ranks import Worker

BLOCKS = 65536
_TOKENS, _PAGES, _WIDTH = 16, 1024, 4
_SLOT_BYTES = 8192
_LEAST_ROUNDS = 20  # of some 30 ms
_HOST_BYTES = (BLOCKS + 4096) * _SLOT_BYTES


def measure_lookups(rounds: int, seed: int, report: Report, *, native: bool) -> None:
    """Both in turn, 20 rounds or more; adds scheduler_lookup_65536 and, with `native`, vLLM's."""
    random = np.random.default_rng(seed)
    hashes = [row.tobytes() for row in random.integers(0, 256, (BLOCKS, 32), np.uint8)]
    theirs = _native_lookup(hashes) if native else None
    ours_ms: list[float] = []
    theirs_ms: list[float] = []
    with _scheduler(hashes) as look_up:
        for round_ in range(max(rounds, _LEAST_ROUNDS) + 1):
            ours = _cpu_ms(look_up)
            other = _cpu_ms(theirs) if theirs is not None else 0.0
            if round_:  # the first one warms up
                ours_ms.append(ours)
                theirs_ms.append(other)
    limits = theirs_ms if native else None
    report.add(measured(f"scheduler_lookup_{BLOCKS}", ours_ms, "ms", limits))
    if native:
        report.add(measured(f"vllm_native/scheduler_lookup_{BLOCKS}", theirs_ms, "ms"))


def _cpu_ms(action: Callable[[], int]) -> float:
    begin = time.thread_time()
    found = action()
    ms = 1e3 * (time.thread_time() - begin)
    if found != BLOCKS:
        raise InternalError(f"{found} of {BLOCKS} blocks were found")
    return ms


@contextlib.contextmanager
def _scheduler(hashes: list[bytes]) -> Iterator[Callable[[], int]]:
    """A scheduler side that holds all of it, and one lookup of a new request."""
    layout = KVLayout(1, 1, _WIDTH, "uint8", _TOKENS, "TD", num_parts=1)
    config = Config(groups=[layout], host=_HOST_BYTES, model="bench@1", block_tokens=_TOKENS)
    plan = CachePlan((CacheGroup(0, layout, (), 1),), _TOKENS, _TOKENS, 0)
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        side = SchedulerSide(config, plan, Options(host=_HOST_BYTES), str(Path(folder) / "meet"))
        worker = Worker(Path(folder) / "meet", 0, config)
        try:
            side.holds.bind(SimpleNamespace(blocks=range(_PAGES), touch=_nothing, free_blocks=_nothing))
            pages = worker.attach([np.zeros((_PAGES, _TOKENS, _WIDTH), np.uint8)], 0, axes="PTD")
            worker.join(60)
            side._engine.wait_until_whole()
            _store(side, worker, pages, hashes)
            numbers = iter(range(1 << 30))
            nothing_scheduled = SimpleNamespace(num_scheduled_tokens={}, total_num_scheduled_tokens=0)

            def look_up() -> int:
                request = _request(f"hit-{next(numbers)}", hashes)
                side.on_new_request(request)
                found = side.match(request, 0)
                side.finish(request)
                side.step(nothing_scheduled)  # lets go of what was promised
                return (found or 0) // _TOKENS

            yield look_up
        finally:
            worker.close(60)
            side.close()


def _nothing(*_: Any) -> None:
    return


def _request(name: str, hashes: list[bytes]) -> Any:
    return SimpleNamespace(
        request_id=name,
        block_hashes=hashes,
        num_tokens=len(hashes) * _TOKENS + 1,
        num_prompt_tokens=len(hashes) * _TOKENS + 1,
        num_computed_tokens=0,
        kv_transfer_params=None,
        lora_request=None,
        skip_reading_prefix_cache=False,
    )


def _store(side: SchedulerSide, worker: Worker, pages: Any, hashes: list[bytes]) -> None:
    """As a prefill of so many steps would: each of vLLM's pages is used many times over."""
    request = _request("cold", hashes)
    side.on_new_request(request)
    ids = ([1 + n % (_PAGES - 1) for n in range(BLOCKS)],)
    tokens = {"cold": request.num_tokens}
    state = SimpleNamespace(get_block_ids=lambda _: ids)
    _, stores, _ = side.step(
        SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=request.num_tokens,
            kv_connector_block_state=state,
        )
    )
    for instruction, page_ids in stores:
        worker.execute(instruction, pages, page_ids).wait(60)
    side._engine.flush(60)
    side.finish(request)
    side.settle()


def _native_lookup(hashes: list[bytes]) -> Callable[[], int]:
    """The lookup of vLLM's own CPU manager, holding the same blocks."""
    base = importlib.import_module("vllm.v1.kv_offload.base")
    manager = importlib.import_module("vllm.v1.kv_offload.cpu.manager").CPUOffloadingManager(BLOCKS + 4096)
    keys = [base.make_offload_key(each, 0) for each in hashes]
    context = base.ReqContext(req_id="cold")
    manager.on_new_request(context)
    manager.prepare_store(keys, context)
    manager.complete_store(keys, context)
    hit = base.LookupResult.HIT
    asking = base.ReqContext(req_id="hit")
    manager.on_new_request(asking)

    def look_up() -> int:
        return sum(manager.lookup(key, asking) == hit for key in keys)

    return look_up
