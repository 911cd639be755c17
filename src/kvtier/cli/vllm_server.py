"""Starts a real vLLM server on the loopback and talks to it: for benchmarks and examples."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvtier.cli.processes import bound
from kvtier.errors import ConfigError, UnsupportedError

START_SECONDS = 600.0
_STOP_SECONDS = 60.0
_OTHERS_SECONDS = 10.0
_NAME = "m"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where vLLM puts it


class Answer(NamedTuple):
    """What a prompt brought.

    Attributes:
        seconds: To the first token.
        tokens: The answer's token ids.
        cached_tokens: How many of the prompt's tokens were not computed.
    """

    seconds: float
    tokens: list[int]
    cached_tokens: int


def forget_offloaded_memory(engine_id: str) -> None:
    """Removes what vLLM's own tiering leaves of its host memory when it is killed.

    A file of all of that memory (vllm/v1/kv_offload/cpu/shared_offload_region.py), named by the engine_id of
    --kv-transfer-config, so that nobody else's is touched; with data parallelism one for each engine.
    """
    for path in _SHARED_MEMORY.glob(f"vllm_offload_{engine_id}*.mmap"):
        path.unlink(missing_ok=True)


class VllmServer:
    """One server in a process group of its own; a context manager that ends it.

    However it ended, also by a signal from elsewhere: `kill` and `stop` leave nothing of it in shared memory.
    When we are killed it is asked to end, as by `stop`.
    """

    def __init__(
        self, model: str, transfer: Mapping[str, Any], arguments: Sequence[str] = (), **environment: str
    ) -> None:
        """Starts it and returns at once.

        Args:
            model: A folder, or a hub name.
            transfer: --kv-transfer-config.
            arguments: More for vLLM.
            environment: More for its environment.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--served-model-name", _NAME]
        self._engine_id = str(transfer.get("engine_id") or f"kvtier-{uuid.uuid4()}")
        config = json.dumps({**transfer, "engine_id": self._engine_id})
        command += ["--enable-prompt-tokens-details", "--kv-transfer-config", config]
        more = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"} | environment
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - stop() closes it
        self._server = subprocess.Popen(  # noqa: S603 - this very Python
            bound([*command, *arguments], signal.SIGTERM),
            env=os.environ | more,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_up(self, seconds: float = START_SECONDS) -> None:
        """Waits until it answers.

        Raises:
            UnsupportedError: It ended, or did not answer in time; with the end of its log.
        """
        end = time.monotonic() + seconds
        while True:
            if self._server.poll() is not None or time.monotonic() > end:
                raise UnsupportedError(f"vLLM's server did not start; the end of its log:\n{self.log()}")
            with contextlib.suppress(OSError):
                if self.request("GET", "/health")[0] == http.client.OK:
                    return
            time.sleep(0.3)

    def log(self) -> str:
        """The end of what it wrote."""
        self._log.seek(0)
        return self._log.read()[-4000:]

    def kill(self) -> None:
        """Kill -9 of the server and its engine. Idempotent.

        Python's trackers of shared memory live on until they have removed what the killed left of theirs.
        """
        for pid in _group(self._server.pid):
            if not _is_tracker(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._server.wait()
        self._wait_for_the_others()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        forget_offloaded_memory(self._engine_id)

    def stop(self) -> None:
        """Asks it to end, and kills what has not after a minute. Idempotent."""
        if self._server.poll() is None:
            self._server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(_STOP_SECONDS)
                self._wait_for_the_others()
        self.kill()  # the engine's process too, where the server left it behind
        self._log.close()

    def _wait_for_the_others(self) -> None:
        """Until nothing of its group runs, or for some seconds."""
        end = time.monotonic() + _OTHERS_SECONDS
        while _group(self._server.pid) and time.monotonic() < end:
            time.sleep(0.02)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """One request: status and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=START_SECONDS)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def ask(self, prompt: Sequence[int], tokens: int = 4) -> Answer:
        """Streams a greedy answer to a prompt of token ids.

        Raises:
            ConfigError: The server refused it, or sent nothing.
        """
        body = {
            "model": _NAME,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        sent = json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=START_SECONDS)
        try:
            begin = time.perf_counter()
            connection.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise ConfigError(f"the server refused a prompt of {len(prompt)} tokens: {response.read()!r}")
            return _read(response, begin)
        finally:
            connection.close()

    def forget_device(self) -> None:
        """Empties vLLM's own prefix cache, not what is below it."""
        self.request("POST", "/reset_prefix_cache")

    def metric(self, name: str) -> float:
        """The sum of a Prometheus counter over its labels."""
        return sum(float(line.rsplit(" ", 1)[1]) for line in self._metrics(name))

    def block_tokens(self) -> int:
        """Tokens of one of vLLM's blocks, which only as a whole are found again.

        Raises:
            UnsupportedError: It does not say.
        """
        for line in self._metrics("vllm:cache_config_info{"):
            if (found := re.search(r'[{,]block_size="(\d+)"', line)) is not None:
                return int(found[1])
        raise UnsupportedError("vLLM's metrics do not say its block_size")

    def _metrics(self, name: str) -> list[str]:
        lines = self.request("GET", "/metrics")[1].decode().splitlines()
        return [line for line in lines if line.startswith(name)]


def _group(leader: int) -> list[int]:
    """Processes of a group that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


def _is_tracker(pid: int) -> bool:
    """Whether it is multiprocessing's, which removes what is registered when its processes have ended."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _read(response: http.client.HTTPResponse, begin: float) -> Answer:
    first: float | None = None
    ids: list[int] = []
    cached = 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if chunk["choices"] and first is None:
            first = time.perf_counter() - begin
        for choice in chunk["choices"]:
            ids += choice.get("token_ids") or []
        details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens") or cached
    if first is None:
        raise ConfigError("the server sent no token")
    return Answer(first, ids, cached)
