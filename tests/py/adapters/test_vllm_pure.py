"""The connector without vLLM: options, keys, groups, identity, the recompute clock, the import."""

import json
import math
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier.adapters import vllm as adapter
from kvtier.adapters.vllm.counters import Counters, add_up
from kvtier.adapters.vllm.groups import plan_cache
from kvtier.adapters.vllm.identity import (
    LoRAIdentity,
    check_persistent,
    computed_as,
    files_digest,
    model_identity,
    weights_identity,
)
from kvtier.adapters.vllm.keys import BlockKeys
from kvtier.adapters.vllm.loads import is_idle
from kvtier.adapters.vllm.options import parse_options, parse_request_options
from kvtier.adapters.vllm.recompute import RecomputeClock

# --- the import ---


def test_importing_needs_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; sys.modules['vllm'] = sys.modules['torch'] = None\n"
        "import kvtier.adapters.vllm as v\n"
        "import kvtier.adapters.vllm.scheduler, kvtier.adapters.vllm.groups, kvtier.adapters.vllm.identity\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0+cpu", "0.33.1rc1", "1.0", "dev"])
def test_supported_versions(version: str) -> None:
    adapter.check_vllm(version)


@pytest.mark.parametrize("version", ["0.30.9", "0.27.1", "0.8"])
def test_an_older_vllm_is_refused_with_what_is_supported(version: str) -> None:
    with pytest.raises(kvtier.UnsupportedError, match=rf"vLLM is {version}; allowed: 0\.31 or later"):
        adapter.check_vllm(version)


def test_a_newer_vllm_is_tried_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    for version in ("0.33.9", "7.31.1", "7.31.1"):
        adapter.check_vllm(version)
    assert [record.getMessage() for record in caplog.records] == [
        "vLLM is 7.31.1; kvtier.adapters.vllm is written for vLLM up to 0.33, and was not tried with it"
    ]


@pytest.mark.parametrize(
    ("version", "raised"), [("7.32.0", kvtier.UnsupportedError), ("0.32.0", ImportError)]
)
def test_a_newer_vllm_whose_interface_is_another_one_is_refused(
    version: str, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = types.ModuleType("vllm")  # without anything in it
    vllm.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(adapter, "_vllm_version", lambda: version)
    with pytest.raises(raised) as refused:
        adapter.register()
    if raised is kvtier.UnsupportedError:
        assert "allowed: 0.31 to 0.33, or a newer kvtier" in str(refused.value)


def test_a_missing_vllm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_vllm_version", lambda: None)
    with pytest.raises(kvtier.UnsupportedError, match=r"needs vLLM, which is not installed; allowed: 0\.31"):
        _ = adapter.KVTierConnector
    with pytest.raises(AttributeError, match="nothing"):
        _ = adapter.nothing


# --- options ---


def test_options_of_the_documented_flag() -> None:
    options = parse_options(
        {"host": "64GiB", "disk": [{"path": "/mnt/nvme0/kvtier", "capacity": "1TiB"}], "store": "prompt"}
    )
    assert options.host == 64 << 30
    assert [(disk.path, disk.capacity) for disk in options.disk] == [("/mnt/nvme0/kvtier", 1 << 40)]
    assert (options.store, options.max_wait, options.copy_threads) == ("prompt", 2.0, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, '"host" is missing; allowed: the size'),
        ({"host": "lots"}, "host is 'lots'; allowed"),
        ({"host": 1, "hots": 2}, "'hots' is not a key; allowed: host, disk"),
        ({"host": 1, "store": "decode"}, "store is 'decode'; allowed"),
        ({"host": 1, "max_wait": -1}, "max_wait is -1; allowed: seconds from 0"),
        ({"host": 1, "max_wait": True}, "max_wait is True; allowed"),
        ({"host": 1, "load": "never"}, 'load is \'never\'; allowed: "auto" or "always"'),
        ({"host": 1, "copy_threads": 0}, "copy_threads is 0; allowed"),
        ({"host": 1, "directory": ""}, "directory is ''; allowed: a path"),
        ({"host": 1, "client_priority": "no"}, "client_priority is 'no'; allowed: true or false"),
        ({"host": 1, "disk": "/mnt"}, "disk is '/mnt'; allowed: a list of"),
        ({"host": 1, "disk": [{"path": "/mnt"}]}, r"disk\[0\] is .*; allowed"),
        ({"host": 1, "disk": [{"path": "mnt", "capacity": 1}]}, r"disk\[0\]: path is 'mnt'; allowed: an abs"),
        ({"host": 1, "disk": [{"path": "/m", "capacity": "x"}]}, r"disk\[0\]: capacity is 'x'; allowed"),
        ({"host": 1, "disk": [{"path": "/m", "capacity": 1}] * 2}, r"disk\[1\]: path '/m' is given twice"),
    ],
)
def test_bad_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(kvtier.ConfigError, match=message):
        parse_options(values)


