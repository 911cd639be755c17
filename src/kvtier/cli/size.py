"""`kvtier size TRACE --model SHAPE`: how much DRAM and NVMe reach which hit rate and time to first token.

Every pair of capacities is simulated with the engine's own policies (`kvtier.replay`), from empty tiers.
Times to first token come from a model without queues: what hits is loaded, the rest is prefilled with the
arithmetic that the model's shape takes (`kvtier.cli.shapes`), at the rates that are given. The device's own
cache is not counted. The drives may write what an engine's may, one capacity a day, if nothing else is said.

`--json FILE`: one object under machine.size; rates are a second, times in seconds, sizes in bytes.

    trace, requests, seconds           the trace's name, its requests, its length
    model, ranks, dtype                the shape's name, the ranks on this host, of the KV
    policy, admission, write_budget    as given
    block_tokens, block_bytes          of a block, all ranks together, header included
    footprint_bytes, hit_rate_of_all   of tiers that hold all that differs
    rates                              {prefill_flops, host_bytes, disk_bytes}, see Rates
    cold                               {p50_s, p90_s, p99_s}: time to first token without kvtier
    points                             for every pair of capacities: host_bytes, host_blocks, disk_bytes,
                                       disk_blocks, hit_rate, hit_rate_host, hit_rate_disk, ttft_p50_s,
                                       ttft_p90_s, ttft_p99_s, gpu_seconds_saved_per_day (a rank's),
                                       disk_bytes_per_day, drive_writes_per_day (the same in capacities),
                                       write_budget_bytes_per_day (null for none); of a
                                       day nothing where the trace takes less than a minute
    answer                             with a target: the smallest point that reaches it, or null
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.cli import plots
from kvtier.cli.arguments import finite
from kvtier.cli.progress import Progress
from kvtier.cli.results import add_json_argument, check_json, out_of, table, told, write_json
from kvtier.cli.shapes import SHAPES, Shape, find
from kvtier.config import ADMISSIONS, parse_size
from kvtier.errors import ConfigError
from kvtier.layout import check_extent
from kvtier.replay import (
    LEAST_SECONDS,
    Replay,
    Tiers,
    capacity_blocks,
    check_policy,
    drive_writes_per_day,
    has_days,
    policies,
    simulate,
    written_per_day,
)
from kvtier.traces import Trace, load_trace

_GIB = 1 << 30
_HEADER_BYTES = 4096  # of a slot image, in both tiers
_HOST_STEPS, _DISK_STEPS = 5, 3  # capacities that are tried where none are given
_SECONDS_PER_DAY = 86400.0
# Write budgets; the first is the default, Config's too.
_CAPACITY, _UNLIMITED = "capacity", "unlimited"


@dataclass(frozen=True)
class Rates:
    """What turns hits into time.

    Attributes:
        prefill_flops: Operations a second of one rank's prefill, as reached, not as sold.
        host_bytes: Bytes a second from host memory into the devices, all ranks together.
        disk_bytes: Bytes a second from all drives.
    """

    prefill_flops: float
    host_bytes: float
    disk_bytes: float


@dataclass(frozen=True)
class Point:
    """What one pair of capacities gives.

    Attributes:
        host_bytes: DRAM.
        host_blocks: Blocks that it holds.
        disk_bytes: NVMe, 0 for none.
        disk_blocks: Blocks that it holds.
        hit_rate, hit_rate_host, hit_rate_disk: Of the blocks asked for, 0 to 1.
        ttft_p50_s, ttft_p90_s, ttft_p99_s: Time to first token, without queues.
        gpu_seconds_saved_per_day: Of each rank, against computing everything; None where the trace takes less
            than a minute, as all that is of a day.
        disk_bytes_per_day: Written, at the trace's rate of requests, within the budget.
        drive_writes_per_day: The same in capacities: what endurance is sold in. None without a disk.
        write_budget_bytes_per_day: What may be written; None without a disk, or where there is no limit.
    """

    host_bytes: int
    host_blocks: int
    disk_bytes: int
    disk_blocks: int
    hit_rate: float
    hit_rate_host: float
    hit_rate_disk: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    gpu_seconds_saved_per_day: float | None
    disk_bytes_per_day: float | None
    drive_writes_per_day: float | None
    write_budget_bytes_per_day: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier size`."""
    parser.add_argument(
        "trace", metavar="TRACE", help="requests: Mooncake's, Qwen-Bailian's or kvtier's own format"
    )
    parser.add_argument(
        "--model", required=True, metavar="SHAPE", help=f"{', '.join(SHAPES)}, or the path of a config.json"
    )
    parser.add_argument("--ranks", type=int, default=1, help="tensor parallelism on this host (default: 1)")
    parser.add_argument("--dtype", default="bfloat16", help="of the KV cache (default: bfloat16)")
    parser.add_argument(
        "--block-tokens", type=int, help="tokens for each id of the trace (default: its format's)"
    )
    parser.add_argument(
        "--host", metavar="SIZES", help='capacities of DRAM, as "64GiB,256GiB" (default: by the trace)'
    )
    parser.add_argument(
        "--disk", metavar="SIZES", help='of NVMe, "0" for none, as "0,2TiB" (default: by the trace)'
    )
    parser.add_argument(
        "--policy", default=policies()[0], help=f"{', '.join(policies())} (default: %(default)s)"
    )
    parser.add_argument(
        "--admission", default=ADMISSIONS[0], choices=ADMISSIONS, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--write-budget",
        metavar="SIZE",
        help='bytes a day that may be written to disk, or "unlimited" (default: one capacity, as an engine)',
    )
    parser.add_argument(
        "--prefill-tflops", type=finite, default=400, help="reached by one rank (default: 400)"
    )
    parser.add_argument(
        "--host-gbps", type=finite, default=50, help="GB/s from DRAM to the devices (default: 50)"
    )
    parser.add_argument("--disk-gbps", type=finite, default=6, help="GB/s from all drives (default: 6)")
    parser.add_argument(
        "--target-hit-rate",
        type=finite,
        metavar="R",
        help="least, 0 to 1: names the smallest that reaches it",
    )
    parser.add_argument("--target-ttft", type=finite, metavar="S", help="largest p90 in seconds: the same")
    parser.add_argument("--plot", metavar="FILE.png", help="hit rate against capacity")
    add_json_argument(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (__doc__ or "").partition("\n\n`--json FILE`: ")[2]
    parser.epilog = f"--json FILE: {parser.epilog}"


def run(args: argparse.Namespace) -> int:
    """Runs it; returns the exit status: 3 if a target is not reached."""
    check_json(args.json)
    plots.check(args.plot)
    out = out_of(args.json)
    rates = _rates(args)
    check_policy(args.policy, "--policy")
    if args.block_tokens is not None:
        check_extent("--block-tokens", args.block_tokens)
    shape = find(args.model, args.ranks)
    trace = load_trace(args.trace, block_tokens=args.block_tokens)
    block_bytes = kv_bytes(shape, args.ranks, args.dtype) * trace.block_tokens + _HEADER_BYTES
    footprint = trace.num_blocks * block_bytes
    hosts = _sizes(args.host, "--host", block_bytes) or _default_hosts(footprint, block_bytes)
    disks = _sizes(args.disk, "--disk", block_bytes, zero=True) or _default_disks(footprint, block_bytes)
    budget = _budget(args.write_budget)
    setups = [
        Tiers(
            host_blocks=capacity_blocks(host, block_bytes, "--host"),
            disk_blocks=capacity_blocks(disk, block_bytes, "--disk") if disk else 0,
            policy=args.policy,
            admission=args.admission,
            write_bytes_per_day=_bytes_per_day(budget, disk),
            bytes_per_block=block_bytes,
            share_of_budget=True,
        )
        for disk, host in product(disks, hosts)
    ]
    points = []
    with Progress(out, len(setups) * len(trace.blocks)) as progress:
        for (disk, host), tiers in zip(product(disks, hosts), setups, strict=True):
            progress.phase(f"{_size_text(host)} of DRAM, {_size_text(disk)} of NVMe")
            replay = simulate(trace, tiers)
            points.append(point_of(trace, replay, shape, rates, host, disk))
            progress.step(len(trace.blocks))
    document = {
        "trace": trace.name,
        "requests": trace.num_requests,
        "seconds": trace.seconds,
        "model": shape.name,
        "ranks": args.ranks,
        "dtype": args.dtype,
        "policy": args.policy,
        "admission": args.admission,
        "write_budget": budget,
        "block_tokens": trace.block_tokens,
        "block_bytes": block_bytes,
        "footprint_bytes": footprint,
        "rates": asdict(rates),
        "hit_rate_of_all": ideal_hit_rate(trace),
        "cold": _quantiles(times_to_first_token(trace, None, shape, rates)),
        "points": [_as_json(point) for point in points],
    }
    targets = args.target_hit_rate is not None or args.target_ttft is not None
    answer = smallest(points, args.target_hit_rate, args.target_ttft) if targets else None
    if targets:
        document["answer"] = None if answer is None else _as_json(answer)
    _print(document, points, out)
    if targets:
        print(
            "\n"
            + (
                "no pair of capacities reaches the target"
                if answer is None
                else f"smallest that reaches the target: {_size_text(answer.host_bytes)} of DRAM, "
                f"{_size_text(answer.disk_bytes)} of NVMe"
            ),
            file=out,
        )
    checks = {"target": answer is not None} if targets else {}
    write_json(args.json, told("size", document, **checks))
    if args.plot is not None:
        _plot(args.plot, document, points)
    return 3 if targets and answer is None else 0


def kv_bytes(shape: Shape, ranks: int, dtype: str) -> int:
    """Bytes of KV of a token on the host, all ranks together; a latent, the same on all, is kept once."""
    return shape.kv_bytes_per_token(dtype) * (1 if shape.latent is not None else ranks)


def times_to_first_token(
    trace: Trace, replay: Replay | None, shape: Shape, rates: Rates
) -> npt.NDArray[np.float64]:
    """Seconds of each request [requests], without queues; without `replay` everything is computed.

    Blocks from disk go on to the device while later ones are read. At least one token is computed.
    """
    tokens = np.maximum(trace.input_tokens, 1)
    found = np.zeros(trace.num_requests, np.int64)
    load = np.zeros(trace.num_requests)
    if replay is not None and replay.tiers.bytes_per_block is not None:
        disk = replay.disk_of_request.astype(np.int64)
        found = replay.host_of_request.astype(np.int64) + disk
        each = replay.tiers.bytes_per_block
        load = np.maximum(found * each / rates.host_bytes, disk * each / rates.disk_bytes)
    prefix = np.minimum(found * trace.block_tokens, tokens - 1)
    operations = [shape.prefill_flops(int(n - p), int(p)) for n, p in zip(tokens, prefix, strict=True)]
    times: npt.NDArray[np.float64] = load + np.array(operations, np.float64) / rates.prefill_flops
    return times


def point_of(trace: Trace, replay: Replay, shape: Shape, rates: Rates, host: int, disk: int) -> Point:
    """What a replay says for the buyer."""
    cold = times_to_first_token(trace, None, shape, rates)
    times = times_to_first_token(trace, replay, shape, rates)
    at_once = Rates(rates.prefill_flops, np.inf, np.inf)  # a load takes no time of the processor
    computed = times_to_first_token(trace, replay, shape, at_once)
    saved = float(np.sum(cold - computed)) * _SECONDS_PER_DAY / trace.seconds if has_days(trace) else None
    return Point(
        host_bytes=host,
        host_blocks=replay.tiers.host_blocks,
        disk_bytes=disk,
        disk_blocks=replay.tiers.disk_blocks,
        hit_rate=replay.hit_rate,
        hit_rate_host=replay.hit_rate_host,
        hit_rate_disk=replay.hit_rate_disk,
        **{f"ttft_{name}": value for name, value in _quantiles(times).items()},
        gpu_seconds_saved_per_day=saved,
        disk_bytes_per_day=written_per_day(trace, replay),
        drive_writes_per_day=drive_writes_per_day(trace, replay),
        write_budget_bytes_per_day=replay.tiers.write_bytes_per_day,
    )


def ideal_hit_rate(trace: Trace) -> float:
    """Of tiers that hold everything: blocks that some request before has had, 0 to 1."""
    return 1 - trace.num_blocks / max(1, len(trace.blocks))


def smallest(points: list[Point], hit_rate: float | None, ttft: float | None) -> Point | None:
    """The point with the least DRAM, then the least NVMe, that reaches both targets."""
    good = [
        point
        for point in points
        if (hit_rate is None or point.hit_rate >= hit_rate) and (ttft is None or point.ttft_p90_s <= ttft)
    ]
    return min(good, key=lambda point: (point.host_bytes, point.disk_bytes), default=None)


def _rates(args: argparse.Namespace) -> Rates:
    for name in ("prefill_tflops", "host_gbps", "disk_gbps"):
        if not 1e-6 <= getattr(args, name) < 1e9:
            text = f"--{name.replace('_', '-')} is {getattr(args, name)}"
            raise ConfigError(f"{text}; allowed: at least 1e-6 and less than 1e9")
    for name in ("target_hit_rate", "target_ttft"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= (1 if name == "target_hit_rate" else 1e9):
            allowed = "0 to 1" if name == "target_hit_rate" else "0 to 1e9, in seconds"
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; allowed: {allowed}")
    return Rates(args.prefill_tflops * 1e12, args.host_gbps * 1e9, args.disk_gbps * 1e9)


def _budget(text: str | None) -> str | int:
    if text is None or text == _UNLIMITED:
        return text or _CAPACITY
    return parse_size(text, "--write-budget")


def _bytes_per_day(budget: str | int, disk: int) -> int | None:
    if budget == _UNLIMITED or not disk:
        return None
    return disk if isinstance(budget, str) else budget


def _as_json(point: Point) -> dict[str, Any]:
    """Without what the trace is too short for."""
    found = asdict(point)
    if point.disk_bytes_per_day is None:
        for key in ("gpu_seconds_saved_per_day", "disk_bytes_per_day", "drive_writes_per_day"):
            del found[key]
    return found


def _sizes(text: str | None, key: str, block_bytes: int, *, zero: bool = False) -> list[int]:
    if text is None:
        return []
    sizes = set()
    for part in text.split(","):
        if zero and part.strip() == "0":
            sizes.add(0)
            continue
        size = parse_size(part.strip(), key)
        if size < block_bytes:
            raise ConfigError(f"{key} has {part.strip()!r}; allowed: at least one block, {block_bytes} bytes")
        sizes.add(size)
    return sorted(sizes)


def _default_hosts(footprint: int, block_bytes: int) -> list[int]:
    """Powers of two below all that the trace would fill, the last one holds all of it."""
    top = max(_power(footprint), _power(block_bytes))
    return sorted({max(top >> (2 * step), _power(block_bytes)) for step in range(_HOST_STEPS)})


def _default_disks(footprint: int, block_bytes: int) -> list[int]:
    top = max(_power(footprint), _power(block_bytes))
    return [0, *sorted({max(top >> (2 * step), _power(block_bytes)) for step in range(_DISK_STEPS - 1)})]


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _quantiles(times: npt.NDArray[np.float64]) -> dict[str, float]:
    return {f"p{q}_s": float(np.percentile(times, q)) for q in (50, 90, 99)}


def _size_text(size: int) -> str:
    for unit, name in ((1 << 40, "TiB"), (_GIB, "GiB"), (1 << 20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B" if size else "none"


def _budget_text(document: dict[str, Any]) -> str:
    budget = document["write_budget"]
    if budget == _UNLIMITED:
        return "unlimited; an engine's default is one capacity a day"
    what = "one capacity a day, an engine's default" if budget == _CAPACITY else f"{_size_text(budget)} a day"
    if document["seconds"] < LEAST_SECONDS:
        return f"{what}, all of it at once: the trace takes less than a minute, which says nothing of a day"
    return f"{what}, and of that {document['seconds'] / _SECONDS_PER_DAY:.3g} in the trace's time"


def _day_texts(point: Point) -> tuple[str, str, str]:
    if point.gpu_seconds_saved_per_day is None or point.disk_bytes_per_day is None:
        return ("-", "-", "-") if point.disk_bytes else ("-", "", "")
    return (
        f"{point.gpu_seconds_saved_per_day / 3600:.3g}",
        _size_text(round(point.disk_bytes_per_day)) if point.disk_bytes else "",
        "" if point.drive_writes_per_day is None else f"{point.drive_writes_per_day:.2g}",
    )


def _print(document: dict[str, Any], points: list[Point], out: Any) -> None:
    rates, cold = document["rates"], document["cold"]
    print(
        f"{document['trace']}: {document['requests']} requests in {document['seconds'] / 3600:.2f} h; "
        f"{document['model']}, {document['ranks']} rank(s), {document['dtype']}: a block of "
        f"{document['block_tokens']} tokens has {_size_text(document['block_bytes'])}; what differs "
        f"takes {_size_text(document['footprint_bytes'])} and hits {document['hit_rate_of_all']:.1%}\n"
        f"policy {document['policy']}, admission {document['admission']}; from empty tiers; no queues, no "
        f"device cache\nwrite budget: {_budget_text(document)}\n"
        f"assumed: prefill {rates['prefill_flops'] / 1e12:g} TFLOP/s a rank, DRAM "
        f"{rates['host_bytes'] / 1e9:g} GB/s, drives {rates['disk_bytes'] / 1e9:g} GB/s. Without kvtier: "
        f"TTFT p50 {cold['p50_s']:.3g} s, p90 {cold['p90_s']:.3g} s, p99 {cold['p99_s']:.3g} s\n",
        file=out,
    )
    rows = [
        (
            _size_text(point.host_bytes),
            _size_text(point.disk_bytes),
            f"{point.hit_rate:.1%}",
            f"{point.hit_rate_host:.1%}",
            f"{point.hit_rate_disk:.1%}",
            *(f"{getattr(point, f'ttft_{name}_s'):.3g}" for name in ("p50", "p90", "p99")),
            *_day_texts(point),
        )
        for point in points
    ]
    header = (
        *("DRAM", "NVMe", "hits", "in DRAM", "on NVMe", "p50 s", "p90 s", "p99 s"),
        *("GPU h/day", "written/day", "DWPD"),
    )
    print(table(header, rows), file=out)


def _plot(path: str, document: dict[str, Any], points: list[Point]) -> None:
    title = f"{document['trace']}, {document['model']}, {document['policy']}"
    drawn, axes = plots.figure(title, "DRAM", "blocks hit, %", log_x=True)
    for index, disk in enumerate(sorted({point.disk_bytes for point in points})):
        line = [point for point in points if point.disk_bytes == disk]
        name = f"{_size_text(disk)} of NVMe" if disk else "no NVMe"
        axes.plot(
            [point.host_bytes for point in line],
            [100 * point.hit_rate for point in line],
            label=name,
            **plots.style(index),
        )
    hosts = sorted({point.host_bytes for point in points})
    axes.set_xticks(hosts, [_size_text(host) for host in hosts])
    axes.minorticks_off()
    axes.axhline(100 * document["hit_rate_of_all"], color="#999999", linestyle=":", label="everything kept")
    axes.set_ylim(bottom=0)
    axes.legend()
    plots.save(drawn, path)
