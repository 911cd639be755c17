"""The schema of --json FILE, and that a report is written whatever happens."""

import contextlib
import copy
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kvtier.cli import machine
from kvtier.cli.results import Report, Result, check_json, measured, problems, results_table, write_json


def read(path: Path) -> Any:
    document = json.loads(path.read_text())
    assert problems(document) == []
    return document


def test_a_report_has_the_agreed_keys(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with Report("bench copy", str(path)) as report:
        report.add(measured("store", [10.0, 30.0, 20.0], "GB/s", [20.0, 20.0, 20.0]))
        report.checks["bytes"] = True
    document = read(path)
    assert list(document) == ["schema", "command", "commit", "machine", "results", "checks"]
    assert (document["schema"], document["command"]) == (1, "bench copy")
    assert document["results"] == [
        {
            "name": "store",
            "value": 20.0,
            "unit": "GB/s",
            "limit": 20.0,
            "ratio": 1.0,
            "n": 3,
            "min": 10.0,
            "max": 30.0,
        }
    ]
    assert document["checks"] == {"bytes": True, "completed": True}
    assert report.status == 0
    assert list(tmp_path.iterdir()) == [path]


def test_ratios_are_paired_and_more_is_better() -> None:
    rate = measured("rate", [1.0, 4.0, 9.0], "GB/s", [2.0, 4.0, 3.0])
    assert (rate.value, rate.limit, rate.ratio) == (4.0, 3.0, 1.0)
    time = measured("time", [1.0, 4.0, 9.0], "ms", [2.0, 4.0, 3.0])
    assert time.ratio == 1.0
    assert measured("time", [1.0], "s", [20.0]).ratio == 20.0
    assert measured("alone", [1.0], "s").ratio is None


def test_what_was_finished_is_written_when_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("what an earlier run left")
    with contextlib.suppress(KeyboardInterrupt), Report("demo", str(path)) as report:
        report.add(Result("ttft_cold", 1.5, "s"))
        raise KeyboardInterrupt
    document = read(path)
    assert [r["name"] for r in document["results"]] == ["ttft_cold"]
    assert document["checks"] == {"completed": False}


def test_a_failed_check_is_the_exit_status() -> None:
    report = Report("demo")
    report.checks["identical_logits"] = True
    assert report.status == 0
    report.checks["control_differs"] = False
    assert report.status == 1


def test_a_dash_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with Report("demo", "-") as report:
        print("for people", file=report.out)
    printed = capsys.readouterr()
    assert problems(json.loads(printed.out)) == []
    assert printed.err == "for people\n"


def test_a_missing_folder_shows_before_anything_runs(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="no such folder"),
        Report("demo", str(tmp_path / "no" / "x.json")),
    ):
        pytest.fail("must not run")


@pytest.mark.parametrize(
    ("name", "error"),
    [("no/x.json", FileNotFoundError), (".", IsADirectoryError), ("read-only/x.json", PermissionError)],
)
def test_a_file_that_cannot_be_written_is_known_before(
    tmp_path: Path, name: str, error: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "read-only").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "read-only")  # root may write
    with pytest.raises(error, match=f"--json {tmp_path / name}: "):
        check_json(str(tmp_path / name))
    for good in (None, "-", str(tmp_path / "x.json"), "x.json"):
        check_json(good)


