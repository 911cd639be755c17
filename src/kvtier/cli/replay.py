"""`kvtier replay TRACE`: what a request trace would hit with given tiers and policies.

A simulation by default; with --real the same requests go through an engine on the CPU. docs/policies.md says
how the figures are to be read, and holds those of the public conversation trace.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier import replay
from kvtier.cli import plots
from kvtier.cli.arguments import finite
from kvtier.cli.progress import Progress
from kvtier.cli.replay_plot import plot
from kvtier.cli.results import Report, Result, add_json_argument, table
from kvtier.config import ADMISSIONS, parse_size
from kvtier.errors import ConfigError
from kvtier.layout import check_extent
from kvtier.replay import Speeds
from kvtier.traces import Trace, load_trace

_DEFAULT_HOST = "10000blocks"
_UNLIMITED = "unlimited"
_HOST_BANDWIDTH, _DISK_BANDWIDTH = "50GB", "10GB"  # assumed where none was given or measured
_LOADING = 0.1  # of the work, for the progress bar
_PERCENTILES = (50, 90, 99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier replay`."""
    size = 'bytes ("64GiB") or blocks ("10000blocks")'
    parser.add_argument(
        "trace", metavar="TRACE", nargs="?", help="Mooncake, Qwen-Bailian or kvtier's own format"
    )
    parser.add_argument(
        "--list-policies", action="store_true", help="print the eviction policies, the default first, and end"
    )
    parser.add_argument(
        "--policy",
        metavar="NAMES",
        default=None,
        help='comma-separated, "all", or module:Class of your own; the default is return-hazard',
    )
    parser.add_argument("--disk-policy", metavar="NAME", help="of the disk tier; default lru")
    parser.add_argument(
        "--host",
        metavar="SIZES",
        default=_DEFAULT_HOST,
        help=f"comma-separated: {size}; default {_DEFAULT_HOST}",
    )
    parser.add_argument("--disk", metavar="SIZE", help=f"none if not given; {size}")
    parser.add_argument(
        "--block-tokens", metavar="N", type=int, help="tokens of each id; default: the format's"
    )
    parser.add_argument("--bytes-per-block", metavar="SIZE", help="of the KV of a block; for sizes in bytes")
    parser.add_argument("--plain", action="store_true", help="as in the literature: no leaf-first rule")
    parser.add_argument(
        "--admission",
        choices=ADMISSIONS,
        default=ADMISSIONS[0],
        help="to a full disk (default: %(default)s)",
    )
    parser.add_argument(
        "--write-budget",
        metavar="SIZE",
        help="bytes a day that may be written to disk; default: unlimited (an engine's: one capacity)",
    )
    parser.add_argument("--requests", metavar="N", type=int, help="only the first N requests")
    parser.add_argument("--no-belady", action="store_true", help="leave the ceiling out")
    parser.add_argument(
        "--real", action="store_true", help="through an engine, with --bytes-per-block as its blocks"
    )
    parser.add_argument(
        "--look-ahead",
        metavar="N",
        type=int,
        default=0,
        help="N requests behind the one that runs wait, and what they want is read ahead; not with --plain",
    )
    parser.add_argument(
        "--dir", metavar="DIR", help="with --real and --disk: where; default a temporary folder"
    )
    speeds = parser.add_argument_group("time to first token and GPU seconds, from rates measured elsewhere")
    speeds.add_argument(
        "--prefill-rate", metavar="N", type=finite, help="tokens per second that the server prefills"
    )
    speeds.add_argument(
        "--host-bandwidth",
        metavar="SIZE",
        help=f"host to GPU, a second; default {_HOST_BANDWIDTH}, with --real as measured in the replay",
    )
    speeds.add_argument(
        "--disk-bandwidth",
        metavar="SIZE",
        help=f"disk to GPU, a second; default {_DISK_BANDWIDTH}, with --real as measured in the replay",
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", help="hit rate against host capacity (needs matplotlib)"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Runs it; the exit status is 1 when a real replay met wrong bytes."""
    if args.list_policies:
        print("\n".join(replay.policies()))
        return 0
    if args.trace is None:
        raise ConfigError("TRACE is missing; allowed: the path of a trace, or --list-policies alone")
    with Report("replay", args.json) as report:
        plots.check(args.plot)
        if not 0 <= args.look_ahead <= replay.MOST_AHEAD or (args.look_ahead and args.plain):
            text = f"allowed: 0 to {replay.MOST_AHEAD}, and none with --plain"
            raise ConfigError(f"--look-ahead is {args.look_ahead}; {text}")
        if args.block_tokens is not None:
            check_extent("--block-tokens", args.block_tokens)
        setups, speeds = _setups(args), _speeds(args)
        with Progress(sys.stderr, total=1000 * (len(setups) + 1)) as progress:
            trace = _load(args, progress)
            prefixes = ["", *(f"{tiers.policy}.{tiers.host_blocks}." for tiers in setups[1:])]
            report.machine["replay"] = _what(args, trace, dict(zip(prefixes, setups, strict=True)))
            rows = [_replay(args, trace, tiers, speeds, progress) for tiers in setups]
            for setup, row in zip(report.machine["replay"]["setups"], rows, strict=True):
                setup.update(_rates(row))
        for prefix, row in zip(prefixes, rows, strict=True):
            report.add(*_results(row, prefix))
        report.checks["no_wrong_bytes"] = not any(row.replay.wrong_blocks for row in rows)
        print(_summary(trace, setups[0]), file=report.out)
        for line in _assumptions(rows):
            print(line, file=report.out)
        print(_table(rows), file=report.out)
        for line in _warnings(rows):
            print(line, file=report.out)
    if args.plot:  # with the JSON written, whatever becomes of the figure
        plot(args.plot, trace.name, [(row.replay, row.belady) for row in rows])
    return report.status


@dataclass(frozen=True)
class _Row:
    """One replay and what was made of it."""

    replay: replay.Replay
    belady: float | None
    bytes_per_day: float | None
    drive_writes_per_day: float | None
    ttft: Sequence[float] | None  # _PERCENTILES
    ttft_cold: Sequence[float] | None
    gpu_seconds_saved: float | None
    speeds: Speeds | None
    measured: frozenset[str]  # which of the speeds were, by their names


def _block_bytes(args: argparse.Namespace) -> int | None:
    """Bytes of a block, if they are given; what is counted in bytes needs them."""
    if args.bytes_per_block is None:
        for name in ("real", "write_budget", "prefill_rate"):
            if getattr(args, name) not in (None, False, _UNLIMITED):
                raise ConfigError(f"--{name.replace('_', '-')} needs --bytes-per-block")
        return None
    each = parse_size(args.bytes_per_block, "--bytes-per-block")
    if args.real and each % replay.WORD_BYTES:
        text = f"--bytes-per-block is {args.bytes_per_block!r}; allowed with --real: multiples of"
        raise ConfigError(f"{text} {replay.WORD_BYTES}")
    return each


def _setups(args: argparse.Namespace) -> list[replay.Tiers]:
    each = _block_bytes(args)
    names = args.policy or replay.policies()[0]
    policies = replay.policies() if names == "all" else [name.strip() for name in names.split(",")]
    budget = None
    if args.write_budget not in (None, _UNLIMITED):
        budget = parse_size(args.write_budget, "--write-budget")
    disk_policy = None if args.disk_policy is None else replay.check_policy(args.disk_policy, "--disk-policy")
    disk = 0 if args.disk is None else replay.capacity_blocks(args.disk, each, "--disk")
    setups = [
        replay.Tiers(
            host_blocks=replay.capacity_blocks(host.strip(), each, "--host"),
            disk_blocks=disk,
            policy=replay.check_policy(policy, "--policy"),
            disk_policy=disk_policy,
            admission=args.admission,
            write_bytes_per_day=budget,
            bytes_per_block=each,
            plain=args.plain,
            share_of_budget=True,
        )
        for host in args.host.split(",")
        for policy in policies
    ]
    return list(dict.fromkeys(setups))  # of a pair that is there twice, one: results have names


def _speeds(args: argparse.Namespace) -> Speeds | None:
    if args.prefill_rate is None:
        return None
    if not 1e-6 <= args.prefill_rate <= 1e15:
        raise ConfigError(f"--prefill-rate is {args.prefill_rate}; allowed: 1e-6 to 1e15")
    return Speeds(
        args.prefill_rate,
        _bandwidth(args.host_bandwidth, _HOST_BANDWIDTH, "--host-bandwidth"),
        _bandwidth(args.disk_bandwidth, _DISK_BANDWIDTH, "--disk-bandwidth"),
    )


def _bandwidth(given: str | None, default: str, key: str) -> int:
    return parse_size(default if given is None else given, key)


def _measured(args: argparse.Namespace, done: replay.Replay) -> dict[str, float]:
    """The rates that a real replay has measured and nobody has given."""
    given = {"host_bytes_per_s": args.host_bandwidth, "disk_bytes_per_s": args.disk_bandwidth}
    return {name: rate for name, rate in done.measured.items() if given[name] is None}


def _load(args: argparse.Namespace, progress: Progress) -> Trace:
    progress.phase(f"reading {args.trace}")
    trace = load_trace(args.trace, block_tokens=args.block_tokens, progress=_share(progress))
    if args.requests is None:
        return trace
    if args.requests < 1:
        raise ConfigError(f"--requests is {args.requests}; allowed: at least 1")
    return trace.first(args.requests)


def _share(progress: Progress) -> Callable[[int, int], None]:
    """Turns (done, in all) into steps of a thousand."""
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        units = 1000 * done // max(total, 1)
        if units > told:
            progress.step(units - told)
            told = units

    return tell


def _replay(
    args: argparse.Namespace,
    trace: Trace,
    tiers: replay.Tiers,
    speeds: Speeds | None,
    progress: Progress,
) -> _Row:
    progress.phase(f"{tiers.policy}, {tiers.host_blocks} blocks")
    share = _share(progress)

    def tell(done: int) -> None:
        share(done, trace.num_requests)

    if not args.real:
        done = replay.simulate(trace, tiers, look_ahead=args.look_ahead, progress=tell)
    elif tiers.disk_blocks:
        with tempfile.TemporaryDirectory(prefix="kvtier-replay-", dir=args.dir) as folder:
            done = replay.replay_real(trace, tiers, folder, look_ahead=args.look_ahead, progress=tell)
    else:
        done = replay.replay_real(trace, tiers, look_ahead=args.look_ahead, progress=tell)
    belady = None if args.no_belady else replay.belady_hit_rate(trace, tiers.host_blocks + tiers.disk_blocks)
    per_day, capacities = replay.written_per_day(trace, done), replay.drive_writes_per_day(trace, done)
    ttft = cold = saved = None
    measured = _measured(args, done)
    if speeds is not None:
        speeds = dataclasses.replace(speeds, **measured)
        ttft, cold, saved = _times(trace, done, speeds)
    return _Row(done, belady, per_day, capacities, ttft, cold, saved, speeds, frozenset(measured))


def _times(trace: Trace, done: replay.Replay, speeds: Speeds) -> tuple[list[float], list[float], float]:
    warm = replay.times_to_first_token(trace, done, speeds)
    cold = replay.times_to_first_token(trace, None, speeds)
    hits = (done.host_of_request.astype(np.int64) + done.disk_of_request) * trace.block_tokens
    saved = float(np.minimum(hits, trace.input_tokens).sum()) / speeds.prefill_tokens_per_s
    return (
        [float(np.percentile(warm, p)) for p in _PERCENTILES],
        [float(np.percentile(cold, p)) for p in _PERCENTILES],
        saved,
    )


def _results(row: _Row, prefix: str) -> list[Result]:
    done = row.replay
    values: list[tuple[str, float | None, str]] = [
        ("hit_rate", done.hit_rate, ""),
        ("hit_rate_host", done.hit_rate_host, ""),
        ("hit_rate_disk", done.hit_rate_disk, ""),
        ("belady_hit_rate", row.belady, ""),
        ("references_per_s", done.references_per_s, "1/s"),
        ("disk_bytes_written", done.disk_bytes_written, "B"),
        ("orphans", done.orphans, ""),
        ("references", done.references, ""),
        ("host_blocks", done.tiers.host_blocks, ""),
        ("disk_blocks", done.tiers.disk_blocks, ""),
        ("evictions", done.evictions, ""),
        ("promotions", done.promotions, ""),
        ("disk_blocks_written", done.disk_blocks_written, ""),
        ("disk_bytes_written_per_day", row.bytes_per_day, "B"),
        ("drive_writes_per_day", row.drive_writes_per_day, ""),
        ("gpu_seconds_saved", row.gpu_seconds_saved, "gpu s"),
    ]
    if done.look_ahead:
        values += [("disk_reads_hidden", done.disk_reads_hidden, ""), ("look_ahead", done.look_ahead, "")]
    for name, times in (("ttft", row.ttft), ("ttft_uncached", row.ttft_cold)):
        values += [(f"{name}_p{p}", t, "s") for p, t in zip(_PERCENTILES, times or (), strict=False)]
    return [Result(prefix + name, value, unit) for name, value, unit in values if value is not None]


def _what(args: argparse.Namespace, trace: Trace, setups: dict[str, replay.Tiers]) -> dict[str, Any]:
    """What was replayed, for the JSON; `setups` by what is in front of their results' names."""
    first = setups[""]
    return {
        "trace": trace.name,
        "format": trace.format,
        "requests": trace.num_requests,
        "references": len(trace.blocks),
        "blocks": trace.num_blocks,
        "block_tokens": trace.block_tokens,
        "seconds": trace.seconds,
        "form": "plain" if args.plain else "engine",
        "real": args.real,
        "look_ahead": args.look_ahead,
        "bytes_per_block": first.bytes_per_block,
        "disk_policy": first.eviction_on_disk if first.disk_blocks else None,
        "admission": first.admission if first.disk_blocks else None,
        "write_budget": _budget(first),
        "setups": [
            {
                "results": prefix,
                "policy": tiers.policy,
                "host_blocks": tiers.host_blocks,
                "disk_blocks": tiers.disk_blocks,
            }
            for prefix, tiers in setups.items()
        ],
    }


def _budget(tiers: replay.Tiers) -> int | str | None:
    """Bytes a day; None without a disk."""
    if not tiers.disk_blocks:
        return None
    return _UNLIMITED if tiers.write_bytes_per_day is None else tiers.write_bytes_per_day


def _summary(trace: Trace, tiers: replay.Tiers) -> str:
    text = (
        f"{trace.name}: {trace.num_requests} requests in {trace.seconds:.0f} s, {len(trace.blocks)} "
        f"references to {trace.num_blocks} blocks of {trace.block_tokens} tokens ({trace.format})"
    )
    budget = _budget(tiers)
    if budget is None:
        return text
    if isinstance(budget, int):
        budget = f"{budget} bytes a day"
        if not replay.has_days(trace):
            budget += ", all of it at once: the trace takes less than a minute"
    return f"{text}\ndisk: {tiers.eviction_on_disk}, admission {tiers.admission}, write budget {budget}"


def _rates(row: _Row) -> dict[str, Any]:
    """What times to first token were made with, for the JSON; empty without them."""
    if row.speeds is None:
        return {}
    rates: dict[str, Any] = dataclasses.asdict(row.speeds)
    if not row.replay.tiers.disk_blocks:
        del rates["disk_bytes_per_s"]
    return {"rates": {**rates, "measured": sorted(row.measured & set(rates))}}


def _assumptions(rows: Sequence[_Row]) -> list[str]:
    """The same for people, one line for all rows that have the same rates."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.speeds is not None:
            tiers = row.replay.tiers
            names.setdefault(_rates_text(row), []).append(f"{tiers.policy} {tiers.host_blocks}")
    if len(names) < 2:
        return list(names)
    return [f"{', '.join(of)}: {text}" for text, of in names.items()]


def _rates_text(row: _Row) -> str:
    rates = _rates(row)["rates"]
    measured = rates.pop("measured")
    texts = {"prefill_tokens_per_s": f"prefill {rates['prefill_tokens_per_s']:g} tokens/s"}
    for name, tier in (("host_bytes_per_s", "host tier"), ("disk_bytes_per_s", "disk")):
        if name in rates:
            texts[name] = f"{tier} {rates[name] / 1e9:.3g} GB/s"
    text = "assumed: " + ", ".join(texts[name] for name in texts if name not in measured)
    if measured:
        of_engine = ", ".join(texts[name] for name in texts if name in measured)
        text += f"; measured in the replay, on the CPU device: {of_engine}"
    return text


def _warnings(rows: Sequence[_Row]) -> list[str]:
    """What an engine would not do unless it is told to."""
    most = max((row.drive_writes_per_day or 0 for row in rows), default=0)
    if most <= 1 or rows[0].replay.tiers.write_bytes_per_day is not None:
        return []
    return [
        f"warning: without a write budget, {most:.3g} capacities of the disk are written in a day; an engine "
        "writes one unless disk_write_budget says more, and hits less (--write-budget SIZE)"
    ]


def _table(rows: Sequence[_Row]) -> str:
    header = [
        "policy",
        "host",
        "disk",
        "hit %",
        "host %",
        "disk %",
        "Belady %",
        "orphans",
        "written",
        "DWPD",
        "Mref/s",
    ]
    ahead = any(row.replay.look_ahead for row in rows)
    if ahead:
        header.append("hidden %")
    timed = any(row.ttft is not None for row in rows)
    if timed:
        header += [f"TTFT p{p} s" for p in _PERCENTILES] + ["GPU s saved"]
    lines = []
    for row in rows:
        done = row.replay
        line = [
            done.tiers.policy,
            str(done.tiers.host_blocks),
            str(done.tiers.disk_blocks or "-"),
            f"{100 * done.hit_rate:.2f}",
            f"{100 * done.hit_rate_host:.2f}",
            f"{100 * done.hit_rate_disk:.2f}",
            "-" if row.belady is None else f"{100 * row.belady:.2f}",
            str(done.orphans),
            str(done.disk_blocks_written),
            "-" if row.drive_writes_per_day is None else f"{row.drive_writes_per_day:.2f}",
            f"{done.references_per_s / 1e6:.2f}",
        ]
        if ahead:
            line.append("-" if done.disk_reads_hidden is None else f"{100 * done.disk_reads_hidden:.2f}")
        if timed:
            line += [f"{t:.3f}" for t in row.ttft or ()] + [f"{row.gpu_seconds_saved or 0:.0f}"]
        lines.append(line)
    return table(header, lines)