def test_request_options() -> None:
    assert parse_request_options(None) == parse_request_options({"do_remote_prefill": True})
    options = parse_request_options(
        {"kvtier": {"tiers": ["host"], "max_load_tokens": 0, "max_store_tokens": None, "namespace": "a"}}
    )
    assert (options.tiers, options.max_load_tokens, options.max_store_tokens) == (("host",), 0, None)
    assert (options.namespace, options.prefetch_only, options.pin) == ("a", False, None)
    options = parse_request_options({"kvtier": {"prefetch_only": True, "pin": 60}})
    assert (options.prefetch_only, options.pin) == (True, 60.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "allowed: an object"),
        ({"tier": []}, "'tier' is not a key; allowed: tiers"),
        ({"tiers": ["gpu"]}, "tiers is .*; allowed: a list of host, disk"),
        ({"max_load_tokens": -1}, "max_load_tokens is -1"),
        ({"max_store_tokens": "9"}, "max_store_tokens is '9'"),
        ({"namespace": 3}, "namespace is 3; allowed: a str"),
        ({"namespace": "\u00fc" * 129}, "namespace has 258 bytes; allowed: up to 256"),
        ({"prefetch_only": 1}, "prefetch_only is 1; allowed: true or false"),
        ({"pin": 0}, "pin is 0; allowed: seconds, above 0 and up to 86400"),
        ({"pin": True}, "pin is True; allowed: seconds"),
        ({"pin": 1e9}, "pin is 1000000000.0; allowed: seconds"),
        ({"priority": 3}, "priority is 3; allowed: low, normal, high"),
        ({"ttl": 0}, "ttl is 0; allowed: seconds, above 0 and up to 31622400"),
    ],
)
def test_bad_request_options_are_named(values: Any, message: str) -> None:
    with pytest.raises(kvtier.ConfigError, match=message):
        parse_request_options({"kvtier": values})


@pytest.mark.parametrize(
    "values",
    [
        "x" * 10**6,
        {"y" * 10**6: 1},
        {"tiers": ["z" * 10**6]},
        {"namespace": list(range(10**5))},
        {"max_load_tokens": "9" * 10**6},
        {"pin": ["0"] * 10**5},
    ],
)
def test_what_a_client_sent_is_not_repeated_at_length(values: Any) -> None:
    with pytest.raises(kvtier.ConfigError, match=r"(?s)^.{0,200} [.]{3} .*allowed: ") as caught:
        parse_request_options({"kvtier": values})
    assert len(str(caught.value)) < 410


# --- threads ---


