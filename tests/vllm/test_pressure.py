"""A device cache of a few dozen blocks: eviction, preemption, chunked prefill, aborts, slow stores."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from harness import Result, Server, prompt, same, serving

SMALL: dict[str, Any] = {
    "num_gpu_blocks_override": 40,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,  # chunked prefill
    "max_num_seqs": 8,
}
PROMPTS = [prompt(seed, 260 + 20 * seed) for seed in range(8)]
TOKENS = 100


@pytest.fixture(scope="module")
def both_turns(llama: Path) -> tuple[list[Result], list[Result]]:
    with serving(llama, connector=False, enable_prefix_caching=False) as server:
        first = server.generate(PROMPTS, TOKENS)
        return first, server.generate(next_turn(first))


@pytest.fixture(scope="module")
def computed(both_turns: tuple[list[Result], list[Result]]) -> list[Result]:
    return both_turns[0]


@pytest.fixture(scope="module")
def computed_next(both_turns: tuple[list[Result], list[Result]]) -> list[Result]:
    return both_turns[1]


def next_turn(results: list[Result]) -> list[list[int]]:
    """What the users say next: all that stands there, and a few words."""
    return [p + r.tokens + [9, 8, 7] for p, r in zip(PROMPTS, results, strict=True)]


@pytest.fixture(scope="module")
def shared(llama: Path, computed: list[Result]) -> Iterator[Server]:  # computed: its engine has ended
    with serving(llama, **SMALL) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    assert shared.llm.reset_prefix_cache(reset_connector=True)
    yield shared
    shared.check_empty()


class SlowStores:
    """Lets the worker begin its stores some steps late, as if the copies took so long."""

    def __init__(self, server: Server, steps: int) -> None:
        self._worker, self._steps = server.worker, steps
        self._begin = server.worker.start_stores
        self._late: list[tuple[int, list[Any]]] = []
        self._now = 0
        server.worker.start_stores = self

    def __call__(self, stores: Any) -> None:
        self._now += 1
        self._late.append((self._now + self._steps, list(stores)))
        while self._late and self._late[0][0] <= self._now:
            self._begin(self._late.pop(0)[1])

    def restore(self) -> None:
        del self._worker.start_stores
        for _, stores in self._late:
            self._begin(stores)


def preemptions(server: Server) -> float:
    return sum(m.value for m in server.llm.get_metrics() if m.name == "vllm:num_preemptions")


@pytest.mark.smoke
def test_conversations_that_do_not_fit_are_restored(server: Server, computed: list[Result]) -> None:
    before, loads = preemptions(server), server.count("load_requests")
    for _ in range(2):
        assert same(server.generate(PROMPTS, TOKENS), computed) == [True] * len(PROMPTS)
    assert preemptions(server) > before
    assert server.count("load_requests") > loads
    assert server.count("load_failures") == 0


@pytest.mark.smoke
def test_pages_under_a_slow_store_are_not_reused(
    server: Server, computed: list[Result], computed_next: list[Result]
) -> None:
    slow = SlowStores(server, steps=40)
    try:
        assert same(server.generate(PROMPTS, TOKENS), computed) == [True] * len(PROMPTS)
    finally:
        slow.restore()
    server.wait(lambda: server.scheduler._engine.stats().transfers_running == 0)
    server.scheduler.settle()
    server.forget_device()
    restored = server.generate(next_turn(computed))
    assert same(restored, computed_next) == [True] * len(PROMPTS)
    assert all(r.cached for r in restored)


def test_without_holds_a_slow_store_would_keep_other_bytes(
    server: Server,
    computed: list[Result],
    computed_next: list[Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control of the test above: it can tell."""
    pool = server.vllm_scheduler.kv_cache_manager.block_pool
    slow = SlowStores(server, steps=40)
    with monkeypatch.context() as patch:
        patch.setattr(server.scheduler.holds, "_pool", NoPool(pool))
        try:
            server.generate(PROMPTS, TOKENS)
        finally:
            slow.restore()
        server.wait(lambda: server.scheduler._engine.stats().transfers_running == 0)
        server.scheduler.settle()
    server.forget_device()
    assert not all(same(server.generate(next_turn(computed)), computed_next))


class NoPool:
    """A block pool that holds nothing."""

    def __init__(self, pool: Any) -> None:
        self.blocks = pool.blocks

    def touch(self, blocks: Any) -> None:
        pass

    def free_blocks(self, blocks: Any) -> None:
        pass


