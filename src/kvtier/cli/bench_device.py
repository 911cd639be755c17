"""How fast blocks move between a GPU's pages and host slots, beside plain pinned copies of the same run.

The limit of a direction is one plain cudaMemcpyAsync of 256 MiB of pinned memory; of both, the sum of two
such copies at once. Then, for every shape and layout: each path, the path that the calibration chose, the
CPU's time of submission, and how much longer kernels that only read HBM (as decoding does) take beside it.

Result names: `limit/<direction>`; `<shape>/<layout>/<direction>/<path>` in GB/s, with `calibrated` for the
chosen path, `<...>/submit` in us per block and `<...>/sms`, the SMs that its kernels use;
`decode_slowdown/<load|store|both>/<limited|free>` in percent and `decode_rate/<...>`, the GB/s moved
meanwhile. Path `batched` is what vLLM uses, `plain` is one copy for each run.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import numpy.typing as npt

import kvtier
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, Result, measured, results_table
from kvtier.config import parse_rate
from kvtier.errors import ConfigError
from kvtier.gpus import CudaFacts, Gpu, cuda_facts, device_bench

Runs = npt.NDArray[np.uint64]
NO_RUNS: Runs = np.empty((0, 3), np.uint64)
DIRECTIONS = ("store", "load", "both")
LIMIT_BYTES = 256 << 20
HEADER_BYTES = 4096  # before a slot's payload
RUNS_PER_BATCH = 16384  # as the transfer layer submits them, but the first few
CHECKED_RUNS = 4096  # of each candidate, whose bytes are compared
# Their kernels have a thread block, and so an SM, for each of --sms: batches of this size have work for more.
# The others leave the SMs alone.
KERNEL_PATHS = ("kernel", "staged", "bulk")


@dataclass(frozen=True)
class Shape:
    """A model's blocks of 16 tokens, on one rank."""

    name: str
    layout: kvtier.KVLayout

    def run_bytes(self, page_layout: str) -> int:
        """Bytes that are contiguous in a page."""
        block = self.layout.block_bytes(16)
        return block // (self.layout.num_layers * self.layout.num_parts) if page_layout == "layers" else block