def test_threads_made_unbound_run_where_the_parent_may() -> None:
    code = (
        "import os, threading\n"
        "from kvtier.adapters.vllm.affinity import unbound\n"
        "all = os.sched_getaffinity(os.getppid())\n"
        "os.sched_setaffinity(0, {min(all)})\n"
        "seen = []\n"
        "def look(): seen.append(os.sched_getaffinity(0))\n"
        "def run():\n"
        "    thread = threading.Thread(target=look)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "run()\n"
        "with unbound(): run()\n"
        "assert seen == [{min(all)}, all], seen\n"
        "assert os.sched_getaffinity(0) == {min(all)}\n"
    )
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one processor: nothing can be bound to fewer")
    subprocess.run([sys.executable, "-c", code], check=True)


# --- keys ---


def hashes(count: int, length: int = 32, seed: int = 0) -> list[bytes]:
    return [row.tobytes() for row in np.random.default_rng(seed).integers(0, 256, (count, length), np.uint8)]


ROOT_A, ROOT_B = hashes(2, seed=9)


@pytest.mark.parametrize("length", [16, 32])
def test_keys_differ_by_hash_and_by_root(length: int) -> None:
    given = hashes(50, length)
    rows = []
    for root in (ROOT_A, ROOT_B):
        keys = BlockKeys(root, 1)
        assert keys.update(given) == 50
        rows += [row.tobytes() for row in keys.rows(0, 50)]
    assert len(set(rows)) == 100


def test_keys_grow_with_the_request_as_if_made_at_once() -> None:
    given = hashes(300)
    at_once, grown = BlockKeys(ROOT_A, 3), BlockKeys(ROOT_A, 3)
    at_once.update(given)
    for count in (0, 1, 2, 3, 100, 101, 300):
        assert grown.update(given[:count]) == count // 3
    assert np.array_equal(grown.rows(0, 100), at_once.rows(0, 100))
    assert len(at_once.rows(90, 200)) == 10


def test_the_last_of_several_hashes_names_a_block() -> None:
    given = hashes(8)
    one, four = BlockKeys(ROOT_A, 1), BlockKeys(ROOT_A, 4)
    one.update(given)
    four.update(given)
    assert np.array_equal(four.rows(0, 2), one.rows(0, 8)[3::4])


def test_keys_follow_a_request_that_was_rewritten() -> None:
    first, second = hashes(10), hashes(10, seed=1)
    keys, fresh = BlockKeys(ROOT_A, 1), BlockKeys(ROOT_A, 1)
    keys.update(first)
    assert keys.update(second) == fresh.update(second)
    assert np.array_equal(keys.rows(0, 10), fresh.rows(0, 10))
    assert keys.update(second[:4]) == 4


def test_hashes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(kvtier.ConfigError, match="has 64 bytes; allowed: at most 32"):
        BlockKeys(ROOT_A, 1).update(hashes(1, 64))
    with pytest.raises(kvtier.ConfigError, match="all of one length"):
        BlockKeys(ROOT_A, 1).update([b"a" * 32, b"b" * 16])


# --- groups: classes with vLLM's names ---


@dataclass
class FullAttentionSpec:
    block_size: int
    page_size_bytes: int
    prefix_cacheable: bool = True


class MLAAttentionSpec(FullAttentionSpec):
    pass


class RSWASpec(FullAttentionSpec):
    pass


@dataclass
class SlidingWindowSpec:
    block_size: int
    page_size_bytes: int
    sliding_window: int
    extra_retained_tokens: int = 0


@dataclass
class MambaSpec:
    block_size: int
    page_size_bytes: int


@dataclass
class UniformTypeKVCacheSpecs:
    block_size: int
    kv_cache_specs: dict[str, Any]


@dataclass
class Group:
    kv_cache_spec: Any
    layer_names: list[str]
    enable_kv_transfer: bool = True
    host_resident: bool = False
    is_eagle_group: bool = False


@dataclass
class CacheConfig:
    kv_cache_groups: list[Group]
    kv_cache_layout: str | None = "LBHNC"
    hash_block_size: int | None = None
    kv_tp_replicas: int = 1
    kv_cache_tensors: list[Any] = field(default_factory=list)