def run_and_abort(server: Server, prompts: list[list[int]], abort_after: int) -> None:
    """Adds requests, steps so often, aborts all, and steps until nothing is left."""
    engine = server.llm.llm_engine
    names = [f"aborted-{abort_after}-{i}" for i in range(len(prompts))]
    for name, tokens in zip(names, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": tokens}, server.params(20))
    for _ in range(abort_after):
        engine.step()
    engine.abort_request(names)
    server.drain()


@pytest.mark.smoke
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
def test_aborted_in_the_middle_of_a_store(server: Server, computed: list[Result], steps: int) -> None:
    slow = SlowStores(server, steps=3)
    try:
        run_and_abort(server, PROMPTS[:3], steps)
    finally:
        slow.restore()
    server.drain()
    server.check_empty()
    server.forget_device()
    assert same(server.generate(PROMPTS[:3], TOKENS), computed[:3]) == [True] * 3


@pytest.mark.smoke
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_aborted_in_the_middle_of_a_load(
    server: Server, computed: list[Result], monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    server.generate(PROMPTS[:3], 1)
    server.forget_device()
    report = server.worker.take_ended_loads
    calls = []

    def slow(*, idle: bool) -> Any:
        calls.append(len(server.worker._loads))
        return (set(), set()) if len(calls) < 6 else report(idle=idle)

    with monkeypatch.context() as patch:
        patch.setattr(server.worker, "take_ended_loads", slow)
        run_and_abort(server, PROMPTS[:3], steps)
    assert max(calls) > 0, "no load was running when the requests were aborted"
    server.check_empty()
    assert same(server.generate(PROMPTS[:3], TOKENS), computed[:3]) == [True] * 3


@pytest.mark.smoke
def test_a_load_that_fails_is_recomputed_once_and_its_blocks_are_dropped(
    server: Server, computed: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.generate(PROMPTS[:2], 1)
    server.forget_device()
    execute = server.worker._execute

    def broken(copy: Any) -> Any:
        return execute(copy) if copy.instruction.is_store else fail(copy)

    def fail(copy: Any) -> None:
        execute(copy)  # the keeper hears of its end; this rank says that it failed

    before, drops = server.count("load_failures"), server.scheduler._engine.stats().drops
    with monkeypatch.context() as patch:
        patch.setattr(server.worker, "_execute", broken)
        assert same(server.generate(PROMPTS[:2], TOKENS), computed[:2]) == [True] * 2
    assert server.count("load_failures") == before + 2
    assert server.scheduler._engine.stats().drops > drops
    server.forget_device()
    again = server.generate(PROMPTS[:2], TOKENS)  # what was recomputed was stored again
    assert same(again, computed[:2]) == [True] * 2
    assert all(r.cached for r in again)


@pytest.mark.smoke
def test_a_reset_in_the_middle_of_a_load_serves_nothing_old(
    server: Server, computed: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.generate(PROMPTS[:1], 1)
    server.forget_device()
    report = server.worker.take_ended_loads
    calls = []

    def slow(*, idle: bool) -> Any:
        calls.append(len(server.worker._loads))
        return (set(), set()) if len(calls) < 4 else report(idle=idle)

    failures = server.count("load_failures")
    with monkeypatch.context() as patch:
        patch.setattr(server.worker, "take_ended_loads", slow)
        engine = server.llm.llm_engine
        engine.add_request("resetting", {"prompt_token_ids": PROMPTS[0]}, server.params(TOKENS))
        engine.step()
        assert server.worker._loads
        server.llm.reset_prefix_cache(reset_connector=True)
        outputs = server.drain()
    assert outputs["resetting"].outputs[0].token_ids == computed[0].tokens
    assert server.count("load_failures") == failures + 1


@pytest.mark.parametrize("seed", [pytest.param(1, marks=pytest.mark.smoke), 2])
def test_random_traffic(server: Server, computed: list[Result], seed: int) -> None:
    """Requests come, go and are aborted at random; whoever finishes has what vLLM gives without us."""
    random = Random(seed)
    loads, failures = server.count("load_requests"), server.count("load_failures")
    engine = server.llm.llm_engine
    wanted: dict[str, tuple[int, int]] = {}
    finished: dict[str, list[int]] = {}
    alive: list[str] = []
    for i in range(60):
        which, tokens, name = random.randrange(len(PROMPTS)), random.choice([1, 8, 40]), f"{seed}-{i}"
        engine.add_request(name, {"prompt_token_ids": PROMPTS[which]}, server.params(tokens))
        wanted[name] = (which, tokens)
        alive.append(name)
        for _ in range(random.randrange(8)):
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = list(output.outputs[0].token_ids)
        if random.random() < 0.3:
            gone = alive.pop(random.randrange(len(alive)))
            engine.abort_request([gone])
            if gone not in finished:
                del wanted[gone]
        if random.random() < 0.2:
            server.llm.reset_prefix_cache()  # refused while somebody runs
    for name, output in server.drain().items():
        finished[name] = list(output.outputs[0].token_ids)
    assert set(wanted) <= set(finished)
    for name, (which, tokens) in wanted.items():
        assert finished[name] == computed[which].tokens[:tokens], name
    assert server.count("load_requests") > loads
    assert server.count("load_failures") == failures
