"""`kvtier bench ttft`: plan and fit by hand; the command with a model so small that it only proves."""

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtier.cli import bench, bench_ttft, bench_ttft_plot, bench_ttft_table, main
from kvtier.cli.bench_ttft_plan import (
    FP8,
    SUFFIX_TOKENS,
    Fit,
    Room,
    block_tokens_for,
    calibration_chunk,
    default_lengths,
    fit,
    held_out,
    place,
    schedule,
    weight_bytes,
)
from kvtier.cli.results import Result, measured, problems
from kvtier.cli.shapes import SHAPES
from kvtier.errors import ConfigError

QWEN, LLAMA, TINY = SHAPES["qwen2.5-7b-1m"], SHAPES["llama-3.1-8b"], SHAPES["tiny"]
GPU_LENGTHS = [1 << n for n in range(10, 21)]
BIG = Room(device=None, host=1 << 50, disk=1 << 50)
GIB = 1 << 30


def gpu(gigabytes: float) -> Room:
    return Room(device=int(0.93 * gigabytes * 1e9), host=1 << 50, disk=1 << 50)


# --- what fits ----------------------------------------------------------------------------------------------


def test_a_million_tokens_fit_80_gb_layer_by_layer_and_141_gb_as_they_are() -> None:
    small = place(QWEN, [1 << 20], gpu(80), dtype="bfloat16", chunk=8192)
    assert small.lengths == (1 << 20,)
    assert (small.own_weights, small.kv_dtype) == (False, "bfloat16")
    large = place(QWEN, [1 << 20], gpu(141), dtype="bfloat16", chunk=8192)
    assert (large.lengths, large.own_weights, large.kv_dtype) == ((1 << 20,), True, "bfloat16")


def test_8_bits_are_taken_where_only_they_fit_a_gpu() -> None:
    layer = place(QWEN, [1 << 20], gpu(48), dtype="bfloat16", chunk=8192)
    assert (layer.lengths, layer.kv_dtype) == ((1 << 20,), FP8)
    as_told = place(QWEN, [1 << 20], gpu(48), dtype="bfloat16", kv_dtype="bfloat16", chunk=8192)
    assert as_told.lengths == ()
    assert "GB of device memory" in as_told.left_out[1 << 20]


def lent(gigabytes: float) -> Room:
    """A GPU in a machine with 128 GiB of memory and a drive of 64 GiB."""
    return Room(int(0.93 * gigabytes * 1e9), int(0.85 * 128 * GIB), int(0.95 * 64 * GIB))


@pytest.mark.parametrize("gigabytes", [80, 141])
def test_an_8b_is_run_as_it_is_at_every_length_on_a_gpu(gigabytes: float) -> None:
    lengths = default_lengths(LLAMA, GPU_LENGTHS)
    assert lengths[-1] == 128 << 10
    layer = place(LLAMA, lengths, lent(gigabytes), dtype="bfloat16", chunk=8192)
    assert layer.lengths == tuple(lengths)
    assert (layer.kv_dtype, layer.own_weights) == ("bfloat16", True)


def test_a_million_tokens_are_run_beside_a_drive_of_64_gib() -> None:
    lengths = default_lengths(QWEN, GPU_LENGTHS)
    assert lengths[-1] == 1 << 20
    small = place(QWEN, lengths, lent(80), dtype="bfloat16", chunk=8192)
    assert small.lengths == tuple(lengths)
    assert small.kv_dtype == FP8 or not small.own_weights
    large = place(QWEN, lengths, lent(141), dtype="bfloat16", chunk=8192)
    assert large.lengths == tuple(lengths)
    assert (large.kv_dtype, large.own_weights) == ("bfloat16", True)


def test_a_small_drive_makes_no_8_bits() -> None:
    lengths = default_lengths(QWEN, GPU_LENGTHS)
    room = Room(int(0.93 * 141e9), 1 << 50, 40 * GIB)
    layer = place(QWEN, lengths, room, dtype="bfloat16", chunk=8192)
    assert (layer.kv_dtype, layer.lengths) == ("bfloat16", tuple(lengths[:-1]))
    assert "GB of disk" in layer.left_out[1 << 20]


