"""Joules out of files as the kernel's powercap has them, and of an NVML that is handed in."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.cli import bench_ttft_table
from kvtier.cli.bench_ttft_plan import Fit, Room, Schedule, place
from kvtier.cli.energy import Energy
from kvtier.cli.shapes import SHAPES

MOST = 1_000_000_000  # microjoules, then the counters begin again
UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef"
NOBODY = 65534


class Powercap:
    """A folder like /sys/class/powercap."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def zone(self, zone: str, name: str, microjoules: int) -> Path:
        folder = self.path / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{MOST}\n")
        self.set(zone, microjoules)
        return folder

    def set(self, zone: str, microjoules: int) -> None:
        (self.path / zone / "energy_uj").write_text(f"{microjoules % MOST}\n")


@pytest.fixture
def powercap() -> Iterator[Powercap]:
    path = Path(tempfile.mkdtemp(prefix="kvtier-powercap-"))  # pytest's own are closed to other users
    path.chmod(0o755)
    (path / "intel-rapl").mkdir()  # the control type, no zone
    yield Powercap(path)
    shutil.rmtree(path)


def both(powercap: Powercap) -> Energy:
    powercap.zone("intel-rapl:0", "package-0", 999_000_000)
    powercap.zone("intel-rapl:1", "package-1", 5_000_000)
    return Energy(powercap=powercap.path)


class TestPackages:
    def test_they_are_added(self, powercap: Powercap) -> None:
        energy = both(powercap)
        assert (energy.sources, energy.missing) == (["RAPL package-0", "RAPL package-1"], [])
        before = energy.read()
        powercap.set("intel-rapl:0", 999_500_000)
        powercap.set("intel-rapl:1", 7_000_000)
        assert energy.since(before) == pytest.approx(2.5)

    def test_counters_go_round(self, powercap: Powercap) -> None:
        energy = both(powercap)
        before = energy.read()
        for i in range(1, 6):  # 600 J each, read in between: twice round and more
            powercap.set("intel-rapl:0", 999_000_000 + i * 600_000_000)
            powercap.set("intel-rapl:1", 5_000_000 + i)
            energy.read()
        assert energy.since(before) == pytest.approx(3000, abs=0.001)

    def test_what_would_count_twice_or_is_no_package_is_left_out(self, powercap: Powercap) -> None:
        powercap.zone("intel-rapl:1", "psys", 0)
        powercap.zone("intel-rapl:0:0", "dram", 0)
        powercap.zone("intel-rapl-mmio:0", "package-0", 0)
        assert Energy(powercap=powercap.path).missing == ["RAPL: the kernel shows no package"]
        powercap.zone("intel-rapl:0", "package-0", 0)
        assert Energy(powercap=powercap.path).sources == ["RAPL package-0"]

    def test_a_counter_that_did_not_step_says_nothing(self, powercap: Powercap) -> None:
        energy = both(powercap)
        before = energy.read()
        powercap.set("intel-rapl:1", 9_000_000)
        assert energy.since(before) is None

    def test_what_root_alone_may_read_is_absent_with_its_reason(self, powercap: Powercap) -> None:
        powercap.zone("intel-rapl:0", "package-0", 1)
        folder = powercap.zone("intel-rapl:1", "package-1", 1)
        (folder / "energy_uj").chmod(0o400 if os.geteuid() == 0 else 0)
        if os.geteuid() == 0:
            os.seteuid(NOBODY)
        try:
            energy = Energy(powercap=powercap.path)
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
        assert energy.sources == []
        assert energy.missing == ["RAPL: intel-rapl:1/energy_uj: Permission denied"]
        assert energy.since(energy.read()) is None

    def test_what_is_no_number_is_absent(self, powercap: Powercap) -> None:
        powercap.zone("intel-rapl:0", "package-0", 1)
        (powercap.path / "intel-rapl:0" / "energy_uj").write_text("denied\n")
        assert Energy(powercap=powercap.path).missing == ["RAPL: intel-rapl:0/energy_uj is 'denied'"]

    def test_one_that_fails_later_has_no_figure_from_then_on(self, powercap: Powercap) -> None:
        energy = both(powercap)
        before = energy.read()
        (powercap.path / "intel-rapl:0" / "energy_uj").unlink()
        powercap.set("intel-rapl:1", 9_000_000)
        assert energy.since(before) is None
        powercap.set("intel-rapl:0", 999_500_000)
        assert energy.since(before) is None
        assert energy.since(energy.read()) is None

    def test_a_machine_without_powercap(self, tmp_path: Path) -> None:
        energy = Energy(powercap=tmp_path / "none")
        assert (energy.sources, energy.missing) == ([], ["RAPL: the kernel shows no package"])


