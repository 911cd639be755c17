"""What a request may ask for, where hits are said to come from, and KV events."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from harness import BEFORE_0_32, BLOCK, Result, Server, prompt, same, serving
from run_life import disk

PROMPT = prompt(2, 500)
HIT = 499 // BLOCK * BLOCK


def ask(server: Server, tokens: int = 8, prompt_ids: list[int] = PROMPT, **options: Any) -> Result:
    """One request with such options, on an empty device."""
    server.forget_device()
    params = {"kv_transfer_params": {"kvtier": options}} if options else None
    (result,) = server.generate([prompt_ids], tokens, extra_args=params)
    return result


def sources(server: Server) -> dict[str, float]:
    """Where vLLM says that prompt tokens came from."""
    name = "vllm:prompt_tokens_cached_by_source"
    return {m.labels["source"]: m.value for m in server.llm.get_metrics() if m.name.startswith(name)}


def test_what_a_request_asks_for_is_done(llama: Path, tmp_path: Path) -> None:
    extra = disk(tmp_path / "disk")
    with serving(llama, extra=extra) as server:
        cold = ask(server)
        assert server.scheduler._engine.flush(60).durable >= HIT // BLOCK
    with serving(llama, extra=extra) as server:
        engine = server.scheduler._engine
        assert ask(server, tiers=["host"], max_store_tokens=0).cached == 0  # it is on disk alone
        before = server.count("hit_tokens_disk")
        prefetched = ask(server, tokens=1, prefetch_only=True)
        assert prefetched.cached == HIT
        assert server.count("hit_tokens_disk") == before + HIT
        assert ask(server, tiers=["host"]).cached == HIT  # now it is in host memory
        assert ask(server, max_load_tokens=2 * BLOCK).cached == 2 * BLOCK
        assert ask(server, tiers=[]).cached == 0
        assert ask(server, namespace="other").cached == 0
        assert ask(server, priority=1).cached == 0  # not offered: served, not cached
        pinned = ask(server, pin=600)
        assert (pinned.tokens, pinned.cached) == (cold.tokens, HIT)
        server.scheduler.settle()
        pins = engine.stats().pinned_blocks
        assert pins >= HIT // BLOCK
        for n in range(30):  # more than the host tier holds
            server.generate([prompt(20 + n, 600)], 1)
        assert engine.stats().evictions > 0
        restored = ask(server, tiers=["host"])
        assert (restored.tokens, restored.cached) == (cold.tokens, HIT)
        assert server.llm.reset_prefix_cache(reset_connector=True)
        server.drain()
        server.check_empty()  # a reset ends pins too


@pytest.mark.skipif(BEFORE_0_32, reason="vLLM asks for tiers from 0.32 on")
def test_hits_are_said_to_come_from_the_tier_that_had_them(llama: Path, tmp_path: Path) -> None:
    extra = disk(tmp_path / "disk")
    with serving(llama, extra=extra) as server:
        ask(server)
        server.scheduler._engine.flush(60)
        assert ask(server).cached == HIT
        found = sources(server)
        assert (found["host"], found.get("disk", 0)) == (HIT, 0)
    with serving(llama, extra=extra) as server:
        assert ask(server).cached == HIT
        found = sources(server)
        assert (found["disk"], found.get("host", 0)) == (HIT, 0)


def test_events_tell_what_is_stored_and_what_a_request_finds_after_a_restart(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import KVEventsConfig
    from vllm.distributed.kv_events import AllBlocksCleared, BlockStored

    extra = disk(tmp_path / "disk")
    options = {"kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null")}

    def listen(server: Server) -> list[Any]:
        heard: list[Any] = []
        connector = server.vllm_scheduler.connector
        take = connector.take_events

        def tee() -> list[Any]:
            events = list(take())
            heard.extend(events)
            return events

        monkeypatch.setattr(connector, "take_events", tee)
        return heard

    def told(heard: list[Any], medium: str) -> dict[Any, list[int]]:
        """Tokens of each block, by its hash."""
        blocks = {}
        for event in heard:
            if isinstance(event, BlockStored) and event.medium == medium:
                assert event.block_size == BLOCK
                assert event.kv_cache_spec_kind == "full_attention"
                assert len(event.token_ids) == BLOCK * len(event.block_hashes)
                for n, each in enumerate(event.block_hashes):
                    blocks[each] = event.token_ids[n * BLOCK : (n + 1) * BLOCK]
        return blocks

    with serving(llama, extra=extra, **options) as server:
        heard = listen(server)
        cold = ask(server)
        server.drain()
        server.scheduler.settle()
        list(server.vllm_scheduler.connector.take_events())
        stored = told(heard, "CPU")
        answered = (PROMPT + cold.tokens)[: (500 + 8 - 1) // BLOCK * BLOCK]
        assert list(chain.from_iterable(stored.values())) == answered
        server.scheduler._engine.flush(60)
    with serving(llama, extra=extra, **options) as server:
        heard = listen(server)
        again = ask(server)
        assert same([again], [cold]) == [True]
        found = told(heard, "STORAGE")
        assert list(chain.from_iterable(found.values())) == PROMPT[:HIT]
        assert found.items() <= stored.items()
        server.forget_device()
        asked: list[Any] = [{"prompt_token_ids": PROMPT, "cache_salt": "pepper"}]
        server.llm.generate(asked, server.params(1), use_tqdm=False)
        server.drain()
        list(server.vllm_scheduler.connector.take_events())
        stored_now = [event for event in heard if isinstance(event, BlockStored) and event.medium == "CPU"]
        salted = [event.extra_keys for event in stored_now if event.extra_keys]
        assert salted == [[("pepper",)] + [None] * (HIT // BLOCK - 1)]
        server.llm.reset_prefix_cache(reset_connector=True)
        ask(server, tokens=1, tiers=[])
        assert any(isinstance(event, AllBlocksCleared) for event in heard)
