"""The commands, with sizes so small that they prove that they work and measure nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvtier.cli import bench, bench_copy, bench_index, demo, main
from kvtier.cli.progress import Progress
from kvtier.cli.results import problems
from kvtier.engine import copy_runs_limit
from kvtier.errors import ConfigError

DEMO = [
    "demo",
    "--size",
    "tiny",
    "--tokens",
    "200",
    "--block-tokens",
    "16",
    "--chunk",
    "64",
    "--runs",
    "2",
    "--no-disk",
]
INDEX = ["bench", "index", "--blocks", "2000", "--batch", "512", "--tokens", "1000", "--rounds", "2"]
COPY = ["bench", "copy", "--mib", "4", "--rounds", "2"]


def run_with_json(argv: list[str], path: Path) -> tuple[int, Any]:
    status = main([*argv, "--json", str(path)])
    document = json.loads(path.read_text())
    assert problems(document) == []
    return status, document


def names(document: Any) -> set[str]:
    return {r["name"] for r in document["results"]}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["bench"], ["bench", "nonsense"], ["demo", "--tokens", "many"]]
)
def test_a_wrong_command_line_is_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["demo", "--runs", "0"],
        ["demo", "--model", "/nonexistent"],
        ["demo", "--size", "tiny", "--text", "/nonexistent"],
        ["bench", "index", "--batch", "0"],
        ["bench", "copy", "--rounds", "0"],
        ["doctor", "--json", "/nonexistent/x.json"],
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_1(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 1
    assert capsys.readouterr().err.startswith(f"kvtier {argv[0]}: ")


@pytest.mark.parametrize(
    "words",
    [
        ["index", "--json", "/nonexistent/x.json"],
        ["copy", "--threads", "0"],
        ["ttft", "--plot", "/nonexistent/x.png"],
    ],
)
def test_what_cannot_be_done_is_said_before_other_benchmarks_are_waited_for(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "alone", lambda out: pytest.fail("waits"))
    assert main(["bench", *words]) == 1


def test_a_list_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "alone", lambda out: pytest.fail("waits"))
    assert main(["bench", "peers", "--list"]) == 0
    assert "environment: " in capsys.readouterr().out


def test_a_typing_error_leaves_the_results_of_before_alone(tmp_path: Path) -> None:
    path = tmp_path / "good.json"
    path.write_text("19 results")
    assert main([*INDEX, "--batch", "5000", "--json", str(path)]) == 1
    assert path.read_text() == "19 results"


def test_ctrl_c_while_the_command_line_is_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["kvtier.cli.main"], "_parser", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "kvtier: interrupted\n"


def test_sigterm_leaves_what_was_finished_and_nothing_else(tmp_path: Path) -> None:
    lock, drive, path = tmp_path / "lock", tmp_path / "drive", tmp_path / "out.json"
    lock.mkdir()
    drive.mkdir()
    argv = [sys.executable, "-u", "-m", "kvtier.cli", "bench", "reopen", "--blocks", "2000", "--rounds"]
    argv += ["100000", "--dir", str(drive), "--json", str(path)]
    with subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(lock)},
    ) as process:
        for line in process.stdout or ():
            if line.rstrip().endswith("%] warm"):
                break
        assert list(drive.iterdir()) != []
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
        process.send_signal(signal.SIGTERM)  # as timeout(1) does
        assert process.communicate()[1].splitlines()[-1] == "kvtier: terminated"
    assert process.returncode == 143
    assert list(drive.iterdir()) == []
    document = json.loads(path.read_text())
    assert problems(document) == []
    assert document["checks"]["completed"] is False


def test_nothing_slow_is_imported_for_help() -> None:
    code = "import sys, kvtier.cli; kvtier.cli.main(['version']); print({'torch', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = run_with_json(["doctor"], tmp_path / "out.json")
    assert status == 0
    assert document["checks"]["round trip"] is True
    assert "ok     round trip: stored 4 blocks" in capsys.readouterr().out


def test_bench_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = run_with_json(INDEX, tmp_path / "out.json")
    assert status == 0, capsys.readouterr().out
    wanted = {"lookup_in_order", "lookup_random", "dict_in_order", "dict_random", "store_evicting"}
    assert wanted | {"index_bytes_per_block", "dict_in_order_sliced", "lookup_miss"} <= names(document)
    checks = {"index_full", "lookup_states", "every_store_evicted", "bytes", "completed"}
    assert document["checks"] == dict.fromkeys(checks, True)
    assert {r["n"] for r in document["results"] if r["name"] == "lookup_random"} == {2}


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("--blocks", "0", "1 to"), ("--batch", "2001", "1 to 2000"), ("--tokens", "15", "16 to")],
)
def test_bench_index_names_the_option_that_is_wrong(
    option: str, value: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*INDEX, option, value]) == 1
    assert f"kvtier bench: {option} is {value}; allowed: an integer from {allowed}" in capsys.readouterr().err


def test_bench_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = run_with_json(COPY, tmp_path / "out.json")
    assert status == 0, capsys.readouterr().out
    assert {"store", "load", "ticket", "store_4k_1_thread", "load_1_thread", "load_contiguous_4k"} <= names(
        document
    )
    assert document["checks"] == {"bytes": True, "completed": True}
    assert all(r["limit"] > 0 and r["ratio"] > 0 for r in document["results"] if r["unit"] == "GB/s")


def test_bench_copy_with_the_same_threads_twice_has_every_result_once(tmp_path: Path) -> None:
    status, document = run_with_json([*COPY, "--threads", "1", "1"], tmp_path / "out.json")
    assert status == 0
    assert not any("thread" in name for name in names(document))


@pytest.mark.parametrize("method", ["memcpy", "streaming"])
@pytest.mark.parametrize("threads", [1, 3])
def test_copy_runs_limit_copies_each_run(method: str, threads: int) -> None:
    source = np.random.default_rng(1).integers(0, 256, 10_000, np.uint8)
    into = np.zeros(8_000, np.uint8)
    to_offsets, from_offsets = np.array([0, 5_000, 1_000, 7_000]), np.array([9_000, 1, 333, 4_096])
    took = copy_runs_limit(into, source, to_offsets, from_offsets, 1_000, method=method, threads=threads)
    assert took > 0
    expected = np.zeros_like(into)
    for to, begin in zip(to_offsets, from_offsets, strict=True):
        expected[to : to + 1_000] = source[begin : begin + 1_000]
    assert np.array_equal(into, expected)


@pytest.mark.parametrize(
    ("to_offset", "from_offset", "said"), [(7_001, 0, "to_offsets has 7001"), (0, -1, "from_offsets has -1")]
)
def test_copy_runs_limit_stays_in_its_arrays(to_offset: int, from_offset: int, said: str) -> None:
    source, into = np.zeros(10_000, np.uint8), np.zeros(8_000, np.uint8)
    offsets = np.array([to_offset]), np.array([from_offset])
    with pytest.raises(ConfigError, match=said):
        copy_runs_limit(into, source, *offsets, 1_000, method="memcpy", threads=1)


def test_bench_copy_reports_wrong_bytes_and_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_copy.np, "array_equal", lambda a, b: False)
    status, document = run_with_json(COPY, tmp_path / "out.json")
    assert status == 1
    assert document["checks"]["bytes"] is False
    assert document["results"] == []


def test_bench_index_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_index, "_evicting_round", interrupted)
    status, document = run_with_json(INDEX, tmp_path / "out.json")
    assert status == 130
    assert document["checks"]["completed"] is False
    assert "lookup_random" in names(document)
    assert "store_evicting" not in names(document)


def test_bench_index_reports_no_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the second round of stores that evict; of stores that fill there is but one."""
    evicting, rounds = bench_index._evicting_round, iter(range(9))

    def interrupted(bench: Any) -> None:
        if next(rounds):
            raise KeyboardInterrupt
        evicting(bench)

    monkeypatch.setattr(bench_index, "_evicting_round", interrupted)
    status, document = run_with_json([*INDEX, "--blocks", "600"], tmp_path / "out.json")
    assert status == 130
    assert "lookup_random" in names(document)
    warm_ups = {"store_filling", "store_per_block", "store_evicting", "store_evicting_submit"}
    assert names(document) & (warm_ups | {"eviction_per_block"}) == set()


