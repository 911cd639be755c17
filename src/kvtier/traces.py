"""Traces of requests: which blocks each one asked for, and when. No tokens and no contents.

Three formats are read, told apart by their first line:

* Mooncake's (FAST'25 release): `{"timestamp": ms, "input_length": ..., "output_length": ..., "hash_ids":
  [...]}`, 512 tokens for each id;
* Alibaba's Qwen-Bailian (github.com/alibaba-edu/qwen-bailian-usagetraces-anon): the same with `chat_id`,
  `parent_chat_id`, `type` and `turn`, its `timestamp` in seconds, 16 tokens for each id;
* kvtier's own (docs/formats/trace.md), with a line of its own in front.
"""

import contextlib
import gzip
import io
import json
import logging
import os
import reprlib
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvtier.errors import ClosedError, ConfigError

VERSION = 1
_FIRST_KEY = "kvtier_trace"
_MAX_ID = 2**63
_MAX_TIME_US = 2**62
_LINES_BETWEEN = 1024  # of progress
_NEW_KEYS = 1 << 16  # of a TraceRecorder, until they are sorted in
_WHOLE_RUN = 1_000_000  # keys; a run that has as many is merged with no other
_MOST_KEYS = 100_000_000  # as many as a simulation has blocks

_log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their times.

    Attributes:
        name: What it is called in tables: the file's name.
        format: "mooncake", "qwen-bailian" or "kvtier".
        block_tokens: Tokens of a block.
        blocks: uint32 [references]: block numbers, dense from 0, of one request after the other, each head
            first. Equal numbers are equal content with an equal prefix before it.
        begins: uint64 [requests + 1]: where each request's blocks begin, and the end.
        at_us: int64 [requests]: microseconds since the first request.
        input_tokens: int64 [requests]: length of each prompt.
        output_tokens: int64 [requests]: tokens generated; 0 where the trace does not say.
    """

    name: str
    format: str
    block_tokens: int
    blocks: npt.NDArray[np.uint32]
    begins: npt.NDArray[np.uint64]
    at_us: npt.NDArray[np.int64]
    input_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]

    @property
    def num_requests(self) -> int:
        """How many requests there are."""
        return len(self.at_us)

    @property
    def num_blocks(self) -> int:
        """How many different blocks there are."""
        return int(self.blocks.max()) + 1 if len(self.blocks) else 0

    @property
    def seconds(self) -> float:
        """From the first request to the last."""
        return float(self.at_us[-1] - self.at_us[0]) / 1e6 if self.num_requests else 0.0

    def first(self, num_requests: int) -> "Trace":
        """The trace of the first requests only, or the whole if there are no more."""
        n = min(num_requests, self.num_requests)
        end = int(self.begins[n])
        _, blocks = np.unique(self.blocks[:end], return_inverse=True)  # dense again
        return Trace(
            self.name,
            self.format,
            self.block_tokens,
            blocks.astype(np.uint32),
            self.begins[: n + 1].copy(),
            self.at_us[:n].copy(),
            self.input_tokens[:n].copy(),
            self.output_tokens[:n].copy(),
        )

    def request(self, number: int) -> npt.NDArray[np.uint32]:
        """The blocks of one request, head first."""
        return self.blocks[int(self.begins[number]) : int(self.begins[number + 1])]


def load_trace(
    path: str | os.PathLike[str], *, block_tokens: int | None = None, progress: Progress | None = None
) -> Trace:
    """Reads a trace. A file whose name ends in .gz is decompressed.

    Args:
        path: JSON, one object a line.
        block_tokens: Tokens for each id; None for what the format has.
        progress: Told from time to time, 0 of 0 where a pipe is read; what it raises ends the reading.

    Raises:
        ConfigError: A line is not what the format wants; the message names file, line and what is wrong.
        OSError: The file cannot be read.
    """
    reader = _Reader(Path(path), block_tokens)
    size = Path(path).stat().st_size
    with Path(path).open("rb") as raw:
        seekable = raw.seekable()
        for number, line in enumerate(_lines(raw, Path(path)), 1):
            reader.line(number, line)
            if progress is not None and number % _LINES_BETWEEN == 0:
                progress(min(raw.tell(), size) if seekable else 0, size)
    return reader.trace()


def make_trace(
    requests: Iterator[tuple[float, list[int]]] | list[tuple[float, list[int]]],
    *,
    block_tokens: int = 16,
    name: str = "made",
) -> Trace:
    """Makes a trace of (seconds, ids) for each request, for tests and generators."""
    reader = _Reader(Path(name), block_tokens)
    reader.begin("kvtier", block_tokens)
    for seconds, ids in requests:
        reader.add(round(seconds * 1e6), ids, len(ids) * block_tokens, 0)
    return reader.trace()


def _lines(raw: Any, path: Path) -> Iterator[str]:
    stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="strict")
    number = 0
    try:
        for line in text:
            number += 1
            yield line
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path}:{number + 1}: cannot be decoded: {error}") from error
    finally:
        if stream is raw:
            text.detach()


class _Reader:
    """Collects the requests of one file."""

    def __init__(self, path: Path, block_tokens: int | None) -> None:
        if block_tokens is not None and block_tokens < 1:
            raise ConfigError(f"block_tokens is {block_tokens!r}; allowed: at least 1")
        self._path = path
        self._given = block_tokens
        self._format = ""
        self._block_tokens = 0
        self._dense: dict[Any, int] = {}
        self._blocks: list[int] = []
        self._ends: list[int] = []
        self._at_us: list[int] = []
        self._input: list[int] = []
        self._output: list[int] = []
        self._number = 0

    def begin(self, name: str, tokens: int) -> None:
        self._format = name
        self._block_tokens = self._given or tokens

    def line(self, number: int, text: str) -> None:
        self._number = number
        if not text.strip():
            return
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise self._wrong(f"not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise self._wrong("nests too deep; must be an object of numbers and of lists of them") from None
        except ValueError:  # of more digits than Python reads
            raise self._wrong("holds too long a number; must be integers of 64 bits") from None
        if not isinstance(values, dict):
            raise self._wrong(f"is {type(values).__name__}; must be an object")
        if not self._format:
            if _FIRST_KEY in values:
                self._begin_own(values)
                return
            self.begin(*(("qwen-bailian", 16) if "chat_id" in values else ("mooncake", 512)))
        if self._format == "kvtier":
            ids = self._ids(values, "blocks")
            at_us = self._integer(values, "at_us")
        else:
            ids = self._ids(values, "hash_ids")
            at_us = self._timestamp_us(values)
        tokens = self._integer(values, "input_length", len(ids) * self._block_tokens)
        self.add(at_us, ids, tokens, self._integer(values, "output_length", 0))

    def add(self, at_us: int, ids: list[int], input_tokens: int, output_tokens: int) -> None:
        dense = self._dense
        names: list[Any] = ids
        if len(set(ids)) < len(ids):  # equal content with another prefix, so another block
            names = _told_apart(ids)
        self._blocks += [dense.setdefault(each, len(dense)) for each in names]
        self._ends.append(len(self._blocks))
        self._at_us.append(at_us)
        self._input.append(input_tokens)
        self._output.append(output_tokens)

    def trace(self) -> Trace:
        if not self._at_us:
            raise ConfigError(f"{self._path}: has no request")
        at_us = np.array(self._at_us, np.int64)
        begins = np.concatenate([[0], np.array(self._ends, np.uint64)]).astype(np.uint64)
        blocks = np.array(self._blocks, np.uint32)
        inputs, outputs = np.array(self._input, np.int64), np.array(self._output, np.int64)
        if np.any(np.diff(at_us) < 0):  # as logs of several writers are
            order = np.argsort(at_us, kind="stable")
            pieces = [blocks[int(begins[r]) : int(begins[r + 1])] for r in order]
            blocks = np.concatenate(pieces)
            begins = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.uint64)
            at_us, inputs, outputs = at_us[order], inputs[order], outputs[order]
        return Trace(
            self._path.name,
            self._format,
            self._block_tokens,
            blocks,
            begins,
            at_us - at_us[0],
            inputs,
            outputs,
        )

    def _begin_own(self, values: Mapping[str, Any]) -> None:
        if values[_FIRST_KEY] != VERSION:
            raise self._wrong(f"{_FIRST_KEY} is {_short(values[_FIRST_KEY])}; this kvtier reads {VERSION}")
        tokens = self._integer(values, "block_tokens")
        if tokens < 1:
            raise self._wrong(f"block_tokens is {tokens}; must be at least 1")
        self.begin("kvtier", tokens)

    def _timestamp_us(self, values: Mapping[str, Any]) -> int:
        value = values.get("timestamp")
        each_us = 10**6 if self._format == "qwen-bailian" else 10**3
        below = _MAX_TIME_US // each_us
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
            raise self._wrong(
                f"timestamp is {_short(value)}; must be a number of at least 0 and less than {below}"
            )
        return round(value * each_us)

    def _ids(self, values: Mapping[str, Any], key: str) -> list[int]:
        ids = values.get(key)
        if not isinstance(ids, list):
            raise self._wrong(f"{key} is {_short(ids)}; must be a list of integers")
        for each in ids:
            if type(each) is not int or not -_MAX_ID <= each < _MAX_ID:
                raise self._wrong(f"{key} holds {_short(each)}; must be integers of 64 bits")
        return ids

    def _integer(self, values: Mapping[str, Any], key: str, default: int | None = None) -> int:
        value = values.get(key, default)
        if type(value) is not int or not 0 <= value < 2**62:
            raise self._wrong(f"{key} is {_short(value)}; must be an integer of at least 0")
        return value

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self._path}:{self._number}: {what}")


def _told_apart(ids: list[int]) -> list[Any]:
    seen: Counter[int] = Counter()
    names: list[Any] = []
    for each in ids:
        names.append((each, seen[each]) if seen[each] else each)
        seen[each] += 1
    return names


def _short(value: object) -> str:
    text = reprlib.repr(value)  # never deep
    return text if len(text) <= 60 else text[:57] + "..."


class TraceRecorder:
    """Writes down what an engine is asked for: a request for each lookup(), without tokens or contents.

    Keys become small numbers in the order in which they are first seen; nothing leads back to them, and no
    namespace is written. A lookup that repeats the one before it (a server asks again while a request waits)
    is the same request. It remembers 12 bytes for each key seen, up to 30 while new ones are sorted in,
    and 8 MiB besides.

    A file that can no longer be written (a full drive) ends with its last whole request, and so does one with
    100,000,000 keys. That is logged once, and harms no lookup.

    Threads: any. A call waits for the file, as write() does. In a forked child nothing is written: request()
    raises ClosedError, and close() does nothing.

    Attributes:
        problem: Why it stopped before close(); empty if it did not.

    Args:
        path: Where to write; a file that is there is replaced.
        block_tokens: Tokens of a block.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], block_tokens: int) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._numbers = _Numbers()
        self._last = b""
        self._begun = time.monotonic_ns()
        self.problem = ""
        self._path = os.fspath(path)
        try:
            self._out = _WholeLines(path)
            try:
                self._writer = TraceWriter(self._out, block_tokens)
            except OSError:
                self._out.close()
                raise
        except OSError as error:
            raise ConfigError(f"trace is {self._path!r}: cannot be written: {error}") from error

    def request(self, keys: npt.NDArray[np.uint8], *, may_repeat: bool = True) -> None:
        """Adds a request for keys [n, 32]; where it may be one told again, not if it equals the last.

        Raises:
            ClosedError: This is a forked child.
        """
        if os.getpid() != self._process:  # before the lock: a thread of the parent may hold it for ever
            raise ClosedError("the trace belongs to the parent of this forked process")
        data = keys.tobytes()
        if not data:
            return
        with self._lock:
            if (may_repeat and data == self._last) or self._out.closed:
                return
            self._last = data
            each = keys.shape[1]
            ids = self._numbers.of([hash(data[i : i + each]) for i in range(0, len(data), each)])
            if self._numbers.count > _MOST_KEYS:
                self._stop(f"has {_MOST_KEYS} different keys")
                return
            try:
                self._writer.request((time.monotonic_ns() - self._begun) // 1000, ids)
            except OSError as error:
                self._stop(error.strerror or str(error))

    def close(self) -> None:
        """Ends the file; what is looked up later is not written. Idempotent."""
        if os.getpid() != self._process:
            return
        with self._lock:
            try:
                self._out.close()
            except OSError as error:
                self._stop(error.strerror or str(error))

    def _stop(self, why: str) -> None:
        self.problem = f"{self._path}: {why}"
        _log.warning("the trace ends here: %s", self.problem)
        with contextlib.suppress(OSError):
            self._out.close()
        self._numbers = _Numbers()


class _Numbers:
    """Numbers of 64-bit hashes in the order in which they are first seen; equal hashes are one key.

    Of 100 million keys two have the same hash with a chance of 1 in 3,700, and are then one block.

    The last ones are in a dict, which takes some hundred bytes each; the others in sorted runs, of 12. Runs
    are merged until they have a million, which takes a tenth of a second: whoever looks up waits for it.
    """

    def __init__(self) -> None:
        self.count = 0
        self._new: dict[int, int] = {}
        self._runs: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]] = []

    def of(self, hashes: list[int]) -> list[int]:
        """The number of each."""
        known = self._find([each for each in hashes if each not in self._new])
        numbers = []
        for each in hashes:
            number = self._new.get(each)
            if number is None:
                number = known.get(each)
            if number is None:
                number = self._new[each] = self.count
                self.count += 1
            numbers.append(number)
        if len(self._new) >= _NEW_KEYS:
            self._sort_in()
        return numbers

    def _find(self, hashes: list[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        if not hashes or not self._runs:
            return found
        wanted = np.sort(np.array(hashes, np.int64))  # so that a run is gone through in one direction
        for run, numbers in self._runs:
            at = np.minimum(np.searchsorted(run, wanted), len(run) - 1)
            there = run[at] == wanted
            found.update(zip(wanted[there].tolist(), numbers[at[there]].tolist(), strict=True))
        return found

    def _sort_in(self) -> None:
        run = np.fromiter(self._new, np.int64, len(self._new))
        numbers = np.fromiter(self._new.values(), np.uint32, len(self._new))
        self._new = {}
        order = np.argsort(run)
        run, numbers = run[order], numbers[order]
        while self._runs and len(self._runs[-1][0]) < min(4 * len(run), _WHOLE_RUN):
            longer, its_numbers = self._runs.pop()
            at = np.searchsorted(longer, run)
            run, numbers = np.insert(longer, at, run), np.insert(its_numbers, at, numbers)
        self._runs.append((run, numbers))


class _WholeLines:
    """A file of whole lines: each is written at once, and what is written of half a line is taken back.

    Not a text file of Python's, whose buffers still hold what a full drive refused and write it later.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115 - until close()
        self._bytes = 0

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, text: str) -> int:
        left = data = text.encode()
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):  # a pipe
                self._file.truncate(self._bytes)
            raise
        self._bytes += len(data)
        return len(text)

    def close(self) -> None:
        self._file.close()


class _Writable(Protocol):
    def write(self, text: str, /) -> int: ...


class TraceWriter:
    """Writes kvtier's own format (docs/formats/trace.md).

    Args:
        out: A text file; every request is one line, written at once.
        block_tokens: Tokens of a block.
    """

    def __init__(self, out: _Writable, block_tokens: int) -> None:
        self._out = out
        out.write(json.dumps({_FIRST_KEY: VERSION, "block_tokens": block_tokens}) + "\n")

    def request(self, at_us: int, blocks: list[int], input_tokens: int | None = None) -> None:
        """Adds a request: block numbers, head first."""
        line: dict[str, Any] = {"at_us": at_us, "blocks": blocks}
        if input_tokens is not None:
            line["input_length"] = input_tokens
        self._out.write(json.dumps(line, separators=(",", ":")) + "\n")