class Nvml:
    """What is asked of the module pynvml."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules: int | None = 5_000

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 - NVML's name
        if uuid != UUID:
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802 - NVML's name
        if self.millijoules is None or handle != "handle":
            raise self.NVMLError("Not Supported")
        return self.millijoules


class TestGpu:
    def test_it_is_added_to_the_packages(self, powercap: Powercap) -> None:
        nvml = Nvml()
        powercap.zone("intel-rapl:0", "package-0", 0)
        energy = Energy(UUID, powercap=powercap.path, nvml=nvml)
        assert energy.sources == ["RAPL package-0", "NVML"]
        before = energy.read()
        powercap.set("intel-rapl:0", 1_000_000)
        nvml.millijoules = 9_500
        assert energy.since(before) == pytest.approx(5.5)

    def test_alone_it_says_what_is_missing(self, powercap: Powercap) -> None:
        energy = Energy(UUID, powercap=powercap.path, nvml=Nvml())
        assert (energy.sources, energy.missing) == (["NVML"], ["RAPL: the kernel shows no package"])

    def test_without_its_counter_the_packages_do_not_stand_for_it(self, powercap: Powercap) -> None:
        nvml = Nvml()
        nvml.millijoules = None
        powercap.zone("intel-rapl:0", "package-0", 0)
        energy = Energy(UUID, powercap=powercap.path, nvml=nvml)
        assert (energy.sources, energy.missing) == ([], ["NVML: Not Supported"])
        other = Energy("GPU-other", powercap=powercap.path, nvml=Nvml())
        assert (other.sources, other.missing) == ([], ["NVML: Not Found"])

    def test_a_counter_that_goes_back_has_no_figure(self, powercap: Powercap) -> None:
        nvml = Nvml()
        energy = Energy(UUID, powercap=powercap.path, nvml=nvml)
        before = energy.read()
        nvml.millijoules = 10  # the driver was loaded anew
        assert energy.since(before) is None

    def test_without_its_library_it_is_absent(
        self, powercap: Powercap, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        assert Energy(UUID, powercap=powercap.path).missing[-1] == "NVML: nvidia-ml-py is not installed"


def test_runs_have_the_joules_of_what_was_computed_in_them(
    powercap: Powercap, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from kvtier.cli import bench_ttft_life as life

    shape = SHAPES["tiny"]
    room = Room(device=None, host=1 << 40, disk=1 << 40)
    layer = place(shape, [64, 128], room, dtype="float32", chunk=32, block_tokens=32)
    told = life.Life(str(powercap.path), asdict(shape), asdict(layer), "cpu", 1, 2, 1.0)
    world = life.World(told)
    powercap.zone("intel-rapl:0", "package-0", 0)
    world.energy = Energy(powercap=powercap.path)
    used, prefill = [0], world.decoder.prefill

    def costly(*given: Any) -> Any:
        used[0] += 300_000_000  # so the counter goes round within the longer of both
        powercap.set("intel-rapl:0", used[0])
        return prefill(*given)

    world.decoder.prefill = costly
    plan = Schedule(recomputed=(64, 128), repeated=(64,), rounds={}, seconds=1.0)
    life.recompute(world, plan, Fit(shape, 1e-12, 1e-12))
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = {line["row"]["tokens"]: line["row"] for line in said if "row" in line}
    assert rows[64]["joules"] == pytest.approx([900.0, 900.0])  # 2 chunks and the suffix
    assert rows[128]["joules"] == pytest.approx([1500.0])  # 4 and the suffix
    (powercap.path / "intel-rapl:0" / "energy_uj").write_text("gone")
    samples = life.Samples()
    world.first_token(64, samples)
    assert samples.joules == []


def test_the_table_has_columns_of_joules_where_there_are_any() -> None:
    kv = {"name": "kv_bytes/s/1024", "value": 1 << 20}
    joules = {"name": "energy/s/1024/host", "value": 1.25}
    header, rows = bench_ttft_table.cells({"results": [kv, joules]}, "s")
    assert header[-3:] == ["recompute J", "host J", "disk J"]
    assert rows[0][-3:] == ["", "1.25", ""]
    header, _ = bench_ttft_table.cells({"results": [kv]}, "s")
    assert not any(name.endswith(" J") for name in header)


def test_a_row_of_joules_needs_every_run() -> None:
    from kvtier.cli.bench_ttft import _Run
    from kvtier.cli.results import Report

    report = Report("bench ttft", machine={})
    shape: Any = SHAPES["tiny"]
    layer: Any = SimpleNamespace(kv_dtype="float32")
    run = _Run(SimpleNamespace(), report, SimpleNamespace(), shape, layer, 0.0)
    timed: dict[str, Any] = {"restore": [], "bandwidth": []}
    run._row(tokens=64, tier="device", seconds=[0.1, 0.2], joules=[3.0, 5.0], **timed)
    run._row(tokens=128, tier="device", seconds=[0.1, 0.2], joules=[3.0], **timed)
    found = {r.name: r for r in report.results}
    assert (found["energy/tiny/64/device"].value, found["energy/tiny/64/device"].n) == (4.0, 2)
    assert "energy/tiny/128/device" not in found
