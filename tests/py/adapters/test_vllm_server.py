"""What `kvtier bench vllm` does around a server; a program that answers as vLLM does stands for it."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.cli import bench_vllm
from kvtier.cli.bench_vllm import Contender
from kvtier.cli.bench_vllm_memory import into_huge_pages
from kvtier.cli.results import Report
from kvtier.cli.vllm_server import VllmServer, _group, forget_offloaded_memory
from kvtier.errors import UnsupportedError

SHARED_MEMORY = Path("/dev/shm")

# Makes the file of host memory as vLLM does, and shared memory of Python as its queues do; has a child
# as the engine's process; answers.
PROGRAM = """
import argparse, http.server, json, multiprocessing.shared_memory, os, subprocess, sys

options = argparse.ArgumentParser()
for name in ("--kv-transfer-config", "--port", "--host", "--model", "--served-model-name", "--metrics"):
    options.add_argument(name)
options.add_argument("--enable-prompt-tokens-details", action="store_true")
args = options.parse_args()
name = "vllm_offload_" + json.loads(args.kv_transfer_config)["engine_id"]
for part in ("", "_dp1"):
    with open(f"/dev/shm/{name}{part}.mmap", "xb") as file:
        file.truncate(1 << 20)
queue = multiprocessing.shared_memory.SharedMemory("kvtier-test-" + args.port, create=True, size=1 << 20)
subprocess.Popen(["sleep", "600"])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(args.metrics.encode() if self.path == "/metrics" else b"")
    def log_message(self, *_):
        pass

http.server.HTTPServer((args.host, int(args.port)), Handler).serve_forever()
"""
METRICS = """# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
vllm:cache_config_info{_block_size_resolved="True",block_size="128",engine="0"} 1.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 256.0
vllm:external_prefix_cache_hits_total{engine="1",model_name="m"} 128.0
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(PROGRAM)

    def start(metrics: str = METRICS) -> VllmServer:
        transfer = {"kv_connector": "OffloadingConnector"}
        made.append(VllmServer("m", transfer, ["--metrics", metrics], PYTHONPATH=str(tmp_path)))
        made[-1].wait_until_up(60)
        return made[-1]

    made: list[VllmServer] = []
    yield start
    for each in made:
        each.kill()
        each.stop()


def left() -> set[str]:
    return {path.name for kind in ("vllm_offload_*", "kvtier-test-*") for path in SHARED_MEMORY.glob(kind)}


def test_a_killed_server_leaves_no_shared_memory_and_nobody_elses_is_touched(server: Any) -> None:
    before = left()
    others = SHARED_MEMORY / f"vllm_offload_of-another-{os.getpid()}.mmap"
    others.touch()
    try:
        first, second = server(), server()
        made = left() - before - {others.name}
        assert len(made) == 6  # each with that of a second engine, and a queue
        os.kill(first._server.pid, signal.SIGKILL)  # from elsewhere; its engine lives on
        first.stop()
        assert len(left() - before - {others.name}) == 3
        second.kill()
        assert left() == before | {others.name}
    finally:
        others.unlink()


def test_what_a_server_started_ends_with_it(server: Any) -> None:
    first = server()
    assert len(_group(first._server.pid)) >= 3  # itself, the engine and the tracker
    first.kill()
    assert _group(first._server.pid) == []


def test_a_server_is_asked_to_end_when_we_are_killed(server: Any, tmp_path: Path) -> None:
    server().kill()  # the fixture has made the program that stands for vLLM
    code = (
        "import time; from kvtier.cli.vllm_server import VllmServer\n"
        f"made = VllmServer('m', {{}}, ['--metrics', ''], PYTHONPATH={str(tmp_path)!r})\n"
        "made.wait_until_up(60); print(made._server.pid, made._engine_id, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        leader, engine_id = owner.stdout.readline().split()
        owner.kill()
    try:
        until = time.monotonic() + 30
        while int(leader) in _group(int(leader)) and time.monotonic() < until:
            time.sleep(0.02)
        assert int(leader) not in _group(int(leader))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(leader), signal.SIGKILL)  # what stands for its engine does not listen
        forget_offloaded_memory(engine_id)


def test_metrics(server: Any) -> None:
    assert server().block_tokens() == 128
    silent = server(METRICS.splitlines()[2])
    assert silent.metric("vllm:external_prefix_cache_hits_total") == 256
    with pytest.raises(UnsupportedError, match="do not say its block_size"):
        silent.block_tokens()


class Scripted:
    """A server's part of `Contender`: so many tokens of a prompt that the device forgot come from below."""

    def __init__(self, hits: int, restored: tuple[int, ...] = (1, 2)) -> None:
        self._hits, self._total, self._restored = hits, 100.0, list(restored)
        self._device: list[list[int]] = []
        self._below: list[list[int]] = []

    def ask(self, prompt: list[int]) -> Any:
        tokens = [1, 2]
        if prompt not in self._device and prompt in self._below:
            self._total += self._hits
            tokens = self._restored
        self._device.append(prompt)
        self._below.append(prompt)
        return SimpleNamespace(seconds=0.5, tokens=tokens, cached_tokens=0)

    def forget_device(self) -> None:
        self._device.clear()

    def metric(self, name: str) -> float:
        return self._total

    def block_tokens(self) -> int:
        return 128