def test_default_lengths_end_where_the_model_does() -> None:
    assert default_lengths(replace(TINY, max_tokens=4096), GPU_LENGTHS) == [1024, 2048, 4096]
    assert default_lengths(replace(TINY, max_tokens=512), GPU_LENGTHS) == [1024]
    for unknown in (0, 1):
        assert default_lengths(replace(TINY, max_tokens=unknown), GPU_LENGTHS) == GPU_LENGTHS


def test_what_does_not_fit_is_left_out_with_its_reason() -> None:
    kv_bytes = 8192 * QWEN.kv_bytes_per_token()
    weights = weight_bytes(QWEN, "bfloat16", own=False)
    room = Room(device=None, host=weights + 6 * kv_bytes, disk=1 << 50)
    layer = place(QWEN, [8192, 131072], room, dtype="bfloat16", chunk=512)
    assert (layer.lengths, layer.own_weights) == ((8192,), False)
    assert "GB of host memory" in layer.left_out[131072]
    no_disk = place(QWEN, [8192], Room(None, 1 << 50, 1 << 20), dtype="bfloat16", chunk=512)
    assert no_disk.lengths == ()
    assert "GB of disk" in no_disk.left_out[8192]


def test_blocks_have_2_mib_or_256_tokens() -> None:
    blocks = {name: block_tokens_for(SHAPES[name], "bfloat16") for name in SHAPES}
    assert blocks == {
        "100m": 256,
        "llama-3.1-8b": 16,
        "llama-3.1-70b-tp8": 64,
        "qwen2.5-7b-1m": 64,
        "deepseek-v3": 32,
        "tiny": 256,
        "tiny-mla": 256,
    }
    with pytest.raises(
        ConfigError, match=r"--tokens \[1000\]: allowed: multiples of the block of 256 tokens"
    ):
        place(TINY, [1000, 1024], BIG, dtype="float32", chunk=128)


# --- how long it takes --------------------------------------------------------------------------------------


def test_the_fit_finds_the_rates_that_made_the_times() -> None:
    true = Fit(TINY, linear=2e-11, attention=5e-12)
    points = {(n, p): true.seconds(n, p) for n, p in ((512, 0), (512, 4096), (8192, 0))}
    found = fit(TINY, points)
    assert found.linear == pytest.approx(true.linear)
    assert found.attention == pytest.approx(true.attention)
    prefills = {n: true.seconds(n) for n in (1024, 2048, 4096)}
    assert found.error(prefills) == pytest.approx(0, abs=1e-9)
    assert held_out(TINY, prefills) == pytest.approx(0, abs=1e-9)
    assert held_out(TINY, {1024: 1.0, 2048: 2.0}) is None


def test_rates_are_never_negative() -> None:
    found = fit(TINY, {(1024, 0): 1.0, (65536, 0): 2.0})  # longer than linear: no attention at all
    assert found.linear >= 0
    assert found.attention >= 0
    one = fit(TINY, {(1024, 0): 1.0})
    assert one.seconds(1024) == pytest.approx(1.0)


def test_the_time_is_divided() -> None:
    model = Fit(SHAPES["100m"], linear=1 / 400e9, attention=1 / 120e9)
    lengths = [1 << n for n in range(10, 18)]
    plan = schedule(lengths, model, rounds=5, minutes=10)
    assert plan.recomputed == tuple(lengths[: len(plan.recomputed)])
    assert model.seconds(plan.recomputed[-1]) <= 0.35 * 600 < model.seconds(2 * plan.recomputed[-1])
    assert set(plan.repeated) < set(plan.recomputed)
    assert list(plan.rounds) == lengths
    assert all(3 <= rounds <= 5 for rounds in plan.rounds.values())
    assert plan.seconds <= 600
    short = schedule(lengths, model, rounds=5, minutes=1)  # the longest are left out, not the others
    assert list(short.rounds) == lengths[: len(short.rounds)]
    assert 3 <= len(short.rounds) < len(lengths)


