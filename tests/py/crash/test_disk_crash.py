"""A driver of a real engine with a disk tier is killed again and again: right bytes or a miss (I7, I8).

What flush() confirmed is served by the next engine, what drop() confirmed never is. More of the same, with
mutants: `make torture`.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import disk_damage
import disk_mutants
from disk_campaign import Campaign, Tally
from disk_driver import ROOMY, TIGHT

pytestmark = pytest.mark.timeout(300)

CAMPAIGNS: dict[str, dict[str, Any]] = {
    "killed": {"cycles": 120},
    "evicting": {"cycles": 60, "capacity": TIGHT},
    "catalog_damaged": {"cycles": 80, "between": disk_damage.damage_catalog},
    "catalog_damaged_while_running": {"cycles": 40, "during": disk_damage.damage_catalog_in_use},
    "slots_damaged": {"cycles": 60, "between": disk_damage.damage_slots},
    "slots_damaged_while_running": {"cycles": 60, "during": disk_damage.damage_slots},
}
AT_ONCE = 3  # they mostly wait for syncs


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "Future[tuple[Tally, str]]"]]:
    """All of them, running beside each other; each test waits for its own."""

    def run(name: str, seed: int) -> tuple[Tally, str]:
        arguments = {"capacity": ROOMY, **CAMPAIGNS[name]}
        cycles = arguments.pop("cycles")
        campaign = Campaign(tmp_path_factory.mktemp(name), seed, **arguments)
        tally = campaign.run(cycles)
        return tally, campaign.tail()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(run, name, seed) for seed, name in enumerate(CAMPAIGNS, 1)}


def finished(campaigns: dict[str, "Future[tuple[Tally, str]]"], name: str) -> Tally:
    tally, log = campaigns[name].result()
    assert tally.good, f"{tally}\n{log}"
    assert tally.cycles == CAMPAIGNS[name]["cycles"] + 1
    assert tally.killed >= 0.7 * tally.cycles
    assert tally.checks >= 0.5 * tally.cycles
    assert 0 < tally.most_bytes <= CAMPAIGNS[name].get("capacity", ROOMY)
    return tally


def test_the_campaigns_are_as_many_cycles_as_promised() -> None:
    assert sum(campaign["cycles"] for campaign in CAMPAIGNS.values()) >= 300


def test_what_was_durable_is_served_after_a_kill_and_what_was_dropped_is_not(campaigns: Any) -> None:
    tally = finished(campaigns, "killed")
    assert tally.hits_expected >= 2000
    assert tally.opened_from["catalog"] >= 60


def test_a_disk_that_evicts_has_right_bytes_or_a_miss_after_a_kill(campaigns: Any) -> None:
    tally = finished(campaigns, "evicting")
    assert tally.hits_expected >= 300
    assert tally.served >= 500
    assert tally.not_served >= 300, "nothing was evicted"


def test_a_catalog_that_is_lost_cut_or_old_costs_no_promise(campaigns: Any) -> None:
    tally = finished(campaigns, "catalog_damaged")
    assert tally.hits_expected >= 300
    assert tally.sabotages >= 30
    assert tally.opened_from["headers"] >= 10


def test_a_catalog_that_is_cut_or_removed_while_an_engine_runs_costs_no_promise(campaigns: Any) -> None:
    tally = finished(campaigns, "catalog_damaged_while_running")  # no driver has died of it
    assert tally.hits_expected >= 300
    assert tally.sabotages >= 6  # the catalog is often whole again when the kill comes


@pytest.mark.parametrize("name", ["slots_damaged", "slots_damaged_while_running"])
def test_slot_files_that_others_write_to_lose_what_was_hit_and_nothing_else(
    campaigns: Any, name: str
) -> None:
    tally = finished(campaigns, name)
    assert tally.sabotages >= 8
    assert tally.hits_expected >= 200
    assert tally.served >= 50


@pytest.mark.parametrize("point", disk_mutants.SCENARIOS)
def test_a_store_that_skips_a_proof_is_caught(point: str, tmp_path: Path) -> None:
    assert not disk_mutants.run(point, tmp_path / "mutant", 1, mutant=True).good


@pytest.mark.parametrize("point", disk_mutants.SCENARIOS)
@pytest.mark.parametrize("seed", range(3))
def test_with_every_proof_made_nothing_is_noticed(point: str, seed: int, tmp_path: Path) -> None:
    found = disk_mutants.run(point, tmp_path / "sound", seed, mutant=False)
    assert found.good
    assert found.checked > 0
