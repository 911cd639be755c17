"""The simulation against known figures, and against a real engine; `kvtier replay`."""

import importlib
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier import replay
from kvtier.cli import main
from kvtier.cli.results import problems
from kvtier.config import EVICTIONS, Config
from kvtier.engine import Engine, Expected
from kvtier.errors import ConfigError
from kvtier.layout import KVLayout
from kvtier.replay import Speeds, Tiers, belady_hit_rate, replay_real, simulate, times_to_first_token
from kvtier.traces import Trace, load_trace, make_trace

ROOT = Path(__file__).resolve().parents[3]
SMALL = ROOT / "tests" / "golden" / "traces" / "small_mooncake.jsonl"
CONVERSATION = "mooncake_conversation.jsonl"
OURS = "return-hazard"

# Hit rates in % of the conversation trace in the plain form, by capacity in blocks: from a script that shares
# no code with ours. S3-FIFO has a small queue of 10 %, SLRU a protected half.
REFERENCE = {
    1_000: {"fifo": 4.5, "lru": 4.5, "lfu": 4.8, "slru": 4.8, "sieve": 4.8, "s3-fifo": 5.6, "arc": 5.3},
    3_000: {"fifo": 6.4, "lru": 6.5, "lfu": 7.5, "slru": 7.6, "sieve": 7.5, "s3-fifo": 8.8, "arc": 8.7},
    10_000: {
        "fifo": 18.2,
        "lru": 21.2,
        "lfu": 13.2,
        "slru": 19.8,
        "sieve": 13.2,
        "s3-fifo": 19.9,
        "arc": 22.5,
    },
    30_000: {
        "fifo": 29.5,
        "lru": 32.6,
        "lfu": 27.6,
        "slru": 31.3,
        "sieve": 27.6,
        "s3-fifo": 28.6,
        "arc": 31.1,
    },
    100_000: {"lru": 36.4, "lfu": 36.3},
}
REFERENCE_BELADY = {1_000: 19.1, 3_000: 29.5, 10_000: 36.6, 30_000: 36.6, 100_000: 36.6}
TOLERANCE = 0.3


@pytest.fixture(scope="module")
def conversation() -> Trace:
    folder = Path(os.environ.get("KVTIER_TRACES", ROOT.parent / "shared" / "traces"))
    path = folder / CONVERSATION
    if not path.is_file():
        pytest.skip(
            f"THE REFERENCE TABLE WAS NOT CHECKED: {path} is not there; set KVTIER_TRACES to the folder with "
            f"{CONVERSATION} (Mooncake, FAST'25 release)"
        )
    return load_trace(path)


def test_the_simulation_agrees_with_the_reference_table(conversation: Trace) -> None:
    assert (len(conversation.blocks), conversation.num_blocks) == (288_500, 182_790)
    wrong = []
    for blocks, row in REFERENCE.items():
        rates = {
            name: simulate(conversation, Tiers(blocks, policy=name, plain=True)).hit_rate for name in row
        }
        rates["belady"] = belady_hit_rate(conversation, blocks)
        for name, expected in {**row, "belady": REFERENCE_BELADY[blocks]}.items():
            if abs(100 * rates[name] - expected) > TOLERANCE:
                wrong.append(
                    f"{name} with {blocks} blocks: {100 * rates[name]:.2f} %, reference {expected} %"
                )
    assert not wrong


def test_the_names_are_the_core_s() -> None:
    assert tuple(replay.policies()) == EVICTIONS


