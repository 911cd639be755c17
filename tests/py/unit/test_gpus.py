"""What of the CUDA device can be promised without a GPU."""

import argparse
import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier import Config, ConfigError, KVLayout, UnsupportedError, gpus
from kvtier.cli import bench_device, main
from kvtier.cli.bench_device import LAYOUTS, SHAPES, page_runs, result_file_name, rows_at
from kvtier.cli.results import Report, problems
from kvtier.config import COPY_PATHS
from kvtier.gpus import copy_paths, cuda_facts

LAYOUT = KVLayout(1, 2, 8, "float16", 4)


@pytest.mark.parametrize(
    ("devices", "node"),
    [
        ([("0x10de", "0x030200", "1"), ("0x10de", "0x030200", "1"), ("0x8086", "0x030000", "0")], 1),
        ([("0x10de", "0x030200", "0"), ("0x10de", "0x030200", "1")], None),  # several nodes
        ([("0x10de", "0x030200", "-1")], None),  # the kernel does not know
        ([("0x10de", "0x020000", "1"), ("0x8086", "0x030000", "0")], None),  # a network card, another's GPU
        ([("0x10de", "0x030200", "nonsense")], None),
        ([], None),
    ],
)
def test_the_node_of_all_gpus(devices: list[tuple[str, str, str]], node: int | None, tmp_path: Path) -> None:
    for i, facts in enumerate(devices):
        (tmp_path / f"0000:{i:02x}:00.0").mkdir()
        for name, text in zip(("vendor", "class", "numa_node"), facts, strict=True):
            (tmp_path / f"0000:{i:02x}:00.0" / name).write_text(text + "\n")
    (tmp_path / "0000:ff:00.0").mkdir()  # tells nothing
    assert gpus.numa_node_of_gpus(tmp_path) == node


def test_host_memory_comes_from_the_node_that_is_named() -> None:
    with kvtier.open(Config(groups=[LAYOUT], host="1MiB", model="m@1", host_numa_node=0)) as engine:
        assert engine.stats().host_numa_node == 0
    with kvtier.open(Config(groups=[LAYOUT], host="1MiB", model="m@1", host_numa_node="any")) as engine:
        assert engine.stats().host_numa_node is None
    with pytest.raises(kvtier.ResourceError, match="NUMA node 1023"):
        kvtier.open(Config(groups=[LAYOUT], host="1MiB", model="m@1", host_numa_node=1023))


@pytest.mark.parametrize("node", ["0", "near", -1, 1024, 1.5, True])
def test_a_node_is_a_number_auto_or_any(node: Any) -> None:
    with pytest.raises(ConfigError, match="host_numa_node is"):
        Config(groups=[LAYOUT], host="1MiB", model="m@1", host_numa_node=node)


def test_the_environment_names_a_node() -> None:
    defaults = {"groups": [LAYOUT], "host": "1MiB", "model": "m@1"}
    assert Config.from_env({"KVTIER_HOST_NUMA_NODE": "3"}, **defaults).host_numa_node == 3
    assert Config.from_env({"KVTIER_HOST_NUMA_NODE": "any"}, **defaults).host_numa_node == "any"
    with pytest.raises(ConfigError, match="KVTIER_HOST_NUMA_NODE"):
        Config.from_env({"KVTIER_HOST_NUMA_NODE": "left"}, **defaults)


def gpu_is_here() -> bool:
    try:
        cuda_facts()
    except UnsupportedError:
        return False
    return True


def test_the_config_knows_the_copy_paths_that_the_core_has() -> None:
    assert ("auto", *copy_paths()) == COPY_PATHS


