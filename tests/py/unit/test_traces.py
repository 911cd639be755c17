"""Trace files: three formats, and one clear error for what is none of them."""

import contextlib
import dataclasses
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import kvtier
from kvtier import traces
from kvtier.engine import _close_at_exit
from kvtier.errors import ConfigError
from kvtier.traces import TraceRecorder, TraceWriter, load_trace, make_trace

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "traces"


def test_mooncake() -> None:
    trace = load_trace(GOLDEN / "small_mooncake.jsonl")
    assert (trace.format, trace.block_tokens, trace.num_requests, trace.num_blocks) == ("mooncake", 512, 5, 7)
    assert trace.request(1).tolist() == [0, 1, 3, 4]
    assert trace.at_us.tolist() == [0, 1_000_000, 2_000_000, 3_000_000, 4_000_000]
    assert trace.input_tokens.tolist() == [1500, 2000, 900, 1500, 900]
    assert trace.seconds == 4


def test_qwen_bailian_has_seconds_and_blocks_of_16_tokens() -> None:
    trace = load_trace(GOLDEN / "small_qwen_bailian.jsonl")
    assert (trace.format, trace.block_tokens) == ("qwen-bailian", 16)
    assert trace.at_us.tolist() == [0, 1_750_000]
    assert trace.request(1).tolist() == [0, 1, 2, 3]


def test_kvtier_s_own() -> None:
    trace = load_trace(GOLDEN / "small_kvtier.jsonl")
    assert (trace.format, trace.block_tokens) == ("kvtier", 32)
    assert trace.at_us.tolist() == [0, 1000]
    assert trace.input_tokens.tolist() == [90, 96]
    assert trace.output_tokens.tolist() == [0, 0]


def test_the_block_size_is_a_parameter_and_gz_is_read(tmp_path: Path) -> None:
    packed = tmp_path / "trace.jsonl.gz"
    packed.write_bytes(gzip.compress((GOLDEN / "small_mooncake.jsonl").read_bytes()))
    trace = load_trace(packed, block_tokens=256)
    assert trace.block_tokens == 256
    assert trace.num_blocks == 7


@pytest.mark.parametrize("packed", [False, True])
def test_a_pipe_is_read_however_long(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("trace.gz" if packed else "trace")
    os.mkfifo(path)
    data = b"".join(b'{"timestamp": %d, "hash_ids": [%d]}\n' % (n, n) for n in range(3000))
    writer = threading.Thread(target=path.write_bytes, args=(gzip.compress(data) if packed else data,))
    writer.start()
    told: list[tuple[int, int]] = []
    trace = load_trace(path, progress=lambda done, total: told.append((done, total)))
    writer.join()
    assert trace.num_requests == 3000
    assert told == [(0, 0), (0, 0)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    with path.open("w") as out:
        writer = TraceWriter(out, 16)
        writer.request(5, [0, 1], input_tokens=20)
        writer.request(9, [0, 2])
    trace = load_trace(path)
    assert trace.request(1).tolist() == [0, 2]
    assert trace.input_tokens.tolist() == [20, 32]


def test_requests_out_of_order_are_sorted_by_time() -> None:
    trace = make_trace([(2.0, [5]), (1.0, [6, 7]), (1.0, [8])])
    assert [trace.request(r).tolist() for r in range(3)] == [[1, 2], [3], [0]]
    assert trace.at_us.tolist() == [0, 0, 1_000_000]


def test_an_id_twice_in_a_request_is_two_blocks() -> None:
    trace = make_trace([(0, [5, 6, 5]), (1, [5, 6, 5])])
    assert trace.request(0).tolist() == trace.request(1).tolist() == [0, 1, 2]


def test_the_first_requests_are_a_trace_of_their_own() -> None:
    trace = make_trace([(0, [5, 6]), (1, [5, 7]), (2, [8])])
    assert trace.first(2).num_requests == 2
    assert trace.first(2).request(1).tolist() == [0, 2]
    assert trace.first(9).num_requests == 3


GOOD = '{"timestamp": 0, "hash_ids": [1]}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{"], r"bad.jsonl:2: not JSON: .* at column 2"),
        ([GOOD, "", "[1]"], r"bad.jsonl:3: is list; must be an object"),
        (['{"timestamp": 0}'], r"bad.jsonl:1: hash_ids is None; must be a list of integers"),
        (
            ['{"timestamp": 0, "hash_ids": [1, true]}'],
            r":1: hash_ids holds True; must be integers of 64 bits",
        ),
        (['{"timestamp": 0, "hash_ids": [1.5]}'], r":1: hash_ids holds 1.5"),
        (['{"timestamp": "now", "hash_ids": [1]}'], r":1: timestamp is 'now'; must be a number"),
        (['{"timestamp": 0, "hash_ids": [1], "input_length": -4}'], r":1: input_length is -4; must be"),
        (["[" * 100_000], r":1: nests too deep; must be an object of numbers and of lists"),
        (
            ['{"timestamp": 0, "hash_ids": ' + "[" * 900 + "]" * 900 + "}"],
            r":1: (nests too deep; must|hash_ids holds \[+\.\.\.\]+; must)",
        ),
        (
            ['{"timestamp": 0, "hash_ids": [' + "1" * 5000 + "]}"],
            r":1: holds too long a number; must be integers of 64 bits",
        ),
        (
            ['{"timestamp": 9.5e12, "chat_id": 1, "hash_ids": [1]}'],
            r":1: timestamp is 9500000000000.0; must be a number of at least 0 and less than 4611686018427$",
        ),
        (['{"timestamp": 9.5e15, "hash_ids": [1]}'], r"at least 0 and less than 4611686018427387$"),
        (['{"timestamp": Infinity, "hash_ids": [1]}'], r":1: timestamp is inf; must be a number"),
        (['{"timestamp": NaN, "hash_ids": [1]}'], r":1: timestamp is nan; must be a number"),
        (['{"kvtier_trace": 9, "block_tokens": 16}'], r":1: kvtier_trace is 9; this kvtier reads 1"),
        (['{"kvtier_trace": 1}'], r":1: block_tokens is None; must be an integer"),
        (['{"kvtier_trace": 1, "block_tokens": 16}', '{"at_us": 1}'], r":2: blocks is None"),
        ([], r"bad.jsonl: has no request"),
    ],
)
def test_a_bad_line_is_one_error_with_file_and_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=message):
        load_trace(path)


