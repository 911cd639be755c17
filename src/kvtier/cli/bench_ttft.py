"""Time to the first token against context length: recomputed, and restored from every tier.

For each length a prefix and a new suffix of 128 tokens; the time goes from token ids to the logits after the
last of them, on the host. `recompute` runs the model over all of it, chunk by chunk; the tiers find, load and
compute the suffix alone. A length whose recompute does not fit the time given is extrapolated
(`bench_ttft_plan`) and marked; its tiers are measured all the same, with random numbers as its KV.

`limit` is KV bytes over what a plain copy (host) or plain reads of a file on the same drive (disk) did in the
same round; it holds no computing, so `overhead` is the suffix's prefill and what kvtier adds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvtier.cli import bench_ttft_plot, bench_ttft_table, machine, plots
from kvtier.cli.arguments import finite
from kvtier.cli.bench_ttft_plan import SUFFIX_TOKENS, Fit, Layer, Room, default_lengths, fit, held_out, place
from kvtier.cli.lives import live
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, Result, measured, table
from kvtier.cli.shapes import SHAPES, Shape, find
from kvtier.errors import ConfigError, UnsupportedError
from kvtier.layout import dtype_name_and_bytes

METHOD = {
    "time": f"token ids to logits on the host: keys, lookup, load, prefill of a suffix of {SUFFIX_TOKENS}",
    "recompute": "chunked prefill with random weights through torch's scaled_dot_product_attention; one pass "
    "over the longest prefix, its time noted at every length; experts as one matrix of their active width, "
    "no communication between ranks: both make it faster than it is",
    "repetitions": "recompute: n as stated, once where it takes long; tiers in turn; medians with min-max",
    "warm_up": "a calibration of three chunks; every tier's pages are filled with NaN before each run",
    "lossless": "yes: logits are bit-identical to the recompute's (where it was extrapolated: to those of "
    "the pages in place); a control with one damaged block differs; KV of 8 bits is so in the recompute, too",
    "limit": "KV bytes over plain copies / O_DIRECT reads of up to 512 MiB in the same round",
    "energy": "J per first token by the counters of the packages (RAPL) and of the GPU (NVML), read before "
    "and after each run; ttft/<shape>/energy_from says which. Absent where what computes has none, "
    "or a counter did not step in one of the runs (RAPL's about every ms, NVML's every 20 to 100)",
    "page_cache": "no part of it: the disk tier and the plain reads use O_DIRECT",
    "extrapolated": "a * linear operations + b * attention operations, fitted to the measured recomputes",
}
_LENGTHS = [1 << n for n in range(10, 18)]
_GPU_LENGTHS = [1 << n for n in range(10, 21)]
_LIFE = "kvtier.cli.bench_ttft_life"
_DTYPES = ("bfloat16", "float16", "float32", "float64")  # that torch computes in, NaN included
_KV_DTYPES = ("float8_e4m3fn", "float8_e5m2")
_PROOFS = ("recompute_repeats", "control_differs")  # without them nothing is proven
_MOST_MINUTES = 100_000.0
_USABLE = 0.85  # of free memory
_USABLE_DISK = 0.95  # of what is free
_USABLE_GPU = 0.93  # of all its memory: the CUDA context, and what torch cannot use for holes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench ttft`."""
    add = parser.add_argument
    names = ", ".join(name for name in SHAPES if not name.startswith("tiny"))
    add(
        "--shape",
        nargs="+",
        metavar="NAME",
        help=f"{names}; or a Hugging Face config.json's path (CPU: 100m)",
    )
    add("--ranks", type=int, default=1, help="of tensor parallelism: run one of them (default: %(default)s)")
    add(
        "--tokens",
        type=int,
        nargs="+",
        help="lengths of the prefix (default: 1k to 128k, to 1M on a GPU, as the model allows)",
    )
    add("--minutes", type=finite, default=10.0, help="for everything, about (default: %(default)s)")
    add("--device", default="cpu", help='torch\'s name, such as "cuda" (default: %(default)s)')
    add("--dtype", help="of weights and arithmetic (default: bfloat16 where the hardware computes in it)")
    add("--kv-dtype", help="of the KV (default: as --dtype; float8_e4m3fn where only that fits a GPU)")
    add("--chunk", type=int, help="tokens of a prefill at once (default: 512, 8192 on a GPU)")
    add("--block-tokens", type=int, help="(default: so that a block has 2 MiB, at most 256)")
    add("--dir", default=".", metavar="D", help="on the drive of the disk tier (default: %(default)s)")
    add("--plot", metavar="PNG", help="draw it there, too")
    parser.set_defaults(rounds=5)


