"""Trace files: three formats, and one clear error for what is none of them."""

import dataclasses
import gzip
from pathlib import Path

import numpy as np
import pytest

import kvtier
from kvtier.errors import ConfigError
from kvtier.traces import TraceWriter, load_trace, make_trace

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