# By hand. Requests: abc, abde, fg, abc, fg; 14 references.
# 4 blocks, LRU, tail first: c b a | e d b a (hits ab) | b a g f | hits ab, c: g f... see each line.
@pytest.mark.parametrize("plain", [True, False])
def test_lru_by_hand(plain: bool) -> None:
    trace = load_trace(SMALL)
    # Oldest first. 1: c b a. 2: hits a b; e, d come, c goes: e d b a. 3: g, f come, e and d go: b a g f.
    # 4: hits a b; c comes, b or a was just used, g is the oldest: f c b a. 5: nothing of f: the prefix of fg
    # is f, which is there; g comes.
    result = simulate(trace, Tiers(4, policy="lru", plain=plain))
    assert result.host_of_request.tolist() == [0, 2, 0, 2, 1]
    assert (result.references, result.hits_host, result.hits_disk) == (14, 5, 0)
    assert result.orphans == 0
    # All is kept: 2 + 3 + 2 of 14 come again.
    assert simulate(trace, Tiers(100, policy="lru", plain=plain)).hits_host == 7
    assert belady_hit_rate(trace, 100) == 7 / 14
    # 3 blocks, knowing the future: a and b stay all the time (4 hits), f stays from request 3 on (1).
    assert belady_hit_rate(trace, 3) == 5 / 14


def conversations(seed: int, num_requests: int, num_talks: int = 8) -> Trace:
    """Talks that grow from a shared head and come back at random."""
    rng = random.Random(seed)
    talks: list[list[int]] = []
    fresh = 10
    requests = []
    for number in range(num_requests):
        if len(talks) < num_talks or rng.random() < 0.2:
            talks.append([0, 1, 2])
        talk = rng.choice(talks[-num_talks:])
        grown = rng.randint(1, 4)
        talk.extend(range(fresh, fresh + grown))
        fresh += grown
        requests.append((number * 0.5, list(talk)))
    return make_trace(requests)


def same(real: replay.Replay, simulated: replay.Replay) -> None:
    assert real.wrong_blocks == 0
    np.testing.assert_array_equal(real.host_of_request, simulated.host_of_request)
    np.testing.assert_array_equal(real.disk_of_request, simulated.disk_of_request)
    for name in ("references", "evictions", "promotions", "disk_blocks_written"):
        assert getattr(real, name) == getattr(simulated, name), name
    # With a disk, whether a block goes before or after its child's write begins depends on when drives end
    # writes: then only that there are none is the same.
    if not real.tiers.disk_blocks or not simulated.orphans:
        assert real.orphans == simulated.orphans


@pytest.mark.parametrize("policy", EVICTIONS)
def test_a_real_replay_agrees_with_the_simulation_block_for_block(policy: str) -> None:
    trace = conversations(3, 250)
    for blocks in (24, 90):
        tiers = Tiers(blocks, policy=policy, bytes_per_block=64)
        real = replay_real(trace, tiers)
        same(real, simulate(trace, tiers))
        assert real.hits_host > 0
        assert real.evictions > 0


@pytest.mark.parametrize(
    ("policy", "disk_policy", "admission"),
    [
        ("lru", "lru", "second-use"),
        ("arc", "arc", "all"),
        ("sieve", "sieve", "tiny-lfu"),
        ("lru", "lru", "return-hazard"),
        ("fifo", "fifo", "all"),
        ("lfu", "lfu", "tiny-lfu"),
        ("slru", "slru", "second-use"),
        ("s3-fifo", "s3-fifo", "all"),
        (OURS, OURS, "return-hazard"),
    ],
)
def test_with_a_disk_tier_too(policy: str, disk_policy: str, admission: str, tmp_path: Path) -> None:
    trace = conversations(5, 90)
    # An engine writes back an eighth of its host blocks at once. Where a block that was just written may be
    # the next victim, what goes depends on when drives end their writes, unless it is one at a time.
    host = 32 if disk_policy in ("lru", "fifo") else 15
    tiers = Tiers(host, 70, policy=policy, disk_policy=disk_policy, admission=admission, bytes_per_block=64)
    real = replay_real(trace, tiers, str(tmp_path))
    same(real, simulate(trace, tiers))
    assert real.hits_disk > 0
    assert real.disk_blocks_written > 0


