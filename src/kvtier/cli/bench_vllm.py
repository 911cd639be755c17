"""Time to the first token of a real vLLM server: computed, found on the device, restored from host memory.

One streaming request at a time, prompts of a whole number of blocks and one token more, so that a restored
prompt computes one token. What the connector costs is `restored - device`, of neighbours in the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from kvtier.cli.results import Report, measured, results_table
from kvtier.errors import ConfigError, UnsupportedError

_START_SECONDS = 600.0
_TOKEN_IDS = (4, 500)  # which any model has, above the special ones
_ANSWER_TOKENS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier bench vllm`."""
    parser.add_argument("--model", required=True, help="a model of vLLM's: a folder, or a hub name")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1025, 4097, 8193], help="prompts (default: 1025 4097 8193)"
    )
    parser.add_argument("--host", default="4GiB", help="size of the host tier (default: %(default)s)")
    parser.add_argument(
        "--server-args", default="--enforce-eager", help="more for vLLM, in one string (default: %(default)s)"
    )


def measure(args: argparse.Namespace, report: Report) -> None:
    """Runs the benchmark into `report`."""
    if any(tokens < 1 for tokens in args.tokens):
        raise ConfigError(f"--tokens {args.tokens}: allowed: 1 or more each")
    source = random.Random(args.seed)  # noqa: S311 - prompts, no secrets
    with _server(args) as api:
        right = True
        for length in args.tokens:
            cold: list[float] = []
            device: list[float] = []
            host: list[float] = []
            for round_ in range(args.rounds + 1):
                prompt = [source.randrange(*_TOKEN_IDS) for _ in range(length)]
                first, _ = api.first_token(prompt)
                on_device, expected = api.first_token(prompt)
                api.forget_device()
                restored, got = api.first_token(prompt)
                right = right and got == expected
                if round_:  # the first one warms up
                    cold.append(first)
                    device.append(on_device)
                    host.append(restored)
            connector = [1e3 * (a - b) for a, b in zip(host, device, strict=True)]
            report.add(
                measured(f"ttft_cold/{length}", cold, "s"),
                measured(f"ttft_device/{length}", device, "s"),
                measured(f"ttft_host/{length}", host, "s", device),
                measured(f"connector/{length}", connector, "ms"),
            )
            ratio = statistics.median(a / b for a, b in zip(cold, host, strict=True))
            print(f"{length} tokens: restored from host in 1/{ratio:.1f} of cold", file=report.out)
        report.checks["restored_tokens"] = right
        report.checks["restored_from_host"] = api.loaded_blocks() > 0
        print(results_table(report.results), file=report.out)


class _Api:
    def __init__(self, port: int) -> None:
        self._port = port

    def request(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_START_SECONDS)
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Content-Type": "application/json"})
        return connection.getresponse()

    def first_token(self, prompt: list[int]) -> tuple[float, list[int]]:
        """Seconds to the first token, and the answer's tokens."""
        body = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": _ANSWER_TOKENS,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        begin = time.perf_counter()
        response = self.request("POST", "/v1/completions", body)
        if response.status != http.client.OK:
            raise ConfigError(f"the server refused a prompt of {len(prompt)} tokens: {response.read()!r}")
        first: float | None = None
        ids: list[int] = []
        for line in response:
            if line.startswith(b"data: {"):
                first = time.perf_counter() - begin if first is None else first
                for choice in json.loads(line[6:])["choices"]:
                    ids += choice.get("token_ids") or []
        if first is None:
            raise ConfigError("the server sent no token")
        return first, ids

    def forget_device(self) -> None:
        """Empties vLLM's own prefix cache, not ours."""
        response = self.request("POST", "/reset_prefix_cache")
        response.read()

    def loaded_blocks(self) -> float:
        """Blocks that the connector has loaded."""
        lines = self.request("GET", "/metrics").read().decode().splitlines()
        name = "vllm:kvtier_load_blocks_total"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[_Api]:
    """Starts vLLM with the connector on a free port of the loopback, and ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transfer = {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host": args.host},
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m"]
    command += ["--kv-transfer-config", json.dumps(transfer), *args.server_args.split()]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(  # noqa: S603 - this very Python
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_up(_Api(port), server, log)
            yield _Api(port)
        finally:
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait_until_up(api: _Api, server: subprocess.Popen[bytes], log: Any) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        if server.poll() is not None or time.monotonic() > end:
            log.seek(0)
            raise UnsupportedError(f"vLLM's server did not start; the end of its log:\n{log.read()[-3000:]}")
        with contextlib.suppress(OSError):
            if api.request("GET", "/health").status == http.client.OK:
                return
        time.sleep(0.3)
