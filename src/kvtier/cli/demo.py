"""`kvtier demo`: a real transformer, a real document, and how long its first token takes.

Cold, with the prefix still in the cache, with the prefix restored from the host tier, and from the disk tier
after the process that saved it was killed; beside it what the machine's own copy of the same bytes takes; and
the proof that the restored bytes are the right ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kvtier
from kvtier.cli import machine
from kvtier.cli.bench_lock import alone
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, Result, add_json_argument, check_json, measured, out_of, table
from kvtier.errors import ResourceError, UnsupportedError

if TYPE_CHECKING:
    from kvtier.cli.demo_run import Run

SLOT_OVERHEAD = 8 << 10  # header, and rounding up to its size
_NEEDED = ("torch", "transformers")
_MOST_TOKENS = 1 << 20  # where a model does not say how long its contexts are
METHOD = {
    "time": "token ids to next-token logits: keys, lookup, load, model",
    "warm_up": "one chunk and one suffix",
    "repetitions": "--runs of the restored, --cold-runs of the cold, in turn; medians with min-max",
    "lossless": "yes: logits are bit-identical to the cold run's; a control with one damaged block differs",
    "limit": "cold, for the times; for restore the machine's copy of as many bytes, in the same round",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier demo`."""
    parser.add_argument("--model", metavar="DIR", help="a local transformers model (default: random weights)")
    parser.add_argument("--size", choices=("100m", "tiny"), default="100m", help="of random weights")
    parser.add_argument("--text", metavar="FILE", help="the prompt (default: kvtier's own documentation)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the prefix (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens at once (default: %(default)s)")
    parser.add_argument("--block-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="restored runs (default: %(default)s)")
    parser.add_argument("--cold-runs", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--copy-threads", type=int, default=2, help="of the engine (default: %(default)s)")
    parser.add_argument("--disk", metavar="DIR", help="of the disk row's files (default: the current one)")
    parser.add_argument("--no-disk", action="store_true", help="leave out the disk row")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the demo; returns the exit status."""
    for name in ("tokens", "chunk", "block_tokens", "runs", "cold_runs", "copy_threads"):
        if getattr(args, name) < 1:
            raise kvtier.ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    check_json(args.json)
    if not args.no_disk:
        _check_disk(args.disk)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"the demo needs {' and '.join(missing)}: pip install 'kvtier[demo]'")
    # Read when torch is loaded. Threads that spin at barriers lose most where other programs want the cores:
    # 2 cores at a load of 8 took 23.6 s for 1152 tokens spinning, 9.5 s waiting.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from kvtier.cli.demo_model import load_model, make_prompt
    from kvtier.cli.demo_run import SUFFIX_TOKENS

    model = load_model(args.model, args.size)
    prefix = -(-args.tokens // args.block_tokens) * args.block_tokens
    _check_length(args, model, prefix + SUFFIX_TOKENS)
    config = _config(args, model, prefix)
    if not args.no_disk:
        _check_room(args.disk, config, prefix)
    prompt = make_prompt(model, args.text, prefix + SUFFIX_TOKENS)
    with alone(out_of(args.json)), Report("demo", args.json) as report:
        report.machine["method"] = METHOD
        print(machine.describe(report.machine), file=report.out)
        if not args.no_disk:
            report.machine["drive"] = machine.drive(Path(args.disk or "."))
            print(machine.describe_drive(report.machine["drive"]), file=report.out)
        print(f"model:  {model.about}\nprompt: {prompt.source}", file=report.out)
        try:
            _measure(args, model, prompt, config, report)
        finally:
            _summarize(args, prefix, report)
    return report.status


def _check_disk(given: str | None) -> None:
    """The disk row comes last, after minutes."""
    folder = Path.cwd() if given is None else Path(given)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise kvtier.ConfigError(
            f"--disk is {str(folder)!r}; allowed: a directory that may be written into, or --no-disk"
        )


def _check_length(args: argparse.Namespace, model: Any, tokens: int) -> None:
    """Before a text of so many tokens is made."""
    most = getattr(model.module.config, "max_position_embeddings", None)
    if not isinstance(most, int):
        most = _MOST_TOKENS
    if tokens > most:
        raise kvtier.ConfigError(
            f"--tokens {args.tokens}: with whole blocks and the suffix {tokens}; allowed by the model: {most}"
        )


def _check_room(given: str | None, config: kvtier.Config, prefix: int) -> None:
    """A drive that takes only some of the blocks gives no figures, and says so after minutes."""
    from kvtier.cli import demo_disk

    folder = Path.cwd() if given is None else Path(given)
    free, needed = shutil.disk_usage(folder).free, demo_disk.capacity(config, prefix)
    if free < needed:
        raise ResourceError(
            f"--disk {folder}: {free >> 20} MiB are free; needs {-(-needed >> 20)} MiB, or --no-disk"
        )


def _config(args: argparse.Namespace, model: Any, prefix: int) -> kvtier.Config:
    """Of an engine without a disk that holds the prefix."""
    from kvtier.adapters.transformers import layout_of

    layout = layout_of(model.module, page_tokens=args.block_tokens, dtype="float32")
    slot_bytes = layout.block_bytes(args.block_tokens) + SLOT_OVERHEAD
    return kvtier.Config(
        groups=[layout],
        block_tokens=args.block_tokens,
        model=model.identity,
        host=max(64 << 20, (prefix // args.block_tokens + 8) * slot_bytes),
        copy_threads=args.copy_threads,
    )


def _measure(
    args: argparse.Namespace, model: Any, prompt: Any, config: kvtier.Config, report: Report
) -> None:
    expected = _measure_here(args, model, prompt, config, report)
    if not args.no_disk:
        from kvtier.cli import demo_disk
        from kvtier.cli.demo_run import SUFFIX_TOKENS

        with demo_disk.folder_for(args.disk) as folder:
            prefix = len(prompt.token_ids) - SUFFIX_TOKENS
            disk = kvtier.Disk(str(folder / "disk"), demo_disk.capacity(config, prefix))
            with_disk = dataclasses.replace(config, disk=disk)
            demo_disk.measure(args, with_disk, prompt.token_ids, expected, folder, report)


def _measure_here(
    args: argparse.Namespace, model: Any, prompt: Any, config: kvtier.Config, report: Report
) -> Any:
    """The rows that need no other process; returns the logits."""
    from kvtier.adapters.transformers import KVTierCache
    from kvtier.cli.demo_run import SUFFIX_TOKENS, Run, repeat

    prefix = len(prompt.token_ids) - SUFFIX_TOKENS
    kv_bytes = config.groups[0].block_bytes(prefix)
    work = args.cold_runs * (prefix + SUFFIX_TOKENS) + (2 * args.runs + 1) * SUFFIX_TOKENS
    with (
        kvtier.open(config) as engine,
        KVTierCache(engine, model.module, len(prompt.token_ids)) as cache,
        Progress(report.out, work) as progress,
    ):
        demo = Run(model.module, cache, prompt.token_ids, args.chunk, args.copy_threads, progress)
        source = np.random.default_rng(0).integers(0, 256, kv_bytes, np.uint8)
        destination = np.ones_like(source)  # all of it touched before it is measured
        try:
            demo.warm_up()
            repeat(args.cold_runs, demo.cold)
            demo.save()
            repeat(args.runs, demo.device, demo.host, lambda: demo.machine_copy(source, destination))
            demo.control(args.block_tokens)
        finally:
            _record(demo, kv_bytes, report)
    return demo.expected.numpy()


def _record(demo: Run, kv_bytes: int, report: Report) -> None:
    times = demo.times
    report.checks.update(demo.checks)
    report.add(
        Result("prefix_tokens", demo.prefix, "tokens"),
        Result("suffix_tokens", len(demo.token_ids) - demo.prefix, "tokens"),
        Result("kv_bytes", kv_bytes, "B"),
    )
    right = all(demo.checks.values())
    if not right:
        print("a check failed: figures of what was restored are not reported", file=report.out)
    for name in ("cold", "device", "host") if right else ("cold",):
        if values := getattr(times, name):
            # For the restored ones: how many times shorter than cold.
            cold = None if name == "cold" else [statistics.median(times.cold)] * len(values)
            report.add(measured(f"ttft_{name}", values, "s", cold))
    if times.save and right:
        report.add(measured("save", times.save, "s"))
    if right and len(times.restore) == len(times.memcpy) > 0:
        rates, limits = ([kv_bytes / s / 1e9 for s in which] for which in (times.restore, times.memcpy))
        report.add(measured("restore", rates, "GB/s", limits))


def _summarize(args: argparse.Namespace, prefix: int, report: Report) -> None:
    found = {result.name: result for result in report.results}
    if "kv_bytes" not in found:
        return
    kv_mib = found["kv_bytes"].value / 2**20
    restore = found.get("restore")
    print(file=report.out)
    header = ("TTFT", "tokens", "KV MiB", "seconds", "min", "max", "n", "vs cold", "GB/s", "memcpy GB/s")
    rows = []
    for name in ("cold", "device", "host", "disk"):
        if result := found.get("ttft_disk_after_sigkill" if name == "disk" else f"ttft_{name}"):
            rates = ("", "")
            if name == "host" and restore is not None and restore.limit is not None:
                rates = (f"{restore.value:.2f}", f"{restore.limit:.2f}")
            elif name == "disk":
                rates = (f"{found['restore_disk'].value:.2f}", "")
            ratio = f"{result.ratio:.1f} x" if result.ratio is not None else ""
            seconds = [f"{s:.3f}" for s in (result.value, result.min or 0.0, result.max or 0.0)]
            rows.append((name, f"{prefix}+128", f"{kv_mib:.1f}", *seconds, str(result.n), ratio, *rates))
    print(table(header, rows), file=report.out)
    print(
        "\nTTFT: from token ids to next-token logits (keys, lookup, load, model); seconds are medians of n.\n"
        "cold: everything is computed; device: the prefix is still in the cache; host: it comes from the\n"
        "host tier. GB/s: the KV bytes over hashing, lookup and load; memcpy: as many bytes in alternation,\n"
        f"{args.copy_threads} threads, the faster of the C library's and a non-temporal copy.",
        file=report.out,
    )
    if reopen := found.get("reopen"):
        print(
            "disk: it comes from the disk tier, each time in a new process, after the one before was killed\n"
            "with SIGKILL while its engine was open. Not in it: starting the process; and opening the\n"
            f"engine, which took {reopen.value:.3f} s.",
            file=report.out,
        )
    for name, passed in report.checks.items():
        print(f"{'ok    ' if passed else 'FAILED'} {name}", file=report.out)