@pytest.mark.parametrize(
    ("hits", "missed"),
    [
        (1024, []),
        (1023, ["host/1025: 1023 of 1024 tokens were restored"]),
        (512, ["host/1025: 512 of 1024 tokens were restored"]),
    ],
)
def test_all_whole_blocks_have_to_be_restored(tmp_path: Path, hits: int, missed: list[str]) -> None:
    contender = Contender("", "m", {}, SimpleNamespace(), tmp_path / "disk")
    contender.first(Scripted(hits), list(range(1025)))
    assert contender.missed == missed
    assert contender.times["host"] == {1025: [None if missed else 0.5]}


def measured_rows(monkeypatch: pytest.MonkeyPatch, folder: Path, ours: Scripted, theirs: Scripted) -> Report:
    """A run with these as servers, of two rounds of a prompt of 257 tokens and one of 513."""
    servers = {"": ours, "vllm_native/": theirs}

    @contextlib.contextmanager
    def started(contenders: list[Contender], *_: Any) -> Iterator[Any]:
        for server in servers.values():
            server.forget_device()
        yield [(each, servers[each.prefix]) for each in contenders]

    monkeypatch.setattr(bench_vllm, "_servers", started)
    monkeypatch.setattr(bench_vllm, "measure_lookups", lambda *_, **__: None)
    monkeypatch.setattr(bench_vllm, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(bench_vllm.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(bench_vllm, "_native", lambda *_: {})
    options = {"tokens": [257, 513], "rounds": 2, "seed": 1, "model": "m", "without_native": False}
    args = argparse.Namespace(**options, dir=str(folder), disk="1GiB", host="1GiB")
    report = Report("bench vllm")
    with contextlib.suppress(KeyboardInterrupt):
        bench_vllm.measure(args, report)
    return report


def test_prompts_that_were_not_restored_have_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_vllm.machine, "version", {"vllm": "1.2.3"}.get)
    report = measured_rows(monkeypatch, tmp_path, Scripted(256), Scripted(512))
    assert report.machine["versions"]["vllm"] == "1.2.3"
    assert capsys.readouterr().out.startswith("vllm: 1.2.3\n")
    assert " on " in report.machine["drive"]["file_system"]
    of = {result.name: result for result in report.results}
    assert report.checks["kvtier_restored"] is False  # 256 of 512 tokens of the longer prompt
    assert report.checks["vllm_native_restored"] is True
    for kind in ("host", "disk_restarted"):
        assert of[f"ttft_{kind}/257"].limit == of[f"vllm_native/ttft_{kind}/257"].value == 0.5
        assert of[f"ttft_{kind}/257"].n == 2
        assert {f"ttft_{kind}/513", f"connector_{kind}/513"} & set(of) == set()
        assert f"vllm_native/ttft_{kind}/513" in of
    assert of["ttft_cold/513"].n == 2
    assert "memcpy/257" in of
    assert "memcpy/513" not in of


def test_wrong_tokens_have_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured_rows(monkeypatch, tmp_path, Scripted(512), Scripted(512, restored=(1, 3)))
    of = {result.name: result for result in report.results}
    assert report.checks["vllm_native_tokens"] is False
    assert not any(name.startswith(("vllm_native/ttft_host", "vllm_native/connector_host")) for name in of)
    assert of["ttft_host/257"].limit is None  # and is held against nothing
    assert of["ttft_cold/257"].limit == 0.5


def test_what_was_finished_is_kept_when_the_rest_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Scripted):
        def ask(self, prompt: list[int]) -> Any:
            if len(prompt) == 513:
                raise KeyboardInterrupt
            return super().ask(prompt)

    report = measured_rows(monkeypatch, tmp_path, Interrupted(256), Scripted(256))
    names = {result.name for result in report.results}
    assert {"ttft_cold/257", "ttft_host/257", "connector_host/257", "vllm_native/ttft_host/257"} <= names
    assert not any(name.endswith("/513") for name in names)
    assert report.checks["kvtier_restored"] is True


def test_vllms_own_memory_is_put_into_huge_pages() -> None:
    name = f"of-a-test-{os.getpid()}"
    path = SHARED_MEMORY / f"vllm_offload_{name}.mmap"
    assert into_huge_pages(name) is None
    written = os.urandom(4 << 20)
    try:
        path.write_bytes(written)
        os.truncate(path, 8 << 20)
        found = into_huge_pages(name)
        assert path.read_bytes() == written + bytes(4 << 20)
    finally:
        path.unlink()
    assert found is not None
    assert found["mib"] == 8
    if has_collapse():
        assert found["in_huge_pages"] == 1


def has_collapse() -> bool:
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    deny = "[deny]" in Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    return release >= (6, 1) and not deny
