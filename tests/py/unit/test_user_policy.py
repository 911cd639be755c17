"""A policy of the user's, in Python, in the simulation (kvtier/eviction.py)."""

import textwrap
from pathlib import Path

import numpy as np
import pytest

from kvtier.cli import main
from kvtier.errors import ConfigError
from kvtier.eviction import EvictionPolicy, load_policy
from kvtier.replay import Tiers, replay_real, simulate
from kvtier.traces import Trace, make_trace

THIS = f"{__name__}:"
SMALL = Path(__file__).resolve().parents[2] / "golden" / "traces" / "small_mooncake.jsonl"


class Lru(EvictionPolicy):
    """What the native one does."""

    def __init__(self, blocks: int) -> None:
        self.most = blocks
        self.ages: dict[int, int] = {}
        self.held: set[int] = set()
        self.keys: dict[int, bytes] = {}
        self.now = 0
        self.now_us = -1

    def _use(self, block: int) -> None:
        self.now += 1
        self.ages[block] = self.now

    def insert(self, block: int, key: bytes, depth: int, parent: int | None) -> None:
        assert len(key) == 32
        assert depth > 0 or parent is None
        assert block not in self.ages
        self._use(block)
        assert len(self.ages) <= self.most

    def touch(self, block: int) -> None:
        self._use(block)

    def hold(self, block: int) -> None:
        assert block in self.ages
        assert block not in self.held
        self.held.add(block)

    def let_go(self, block: int) -> None:
        self.held.remove(block)

    def erase(self, block: int, evicted: bool) -> None:
        assert evicted
        del self.ages[block]
        self.held.discard(block)

    def victim(self) -> int | None:
        return min((b for b in self.ages if b not in self.held), key=self.ages.__getitem__, default=None)

    def advance(self, now_us: int) -> None:
        assert now_us >= self.now_us
        self.now_us = now_us


class Wrong(Lru):
    """Names a block that was never there."""

    def victim(self) -> int | None:
        return 10**6


class Raises(Lru):
    """Has a bug."""

    def touch(self, block: int) -> None:
        raise ZeroDivisionError("a bug of the user's")


class FifoPlain(Lru):
    """Leaves orphans."""

    leaf_first = False

    def touch(self, block: int) -> None:
        pass


def trace_of(seed: int = 3, requests: int = 400) -> Trace:
    rng = np.random.default_rng(seed)
    talks: list[list[int]] = [[0, 1] for _ in range(12)]
    fresh = 2
    out: list[tuple[float, list[int]]] = []
    for number in range(requests):
        talk = talks[rng.integers(12)]
        grown = int(rng.integers(1, 4))
        talk.extend(range(fresh, fresh + grown))
        fresh += grown
        out.append((number, list(talk)))
        if len(talk) > 25:
            talk[2:] = []
    return make_trace(out)


@pytest.mark.parametrize("plain", [False, True])
def test_lru_in_python_does_what_the_native_one_does(plain: bool) -> None:
    trace = trace_of()
    for blocks, disk in ((40, 0), (30, 80)):
        if plain and disk:
            continue
        native = simulate(trace, Tiers(blocks, disk, policy="lru", plain=plain, admission="all"))
        own = THIS + "Lru"
        ours = simulate(trace, Tiers(blocks, disk, policy=own, disk_policy=own, plain=plain, admission="all"))
        assert ours.host_of_request.tolist() == native.host_of_request.tolist()
        assert ours.disk_of_request.tolist() == native.disk_of_request.tolist()
        assert (ours.evictions, ours.orphans) == (native.evictions, native.orphans)
        assert ours.hits_host > 0


def test_leaf_first_is_the_classes_word() -> None:
    native = simulate(trace_of(), Tiers(40, policy="fifo"))
    ours = simulate(trace_of(), Tiers(40, policy=THIS + "FifoPlain"))
    assert ours.host_of_request.tolist() == native.host_of_request.tolist()
    assert ours.orphans == native.orphans > 0


def test_what_a_policy_does_wrong_is_said() -> None:
    with pytest.raises(
        ConfigError, match=r"victim\(\) is 1000000; allowed: None or a block that is evictable"
    ):
        simulate(trace_of(), Tiers(40, policy=THIS + "Wrong"))
    with pytest.raises(ZeroDivisionError, match="a bug of the user's"):
        simulate(trace_of(), Tiers(40, policy=THIS + "Raises"))
    for name, message in (
        ("nowhere_at_all:Lru", "cannot be had: No module named 'nowhere_at_all'"),
        (THIS + "Nothing", "has no attribute 'Nothing'"),
        (THIS + "trace_of", "allowed: a subclass of kvtier.eviction.EvictionPolicy"),
        (":Lru", "cannot be had"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_policy(name)
    with pytest.raises(ConfigError, match="is for simulations; an engine's are native"):
        replay_real(trace_of(), Tiers(40, policy=THIS + "Lru", bytes_per_block=64))


def test_the_command_takes_a_class_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_policies_of_the_test.py").write_text(
        textwrap.dedent(f"""
            from {__name__} import Lru


            class Mine(Lru):
                pass
        """)
    )
    monkeypatch.chdir(tmp_path)
    argv = ["replay", str(SMALL), "--host", "4blocks", "--policy", "my_policies_of_the_test:Mine,lru"]
    assert main(argv) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "Mine" in line or "lru" in line]
    assert rows[0][1:6] == rows[1][1:6]
