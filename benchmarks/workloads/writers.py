"""Trace files: one JSON object a line, in the two public formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from benchmarks.workloads.traffic import Request


def _mooncake(request: Request) -> dict[str, Any]:
    return {
        "timestamp": round(request.at_s * 1000),
        "input_length": request.input_tokens,
        "output_length": request.output_tokens,
        "hash_ids": list(request.block_ids),
    }


class _Bailian:
    """chat_id numbers requests; parent_chat_id is the request before it in its conversation, or -1."""

    def __init__(self) -> None:
        self._requests = 0
        self._last_of_session: dict[int, int] = {}

    def __call__(self, request: Request) -> dict[str, Any]:
        chat_id = self._requests
        self._requests += 1
        parent = self._last_of_session.get(request.session, -1)
        self._last_of_session[request.session] = chat_id
        return {
            "chat_id": chat_id,
            "parent_chat_id": parent,
            "timestamp": round(request.at_s, 3),
            "input_length": request.input_tokens,
            "output_length": request.output_tokens,
            "type": request.kind,
            "turn": request.turn,
            "hash_ids": list(request.block_ids),
        }


FORMATS: dict[str, Callable[[], Callable[[Request], dict[str, Any]]]] = {
    "mooncake": lambda: _mooncake,
    "bailian": _Bailian,
}


def write(requests: Iterable[Request], out: TextIO, form: str = "mooncake") -> None:
    """Writes a trace.

    Raises:
        ValueError: The format is unknown.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r} is unknown; there are {', '.join(FORMATS)}")
    line = FORMATS[form]()
    for request in requests:
        out.write(json.dumps(line(request)) + "\n")
