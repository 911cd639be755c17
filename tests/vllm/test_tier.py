"""Our disk tier below vLLM's own CPU offloading: two lives over one directory, and a damaged one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from drive_faults import flip_bits
from harness import BLOCK, Result, Server, prompt, same, serving
from vllm.config import KVTransferConfig
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.config import OffloadingCacheConfig, OffloadingGroupConfig, OffloadingModelConfig
from vllm.v1.kv_offload.tiering.base import TransferJob

from kvtier.adapters.vllm_tier import KVTierSecondaryTier
from kvtier.cli.vllm_server import forget_offloaded_memory
from kvtier.errors import ConfigError, StorageError

PROMPTS = [prompt(seed, 300 + 50 * seed) for seed in range(3)]
HITS = [(len(p) - 1) // BLOCK * BLOCK for p in PROMPTS]


@contextlib.contextmanager
def offloading(model: Path, path: Path) -> Iterator[tuple[Server, Any]]:
    """vLLM's OffloadingConnector on the CPU, and our tier in it."""
    extra = {
        "spec_name": "NativeCpuTieringSpec",
        "spec_module_path": "kvtier.adapters.vllm.native_cpu",
        "cpu_bytes_to_use": 64 << 20,
        "secondary_tiers": [
            {
                "type": "KVTierSecondaryTier",
                "module_path": "kvtier.adapters.vllm_tier",
                "disk": [{"path": str(path), "capacity": "128MiB"}],
                "host": "16MiB",
            }
        ],
    }
    transfer = KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra
    )
    try:
        with serving(model, connector=False, kv_transfer_config=transfer) as server:
            manager = server.vllm_scheduler.connector.connector_scheduler.manager
            yield server, manager.secondary_tiers[0]
    finally:
        forget_offloaded_memory(transfer.engine_id)  # of an engine that did not start or end in order


@pytest.fixture(scope="module")
def computed(llama: Path) -> list[Result]:
    with serving(llama, connector=False, enable_prefix_caching=False) as server:
        return server.generate(PROMPTS)


def fill(model: Path, path: Path, computed: list[Result]) -> None:
    with offloading(model, path) as (server, tier):
        assert same(server.generate(PROMPTS), computed) == [True] * 3
        server.drain()
        assert tier._engine.flush(60).durable >= sum(HITS) // BLOCK


def test_the_second_life_restores_what_the_first_computed(
    llama: Path, tmp_path: Path, computed: list[Result]
) -> None:
    fill(llama, tmp_path / "disk", computed)
    with offloading(llama, tmp_path / "disk") as (server, tier):
        restored = server.generate(PROMPTS)
        assert same(restored, computed) == [True] * 3
        assert [r.cached for r in restored] == HITS
        assert tier._engine.stats().promote_good >= sum(HITS) // BLOCK
        server.drain()
        assert not tier._jobs


def test_a_reset_of_vllms_reaches_the_drive(llama: Path, tmp_path: Path, computed: list[Result]) -> None:
    """As after an update of the weights. vLLM's manager says so to a tier by no more than a drain_jobs()."""
    with offloading(llama, tmp_path / "disk") as (server, tier):
        for _ in range(2):
            found = server.generate(PROMPTS)
            assert ([r.cached for r in found], same(found, computed)) == ([0] * 3, [True] * 3)
            server.drain()
            assert tier._engine.flush(60).dropped == 0
            assert server.llm.reset_prefix_cache(reset_connector=True)
        stored = tier._engine.stats().lookup_hits_disk
        assert [r.cached for r in server.generate(PROMPTS)] == [0] * 3
        assert tier._engine.stats().lookup_hits_disk == stored


def test_a_bit_flipped_in_every_tenth_chunk_is_computed_again(
    llama: Path, tmp_path: Path, computed: list[Result]
) -> None:
    fill(llama, tmp_path / "disk", computed)
    assert flip_bits(tmp_path / "disk", each=10) >= 3
    with offloading(llama, tmp_path / "disk") as (server, tier):
        assert same(server.generate(PROMPTS), computed) == [True] * 3
        assert tier._engine.stats().disks[0].bad_corrupt_payload > 0
        server.drain()
        server.forget_device()
        assert same(server.generate(PROMPTS), computed) == [True] * 3


# --- the tier by itself, as vLLM's own tests drive its file tier ---

CHUNKS, CHUNK_BYTES = 8, 8192


class Memory:
    """vLLM's host memory, and a tier below it."""

    def __init__(self, folder: Path, model: Path, **options: Any) -> None:
        self.rows = np.zeros((CHUNKS, CHUNK_BYTES), np.int8)
        parallel = SimpleNamespace(tp_size=1, pp_size=1, pcp_size=1, dcp_size=1)
        config = SimpleNamespace(
            groups=(OffloadingGroupConfig(16, ("layer",), 0),),
            model=OffloadingModelConfig(str(model), "float32"),
            cache=OffloadingCacheConfig(16, 1),
            parallel=parallel,
            worker_kv_bytes_per_block=CHUNK_BYTES,
            kv_cache_layout="LBHNC",
            canonical_layout=False,
            replicated_layout=False,
        )
        drive = [{"path": str(folder / "disk"), "capacity": options.pop("capacity", "32MiB")}]
        spec = SimpleNamespace(config=config, num_chunks=CHUNKS)
        self.tier = KVTierSecondaryTier(
            spec, memoryview(self.rows), "kvtier", **{"disk": drive, "host": "4MiB"} | options
        )
        self._next = 0

    def run(self, keys: list[Any], chunks: list[int], *, load: bool) -> Any:
        """One job, until it has finished."""
        self._next += 1
        job = TransferJob(self._next, keys, np.asarray(chunks), load, CONTEXT)
        (self.tier.submit_load if load else self.tier.submit_store)(job)
        self.tier._drain()
        (result,) = self.tier.get_finished_jobs()
        assert result.job_id == self._next
        return result