def beside_prompts_asked_once(talks: Trace) -> Trace:
    """The talks, and between them prompts that nobody asks for again; a request a minute."""
    requests = []
    for number in range(talks.num_requests):
        once = range(10_000 + 6 * number, 10_006 + 6 * number)
        requests += [(120.0 * number, talks.request(number).tolist()), (120.0 * number + 60, list(once))]
    return make_trace(requests)


def test_what_is_shipped_agrees_with_its_simulation(tmp_path: Path) -> None:
    trace = beside_prompts_asked_once(conversations(5, 60))
    tiers = Tiers(32, 70, bytes_per_block=64)
    shipped = Config(groups=[KVLayout.mla(1, 64, "uint8", 1)], host="1MiB", model="m@1", block_tokens=1)
    assert (tiers.policy, tiers.eviction_on_disk, tiers.admission) == (
        shipped.eviction,
        shipped.disk_eviction,
        shipped.disk_admission,
    )
    real = replay_real(trace, tiers, str(tmp_path))
    same(real, simulate(trace, tiers))
    assert real.hits_disk > 0
    takes_all = simulate(trace, replace(tiers, admission="all"))
    assert (
        70 < real.disk_blocks_written < takes_all.disk_blocks_written
    )  # a full drive takes some, and refuses


def test_return_hazard_refuses_and_spares_the_budget_for_real_too(tmp_path: Path) -> None:
    trace = beside_prompts_asked_once(conversations(5, 240))  # takes eight hours, so that the budget fills
    free = Tiers(32, 120, policy="lru", admission="return-hazard", bytes_per_block=4096)
    real = replay_real(trace, free, str(tmp_path / "free"))
    same(real, simulate(trace, free))
    takes_all = simulate(trace, replace(free, admission="all"))
    assert real.hits_disk > takes_all.hits_disk
    assert real.disk_blocks_written < takes_all.disk_blocks_written
    scarce = replace(free, write_bytes_per_day=300 * 4096)
    spared = replay_real(trace, scarce, str(tmp_path / "scarce"))
    same(spared, simulate(trace, scarce))
    assert spared.hits_disk > simulate(trace, replace(scarce, admission="all")).hits_disk
    assert spared.disk_blocks_written < 400  # a day's, and what eight hours fill


