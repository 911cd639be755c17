"""Time to the first token of a real vLLM server: computed, on the device, restored from host memory and disk.

One streaming request at a time, prompts of a whole number of blocks and one token more, so that a restored
prompt computes one token. What the connector costs is `restored - device`, of neighbours in the same round.
vLLM's own tiering with its file tier does the same in a server beside, in turn (on the CPU platform with a
worker of ours, for vLLM has none there); ours are held against its, of the same round. For the disk both
servers are ended, the page cache of their files is dropped, and both are started again; each prompt is then
asked for once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.cli import machine
from kvtier.cli.bench_vllm_lookup import measure_lookups
from kvtier.cli.bench_vllm_memory import into_huge_pages
from kvtier.cli.bench_vllm_model import SIZES, write_model
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, measured, results_table
from kvtier.cli.vllm_server import Answer, VllmServer
from kvtier.config import parse_size
from kvtier.errors import ConfigError, UnsupportedError
from kvtier.layout import check_extent

_TOKEN_IDS = (4, 500)  # which any model has, above the special ones
_WARM_UP_TOKENS = 257
_QUIET_SECONDS = 2.0
_QUIET_WITHIN_SECONDS = 120.0
_HITS = "vllm:external_prefix_cache_hits_total"
_LOADED = "vllm:kvtier_load_bytes_total"

_START_UNITS = 30.0  # of progress, in seconds or so: what a server takes to start

METHOD = {
    "warm_up": f"a prompt of {_WARM_UP_TOKENS} tokens for each server, which does not count",
    "lossless": "the answers' tokens are compared with those of a hit on the device",
    "restored": "every whole block of the prompt has to come from below, by vLLM's own count",
    "limit": "vLLM's own tiering in the same round",
    "memory": "both host tiers in huge pages: vLLM's file in /dev/shm is put into them once it is up; how "
    "much of it was stands in machine.host_memory",
}

Prompt = list[int]
Prompts = dict[int, list[Prompt]]
Times = list[float | None]  # of a row, by round; None where the prompt does not count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench vllm`."""
    parser.set_defaults(rounds=3)
    parser.add_argument(
        "--model", help="a model of vLLM's: a folder, or a hub name (default: a seeded one, made here)"
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="20m",
        help="of the seeded model: parameters, and 16 or 48 KiB of KV a token (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[1025, 4097, 8193, 16385],
        help="prompts (default: %(default)s)",
    )
    parser.add_argument("--host", default="2GiB", help="size of the host tiers (default: %(default)s)")
    parser.add_argument("--disk", default="4GiB", help="capacity of the disk tier (default: %(default)s)")
    parser.add_argument("--dir", default=".", help="folder for what is stored on disk (default: %(default)s)")
    parser.add_argument(
        "--without-native",
        action="store_true",
        help="leave out vLLM's own tiering: half the time",
    )
    parser.add_argument(
        "--server-args", default="--enforce-eager", help="more for vLLM, in one string (default: %(default)s)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuses wrong options; the same number of tokens twice is once.

    Raises:
        ConfigError: The message names them.
    """
    check_extent("--seed", args.seed, 0)
    if any(tokens < _WARM_UP_TOKENS for tokens in args.tokens):
        raise ConfigError(f"--tokens {args.tokens}: allowed: {_WARM_UP_TOKENS} or more each")
    args.tokens = list(dict.fromkeys(args.tokens))


def measure(args: argparse.Namespace, report: Report) -> None:
    """Runs the benchmark into `report`."""
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError("kvtier bench vllm needs vLLM in the same environment; it is not installed")
    if (version := machine.version("vllm")) is not None:
        report.machine.setdefault("versions", {})["vllm"] = version
        print(f"vllm: {version}", file=report.out)
    report.machine["drive"] = machine.drive(Path(args.dir))
    measure_lookups(args.rounds, args.seed, report, native=not args.without_native)
    source = random.Random(args.seed)  # noqa: S311 - prompts, no secrets
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-vllm-", dir=args.dir) as folder:
        model = args.model
        if model is None:
            model = str(Path(folder) / "model")
            write_model(Path(model), args.seed, SIZES[args.size])
        contenders = [Contender("", model, _ours(args, folder), args, Path(folder) / "kvtier")]
        if not args.without_native:
            contenders.append(
                Contender("vllm_native/", model, _native(args, folder), args, Path(folder) / "native")
            )
        prompts = {
            length: [[source.randrange(*_TOKEN_IDS) for _ in range(length)] for _ in range(args.rounds)]
            for length in args.tokens
        }
        total = len(contenders) * (args.rounds * sum(map(_units, args.tokens)) + 2 * _START_UNITS)
        try:
            with Progress(report.out, total) as progress:
                _first_life(contenders, prompts, progress, report)
                for each in contenders:
                    each.drop_page_cache()
                _second_life(contenders, prompts, progress, report)
        finally:
            _checks(contenders, report)
    print(results_table(report.results), file=report.out)


class Contender:
    """A connector of vLLM's, its server, and what was measured of it: [kind][tokens] in seconds, by round."""

    def __init__(
        self, prefix: str, model: str, transfer: dict[str, Any], args: argparse.Namespace, path: Path
    ) -> None:
        self.prefix = prefix
        self.name = (prefix or "kvtier/").rstrip("/")
        self.times: dict[str, dict[int, Times]] = {}
        self.wrong: set[tuple[str, int]] = set()  # rows that have no figure: kind, tokens
        self.missed: list[str] = []  # where fewer than all whole blocks were restored: else it is no figure
        self.engine_id = ""  # of the server that runs
        self._model = model
        self._transfer = transfer
        self._args = args
        self._path = path
        path.mkdir(exist_ok=True)

    def start(self) -> VllmServer:
        """A new server, which may not be up yet."""
        more = ["--max-model-len", str(max(self._args.tokens) + 64), *self._args.server_args.split()]
        space = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")}
        self.engine_id = f"kvtier-bench-{uuid.uuid4()}"
        return VllmServer(self._model, self._transfer | {"engine_id": self.engine_id}, more, **space)

    def first(self, server: VllmServer, prompt: Prompt) -> None:
        """Cold, on the device, and restored from host memory."""
        length = len(prompt)
        cold = server.ask(prompt)
        device = server.ask(prompt)
        self._note("cold", length, cold.seconds, right=cold.cached_tokens == 0)
        self._note("device", length, device.seconds)
        server.forget_device()
        answer, whole = self._from_below("host", server, prompt)
        self._note("host", length, answer.seconds, right=answer.tokens == device.tokens, counts=whole)

    def again(self, server: VllmServer, prompt: Prompt) -> None:
        """Restored from disk, and on the device."""
        length = len(prompt)
        answer, whole = self._from_below("disk_restarted", server, prompt)
        device = server.ask(prompt)
        right = answer.tokens == device.tokens
        self._note("disk_restarted", length, answer.seconds, right=right, counts=whole)
        self._note("device_restarted", length, device.seconds)

    def _from_below(self, kind: str, server: VllmServer, prompt: Prompt) -> tuple[Answer, bool]:
        """Asks for what the device does not hold; and whether all that can be was restored."""
        before = server.metric(_HITS)
        answer = server.ask(prompt)
        hits = server.metric(_HITS) - before
        block = server.block_tokens()
        if all_of_it := hits >= (whole := (len(prompt) - 1) // block * block):
            return answer, all_of_it
        self.missed.append(f"{kind}/{len(prompt)}: {hits:.0f} of {whole} tokens were restored")
        return answer, all_of_it

    def _note(
        self, kind: str, length: int, seconds: float, *, right: bool = True, counts: bool = True
    ) -> None:
        self.times.setdefault(kind, {}).setdefault(length, []).append(seconds if counts else None)
        if not right:
            self.wrong.add((kind, length))

    def row(self, kind: str, length: int) -> Times:
        """Of every round; without any that counts where one answer was wrong."""
        times = self.times[kind][length]
        return [None] * len(times) if (kind, length) in self.wrong else times

    def wait_until_quiet(self) -> None:
        """Waits until nothing has been written to its directory for some seconds: neither says it is done."""
        end = time.monotonic() + _QUIET_WITHIN_SECONDS
        since, changed = time.monotonic(), self._newest()
        while time.monotonic() - since < _QUIET_SECONDS and time.monotonic() < end:
            time.sleep(0.1)
            if (newest := self._newest()) != changed:
                since, changed = time.monotonic(), newest

    def _files(self) -> list[Path]:
        return [path for path in self._path.rglob("*") if path.is_file()]

    def _newest(self) -> tuple[int, int]:
        times = []
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):
                times.append(path.stat().st_mtime_ns)
        return len(times), max(times, default=0)

    def drop_page_cache(self) -> None:
        """Of what is in its directory: written back, and forgotten by the kernel."""
        for path in self._files():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


@contextlib.contextmanager
def _servers(
    contenders: list[Contender], progress: Progress, report: Report
) -> Iterator[list[tuple[Contender, VllmServer]]]:
    with contextlib.ExitStack() as stack:
        servers = [(each, stack.enter_context(each.start())) for each in contenders]
        for each, server in servers:  # at once: most of a start is one thread that imports
            server.wait_until_up()
            if (memory := into_huge_pages(each.engine_id)) is not None:
                report.machine.setdefault("host_memory", {}).setdefault(each.name, []).append(memory)
            progress.step(_START_UNITS)
        for _, server in servers:
            server.ask([5 + n % 400 for n in range(_WARM_UP_TOKENS)])
        yield servers


def _units(tokens: int) -> float:
    """What a cold prompt counts in the progress."""
    return tokens / 1024 + (tokens / 4096) ** 2


def _first_life(contenders: list[Contender], prompts: Prompts, progress: Progress, report: Report) -> None:
    progress.phase("servers start")
    with _servers(contenders, progress, report) as servers:
        ours = servers[0]
        for length, of_length in prompts.items():
            progress.phase(f"{length} tokens: cold, device, host")
            before = ours[1].metric(_LOADED)
            for n, prompt in enumerate(of_length):
                for each, server in servers if n % 2 == 0 else servers[::-1]:
                    each.first(server, prompt)
                    progress.step(_units(length))
            loaded = (ours[1].metric(_LOADED) - before) / len(of_length)
            _record(contenders, length, ("cold", "device", "host"), {"host": "device"}, report)
            if None not in ours[0].row("host", length):
                report.add(measured(f"memcpy/{length}", _memcpy_ms(int(loaded)), "ms"))
        progress.phase("until all is on disk")
        for each, _ in servers:
            each.wait_until_quiet()


def _second_life(contenders: list[Contender], prompts: Prompts, progress: Progress, report: Report) -> None:
    progress.phase("servers start again")
    with _servers(contenders, progress, report) as servers:
        for length, of_length in prompts.items():
            for n, prompt in enumerate(of_length):
                for each, server in servers if n % 2 == 0 else servers[::-1]:
                    each.again(server, prompt)
            _record(contenders, length, ("disk_restarted",), {"disk_restarted": "device_restarted"}, report)


def _record(
    contenders: list[Contender], length: int, kinds: Sequence[str], bases: dict[str, str], report: Report
) -> None:
    """Adds the rows of a length, once all of its rounds are over; `bases`: what the connector's are over."""
    ours, *others = contenders
    for each in contenders:
        for kind in kinds:
            values, limits = each.row(kind, length), None
            if each is ours and others:
                limits = others[0].row(kind, length)
            _add(report, f"{each.prefix}ttft_{kind}/{length}", values, limits)
        for kind, base in bases.items():
            pairs = zip(each.row(kind, length), each.row(base, length), strict=True)
            extra = [None if a is None or b is None else 1e3 * (a - b) for a, b in pairs]
            _add(report, f"{each.prefix}connector_{kind}/{length}", extra, None, "ms")
    for kind in bases:
        pairs = zip(ours.row("cold", length), ours.row(kind, length), strict=True)
        if ratios := [
            cold / restored for cold, restored in pairs if cold is not None and restored is not None
        ]:
            print(f"{length} tokens: {kind} in 1/{statistics.median(ratios):.1f} of cold", file=report.out)


def _add(report: Report, name: str, values: Times, limits: Times | None, unit: str = "s") -> None:
    """A row of the rounds that count; beside its limit if at least one round has both, and then of those."""
    both = [(a, b) for a, b in zip(values, limits or (), strict=False) if a is not None and b is not None]
    if both:
        report.add(measured(name, [a for a, _ in both], unit, [b for _, b in both]))
    elif alone := [value for value in values if value is not None]:
        report.add(measured(name, alone, unit))
    else:
        print(f"{name}: no prompt counts: no figure", file=report.out)


def _checks(contenders: list[Contender], report: Report) -> None:
    """Of what was asked so far."""
    for each in contenders:
        report.checks[f"{each.name}_tokens"] = not each.wrong
        report.checks[f"{each.name}_restored"] = not each.missed
        for line in each.missed:
            print(f"{each.name}: {line}", file=report.out)
        for kind, length in sorted(each.wrong):
            print(f"{each.name}: {kind}/{length}: WRONG TOKENS, no figure", file=report.out)
        report.machine.setdefault("missed", {})[each.name] = each.missed


def _memcpy_ms(num_bytes: int, rounds: int = 5) -> list[float]:
    """A plain copy of so many bytes between buffers that were written before."""
    source = np.ones(max(num_bytes, 1), np.uint8)
    target = np.ones_like(source)
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def _ours(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    disk = {"path": str((Path(folder) / "kvtier").absolute()), "capacity": args.disk}
    return {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host": args.host, "disk": [disk], "load": "always"},
    }


def _native(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """VLLM's own tiering with its file tier."""
    extra = {
        "spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": parse_size(args.host, "--host"),
        "secondary_tiers": [{"type": "fs", "root_dir": str((Path(folder) / "native").absolute())}],
    }
    if importlib.import_module("vllm.platforms").current_platform.is_cpu():
        extra |= {
            "spec_name": "NativeCpuTieringSpec",
            "spec_module_path": "kvtier.adapters.vllm.native_cpu",
        }
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