def test_gpu_options_are_read_and_checked_by_name() -> None:
    config = Config(groups=[LAYOUT], host="1MiB", model="m@1", gpu_load_rate="20GB", gpu_copy_path="staged")
    assert config.gpu_load_limit == 20_000_000_000
    assert config.gpu_store_limit is None
    for wrong in (
        {"gpu_copy_path": "fast"},
        {"gpu_copy_sms": 0},
        {"gpu_store_rate": "fast"},
        {"gpu_load_rate": 0},
        {"gpu_load_rate": "0%"},
        {"gpu_store_rate": "101 %"},
        {"gpu_store_rate": "-5%"},
        {"gpu_store_rate": 0.05},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Config(groups=[LAYOUT], host="1MiB", model="m@1", **wrong)  # type: ignore[arg-type]


def test_a_gpus_rate_may_be_a_share_of_decoding() -> None:
    config = Config(groups=[LAYOUT], host="1MiB", model="m@1", gpu_load_rate="5%", gpu_store_rate="100 %")
    assert (config.gpu_load_limit, config.gpu_store_limit) == (0.05, 1.0)
    assert isinstance(config.gpu_store_limit, float)  # an int would be bytes per second


def test_gpu_options_come_from_the_environment_too() -> None:
    variables = {"KVTIER_GPU_COPY_SMS": "4", "KVTIER_GPU_STORE_RATE": "1GB", "KVTIER_GPU_COPY_PATH": "bulk"}
    config = Config.from_env(variables, groups=[LAYOUT], host="1MiB", model="m@1")
    assert (config.gpu_copy_sms, config.gpu_store_limit) == (4, 10**9)
    assert config.gpu_copy_path == "bulk"


def test_the_core_imports_and_answers_without_a_driver() -> None:
    """In a process of its own, with whatever GPU there is hidden."""
    code = (
        "import kvtier.gpus\n"
        "try:\n    kvtier.gpus.cuda_facts()\nexcept kvtier.UnsupportedError as e:\n    print('no:', e)\n"
    )
    env = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.startswith("no: no CUDA device: ")


def test_bench_device_refuses_clearly_without_a_gpu(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if gpu_is_here():
        pytest.skip("there is a GPU")
    target = tmp_path / "device.json"
    assert main(["bench", "device", "--json", str(target)]) == 1
    assert "kvtier bench: no CUDA device: " in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_benchmarks_runs_cover_whole_blocks_and_mirror_each_other(shape: object, layout: str) -> None:
    host, pages, total = 1 << 40, 1 << 44, 64 << 20
    stores, loads = page_runs(shape, layout, host, pages, total, np.random.default_rng(0))  # type: ignore[arg-type]
    assert (stores[:, [1, 0, 2]] == loads).all()
    block = shape.layout.block_bytes(16)  # type: ignore[attr-defined]
    count = total // block
    assert int(stores[:, 2].sum()) == count * block
    sizes, slots, in_pages = loads[:, 2], np.sort(loads[:, 1]), np.sort(loads[:, 0])
    # No two runs share a byte on either side; the pages are dense, every slot has its header before it.
    assert (np.diff(in_pages) == sizes[0]).all()
    assert int(in_pages[0]) == pages
    assert (np.diff(slots) >= sizes[0]).all()
    assert int(slots[0]) == host + 4096
    assert int(slots[-1] + sizes[0]) == host + count * (block + 4096)


def test_the_70b_rank_has_runs_of_4_kib() -> None:
    runs = {shape.name: shape.run_bytes("layers") for shape in SHAPES}
    assert runs["llama-3.1-70b-tp8"] == 4096
    assert runs["llama-3.1-8b"] == 32768
    assert runs["deepseek-v3-mla"] == 16 * 576 * 2


class StandIn:
    """A GPU that is host memory and copies by memmove; `broken` loses the last byte of every run."""

    def __init__(self, *, broken: bool) -> None:
        self.lost = int(broken)
        self.kept: list[Any] = []

    def host_memory(self, size: int) -> Any:
        self.kept.append(np.zeros(size, np.uint8))
        return self.kept[-1]

    def device_memory(self, size: int) -> int:
        return int(self.host_memory(size).ctypes.data)

    def fill_device(self, begin: int, value: int, size: int) -> None:
        ctypes.memset(begin, value, size)

    def read_device(self, begin: int, size: int) -> Any:
        return np.frombuffer(ctypes.string_at(begin, size), np.uint8)

    def time(self, *, stores: Any, loads: Any, **_: Any) -> tuple[float, float, float]:
        for to, of, size in (*stores.tolist(), *loads.tolist()):
            ctypes.memmove(to, of, size - self.lost)
        return 1e-3, 1e-4, 1e-3

    def decode_alone(self) -> float:
        return 1e-3

    def paths(self) -> list[str]:
        return ["plain", "merged", "kernel"]

    def chosen(self, direction: str, run_bytes: int) -> str:
        return "plain" if direction == "store" else "kernel"


@pytest.mark.parametrize("broken", [False, True])
def test_the_benchmark_reports_every_name_once_and_no_figure_of_wrong_bytes(
    monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    gpu = gpus.Gpu(0, "Stand-in", 90, 132, 1 << 30, "0000:00:00.0", "unknown", None)
    monkeypatch.setattr(bench_device, "cuda_facts", lambda: gpus.CudaFacts(13000, 13000, (gpu,)))
    monkeypatch.setattr(bench_device, "device_bench", lambda *_, **__: StandIn(broken=broken))
    monkeypatch.setattr(bench_device, "LIMIT_BYTES", 1 << 20)
    args = argparse.Namespace(gpu=0, mib=8, sms=8, rate="1GB", rounds=1, seed=1)
    report = Report("bench device")
    bench_device.measure(args, report)
    assert problems(report.document()) == []
    assert report.checks == {"bytes": not broken}
    names = {result.name for result in report.results}
    assert {"limit/both", "decode_slowdown/both/limited", "decode_rate/load/free"} <= names
    reported = {
        f"{shape.name}/{layout}/{direction}/{path}{end}"
        for shape in SHAPES
        for layout in LAYOUTS
        for direction in ("store", "load")
        for path in ("calibrated", "plain", "merged", "kernel")
        for end in ("", "/submit", "/sms")
    }
    assert (reported & names) == (set() if broken else reported)
    if not broken:
        sms = {r.name: r.value for r in report.results if r.name.endswith("/sms")}
        where = "llama-3.1-70b-tp8/layers"
        assert [sms[f"{where}/load/{path}/sms"] for path in ("plain", "kernel", "calibrated")] == [0, 8, 8]
        # The stand-in's choice is a kernel for loads and none for stores.
        assert [sms[f"{where}/store/{path}/sms"] for path in ("merged", "kernel", "calibrated")] == [0, 8, 0]
        assert [sms[f"{where}/both/{path}/sms"] for path in ("plain", "kernel", "calibrated")] == [0, 16, 8]


class Quickening(StandIn):
    """Its clocks rise with every measurement; beside copies, the decode kernels take a fifth longer."""

    clock = 1.0

    def time(self, **options: Any) -> tuple[float, float, float]:
        copied, submitted, _ = super().time(**options)
        decode, self.clock = 1.2e-3 * self.clock, 0.9 * self.clock
        return copied, submitted, decode

    def decode_alone(self) -> float:
        return 1e-3 * self.clock


def test_decoding_beside_copies_is_compared_with_decoding_alone_at_that_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_device, "device_bench", lambda *_, **__: Quickening(broken=False))
    monkeypatch.setattr(bench_device, "LIMIT_BYTES", 1 << 20)
    report = Report("bench device")
    bench = bench_device._Bench(argparse.Namespace(gpu=0, mib=8, sms=8, rounds=3, seed=1), report)
    bench.slowdown("free", bench.native)
    slower = {r.name: r.value for r in report.results if r.name.startswith("decode_slowdown/")}
    assert slower == pytest.approx({f"decode_slowdown/{d}/free": 20.0 for d in ("store", "load", "both")})


def test_a_benchmark_that_is_killed_leaves_what_it_had_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = gpus.Gpu(0, "Stand-in", 90, 132, 1 << 30, "0000:00:00.0", "unknown", None)
    monkeypatch.setattr(bench_device, "cuda_facts", lambda: gpus.CudaFacts(13000, 13000, (gpu,)))
    monkeypatch.setattr(bench_device, "device_bench", lambda *_, **__: StandIn(broken=False))
    monkeypatch.setattr(bench_device, "LIMIT_BYTES", 1 << 20)
    file = tmp_path / "device.json"
    of_one_shape = 0

    def killed(*_: Any) -> None:
        raise SystemExit

    def first_shape_only(bench: Any, shape: Any, layout: str) -> None:
        nonlocal of_one_shape
        if of_one_shape:
            killed()
        measure_shape(bench, shape, layout)
        of_one_shape = len(report.results)

    measure_shape = bench_device._Bench.shape
    monkeypatch.setattr(bench_device._Bench, "shape", first_shape_only)
    report = Report("bench device", str(file))
    with pytest.raises(SystemExit):  # outside of `with report`: nothing writes the file at the end
        bench_device.measure(argparse.Namespace(gpu=0, mib=8, sms=8, rate="1GB", rounds=1, seed=1), report)
    document = json.loads(file.read_text())
    assert problems(document) == []
    assert len(document["results"]) == of_one_shape > 3
    assert document["checks"] == {"bytes": True, "completed": False}
    assert "completed" not in report.checks


def test_the_shares_of_gpu_checks_steps_add_up_to_less_than_nine_minutes() -> None:
    script = (Path(__file__).resolve().parents[3] / "scripts" / "gpu-check.sh").read_text()
    shares = [int(n) for n in re.findall(r"^step \w+ (\d+)", script, re.MULTILINE)]
    kill_after = int(re.findall(r"--kill-after=(\d+)", script)[0])
    assert len(shares) == 8
    assert sum(shares) == 530
    assert sum(shares) + kill_after < 9 * 60


def test_rows_are_found_by_their_address() -> None:
    memory = np.arange(100, dtype=np.uint8)
    rows = rows_at(memory, np.array([1010, 1050], np.uint64), 1000, 4)
    assert rows.tolist() == [[10, 11, 12, 13], [50, 51, 52, 53]]


def test_results_are_named_after_gpu_and_day() -> None:
    assert (
        result_file_name("NVIDIA H100 80GB HBM3", "2026-01-31") == "gpu-nvidia-h100-80gb-hbm3-2026-01-31.json"
    )


def test_gpu_memory_by_its_address_is_a_raw_tensor() -> None:
    raw = kvtier.RawTensor(4096, (8, 2, 4, 2, 8), (256, 128, 32, 16, 2), 2, kvtier.GpuMemory(0))
    if gpu_is_here():
        pytest.skip("there is a GPU")
    with (
        kvtier.open(Config(groups=[LAYOUT], block_tokens=4, host="1MiB", model="m@1")) as engine,
        pytest.raises(UnsupportedError, match="no CUDA device"),
    ):
        engine.attach([raw])
