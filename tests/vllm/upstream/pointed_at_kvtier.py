"""A pytest plugin: vLLM's own connector tests, of its source distribution, with our classes in place of its.

Where they name a connector they get KVTierConnector. Where they say by a mock what a connector promises, ours
is behind the mock and gets every call that the test does not answer itself: so it is granted loads that it
never promised. Where they drive vLLM's file tier they drive KVTierSecondaryTier.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

MODEL = "facebook/opt-125m"  # the tests' default; a config is all they read of it
REPLACED = ("ExampleConnector", "NixlConnector", "SimpleCPUOffloadConnector")
KEPT = {"test_hma_auto_config": "ExampleConnector"}  # needs one that does not do what ours does

made: list[Any] = []  # our connectors, in the test that runs
theirs: dict[str, Any] = {}


def pytest_configure() -> None:
    write_config(Path(os.environ["HF_HOME"]))
    from tests.v1.kv_connector.unit import utils
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from kvtier.adapters.vllm.connector import KVTierConnector

    class Ours(KVTierConnector):
        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
            vllm_config.kv_transfer_config.kv_connector_extra_config = {"host": "8MiB"}
            super().__init__(vllm_config, role, kv_cache_config)
            made.append(self)

        def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
            KVTierConnector.get_num_new_matched_tokens(self, request, 0)  # where the test has answered for us
            super().update_state_after_alloc(request, blocks, num_external_tokens)

    mock = utils.MockKVConnector

    class OursPromising(Ours):
        """Promises what the test says; the rest is ours."""

        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
            self.config = utils.MockKVConfig(**vllm_config.kv_transfer_config.kv_connector_extra_config)
            self._defers_left = defaultdict(lambda: self.config.num_defers_before_matching)
            super().__init__(vllm_config, role, kv_cache_config)

        supports_divergent_local_hybrid_hits = mock.supports_divergent_local_hybrid_hits
        get_num_new_matched_tokens = mock.get_num_new_matched_tokens

        def build_connector_meta(self, scheduler_output: Any) -> Any:
            ours = super().build_connector_meta(scheduler_output)
            ours.requests = mock.build_connector_meta(self, scheduler_output).requests  # the tests read these
            return ours

    for name in REPLACED:
        theirs[name] = KVConnectorFactory._registry[name]
        KVConnectorFactory._registry[name] = lambda: Ours
    KVConnectorFactory._registry["MockKVConnector"] = lambda: OursPromising
    utils.ExampleConnector = Ours  # TestExampleConnector records what is called on it
    utils.create_mock_connector = mocked


def mocked() -> Mock:
    """In place of a mock: one that passes on to our connector, of the scheduler that was built last."""
    return Mock(wraps=made[-1])


@pytest.fixture(autouse=True)
def ours_are_closed() -> Iterator[None]:
    yield
    while made:
        made.pop().shutdown()


@pytest.fixture(autouse=True)
def one_is_kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    name = KEPT.get(request.module.__name__.rpartition(".")[2])
    if name is not None:
        monkeypatch.setitem(KVConnectorFactory._registry, name, theirs[name])


@pytest.fixture(autouse=True)
def our_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In test_fs_tier.py."""
    module = request.module
    if not hasattr(module, "FileSystemTierManager"):
        return
    from vllm.v1.kv_offload.base import LookupResult, make_offload_key

    from kvtier.adapters.vllm_tier import KVTierSecondaryTier

    class Tier(KVTierSecondaryTier):
        def __init__(
            self, offloading_spec: Any, primary_kv_view: Any, tier_type: str, root_dir: str, **_: Any
        ) -> None:
            offloading_spec.num_chunks = primary_kv_view.shape[0]
            super().__init__(
                offloading_spec,
                primary_kv_view,
                tier_type,
                disk=[{"path": f"{root_dir}/kvtier", "capacity": "128MiB"}],
                host="64MiB",
                identity="upstream",
            )
            self.file_mapper = Mock()
            self.file_mapper.get_file_name = self._file_of
            self._file = root_dir

        drain_jobs = KVTierSecondaryTier._drain  # their tests wait by it; vLLM itself resets by it

        def _file_of(self, key: Any) -> str:
            found = self.lookup(key, module._CTX) == LookupResult.HIT
            return self._file if found else f"{self._file}/none"

    def lookup_and_wait(tier: Any, keys: Any, ctx: Any = module._CTX, timeout: float = 1.0) -> list[Any]:
        return [tier.lookup(key, ctx) for key in keys]

    monkeypatch.setattr(module, "FileSystemTierManager", Tier)
    monkeypatch.setattr(module, "lookup_and_wait", lookup_and_wait)  # theirs looks into vLLM's tier
    # As long as those of SHA-256, which alone are kept.
    monkeypatch.setattr(module, "key", lambda n: make_offload_key(n.to_bytes(32, "big"), 0))


def write_config(home: Path) -> None:
    """A hub cache that holds the config of MODEL alone, as huggingface_hub lays it out."""
    folder = home / "hub" / f"models--{MODEL.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(snapshot.name)
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "word_embed_proj_dim": 768,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "torch_dtype": "float16",
    }
    (snapshot / "config.json").write_text(json.dumps(config))
