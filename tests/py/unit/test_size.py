"""`kvtier size`: what capacities give, by hand on a trace of a few requests, and the command."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.cli import main, plots, size
from kvtier.cli.results import problems
from kvtier.cli.shapes import find
from kvtier.cli.size import (
    Point,
    Rates,
    ideal_hit_rate,
    kv_bytes,
    point_of,
    smallest,
    times_to_first_token,
)
from kvtier.replay import Tiers, simulate
from kvtier.traces import Trace, make_trace

TINY = find("tiny")
T = 16
BLOCK = TINY.kv_bytes_per_token("bfloat16") * T + 4096
# A, B, A again and A going on, one every 100 s: of 8 blocks 4 have been there.
REQUESTS = [(0.0, [1, 2]), (100.0, [5]), (200.0, [1, 2]), (300.0, [1, 2, 3])]
RATES = Rates(prefill_flops=1e9, host_bytes=1e6, disk_bytes=2e5)


@pytest.fixture
def trace() -> Trace:
    return make_trace(REQUESTS, block_tokens=T)


def replayed(trace: Trace, host: int, disk: int = 0) -> Any:
    tiers = Tiers(host_blocks=host, disk_blocks=disk, bytes_per_block=BLOCK, admission="all")
    return simulate(trace, tiers)


def test_everything_kept_is_the_ceiling(trace: Trace) -> None:
    assert ideal_hit_rate(trace) == 0.5
    assert replayed(trace, 100).hit_rate == 0.5
    assert replayed(trace, 2).hit_rate < 0.5


def test_times_are_those_of_the_shape_and_of_the_bytes(trace: Trace) -> None:
    cold = times_to_first_token(trace, None, TINY, RATES)
    assert cold == pytest.approx([TINY.prefill_flops(n * T) / 1e9 for n in (2, 1, 2, 3)])
    warm = times_to_first_token(trace, replayed(trace, 100), TINY, RATES)
    assert warm[:2] == pytest.approx(cold[:2])
    load = 2 * BLOCK / 1e6
    # Of a prompt that is there as a whole, the last token is computed.
    assert warm[2] == pytest.approx(load + TINY.prefill_flops(1, 2 * T - 1) / 1e9)
    assert warm[3] == pytest.approx(load + TINY.prefill_flops(T, 2 * T) / 1e9)


def test_blocks_on_disk_take_the_drives_time(trace: Trace) -> None:
    replay = replayed(trace, 1, 100)
    on_disk = replay.disk_of_request.astype(int)
    assert on_disk.sum() > 0
    times = times_to_first_token(trace, replay, TINY, RATES)
    found = on_disk + replay.host_of_request.astype(int)
    tokens = np.array([2, 1, 2, 3]) * T
    for r in range(4):
        prefix = min(found[r] * T, tokens[r] - 1)
        load = max(found[r] * BLOCK / 1e6, on_disk[r] * BLOCK / 2e5)
        assert times[r] == pytest.approx(
            load + TINY.prefill_flops(int(tokens[r] - prefix), int(prefix)) / 1e9
        )


def test_a_point_says_what_a_day_writes_and_saves(trace: Trace) -> None:
    replay = replayed(trace, 1, 100)
    point = point_of(trace, replay, TINY, RATES, BLOCK, 100 * BLOCK)
    assert point.disk_bytes_per_day == pytest.approx(replay.disk_blocks_written * BLOCK * 86400 / 300)
    assert point.drive_writes_per_day == pytest.approx(point.disk_bytes_per_day / (100 * BLOCK))
    cold = times_to_first_token(trace, None, TINY, RATES)
    free = times_to_first_token(trace, replay, TINY, Rates(1e9, np.inf, np.inf))
    assert point.gpu_seconds_saved_per_day == pytest.approx((cold - free).sum() * 86400 / 300)
    assert point.write_budget_bytes_per_day is None
    assert point_of(trace, replayed(trace, 1), TINY, RATES, BLOCK, 0).drive_writes_per_day is None


def test_ranks_share_a_host_and_a_latent_is_kept_once() -> None:
    whole = find("llama-3.1-8b")
    assert kv_bytes(find("llama-3.1-8b", 8), 8, "bfloat16") == whole.kv_bytes_per_token("bfloat16") == 131072
    latent = find("tiny-mla")
    assert kv_bytes(latent, 4, "bfloat16") == latent.kv_bytes_per_token("bfloat16")


def point(host: int, disk: int, hit_rate: float, p90: float) -> Point:
    return Point(host, 1, disk, 1, hit_rate, 0, 0, 0, p90, 0, 0, 0, None)


def test_the_smallest_has_the_least_dram_then_the_least_nvme() -> None:
    points = [point(4, 0, 0.5, 1.0), point(2, 8, 0.5, 2.0), point(2, 4, 0.4, 3.0), point(1, 0, 0.1, 9.0)]
    assert smallest(points, 0.4, None) is points[2]
    assert smallest(points, 0.5, None) is points[1]
    assert smallest(points, None, 1.5) is points[0]
    assert smallest(points, 0.6, None) is None


def written(tmp_path: Path) -> str:
    lines = [
        {"timestamp": int(1000 * at), "input_length": T * len(ids), "output_length": 1, "hash_ids": ids}
        for at, ids in REQUESTS
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def told(out: Path) -> Any:
    document = json.loads(out.read_text())
    assert problems(document) == []
    return document["machine"]["size"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "size.json"
    words = ["size", written(tmp_path), "--model", "tiny", "--block-tokens", "16", "--json", str(out)]
    sizes = ["--host", f"{BLOCK},{8 * BLOCK}", "--disk", f"0,{8 * BLOCK}"]
    assert main([*words, *sizes, "--target-hit-rate", "0.5"]) == 0
    document = told(out)
    assert document["block_bytes"] == BLOCK
    assert [(p["host_blocks"], p["disk_blocks"]) for p in document["points"]] == [
        (1, 0),
        (8, 0),
        (1, 8),
        (8, 8),
    ]
    assert document["points"][1]["hit_rate"] == document["hit_rate_of_all"] == 0.5
    assert document["answer"] in document["points"]
    text = capsys.readouterr().out
    assert "DWPD" in text
    assert "smallest that reaches the target" in text
    assert main([*words, *sizes, "--target-hit-rate", "0.9"]) == 3  # more than everything kept
    assert told(out)["answer"] is None


def test_the_help_names_every_field_of_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "size.json"
    words = ["size", written(tmp_path), "--model", "tiny", "--block-tokens", "16", "--json", str(out)]
    assert main([*words, "--target-hit-rate", "0.5"]) == 0
    document = told(out)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["size", "--help"])
    said = set(re.findall(r"\w+", capsys.readouterr().out.partition("--json FILE: one object")[2]))
    assert {*document, *document["rates"], *document["cold"], *document["points"][0]} <= said


def busy(tmp_path: Path, seconds: float) -> str:
    """Every prompt comes again, after more blocks than the DRAM of these tests holds."""
    ids = [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(100)] * 2
    lines = [
        {"timestamp": round(1000 * seconds * n / (len(ids) - 1)), "hash_ids": each, "input_length": 3 * T}
        for n, each in enumerate(ids)
    ]
    path = tmp_path / "busy.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_drive_is_written_as_an_engine_may_unless_more_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "size.json"
    words = ["size", busy(tmp_path, 3600), "--model", "tiny", "--block-tokens", "16", "--json", str(out)]
    words += ["--host", f"{10 * BLOCK}", "--disk", f"0,{400 * BLOCK}", "--admission", "all"]
    target = ["--target-hit-rate", "0.3"]
    documents = {}
    for given in ("", f"{600 * BLOCK}", "unlimited"):
        more = ["--write-budget", given] if given else []
        assert main([*words, *more, *target]) == (0 if given == "unlimited" else 3)
        documents[given] = told(out)
        texts = {"": "one capacity a day, an engine's default", "unlimited": "unlimited; an engine's default"}
        assert f"write budget: {texts.get(given, '')}" in capsys.readouterr().out
    point = documents[""]["points"][1]
    assert documents[""]["write_budget"] == "capacity"
    assert point["write_budget_bytes_per_day"] == 400 * BLOCK
    assert 0 < point["disk_bytes_per_day"] <= 400 * BLOCK
    assert 0 < point["drive_writes_per_day"] <= 1
    assert documents[""]["points"][0]["write_budget_bytes_per_day"] is None
    more = documents[f"{600 * BLOCK}"]["points"][1]
    assert documents[f"{600 * BLOCK}"]["write_budget"] == 600 * BLOCK
    assert point["disk_bytes_per_day"] < more["disk_bytes_per_day"] <= 600 * BLOCK
    free = documents["unlimited"]["points"][1]
    assert documents["unlimited"]["write_budget"] == "unlimited"
    assert free["write_budget_bytes_per_day"] is None
    assert free["drive_writes_per_day"] > 10
    assert free["hit_rate"] > 0.3 > point["hit_rate"]


def test_a_trace_without_times_says_nothing_of_a_day(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "size.json"
    words = ["size", busy(tmp_path, 0), "--model", "tiny", "--block-tokens", "16", "--json", str(out)]
    sizes = ["--host", f"{10 * BLOCK}", "--disk", f"{400 * BLOCK}", "--target-hit-rate", "0"]
    assert main([*words, *sizes]) == 0
    document = told(out)
    for point in (*document["points"], document["answer"]):
        assert not [name for name in point if name.endswith("_per_day") and "budget" not in name]
    assert capsys.readouterr().out.splitlines()[-3].split()[-3:] == ["-", "-", "-"]


def test_capacities_need_not_be_given(tmp_path: Path) -> None:
    out = tmp_path / "size.json"
    assert (
        main(["size", written(tmp_path), "--model", "tiny", "--block-tokens", "16", "--json", str(out)]) == 0
    )
    points = told(out)["points"]
    assert max(p["hit_rate"] for p in points) == 0.5
    assert {p["disk_bytes"] > 0 for p in points} == {True, False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "1KiB"], "--host has '1KiB'; allowed: at least one block"),
        (["--model", "gpt-9"], "shape is 'gpt-9'; allowed"),
        (["--prefill-tflops", "0"], "--prefill-tflops is 0.0; allowed: at least 1e-6 and less than 1e9"),
        (["--host-gbps", "1e10"], "--host-gbps is 10000000000.0; allowed: at least 1e-6 and less than 1e9"),
        (["--disk-gbps", "1e-320"], "--disk-gbps is 1e-320; allowed: at least 1e-6 and less than 1e9"),
        (["--target-hit-rate", "40"], "--target-hit-rate is 40.0; allowed: 0 to 1"),
        (["--target-ttft", "-1"], "--target-ttft is -1.0; allowed: 0 to 1e9, in seconds"),
        (["--policy", "best"], "--policy is 'best'; allowed"),
        (["--host", "1MiB,4EiB"], "--host is '4EiB'; allowed: a number of bytes"),
        (["--host", "1MiB", "--disk", "8000000TiB"], "blocks; allowed: 1 to 100000000 blocks"),
        (["--write-budget", "any"], "--write-budget is 'any'; allowed: a number of bytes"),
        (["--ranks", "0"], "ranks is 0; allowed: an integer from 1 to"),
        (["--block-tokens", "0"], "--block-tokens is 0; allowed: an integer from 1 to"),
    ],
)
def test_bad_values_are_named(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["size", written(tmp_path), "--model", "tiny", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--plot", "x.txt", "allowed: a file ending in .png"),
        ("--plot", "no/x.png", "there is no such folder"),
        ("--plot", "folder.png", "allowed: a file, and that is none"),
        ("--plot", "x" * 300 + ".png", "it cannot be written: File name too long"),
        ("--json", "no/x.json", "there is no such folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_known_before(
    tmp_path: Path,
    option: str,
    name: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(size, "simulate", lambda *_: pytest.fail("must not begin"))
    (tmp_path / "folder.png").mkdir()
    assert main(["size", written(tmp_path), "--model", "tiny", option, str(tmp_path / name)]) == 1
    said = capsys.readouterr().err
    assert f"kvtier size: {option} " in said
    assert message in said


def test_looking_whether_a_figure_can_be_written_leaves_nothing_and_harms_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    old, link, new = (tmp_path / name for name in ("old.png", "link.png", "new.png"))
    old.write_text("mine")
    link.symlink_to(new)
    for path in (old, link, new):
        plots.check(str(path))
    assert old.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"old.png", "link.png"}


@pytest.mark.parametrize("number", ["inf", "nan", "-inf", "1e999", "many"])
def test_numbers_that_are_none_are_refused_when_they_are_read(
    tmp_path: Path, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (
        ["size", written(tmp_path), "--model", "tiny", f"--target-ttft={number}"],
        ["replay", written(tmp_path), f"--prefill-rate={number}"],
        ["bench", "ttft", f"--minutes={number}"],
        ["bench", "all", f"--minutes={number}"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
        assert f"{number!r}; allowed: a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_figure_is_drawn_as_its_name_says(tmp_path: Path, suffix: str, begin: bytes) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"size{suffix}"
    assert (
        main(["size", written(tmp_path), "--model", "tiny", "--block-tokens", "16", "--plot", str(file)]) == 0
    )
    assert file.read_bytes().startswith(begin)
