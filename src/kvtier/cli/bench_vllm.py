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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.cli.bench_vllm_lookup import measure_lookups
from kvtier.cli.bench_vllm_model import write_model
from kvtier.cli.progress import Progress
from kvtier.cli.results import Report, measured, results_table
from kvtier.cli.vllm_server import Answer, VllmServer
from kvtier.config import parse_size
from kvtier.errors import ConfigError, UnsupportedError

_TOKEN_IDS = (4, 500)  # which any model has, above the special ones
_WARM_UP_TOKENS = 257
_QUIET_SECONDS = 2.0
_QUIET_WITHIN_SECONDS = 120.0
_HITS = "vllm:external_prefix_cache_hits_total"

_START_UNITS = 30.0  # of progress, in seconds or so: what a server takes to start

METHOD = {
    "warm_up": f"a prompt of {_WARM_UP_TOKENS} tokens for each server, which does not count",
    "lossless": "the answers' tokens are compared with those of a hit on the device",
    "restored": "every whole block of the prompt has to come from below, by vLLM's own count",
    "limit": "vLLM's own tiering in the same round",
}

Prompt = list[int]
Prompts = dict[int, list[Prompt]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench vllm`."""
    parser.set_defaults(rounds=3)
    parser.add_argument(
        "--model", help="a model of vLLM's: a folder, or a hub name (default: a small seeded one, made here)"
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


def measure(args: argparse.Namespace, report: Report) -> None:
    """Runs the benchmark into `report`."""
    if any(tokens < _WARM_UP_TOKENS for tokens in args.tokens):
        raise ConfigError(f"--tokens {args.tokens}: allowed: {_WARM_UP_TOKENS} or more each")
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError("kvtier bench vllm needs vLLM in the same environment; it is not installed")
    measure_lookups(args.rounds, args.seed, report, native=not args.without_native)
    source = random.Random(args.seed)  # noqa: S311 - prompts, no secrets
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-vllm-", dir=args.dir) as folder:
        model = args.model
        if model is None:
            model = str(Path(folder) / "model")
            write_model(Path(model), args.seed)
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
        with Progress(report.out, total) as progress:
            _first_life(contenders, prompts, progress)
            for each in contenders:
                each.drop_page_cache()
            _second_life(contenders, prompts, progress)
        _report(contenders, prompts, report)
    print(results_table(report.results), file=report.out)


class Contender:
    """A connector of vLLM's, its server, and what was measured of it: [kind][tokens] in seconds."""

    def __init__(
        self, prefix: str, model: str, transfer: dict[str, Any], args: argparse.Namespace, path: Path
    ) -> None:
        self.prefix = prefix
        self.times: dict[str, dict[int, list[float]]] = {}
        self.right = True
        self.missed: list[str] = []  # where fewer than all whole blocks were restored: else it is no figure
        self.bytes_per_token = 0.0
        self._model = model
        self._transfer = transfer
        self._args = args
        self._path = path
        path.mkdir(exist_ok=True)

    def start(self) -> VllmServer:
        """A new server, which may not be up yet."""
        more = ["--max-model-len", str(max(self._args.tokens) + 64), *self._args.server_args.split()]
        space = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")}
        return VllmServer(self._model, self._transfer, more, **space)

    def first(self, server: VllmServer, prompt: Prompt) -> None:
        """Cold, on the device, and restored from host memory."""
        length = len(prompt)
        cold = server.ask(prompt)
        device = server.ask(prompt)
        self.right &= cold.cached_tokens == 0
        self._note("cold", length, cold.seconds)
        self._note("device", length, device.seconds)
        self._restored("host", server, prompt, device.tokens)

    def again(self, server: VllmServer, prompt: Prompt) -> None:
        """Restored from disk, and on the device."""
        answer = self._from_below("disk_restarted", server, prompt)
        device = server.ask(prompt)
        self.right &= answer.tokens == device.tokens
        self._note("device_restarted", len(prompt), device.seconds)

    def _restored(self, kind: str, server: VllmServer, prompt: Prompt, expected: list[int]) -> None:
        server.forget_device()
        answer = self._from_below(kind, server, prompt)
        self.right &= answer.tokens == expected

    def _from_below(self, kind: str, server: VllmServer, prompt: Prompt) -> Answer:
        """Asks for what the device does not hold, and looks whether all that can be was restored."""
        before = server.metric(_HITS)
        answer = server.ask(prompt)
        hits = server.metric(_HITS) - before
        block = server.block_tokens()
        if hits < (whole := (len(prompt) - 1) // block * block):
            self.missed.append(f"{kind}/{len(prompt)}: {hits:.0f} of {whole} tokens were restored")
        self._note(kind, len(prompt), answer.seconds)
        return answer

    def _note(self, kind: str, length: int, seconds: float) -> None:
        self.times.setdefault(kind, {}).setdefault(length, []).append(seconds)

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
def _servers(contenders: list[Contender], progress: Progress) -> Iterator[list[tuple[Contender, VllmServer]]]:
    with contextlib.ExitStack() as stack:
        servers = [(each, stack.enter_context(each.start())) for each in contenders]
        for _, server in servers:  # at once: most of a start is one thread that imports
            server.wait_until_up()
            progress.step(_START_UNITS)
        for _, server in servers:
            server.ask([5 + n % 400 for n in range(_WARM_UP_TOKENS)])
        yield servers


def _units(tokens: int) -> float:
    """What a cold prompt counts in the progress."""
    return tokens / 1024 + (tokens / 4096) ** 2


def _first_life(contenders: list[Contender], prompts: Prompts, progress: Progress) -> None:
    progress.phase("servers start")
    with _servers(contenders, progress) as servers:
        for length, of_length in prompts.items():
            progress.phase(f"{length} tokens: cold, device, host")
            for n, prompt in enumerate(of_length):
                for each, server in servers if n % 2 == 0 else servers[::-1]:
                    each.first(server, prompt)
                    progress.step(_units(length))
        ours = servers[0]
        loaded = ours[1].metric("vllm:kvtier_load_bytes_total")
        tokens = sum(len(prompt) - 1 for of_length in prompts.values() for prompt in of_length)
        ours[0].bytes_per_token = loaded / tokens
        progress.phase("until all is on disk")
        for each, _ in servers:
            each.wait_until_quiet()


def _second_life(contenders: list[Contender], prompts: Prompts, progress: Progress) -> None:
    progress.phase("servers start again")
    with _servers(contenders, progress) as servers:
        for of_length in prompts.values():
            for n, prompt in enumerate(of_length):
                for each, server in servers if n % 2 == 0 else servers[::-1]:
                    each.again(server, prompt)


def _report(contenders: list[Contender], prompts: Prompts, report: Report) -> None:
    for each in contenders:
        name = (each.prefix or "kvtier/").rstrip("/")
        report.checks[f"{name}_tokens"] = each.right
        report.checks[f"{name}_restored"] = not each.missed
        for line in each.missed:
            print(f"{name}: {line}", file=report.out)
        report.machine.setdefault("missed", {})[name] = each.missed
    ours = contenders[0]
    native = contenders[1] if len(contenders) > 1 else None
    for length in prompts:
        for each in contenders:
            for kind in ("cold", "device", "host", "disk_restarted"):
                times = each.times[kind][length]
                limits = native.times[kind][length] if each is ours and native is not None else None
                report.add(measured(f"{each.prefix}ttft_{kind}/{length}", times, "s", limits))
            for kind, base in (("host", "device"), ("disk_restarted", "device_restarted")):
                pairs = zip(each.times[kind][length], each.times[base][length], strict=True)
                extra = [1e3 * (restored - device) for restored, device in pairs]
                report.add(measured(f"{each.prefix}connector_{kind}/{length}", extra, "ms"))
        report.add(measured(f"memcpy/{length}", _memcpy_ms(int(ours.bytes_per_token * (length - 1))), "ms"))
        for kind in ("host", "disk_restarted"):
            pairs = zip(ours.times["cold"][length], ours.times[kind][length], strict=True)
            ratio = statistics.median(cold / restored for cold, restored in pairs)
            print(f"{length} tokens: {kind} in 1/{ratio:.1f} of cold", file=report.out)


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