def test_one_group_of_full_attention() -> None:
    plan = plan_cache(CacheConfig([Group(FullAttentionSpec(32, 32 * 512), ["a", "b", "c"])]), 1)
    (group,) = plan.groups
    assert (plan.block_tokens, plan.hash_tokens, plan.volatile_blocks) == (32, 32, 0)
    assert group.layers == ("a", "b", "c")
    assert (group.layout.num_layers, group.layout.page_bytes(0), group.layout.window_tokens) == (
        3,
        16384,
        None,
    )
    assert not group.layout.replicated


def test_windows_and_drafters() -> None:
    config = CacheConfig(
        [
            Group(SlidingWindowSpec(32, 4096, 100, 5), ["w"]),
            Group(FullAttentionSpec(32, 4096), ["f"], is_eagle_group=True),
            Group(MambaSpec(32, 64), ["rebuilt"], enable_kv_transfer=False),
        ],
        hash_block_size=16,
    )
    plan = plan_cache(config, 1)
    assert [group.index for group in plan.groups] == [0, 1]
    assert plan.groups[0].layout.window_tokens == 105
    assert (plan.hash_tokens, plan.volatile_blocks) == (16, 1)


def both_sides(specs: dict[str, Any], **changes: Any) -> list[CacheConfig]:
    """Of one group: what vLLM gives a worker, a spec for each layer; and its scheduler, the first of them."""
    by_spec: dict[str, list[str]] = {}
    for name, spec in specs.items():
        by_spec.setdefault(repr(spec), []).append(name)
    tensors = [SimpleNamespace(layers=layers) for layers in by_spec.values()]
    block_size = next(iter(specs.values())).block_size
    each: list[Any] = [UniformTypeKVCacheSpecs(block_size, specs), next(iter(specs.values()))]
    return [CacheConfig([Group(spec, list(specs))], kv_cache_tensors=tensors, **changes) for spec in each]


def test_layers_whose_pages_differ_are_declined_by_workers_and_scheduler_alike() -> None:
    specs = {"latent": MLAAttentionSpec(16, 16 * 96), "index": MLAAttentionSpec(16, 16 * 32)}
    said = []
    for config in both_sides(specs):
        with pytest.raises(
            kvtier.UnsupportedError, match=r"group 0 .MLA.* pages differ in size or kind"
        ) as no:
            plan_cache(config, 1)
        said.append(str(no.value))
    assert said[0] == said[1]


def test_layers_that_are_alike_are_kept_whether_each_has_a_spec_or_all_have_one(weights: Path) -> None:
    specs = {name: MLAAttentionSpec(16, 16 * 96) for name in ("a", "b")}
    worker, scheduler = both_sides(specs, kv_tp_replicas=2)
    plan = plan_cache(worker, 2)
    assert plan == plan_cache(scheduler, 2)
    layout = plan.groups[0].layout
    assert (layout.num_layers, layout.page_bytes(0), layout.replicated) == (2, 16 * 96, True)
    config = vllm_config(weights)
    names = {model_identity(config, each, "0.32.0", "cpu") for each in (worker, scheduler)}
    assert len(names) == 1  # else no worker could join


def test_what_a_drafter_may_still_change_is_not_stored_whether_its_group_is_flagged_or_not() -> None:
    config = CacheConfig([Group(FullAttentionSpec(16, 1600), ["a"])])
    assert [plan_cache(config, 1, drafts=drafts).volatile_blocks for drafts in (False, True)] == [0, 1]


