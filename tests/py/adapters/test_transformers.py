"""The transformers cache class: what comes back is bit by bit what a model computed."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvtier

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import BartConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig  # noqa: E402

from kvtier.adapters.transformers import KVTierCache, layout_of  # noqa: E402

BLOCK = 16
PREFIX = 4 * BLOCK
SUFFIX = 9


def tiny_config(**changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaConfig(**values | changes)


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(tiny_config()).eval()


def engine_for(model: Any, *, page_tokens: int = BLOCK, blocks: int = 64) -> kvtier.Engine:
    layout = layout_of(model, page_tokens=page_tokens)
    host = blocks * (layout.block_bytes(BLOCK) + 8192)
    return kvtier.open(kvtier.Config(groups=[layout], block_tokens=BLOCK, model="tiny@0", host=host))


@pytest.fixture
def engine(model: Any) -> Iterator[kvtier.Engine]:
    with engine_for(model) as engine:
        yield engine


def prompt(seed: int, length: int = PREFIX + SUFFIX) -> Any:
    return np.random.default_rng(seed).integers(0, 128, length).astype(np.int32)


def compute(model: Any, cache: Any, ids: Any, begin: int) -> Any:
    """Next-token logits; the pieces end at PREFIX and at the end, as they would without a cache."""
    logits = None
    with torch.inference_mode():
        for first, last in ((begin, min(PREFIX, len(ids))), (max(begin, PREFIX), len(ids))):
            if first < last:
                batch = torch.from_numpy(ids[first:last].astype(np.int64))[None]
                logits = model(batch, past_key_values=cache, use_cache=True).logits[0, -1]
    return logits


@pytest.mark.parametrize("page_tokens", [4, BLOCK, 2 * BLOCK])
def test_a_restored_prefix_gives_identical_logits_and_a_damaged_one_does_not(
    model: Any, page_tokens: int
) -> None:
    ids = prompt(1)
    with engine_for(model, page_tokens=page_tokens) as engine:
        with KVTierCache(engine, model, capacity=len(ids)) as cache:
            assert cache.restore(ids) == 0
            cold = compute(model, cache, ids, 0)
            assert cache.save(ids).result().stored == PREFIX // BLOCK

        with KVTierCache(engine, model, capacity=len(ids)) as cache:  # other buffers, other addresses
            assert cache.restore(ids) == PREFIX == cache.num_tokens == cache.get_seq_length()
            assert torch.equal(compute(model, cache, ids, PREFIX), cold)

            assert cache.restore(ids) == PREFIX
            cache.layers[1].values[:, :, BLOCK : 2 * BLOCK].neg_()
            damaged = compute(model, cache, ids, PREFIX)
            assert torch.isfinite(damaged).all()
            assert not torch.equal(damaged, cold)


def test_it_computes_what_transformers_own_cache_does(model: Any, engine: kvtier.Engine) -> None:
    ids = prompt(2)
    with KVTierCache(engine, model, capacity=len(ids)) as cache:
        ours = compute(model, cache, ids, 0)
    theirs = compute(model, DynamicCache(config=model.config), ids, 0)
    torch.testing.assert_close(ours, theirs)


def test_only_the_common_prefix_is_restored(model: Any, engine: kvtier.Engine) -> None:
    ids = prompt(3)
    other = ids.copy()
    other[2 * BLOCK + 5] ^= 1  # in the third block
    with KVTierCache(engine, model, capacity=len(ids)) as cache:
        compute(model, cache, ids, 0)
        cache.save(ids).wait()
        assert cache.restore(other) == 2 * BLOCK
        restored = compute(model, cache, other, 2 * BLOCK)
        cache.reset()
        torch.testing.assert_close(restored, compute(model, cache, other, 0))


def test_the_last_token_is_always_left_to_the_model(model: Any, engine: kvtier.Engine) -> None:
    ids = prompt(4, PREFIX)  # whole blocks, all of them saved
    with KVTierCache(engine, model, capacity=PREFIX) as cache:
        compute(model, cache, ids, 0)
        cache.save(ids).wait()
        assert cache.restore(ids) == PREFIX - BLOCK
        assert cache.restore(np.append(ids, 1)) == PREFIX
        assert cache.restore(ids[:1]) == cache.restore(ids[:0]) == 0


def test_conversations_do_not_mix(model: Any, engine: kvtier.Engine) -> None:
    prompts = [prompt(10 + i) for i in range(4)]
    with KVTierCache(engine, model, capacity=PREFIX + SUFFIX) as cache:
        cold = []
        for ids in prompts:
            assert cache.restore(ids) == 0  # waits until the save before has read the buffers
            cold.append(compute(model, cache, ids, 0))
            cache.save(ids)
        engine.flush()
        for i in (2, 0, 3, 1):
            assert cache.restore(prompts[i]) == PREFIX
            assert torch.equal(compute(model, cache, prompts[i], PREFIX), cold[i])


def test_namespaces_and_extra_separate(model: Any, engine: kvtier.Engine) -> None:
    ids = prompt(5)
    with KVTierCache(engine, model, len(ids), namespace="a") as cache:
        compute(model, cache, ids, 0)
        cache.save(ids).wait()
        assert cache.restore(ids) == PREFIX
    for options in ({"namespace": "b"}, {"namespace": "a", "extra": b"lora"}):
        with KVTierCache(engine, model, len(ids), **options) as cache:
            assert cache.restore(ids) == 0
    assert engine.drop(namespace="a") == PREFIX // BLOCK


def test_evicted_blocks_are_computed_again(model: Any) -> None:
    first, second = prompt(6), prompt(7)
    with engine_for(model, blocks=5) as engine, KVTierCache(engine, model, PREFIX + SUFFIX) as cache:
        cold = compute(model, cache, first, 0)
        cache.save(first).wait()
        cache.reset()
        compute(model, cache, second, 0)
        cache.save(second).wait()
        restored = cache.restore(first)
        assert restored < PREFIX
        torch.testing.assert_close(compute(model, cache, first, restored), cold)


def test_a_sequence_may_grow_turn_by_turn(model: Any, engine: kvtier.Engine) -> None:
    ids = prompt(8, 3 * PREFIX)
    with KVTierCache(engine, model, capacity=len(ids)) as cache:
        for end in (PREFIX, 2 * PREFIX, 3 * PREFIX):
            known = cache.restore(ids[:end])
            assert known == max(0, end - PREFIX)
            with torch.inference_mode():
                model(torch.from_numpy(ids[known:end].astype(np.int64))[None], past_key_values=cache)
            result = cache.save(ids[:end]).result()
            assert (result.present, result.stored) == (known // BLOCK, PREFIX // BLOCK)


def test_generate_continues_behind_a_restored_prefix(model: Any, engine: kvtier.Engine) -> None:
    ids = prompt(9)
    batch = torch.from_numpy(ids.astype(np.int64))[None]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(batch, **options)
    with KVTierCache(engine, model, capacity=len(ids) + 8) as cache:
        compute(model, cache, ids, 0)
        cache.save(ids).wait()
        assert cache.restore(batch) == PREFIX
        assert torch.equal(model.generate(batch, past_key_values=cache, **options), expected)


def test_crop_forgets_the_end(model: Any, engine: kvtier.Engine) -> None:
    ids = prompt(11)
    with KVTierCache(engine, model, capacity=len(ids)) as cache:
        cold = compute(model, cache, ids, 0)
        cache.crop(-SUFFIX)
        assert cache.num_tokens == PREFIX
        assert torch.equal(compute(model, cache, ids, PREFIX), cold)
        with pytest.raises(ValueError, match="positive"):
            cache.crop(5)


def test_saving_less_than_a_block_saves_nothing(model: Any, engine: kvtier.Engine) -> None:
    ids = prompt(12, BLOCK - 1)
    with KVTierCache(engine, model, capacity=BLOCK) as cache:
        compute(model, cache, ids, 0)
        assert cache.save(ids).result().stored == 0
        assert cache.save(prompt(12, 5 * BLOCK)).result().stored == 0  # the model has not seen these


def test_one_sequence_only(model: Any, engine: kvtier.Engine) -> None:
    with KVTierCache(engine, model, capacity=BLOCK) as cache:
        with pytest.raises(kvtier.UnsupportedError, match="batch of 2"), torch.inference_mode():
            model(torch.zeros((2, 4), dtype=torch.int64), past_key_values=cache)
        with pytest.raises(kvtier.UnsupportedError, match="batch of 2"):
            cache.restore(np.zeros((2, 4), np.int32))
        with pytest.raises(kvtier.UnsupportedError, match="one sequence"):
            cache.batch_repeat_interleave(2)
        with pytest.raises(kvtier.UnsupportedError, match="one sequence"):
            cache.reorder_cache(torch.tensor([0]))


def test_what_is_beyond_the_capacity_is_refused(model: Any, engine: kvtier.Engine) -> None:
    with KVTierCache(engine, model, capacity=BLOCK - 3) as cache:
        assert cache.capacity == BLOCK == cache.get_max_length()
        with pytest.raises(kvtier.ResourceError, match="no room for 17"):
            compute(model, cache, prompt(0, BLOCK + 1), 0)


def test_engines_of_other_models_are_refused(model: Any, engine: kvtier.Engine) -> None:
    with pytest.raises(kvtier.ConfigError, match="this model's cache"):
        KVTierCache(engine, tiny_config(num_hidden_layers=3), capacity=BLOCK)
    with pytest.raises(kvtier.ConfigError, match="capacity=0"):
        KVTierCache(engine, model, capacity=0)


def test_models_without_full_attention_are_refused() -> None:
    with pytest.raises(kvtier.UnsupportedError, match="sliding_attention"):
        layout_of(MistralConfig(sliding_window=64), page_tokens=BLOCK)


@pytest.mark.parametrize(
    ("rope", "kind"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, "dynamic"),
        ({"rope_type": "longrope"}, "longrope"),
        ({"type": "su"}, "su"),
        ({"full_attention": {"rope_type": "default"}, "other": {"rope_type": "my_dynamic"}}, "my_dynamic"),
    ],
)
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_models_whose_keys_depend_on_the_prompt_s_length_are_refused(
    name: str, rope: dict[str, Any], kind: str
) -> None:
    config = SimpleNamespace(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, dtype=torch.float32, **{name: rope}
    )
    with pytest.raises(kvtier.UnsupportedError, match=f"{name} of rope_type '{kind}'"):
        layout_of(config, page_tokens=BLOCK)


def test_a_real_configuration_with_dynamic_positions_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    with pytest.raises(kvtier.UnsupportedError, match="'dynamic'"):
        layout_of(tiny_config(rope_parameters=rope), page_tokens=BLOCK)
    rope["rope_type"] = "linear"  # the same at every length
    layout_of(tiny_config(rope_parameters=rope), page_tokens=BLOCK)


def test_models_with_an_encoder_are_refused(engine: kvtier.Engine) -> None:
    config = BartConfig(d_model=32, decoder_layers=2, decoder_attention_heads=4)
    for model in (config, SimpleNamespace(config=config)):
        with pytest.raises(kvtier.UnsupportedError, match="has an encoder"):
            layout_of(model, page_tokens=BLOCK)
        with pytest.raises(kvtier.UnsupportedError, match="has an encoder"):
            KVTierCache(engine, model, capacity=BLOCK)


class Watched:
    """An engine that notes the streams it is given, and may be interrupted as Ctrl-C does."""

    def __init__(self, engine: kvtier.Engine) -> None:
        self.engine = engine
        self.streams: list[Any] = []
        self.after: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def load(self, *args: Any, stream: Any = None, **options: Any) -> Any:
        return self._begin(self.engine.load(*args, **options), stream)

    def store(self, *args: Any, stream: Any = None, **options: Any) -> Any:
        return self._begin(self.engine.store(*args, **options), stream)

    def _begin(self, ticket: Any, stream: Any) -> Any:
        self.streams.append(stream)
        if self.after is not None:
            raise self.after
        return ticket


def test_transfers_follow_torch_s_current_stream(
    model: Any, engine: kvtier.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(13)
    asked = []

    def current_stream(device: Any) -> str:
        asked.append(device)
        return f"stream {len(asked)}"

    watched: Any = Watched(engine)
    with KVTierCache(watched, model, capacity=len(ids)) as cache:
        monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
        compute(model, cache, ids, 0)
        cache.save(ids).wait()
        assert cache.restore(ids) == PREFIX
        assert (watched.streams, asked) == ([None, None], [])  # the CPU has none

        for layer in cache.layers:
            layer.device = torch.device("cuda", 1)  # there need not be one: the buffers stay where they are
        cache.save(ids).wait()
        assert cache.restore(ids) == PREFIX
        assert watched.streams[2:] == ["stream 1", "stream 2"]  # the current one of each call
        assert asked == [torch.device("cuda", 1)] * 2


class Interrupted:
    """A ticket whose first wait for `released` is ended by Ctrl-C."""

    def __init__(self) -> None:
        self.released = self
        self.waits = 0

    def wait(self) -> None:
        self.waits += 1
        if self.waits == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("use", ["restore", "save", "reset", "crop", "model"])
def test_whatever_follows_an_interrupted_restore_waits_for_its_copies(
    model: Any, engine: kvtier.Engine, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    ids = prompt(14)
    with KVTierCache(engine, model, capacity=len(ids)) as cache:
        compute(model, cache, ids, 0)
        cache.save(ids).wait()
        ticket = Interrupted()
        with monkeypatch.context() as patch:
            patch.setattr(engine, "load", lambda *_, **__: ticket)
            with pytest.raises(KeyboardInterrupt):
                cache.restore(ids)
        assert (ticket.waits, cache.num_tokens) == (1, 0)
        uses = {
            "restore": lambda: cache.restore(ids),
            "save": lambda: cache.save(ids),
            "reset": cache.reset,
            "crop": lambda: cache.crop(0),
            "model": lambda: compute(model, cache, ids, 0),
        }
        uses[use]()
        assert ticket.waits == 2
        cache.reset()
        assert ticket.waits == 2  # it is over


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_transfer_whose_ticket_was_lost_is_waited_for_too(
    model: Any, engine: kvtier.Engine, stop: type[BaseException]
) -> None:
    ids = prompt(15)
    watched: Any = Watched(engine)
    with KVTierCache(watched, model, capacity=len(ids)) as cache:
        cold = compute(model, cache, ids, 0)
        for transfer in (cache.save, cache.restore):
            watched.after = stop()
            before = cache._pages
            with pytest.raises(stop):
                transfer(ids)
            watched.after = None
            cache.reset()
            assert cache._pages is not before  # detached, which waits, and attached again
            with pytest.raises(kvtier.ClosedError):
                engine.store(np.zeros((0, 32), np.uint8), before, [])
        assert cache.restore(ids) == PREFIX
        assert torch.equal(compute(model, cache, ids, PREFIX), cold)
    with pytest.raises(kvtier.ClosedError):
        cache.save(ids)  # closed is closed


def test_another_dtype_than_the_layout_is_refused(model: Any) -> None:
    layout = layout_of(model, page_tokens=BLOCK, dtype="bfloat16")
    config = kvtier.Config(groups=[layout], block_tokens=BLOCK, model="tiny@0", host="1MiB")
    refused = pytest.raises(kvtier.UnsupportedError, match="float32")
    with kvtier.open(config) as engine, KVTierCache(engine, model, capacity=BLOCK) as cache, refused:
        compute(model, cache, prompt(0, 4), 0)


def test_nothing_of_the_model_keeps_gradients(model: Any, engine: kvtier.Engine) -> None:
    with KVTierCache(engine, model, capacity=BLOCK) as cache:
        model(torch.zeros((1, 4), dtype=torch.int64), past_key_values=cache)  # outside of inference_mode
        assert not cache.layers[0].keys.requires_grad