CONTEXT = ReqContext(req_id="r")
KEYS = [make_offload_key(bytes([n]) * 32, 0) for n in range(CHUNKS)]


@pytest.fixture
def memory(tmp_path: Path, llama: Path) -> Iterator[Memory]:
    made = Memory(tmp_path, llama)
    yield made
    made.tier.shutdown()


def fill_rows(memory: Memory) -> np.ndarray:
    memory.rows[:] = np.random.default_rng(1).integers(-128, 128, memory.rows.shape, np.int8)
    return memory.rows.copy()


def test_chunks_come_back_into_other_rows(memory: Memory) -> None:
    rows = fill_rows(memory)
    assert memory.tier.lookup(KEYS[0], CONTEXT) == LookupResult.MISS
    result = memory.run(KEYS[:4], [0, 1, 2, 3], load=False)
    assert (result.success, result.transfer_bytes) == (True, 4 * CHUNK_BYTES)
    assert memory.tier.lookup(KEYS[3], CONTEXT) == LookupResult.HIT
    memory.rows[:] = 0
    assert memory.run(KEYS[:4], [7, 6, 5, 4], load=True).success
    assert (memory.rows[[7, 6, 5, 4]] == rows[:4]).all()
    assert not memory.tier.has_pending_work()


def test_a_load_that_fails_in_part_names_what_is_there(memory: Memory) -> None:
    fill_rows(memory)
    memory.run(KEYS[:2], [0, 1], load=False)
    result = memory.run(KEYS[:3], [4, 5, 6], load=True)
    assert (result.success, result.successful_keys) == (False, tuple(KEYS[:2]))


def test_groups_of_one_hash_are_two_chunks_and_other_hashes_are_none(memory: Memory) -> None:
    memory.run(KEYS[:1], [0], load=False)
    assert memory.tier.lookup(make_offload_key(bytes([0]) * 32, 1), CONTEXT) == LookupResult.MISS
    short = make_offload_key(b"12345678", 0)
    assert memory.tier.lookup(short, CONTEXT) == LookupResult.MISS
    assert not memory.run([short], [0], load=False).success


def test_a_second_life_finds_what_the_first_kept_and_another_model_does_not(
    tmp_path: Path, llama: Path
) -> None:
    first = Memory(tmp_path, llama)
    rows = fill_rows(first)
    first.run(KEYS, list(range(CHUNKS)), load=False)
    first.tier.shutdown()
    first.tier.shutdown()  # once more does nothing
    # The capacity is of the whole directory: the second has room beside the first.
    other = Memory(tmp_path, llama, identity="other quantisation", capacity="64MiB")
    assert other.tier.lookup(KEYS[0], CONTEXT) == LookupResult.MISS
    other.tier.shutdown()
    second = Memory(tmp_path, llama, capacity="64MiB")
    assert second.tier.lookup(KEYS[0], CONTEXT) == LookupResult.HIT
    assert second.run(KEYS, list(range(CHUNKS)), load=True).success
    assert (second.rows == rows).all()
    second.tier.shutdown()


def test_a_reset_forgets_what_was_stored_and_loses_no_result(tmp_path: Path, llama: Path) -> None:
    first = Memory(tmp_path, llama)
    first.run(KEYS[:2], [0, 1], load=False)
    job = TransferJob(9, KEYS[2:4], np.asarray([2, 3]), False, CONTEXT)
    first.tier.submit_store(job)  # it may be running
    first.tier.drain_jobs()
    (result,) = first.tier.get_finished_jobs()
    assert (result.job_id, result.success) == (9, True)
    assert {first.tier.lookup(key, CONTEXT) for key in KEYS} == {LookupResult.MISS}
    rows = fill_rows(first)
    first.run(KEYS[:1], [5], load=False)  # of the new weights
    assert first.run(KEYS[:1], [6], load=True).success
    assert (first.rows[6] == rows[5]).all()
    first.tier.shutdown()
    second = Memory(tmp_path, llama)
    assert {second.tier.lookup(key, CONTEXT) for key in KEYS} == {LookupResult.MISS}
    second.run(KEYS[:1], [0], load=False)
    second.tier.shutdown()
    third = Memory(tmp_path, llama)  # a shutdown is no reset
    assert third.tier.lookup(KEYS[0], CONTEXT) == LookupResult.HIT
    third.tier.shutdown()


def test_a_drive_that_takes_no_reset_keeps_vllm_from_none(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise StorageError(5, "the drive")

    memory.run(KEYS[:1], [0], load=False)
    monkeypatch.setattr("kvtier.engine.save_epoch", refused)
    memory.tier.drain_jobs()
    assert memory.tier.lookup(KEYS[0], CONTEXT) == LookupResult.MISS


def test_a_configuration_that_names_no_drive_or_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="disk is missing; allowed: a list"):
        Memory(tmp_path, tmp_path, disk=None)
    with pytest.raises(ConfigError, match="identity is missing; allowed for 'org/model'"):
        Memory(tmp_path, Path("org/model"))
    with pytest.raises(ConfigError, match=r"identity is missing; .* no local folder with weights"):
        Memory(tmp_path, tmp_path)  # a folder with a config at most, whose weights are elsewhere