@pytest.fixture
def reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drive is as fast as one could wish."""
    expect = Engine.expect

    def expect_and_wait(engine: Engine, keys: Any) -> Expected:
        expected = expect(engine, keys)
        expected.prefetch.wait(30.0)
        return expected

    monkeypatch.setattr(Engine, "expect", expect_and_wait)


@pytest.mark.usefixtures("reads_at_once")
def test_look_ahead_reads_before_the_request_runs(tmp_path: Path) -> None:
    trace = conversations(5, 90)
    tiers = Tiers(60, 150, policy=OURS, disk_policy=OURS, admission="all", bytes_per_block=64)
    real = replay_real(trace, tiers, str(tmp_path / "ahead"), look_ahead=4)
    assert (real.wrong_blocks, real.look_ahead) == (0, 4)
    assert real.reads_hidden > 20
    assert real.disk_reads_hidden == real.reads_hidden / (real.reads_hidden + real.hits_disk)
    behind = replay_real(trace, tiers, str(tmp_path / "behind"))
    assert (behind.reads_hidden, behind.disk_reads_hidden) == (0, 0.0)
    assert real.hits_disk < behind.hits_disk / 2


@pytest.mark.usefixtures("reads_at_once")
@pytest.mark.parametrize(
    ("policy", "admission", "look_ahead"),
    [("lru", "all", 1), ("return-hazard", "second-use", 4), ("s3-fifo", "return-hazard", 9)],
)
def test_a_simulation_with_look_ahead_is_the_real_one_s(
    policy: str, admission: str, look_ahead: int, tmp_path: Path
) -> None:
    trace = conversations(5, 150)
    tiers = Tiers(40, 150, policy=policy, disk_policy=policy, admission=admission, bytes_per_block=64)
    real = replay_real(trace, tiers, str(tmp_path), look_ahead=look_ahead)
    simulated = simulate(trace, tiers, look_ahead=look_ahead)
    same(real, simulated)
    assert real.reads_hidden == simulated.reads_hidden > 0
    assert simulate(trace, tiers).reads_hidden == 0


def test_look_ahead_of_a_queue_hides_nearly_all_reads_of_a_real_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    workloads: Any = importlib.import_module("benchmarks.workloads")
    traffic: Any = workloads.generate("chat", 3, 2)
    trace = make_trace([(request.at_s, list(request.block_ids)) for request in traffic], block_tokens=512)
    tiers = Tiers(500, 3000, bytes_per_block=4096)
    ahead = replay_real(trace, tiers, str(tmp_path / "ahead"), look_ahead=32)
    assert ahead.wrong_blocks == 0
    assert ahead.disk_reads_hidden is not None
    assert ahead.disk_reads_hidden >= 0.9
    assert ahead.reads_hidden + ahead.hits_disk <= ahead.promotions  # no read hides twice
    behind = replay_real(trace, tiers, str(tmp_path / "behind"))
    assert behind.hits_disk > 100
    assert (behind.reads_hidden, behind.disk_reads_hidden) == (0, 0.0)
    assert ahead.hits_host > behind.hits_host + 100


def test_what_is_not_allowed_is_said() -> None:
    trace = make_trace([(0, [1])])
    for tiers, message in [
        (lambda: Tiers(0), "host_blocks is 0; allowed: 1"),
        (lambda: Tiers(1, 100_000_001), "disk_blocks is 100000001; allowed: 0 to 100000000"),
        (lambda: Tiers(1, policy="mru"), "policy is 'mru'; allowed: return-hazard, lru"),
        (lambda: Tiers(1, disk_policy="mru"), "disk_policy is 'mru'"),
        (
            lambda: Tiers(1, admission="none"),
            "admission is 'none'; allowed: return-hazard, all, second-use, tiny-lfu",
        ),
        (lambda: Tiers(1, write_bytes_per_day=5), "a write budget needs bytes_per_block"),
    ]:
        with pytest.raises(ConfigError, match=message):
            tiers()
    with pytest.raises(ConfigError, match="bytes_per_block is 12; allowed in a real replay: multiples of 8"):
        replay_real(trace, Tiers(1, bytes_per_block=12))
    with pytest.raises(ConfigError, match="plain is for simulations"):
        replay_real(trace, Tiers(1, bytes_per_block=8, plain=True))
    with pytest.raises(ConfigError, match="look_ahead is -1; allowed: 0 to 4294967295"):
        simulate(trace, Tiers(1), look_ahead=-1)
    with pytest.raises(ConfigError, match="look_ahead is 5000000000; allowed: 0 to 4294967295"):
        simulate(trace, Tiers(1), look_ahead=5_000_000_000)
    with pytest.raises(ConfigError, match="not for the plain form"):
        simulate(trace, Tiers(1, plain=True), look_ahead=1)
    with pytest.raises(ConfigError, match="needs a directory"):
        replay_real(trace, Tiers(1, 10, bytes_per_block=8))


def test_progress_is_told_and_may_end_it() -> None:
    trace = make_trace([(n, [n]) for n in range(3000)])
    told: list[int] = []
    simulate(trace, Tiers(5), progress=told.append)
    assert told == [0, 1024, 2048]

    def stop(done: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        simulate(trace, Tiers(5), progress=stop)


def test_times_to_first_token_by_hand() -> None:
    trace = make_trace([(0, [1, 2]), (1, [1, 2, 3])], block_tokens=100)
    done = simulate(trace, Tiers(10, bytes_per_block=1000))
    assert done.host_of_request.tolist() == [0, 2]
    speeds = Speeds(prefill_tokens_per_s=1000, host_bytes_per_s=10_000, disk_bytes_per_s=1)
    assert times_to_first_token(trace, None, speeds).tolist() == pytest.approx([0.2, 0.3])
    assert times_to_first_token(trace, done, speeds).tolist() == pytest.approx([0.2, 0.2 + 0.1])


def test_a_real_replay_measures_its_loads(tmp_path: Path) -> None:
    trace = conversations(5, 90)
    real = replay_real(trace, Tiers(32, 70, admission="all", bytes_per_block=4096), str(tmp_path))
    assert set(real.measured) == {"host_bytes_per_s", "disk_bytes_per_s"}
    assert all(1e3 < rate < 1e12 for rate in real.measured.values())
    in_host = replay_real(trace, Tiers(90, bytes_per_block=64))
    assert set(in_host.measured) == {"host_bytes_per_s"}
    nothing_hits = make_trace([(0, [1]), (1, [2])])
    assert replay_real(nothing_hits, Tiers(8, bytes_per_block=64)).measured == {}
    assert simulate(trace, Tiers(32, bytes_per_block=64)).measured == {}


def document_of(argv: list[str], path: Path) -> dict[str, Any]:
    assert main([*argv, "--json", str(path)]) == 0
    document: dict[str, Any] = json.loads(path.read_text())
    assert problems(document) == []
    return document


def results_of(argv: list[str], path: Path) -> dict[str, Any]:
    return {result["name"]: result["value"] for result in document_of(argv, path)["results"]}


def test_the_command_reports_the_names_that_scripts_look_for(tmp_path: Path) -> None:
    argv = ["replay", str(SMALL), "--host", "4blocks", "--disk", "1MB", "--bytes-per-block", "1000"]
    values = results_of([*argv, "--prefill-rate", "1000"], tmp_path / "out.json")
    assert values["hit_rate"] == pytest.approx(7 / 14)
    assert values["hit_rate_host"] + values["hit_rate_disk"] == pytest.approx(values["hit_rate"])
    assert values["belady_hit_rate"] == pytest.approx(7 / 14)
    assert values["disk_bytes_written"] == 7000
    assert values["disk_blocks"] == 1000
    assert values["orphans"] == 0
    assert values["references_per_s"] > 0
    assert values["gpu_seconds_saved"] == pytest.approx(7 * 0.512 - 0.124 * 2 - 0.036, abs=0.2)
    assert values["ttft_p99"] <= values["ttft_uncached_p99"]


def test_a_figure_that_cannot_be_drawn_in_the_end_costs_no_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("kvtier.cli.replay.plot", full)
    path = tmp_path / "x.json"
    assert main(["replay", str(SMALL), "--json", str(path), "--plot", str(tmp_path / "x.png")]) == 1
    document = json.loads(path.read_text())
    assert document["checks"]["completed"] is True
    assert document["results"]


def test_several_policies_and_capacities_make_a_table_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "rates.png"
    argv = [
        "replay",
        str(SMALL),
        "--policy",
        "all",
        "--host",
        "3blocks,4blocks",
        "--plain",
        "--plot",
        str(picture),
    ]
    values = results_of(argv, tmp_path / "out.json")
    assert values["arc.4.hit_rate"] <= values["arc.4.belady_hit_rate"]
    assert len([name for name in values if name.endswith("hit_rate")]) == 2 * len(EVICTIONS) * 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in EVICTIONS)


def written(path: Path, seconds: float, num_requests: int = 400) -> str:
    """Prompts of 3 blocks that come back once, after 30 others, in so many seconds: Mooncake's format."""
    prompts = [n - 30 if n // 30 % 2 else n for n in range(num_requests)]
    lines = [
        {
            "timestamp": round(1000 * seconds * n / (num_requests - 1)),
            "hash_ids": [3 * prompt, 3 * prompt + 1, 3 * prompt + 2],
            "input_length": 1500,
            "output_length": 1,
        }
        for n, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_budget_is_never_exceeded_in_any_figure_of_a_day(tmp_path: Path) -> None:
    trace = load_trace(written(tmp_path / "hour.jsonl", 3600))
    budget = 2400 * 64
    new = Tiers(20, 100, admission="all", write_bytes_per_day=budget, bytes_per_block=64)
    spent = simulate(trace, new)
    assert spent.disk_blocks_written > 600  # the bucket of a new store holds them
    assert replay.written_per_day(trace, spent) == budget  # which is there once a day
    assert replay.drive_writes_per_day(trace, spent) == 24
    shared = simulate(trace, replace(new, share_of_budget=True))
    assert 80 < shared.disk_blocks_written <= 100
    assert shared.hits_disk < spent.hits_disk
    per_day = replay.written_per_day(trace, shared)
    assert per_day == shared.disk_bytes_written * 24
    assert per_day <= budget


def test_a_real_replay_has_the_same_share_of_the_budget(tmp_path: Path) -> None:
    trace = load_trace(written(tmp_path / "hours.jsonl", 7200, 120))
    tiers = Tiers(20, 100, admission="all", write_bytes_per_day=960 * 4096, bytes_per_block=4096)
    tiers = replace(tiers, policy="lru", share_of_budget=True)
    real = replay_real(trace, tiers, str(tmp_path / "store"))
    same(real, simulate(trace, tiers))
    assert 60 < real.disk_blocks_written <= 80


def test_the_command_spreads_a_budget_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hour = written(tmp_path / "hour.jsonl", 3600)
    argv = ["replay", hour, "--host", "20blocks", "--disk", "100blocks", "--bytes-per-block", "64"]
    free = document_of(argv, tmp_path / "out.json")
    assert free["machine"]["replay"]["write_budget"] == "unlimited"
    printed = capsys.readouterr().out
    assert "write budget unlimited" in printed
    assert "warning: without a write budget, " in printed
    document = document_of([*argv, "--write-budget", "6400"], tmp_path / "out.json")
    assert document["machine"]["replay"]["write_budget"] == 6400
    values = {result["name"]: result["value"] for result in document["results"]}
    assert 0 < values["disk_bytes_written_per_day"] <= 6400
    assert 0 < values["drive_writes_per_day"] <= 1
    printed = capsys.readouterr().out
    assert "write budget 6400 bytes a day" in printed
    assert "warning" not in printed
    assert (
        document_of([*argv, "--write-budget", "unlimited"], tmp_path / "out.json")["machine"]["replay"]
        == (free["machine"]["replay"])
    )


@pytest.mark.parametrize(("seconds", "requests"), [(59, 400), (0, 400), (3600, 1)])
def test_a_trace_of_less_than_a_minute_says_nothing_of_a_day(
    seconds: float, requests: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "replay",
        written(tmp_path / "x.jsonl", seconds),
        "--requests",
        str(requests),
        "--disk",
        "50blocks",
    ]
    values = results_of([*argv, "--bytes-per-block", "64"], tmp_path / "out.json")
    assert values["disk_bytes_written"] > 0
    assert not {"disk_bytes_written_per_day", "drive_writes_per_day"} & set(values)
    header, row = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert row[len(row) - 2] == "-"
    assert header[-2] == "DWPD"


def test_what_is_written_is_said_in_capacities_where_blocks_have_no_bytes(tmp_path: Path) -> None:
    argv = ["replay", written(tmp_path / "hour.jsonl", 3600), "--host", "20blocks", "--disk", "100blocks"]
    values = results_of(argv, tmp_path / "out.json")
    assert values["disk_bytes_written"] == 0  # promised to be there
    assert "disk_bytes_written_per_day" not in values
    assert values["drive_writes_per_day"] == pytest.approx(values["disk_blocks_written"] * 24 / 100)


def test_the_json_says_what_was_replayed(tmp_path: Path) -> None:
    argv = ["replay", str(SMALL), "--policy", "lru,arc", "--host", "3blocks", "--disk", "9blocks", "--plain"]
    document = document_of([*argv, "--admission", "all"], tmp_path / "out.json")
    assert document["machine"]["replay"] == {
        "trace": SMALL.name,
        "format": "mooncake",
        "requests": 5,
        "references": 14,
        "blocks": 7,
        "block_tokens": 512,
        "seconds": 4.0,
        "form": "plain",
        "real": False,
        "look_ahead": 0,
        "bytes_per_block": None,
        "disk_policy": "lru",
        "admission": "all",
        "write_budget": "unlimited",
        "setups": [
            {"results": "", "policy": "lru", "host_blocks": 3, "disk_blocks": 9},
            {"results": "arc.3.", "policy": "arc", "host_blocks": 3, "disk_blocks": 9},
        ],
    }
    names = {result["name"] for result in document["results"]}
    assert {setup["results"] + "hit_rate" for setup in document["machine"]["replay"]["setups"]} <= names


def test_a_pair_that_is_given_twice_is_replayed_once(tmp_path: Path) -> None:
    argv = ["replay", str(SMALL), "--policy", "lru,lru", "--host", "3blocks,3000,4blocks"]
    document = document_of([*argv, "--bytes-per-block", "1000"], tmp_path / "out.json")
    assert [setup["host_blocks"] for setup in document["machine"]["replay"]["setups"]] == [3, 4]


def test_the_command_replays_for_real(tmp_path: Path) -> None:
    argv = ["replay", str(SMALL), "--host", "4blocks", "--bytes-per-block", "64", "--real"]
    assert results_of(argv, tmp_path / "out.json")["hit_rate_host"] == pytest.approx(5 / 14)


def test_the_command_says_what_look_ahead_hid(tmp_path: Path) -> None:
    argv = ["replay", str(SMALL), "--host", "4blocks", "--disk", "100blocks", "--bytes-per-block", "64"]
    values = results_of([*argv, "--real", "--look-ahead", "2"], tmp_path / "out.json")
    assert values["look_ahead"] == 2
    assert 0 <= values["disk_reads_hidden"] <= 1


TIMED = ["replay", str(SMALL), "--bytes-per-block", "4096", "--prefill-rate", "1000"]


def test_the_command_says_which_rates_it_assumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TIMED, "--host", "3blocks", "--disk", "100blocks", "--policy", "lru,arc"]
    document = document_of(argv, tmp_path / "out.json")
    rates = {"prefill_tokens_per_s": 1000, "host_bytes_per_s": 50e9, "disk_bytes_per_s": 10e9, "measured": []}
    assert [setup["rates"] for setup in document["machine"]["replay"]["setups"]] == [rates, rates]
    lines = [line for line in capsys.readouterr().out.splitlines() if "assumed" in line]
    assert lines == ["assumed: prefill 1000 tokens/s, host tier 50 GB/s, disk 10 GB/s"]
    given = document_of([*TIMED, "--host-bandwidth", "20GB"], tmp_path / "out.json")
    assert given["machine"]["replay"]["setups"][0]["rates"] == {
        "prefill_tokens_per_s": 1000,
        "host_bytes_per_s": 20e9,
        "measured": [],
    }
    assert "assumed: prefill 1000 tokens/s, host tier 20 GB/s\n" in capsys.readouterr().out


def test_a_real_replay_s_rates_are_those_that_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*TIMED, "--host", "3blocks", "--disk", "100blocks", "--policy", "lru", "--real"]
    document = document_of([*argv, "--disk-bandwidth", "3GB"], tmp_path / "out.json")
    rates = document["machine"]["replay"]["setups"][0]["rates"]
    assert rates["measured"] == ["host_bytes_per_s"]
    assert rates["disk_bytes_per_s"] == 3e9
    assert rates["host_bytes_per_s"] not in (0, 50e9)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("assumed: "))
    assert line.startswith(
        "assumed: prefill 1000 tokens/s, disk 3 GB/s; measured in the replay, on the CPU device: host tier "
    )


