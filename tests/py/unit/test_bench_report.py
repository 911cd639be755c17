"""Figures in documents, the HTML page, the run of everything, and that one benchmark runs at a time."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvtier.cli import bench_all, bench_lock, machine, main
from kvtier.cli.bench_all import Step
from kvtier.cli.bench_report import collect, page
from kvtier.cli.bench_ttft_plan import Fit, schedule
from kvtier.cli.figures import Figures, refresh
from kvtier.cli.results import Report, Result, measured, problems
from kvtier.cli.shapes import SHAPES
from kvtier.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def write(
    folder: Path, name: str, *results: Result, command: str = "bench copy", passed: bool = True
) -> None:
    with Report(command, str(folder / name)) as report:
        report.add(*results)
        report.checks["bytes"] = passed


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with two results of a machine, and documents that quote the newer one."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for day, value in (("2026-01-02", 2.0), ("2026-01-10", 3.456)):
        write(
            tmp_path / "benchmarks" / "results",
            f"copy-box-2core-{day}.json",
            measured("store", [value, value, 9.0], "GB/s", [10.0, 10.0, 10.0]),
            Result("a/b", 12345.6, "s", n=0, extrapolated=True),
        )
    for name in ("README.md", "benchmarks/README.md", "docs/x.md"):
        (tmp_path / name).write_text("nothing\n")
    return tmp_path


TEXT = """# Title
<!-- figures box-2core
| {copy store} | {copy store ratio:.2f} x | {copy a/b} | {copy file} |
-->
| old | figures |
<!-- end of figures -->
Rest {copy store}.
"""
FILLED = (
    "| 3.46 GB/s (3.46-9.00) | 0.35 x | ~12,346 s | benchmarks/results/copy-box-2core-2026-01-10.json |\n"
)


# --- figures ------------------------------------------------------------------------------------------------


def test_the_figures_of_our_documents_are_those_of_the_result_files() -> None:
    """The one that counts. `kvtier bench report --readme` makes them so."""
    assert "<!-- figures " in (ROOT / "README.md").read_text()
    assert refresh(ROOT, check_only=True) == []


def test_every_result_file_is_in_order() -> None:
    documents, wrong = collect(ROOT / "benchmarks" / "results")
    assert documents
    assert wrong == []


def test_figures_come_from_the_newest_file(project: Path) -> None:
    (project / "README.md").write_text(TEXT)
    assert refresh(project, check_only=True) == [Path("README.md")]
    assert (project / "README.md").read_text() == TEXT
    assert refresh(project) == [Path("README.md")]
    assert (project / "README.md").read_text() == TEXT.replace("| old | figures |\n", FILLED)
    assert refresh(project) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{copy store}", "{copy sotre}", r"README\.md: .*2026-01-10\.json: no result 'sotre'"),
        ("{copy store}", "{disk read}", r"no file disk-box-2core-DATE\.json"),
        ("box-2core", "shed", r"no file copy-shed-DATE\.json"),
        ("a/b}", "a/b limit:.1f}", r"a/b: no 'limit'; allowed: value, min"),
        ("<!-- end of figures -->", "", r"without its end"),
    ],
)
def test_a_block_that_cannot_be_filled_is_an_error(project: Path, old: str, new: str, message: str) -> None:
    (project / "README.md").write_text(TEXT.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        refresh(project)


def test_a_file_whose_check_failed_is_not_quoted(project: Path) -> None:
    write(project / "benchmarks" / "results", "copy-box-2core-2026-02-01.json", passed=False)
    with pytest.raises(ConfigError, match="its check bytes failed: no figures to quote"):
        Figures(project).filled(TEXT)


# --- the page -----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would fetch, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def ttft(folder: Path, name: str) -> None:
    results = []
    for tokens, cold in ((1024, 1.0), (2048, 3.0)):
        results.append(measured(f"ttft/s/{tokens}/recompute", [cold], "s"))
        results.append(measured(f"ttft/s/{tokens}/host", [cold / 9], "s", [cold / 90]))
    results.append(Result("ttft/s/4096/recompute", 9.0, "s", n=0, extrapolated=True))
    write(folder, name, *results, command="bench ttft")


def test_the_page_needs_no_other_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = project / "benchmarks" / "results"
    ttft(folder, "ttft-box-2core-2026-01-10.json")
    write(
        folder,
        "index-box-2core-2026-01-10.json",
        Result("<b>", 1.0, "s"),
        command="bench index",
        passed=False,
    )
    assert main(["bench", "report", "--results", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert len(text) < 1_000_000
    found = Page(text)
    assert found.open == []
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in found.fetched)
    assert sum(target.startswith("data:") for target in found.fetched) == 1
    assert "ttft/s/4096/recompute" in found.text
    assert "extrapolated" in found.text
    assert "FAILED: bytes" in found.text
    assert "copy-box-2core-2026-01-10.json" in found.text
    assert "copy-box-2core-2026-01-02.json" not in found.text  # there is a newer one
    assert "<b>" in found.text  # and no markup
    assert "3 files" in capsys.readouterr().out


def test_what_is_no_result_is_left_out_and_status_1(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project / "benchmarks" / "results"
    (folder / "bad-1-2026-01-01.json").write_text("{")
    (folder / "odd-1-2026-01-01.json").write_text("[]")
    assert main(["bench", "report", "--results", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "left out: bad-1-2026-01-01.json: not JSON" in printed
    assert "left out: odd-1-2026-01-01.json: not an object" in printed


def test_the_report_writes_json(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = project / "benchmarks" / "results", project / "out.json"
    argv = ["bench", "report", "--results", str(folder)]
    assert main([*argv, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert problems(document) == []
    assert document["command"] == "bench report"
    assert document["machine"]["files"] == ["copy-box-2core-2026-01-10.json"]
    found = {result["name"]: result["value"] for result in document["results"]}
    assert found == {"files": 1, "page": (folder / "report.html").stat().st_size}
    assert document["checks"] == {"files": True, "completed": True}
    (folder / "bad-1-2026-01-01.json").write_text("{")
    ttft(folder, "ttft-box-2core-2026-01-10.json")
    capsys.readouterr()
    assert main([*argv, "--json", "-"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["checks"]["files"] is False
    assert "left out: bad-1-2026-01-01.json: not JSON" in printed.err


def test_files_without_a_date_count_for_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["copy.json", "index.json", "reopen.json", "copy-2026-01-02.json", "copy-2026-01-03.json"]
    for name in names:
        write(tmp_path, name, Result("a", 1.0, "s"))
    documents, wrong = collect(tmp_path)
    assert set(documents) == {*names} - {"copy-2026-01-02.json"}  # there is a newer one
    assert wrong == []


def test_the_documents_quote_our_results_and_no_others(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project / "benchmarks" / "results"
    assert main(["bench", "report", "--results", str(folder), "--readme"]) == 1
    assert f"--readme with --results {folder}: the documents quote" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_a_folder_without_results_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "report", "--results", str(tmp_path)]) == 1
    assert "no result files" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_page_without_figures(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = project / "benchmarks" / "results"
    ttft(folder, "ttft-box-2core-2026-01-10.json")
    documents, _ = collect(folder)
    assert "data:" not in page(documents)
    assert "pip install 'kvtier[plots]'" in capsys.readouterr().out


# --- everything ---------------------------------------------------------------------------------------------


def steps(monkeypatch: pytest.MonkeyPatch, *some: Step) -> None:
    monkeypatch.setattr(bench_all, "STEPS", some)


INDEX = ("bench", "index", "--blocks", "2000", "--batch", "512", "--tokens", "1000", "--rounds", "1")


def test_all_runs_what_it_can_and_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the lock of its processes
    steps(
        monkeypatch,
        Step("index", INDEX, 1),
        Step("disk", ("bench", "disk"), 1, lambda: "fio is not installed"),
        Step("peers", ("bench", "nonsense"), 1),
        Step("ttft", ("bench", "ttft"), 50),
    )
    folder, summary = tmp_path / "results", tmp_path / "all.json"
    folder.mkdir()
    argv = ["bench", "all", "--results", str(folder), "--machine", "box", "--minutes", "50"]
    assert main([*argv, "--json", str(summary)]) == 1  # peers failed
    printed = capsys.readouterr().out
    assert "left out: disk: fio is not installed" in printed
    assert "left out: ttft: takes about 50 min" in printed
    document = json.loads(summary.read_text())
    assert problems(document) == []
    assert document["checks"] == {"index": True, "peers": False, "report": True, "completed": True}
    assert set(document["machine"]["left_out"]) == {"disk", "ttft"}
    (found,) = folder.glob("*.json")
    assert found.name.startswith("index-box-20")
    index = json.loads(found.read_text())
    assert problems(index) == []
    (duration,) = (r["value"] for r in document["results"] if r["name"] == "duration/index")
    assert index["machine"]["seconds"] == pytest.approx(duration, abs=0.5)
    assert {p.suffix for p in folder.iterdir()} == {".json", ".html"}


def test_what_takes_too_long_is_stopped_and_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    forever = ("bench", "index", "--blocks", "2000", "--batch", "512", "--rounds", "100000")
    steps(monkeypatch, Step("index", forever, 0.01))
    argv = [
        "bench",
        "all",
        "--results",
        str(tmp_path),
        "--machine",
        "box",
        "--minutes",
        "1.1",
    ]  # a minute is kept for its end
    assert main([*argv, "--json", str(tmp_path / "all.out")]) == 1
    summary = json.loads((tmp_path / "all.out").read_text())
    assert summary["checks"]["index"] is False
    assert "stopped after" in summary["machine"]["left_out"]["index"]
    (found,) = tmp_path.glob("index-box-*.json")
    assert json.loads(found.read_text())["checks"]["completed"] is False


def test_a_step_that_hangs_takes_no_time_of_those_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, float] = {}

    def run(step: Step, directory: str, target: Path, seconds: float, output: int | None) -> tuple[int, str]:
        given[step.name] = seconds
        return 124 if step.name == "hangs" else 0, ""

    monkeypatch.setattr(bench_all, "_run", run)
    steps(monkeypatch, Step("hangs", (), 5), Step("index", (), 40))
    argv = ["bench", "all", "--results", str(tmp_path), "--machine", "box", "--minutes", "60"]
    assert main([*argv, "--json", str(tmp_path / "all.out")]) == 1
    assert 60 * 18 < given["hangs"] <= 60 * (60 - 40 - 1)  # a minute to be stopped in
    assert given["index"] > 60 * 40
    checks = json.loads((tmp_path / "all.out").read_text())["checks"]
    assert (checks["hangs"], checks["index"]) == (False, True)


FOREVER = (*INDEX[:-1], "100000", "--tokens", "1000")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_what_a_step_has_finished_is_kept_when_all_are_ended(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    code = (
        "import sys; from kvtier.cli import bench_all, main\n"
        f"bench_all.STEPS = (bench_all.Step('index', {FOREVER}, 1),)\n"
        f"sys.exit(main(['bench', 'all', '--results', {str(tmp_path)!r}, '--machine', 'box']))"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        for line in process.stdout or ():
            if "ghost caches" in line or "lookups" in line:
                break
        time.sleep(0.5)
        # A terminal tells the whole group; so does timeout(1), which tells the first one twice.
        os.killpg(process.pid, number)
        if number == signal.SIGTERM:
            process.send_signal(number)
        assert process.stdout is not None
        process.stdout.read()
    assert process.returncode == status
    (found,) = tmp_path.glob("*.json")
    document = json.loads(found.read_text())
    assert problems(document) == []
    assert document["checks"]["completed"] is False
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize("day", ["2026-01-02", "2026-01-10"])
def test_what_was_cut_short_takes_the_place_of_no_complete_file(tmp_path: Path, day: str) -> None:
    part, target = tmp_path / "copy-box-2026-01-10.part", tmp_path / "copy-box-2026-01-10.json"

    def cut_short() -> None:
        with contextlib.suppress(KeyboardInterrupt), Report("bench copy", str(part)):
            raise KeyboardInterrupt

    cut_short()
    assert bench_all._keep(part, target, 12.34) == "what was finished is in its file"
    assert json.loads(target.read_text())["checks"] == {"completed": False}
    target.unlink()
    older = tmp_path / f"copy-box-{day}.json"
    write(tmp_path, older.name, Result("a", 1.0, "s"))
    write(tmp_path, "copy-box-2-2026-01-11.json", Result("a", 1.0, "s"))  # of another machine
    before = older.read_bytes()
    assert bench_all._keep(part, target, 12.34) == f"{older.name} stays"
    assert older.read_bytes() == before
    assert target.exists() == (older == target)
    write(tmp_path, part.name, Result("b", 1.0, "s"))  # a complete one does
    bench_all._keep(part, target, 12.34)
    document = json.loads(target.read_text())
    assert document["results"][0]["name"] == "b"
    assert document["machine"]["seconds"] == 12.3


def test_standard_output_is_the_json_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from kvtier.cli import bench_all, main\n"
        f"bench_all.STEPS = (bench_all.Step('index', {INDEX}, 1),)\n"
        f"sys.exit(main(['bench', 'all', '--results', {str(tmp_path)!r}, '--json', '-']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert problems(json.loads(done.stdout)) == []
    assert "lookup_in_order" in done.stderr
    assert "report.html: " in done.stderr


def test_every_step_says_why_it_cannot_run_here() -> None:
    reasons = [step.missing() for step in bench_all.STEPS]
    assert None in reasons  # index needs nothing
    assert all(reason is None or reason for reason in reasons)


def test_every_step_is_a_command_that_there_is() -> None:
    for step in bench_all.STEPS:
        if step.name == "peers" and step.missing():
            continue
        words = [word.replace("{dir}", ".") for word in step.command]
        subject = [word for word in words[:2] if not word.startswith("-")]
        parsed = subprocess.run(
            [sys.executable, "-m", "kvtier.cli", *subject, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert all(word in parsed.stdout for word in words[2:] if word.startswith("--")), step.name


@pytest.mark.parametrize("torch", [True, False], ids=["torch", "no-torch"])
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "no-gpu"])
def test_all_steps_fit_an_hour_and_those_of_a_gpu_come_first(gpu: bool, torch: bool) -> None:
    def without(step: Step) -> str | None:
        lacks_torch = not torch and "ttft" in step.name
        return "not here" if lacks_torch or (not gpu and "gpu" in step.name) else None

    here = [replace(step, missing=partial(without, step)) for step in bench_all.STEPS]
    can, left_out = bench_all.possible(here)
    names = [step.name for step in can]
    assert sum(step.minutes for step in can) <= 59  # and a minute for the report
    assert not set(names) & set(left_out)
    assert set(names) | set(left_out) == {step.name for step in here}
    first = ["gpu", *(["ttft-gpu"] if torch else [])] if gpu else ["index"]
    assert names[: len(first)] == first
    assert ("ttft" in names) == (torch and not gpu)
    if torch and gpu:
        assert left_out["ttft"] == "ttft-gpu runs in its place (--only ttft runs it)"
        alone, _ = bench_all.possible([step for step in here if step.name == "ttft"])
        assert [step.name for step in alone] == ["ttft"]


def test_a_gpus_minutes_are_enough_for_a_million_tokens() -> None:
    (step,) = (step for step in bench_all.STEPS if step.name == "ttft-gpu")
    minutes = float(step.command[step.command.index("--minutes") + 1])
    assert minutes < step.minutes
    for operations in (100e12, 400e12):
        model = Fit(SHAPES["qwen2.5-7b-1m"], 1 / operations, 1 / operations)
        plan = schedule([1 << n for n in range(10, 21)], model, rounds=5, minutes=minutes / 2)  # two shapes
        assert 1 << 20 in plan.rounds


def test_files_are_named_after_the_machine() -> None:
    assert machine.slug({"cpu": "AMD EPYC 9R14", "cores": 2}) == "epyc-2core"
    assert machine.slug({"cpu": "Intel(R) Xeon(R) Platinum 8480C", "cores": 16}) == "xeon-16core"
    assert machine.slug({"cpu": "aarch64", "cores": 4}) == "aarch64-4core"


def test_the_drive_is_described(tmp_path: Path) -> None:
    found = machine.drive(tmp_path)
    assert " on " in found["file_system"]
    assert json.loads(json.dumps(found)) == found


def test_a_run_says_its_gpus_driver_and_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    gpu = {"name": "NVIDIA Some", "memory.total": "81559 MiB", "driver_version": "580.1"}
    monkeypatch.setattr(machine, "gpus", lambda: [gpu, gpu])
    drive = {"file_system": "ext4 on /dev/x1", "name": "x", "model": "Some SSD", "bytes": 64_000_000_000}
    drive |= {"rotational": False, "scheduler": "none", "mount_options": "rw"}
    monkeypatch.setattr(machine, "drive", lambda _: drive)
    line = "drive: ext4 on /dev/x1, x, Some SSD, 64 GB, not rotational, scheduler none, mounted rw\n"
    argv = ["bench", "reopen", "--blocks", "64", "--rounds", "1"]
    for more in (["--dir", str(tmp_path)], []):
        assert main([*argv, *more]) == 0
        printed = capsys.readouterr().out
        assert "GPU: 2 x NVIDIA Some, 81559 MiB, driver 580.1\n" in printed
        assert printed.count(line) == 1
    assert machine.describe_drive({"file_system": "unknown"}) == "drive: unknown"


# --- one at a time ------------------------------------------------------------------------------------------


def test_a_benchmark_waits_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def second() -> None:
        with bench_lock.alone(sys.stdout):
            order.append("second")

    with bench_lock.alone(sys.stdout):
        thread = threading.Thread(target=second)
        thread.start()
        until = time.monotonic() + 30
        while "waiting: another benchmark runs" not in capsys.readouterr().out and time.monotonic() < until:
            time.sleep(0.01)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_results_that_were_not_measured_are_marked() -> None:
    good: dict[str, Any] = Result("a", 1.0, "s", n=0, extrapolated=True).as_json()
    document = {"schema": 1, "command": "x", "commit": "y", "machine": {}, "results": [good], "checks": {}}
    assert problems(document) == []
    for change in ({"n": 1}, {"extrapolated": False}):
        bad = document | {"results": [good | change]}
        assert problems(bad) == ["a: extrapolated is either true, and then n is 0, or absent"]
    assert "extrapolated" not in Result("a", 1.0, "s").as_json()