def measure(args: argparse.Namespace, report: Report) -> None:
    """Runs the benchmark into `report`."""
    shapes = [_shape(name, args.ranks) for name in _names(args)]
    report.machine |= {"dtype": _dtype(args), "chunk": _chunk(args)}
    report.machine["drive"] = machine.drive(Path(args.dir or "."))
    report.machine["ttft"] = {}
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see demo.py
    minutes = args.minutes / len(shapes)
    with Progress(report.out, 60 * args.minutes) as progress:
        for index, shape in enumerate(shapes):
            layer = _layer(args, shape)
            run = _Run(args, report, progress, shape, layer, 60 * minutes * (len(shapes) - index - 1))
            run.describe()
            if layer.lengths:
                try:
                    run.measure(minutes)
                finally:
                    run.finish()
    report.checks["measured"] = bool(report.results)
    for shape in shapes:
        _summarize(report, shape)
    if args.plot:
        _plot(args, report)


def check(args: argparse.Namespace) -> None:
    """Refuses wrong options; the same shape twice is once.

    Raises:
        ConfigError: The message names the option.
        UnsupportedError: What is not installed, or not there.
    """
    if not 0 < args.minutes <= _MOST_MINUTES:
        raise ConfigError(f"--minutes {args.minutes}: must be above 0, at most {_MOST_MINUTES:.0f}")
    if re.fullmatch(r"cpu|cuda(:\d{1,4})?", args.device) is None:
        raise ConfigError(f"--device is {args.device!r}; allowed: cpu, cuda or cuda:N")
    for name in ("chunk", "block_tokens", "ranks"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for option, allowed in (("dtype", _DTYPES), ("kv_dtype", (*_DTYPES, *_KV_DTYPES))):
        if (given := getattr(args, option)) is not None:
            name = dtype_name_and_bytes(given)[0]
            if name not in allowed:
                text = f"--{option.replace('_', '-')} is {given!r}"
                raise ConfigError(f"{text}; allowed: {', '.join(allowed)}")
            setattr(args, option, name)
    if args.shape:
        args.shape = list(dict.fromkeys(args.shape))
    shapes = [_shape(name, args.ranks) for name in _names(args)]
    if len({shape.name for shape in shapes}) < len(shapes):
        raise ConfigError(f"--shape {args.shape}: allowed: shapes of different names")
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError("bench ttft needs torch: pip install torch")
    if not Path(args.dir or ".").is_dir():
        raise ConfigError(f"--dir {args.dir}: must be a directory")
    for shape in shapes:
        _layer(args, shape)  # are the lengths whole blocks, is there such a GPU


def _names(args: argparse.Namespace) -> list[str]:
    if args.shape:
        return list(args.shape)
    return ["100m"] if args.device == "cpu" else ["llama-3.1-8b", "qwen2.5-7b-1m"]


def _shape(name: str, ranks: int) -> Shape:
    """One that the decoder can run: rotary positions turn pairs of numbers."""
    shape = find(name, ranks)
    rotated = shape.head_dim if shape.latent is None else shape.latent.rope_dim
    if rotated % 2:
        raise ConfigError(f"--shape {name}: head_dim is {rotated}; allowed: even numbers")
    if shape.num_heads % shape.num_kv_heads:
        text = f"--shape {name}: {shape.num_kv_heads} KV heads for {shape.num_heads} heads"
        raise ConfigError(f"{text}; allowed: a divisor")
    return shape


def _layer(args: argparse.Namespace, shape: Shape) -> Layer:
    """How the shape is run with what is free now."""
    return place(
        shape,
        args.tokens or default_lengths(shape, _LENGTHS if args.device == "cpu" else _GPU_LENGTHS),
        _room(args),
        dtype=_dtype(args),
        kv_dtype=args.kv_dtype,
        chunk=_chunk(args),
        block_tokens=args.block_tokens,
    )


def _dtype(args: argparse.Namespace) -> str:
    given: str | None = args.dtype
    return given or ("bfloat16" if args.device != "cpu" or _computes_bfloat16() else "float32")


def _chunk(args: argparse.Namespace) -> int:
    given: int | None = args.chunk
    return given or (512 if args.device == "cpu" else 8192)


def _computes_bfloat16() -> bool:
    """Whether the CPU has instructions for it; without them bfloat16 is slower than float32."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _device_bytes(device: str) -> int | None:
    """Memory of a GPU that may be used; None on a CPU.

    Raises:
        UnsupportedError: There is no such GPU.
    """
    if device == "cpu":
        return None
    gpus = machine.gpus()
    index = int(device.partition(":")[2] or 0)
    if index >= len(gpus):
        raise UnsupportedError(f"--device {device}: nvidia-smi sees {len(gpus)} GPUs")
    return int(_USABLE_GPU * (int(gpus[index]["memory.total"].split()[0]) << 20))


def _room(args: argparse.Namespace) -> Room:
    device = _device_bytes(args.device)
    free = shutil.disk_usage(args.dir or ".").free
    return Room(device, int(_USABLE * machine.available_bytes()), int(_USABLE_DISK * free))


@dataclass
class _Run:
    """One shape."""

    args: argparse.Namespace
    report: Report
    progress: Progress
    shape: Shape
    layer: Layer
    seconds_behind: float  # what the shapes after it are given
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)  # medians by tier and tokens
    unproven: set[int] = field(default_factory=set)  # lengths without figures
    restarts: list[bool] = field(default_factory=list)  # whether the logits after one were right

    def describe(self) -> None:
        layer, out = self.layer, self.report.out
        about = asdict(layer) | {"about": self.shape.about, "left_out": {}}
        self.facts = self.report.machine["ttft"].setdefault(self.shape.name, about)
        per_token = self.shape.kv_bytes_per_token(layer.kv_dtype)
        weights = (
            "own weights in every layer"
            if layer.own_weights
            else "layer by layer: one layer's weights for all"
        )
        print(
            f"{self.shape.about}: {self.shape.parameters / 1e6:.0f} M parameters that a token meets, "
            f"{layer.dtype}, KV {layer.kv_dtype} {per_token} bytes a token, {weights}, "
            f"chunks of {layer.chunk}, blocks of {layer.block_tokens} tokens",
            file=out,
        )
        for tokens, why in layer.left_out.items():
            self._leave_out(tokens, why)

    def _leave_out(self, tokens: int, why: str) -> None:
        self.facts["left_out"][str(tokens)] = why
        print(f"{self.shape.name}, {tokens} tokens: left out, {why}", file=self.report.out)

    def measure(self, minutes: float) -> None:
        with _folder(self.args.dir) as folder:
            life = {
                "folder": str(folder),
                "shape": asdict(self.shape),
                "layer": asdict(self.layer),
                "device": self.args.device,
                "seed": self.args.seed,
                "rounds": self.args.rounds,
                "minutes": minutes,
            }
            saved = live(_LIFE, "first", {"life": life}, self.progress, self._heard)
            if not saved["rounds"]:
                return
            self.progress.phase("killed with SIGKILL; a new process starts")
            opened = live(_LIFE, "second", {"life": life, **saved}, self.progress, self._heard)
            restored = self.restarts and all(self.restarts)
            self._check("killed_and_restored", bool(restored))
            if restored and self.seconds.get("disk_restarted"):
                self.report.add(measured(f"reopen/{self.shape.name}", opened["open"], "s"))

    def _check(self, name: str, passed: bool) -> None:
        self.report.checks[name] = self.report.checks.get(name, True) and passed

    def _heard(self, said: dict[str, Any]) -> None:
        if "row" in said:
            self._row(**said["row"])
        for name, passed in said.get("check", {}).items():
            self._check(name, passed)
            if name == "logits_disk_restarted":
                self.restarts.append(passed)
            if not passed and name in _PROOFS:
                self._withdraw(name, said.get("tokens"))
        if "left_out" in said:
            self._leave_out(**said["left_out"])
        if "expect" in said:
            self.progress.expect(self.progress.done + said["expect"] + self.seconds_behind)
        facts = said.get("facts", {})
        if "energy_from" in facts:
            sources, missing = (", ".join(facts[key]) for key in ("energy_from", "energy_missing"))
            print(f"energy: {sources or 'absent'}{missing and f' ({missing})'}", file=self.report.out)
        self.facts.update(facts)

    def _withdraw(self, check: str, tokens: int | None) -> None:
        """Takes back the figures of a length, or of all, and lets no more in."""
        self.unproven |= set(self.layer.lengths) if tokens is None else {tokens}
        at = {(self.shape.name, str(n)) for n in self.unproven}
        results = self.report.results
        results[:] = [r for r in results if tuple(r.name.split("/")[1:3]) not in at]
        for by_tokens in self.seconds.values():
            for n in self.unproven & by_tokens.keys():
                del by_tokens[n]
        where = "all lengths" if tokens is None else f"{tokens} tokens"
        print(f"{self.shape.name}, {where}: no figures, {check} failed", file=self.report.out)

    def _bytes(self, tokens: int) -> int:
        return tokens * self.shape.kv_bytes_per_token(self.layer.kv_dtype)

    def _row(
        self,
        tokens: int,
        tier: str,
        seconds: list[float],
        restore: list[float],
        bandwidth: list[float],
        joules: list[float],
    ) -> None:
        if tokens in self.unproven:
            return
        report, where = self.report, f"{self.shape.name}/{tokens}"
        kv_bytes = self._bytes(tokens)
        limits = [kv_bytes / rate for rate in bandwidth] or None
        self.seconds.setdefault(tier, {})[tokens] = statistics.median(seconds)
        report.add(measured(f"ttft/{where}/{tier}", seconds, "s", limits))
        if limits is not None:
            over = [1e3 * (s - limit) for s, limit in zip(seconds, limits, strict=True)]
            rates, plain = [kv_bytes / s / 1e9 for s in restore], [rate / 1e9 for rate in bandwidth]
            report.add(
                measured(f"restore/{where}/{tier}", rates, "GB/s", plain),
                measured(f"overhead/{where}/{tier}", over, "ms"),
            )
        if joules and len(joules) == len(seconds):
            report.add(measured(f"energy/{where}/{tier}", joules, "J"))

    def finish(self) -> None:
        """Adds what follows from what was measured."""
        name, run = self.shape.name, self.seconds.get("recompute", {})
        lengths = sorted({tokens for tier in self.seconds.values() for tokens in tier})
        self.report.add(*(Result(f"kv_bytes/{name}/{n}", self._bytes(n), "B") for n in lengths))
        if not lengths:
            return
        prefills = {tokens + SUFFIX_TOKENS: s for tokens, s in run.items()}
        if prefills:
            model = fit(self.shape, {(n, 0): s for n, s in prefills.items()})
        else:  # nothing was recomputed: what a part of a chunk took must do
            model = Fit(self.shape, **self.facts["calibration"])
        self.facts["fit"] = {
            "of": "recomputes" if prefills else "calibration",
            "linear_gflops": 1e-9 / model.linear if model.linear else None,
            "attention_gflops": 1e-9 / model.attention if model.attention else None,
            "largest_error": model.error(prefills) if prefills else None,
            "error_at_longest_from_the_others": held_out(self.shape, prefills),
        }
        for tokens in lengths:
            guessed = tokens not in run
            cold = model.seconds(tokens + SUFFIX_TOKENS) if guessed else run[tokens]
            if guessed:
                self._derived(f"ttft/{name}/{tokens}/recompute", cold, "s", guessed)
            for tier in ("device", "host", "disk", "disk_restarted"):
                if tokens in self.seconds.get(tier, {}):
                    ratio = cold / self.seconds[tier][tokens]
                    self._derived(f"speedup/{name}/{tokens}/{tier}", ratio, "x", guessed)
            device = self.seconds.get("device", {}).get(tokens)
            if device is not None and cold > device:
                rate = self._bytes(tokens) / (cold - device) / 1e9
                self._derived(f"break_even/{name}/{tokens}", rate, "GB/s", guessed)

    def _derived(self, name: str, value: float, unit: str, guessed: bool) -> None:
        self.report.add(Result(name, value, unit, n=0 if guessed else 1, extrapolated=guessed))


@contextmanager
def _folder(given: str | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="kvtier-bench.", dir=given or ".")).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _summarize(report: Report, shape: Shape) -> None:
    document = report.document()
    header, rows = bench_ttft_table.cells(document, shape.name)
    if rows:
        legend = bench_ttft_table.legend(document)
        print(f"\n{shape.about}\n{table(header, rows)}\n{legend}", file=report.out)


def tables(document: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]], str]]:
    """What `kvtier bench report` shows of a document: title, header, rows and legend of each table."""
    return [
        (shape, *bench_ttft_table.cells(document, shape), bench_ttft_table.legend(document))
        for shape in bench_ttft_plot.shapes_of(document)
    ]


def figures(document: dict[str, Any]) -> list[Any]:
    """What `kvtier bench report` shows of a document: a figure for each shape."""
    return [bench_ttft_plot.draw(document, shape) for shape in bench_ttft_plot.shapes_of(document)]


def _plot(args: argparse.Namespace, report: Report) -> None:
    document = report.document()
    shapes = bench_ttft_plot.shapes_of(document)
    for shape in shapes:
        path = Path(args.plot)
        if len(shapes) > 1:
            path = path.with_name(f"{path.stem}-{shape}{path.suffix}")
        plots.save(bench_ttft_plot.draw(document, shape), path)
        print(f"drawn: {path}", file=report.out)