def test_of_a_slow_model_the_shortest_length_is_run_as_far_as_it_can_be() -> None:
    shape = SHAPES["llama-3.1-8b"]
    cpu = Fit(shape, linear=1 / 100e9, attention=1 / 100e9)
    seconds = cpu.seconds(1024)
    plan = schedule([1024, 2048], cpu, rounds=5, minutes=seconds / 60)  # nothing else fits
    assert plan.recomputed == (1024,)
    assert plan.rounds == {1024: 1}
    plan = schedule([1024, 2048], cpu, rounds=5, minutes=0.9 * seconds / 60)  # from what the calibration said
    assert plan.recomputed == plan.repeated == ()
    assert plan.rounds == {1024: 1}
    plan = schedule([1024, 2048], cpu, rounds=5, minutes=0.01)  # not even the suffix
    assert (plan.recomputed, plan.rounds) == ((), {})


def test_a_slow_model_is_calibrated_with_a_part_of_a_chunk() -> None:
    assert calibration_chunk(512, 32, seconds=0.01, minutes=3) == 512
    part = calibration_chunk(512, 32, seconds=2, minutes=3)
    assert 16 <= part < 512
    assert 6 * 2 * max(1, part / 32) <= 0.1 * 180
    assert calibration_chunk(512, 32, seconds=1000, minutes=3) == 16


# --- the command --------------------------------------------------------------------------------------------

ARGV = [
    "bench",
    "ttft",
    "--tokens",
    "256",
    "512",
    "1024",
    "--chunk",
    "128",
    "--rounds",
    "2",
    "--minutes",
    "0.5",
]


def results(document: Any) -> dict[str, dict[str, Any]]:
    return {r["name"]: r for r in document["results"]}


