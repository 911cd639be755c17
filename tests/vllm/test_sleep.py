"""Sleep mode: a server that unmaps its pages is refused; one that only pauses goes on as before."""

from pathlib import Path
from typing import Any

import pytest
from harness import BLOCK, Server, prompt, same, serving
from test_identity import damage

PROMPTS = [prompt(seed, 400 + 50 * seed) for seed in range(3)]
HITS = [(len(p) - 1) // BLOCK * BLOCK for p in PROMPTS]


def test_sleep_mode_is_refused_with_one_message(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of vLLM's CPU platform it is said that it has one, as a GPU's has: else vLLM itself would refuse."""
    from vllm.platforms import current_platform

    from kvtier.errors import UnsupportedError

    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda _: True)
    with pytest.raises(UnsupportedError, match="enable_sleep_mode is true; allowed with kvtier: false"):
        serving(llama, enable_sleep_mode=True).__enter__()


def test_nothing_of_before_is_served_after_a_sleep(llama: Path) -> None:
    with serving(llama) as server:
        cold = server.generate(PROMPTS)
        server.llm.sleep(level=1)  # on the CPU the pages stay; vLLM resets every cache, ours too
        damage(server)  # had anything survived, it would show
        assert server.llm.llm_engine.engine_core.is_sleeping()
        server.llm.wake_up()
        again = server.generate(PROMPTS)
        assert [r.cached for r in again] == [0] * 3
        assert same(again, cold) == [True] * 3
        assert server.count("resets") == 1
        server.forget_device()
        restored = server.generate(PROMPTS)
        assert [r.cached for r in restored] == HITS
        assert same(restored, cold) == [True] * 3
        server.drain()
        server.check_empty()


def sleeps(server: Server, level: int, mode: Any) -> bool:
    """Whether vLLM did as it was told. It refuses while a request that is to be kept is just being loaded."""
    try:
        server.llm.sleep(level=level, mode=mode)
    except RuntimeError as error:
        if (level, mode) != (1, "keep") or "waiting for remote KV transfer" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize(("level", "mode"), [(0, "abort"), (1, "abort"), (0, "keep"), (1, "keep")])
def test_a_sleep_in_the_middle_of_loads_and_stores(llama: Path, level: int, mode: Any) -> None:
    with serving(llama, max_num_batched_tokens=128) as server:
        cold = server.generate(PROMPTS)
        engine = server.llm.llm_engine
        for steps in range(1, 12, 2):
            server.forget_device()
            names = [f"{steps}-{n}" for n in range(len(PROMPTS) + 1)]
            for name, each in zip(names, [*PROMPTS, prompt(10 + steps, 500)], strict=True):
                engine.add_request(name, {"prompt_token_ids": each}, server.params(8))
            finished = {}
            for _ in range(steps):
                finished |= {o.request_id: o for o in engine.step() if o.finished}
            while not sleeps(server, level, mode):
                server.llm.wake_up()
                finished |= {o.request_id: o for o in engine.step() if o.finished}
            server.llm.wake_up()
            if mode == "abort":  # an engine in this process does not tell its client
                engine.abort_request(names)
            finished |= server.drain()
            server.check_empty()
            if mode == "keep":
                found = [list(finished[name].outputs[0].token_ids) for name in names[: len(PROMPTS)]]
                assert found == [r.tokens for r in cold]
            assert same(server.generate(PROMPTS), cold) == [True] * 3
        assert server.count("load_requests") > 0
        assert server.count("resets") == (6 if level else 0)
        server.drain()
        server.check_empty()