def test_nothing_is_left_where_a_file_could_be_written(tmp_path: Path) -> None:
    check_json(str(tmp_path / "x.json"))
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_known_before_and_a_long_one_is_no_matter(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File name too long"):
        check_json(str(tmp_path / ("x" * 300)))
    longest = tmp_path / ("x" * 250 + ".json")
    with Report("demo", str(longest)):
        pass
    assert read(longest)["command"] == "demo"
    assert list(tmp_path.iterdir()) == [longest]


def test_of_a_symbolic_link_the_target_is_replaced(tmp_path: Path) -> None:
    target, link, nowhere = tmp_path / "there" / "x.json", tmp_path / "link", tmp_path / "nowhere"
    target.parent.mkdir()
    target.write_text("what an earlier run left")
    link.symlink_to(Path("there", "x.json"))
    nowhere.symlink_to(Path("there", "y.json"))
    for path in (link, nowhere):
        check_json(str(path))
        write_json(str(path), {"a": 1})
        assert path.is_symlink()
    for name in ("x.json", "y.json"):
        assert json.loads((target.parent / name).read_text()) == {"a": 1}
    assert len(list(target.parent.iterdir())) == 2


def test_a_pipe_is_opened_before_the_run_and_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    came: list[str] = []
    reader = threading.Thread(target=lambda: came.append(pipe.read_text()))
    reader.start()
    with Report("demo", str(pipe)) as report:
        report.add(Result("a", 1.0, "s"))
        report.save()  # of a pipe nothing can be replaced
    reader.join(30)
    assert [r["name"] for r in json.loads(came[0])["results"]] == ["a"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_stays_one(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_text("x")
    except OSError as error:
        pytest.skip(f"no device can be made here: {error}")
    check_json(str(device))
    write_json(str(device), {})
    assert stat.S_ISCHR(device.stat().st_mode)


def test_what_a_shell_has_opened_is_written_into(tmp_path: Path) -> None:
    code = "from kvtier.cli.results import *; check_json({0!r}); print('work'); write_json({0!r}, [1])"
    reading, writing = os.pipe()
    subprocess.run([sys.executable, "-c", code.format(f"/dev/fd/{writing}")], pass_fds=[writing], check=True)
    os.close(writing)
    with os.fdopen(reading) as file:
        assert json.load(file) == [1]
    out = tmp_path / "out"
    with out.open("w") as file:  # and no line is lost where it is standard output
        subprocess.run([sys.executable, "-c", code.format("/dev/stdout")], stdout=file, check=True)
    assert out.read_text().split() == ["work", "[", "1", "]"]


@pytest.mark.parametrize(
    ("path", "said"), [("/dev/fd/987", "Bad file descriptor"), ("/dev/stdin", "reading alone")]
)
def test_a_descriptor_that_cannot_be_written_is_known_before(path: str, said: str) -> None:
    code = f"from kvtier.cli.results import *; check_json({path!r})"
    done = subprocess.run([sys.executable, "-c", code], input="", capture_output=True, text=True, check=False)
    assert f"--json {path}: " in done.stderr
    assert said in done.stderr


def test_an_error_before_there_is_anything_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("what an earlier run left")
    with pytest.raises(ValueError, match="typing"), Report("bench index", str(path)):
        raise ValueError("a typing error")
    assert path.read_text() == "what an earlier run left"
    with contextlib.suppress(ValueError), Report("bench index", str(path)) as report:
        report.add(Result("a", 1.0, "s"))
        raise ValueError("the drive failed")
    assert read(path)["checks"] == {"completed": False}


def test_a_figure_that_is_no_number_costs_no_file(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(str(path), {"a": [float("inf"), 1.5], "b": {"c": float("nan")}})
    assert json.loads(path.read_text()) == {"a": ["inf", 1.5], "b": {"c": "nan"}}


def test_problems_are_found() -> None:
    report = Report("demo")
    report.add(Result("a", 1.0, "s"), Result("b", 2.0, "s"))
    good = json.loads(json.dumps(report.document()))
    assert problems(good) == []

    def broken(change: Any) -> list[str]:
        document = copy.deepcopy(good)
        change(document)
        return problems(document)

    assert problems([]) == ["not an object"]
    assert "keys" in broken(lambda d: d.pop("commit"))[0]
    assert "keys" in broken(lambda d: d.update(more=1))[0]
    assert "schema" in broken(lambda d: d.update(schema=2))[0]
    assert "machine" in broken(lambda d: d.update(machine=[]))[0]
    assert "ok" in broken(lambda d: d["checks"].update(ok=1))[0]
    assert "value" in broken(lambda d: d["results"][0].update(value="1"))[0]
    assert "value" in broken(lambda d: d["results"][0].update(value=None))[0]
    assert "other keys" in broken(lambda d: d["results"][0].pop("ratio"))[0]
    assert "twice" in broken(lambda d: d["results"][1].update(name="a"))[0]


def test_the_machine_is_described() -> None:
    facts = machine.facts()
    json.dumps(facts)
    assert facts["cores"] >= 1
    assert 0 < facts["memory_available_bytes"] <= facts["memory_bytes"]
    assert facts["versions"]["kvtier"]
    assert facts["cpu"] in machine.describe(facts)
    assert machine.commit()


def test_the_table_has_a_line_for_each_result() -> None:
    lines = results_table([Result("lookup", 1.25, "ms"), Result("rate", 12345.6, "GB/s")], {"rate": "much"})
    assert [line.split()[0] for line in lines.splitlines()] == ["name", "lookup", "rate"]
    assert "12346" in lines
    assert "much" in lines