def test_bench_index_that_is_not_full_has_no_bytes_per_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = bench_index._fill

    def fill_and_more(bench: Any) -> None:
        bench.keys = np.concatenate([bench.keys, bench.keys[:1]])
        fill(bench)

    monkeypatch.setattr(bench_index, "_fill", fill_and_more)
    status, document = run_with_json(INDEX, tmp_path / "out.json")
    assert status == 1
    assert document["checks"]["index_full"] is False
    assert document["results"] == []


@pytest.mark.parametrize("subject", ["index", "disk", "reopen", "vllm", "peers"])
def test_a_seed_below_0_is_refused(subject: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory = ["--dir", "."] if subject == "disk" else []
    assert main(["bench", subject, "--seed", "-1", *directory]) == 1
    assert "kvtier bench: --seed is -1; allowed: an integer from 0 to" in capsys.readouterr().err


class TestDemo:
    @pytest.fixture(autouse=True)
    def _needs_a_model(self) -> None:
        pytest.importorskip("torch")
        pytest.importorskip("transformers")

    def test_demo(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, document = run_with_json(DEMO, tmp_path / "out.json")
        printed = capsys.readouterr().out
        assert status == 0, printed
        assert {"ttft_cold", "ttft_device", "ttft_host", "restore", "save"} <= names(document)
        assert [r["value"] for r in document["results"] if r["name"] == "prefix_tokens"] == [
            208
        ]  # whole blocks
        checks = document["checks"]
        assert checks["identical_logits"] is checks["control_differs"] is checks["completed"] is True
        assert "memcpy GB/s" in printed
        assert "[100 %]" in printed
        assert "drive" not in document["machine"]  # of which no row is

    def test_the_disk_row(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        argv = [*(word for word in DEMO if word != "--no-disk"), "--disk", str(disk)]
        status, document = run_with_json(argv, tmp_path / "out.json")
        printed = capsys.readouterr().out
        assert status == 0, printed
        assert {"ttft_disk_after_sigkill", "restore_disk", "reopen"} <= names(document)
        checks = {name for name, passed in document["checks"].items() if passed}
        assert {"disk_saved_whole_prefix", "disk_restored_whole_prefix"} <= checks
        assert {"disk_identical_logits", "disk_cold_identical_logits", "disk_control_differs"} <= checks
        assert "SIGKILL" in printed
        file_system = document["machine"]["drive"]["file_system"]
        assert f"\ndrive: {file_system}" in printed
        # Each run is of a process of its own, after the kill of the one before; the table shows the row.
        assert {
            r["n"] for r in document["results"] if r["name"] in {"ttft_disk_after_sigkill", "reopen"}
        } == {2}
        assert printed.count("killed with SIGKILL; a new process starts") == 2
        assert re.search(r"^ +disk +\S+\+128 ", printed, re.MULTILINE)
        assert list(disk.iterdir()) == []  # nothing is left

    @pytest.mark.parametrize("what", ["missing", "file", "read-only"])
    def test_a_disk_row_that_cannot_be_is_said_before_anything_is_measured(
        self, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        disk = tmp_path / what
        if what == "file":
            disk.write_text("mine")
        elif what == "read-only":
            disk.mkdir()
            monkeypatch.setattr(demo.os, "access", lambda path, mode: path != disk)  # root may write
        monkeypatch.setattr(demo, "_measure", lambda *_: pytest.fail("must not begin"))
        argv = [*(word for word in DEMO if word != "--no-disk"), "--disk", str(disk)]
        assert main(argv) == 1
        assert f"kvtier demo: --disk is '{disk}'; allowed: a directory" in capsys.readouterr().err

    @pytest.mark.parametrize("check", ["durable", "restored"])
    def test_a_disk_row_whose_check_failed_has_no_figures(
        self, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from kvtier.cli import demo_disk

        def life(module: str, what: str, arguments: Any, progress: Any) -> Any:
            return live(module, what, arguments, progress) | {check: False}

        live = demo_disk.live
        monkeypatch.setattr(demo_disk, "live", life)
        argv = [*(word for word in DEMO if word != "--no-disk"), "--disk", str(tmp_path)]
        status, document = run_with_json(argv, tmp_path / "out.json")
        assert status == 1
        failed = {name for name, passed in document["checks"].items() if not passed}
        assert failed == {"disk_saved_whole_prefix" if check == "durable" else "disk_restored_whole_prefix"}
        assert not names(document) & {"ttft_disk_after_sigkill", "restore_disk", "reopen"}
        assert "ttft_host" in names(document)

    def test_a_drive_without_room_is_said_before_anything_is_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: SimpleNamespace(free=8 << 20))
        monkeypatch.setattr(demo, "_measure", lambda *_: pytest.fail("must not begin"))
        argv = [*(word for word in DEMO if word != "--no-disk"), "--disk", str(tmp_path)]
        assert main(argv) == 1
        assert f"kvtier demo: --disk {tmp_path}: 8 MiB are free; needs 33 MiB" in capsys.readouterr().err

    @pytest.mark.parametrize("tokens", [10**12, (1 << 17) - 64])
    def test_more_tokens_than_the_model_takes_are_refused_before_a_text_is_made(
        self, tokens: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from kvtier.cli import demo_model

        monkeypatch.setattr(demo_model, "make_prompt", lambda *_: pytest.fail("must not begin"))
        assert main([*DEMO, "--tokens", str(tokens)]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"kvtier demo: --tokens {tokens}: ")
        assert "allowed by the model: 131072" in said

    @pytest.mark.parametrize(
        "config", ["{}", '{"model_type": "llama", "hidden_size": "x"}', "[]", "{", '"x"'], ids=str
    )
    def test_a_folder_that_holds_no_model_is_one_line(
        self, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "config.json").write_text(config)
        assert main([*DEMO, "--model", str(tmp_path)]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"kvtier demo: --model {tmp_path}: transformers cannot load it: ")

    def test_json_on_standard_output(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*DEMO, "--json", "-"]) == 0
        assert problems(json.loads(capsys.readouterr().out)) == []

    def test_the_prompt_is_repeated_when_too_short(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = tmp_path / "short.txt"
        text.write_text("A short document.\n")
        assert main([*DEMO, "--text", str(text)]) == 0
        assert "under section numbers" in capsys.readouterr().out
        text.write_text(" \n")
        assert main([*DEMO, "--text", str(text)]) == 1
        assert "is empty" in capsys.readouterr().err

    def test_a_local_model(self, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        transformers = pytest.importorskip("transformers")
        from kvtier.cli.demo_model import load_model

        load_model(None, "tiny").module.save_pretrained(tmp_path)
        words = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({"[UNK]": 0, "kvtier": 1, "the": 2}, "[UNK]")
        )
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(
            tmp_path
        )
        assert main([*DEMO, "--model", str(tmp_path)]) == 0

    @pytest.mark.parametrize("check", ["identical_logits", "control_differs"])
    def test_a_failed_check_is_status_1(
        self, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import torch

        monkeypatch.setattr(torch, "equal", lambda a, b: check != "identical_logits")
        status, document = run_with_json(DEMO, tmp_path / "out.json")
        assert status == 1
        assert document["checks"][check] is False
        assert names(document) & {"ttft_cold", "ttft_host", "restore"} == {"ttft_cold"}
        assert f"FAILED {check}" in capsys.readouterr().out

    def test_it_keeps_what_was_finished(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from kvtier.cli.demo_run import Run

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Run, "host", interrupted)
        status, document = run_with_json(DEMO, tmp_path / "out.json")
        assert status == 130
        assert document["checks"]["completed"] is False
        assert "ttft_cold" in names(document)
        assert "ttft_host" not in names(document)

    def test_it_says_what_is_missing(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
        assert main(["demo"]) == 1
        assert "pip install 'kvtier[demo]'" in capsys.readouterr().err


class Terminal:
    """A text stream that somebody watches."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_terminal_gets_a_bar() -> None:
    pytest.importorskip("rich")
    terminal: Any = Terminal()
    with Progress(terminal, 10) as progress:
        progress.phase("copying")
        progress.step(5)
    assert "copying" in terminal.text


def test_without_rich_a_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    terminal: Any = Terminal()
    with Progress(terminal, 10) as progress:
        progress.step(5)
        progress.phase("copying")
    assert terminal.text == "[ 50 %] copying\n[ 50 %] done\n"
