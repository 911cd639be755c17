"""What `kvtier bench vllm` does around a server; a program that answers as vLLM does stands for it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.cli.bench_vllm import Contender
from kvtier.cli.vllm_server import VllmServer, _group
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


def test_metrics(server: Any) -> None:
    assert server().block_tokens() == 128
    silent = server(METRICS.splitlines()[2])
    assert silent.metric("vllm:external_prefix_cache_hits_total") == 256
    with pytest.raises(UnsupportedError, match="do not say its block_size"):
        silent.block_tokens()


class Scripted:
    """A server's part of `Contender`: so many tokens of a prompt that the device forgot come from below."""

    def __init__(self, hits: int) -> None:
        self._hits, self._total, self._forgotten = hits, 100.0, False

    def ask(self, prompt: list[int]) -> Any:
        self._total += self._hits * self._forgotten
        self._forgotten = False
        return SimpleNamespace(seconds=0.5, tokens=[1, 2], cached_tokens=0)

    def forget_device(self) -> None:
        self._forgotten = True

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
    assert contender.times["host"] == {1025: [0.5]}
