"""`kvtier bench peers`: real processes, small amounts; a side that fails costs a reason and nothing else."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from kvtier.cli import bench_peers, main, peer_list, peer_tables, plots
from kvtier.cli.peer_list import KVTIER, PEERS, Peer
from kvtier.cli.peer_side import Side, SideError
from kvtier.cli.results import Report, Result, problems

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "benchmarks" / "peers"
MIB = 8
STEPS = ("lookup", "store_evicting_16", "store_evicting_at_once")

# A peer that keeps values in a dict and files, and does wrong what it is told to.
FAKE = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import numpy as np
from harness import Store, keys_of, serve

class Fake(Store):
    packages = ("numpy", "no-such-package")

    def open(self, home, size, blocks, capacity, options):
        self.home, self.options = home, options | dict.fromkeys(sys.argv[1:], True)
        if self.options.get("forgets"):
            for path in home.iterdir():
                path.unlink()
        return {{"config": "a file a value"}}
    def _path(self, key):
        return self.home / key.hex()
    def put(self, keys):
        if self.options.get("hangs"):
            import time
            time.sleep(600)
        if self.options.get("dies"):
            sys.stderr.write("out of luck\\n")
            sys.stderr.flush()
            import os
            os._exit(3)
        for i, key in enumerate(keys):
            if i == 1 and self.options.get("loses"):
                continue
            self._path(key).write_bytes(self.pages.source[i].tobytes())
    def get(self, keys):
        there = [self._path(key).exists() and self._path(key).stat().st_size > 0 for key in keys]
        for i, key in enumerate(keys):
            if there[i]:
                self.pages.target[i] = np.frombuffer(self._path(key).read_bytes(), np.uint8)
        if self.options.get("lies"):
            self.pages.target[0, 5] ^= 1
        return there
    def found(self, keys):
        return sum(self._path(key).exists() for key in keys)
    def forget(self, keys):
        for key in keys:
            self._path(key).unlink(missing_ok=True)
    def close(self):
        pass
    def lose_holder(self):
        for path in self.home.iterdir():
            path.write_bytes(b"")
    def steps_open(self, count, options):
        self.present = dict.fromkeys(keys_of(-1, count))
    def steps(self, number):
        import time
        begin = time.perf_counter()
        found = sum(key in self.present for key in list(self.present))
        assert found == len(self.present)
        took = time.perf_counter() - begin
        return {{"lookup": took, "store_evicting_16": 10 + took, "store_evicting_at_once": 20 + took}}

serve(Fake)
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake peers beside the real ones, in this test's own environment."""
    script = tmp_path / "fake_side.py"
    script.write_text(FAKE)
    fake = {
        name: Peer(name, f"a fake that {name}", "kvtier", (str(script),), options={name: True})
        for name in ("works", "lies", "dies", "hangs")
    }
    fake["works"] = Peer("works", "a fake", "kvtier", (str(script),), steps=STEPS[:1], holder=True)
    fake["counts"] = Peer(
        "counts",
        "a fake that moves nothing",
        "kvtier",
        (str(script),),
        tier="host",
        steps=STEPS,
        moves=(),
        survives=False,
    )
    fake["absent"] = Peer(
        "absent", "needs what is not there", "kvtier", (str(script),), program="no-such-program"
    )
    monkeypatch.setattr(bench_peers, "PEERS", tuple(fake.values()))
    monkeypatch.setattr(bench_peers, "_SECONDS_BEFORE_KILL", 0.1)
    monkeypatch.setattr(bench_peers, "SIZES", {"2MiB": 2 << 20})
    monkeypatch.setattr(bench_peers, "_KEYS", 1024)
    monkeypatch.setattr(bench_peers, "_SLACK_BYTES", 32 << 20)  # the cap is below what is put
    monkeypatch.setattr("kvtier.cli.bench_lock.lock_file", lambda: tmp_path / "lock")
    return tmp_path


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what kvtier does after ends and flipped bits; one test looks at that."""
    monkeypatch.setattr(bench_peers, "KVTIER", replace(KVTIER, survives=False, bounded=False))


def run(folder: Path, *words: str) -> tuple[int, Any]:
    out = folder / "out.json"
    options = ["--dir", str(folder), "--mib", str(MIB), "--rounds", "1", "--json", str(out)]
    status = main(["bench", "peers", *options, *words])
    document = json.loads(out.read_text())
    assert problems(document) == []
    return status, document


def test_rows_of_both_sides_and_their_ratios(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = run(fakes, "--only", "works", "--only", "counts")
    assert status == 0
    of = {result["name"]: result for result in document["results"]}
    rows = [("works", "put/2MiB"), ("works", "get/2MiB"), ("works", "lookup/1024"), ("counts", "lookup/1024")]
    for peer, what in rows:
        ours, theirs = of[f"kvtier/{what}/{peer}"], of[f"{peer}/{what}"]
        ratio = of[f"kvtier/{what}/{peer}/ratio"]
        assert ours["limit"] == theirs["value"] > 0
        assert ratio["min"] <= ratio["value"] == ours["ratio"] <= ratio["max"]
    for what in ("put/2MiB", "get/2MiB"):  # both beside the machine's own
        plain = of[f"machine/{what}/works"]["value"]
        assert of[f"works/{what}"]["limit"] == plain > 0
        share = of[f"kvtier/{what}/works"]["value"] / plain
        assert of[f"kvtier/{what}/works/of_machine"]["value"] == pytest.approx(share)  # one round
    # Ours with the bytes copied stands beside the peer's index work, and under its own name.
    for what in STEPS[1:]:
        theirs = of[f"counts/{what}/1024"]["value"]
        assert of[f"kvtier/{what}/1024/counts"]["limit"] == theirs
        assert of[f"kvtier/{what}_copied/1024/counts"]["limit"] == theirs
        assert f"counts/{what}_copied/1024" not in of
    assert document["machine"]["skipped"] == document["machine"]["wrong_bytes"] == {}
    peers = document["machine"]["peers"]
    for name in ("works", "counts"):  # opened for values, and for index work alone
        assert peers[name]["versions"] == {"numpy": version("numpy")}
    assert peers["kvtier"]["versions"]["kvtier"] == version("kvtier")
    memory = peers["works"]["huge_pages"]["2MiB"]
    assert set(memory) == {"kvtier", "works"}
    assert all(side["mib"] >= 2 * MIB and 0 <= side["in_huge_pages"] <= 1 for side in memory.values())
    # kvtier beside itself alone: nothing is lost, nothing wrong is served, and the cap holds.
    for end in ("killed", "closed"):
        assert of[f"kvtier/restart/2MiB/{end}"]["value"] == 100
        assert of[f"works/restart/2MiB/{end}"]["value"] == 100
        took = f"restart/2MiB/{end}_seconds"
        for name in (f"kvtier/{took}", f"works/{took}", f"kvtier/{took}/works", f"kvtier/{took}/works/ratio"):
            assert of[name]["n"] == 3
            assert 0 < of[name]["min"] <= of[name]["value"] <= of[name]["max"]
        ratio = of[f"kvtier/{took}/works/ratio"]["value"]  # more is better, of a time too
        assert ratio == of[f"kvtier/{took}/works"]["ratio"]
    assert of["works/holder_killed/2MiB/found"]["value"] == 100
    assert of["works/holder_killed/2MiB"]["value"] == 0
    assert of["kvtier/bitflip/2MiB"]["value"] == 0
    assert of["works/bitflip/2MiB"]["value"] == of["works/bitflip/2MiB"]["n"] == 3
    assert of["kvtier/cap/2MiB"]["value"] <= 1
    assert of["kvtier/cap/2MiB/newest"]["value"] == 100
    checks = {"kvtier_bytes", "kvtier_ran", "kvtier_misses_only_flipped", "kvtier_restarts"}
    assert document["checks"] == dict.fromkeys(checks | {"kvtier_within_cap", "completed"}, True)
    text = capsys.readouterr().out
    assert "3 of 3 served wrong" in text
    assert "store_evicting_16_copied 1024" in text
    assert "restart 2MiB/killed_seconds" in text
    assert "it says that 100 % are there; 0 % can be read" in text
    assert str(fakes) not in (fakes / "out.json").read_text()


@pytest.mark.usefixtures("brief")
def test_wrong_bytes_are_reported_and_not_timed(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = run(fakes, "--only", "lies")
    names = {result["name"] for result in document["results"]}
    assert not any(name.startswith(("lies/put", "lies/get", "kvtier/put", "kvtier/get")) for name in names)
    assert set(document["machine"]["wrong_bytes"]) == {"lies/get/2MiB", "lies/restart/2MiB"}
    assert "WRONG BYTES: lies/get/2MiB: 1 of 4 values" in capsys.readouterr().out
    assert status == 0  # they are wrong, not we


@pytest.mark.usefixtures("brief")
def test_what_fails_is_left_out_with_its_reason(fakes: Path) -> None:
    _, document = run(fakes, "--only", "dies", "--only", "absent")
    skipped = document["machine"]["skipped"]
    assert skipped["absent"] == "no-such-program is not installed"
    assert skipped["dies/2MiB"] == "put: it ended: status 3, out of luck"
    assert document["checks"]["completed"]


@pytest.mark.usefixtures("brief")
def test_of_what_hangs_nothing_else_is_tried(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = Side.ask

    def hurried(side: Side, op: str, **arguments: Any) -> dict[str, Any]:
        if op == "put" and "fake_side" in str(side._process.args):
            side._patience = 2
        asked.append(op)
        return ask(side, op, **arguments)

    monkeypatch.setattr(Side, "ask", hurried)
    _, document = run(fakes, "--only", "hangs")
    skipped = document["machine"]["skipped"]
    assert skipped["hangs/2MiB"].startswith("put: no answer in 2 s")
    assert {skipped[f"hangs/restart/{end}"] for end in ("killed", "closed")} == {"it hung before"}
    assert asked.count("open") == 2  # ours and the peer's, once
    assert document["checks"]["completed"]


def test_wrong_bytes_of_our_own_fail_the_run(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = fakes / "fake_side.py"
    monkeypatch.setattr(
        bench_peers, "KVTIER", Peer("kvtier", "lies", "kvtier", (str(script),), options={"lies": True})
    )
    status, document = run(fakes, "--only", "absent")
    assert status == 1
    assert document["checks"]["kvtier_bytes"] is False


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, *faults: str, behaves: bool = True) -> None:
    """A fake as kvtier, with these faults."""
    script = (str(folder / "fake_side.py"), *faults)
    ours = Peer("kvtier", "a fake", "kvtier", script, survives=behaves, bounded=behaves)
    monkeypatch.setattr(bench_peers, "KVTIER", ours)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("dies", "put: it ended: status 3, out of luck"),
        ("hangs", "put: no answer in 2 s, killed"),
        ("loses", "get: kvtier had 3 of 4 values that were just put"),
    ],
)
def test_what_kvtier_fails_at_fails_the_run_and_is_not_the_peers(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    ask = Side.ask

    def hurried(side: Side, op: str, **arguments: Any) -> dict[str, Any]:
        if fault == "hangs" and op == "put" and side.name == "kvtier":
            side._patience = 2
        return ask(side, op, **arguments)

    monkeypatch.setattr(Side, "ask", hurried)
    stand_in(monkeypatch, fakes, fault, behaves=False)
    status, document = run(fakes, "--only", "works")
    assert status == 1
    assert document["checks"]["kvtier_ran"] is False
    assert document["machine"]["skipped"]["works/2MiB"] == f"kvtier itself: {said}"
    assert not [r["name"] for r in document["results"] if "put/" in r["name"] or "get/" in r["name"]]
    # What the peer is looked at for alone is measured, unless waiting for kvtier took all the patience.
    restarted = "works/restart/2MiB/killed" in {r["name"] for r in document["results"]}
    assert restarted == (fault != "hangs")


@pytest.mark.usefixtures("brief")
def test_what_is_gone_after_an_end_is_looked_for_once(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgets = Peer("forgets", "a fake", "kvtier", (str(fakes / "fake_side.py"), "forgets"), moves=())
    monkeypatch.setattr(bench_peers, "PEERS", (replace(forgets, bounded=False),))
    opened: list[str] = []
    ask = Side.ask

    def noted(side: Side, op: str, **arguments: Any) -> dict[str, Any]:
        opened.extend([op] * (op == "open"))
        return ask(side, op, **arguments)

    monkeypatch.setattr(Side, "ask", noted)
    _, document = run(fakes, "--only", "forgets")
    of = {result["name"]: result["value"] for result in document["results"]}
    assert of == {"forgets/restart/2MiB/killed": 0, "forgets/restart/2MiB/closed": 0}
    assert len(opened) == 4  # for each end once to put and once to look


def test_what_kvtier_loses_in_a_restart_and_puts_past_its_cap_fails_the_run(
    fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, fakes, "forgets")
    status, document = run(fakes, "--only", "absent")
    assert status == 1
    checks = document["checks"]
    assert (checks["kvtier_ran"], checks["kvtier_restarts"], checks["kvtier_within_cap"]) == (
        True,
        False,
        False,
    )


@pytest.mark.usefixtures("brief")
def test_a_peer_that_is_named_twice_is_measured_once(fakes: Path) -> None:
    _, document = run(fakes, "--only", "counts", "--only", "counts")  # run() looks for names that are twice
    assert [r["name"] for r in document["results"]].count("counts/lookup/1024") == 1


def harness() -> Any:
    """What the sides have in common, as a module."""
    spec = importlib.util.spec_from_file_location("peers_harness", SCRIPTS / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_buffers_of_a_side_are_in_huge_pages() -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this machine gives no transparent huge pages")
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import harness, json\n"
        "memory = harness.Memory(); kept = harness.huge_buffer(64 << 20)\n"
        "print(json.dumps(memory.grown()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["mib"] >= 64
    assert found["in_huge_pages"] > 0.9


def test_asking_what_is_there_is_timed_without_the_harness_own_work(tmp_path: Path) -> None:
    module = harness()

    class Empty(module.Store):  # type: ignore[name-defined,misc]
        def open(self, *_: Any) -> dict[str, Any]:
            return {}

        def found(self, keys: list[bytes]) -> int:
            return 0

    server = module.Server(Empty)
    server.op_open(str(tmp_path), 4096, 2, 0, 1, on_disk=False, options={})
    stamp = server.store.pages.stamp
    server.store.pages.stamp = lambda number: (time.sleep(0.3), stamp(number))
    assert server.op_found(7)["seconds"] < 0.3


def test_versions_of_redis_are_the_clients_and_the_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = tmp_path / "redis-server"
    server.write_text("#!/bin/sh\necho 'Redis server v=7.1.2 sha=00000000:0 malloc=libc bits=64'\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import kv_side; print(kv_side.Redis().versions())"
    )
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, check=True)
    assert "'redis-server': '7.1.2'" in done.stdout


@pytest.mark.usefixtures("brief")
def test_interrupted_it_leaves_what_was_finished_and_no_process(
    fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []
    ask = Side.ask

    def interrupted(side: Side, op: str, **arguments: Any) -> dict[str, Any]:
        pids.append(side._process.pid)
        if op == "steps_open":
            raise KeyboardInterrupt
        return ask(side, op, **arguments)

    monkeypatch.setattr(Side, "ask", interrupted)
    status, document = run(fakes, "--only", "works")
    assert status == 130
    assert document["checks"]["completed"] is False
    assert any(result["name"] == "works/put/2MiB" for result in document["results"])
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not list(fakes.glob("kvtier-peers.*"))


def test_a_side_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, file=sys.stderr, flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    with (
        Side([sys.executable, "-c", program], log, patience=2) as side,
        pytest.raises(SideError, match="put: no answer in 2 s, killed"),
    ):
        side.ask("put")
    child = int(log.read_text())
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "Z" not in _state(child):
        assert time.monotonic() < until
        time.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_an_unknown_peer_is_refused(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "peers", "--only", "nobody", "--dir", str(fakes)]) == 1
    assert "--only nobody: allowed: works, lies" in capsys.readouterr().err


def test_list_measures_nothing(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "peers", "--list", "--dir", str(fakes)]) == 0
    assert "missing: no-such-program is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("peer", [*PEERS, KVTIER], ids=lambda peer: peer.name)
def test_every_peer_has_its_script_and_pinned_requirements(peer: Peer) -> None:
    assert (SCRIPTS / peer.script[0]).is_file()
    if peer.environment in ("kvtier", "vllm"):
        return
    lines = peer_list.requirements_of(peer.environment, ROOT).read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all("==" in line for line in pins)
    assert not any(line.lower().startswith(("nvidia", "cuda", "cupy")) for line in pins)


def test_an_environment_that_does_not_install_costs_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("./there/is/nothing-1.0-py3-none-any.whl\n")
    monkeypatch.setattr(peer_list, "requirements_of", lambda environment, root: requirements)
    peer = Peer("broken", "", "broken", ("kv_side.py",))
    with pytest.raises(SideError, match="does not install"):
        peer_list.python_of(peer, ROOT, tmp_path / "cache")
    assert not (peer_list.environment_folder("broken", ROOT, tmp_path / "cache") / ".ready").exists()


def test_where_we_are_behind_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("bench peers")
    for name, value, unit in (
        ("other/get/2MiB", 4.0, "GB/s"),
        ("kvtier/get/2MiB/other", 3.0, "GB/s"),
        ("kvtier/get/2MiB/other/ratio", 0.75, "x"),
        ("other/restart/2MiB/killed_seconds", 0.1, "s"),
        ("kvtier/restart/2MiB/killed_seconds/other", 0.2, "s"),
        ("kvtier/restart/2MiB/killed_seconds/other/ratio", 0.012, "x"),
    ):
        report.add(Result(name, value, unit, n=3, min=value / 2, max=2 * value))
    peer_tables.print_tables(report)
    text = capsys.readouterr().out
    assert "behind: get/2MiB/other (0.75 x), restart/2MiB/killed_seconds/other (0.012 x)" in text
    assert "0.38-1.50" in text
    assert "of reference: the peer's and kvtier's rate over that of plain calls" in text


def test_the_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = Report("bench peers")
    for peer in ("a", "b"):
        report.add(Result(f"kvtier/get/2MiB/{peer}/ratio", 2.0, "x", n=3, min=1.0, max=3.0))
    path = tmp_path / "plot.png"
    plots.check(str(path))
    peer_tables.plot(report, str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_environments_are_kept_below_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "cache")
    assert peer_list.default_cache() == Path("/cache/kvtier/peers")
