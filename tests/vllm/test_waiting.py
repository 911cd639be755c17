"""Waiting for blocks that are being stored; a load that fails where nothing may be recomputed."""

from pathlib import Path

import pytest
from harness import BLOCK, prompt, same, serving
from test_pressure import PROMPTS, SlowStores


def test_blocks_that_are_being_stored_are_waited_for_but_not_long(llama: Path) -> None:
    with serving(llama, enable_prefix_caching=False, extra={"max_wait": 0.5}) as server:
        long = prompt(3, 1500)
        (cold,) = server.generate([long], 1)
        server.llm.reset_prefix_cache(reset_connector=True)
        server.generate([prompt(4, 1500)], 1)  # now it knows how fast this machine computes
        slow = SlowStores(server, steps=10**9)  # stores that never begin
        server.generate([long], 1)
        asked, loads = server.count("ask_again"), server.count("load_requests")
        (again,) = server.generate([long], 1)
        assert server.count("ask_again") > asked
        assert again.tokens == cold.tokens
        assert again.cached == 0
        assert server.count("load_requests") == loads
        slow.restore()
        server.drain()
        (restored,) = server.generate([long], 1)
        assert restored.cached == 1499 // BLOCK * BLOCK
        assert restored.tokens == cold.tokens


def test_policy_fail_fails_the_request_and_not_the_server(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(llama, policy="fail") as server:
        (cold,) = server.generate(PROMPTS[:1])
        server.forget_device()
        with monkeypatch.context() as patch:
            patch.setattr(server.worker, "_execute", lambda copy: None)
            engine = server.llm.llm_engine
            engine.add_request("failing", {"prompt_token_ids": PROMPTS[0]}, server.params(4))
            outputs = server.drain()
        assert outputs["failing"].outputs[0].finish_reason == "error"
        assert same(server.generate(PROMPTS[:1]), [cold]) == [True]