def test_times_to_first_token_come_from_the_rates_that_are_said(tmp_path: Path) -> None:
    document = document_of([*TIMED, "--host", "100blocks", "--real"], tmp_path / "out.json")
    rate = document["machine"]["replay"]["setups"][0]["rates"]["host_bytes_per_s"]
    trace = load_trace(SMALL)
    done = simulate(trace, Tiers(100, bytes_per_block=4096))
    times = times_to_first_token(trace, done, Speeds(1000, rate, 1))
    values = {result["name"]: result["value"] for result in document["results"]}
    assert values["ttft_p90"] == pytest.approx(np.percentile(times, 90))


def test_list_policies_prints_the_default_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--list-policies"]) == 0
    assert capsys.readouterr().out.split() == list(EVICTIONS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "TRACE is missing"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        ([str(SMALL), "--policy", "mru"], "--policy is 'mru'; allowed: return-hazard, lru"),
        (
            [str(SMALL), "--host", "64GiB"],
            "--host is '64GiB', in bytes; allowed with bytes_per_block (--bytes-",
        ),
        ([str(SMALL), "--host", "0blocks"], "--host is '0blocks', 0 blocks; allowed: 1 to"),
        ([str(SMALL), "--requests", "0"], "--requests is 0; allowed: at least 1"),
        ([str(SMALL), "--look-ahead", "-1"], "--look-ahead is -1; allowed: 0 to 4294967295"),
        ([str(SMALL), "--look-ahead", "5000000000"], "--look-ahead is 5000000000; allowed: 0 to 4294967295"),
        ([str(SMALL), "--host", "_blocks"], "--host is '_blocks'; allowed: a number of bytes"),
        ([str(SMALL), "--host", "9" * 5000 + "blocks"], ", far more blocks; allowed: 1 to 100000000 blocks"),
        (
            [str(SMALL), "--disk", "2000000000blocks"],
            "--disk is '2000000000blocks', 2000000000 blocks; allowed: 1 to 100000000 blocks",
        ),
        (
            [str(SMALL), "--plain", "--look-ahead", "4"],
            "--look-ahead is 4; allowed: 0 to 4294967295, and none with",
        ),
        ([str(SMALL), "--plot", "rates.txt"], "--plot is 'rates.txt'; allowed: a file ending in .png"),
        ([str(SMALL), "--plot", "/none/x.png"], "--plot is '/none/x.png'; there is no such folder"),
        ([str(SMALL), "--block-tokens", "0"], "--block-tokens is 0; allowed: an integer from 1 to"),
        ([str(SMALL), "--disk-policy", "mru"], "--disk-policy is 'mru'; allowed: return-hazard, lru"),
        ([str(SMALL), "--write-budget", "1GB"], "--write-budget needs --bytes-per-block"),
        ([str(SMALL), "--prefill-rate", "9"], "--prefill-rate needs --bytes-per-block"),
        (
            [str(SMALL), "--bytes-per-block", "8", "--prefill-rate", "0"],
            "--prefill-rate is 0.0; allowed: 1e-6 to 1e15",
        ),
        (
            [str(SMALL), "--bytes-per-block", "8", "--prefill-rate", "1e-320"],
            "--prefill-rate is 1e-320; allowed: 1e-6 to 1e15",
        ),
        ([str(SMALL), "--real"], "--real needs --bytes-per-block"),
        (
            [str(SMALL), "--real", "--bytes-per-block", "12"],
            "--bytes-per-block is '12'; allowed with --real: multiples of 8",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("simulate", "replay_real"):
        monkeypatch.setattr(replay, name, lambda *_, **__: pytest.fail("must not begin"))
    assert main(["replay", *argv]) == 1
    assert message in capsys.readouterr().err
