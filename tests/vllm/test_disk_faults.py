"""What goes wrong with a drive: the server is killed while it stores, bits flip, the drive is full."""

import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from drive_faults import SilentDrive, fill_up, flip_bits, silent_drive, slots, small_file_system
from harness import BLOCK, Result, Server, same, serving
from run_life import DURABLE, disk, more

HERE = Path(__file__).parent
HITS = [(len(p) - 1) // BLOCK * BLOCK for p in DURABLE]
KILLED = [more(n) for n in range(4)]


@pytest.fixture(scope="module")
def computed(llama: Path) -> list[Result]:
    """Of DURABLE and KILLED, by vLLM without us."""
    with serving(llama, connector=False, enable_prefix_caching=False) as server:
        return server.generate(DURABLE) + server.generate(KILLED)


@pytest.fixture
def filled(llama: Path, tmp_path: Path, computed: list[Result]) -> Path:
    """A directory in which a life has left DURABLE."""
    path = tmp_path / "disk"
    with serving(llama, extra=disk(path)) as server:
        assert same(server.generate(DURABLE), computed[:3]) == [True] * 3
        assert server.scheduler._engine.flush(60).durable >= sum(HITS) // BLOCK
    return path


def bad_blocks(server: Server) -> int:
    (drive,) = server.scheduler._engine.stats().disks
    return drive.bad_corrupt_payload + drive.bad_corrupt_header


class Life:
    """run_life.py in a process of its own."""

    def __init__(self, model: Path, path: Path, log: Path) -> None:
        self._log = log.open("w+")
        self._run = subprocess.Popen(
            [sys.executable, str(HERE / "run_life.py"), str(model), str(path)],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def told(self, what: str) -> Any:
        """The next thing of that name that it tells."""
        assert self._run.stdout is not None
        for line in self._run.stdout:
            if line.startswith("TOLD "):
                found = json.loads(line[5:])
                if what in found:
                    return found[what]
        self._log.seek(0)
        raise AssertionError(f"it ended: {self._run.wait()}\n{self._log.read()[-4000:]}")

    def kill(self) -> None:
        assert self._run.poll() is None
        self._run.kill()  # SIGKILL
        self._run.wait()
        assert self._run.stdout is not None
        self._run.stdout.close()
        self._log.close()


@pytest.mark.parametrize(
    ("prompts", "seconds"), [pytest.param(2, 0.0, marks=pytest.mark.smoke), (1, 0.05), (4, 0.3), (12, 0.01)]
)
def test_killed_while_it_stores_a_server_serves_what_was_durable(
    llama: Path, tmp_path: Path, computed: list[Result], prompts: int, seconds: float
) -> None:
    path = tmp_path / "disk"
    life = Life(llama, path, tmp_path / "log")
    try:
        assert life.told("durable") == [r.tokens for r in computed[:3]]
        assert life.told("flushed") >= sum(HITS) // BLOCK
        for n in range(prompts):
            tokens = life.told("more")
            assert n >= len(KILLED) or tokens == computed[3 + n].tokens
        time.sleep(seconds)
    finally:
        life.kill()
    with serving(llama, extra=disk(path)) as server:
        restored = server.generate(DURABLE)
        assert same(restored, computed[:3]) == [True] * 3
        assert [r.cached for r in restored] == HITS
        assert server.count("hit_tokens_disk") == sum(HITS)
        assert same(server.generate(KILLED), computed[3:]) == [True] * len(KILLED)
        assert server.count("load_failures") == 0
        server.drain()
        server.check_empty()


@pytest.mark.smoke
def test_a_bit_flipped_in_every_tenth_block_is_a_miss(
    llama: Path, filled: Path, computed: list[Result]
) -> None:
    flipped = flip_bits(filled, each=10)
    assert flipped >= sum(HITS) // BLOCK // 10
    with serving(llama, extra=disk(filled)) as server:
        assert same(server.generate(DURABLE), computed[:3]) == [True] * 3
        # Several reads of one broken block, and those behind it, are not counted here.
        assert 1 <= bad_blocks(server) <= flipped
        assert 0 < server.count("hit_tokens_disk") < sum(HITS)
        assert server.count("load_failures") == 0
        assert server.scheduler._engine.flush(60).dropped == 0
        server.drain()
        server.check_empty()
    with serving(llama, extra=disk(filled)) as server:  # what was broken was computed and stored again
        assert same(server.generate(DURABLE), computed[:3]) == [True] * 3
        assert server.count("hit_tokens_disk") == sum(HITS)


def test_bytes_that_prove_themselves_are_what_is_computed_with(
    llama: Path, filled: Path, computed: list[Result]
) -> None:
    """The control of this file: had the checks been passed, other tokens would have come out."""
    flipped = flip_bits(filled, each=1)
    assert flipped == len(slots(filled))
    with serving(llama, extra=disk(filled)) as server:
        assert same(server.generate(DURABLE), computed[:3]) == [True] * 3
        assert server.count("hit_tokens_disk") == 0
        assert bad_blocks(server) > 0


@pytest.fixture
def full_drive(tmp_path: Path) -> Iterator[Path]:
    try:
        with small_file_system(tmp_path, 48 << 20) as mount:
            yield mount
    except OSError as error:
        pytest.skip(str(error))


def test_a_full_drive_costs_hits_and_nothing_else(
    llama: Path, full_drive: Path, computed: list[Result]
) -> None:
    extra = disk(full_drive / "disk", capacity="1GiB")
    prompts, expected = DURABLE + KILLED, computed
    with serving(llama, extra=extra) as server:
        assert same(server.generate(DURABLE), computed[:3]) == [True] * 3
        fill_up(full_drive / "others")
        for n in range(4, 44):  # more than host tier and drive hold
            server.generate([more(n)], 1)
        for _ in range(2):
            server.forget_device()
            assert same(server.generate(prompts), expected) == [True] * len(prompts)
        (drive,) = server.scheduler._engine.stats().disks
        assert "ok" not in (drive.growth, drive.health) or drive.catalog_health != "ok", drive
        assert server.count("load_failures") == 0
        server.drain()
        server.check_empty()
    with serving(llama, extra=extra) as server:  # it starts where there is no room at all
        assert same(server.generate(prompts), expected) == [True] * len(prompts)
        server.drain()
        server.check_empty()


@pytest.fixture
def silent(full_drive: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SilentDrive]:
    from kvtier.adapters.vllm import connector

    try:
        with silent_drive(full_drive) as drive:
            short = functools.partial(connector.Config, disk_answer_seconds=1.0)  # else half a minute
            monkeypatch.setattr(connector, "Config", short)
            yield drive
    except OSError as error:
        pytest.skip(str(error))


def test_a_drive_that_does_not_answer_costs_hits_and_nothing_else(
    llama: Path, full_drive: Path, silent: SilentDrive, computed: list[Result]
) -> None:
    extra = disk(full_drive / "disk", capacity="32MiB")
    with serving(llama, extra=extra) as server:
        assert same(server.generate(DURABLE), computed[:3]) == [True] * 3
        assert server.scheduler._engine.flush(60).dropped == 0

    def drive(server: Server) -> Any:
        return server.scheduler._engine.stats().disks[0]

    with serving(llama, extra=extra) as server:
        silent.silence()
        unread = server.generate(DURABLE)  # waits for reads, for a second, and computes
        assert same(unread, computed[:3]) == [True] * 3
        assert [r.cached for r in unread] == [0] * 3
        server.wait(lambda: drive(server).health != "ok")
        assert drive(server).unanswered > 0
        assert same(server.generate(KILLED), computed[3:]) == [True] * len(KILLED)  # stored in memory alone
        server.forget_device()
        again = server.generate(DURABLE + KILLED)
        assert same(again, computed) == [True] * len(computed)
        assert all(r.cached for r in again)
        assert server.count("load_failures") == 0
        server.drain()
        silent.answer()  # and what was given up lets go of its memory
        server.wait(lambda: drive(server).health == "ok" and not drive(server).unanswered)
        server.wait(lambda: not server.scheduler._engine.stats().quarantined_blocks)
        server.check_empty()
    with serving(llama, extra=extra) as server:  # what it kept is right
        restored = server.generate(DURABLE)
        assert same(restored, computed[:3]) == [True] * 3
        assert [r.cached for r in restored] == HITS
        assert same(server.generate(KILLED), computed[3:]) == [True] * len(KILLED)
        assert server.count("hit_tokens_disk") >= sum(HITS)


def test_a_server_ends_beside_a_drive_that_does_not_answer(
    llama: Path, full_drive: Path, silent: SilentDrive, computed: list[Result]
) -> None:
    extra = disk(full_drive / "disk", capacity="32MiB")
    with serving(llama, extra=extra) as server:
        assert same(server.generate(DURABLE), computed[:3]) == [True] * 3
        assert server.scheduler._engine.flush(60).dropped == 0
        silent.silence()
        assert same(server.generate(KILLED), computed[3:]) == [True] * len(KILLED)
    silent.answer()
    with serving(llama, extra=extra) as server:
        restored = server.generate(DURABLE)
        assert same(restored, computed[:3]) == [True] * 3
        assert [r.cached for r in restored] == HITS
        assert same(server.generate(KILLED), computed[3:]) == [True] * len(KILLED)


def test_a_drive_smaller_than_the_traffic_evicts(llama: Path, tmp_path: Path, computed: list[Result]) -> None:
    with serving(llama, extra=disk(tmp_path / "disk", capacity="24MiB")) as server:
        for n in range(4, 44):
            server.generate([more(n)], 1)
        for _ in range(2):
            assert same(server.generate(DURABLE + KILLED), computed) == [True] * len(computed)
            server.forget_device()
        assert server.scheduler._engine.flush(60)
        stats = server.scheduler._engine.stats()
        assert stats.disks[0].allocated_bytes <= 24 << 20
        assert stats.evictions > 0
        assert server.count("load_failures") == 0
        server.drain()
        server.check_empty()


def test_two_models_and_two_tenants_share_a_directory_and_no_block(
    llama: Path, tmp_path: Path, computed: list[Result]
) -> None:
    other = models.llama(tmp_path / "other", seed=1)
    with serving(other, connector=False, enable_prefix_caching=False) as server:
        computed_by_other = server.generate(DURABLE)
    assert not any(same(computed_by_other, computed[:3]))
    of = {llama: computed[:3], other: computed_by_other}
    path = tmp_path / "disk"

    def salted(server: Server, salt: str) -> list[Result]:
        asked: list[Any] = [{"prompt_token_ids": p, "cache_salt": salt} for p in DURABLE]
        outputs = server.llm.generate(asked, server.params(8), use_tqdm=False)
        return [Result(output) for output in outputs]

    for model in (llama, other):  # one after the other: a store takes the room of one that nobody has open
        for life in range(2):
            with serving(model, extra=disk(path)) as server:
                for salt in ("a", "b") if model == llama else ("b", "a"):
                    before = server.count("hit_tokens_disk") + server.count("hit_tokens_host")
                    results = salted(server, salt)
                    hits = server.count("hit_tokens_disk") + server.count("hit_tokens_host") - before
                    assert same(results, of[model]) == [True] * 3
                    # Later ones are not waited for: by then it is known how quickly this model computes.
                    if life == 0 or before == 0:
                        assert [r.cached for r in results] == (HITS if life else [0] * 3)
                        assert hits == (sum(HITS) if life else 0)
                    # Both tenants have room, so that the second life finds all of theirs.
                    assert server.scheduler._engine.flush(60).dropped == 0
                server.drain()
                server.check_empty()
