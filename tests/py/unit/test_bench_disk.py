"""`kvtier bench disk` and `bench reopen`: what failed its check has no figure. Sizes that measure nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.cli import bench_disk, bench_reopen, main
from kvtier.cli.results import problems

ENCRYPTED = {"read_encrypted", "write_encrypted"}


@pytest.fixture(autouse=True)
def _without_fio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_disk.shutil, "which", lambda name: name)
    monkeypatch.setattr(bench_disk, "_fio_version", lambda: "none")
    monkeypatch.setattr(bench_disk, "_fio", lambda *_: (1 << 24, 0.01, 0.01))
    monkeypatch.setattr(bench_disk, "SIZES", {"2MiB": 2 << 20})
    monkeypatch.setattr("kvtier.cli.bench_lock.lock_file", lambda: tmp_path / "lock")


def run(folder: Path, *words: str) -> tuple[int, Any, set[str]]:
    out = folder / "out.json"
    status = main(["bench", *words, "--dir", str(folder), "--rounds", "1", "--json", str(out)])
    document = json.loads(out.read_text())
    assert problems(document) == []
    return status, document, {result["name"] for result in document["results"]}


def disk(folder: Path) -> tuple[int, Any, set[str]]:
    return run(folder, "disk", "--mib", "16", "--pairs", "1", "--depth", "4", "--blocks", "8")


class Faulty:
    """A DiskBench that finds a bad block in every read of the folders `where`."""

    real = bench_disk.DiskBench
    where: tuple[str, ...] = ()

    def __init__(self, **options: Any) -> None:
        self._bench = self.real(**options)
        self._bad = Path(options["path"]).name in self.where

    def about(self) -> Any:
        return self._bench.about()

    def read(self, order: Any) -> Any:
        took, cpu, good, flush = self._bench.read(order)
        return took, cpu, good - self._bad, flush

    def write(self, order: Any, rounds: int) -> Any:
        return self._bench.write(order, rounds)

    def close(self) -> None:
        self._bench.close()


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:
    monkeypatch.setattr(bench_disk, "DiskBench", Faulty)
    return Faulty


def same_engine(document: Any) -> bool:
    """Whether this machine has what fio is held against; without it there are no such rows anyway."""
    return bool(document["checks"]["same_engine"])


def test_all_that_is_right_is_reported_with_how_it_was_measured(tmp_path: Path) -> None:
    _, document, names = disk(tmp_path)
    checks = {name: passed for name, passed in document["checks"].items() if name != "same_engine"}
    assert set(checks.values()) == {True}
    assert {*ENCRYPTED, "load_to_device"} <= names
    assert ("read_2MiB" in names) == ("write_2MiB_flush" in names) == same_engine(document)
    method = document["machine"]["method"]
    assert "--pairs" in method["repetitions"]
    assert "fio" in method["limit"]


@pytest.mark.parametrize(
    ("where", "missing"),
    [
        ("2MiB", {"read_2MiB", "read_2MiB_ratio", "read_2MiB_noise", "read_2MiB_cpu"}),
        ("secret", ENCRYPTED),
        ("limit", {"load_to_device"}),
    ],
)
def test_what_had_a_bad_block_has_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: type[Faulty], where: str, missing: set[str]
) -> None:
    monkeypatch.setattr(faulty, "where", (where,))
    status, document, names = disk(tmp_path)
    assert status == 1
    assert document["checks"]["blocks_good"] is False
    assert names & missing == set()
    assert {*ENCRYPTED, "load_to_device"} - missing <= names  # the other parts have theirs
    if same_engine(document):
        assert "write_2MiB" in names


@pytest.mark.parametrize("layer", [0, 17])
def test_a_load_with_wrong_bytes_has_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    loaded = bench_disk._loaded

    def flipped(memory: Any, source: Any, n: int) -> bool:
        memory[layer, 1, 3, 0, 0, 0] ^= np.uint16(1)
        return loaded(memory, source, n)

    monkeypatch.setattr(bench_disk, "_loaded", flipped)
    status, document, names = disk(tmp_path)
    assert status == 1
    assert document["checks"]["bytes"] is False
    assert "load_to_device" not in names
    assert names >= ENCRYPTED


def test_of_another_engine_than_fios_nothing_is_held_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: type[Faulty]
) -> None:
    monkeypatch.setattr(
        faulty, "about", lambda self: self._bench.about() | {"queue": "threads", "direct_io": True}
    )
    status, document, names = disk(tmp_path)
    assert status == 1
    assert not same_engine(document)
    assert names == {*ENCRYPTED, "load_to_device"}


class TestReopen:
    BLOCKS = ("reopen", "--blocks", "1500")

    def test_every_kind_has_its_figure_and_says_how(self, tmp_path: Path) -> None:
        status, document, names = run(tmp_path, *self.BLOCKS)
        assert status == 0
        assert names == {"reopen_warm", "reopen_cold", "rebuild"}
        method = document["machine"]["method"]
        assert "no block is loaded" in method["lossless"]
        assert method["limit"].startswith("none")
        assert "in turn" not in method["repetitions"]

    def test_a_kind_that_did_not_find_all_has_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reopen = bench_reopen._reopen

        def others(kind: str, config: Any, home: Path, keys: Any, report: Any) -> Any:
            return reopen(kind, config, home, keys ^ np.uint8(kind == "cold"), report)

        monkeypatch.setattr(bench_reopen, "_reopen", others)
        status, document, names = run(tmp_path, *self.BLOCKS)
        assert status == 1
        assert document["checks"]["all_blocks_ready"] is False
        assert names == {"reopen_warm", "rebuild"}
