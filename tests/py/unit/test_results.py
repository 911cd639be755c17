"""The schema of --json FILE, and that a report is written whatever happens."""

import contextlib
import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvtier.cli import machine
from kvtier.cli.results import Report, Result, check_json, measured, problems, results_table


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