@pytest.mark.parametrize(("shape", "kv_dtype"), [("tiny", "bfloat16"), ("tiny-mla", FP8)])
def test_bench_ttft(shape: str, kv_dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    path, png = tmp_path / "out.json", tmp_path / "out.png"
    more = ["--shape", shape, "--kv-dtype", kv_dtype, "--dtype", "bfloat16", "--dir", str(tmp_path)]
    status = main([*ARGV, *more, "--plot", str(png), "--json", str(path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    document = json.loads(path.read_text())
    assert problems(document) == []
    found = results(document)
    for tokens in (256, 512, 1024):
        tiers = {name.split("/")[-1] for name in found if name.startswith(f"ttft/{shape}/{tokens}/")}
        assert tiers == {"recompute", "device", "host", "disk", "disk_restarted"}
        host = found[f"ttft/{shape}/{tokens}/host"]
        assert 0 < host["limit"] < host["value"]
        assert found[f"restore/{shape}/{tokens}/disk"]["unit"] == "GB/s"
        over = found[f"overhead/{shape}/{tokens}/host"]["value"]
        assert 0 < over < 1e3 * host["max"]
        kv_bytes = tokens * SHAPES[shape].kv_bytes_per_token(kv_dtype)
        assert found[f"kv_bytes/{shape}/{tokens}"]["value"] == kv_bytes
    assert found[f"reopen/{shape}"]["n"] >= 3
    wanted = {
        "recompute_repeats",
        "saved_whole_prefix",
        "control_differs",
        "killed_and_restored",
        "measured",
        "completed",
    }
    wanted |= {f"logits_{tier}" for tier in ("device", "host", "disk", "disk_restarted")}
    assert document["checks"] == dict.fromkeys(wanted, True)
    assert document["machine"]["ttft"][shape]["fit"]["largest_error"] >= 0
    assert "file_system" in document["machine"]["drive"]
    assert "repetitions" in document["machine"]["method"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"out.json", "out.png"}  # nothing else is left


# What one of its processes does wrong, as a module that runs in its place; and what must have no figure.
LIFE = """import sys
from kvtier.cli import bench_ttft_life as life
{}
life.main(*sys.argv[1:])
"""
DAMAGED_RESTORE = """
right = life.World.first_token
def first_token(self, tokens, samples, restore=None):
    def damaged():
        restore()
        self.decoder.damage(0, self.layer.block_tokens)
    return right(self, tokens, samples, restore and damaged)
life.World.first_token = first_token
"""
OTHER_RECOMPUTE = """
right, calls = life.World.first_token, []
def first_token(self, tokens, samples, restore=None):
    calls.append(tokens)
    return right(self, tokens, samples, restore) + (len(calls) == 1)
life.World.first_token = first_token
"""
BLIND_CONTROL = "life.Decoder.damage = lambda *arguments: None"
RESTORED = {"host", "disk", "disk_restarted"}


@pytest.mark.parametrize(
    ("wrong", "failed", "left"),
    [
        (DAMAGED_RESTORE, {f"logits_{tier}" for tier in RESTORED}, {"recompute"}),
        (OTHER_RECOMPUTE, {"recompute_repeats"}, set()),
        (BLIND_CONTROL, {"control_differs"}, set()),
    ],
    ids=["damaged-restore", "other-recompute", "blind-control"],
)
def test_what_failed_its_check_has_no_figure(
    wrong: str,
    failed: set[str],
    left: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "wrong_life.py").write_text(LIFE.format(wrong))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(bench_ttft, "_LIFE", "wrong_life")
    path = tmp_path / "out.json"
    more = ["--shape", "tiny", "--dtype", "float32", "--dir", str(tmp_path), "--json", str(path)]
    assert main([*ARGV, *more]) == 1
    document = json.loads(path.read_text())
    assert problems(document) == []
    assert failed <= {name for name, passed in document["checks"].items() if not passed}
    found = results(document)
    assert {name.split("/")[-1] for name in found if name.startswith("ttft/")} == left
    for kind in ("restore", "overhead", "speedup", "energy"):
        tiers = {name.split("/")[-1] for name in found if name.startswith(f"{kind}/")}
        assert tiers <= left
    assert "reopen/tiny" not in found
    if not left:
        assert not any(name.startswith(("break_even/", "kv_bytes/")) for name in found)
        assert "no figures, " in capsys.readouterr().out


def test_lengths_that_take_too_long_are_extrapolated_and_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "out.json"
    # So little time that not even 1,024 tokens fit, but they are the shortest.
    argv = ["bench", "ttft", "--shape", "tiny", "--tokens", "1024", "16384", "--rounds", "1"]
    assert main([*argv, "--minutes", "0.02", "--dir", str(tmp_path), "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    found = results(document)
    assert "extrapolated" not in found["ttft/tiny/1024/recompute"]
    left_out = document["machine"]["ttft"]["tiny"]["left_out"]
    if "16384" in left_out:  # a slow machine
        assert "do not fit the time given" in left_out["16384"]
    elif found["ttft/tiny/16384/recompute"].get("extrapolated"):
        assert found["ttft/tiny/16384/recompute"]["n"] == 0
        assert found["speedup/tiny/16384/host"]["extrapolated"] is True
        assert "~" in capsys.readouterr().out


def test_a_shape_that_is_too_slow_is_left_out_with_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "out.json"
    argv = ["bench", "ttft", "--shape", "tiny", "--tokens", "1024", "--dir", str(tmp_path)]
    assert main([*argv, "--minutes", "0.0001", "--json", str(path)]) == 1
    document = json.loads(path.read_text())
    assert document["results"] == []
    assert document["checks"]["measured"] is False
    assert "do not fit the time given" in document["machine"]["ttft"]["tiny"]["left_out"]["1024"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--minutes", "0"], "--minutes 0.0: must be above 0"),
        (["--chunk", "0"], "--chunk 0: must be at least 1"),
        (["--shape", "gpt-9"], "shape is 'gpt-9'; allowed:"),
        (["--dir", "/nonexistent"], "--dir /nonexistent: must be a directory"),
        (["--plot", "x.txt"], "--plot is 'x.txt'; allowed: a file ending in .png"),
        (["--plot", "/nonexistent/x.png"], "--plot is '/nonexistent/x.png'; there is no such folder"),
        (["--plot", "/tmp"], "--plot is '/tmp'; allowed: a file ending in .png"),
        (["--device", "cuda:7"], "nvidia-smi sees"),
        (["--device", "cuda:x"], "--device is 'cuda:x'; allowed: cpu, cuda or cuda:N"),
        (["--device", "cuda:-1"], "--device is 'cuda:-1'; allowed: cpu, cuda or cuda:N"),
        (["--dtype", "uint8"], "--dtype is 'uint8'; allowed: bfloat16, "),
        (["--kv-dtype", "int32"], "--kv-dtype is 'int32'; allowed: bfloat16, "),
        (["--tokens", "1000"], "--tokens [1000]: allowed: multiples of the block"),
        (["--minutes", "1e300"], "--minutes 1e+300: must be above 0, at most"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_anybody_is_waited_for(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(bench, "alone", lambda out: pytest.fail("waits"))
    assert main(["bench", "ttft", *argv]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 3}, "head_dim is 3; allowed: even numbers"),
        ({"num_key_value_heads": 3}, "3 KV heads for 4 heads; allowed: a divisor"),
    ],
)
def test_a_shape_that_the_decoder_cannot_run_is_one_line(
    change: dict[str, int], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config |= {"intermediate_size": 128, "vocab_size": 256} | change
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(config))
    assert main(["bench", "ttft", "--shape", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_the_same_shape_twice_is_once_and_two_of_one_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    parser = argparse.ArgumentParser()
    bench_ttft.add_arguments(parser)
    args = parser.parse_args(["--shape", "tiny", "tiny-mla", "tiny"])
    bench_ttft.check(args)
    assert args.shape == ["tiny", "tiny-mla"]
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config | {"vocab_size": 256}))
    assert main(["bench", "ttft", "--shape", "tiny", str(path)]) == 1
    assert "allowed: shapes of different names" in capsys.readouterr().err


def test_ctrl_c_leaves_what_was_finished(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path, lock = tmp_path / "out.json", tmp_path / "lock"
    lock.mkdir()
    argv = [sys.executable, "-u", "-m", "kvtier.cli", *ARGV, "--shape", "tiny", "--dir", str(tmp_path)]
    environment = os.environ | {"TMPDIR": str(lock)}  # see conftest.py
    process = subprocess.Popen(
        [*argv, "--json", str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    with process:
        for line in process.stdout or ():
            if "from device, host and disk" in line:
                os.kill(process.pid, signal.SIGINT)
                break
        assert process.stdout is not None
        process.stdout.read()
    assert process.returncode == 130
    document = json.loads(path.read_text())
    assert problems(document) == []
    assert document["checks"]["completed"] is False
    assert "ttft/tiny/1024/recompute" in results(document)
    assert {p.name for p in tmp_path.iterdir()} == {"out.json", "lock"}


# --- the figure and the table of a GPU ----------------------------------------------------------------------

CPU_FACTS: dict[str, Any] = {"cpu": "Some CPU", "cores": 16, "method": {"options": {"device": "cpu"}}}
GPU_FACTS = CPU_FACTS | {
    "gpus": [
        {"name": "NVIDIA First", "driver_version": "1"},
        {"name": "NVIDIA Second", "driver_version": "1"},
    ],
    "method": {"options": {"device": "cuda:1"}},
    "ttft": {"s": {}},
}


def of_a_run(facts: dict[str, Any]) -> dict[str, Any]:
    """A document with one length: 970 MB/s beside 970 MB."""
    rows = [
        Result("kv_bytes/s/1024", 970e6, "B"),
        measured("ttft/s/1024/recompute", [9.0], "s"),
        measured("ttft/s/1024/host", [1.1], "s", [0.97]),
        measured("overhead/s/1024/host", [130.0], "ms"),
    ]
    return {"machine": facts, "results": [row.as_json() for row in rows]}


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (CPU_FACTS, "Some CPU, 16 cores"),
        (CPU_FACTS | {"gpus": GPU_FACTS["gpus"]}, "Some CPU, 16 cores"),
        (GPU_FACTS, "NVIDIA Second"),
        (GPU_FACTS | {"ttft": {"s": {"device": "What torch says"}}}, "What torch says"),
    ],
)
def test_the_figure_names_the_device_that_ran(facts: dict[str, Any], name: str) -> None:
    pytest.importorskip("matplotlib")
    (axes,) = bench_ttft_plot.draw(of_a_run(facts), "s").axes
    assert axes.get_title() == f"s, new suffix of 128 tokens\n{name}"


def test_the_target_of_a_gpu_is_beside_what_is_above_the_limit() -> None:
    header, (row,) = bench_ttft_table.cells(of_a_run(GPU_FACTS), "s")
    at = header.index("over ms")
    assert header[at : at + 2] == ["over ms", "target ms"]
    assert row[at : at + 2] == [
        "130",
        "90",
    ]  # 970 MB / (0.97 x 1 GB/s) + 60 ms is 1060 ms, 970 of it the limit
    header, (row,) = bench_ttft_table.cells(of_a_run(CPU_FACTS), "s")
    assert "target ms" not in header
    assert len(header) == len(row)


# --- the model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["tiny", "tiny-mla"])
def test_a_prefill_in_chunks_is_that_of_the_whole(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import numpy as np
    from torch.nn.attention.bias import causal_lower_right

    from kvtier.cli import bench_ttft_model
    from kvtier.cli.bench_ttft_model import Decoder

    def logits(chunks: list[int], own: bool = True, gpus: bool = False) -> Any:
        model = Decoder(
            SHAPES[shape], 256, device="cpu", dtype="float32", kv_dtype="float32", own_weights=own, seed=3
        )
        if gpus:  # tokens outermost, and torch's own causal bias: what a GPU gets
            model.heads_first = False
            model.buffers = [b if b.dim() == 2 else b.transpose(0, 1).contiguous() for b in model.buffers]
            monkeypatch.setattr(bench_ttft_model, "_bias", lambda n, end, *_: causal_lower_right(n, end))
        ids = np.random.default_rng(5).integers(0, 256, 200, np.int32)
        at = 0
        for n in chunks:
            found = model.prefill(ids[at : at + n], at)
            at += n
        return found

    whole = logits([200])
    assert torch.isfinite(whole).all()
    assert torch.allclose(whole, logits([64, 64, 72]), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits([64, 136]), logits([64, 136]))
    assert not torch.allclose(whole, logits([200], own=False), atol=1e-2)
    assert torch.allclose(whole, logits([64, 136], gpus=True), atol=1e-4, rtol=1e-4)


def test_the_model_is_llamas() -> None:
    """Against transformers' implementation, with our weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import math

    import numpy as np

    from kvtier.cli.bench_ttft_model import _ROPE_BASE, Decoder

    shape = SHAPES["tiny"]
    ours = Decoder(shape, 64, device="cpu", dtype="float32", kv_dtype="float32", own_weights=True, seed=3)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        rms_norm_eps=torch.finfo(torch.float32).eps,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_BASE},
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(ours._vocabulary * math.sqrt(shape.hidden_size))
        theirs.lm_head.weight.copy_(ours._vocabulary)
        for mine, layer in zip(ours._layers, theirs.model.layers, strict=True):
            parts = torch.split(mine["qkv"], [q, kv, kv])
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                getattr(layer.self_attn, name).weight.copy_(part)
            layer.self_attn.o_proj.weight.copy_(mine["out"])
            gate, up = mine["gate_up"].chunk(2)
            layer.mlp.gate_proj.weight.copy_(gate)
            layer.mlp.up_proj.weight.copy_(up)
            layer.mlp.down_proj.weight.copy_(mine["down"])
        ids = np.arange(50, dtype=np.int32) * 7 % 256
        expected = theirs(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, -1]
    found = ours.prefill(ids, 0)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert SUFFIX_TOKENS == 128
