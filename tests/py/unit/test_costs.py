"""Load or recompute: the decision, cell by cell; what is learned; what it would have been best to do."""

from dataclasses import replace

import numpy as np
import pytest

from kvtier import ConfigError
from kvtier.costs import (
    Choice,
    Hit,
    LoadPlanner,
    Plan,
    Prefill,
    PrefillMeter,
    decide,
    pairs,
    regret,
    tier_runs,
)
from kvtier.metrics import Hops, HopStats

MB = 1 << 20
HOST, DISK = False, True


def hop(gb_per_s: float, latency: float = 0.0, queue: int = 0) -> HopStats:
    return HopStats(
        transfers=9,
        bytes=1,
        seconds=1.0,
        running_bytes=queue,
        latency_seconds=latency,
        bytes_per_second=gb_per_s * 1e9,
    )


def hops(host: float = 50.0, disk: float = 6.0, **more: float) -> Hops:
    return Hops(
        to_device=hop(host, more.get("latency", 0.001), int(more.get("host_queue", 0))),
        from_disk=hop(disk, more.get("disk_latency", 0.001), int(more.get("disk_queue", 0))),
    )


def hit(*runs: tuple[int, bool], **more: int | bool) -> Hit:
    """Blocks of 16 tokens and 2 MiB, as of an 8B model; behind them 64 tokens more."""
    blocks = sum(count for count, _ in runs)
    first = int(more.get("first_token", 0))
    return Hit(runs, first, first + blocks * 16 + 64, 16, 2 * MB, bool(more.get("pipelined", True)))


H100 = Prefill(per_token=4e-5, per_pair=1.2e-9)  # 12 s for 128k tokens
UNMEASURED = hop(0.0)

# name, hit, hops, prefill, blocks to load, why
TABLE = [
    ("a long prefix in host memory", hit((8000, HOST)), hops(), H100, 8000, Choice.ALL),
    ("a long prefix on disk", hit((8000, DISK)), hops(), H100, 8000, Choice.ALL),
    ("nothing is known of prefills", hit((8000, HOST)), hops(host=0.001), None, 8000, Choice.UNMEASURED),
    (
        "nothing is known of the device",
        hit((8, HOST)),
        replace(hops(), to_device=UNMEASURED),
        H100,
        8,
        Choice.UNMEASURED,
    ),
    (
        "nothing is known of the disk",
        hit((8, HOST), (8, DISK)),
        replace(hops(), from_disk=UNMEASURED),
        H100,
        16,
        Choice.UNMEASURED,
    ),
    (
        "the disk is not needed",
        hit((8000, HOST)),
        replace(hops(), from_disk=UNMEASURED),
        H100,
        8000,
        Choice.ALL,
    ),
    ("a slow disk behind host memory", hit((500, HOST), (500, DISK)), hops(disk=0.1), H100, 500, Choice.PART),
    ("a slow disk alone", hit((500, DISK)), hops(disk=0.2), H100, 0, Choice.NONE),
    (
        "host memory behind a slow disk",
        hit((100, DISK), (9000, HOST)),
        hops(disk=0.2),
        H100,
        9100,
        Choice.ALL,
    ),
    ("a disk with a queue of 20 GB", hit((500, DISK)), hops(disk_queue=20 * 10**9), H100, 0, Choice.NONE),
    (
        "the same, but the prompt is long",
        hit((8000, DISK)),
        hops(disk_queue=20 * 10**9),
        H100,
        8000,
        Choice.ALL,
    ),
    ("a bus with a queue of 50 GB", hit((500, HOST)), hops(host_queue=50 * 10**9), H100, 0, Choice.NONE),
    ("less is gained than it is worth", hit((2, HOST)), hops(latency=0.015), H100, 2, Choice.ALL),
    ("a latency that a short hit is not worth", hit((2, HOST)), hops(latency=0.5), H100, 0, Choice.NONE),
    ("attention: far behind", hit((500, DISK), first_token=900_000), hops(disk=0.9), H100, 500, Choice.ALL),
    ("attention: at the beginning", hit((500, DISK)), hops(disk=0.9), H100, 0, Choice.NONE),
    ("nothing was found", hit(), hops(), H100, 0, Choice.ALL),
]