def test_bytes_that_are_no_text_are_an_error_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"bad.jsonl:\d+: cannot be decoded"):
        load_trace(path)


def test_a_damaged_gz_is_an_error_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl.gz"
    whole = bytearray(gzip.compress(f"{GOOD}\n".encode() * 500))
    for at in range(10, len(whole) - 8):  # the deflated bytes
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(ConfigError, match=r"bad.jsonl.gz:\d+: "):
            load_trace(path)


def test_the_largest_times_are_read() -> None:
    trace = make_trace([(0, [1]), (2**62 / 1e6, [1])])
    assert trace.at_us[1] == 2**62


def test_an_engine_records_what_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "recorded.jsonl"
    layout = kvtier.KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="uint8", page_tokens=16)
    config = kvtier.Config(groups=[layout], host="1MiB", model="m@1", block_tokens=16, trace=str(path))
    one = kvtier.block_keys(np.arange(48), config, namespace="tenant-a")
    two = kvtier.block_keys(np.r_[np.arange(32), np.zeros(16, int)], config, namespace="tenant-a")
    with kvtier.open(config) as engine:
        engine.lookup(one)
        engine.lookup(one)  # asked again while it waits
        engine.lookup(two)
        engine.lookup(one)
    trace = load_trace(path)
    assert trace.block_tokens == 16
    assert [trace.request(r).tolist() for r in range(3)] == [[0, 1, 2], [0, 1, 3], [0, 1, 2]]
    assert "tenant-a" not in path.read_text()
    for key in (*one, *two):
        assert bytes(key).hex() not in path.read_text()
    with pytest.raises(ConfigError, match="trace is '/nowhere/x': cannot be written"):
        kvtier.open(dataclasses.replace(config, trace="/nowhere/x"))


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Sets how long files may get: what a full drive does, but to this process alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_drive_ends_the_trace_and_nothing_else(
    tmp_path: Path, small_files: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "recorded.jsonl"
    layout = kvtier.KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="uint8", page_tokens=16)
    config = kvtier.Config(groups=[layout], host="1MiB", model="m@1", block_tokens=16, trace=str(path))
    engine = kvtier.open(config)
    recorder = engine._recorder
    assert recorder is not None
    small_files(400)
    for i in range(20):
        engine.lookup(kvtier.block_keys(np.arange(i, i + 160), config))
    small_files(resource.RLIM_INFINITY)  # there is room again: too late, a gap would be a lie
    engine.lookup(kvtier.block_keys(np.arange(900, 1060), config))
    engine.close()
    assert recorder.problem == f"{path}: File too large"
    assert [record.getMessage() for record in caplog.records] == [f"the trace ends here: {recorder.problem}"]
    assert path.read_bytes().endswith(b"]}\n")  # no half line
    trace = load_trace(path)
    assert 2 < trace.num_requests < 20
    assert all(len(trace.request(r)) == 10 for r in range(trace.num_requests))


def test_a_file_that_fails_as_it_is_closed_harms_no_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = TraceRecorder(tmp_path / "recorded.jsonl", 16)
    with monkeypatch.context() as patch:
        patch.setattr(recorder._out, "close", lambda: os.open("/nowhere/x", 0))
        recorder.close()
    assert "No such file" in recorder.problem
    recorder.close()