def test_groups_whose_pages_differ_share_the_larger_block() -> None:
    config = CacheConfig(
        [Group(FullAttentionSpec(16, 1600), ["a"]), Group(FullAttentionSpec(64, 640), ["b"])]
    )
    plan = plan_cache(config, 1)
    assert plan.block_tokens == 64
    assert [group.pages_per_block for group in plan.groups] == [4, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            CacheConfig([Group(MambaSpec(16, 64), ["m"])]),
            "group 0 .MambaSpec.*cannot restore yet; allowed: full",
        ),
        (CacheConfig([Group(RSWASpec(16, 64), ["m"])]), "RSWASpec.*cannot restore yet"),
        (
            CacheConfig([Group(FullAttentionSpec(16, 64, prefix_cacheable=False), ["m"])]),
            "does not cache prefixes",
        ),
        (CacheConfig([Group(FullAttentionSpec(16, 65), ["m"])]), "no multiple of its 16 tokens"),
        (CacheConfig([Group(FullAttentionSpec(16, 64), ["m"], host_resident=True)]), "host memory already"),
        (CacheConfig([Group(FullAttentionSpec(16, 64), ["m"])], kv_cache_layout="LHBNC"), "layout is LHBNC"),
        (CacheConfig([Group(FullAttentionSpec(16, 64), ["m"])], hash_block_size=12), "every 12 tokens"),
        (CacheConfig([]), "no KV cache"),
        (
            CacheConfig(
                [Group(SlidingWindowSpec(16, 64, 64), ["w"]), Group(FullAttentionSpec(32, 64), ["f"])]
            ),
            "pages of 16 tokens and another group of 32",
        ),
    ],
)
def test_what_cannot_be_restored_is_named(config: CacheConfig, message: str) -> None:
    with pytest.raises(kvtier.UnsupportedError, match=message):
        plan_cache(config, 1)


# --- identity ---


class HFConfig:
    """As transformers': the text is of its attributes."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def to_json_string(self) -> str:
        return json.dumps({name: value for name, value in vars(self).items() if name != "_commit_hash"})


def vllm_config(model: Path | str, **changes: Any) -> Any:
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model),
            revision=None,
            seed=0,
            hf_config=HFConfig(),
            dtype="torch.bfloat16",
            quantization=None,
            max_model_len=4096,
            original_max_model_len=4096,
            multimodal_config=SimpleNamespace(mm_processor_kwargs=None, video_pruning_rate=None),
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", prefix_caching_hash_algo="sha256_cbor"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
        attention_config=None,
    )
    for path, value in changes.items():
        owner, name = path.split("__")
        setattr(getattr(config, owner), name, value)
    return config


def identity(
    model: Path | str,
    *,
    backend: str = "cpu AVX512",
    version: str = "0.32.0",
    attention_config: Any = None,
    capability: str = "",
    **changes: Any,
) -> tuple[str, bytes]:
    cache = CacheConfig([Group(FullAttentionSpec(16, 64), ["a"])])
    config = vllm_config(model, **changes)
    config.attention_config = attention_config
    return model_identity(config, cache, version, backend), computed_as(config, capability)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    return folder


def test_everything_that_changes_the_bytes_changes_the_identity(weights: Path) -> None:
    changed = [
        identity(weights),
        identity(weights, backend="cpu AVX2"),
        identity(weights, version="0.33.0"),
        identity(weights, model_config__dtype="torch.float16"),
        identity(weights, model_config__quantization="fp8"),
        identity(weights, model_config__hf_config=HFConfig(rope_theta=1)),  # by whatever override
        identity(weights, model_config__max_model_len=8192),
        identity(weights, model_config__original_max_model_len=-1),
        identity(weights, model_config__code_revision="0e9e39f"),
        identity(weights, model_config__override_generation_config={"attn_temperature_tuning": True}),
        identity(weights, model_config__quantization_config={"linear": "fp8"}),
        identity(weights, model_config__multimodal_config=SimpleNamespace(mm_processor_kwargs={"crops": 4})),
        identity(weights, model_config__multimodal_config=SimpleNamespace(video_pruning_rate=0.5)),
        identity(weights, load_config__model_loader_extra_config={"pattern": "*.one"}),
        identity(weights, cache_config__cache_dtype="fp8"),
        identity(weights, cache_config__prefix_caching_hash_algo="xxhash"),
        identity(weights, parallel_config__tensor_parallel_size=2),
        identity(weights, load_config__load_format="dummy"),
        identity(weights, attention_config=SimpleNamespace(flash_attn_version=3)),
        identity(weights, attention_config=SimpleNamespace(backend_per_kind={"mla_attention": "FLASHMLA"})),
        identity(weights, capability="9.0"),
    ]
    assert len(set(changed)) == len(changed)
    assert identity(weights) == changed[0]
    file = weights / "model.safetensors"
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[150_000] ^= 1  # one bit, same size, same time of change
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity(weights) != changed[0]


def test_a_length_that_was_fitted_to_the_memory_is_not_that_of_another_start(weights: Path) -> None:
    """By then the model is built, with the length of before: two starts may fit another one."""
    fitted = {"model_config__original_max_model_len": -1}
    assert identity(weights, model_config__max_model_len=4096, **fitted) == identity(
        weights, model_config__max_model_len=2048, **fitted
    )


def test_workers_whose_model_has_rewritten_its_config_join_all_the_same(weights: Path) -> None:
    (scheduler, numbers), (worker, others) = (
        identity(weights, model_config__hf_config=HFConfig(**rewritten))
        for rewritten in ({}, {"attn_temperature_tuning": True})
    )
    assert scheduler == worker
    assert numbers != others


def test_an_override_that_is_a_function_counts_by_what_it_does(weights: Path) -> None:
    functions = [lambda config: config for _ in range(2)]  # as in two processes: elsewhere in memory
    first, second = (identity(weights, model_config__hf_overrides=each) for each in functions)
    assert first == second


def test_a_config_that_is_no_json_is_found_by_nobody_else(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = {"model_config__hf_config": HFConfig(strange=object())}
    assert identity(weights, **strange) != identity(weights, **strange)
    assert "after a restart nothing is found" in caplog.text


class Resolved(str):
    """huggingface_hub's ResolvedRevision: what was asked for, and the commit that it was then."""

    resolved: str

    def __new__(cls, asked: str, commit: str) -> "Resolved":
        made = super().__new__(cls, asked)
        made.resolved = commit
        return made


