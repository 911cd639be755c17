"""The same tokens and logprobs whether a prefix was computed, found on the device, or restored."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import BLOCK, Result, Server, prompt, same, serving

from kvtier.engine import arena_of

pytestmark = pytest.mark.smoke

PROMPTS = [prompt(seed, 300 + 50 * seed) for seed in range(4)]
HITS = [(len(p) - 1) // BLOCK * BLOCK for p in PROMPTS]


def damage(server: Server) -> None:
    """Overwrites all that the host tier holds with other numbers."""
    arena = arena_of(server.scheduler._engine._native)
    numbers = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32).tobytes()
    size = os.fstat(arena["fd"]).st_size
    for at in range(0, size, len(numbers)):
        os.pwrite(arena["fd"], numbers[: size - at], at)


@pytest.fixture(scope="module")
def computed(llama: Path) -> list[Result]:
    with serving(llama, connector=False, enable_prefix_caching=False) as server:
        return server.generate(PROMPTS)


@pytest.fixture(scope="module")
def shared(llama: Path, computed: list[Result]) -> Iterator[Server]:  # computed: its engine has ended
    with serving(llama, extra={"host": "32MiB"}) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """Empty in every tier."""
    assert shared.llm.reset_prefix_cache(reset_connector=True)
    yield shared
    shared.check_empty()


def test_cold_device_and_restored_give_what_vllm_gives_without_us(
    server: Server, computed: list[Result]
) -> None:
    before = server.count("load_bytes")
    cold = server.generate(PROMPTS)
    assert [r.cached for r in cold] == [0] * 4
    device = server.generate(PROMPTS)
    assert [r.cached for r in device] == HITS
    assert server.count("load_bytes") == before
    server.forget_device()
    restored = server.generate(PROMPTS)
    assert [r.cached for r in restored] == HITS
    for results in (cold, device, restored):
        assert same(results, computed) == [True] * 4
    assert server.count("load_bytes") - before == sum(HITS) // BLOCK * server.scheduler._block_bytes[0]


def test_one_by_one_the_logprobs_are_the_device_caches_bit_for_bit(server: Server) -> None:
    for each in PROMPTS:  # one by one: the same batches, and so the same order of additions
        server.generate([each])
        (device,) = server.generate([each])
        server.forget_device()
        (restored,) = server.generate([each])
        assert restored.cached == device.cached > 0
        assert (restored.tokens, restored.logprobs) == (device.tokens, device.logprobs)


def test_the_restored_bytes_are_what_is_computed_with(server: Server) -> None:
    cold = server.generate(PROMPTS)
    server.forget_device()
    damage(server)
    restored = server.generate(PROMPTS)
    assert [r.cached for r in restored] == HITS
    assert same(restored, cold) == [False] * 4


def test_a_reset_of_the_connector_forgets_everything(server: Server) -> None:
    server.generate(PROMPTS)
    damage(server)  # had anything survived, it would show
    assert server.llm.reset_prefix_cache(reset_connector=True)
    again = server.generate(PROMPTS)
    assert [r.cached for r in again] == [0] * 4


def test_a_longer_prompt_loads_the_part_that_is_there(server: Server, computed: list[Result]) -> None:
    half = PROMPTS[3][:200]
    server.generate([half], tokens=1)
    server.forget_device()
    (result,) = server.generate([PROMPTS[3]])
    assert result.cached == 200 // BLOCK * BLOCK
    assert result.tokens == computed[3].tokens


def test_what_was_generated_is_found_by_the_next_turn(server: Server) -> None:
    (first,) = server.generate([PROMPTS[0]], tokens=2 * BLOCK)
    server.forget_device()
    turn = PROMPTS[0] + first.tokens + [5, 6, 7]
    (second,) = server.generate([turn])
    assert second.cached == (len(PROMPTS[0]) + len(first.tokens) - 1) // BLOCK * BLOCK
    server.llm.reset_prefix_cache(reset_connector=True)
    assert server.generate([turn])[0].tokens == second.tokens


def test_tenants_never_share(server: Server) -> None:
    def run(salt: str | None = None, namespace: str | None = None) -> int:
        server.forget_device()
        asked = {"prompt_token_ids": PROMPTS[0]} | ({"cache_salt": salt} if salt else {})
        params = {"kv_transfer_params": {"kvtier": {"namespace": namespace}}} if namespace else None
        (output,) = server.llm.generate([asked], server.params(1, extra_args=params), use_tqdm=False)
        return int(output.num_cached_tokens)

    tenants = [{}, {"salt": "a"}, {"salt": "b"}, {"namespace": "a"}, {"namespace": "b"}]
    assert [run(**tenant) for tenant in tenants] == [0] * 5
    assert [run(**tenant) for tenant in tenants] == [HITS[0]] * 5


def test_a_request_says_how_much_is_loaded_and_stored(server: Server) -> None:
    def cached(**options: object) -> int:
        server.forget_device()
        params = {"kv_transfer_params": {"kvtier": options}}
        (output,) = server.llm.generate(
            [{"prompt_token_ids": PROMPTS[0]}], server.params(1, extra_args=params), use_tqdm=False
        )
        return int(output.num_cached_tokens)

    assert cached(max_store_tokens=3 * BLOCK) == 0
    assert cached(max_store_tokens=0) == 3 * BLOCK
    assert cached(max_load_tokens=2 * BLOCK, max_store_tokens=0) == 2 * BLOCK
    assert cached(tiers=["disk"], max_store_tokens=0) == 0
    assert cached(nonsense=1) == 0  # not understood: neither loaded nor stored, and the server lives
    assert cached(max_store_tokens=0) == 3 * BLOCK


def test_a_step_with_nothing_to_do_is_cheap(server: Server) -> None:
    class Output:
        total_num_scheduled_tokens = 0
        num_scheduled_tokens: dict[str, int] = {}  # noqa: RUF012 - never changed

    import time

    steps = 2000
    begin = time.thread_time()
    for _ in range(steps):
        server.scheduler.step(Output)
        server.scheduler.received(set(), set())
    assert (time.thread_time() - begin) / steps < 20e-6