@pytest.mark.parametrize(
    ("found", "known", "prefill", "blocks", "why"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_what_is_loaded(found: Hit, known: Hops, prefill: Prefill | None, blocks: int, why: Choice) -> None:
    decision = decide(found, known, prefill)
    assert (decision.load_blocks, decision.choice) == (blocks, why)
    assert decision.disk_blocks == found.disk_blocks(blocks)
    if why is not Choice.UNMEASURED:
        assert decision.seconds <= decision.all_seconds


def test_no_other_cut_is_better() -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        runs = tuple((int(rng.integers(1, 200)), bool(n % 2)) for n in range(rng.integers(1, 5)))
        found = hit(*runs, pipelined=bool(rng.integers(2)), first_token=int(rng.integers(0, 50_000)))
        host = float(rng.uniform(0.2, 5))
        disk = host / float(rng.uniform(0.5, 8))
        known = hops(
            host=host,
            disk=disk,
            host_queue=float(rng.integers(0, 1 << 28)),
            disk_queue=float(rng.integers(0, 1 << 26)),
        )
        per_token = 2 * MB / 16 / (float(rng.uniform(0.5 * disk, 1.2 * host)) * 1e9)
        prefill = Prefill(per_token, per_token * float(rng.uniform(0, 1e-4)))
        seconds = [
            found.load_seconds(cut, known) + found.compute_seconds(cut, prefill)
            for cut in range(found.num_blocks + 1)
        ]
        decision = decide(found, known, prefill, least_gain_seconds=0.0)
        ends = set(np.cumsum([0] + [count for count, _ in runs]).tolist())
        inside += decision.load_blocks not in ends
        slack = 0.1 * seconds[-1] if decision.choice is Choice.ALL else 1e-9
        assert decision.seconds - min(seconds) <= slack, (found, known, prefill)
    assert inside > 5  # where reads from disk hide behind the way to the device


def test_a_load_in_turn_waits_for_the_disk_first() -> None:
    found, known = hit((10, HOST), (10, DISK)), hops(host=10, disk=5, latency=0.0, disk_latency=0.0)
    assert found.load_seconds(20, known) == pytest.approx(20 * 2 * MB / 10e9)  # the disk's half hides
    in_turn = replace(found, pipelined=False)
    assert in_turn.load_seconds(20, known) == pytest.approx(20 * 2 * MB / 10e9 + 10 * 2 * MB / 5e9)
    assert found.load_seconds(0, known) == 0


def test_pairs_are_what_attention_computes() -> None:
    for begin, end in [(0, 5), (3, 9), (7, 7), (9, 3)]:
        assert pairs(begin, end) == sum(range(begin, end))
    assert Prefill(2.0, 0.5).seconds(3, 6) == 2 * 3 + 0.5 * (3 + 4 + 5)


def test_runs_of_tiers() -> None:
    assert tier_runs([]) == ()
    assert tier_runs(np.array([False, False, True, False])) == ((2, False), (1, True), (1, False))
    assert hit((2, HOST), (3, DISK)).disk_blocks(4) == 2


# --- learning ---


def test_a_prefill_is_learned_from_steps_at_different_positions() -> None:
    true = Prefill(3e-5, 2e-9)
    meter = PrefillMeter()
    rng = np.random.default_rng(1)
    for _ in range(60):
        begin, tokens = int(rng.integers(0, 200_000)), int(rng.integers(64, 8192))
        seconds = true.seconds(begin, begin + tokens) * float(rng.uniform(0.97, 1.03))
        meter.observe(tokens, pairs(begin, begin + tokens), seconds)
    assert meter.prefill is not None
    assert meter.prefill.per_token == pytest.approx(true.per_token, rel=0.2)
    assert meter.prefill.per_pair == pytest.approx(true.per_pair, rel=0.1)
    assert meter.prefill.seconds(0, 131_072) == pytest.approx(true.seconds(0, 131_072), rel=0.05)


def test_steps_that_say_nothing_are_left_out() -> None:
    meter = PrefillMeter()
    for tokens, seconds in [(8, 0.01), (63, 0.01), (4096, 0.0), (4096, 61.0), (4096, -1.0)]:
        for _ in range(5):
            meter.observe(tokens, 0.0, seconds)
    assert meter.prefill is None
    for _ in range(3):
        meter.observe(1000, pairs(0, 1000), 0.5)
    assert meter.prefill == Prefill(pytest.approx(5e-4))  # one position: all is the token's


def test_a_prefill_forgets() -> None:
    meter = PrefillMeter()
    for _ in range(100):
        meter.observe(1000, pairs(0, 1000), 1.0)
    for _ in range(200):
        meter.observe(1000, pairs(0, 1000), 0.1)
    assert meter.prefill is not None
    assert meter.prefill.seconds(0, 1000) == pytest.approx(0.1, rel=0.02)


def test_costs_are_never_negative() -> None:
    meter = PrefillMeter()
    for begin, seconds in [(0, 1.0), (100_000, 0.5), (0, 1.0), (100_000, 0.5)]:  # faster the later: noise
        meter.observe(1000, pairs(begin, begin + 1000), seconds)
    assert meter.prefill is not None
    assert meter.prefill.per_token > 0
    assert meter.prefill.per_pair == 0


# --- a planner ---


def planner(known: Hops, prefill: Prefill = H100) -> LoadPlanner:
    made = LoadPlanner(lambda: known)
    for begin in range(0, 64_000, 8000):
        made.observe_prefill(8000, pairs(begin, begin + 8000), prefill.seconds(begin, begin + 8000))
    return made


def test_decisions_are_counted_when_they_are_taken() -> None:
    made = planner(hops(disk=0.2))
    loads = made.plan(hit((500, HOST), (500, DISK), pipelined=False))
    assert made.stats().decisions == 0  # a request may be looked up many times
    made.record(loads)
    made.record(made.plan(hit((500, DISK))))
    made.record(made.plan(hit((600, HOST))))
    made.settle(loads, 0.03)
    stats = made.stats()
    assert (stats.decisions, stats.chose_part, stats.chose_none, stats.chose_all) == (3, 1, 1, 1)
    assert (stats.blocks_loaded, stats.blocks_left, stats.blocks_from_disk) == (1100, 1000, 0)
    assert (stats.settled, stats.observed_seconds) == (1, 0.03)
    assert stats.predicted_seconds == pytest.approx(loads.decision.load_seconds)
    assert stats.gained_seconds > 5  # two times 1 GB at 0.2 GB/s, less what computing takes


def test_a_plan_is_the_same_however_often_it_is_asked_for() -> None:
    made = planner(hops(disk=0.2))
    found = hit((500, HOST), (500, DISK))
    assert len({made.plan(found).decision for _ in range(50)}) == 1


def test_now_and_then_a_load_that_looks_slow_is_tried() -> None:
    made = planner(hops(disk=0.2))
    choices = []
    for _ in range(64):
        plan = made.plan(hit((500, DISK)))
        made.record(plan)
        choices.append(plan.decision.choice)
    assert choices.count(Choice.PROBE) == 4
    assert choices.count(Choice.NONE) == 60
    assert made.stats().probes == 4


def test_what_is_being_read_already_is_not_waited_for_twice() -> None:
    found = hit((500, DISK), pipelined=False)
    made = planner(hops(disk=2, disk_queue=500 * 2 * MB))
    assert made.plan(found, own_running_bytes=500 * 2 * MB).decision.load_seconds == pytest.approx(
        planner(hops(disk=2)).plan(found).decision.load_seconds
    )


def test_always_loads_and_asks_nothing() -> None:
    made = LoadPlanner(lambda: pytest.fail("not asked"), "always")
    plan = made.plan(hit((500, DISK)))
    made.record(plan)
    assert (plan.decision.load_blocks, made.stats().chose_all) == (500, 1)
    with pytest.raises(ConfigError, match=r'load is \'never\'; allowed: "auto" or "always"'):
        LoadPlanner(hops, "never")  # type: ignore[arg-type]


def test_regret_is_what_a_wrong_belief_has_cost() -> None:
    slow, fast = hops(disk=0.2), hops(disk=6)
    found = hit((500, DISK))
    believed = Plan(found, slow, decide(found, slow, H100))
    assert believed.decision.load_blocks == 0
    lost = regret([believed], fast, H100)
    assert (lost.decisions, lost.decided) == (1, pytest.approx(lost.load_none))
    assert lost.seconds == pytest.approx(
        H100.seconds(0, 8064) - (0.002 + 500 * 2 * MB / 6e9 + H100.seconds(8000, 8064))
    )
    assert regret([believed], slow, H100).seconds == 0
    assert regret([believed], replace(fast, from_disk=UNMEASURED), H100).decisions == 0


def test_what_was_observed_beats_what_was_predicted() -> None:
    found, known = hit((500, HOST)), hops()
    plan = Plan(found, known, decide(found, known, H100), observed_seconds=10.0)
    result = regret([plan], known, H100)
    assert result.decided == pytest.approx(10 + H100.seconds(8000, 8064))
    assert result.best <= result.load_none < result.decided


def test_a_planner_replays_its_last_decisions() -> None:
    known = [hops(disk=0.2)]
    made = planner(known[0])
    made._hops = lambda: known[0]
    for _ in range(5):
        made.record(made.plan(hit((500, DISK))))
    assert made.regret().seconds == 0  # type: ignore[union-attr]
    known[0] = hops(disk=6)
    assert made.regret().seconds > 0.5  # type: ignore[union-attr]
    assert LoadPlanner(lambda: known[0]).regret() is None