ONE, OTHER = "1a" * 20, "2b" * 20


def test_hub_models_are_named_by_commit(tmp_path: Path) -> None:
    def of(revision: str | None, **more: Any) -> tuple[str, bytes]:
        return identity("org/model", model_config__revision=revision, **more)

    assert of(Resolved("main", ONE)) == of(ONE) == of(Resolved("v1", ONE))
    assert of(Resolved("main", ONE)) != of(Resolved("main", OTHER))
    by_config = {"model_config__hf_config": HFConfig(_commit_hash=ONE)}
    assert of("main", **by_config) == of(None, **by_config) == of(ONE)
    assert of(OTHER, **by_config) == of(OTHER)
    assert of("main", **by_config, model_config__hf_config_path="org/other") != of(ONE)
    check_persistent(vllm_config("org/model", model_config__revision=Resolved("main", ONE)))
    check_persistent(vllm_config("org/model", model_config__revision="main", **by_config))
    for revision in (None, "main", "v1", ONE[:7], ONE.upper(), Resolved("main", "main")):
        with pytest.raises(
            kvtier.ConfigError,
            match=r"revision of 'org/model' is .*; allowed with a disk tier: a commit",
        ):
            check_persistent(vllm_config("org/model", model_config__revision=revision))
    assert weights_identity("meta-llama/Llama-3.1-8B", "0e9e39f") == "revision 0e9e39f"
    snapshot = tmp_path / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    assert weights_identity(str(snapshot), None) == f"snapshot {'ab' * 20}"


def lora(name: str, path: Path | str, number: int = 1) -> Any:
    return SimpleNamespace(lora_name=name, lora_path=str(path), lora_int_id=number)


