"""Several processes: tensor parallelism over one arena, and the HTTP server as users start it."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drive_faults import slots

from kvtier.adapters.vllm.counters import COUNTERS

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
    def __init__(self, port: int, run: subprocess.Popen[bytes]) -> None:
        self._port = port
        self.run = run

    def processes(self, name: str) -> list[int]:
        """Living ones of the server whose title begins with that."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                title = (folder / "cmdline").read_bytes().decode(errors="replace")
                if os.getpgid(int(folder.name)) == self.run.pid and title.startswith(name):
                    found.append(int(folder.name))
        return found

    def processors(self, process: str, thread: str) -> set[int]:
        """Where threads of this name may run, in processes of the server that have that name."""
        found: set[int] = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) != self.run.pid:
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

    def stream(self, tokens: list[int], **more: Any) -> tuple[list[int], int]:
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
            }
            | more,
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


@contextlib.contextmanager
def served(model: Path, folder: Path, *options: str, extra: Any = None, **variables: str) -> Iterator[Api]:
    """A server as users start it; `api.run` is its process, `api.said()` the end of its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = folder / "run"
    meeting.mkdir(mode=0o700, exist_ok=True)
    transfer = {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host": "64MiB", "load": "always"} | (extra or {}),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m", "--enforce-eager"]
    command += ["--dtype", "float32", "--block-size", str(BLOCK), "--max-model-len", "2048"]
    command += ["--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(transfer), *options]
    log = (folder / "log").open("w+")
    server = subprocess.Popen(
        command,
        env=environment(meeting, **variables),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def said() -> str:
        log.seek(0)
        return log.read()[-6000:]

    made = Api(port, server)
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
        with contextlib.suppress(ProcessLookupError):  # whatever is left of it
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()


@pytest.fixture
def api(llama: Path, tmp_path: Path) -> Iterator[Api]:
    with served(llama, tmp_path) as made:
        yield made


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
    shown = api.request("GET", "/metrics")[1].decode()
    assert [name for name in COUNTERS if f"\nvllm:kvtier_{name}_total" not in shown] == []
    # vLLM binds its worker to one processor; what copies runs wherever its engine may.
    engine = api.processors("VLLM::EngineCore", "VLLM::EngineCore")
    assert engine
    assert api.processors("VLLM::Worker", "kvtier-copy") == engine


@pytest.mark.timeout(900)
def test_a_server_whose_worker_is_killed_ends_and_the_next_one_restores(llama: Path, tmp_path: Path) -> None:
    """vLLM ends the server itself; ours must neither hold it up nor leave anything wrong on the drive."""
    drive = tmp_path / "disk"
    extra = {"disk": [{"path": str(drive), "capacity": "128MiB"}], "max_wait": 30}
    ranks = ("--tensor-parallel-size", "2", "--max-num-batched-tokens", "256")
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
    kept = [(7 * i + i * i * 3) % 500 + 4 for i in range(1000)]
    killed = [[(7 * i + i * i * (5 + n)) % 500 + 4 for i in range(1900)] for n in range(4)]
    hits = 999 // BLOCK * BLOCK
    with served(llama, tmp_path, *ranks, extra=extra, **bound) as api:
        expected, none = api.stream(kept)
        assert none == 0
        end = time.monotonic() + 30
        while len(slots(drive)) < hits // BLOCK:
            assert time.monotonic() < end, "its blocks do not come to the drive"
            time.sleep(0.1)
        time.sleep(2)  # and are durable
        before = len(slots(drive))

        def ask(prompt: list[int]) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
                api.stream(prompt)

        asking = [threading.Thread(target=ask, args=(prompt,)) for prompt in killed]
        for thread in asking:
            thread.start()
        while len(slots(drive)) == before:  # until some of what is computed has been stored
            assert any(thread.is_alive() for thread in asking), "too late"
            time.sleep(0.005)
        (worker,) = api.processes("VLLM::Worker_TP1")
        os.kill(worker, signal.SIGKILL)
        for thread in asking:
            thread.join(100)
            assert not thread.is_alive(), "a request hangs"
        api.run.wait(100)
        end = time.monotonic() + 30
        while api.processes(""):
            assert time.monotonic() < end, "processes are left"
            time.sleep(0.1)
    with served(llama, tmp_path, *ranks, extra=extra, **bound) as api:
        assert api.stream(kept) == (expected, hits)
        for prompt in killed:
            found, _ = api.stream(prompt)
            api.request("POST", "/reset_prefix_cache")
            computed, loaded = api.stream(prompt, kv_transfer_params={"kvtier": {"tiers": []}})
            assert loaded == 0
            assert found == computed
        assert api.metric("vllm:kvtier_load_failures_total") == 0
