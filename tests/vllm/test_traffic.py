"""Conversations of several turns in a device cache of a few hundred blocks, with all tiers; the soak."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from harness import BLOCK, Server, prompt, serving

CONVERSATIONS, TURNS, TOKENS = 30, 3, 24
SOAK_SECONDS = float(os.environ.get("KVTIER_SOAK_SECONDS", "600"))
SMALL: dict[str, Any] = {
    "num_gpu_blocks_override": 200,
    "max_model_len": 1024,
    "max_num_batched_tokens": 512,  # chunked prefill
    "max_num_seqs": 16,
}

Turns = list[list[tuple[list[int], list[int]]]]  # [turn][conversation]: prompt and answer


@pytest.fixture(scope="module")
def talked(llama: Path) -> Turns:
    """What vLLM answers without us."""
    prompts = [prompt(seed, 200 + 11 * seed) for seed in range(CONVERSATIONS)]
    turns: Turns = []
    with serving(llama, connector=False, enable_prefix_caching=False) as server:
        for turn in range(TURNS):
            answers = [r.tokens for r in server.generate(prompts, TOKENS)]
            turns.append(list(zip(prompts, answers, strict=True)))
            prompts = [p + a + prompt(100 + turn, 40) for p, a in turns[-1]]
    return turns


def tiers(path: Path) -> dict[str, Any]:
    """A host tier that holds a part of the traffic, a drive that holds most."""
    return {"host": "16MiB", "disk": [{"path": str(path), "capacity": "48MiB"}]}


def test_thirty_conversations_at_once_are_restored_turn_by_turn(
    llama: Path, tmp_path: Path, talked: Turns
) -> None:
    with serving(llama, extra=tiers(tmp_path / "disk"), **SMALL) as server:
        blocks = sum(len(p) // BLOCK for p, _ in talked[-1])
        assert blocks > 2 * SMALL["num_gpu_blocks_override"]
        for turn in talked:
            results = server.generate([p for p, _ in turn], TOKENS)
            assert [r.tokens for r in results] == [answer for _, answer in turn]
        server.forget_device()
        again = server.generate([p for p, _ in talked[-1]], TOKENS)
        assert [r.tokens for r in again] == [answer for _, answer in talked[-1]]
        assert sum(r.cached for r in again) > blocks * BLOCK // 2
        assert server.count("hit_tokens_host") > 0
        assert server.count("hit_tokens_disk") > 0
        assert server.count("load_failures") == 0
        server.drain()
        server.check_empty()


def test_one_by_one_a_next_turn_computes_little_more_than_what_is_new(llama: Path, talked: Turns) -> None:
    with serving(llama) as server:
        for turn, said in enumerate(talked):
            prompts, answers = zip(*said[:4], strict=True)
            results = server.generate(list(prompts), TOKENS)
            assert [r.tokens for r in results] == list(answers)
            for now, before in zip(results, talked[turn - 1] if turn else [], strict=False):
                known = len(before[0]) + len(before[1]) - 1  # the last token's KV is never computed
                assert now.cached == known // BLOCK * BLOCK
            server.forget_device()


@dataclass
class Traffic:
    """Requests at random, and what must come of them."""

    server: Server
    talked: Turns
    random: Random
    wanted: dict[str, list[int]] = field(default_factory=dict)
    alive: list[str] = field(default_factory=list)
    finished: int = 0
    sent: int = 0
    aborted: int = 0

    def send(self) -> None:
        said, answer = self.random.choice(self.talked[self.random.randrange(TURNS)])
        tokens, name = self.random.choice([1, 4, TOKENS]), f"soak-{self.sent}"
        self.sent += 1
        asked: Any = {"prompt_token_ids": said}
        if self.random.random() < 0.3:
            asked["cache_salt"] = self.random.choice("ab")
        params = self.server.params(tokens, extra_args=self._options())
        self.server.llm.llm_engine.add_request(name, asked, params)
        self.wanted[name] = answer[:tokens]
        self.alive.append(name)

    def _options(self) -> dict[str, Any] | None:
        options = self.random.choice(
            [
                None,
                None,
                None,
                {"namespace": "a"},
                {"tiers": ["host"]},
                {"tiers": []},
                {"max_load_tokens": 5 * BLOCK},
                {"max_store_tokens": 3 * BLOCK},
                {"prefetch_only": True},
                {"pin": 1},
                {"priority": 1},  # not offered
            ]
        )
        return None if options is None else {"kv_transfer_params": {"kvtier": options}}

    def step(self) -> None:
        for output in self.server.llm.llm_engine.step():
            if output.finished:
                self._take(output)

    def _take(self, output: Any) -> None:
        if output.request_id not in self.wanted:
            return  # aborted
        expected = self.wanted.pop(output.request_id)
        self.alive.remove(output.request_id)
        assert list(output.outputs[0].token_ids) == expected, output.request_id
        self.finished += 1

    def abort(self) -> None:
        gone = self.alive.pop(self.random.randrange(len(self.alive)))
        del self.wanted[gone]
        self.server.llm.llm_engine.abort_request([gone])
        self.aborted += 1

    def come_to_rest(self) -> None:
        for output in self.server.drain().values():
            self._take(output)
        assert not self.wanted
        self.server.wait(lambda: self.server.scheduler._pins.poll(time.monotonic()) or self._no_leases())
        self.server.check_empty()

    def _no_leases(self) -> bool:
        return self.server.scheduler._engine.stats().leases == 0

    def go_on(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if len(self.alive) < 24 and self.random.random() < 0.5:
                self.send()
            self.step()
            dice = self.random.random()
            if self.alive and dice < 0.05:
                self.abort()
            elif dice < 0.07:
                self.server.llm.reset_prefix_cache()  # refused while somebody runs
            elif dice < 0.071:
                self.server.llm.reset_prefix_cache(reset_connector=True)


@pytest.fixture(scope="module")
def busy(llama: Path, talked: Turns, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    extra = tiers(tmp_path_factory.mktemp("busy") / "disk")
    with serving(llama, extra=extra, **SMALL | {"num_gpu_blocks_override": 120}) as server:
        yield server


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_through_all_tiers(busy: Server, talked: Turns, seed: int) -> None:
    traffic = Traffic(busy, talked, Random(seed))
    loads, failures = busy.count("load_requests"), busy.count("load_failures")
    for _ in range(400):
        if traffic.random.random() < 0.4:
            traffic.send()
        traffic.step()
        if traffic.alive and traffic.random.random() < 0.1:
            traffic.abort()
    traffic.come_to_rest()
    assert traffic.finished > 50
    assert traffic.aborted > 10
    assert busy.count("load_requests") > loads
    assert busy.count("load_failures") == failures


@pytest.mark.timeout(SOAK_SECONDS + 300)
def test_soak(busy: Server, talked: Turns) -> None:
    """KVTIER_SOAK_SECONDS of random traffic: the engine lives, answers right, keeps nothing that ended."""
    traffic = Traffic(busy, talked, Random(7))
    end = time.monotonic() + SOAK_SECONDS
    loads = busy.count("load_requests")
    while (left := end - time.monotonic()) > 0:
        traffic.go_on(min(left, 20.0))
        traffic.come_to_rest()
    assert busy.count("load_requests") > loads
    assert busy.count("hit_tokens_disk") > 0
    stats = busy.scheduler._engine.stats()
    assert stats.health == "ok"
    assert [drive.health for drive in stats.disks] == ["ok"]
    assert traffic.finished > SOAK_SECONDS
    results = busy.generate([p for p, _ in talked[0]], TOKENS)
    assert [r.tokens for r in results] == [answer for _, answer in talked[0]]