def test_adapters_are_named_by_their_weights(tmp_path: Path) -> None:
    def adapter_at(name: str, content: bytes) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(content)
        return lora("sql", folder)

    one, other = adapter_at("one", b"1" * 100), adapter_at("other", b"2" * 100)
    loras = LoRAIdentity()
    assert loras.of(None) == b""
    assert loras.of(one) == loras.of(one) == LoRAIdentity().of(one)
    assert loras.of(one) != loras.of(other)


def test_an_adapter_of_a_hub_is_another_one_in_every_process() -> None:
    """Of what vLLM fetches for it nothing is known."""
    hub, loras = lora("hub", "org/hub"), LoRAIdentity()
    assert loras.of(hub) == loras.of(hub)
    assert loras.of(hub) != loras.of(lora("hub", "org/hub", 2))
    assert loras.of(hub) != LoRAIdentity().of(hub)


def test_an_adapter_that_is_overwritten_in_place_is_not_cached_until_it_is_loaded_as_another(
    tmp_path: Path,
) -> None:
    """vLLM goes on with what it has loaded. This test once wanted the files' new name for the old weights."""
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"1" * 100)
    folder, times, data = tmp_path.stat(), file.stat(), file.read_bytes()
    loras = LoRAIdentity()
    before = loras.of(lora("sql", tmp_path))
    with file.open("r+b") as handle:
        handle.write(b"2" * 100)
    os.utime(file, ns=(1, times.st_mtime_ns + 1))
    assert tmp_path.stat().st_mtime_ns == folder.st_mtime_ns
    for _ in range(2):
        with pytest.raises(kvtier.UnsupportedError, match=r"'sql' .* have changed .* number 1; allowed"):
            loras.of(lora("sql", tmp_path))
    after = loras.of(lora("sql", tmp_path, 2))
    assert after == loras.of(lora("sql", tmp_path, 2)) != before
    file.write_bytes(data)
    os.utime(file, ns=(1, times.st_mtime_ns))
    for number in (1, 2):  # meanwhile vLLM may have read the others
        with pytest.raises(kvtier.UnsupportedError):
            loras.of(lora("sql", tmp_path, number))
    assert LoRAIdentity().of(lora("sql", tmp_path, 3)) == before


def test_an_adapter_that_is_younger_than_the_server_is_its_own_until_the_next_start(tmp_path: Path) -> None:
    """vLLM may have loaded it long before the first request, and its files may have changed since."""
    loras = LoRAIdentity()
    loras._began_ns -= 10**9
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1" * 100)
    young = loras.of(lora("sql", tmp_path))
    assert young == loras.of(lora("sql", tmp_path))
    assert young != loras.of(lora("sql", tmp_path, 2))
    started_again = LoRAIdentity()
    started_again._began_ns += 10**9
    assert started_again.of(lora("sql", tmp_path)) == started_again.of(lora("sql", tmp_path, 2)) != young


