"""`make torture`: the crash campaigns of the disk tier, longer, and the mutants that they must catch.

KVTIER_TORTURE_CYCLES says how many cycles of a real engine there are (default 4000), KVTIER_TORTURE_SEED
where their seeds begin (default: the time; printed). Before them run the campaigns on a simulated drive
(SlotStoreCampaign in tests/cpp/storage: power losses, torn, lost, misplaced and short transfers, errors),
KVTIER_CAMPAIGN_FACTOR times as long as in the tests (default: one for every 200 cycles). The last line is
JSON and counts both: {"cycles", "blocks_checked", "hits", "hits_expected", "wrong_bytes", "mutants_caught",
"mutants"}. The exit status is 1 after a wrong byte, a dropped block that came back, a driver that crashed or
hung, a missing hit (below 99 %), or a mutant that was not caught.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "py" / "crash"))

import disk_damage  # noqa: E402
import disk_mutants  # noqa: E402
from disk_campaign import Campaign, Tally  # noqa: E402
from disk_driver import ROOMY, TIGHT  # noqa: E402

CYCLES_OF_A_CAMPAIGN = 100
KINDS = [
    ("killed", {"capacity": ROOMY}),
    ("evicting", {"capacity": TIGHT}),
    ("killed", {"capacity": ROOMY}),
    ("catalog damaged", {"between": disk_damage.damage_catalog}),
    ("catalog damaged while running", {"during": disk_damage.damage_catalog_in_use}),
    ("slots damaged", {"between": disk_damage.damage_slots}),
    ("slots damaged while running", {"during": disk_damage.damage_slots}),
]
SUMMARY = ("cycles", "blocks_checked", "hits", "hits_expected", "wrong_bytes")
AT_ONCE = max(2, min(8, (os.cpu_count() or 2) + 1))


def campaign(home: Path, number: int, cycles: int, seed: int) -> Tally:
    """One campaign; its directory stays if something is wrong."""
    name, arguments = KINDS[number % len(KINDS)]
    place = home / str(number)
    place.mkdir()
    one = Campaign(place, seed + number, **arguments)
    tally = one.run(cycles - 1)  # and one more to see what is left
    print(
        f"{number:4d} {name}: {tally.cycles} cycles, {tally.hits} of {tally.hits_expected} hits", flush=True
    )
    if tally.good:
        shutil.rmtree(place)
    else:
        print(f"FAILED: {tally}\n{one.tail()}\nkept: {place}", flush=True)
    return tally


def mutants(home: Path, seed: int) -> tuple[Tally, int]:
    """Every scenario without and with its mutant. Returns what the sound ones found, and mutants caught."""
    tally, caught = Tally(), 0
    for point in disk_mutants.SCENARIOS:
        for s in range(seed, seed + 10):
            found = disk_mutants.run(point, home / f"sound-{point}-{s}", s, mutant=False)
            tally += Tally(
                cycles=1,
                blocks_checked=found.checked,
                hits=found.hits,
                hits_expected=found.hits_expected,
                wrong_bytes=found.wrong,
            )
        noticed = not disk_mutants.run(point, home / f"mutant-{point}", seed, mutant=True).good
        caught += noticed
        print(f"mutant without {point}: {'caught' if noticed else 'NOT CAUGHT'}", flush=True)
    return tally, caught


def simulated_drive(factor: int, seed: int) -> Tally:
    """The campaigns of the C++ tests, which print a line of JSON each."""
    build = subprocess.run(
        ["scripts/ctest.sh", "dev", "-R", "SlotStoreCampaign"], cwd=ROOT, capture_output=True, text=True
    )
    if build.returncode != 0:
        return Tally(troubles=[f"scripts/ctest.sh dev -R SlotStoreCampaign failed:\n{build.stdout[-4000:]}"])
    run = subprocess.run(
        [ROOT / "build/dev/tests/cpp/kvtier_storage_test", "--gtest_filter=SlotStoreCampaign.*-*is_caught"],
        env={**os.environ, "KVTIER_CAMPAIGN_FACTOR": str(factor), "KVTIER_CAMPAIGN_SEED": str(seed)},
        capture_output=True,
        text=True,
    )
    tally = Tally()
    for line in run.stdout.splitlines():
        if line.startswith('{"cycles"'):
            print(f"simulated drive: {line}", flush=True)
            found = json.loads(line)
            tally += Tally(**{name: found[name] for name in (*SUMMARY, "revived")})
    if run.returncode != 0 or tally.cycles == 0:
        tally.troubles.append(f"SlotStoreCampaign failed:\n{run.stdout[-4000:]}{run.stderr[-4000:]}")
        print(tally.troubles[-1], flush=True)
    return tally


def main() -> int:
    """Returns the exit status."""
    cycles = int(os.environ.get("KVTIER_TORTURE_CYCLES", "4000"))
    seed = int(os.environ.get("KVTIER_TORTURE_SEED", str(int(time.time()))))
    print(f"{cycles} cycles, seed {seed}, {AT_ONCE} campaigns at once", flush=True)
    factor = int(os.environ.get("KVTIER_CAMPAIGN_FACTOR", str(max(1, cycles // 200))))
    simulated = simulated_drive(factor, seed)
    home = Path(tempfile.mkdtemp(prefix="kvtier-torture."))
    lengths = [CYCLES_OF_A_CAMPAIGN] * (cycles // CYCLES_OF_A_CAMPAIGN)
    if cycles % CYCLES_OF_A_CAMPAIGN:
        lengths.append(cycles % CYCLES_OF_A_CAMPAIGN)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(campaign, home, n, length, seed) for n, length in enumerate(lengths)]
        tallies = [job.result() for job in jobs]
    sound, caught = mutants(home, seed)
    good = all(tally.good for tally in (simulated, *tallies, sound)) and caught == len(disk_mutants.SCENARIOS)
    total = Tally()
    for tally in (simulated, *tallies, sound):
        total += tally
    if good:
        shutil.rmtree(home)
    summary = {name: getattr(total, name) for name in SUMMARY}
    print(
        json.dumps({**summary, "mutants_caught": caught, "mutants": len(disk_mutants.SCENARIOS)}), flush=True
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
