"""Several processes: tensor parallelism over one arena, and the HTTP server as users start it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
BLOCK = 32


def environment(directory: Path, **more: str) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_ENABLE")}
    return keep | {"XDG_RUNTIME_DIR": str(directory), "VLLM_SERVER_DEV_MODE": "1"} | more


@pytest.mark.parametrize(
    ("model", "block"), [pytest.param("llama", 32, marks=pytest.mark.smoke), ("deepseek", 16)]
)
def test_two_ranks_share_a_slot(
    model: str, block: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(model)
    meeting = tmp_path / "run"
    meeting.mkdir(mode=0o700)
    result = tmp_path / "result.json"
    log = (tmp_path / "log").open("w+")
    run = subprocess.run(
        [sys.executable, str(HERE / "run_parallel.py"), str(path), str(block), str(result)],
        env=environment(meeting, VLLM_CPU_OMP_THREADS_BIND="0|1", OMP_NUM_THREADS="1"),
        stdout=log,
        stderr=subprocess.STDOUT,
        timeout=280,
        check=False,
    )
    log.seek(0)
    assert result.exists(), (run.returncode, log.read()[-6000:])
    told = json.loads(result.read_text())
    cold, device, restored = told["runs"]
    hits = [(length - 1) // block * block for length in told["lengths"]]
    assert (cold["cached"], device["cached"], restored["cached"]) == ([0] * 3, hits, hits)
    # With latents, vLLM 0.32 on two ranks answers differently from run to run, with us or without.
    if model == "llama":
        assert cold["tokens"] == device["tokens"] == restored["tokens"]
    assert told["resets"] == [True]
    assert told["counters"]["vllm:kvtier_load_failures"] == 0
    # Heads are divided among the ranks, so a block is both parts; a latent is the same on both, kept once.
    each = told["counters"]["vllm:kvtier_load_bytes"] / told["counters"]["vllm:kvtier_load_blocks"]
    assert each == {"llama": 3 * 32 * 2 * 2 * 32 * 4, "deepseek": 2 * 16 * 576 * 4}[model]


class Api:
    def __init__(self, port: int, group: int) -> None:
        self._port = port
        self._group = group

    def processors(self, process: str, thread: str) -> set[int]:
        """Where threads of this name may run, in processes of the server that have that name."""
        found: set[int] = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) != self._group:
                    continue
                if (folder / "comm").read_text().strip() != process[:15]:
                    continue
                for task in folder.glob("task/*"):
                    if (task / "comm").read_text().strip() == thread[:15]:
                        found |= os.sched_getaffinity(int(task.name))
            except (OSError, ValueError):
                continue  # it has just ended
        return found

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def stream(self, tokens: list[int]) -> tuple[list[int], int]:
        """Greedy; token ids, and how many of the prompt's were cached."""
        status, answer = self.request(
            "POST",
            "/v1/completions",
            {
                "model": "m",
                "prompt": tokens,
                "max_tokens": 8,
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
                "return_token_ids": True,
                "stream_options": {"include_usage": True},
            },
        )
        assert status == 200, answer[:2000]
        ids: list[int] = []
        cached = 0
        for line in answer.splitlines():
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                for choice in chunk["choices"]:
                    ids += choice.get("token_ids") or []
                usage = chunk.get("usage") or {}
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or cached
        return ids, cached

    def metric(self, name: str) -> float:
        _, text = self.request("GET", "/metrics")
        lines = [line for line in text.decode().splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.fixture
def api(llama: Path, tmp_path: Path) -> Iterator[Api]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = tmp_path / "run"
    meeting.mkdir(mode=0o700)
    transfer = {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host": "64MiB", "load": "always"},
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(llama)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m", "--enforce-eager"]
    command += ["--dtype", "float32", "--block-size", str(BLOCK), "--max-model-len", "2048"]
    command += ["--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(transfer)]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        command, env=environment(meeting), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )

    def said() -> str:
        log.seek(0)
        return log.read()[-6000:]

    made = Api(port, server.pid)
    try:
        end = time.monotonic() + 240
        while True:
            assert server.poll() is None, said()
            assert time.monotonic() < end, said()
            try:
                if made.request("GET", "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.5)
        yield made
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        log.close()


@pytest.mark.smoke
def test_the_server_restores_what_its_device_cache_lost(api: Api) -> None:
    tokens = [(7 * i + i * i * 3) % 500 + 4 for i in range(1000)]
    hits = 999 // BLOCK * BLOCK
    cold, none = api.stream(tokens)
    device, on_device = api.stream(tokens)
    status, _ = api.request("POST", "/reset_prefix_cache")
    assert status == 200
    restored, from_host = api.stream(tokens)
    assert (none, on_device, from_host) == (0, hits, hits)
    assert cold == device == restored
    assert len(cold) == 8
    assert api.metric("vllm:kvtier_hit_tokens_host_total") == hits
    assert api.metric("vllm:kvtier_load_bytes_total") > 0
    assert api.metric("vllm:external_prefix_cache_hits_total") == hits
    # vLLM binds its worker to one processor; what copies runs wherever its engine may.
    engine = api.processors("VLLM::EngineCore", "VLLM::EngineCore")
    assert engine
    assert api.processors("VLLM::Worker", "kvtier-copy") == engine