SHAPES = (
    Shape("llama-3.1-8b", kvtier.KVLayout(32, 8, 128, "bfloat16", 16)),
    Shape("llama-3.1-70b-tp8", kvtier.KVLayout(80, 1, 128, "bfloat16", 16)),
    Shape("qwen2.5-7b", kvtier.KVLayout(28, 4, 128, "bfloat16", 16)),
    Shape(
        "deepseek-v3-mla",
        kvtier.KVLayout.mla(num_layers=61, latent_dim=576, dtype="bfloat16", page_tokens=16),
    ),
)
LAYOUTS = ("layers", "contiguous")  # every layer (and K, V) in a tensor of its own; a block in one run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench device`."""
    parser.add_argument("--gpu", type=int, default=0, help="ordinal (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=256, help="moved by each copy (default: %(default)s)")
    parser.add_argument("--sms", type=int, default=8, help="that copy kernels may use (default: %(default)s)")
    parser.add_argument(
        "--rate",
        default="5%",
        help="what each direction of the limited runs may take (default: %(default)s of decoding)",
    )


def measure(args: argparse.Namespace, report: Report) -> None:
    """Runs the benchmark into `report`."""
    rate = parse_rate(args.rate, "--rate")
    if args.mib < 8 or args.sms < 1:
        raise ConfigError(f"--mib {args.mib} --sms {args.sms}: at least 8 MiB and one SM")
    facts = cuda_facts()
    if not 0 <= args.gpu < len(facts.gpus):
        raise ConfigError(f"--gpu {args.gpu}; allowed: 0 to {len(facts.gpus) - 1}")
    gpu = facts.gpus[args.gpu]
    describe(report, facts, gpu, args)
    bench = _Bench(args, report)
    with Progress(report.out, len(SHAPES) * len(LAYOUTS) + 3) as progress:
        progress.phase("limits")
        bench.limits()
        progress.step()
        report.save()
        for shape in SHAPES:
            for layout in LAYOUTS:
                progress.phase(f"{shape.name}, {layout}")
                bench.shape(shape, layout)
                progress.step()
                report.save()
        progress.phase("beside decoding")
        bench.slowdown("free", bench.native)
        progress.step()
        report.save()
        limited = device_bench(args.gpu, max_sms=args.sms, store_limit=rate, load_limit=rate)
        bench.slowdown("limited", limited)
        progress.step()
    print(
        "\nlimit: plain pinned copies of 256 MiB; ratio: beside it, of the same round. calibrated: the\n"
        "path that is used. batched: the driver's batched copy, as vLLM uses it; plain: one copy a run.\n",
        file=report.out,
    )
    print(results_table(report.results, bench.targets), file=report.out)


def describe(report: Report, facts: CudaFacts, gpu: Gpu, args: argparse.Namespace) -> None:
    """Writes what the figures are measured on into the report."""
    report.machine["gpu"] = gpu.name
    report.machine["gpu_link"] = gpu.link
    report.machine["gpu_numa_node"] = gpu.numa_node
    report.machine["gpu_sms"] = gpu.num_sms
    report.machine["copy_sms"] = args.sms
    report.machine["driver"] = facts.driver_version
    report.machine["cuda_runtime"] = facts.runtime_version
    report.machine["measured_at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    print(f"{gpu.name}, {gpu.link}, driver {facts.driver_version}, {args.sms} SMs", file=report.out)


def page_runs(shape: Shape, layout: str, host: int, pages: int, total: int, rng: Any) -> tuple[Runs, Runs]:
    """The runs of whole blocks between scattered pages and slots, as the transfer layer plans them.

    Args:
        shape: The model's.
        layout: "layers" or "contiguous".
        host: Address of the first slot.
        pages: Address of the device memory that holds all pages.
        total: Bytes to move, rounded down to whole blocks.
        rng: Which page each block has.

    Returns:
        The store's and the load's runs, uint64 [n, 3]: destination, source, bytes.
    """
    block, run = shape.layout.block_bytes(16), shape.run_bytes(layout)
    count, each = total // block, block // run
    slots = host + HEADER_BYTES + np.arange(count, dtype=np.uint64)[:, None] * np.uint64(block + HEADER_BYTES)
    in_slot = slots + np.arange(each, dtype=np.uint64) * np.uint64(run)
    page_of = rng.permutation(count).astype(np.uint64)[:, None]
    # A tensor for each layer and part, each with all pages; or one tensor with whole blocks.
    in_pages = pages + np.arange(each, dtype=np.uint64) * np.uint64(count * run) + page_of * np.uint64(run)
    sizes = np.full(count * each, run, np.uint64)
    slot_side, page_side = in_slot.ravel(), in_pages.ravel()
    return (
        np.ascontiguousarray(np.stack([slot_side, page_side, sizes], 1)),
        np.ascontiguousarray(np.stack([page_side, slot_side, sizes], 1)),
    )


class _Bench:
    def __init__(self, args: argparse.Namespace, report: Report) -> None:
        self.args = args
        self.report = report
        self.rng = np.random.default_rng(args.seed)
        self.native = device_bench(args.gpu, max_sms=args.sms)
        self.total = args.mib << 20
        room = max(2 * self.total, LIMIT_BYTES)  # slots have headers
        self.host = {d: self.native.host_memory(room) for d in ("store", "load")}
        self.pages = {d: self.native.device_memory(room) for d in ("store", "load")}
        self.host["load"][:] = self.rng.integers(0, 256, room, np.uint8)
        self.targets: dict[str, str] = {}

    def _address(self, direction: str) -> int:
        return int(self.host[direction].ctypes.data)

    def _time(self, native: Any, runs: dict[str, Runs], path: str | None, beside: str = "nothing") -> Any:
        return native.time(
            stores=runs.get("store", NO_RUNS),
            loads=runs.get("load", NO_RUNS),
            runs_per_batch=RUNS_PER_BATCH,
            path=path,
            beside=beside,
        )

    def _limit_runs(self, direction: str) -> dict[str, Runs]:
        runs = {}
        for each in ("store", "load"):
            if direction in (each, "both"):
                host, device = self._address(each), self.pages[each]
                ends = (host, device) if each == "store" else (device, host)
                runs[each] = np.array([[*ends, LIMIT_BYTES]], np.uint64)
        return runs

    def _limit(self, direction: str) -> float:
        runs = self._limit_runs(direction)
        seconds: float = self._time(self.native, runs, "plain")[0]
        return len(runs) * LIMIT_BYTES / seconds / 1e9

    def limits(self) -> None:
        # The stores' pages hold random bytes from here on.
        fill = np.array([[self.pages["store"], self._address("load"), self.total]], np.uint64)
        self._time(self.native, {"load": fill}, "plain")
        for direction in DIRECTIONS:
            rates = [self._limit(direction) for _ in range(self.args.rounds + 1)][1:]
            self.report.add(measured(f"limit/{direction}", rates, "GB/s"))

    def shape(self, shape: Shape, layout: str) -> None:
        both = {}
        for each in ("store", "load"):
            pair = page_runs(shape, layout, self._address(each), self.pages[each], self.total, self.rng)
            both[each] = pair[0] if each == "store" else pair[1]
        for direction in DIRECTIONS:
            runs = {k: v for k, v in both.items() if direction in (k, "both")}
            self._paths(f"{shape.name}/{layout}/{direction}", runs, direction, shape)

    def _paths(self, name: str, runs: dict[str, Runs], direction: str, shape: Shape) -> None:
        paths: list[str | None] = [None, *self.native.paths()]
        rates: dict[str | None, list[float]] = {path: [] for path in paths}
        submits: dict[str | None, list[float]] = {path: [] for path in paths}
        limits = []
        moved = sum(int(r[:, 2].sum()) for r in runs.values())
        blocks = moved // shape.layout.block_bytes(16)
        for _ in range(self.args.rounds + 1):
            limits.append(self._limit(direction))
            for path in paths:
                copied, submitted, _ = self._time(self.native, runs, path)
                rates[path].append(moved / copied / 1e9)
                submits[path].append(submitted / blocks * 1e6)
        right = direction == "both" or all(self._right(runs, path) for path in paths)
        self.report.checks["bytes"] = self.report.checks.get("bytes", True) and right
        if not right:
            print(f"wrong bytes: {name} is not reported", file=self.report.out)
            return
        chosen = {each: self.native.chosen(each, int(r[0, 2])) for each, r in runs.items()}
        for path in paths:
            full = f"{name}/{path or 'calibrated'}"
            kernels = sum((path or chosen[each]) in KERNEL_PATHS for each in runs)  # one for each direction
            self.report.add(measured(full, rates[path][1:], "GB/s", limits[1:]))
            self.report.add(measured(f"{full}/submit", submits[path][1:], "us"))
            self.report.add(Result(f"{full}/sms", kernels * self.args.sms, "SMs"))
        self.targets[f"{name}/calibrated"] = "ratio >= 0.95" if direction == "both" else "ratio >= 0.97"
        self.report.machine.setdefault("chosen", {})[name] = chosen

    def _right(self, runs: dict[str, Runs], path: str | None) -> bool:
        """Whether the bytes of the first runs arrive, over poisoned destinations."""
        for each, array in runs.items():
            first = array[:CHECKED_RUNS]
            host, device = self._address(each), self.pages[each]
            host_column, device_column = (1, 0) if each == "load" else (0, 1)
            n = int(array[0, 2])
            if each == "load":
                self.native.fill_device(device, 0xEE, self.total)
            else:
                self.host[each][: int(first[:, host_column].max()) - host + n] = 0xDD
            self._time(self.native, {each: first}, path)
            # The stores' pages hold what the loads' slots hold: limits() has copied it.
            there = self.native.read_device(device, self.total) if each == "load" else self.host["load"]
            in_slots = rows_at(self.host[each], first[:, host_column], host, n)
            in_pages = rows_at(there, first[:, device_column], device, n)
            if not np.array_equal(in_slots, in_pages):
                return False
            # Equal poison would be no proof.
            if (in_pages == 0xEE).all() or (in_slots == 0xDD).all():
                return False
        return True

    def slowdown(self, kind: str, native: Any) -> None:
        """Beside a kernel that reads HBM: the 70B rank's pages, the hardest."""
        shape = SHAPES[1]
        for direction in DIRECTIONS:
            runs = {}
            for each in ("store", "load"):
                if direction in (each, "both"):
                    args = (self._address(each), self.pages[each], self.total, self.rng)
                    pair = page_runs(shape, "layers", *args)
                    runs[each] = pair[0] if each == "store" else pair[1]
            moved = sum(int(r[:, 2].sum()) for r in runs.values())
            # Two devices, one memory: the limited one knows nothing of what the other has registered.
            if kind == "limited":
                runs = self._own(native, runs)
            slower: list[float] = []
            rates: list[float] = []
            for _ in range(self.args.rounds + 1):
                alone = native.decode_alone()  # of the same moment: a GPU's clocks change
                copied, _, decode = self._time(native, runs, None, "decode")
                slower.append(100 * (decode / alone - 1))
                rates.append(moved / copied / 1e9)
            slower, rates = slower[1:], rates[1:]
            self.report.add(
                measured(f"decode_slowdown/{direction}/{kind}", slower, "%"),
                measured(f"decode_rate/{direction}/{kind}", rates, "GB/s"),
            )
            if kind == "limited":
                self.targets[f"decode_slowdown/{direction}/{kind}"] = "<= 10 %"
            median = statistics.median(slower)
            print(f"decode beside {direction}, {kind}: {median:.1f} % longer", file=self.report.out)

    def _own(self, native: Any, runs: dict[str, Runs]) -> dict[str, Runs]:
        moved = {}
        for each, array in runs.items():
            column = 0 if each == "store" else 1
            size = int(array[:, column].max() - array[:, column].min() + array[0, 2])
            memory = native.host_memory(size)
            self.host[f"{each} limited"] = memory  # stays until the end
            own = array.copy()
            own[:, column] += np.uint64((int(memory.ctypes.data) - int(array[:, column].min())) % 2**64)
            moved[each] = own
        return moved


def rows_at(memory: Any, addresses: Any, base: int, length: int) -> Any:
    """The bytes of equally long runs, [n, length], out of uint8 memory that begins at `base`."""
    offsets = (addresses - np.uint64(base)).astype(np.int64)
    return np.lib.stride_tricks.sliding_window_view(memory, length)[offsets]


def result_file_name(gpu: str, day: str) -> str:
    """Of benchmarks/results: "gpu-nvidia-h100-80gb-hbm3-2026-01-31.json"."""
    words = "".join(c if c.isalnum() else " " for c in gpu.lower()).split()
    return f"gpu-{'-'.join(words)}-{day}.json"


def default_result_file(gpu_ordinal: int = 0) -> str:
    """The name under which `make gpu-check` keeps the results of this machine, today."""
    gpu = cuda_facts().gpus[gpu_ordinal]
    return result_file_name(gpu.name, datetime.now(timezone.utc).date().isoformat())


__all__ = ["add_arguments", "default_result_file", "measure", "page_runs", "result_file_name"]