def test_an_adapter_that_cannot_be_read_has_no_identity(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").symlink_to("/proc/self/mem")  # EIO, for root too
    with pytest.raises(OSError, match="Input/output error"):
        LoRAIdentity().of(lora("sql", tmp_path))
    for path in (str(tmp_path / "nothing"), "org/hub", "a\0b"):
        assert LoRAIdentity().of(lora("sql", path)).startswith(f"lora\0sql\0{path}\0".encode())


def test_no_more_adapters_are_remembered_than_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.adapters.vllm.identity._MOST_ADAPTERS", 2)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(b"1")
    loras = LoRAIdentity()
    found = [loras.of(lora(name, file)) for name in "abcab"]
    assert found[3:] == found[:2]
    assert len(loras._known) == 2


def test_a_digest_reads_one_file_too(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x" * 10)
    before = files_digest(file)
    file.write_bytes(b"x" * 11)
    assert files_digest(file) != before


def test_a_disk_needs_weights_with_identity_and_safe_hashes(weights: Path) -> None:
    check_persistent(vllm_config(weights))
    with pytest.raises(kvtier.ConfigError, match='load_format is "dummy"'):
        check_persistent(vllm_config(weights, load_config__load_format="dummy"))
    with pytest.raises(kvtier.ConfigError, match="prefix_caching_hash_algo is 'xxhash'; allowed"):
        check_persistent(vllm_config(weights, cache_config__prefix_caching_hash_algo="xxhash"))


def test_a_disk_takes_no_weights_that_are_in_no_digest(weights: Path, tmp_path: Path) -> None:
    for load_format in ("tensorizer", "ipc_cache", "mine"):
        with pytest.raises(
            kvtier.ConfigError, match=f'load_format is "{load_format}"; allowed .*safetensors'
        ):
            check_persistent(vllm_config(weights, load_config__load_format=load_format))
    with pytest.raises(kvtier.ConfigError, match="the weights are at 's3://bucket/model'; allowed"):
        check_persistent(vllm_config(weights, model_config__model_weights="s3://bucket/model"))
    (tmp_path / "config.json").write_text("{}")  # as vLLM pulls it from an object store
    with pytest.raises(kvtier.ConfigError, match=r"there are no weights in .*; allowed"):
        check_persistent(vllm_config(tmp_path))
    check_persistent(vllm_config(weights / "model.safetensors"))


# --- steps ---


def test_a_step_is_idle_when_it_computes_nothing_whichever_runner_says_so() -> None:
    computing, empty = SimpleNamespace(attn_metadata={}), SimpleNamespace(attn_metadata=None)
    assert not is_idle(computing, {})  # the first runner, in its forward pass
    assert is_idle(empty, {})  # either, in a step without one
    # The second one after its forward pass.
    assert not is_idle(empty, {"scheduler_output": object(), "num_tokens": 3})


# --- clocks and counters ---


def test_recompute_is_estimated_from_steps_that_compute_much() -> None:
    clock = RecomputeClock()
    assert clock.seconds(1000) == math.inf  # only max_wait bounds a wait before anything is known
    for i, tokens in enumerate([1000, 8, 8, 8]):
        clock.step(tokens, now=10.0 + 2 * i)
        clock.ended(
            now=11.0 + 2 * i
        )  # each took 1 s; the decodes say nothing about a prefill, nor does idling
    assert clock.seconds(500) == pytest.approx(0.5)
    clock.step(1000, now=20.0)
    clock.ended(now=23.0)
    assert clock.seconds(1000) == pytest.approx(1.5)


def test_steps_that_are_scheduled_ahead_take_turns() -> None:
    observed: list[tuple[int, float, float]] = []
    clock = RecomputeClock(lambda *step: observed.append(step))
    clock.step(1000, now=0.0, token_pairs=5.0)
    clock.step(2000, now=0.1)  # asynchronous scheduling
    clock.ended(now=1.0)
    clock.step(64, now=1.0)
    clock.ended(now=4.0)
    clock.ended(now=4.5)
    clock.ended(now=9.0)  # there is none
    assert observed == [(1000, 5.0, 1.0), (2000, 0.0, 3.0), (64, 0.0, 0.5)]


def test_a_step_whose_output_was_lost_is_forgotten() -> None:
    observed: list[tuple[int, float, float]] = []
    clock = RecomputeClock(lambda *step: observed.append(step))
    clock.step(1000, now=0.0)
    clock.step(2000, now=100.0)
    clock.ended(now=101.0)
    assert observed == [(2000, 0.0, 1.0)]


def test_counters_are_taken_once_and_add_up() -> None:
    counters = Counters()
    counters.add("load_blocks", 3)
    counters.add("load_blocks")
    counters.add("load_bytes", 0)
    assert counters.take() == {"load_blocks": 4}
    assert counters.take() == {}
    assert add_up({"a": 1, "b": 2}, {"b": 3}) == {"a": 1, "b": 5}
    with pytest.raises(KeyError):
        counters.add("lode_blocks")