def test_a_forked_child_neither_waits_for_the_trace_nor_writes_to_it(tmp_path: Path) -> None:
    # In a process of its own: pytest has threads, and fork() is not for programs that have.
    path = tmp_path / "recorded.jsonl"
    program = f"""
import functools, os, signal, sys, threading, warnings
import kvtier
warnings.simplefilter("ignore", DeprecationWarning)
layout = kvtier.KVLayout(1, 1, 8, "uint8", 16)
config = kvtier.Config(groups=[layout], host="1MiB", model="m@1", trace={str(path)!r})
engine = kvtier.open(config)
engine.lookup(kvtier.block_keys(range(16), config))
size = os.path.getsize({str(path)!r})
taken, over = threading.Event(), threading.Event()
def hold():
    with engine._recorder._lock:
        taken.set()
        over.wait()
thread = threading.Thread(target=hold)
thread.start()
taken.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    keys = kvtier.block_keys(range(32), config)
    request = functools.partial(engine._recorder.request, may_repeat=True)
    for call in (engine.lookup, engine.record, request):
        try:
            call(keys)
        except kvtier.ClosedError:
            continue
        os._exit(1)
    sys.exit(0)  # with all that Python does at exit
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
same = os.path.getsize({str(path)!r}) == size
over.set()
thread.join()
engine.lookup(kvtier.block_keys(range(48), config))
engine.close()
print(status, same)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("0 True", 0), done.stderr
    assert load_trace(path).num_requests == 2


def random_keys(num_keys: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(num_keys).integers(0, 256, (num_keys, 32), np.uint8)


def test_a_recorder_takes_the_memory_that_it_says(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path / "recorded.jsonl", 16)
    keys = random_keys(200_000)
    tracemalloc.start()
    try:
        for begin in range(0, len(keys), 1000):
            recorder.request(keys[begin : begin + 1000], may_repeat=True)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        recorder.close()
    assert held < 12 * len(keys) + (8 << 20)
    assert peak < 30 * len(keys) + (8 << 20)


def test_a_key_keeps_its_number_however_many_come_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "_NEW_KEYS", 64)
    path = tmp_path / "recorded.jsonl"
    recorder = TraceRecorder(path, 16)
    keys = random_keys(3000)
    rng = np.random.default_rng(7)
    asked = [rng.integers(0, high, 40) for high in range(10, 3000, 5)]
    for each in asked:
        recorder.request(keys[each], may_repeat=True)
    assert len(recorder._numbers._runs) > 1
    recorder.close()
    numbers: dict[int, int] = {}
    lines = path.read_text().splitlines()[1:]
    for each, line in zip(asked, lines, strict=True):
        assert json.loads(line)["blocks"] == [numbers.setdefault(int(k), len(numbers)) for k in each]


def test_too_many_keys_end_the_trace_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(traces, "_MOST_KEYS", 10)
    path = tmp_path / "recorded.jsonl"
    recorder = TraceRecorder(path, 16)
    keys = random_keys(12)
    for begin in (0, 5, 7, 0):
        recorder.request(keys[begin : begin + 5], may_repeat=True)
    recorder.close()
    assert recorder.problem == f"{path}: has 10 different keys"
    assert [record.getMessage() for record in caplog.records] == [f"the trace ends here: {recorder.problem}"]
    assert load_trace(path).num_requests == 2
    assert recorder._numbers.count == 0


def test_a_trace_that_cannot_take_its_first_line_is_refused() -> None:
    layout = kvtier.KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="uint8", page_tokens=16)
    config = kvtier.Config(groups=[layout], host="1MiB", model="m@1", block_tokens=16, trace="/dev/full")
    with pytest.raises(ConfigError, match=r"trace is '/dev/full': cannot be written: .*No space left"):
        kvtier.open(config)


def test_at_exit_every_engine_is_closed_whatever_one_of_them_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        def __init__(self, error: BaseException) -> None:
            self.error = error
            self.closed = False

        def close(self, timeout: float) -> None:
            self.closed = True
            raise self.error

    errors = (kvtier.TimeoutError("x"), OSError(28, "full"), KeyboardInterrupt(), kvtier.TimeoutError("y"))
    for order in (errors, errors[::-1]):
        engines = [Stub(error) for error in order]
        monkeypatch.setattr("kvtier.engine._open_engines", engines)
        with contextlib.suppress(OSError, KeyboardInterrupt):
            _close_at_exit()
        assert all(engine.closed for engine in engines)
    engines = [Stub(errors[0]), Stub(errors[3])]
    monkeypatch.setattr("kvtier.engine._open_engines", engines)
    _close_at_exit()  # these say only that there was no time
