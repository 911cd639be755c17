"""kvtier verify, inspect, purge and doctor --disk; the control socket of a live engine."""

import errno
import itertools
import json
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier import Config, Disk, KVLayout, StorageError, Tier, control, stores
from kvtier.cli import main
from kvtier.cli.results import problems
from kvtier.control import ControlServer, ask_for_hits, ask_to_purge
from kvtier.keys import Keys

LAYOUT = KVLayout(2, 2, 8, "float16", 4)
PATIENCE = 30.0


def config_of(path: Path, **changed: Any) -> Config:
    values: dict[str, Any] = {
        "groups": [LAYOUT],
        "block_tokens": 8,
        "host": "1MiB",
        "chunk": "1MiB",
        "model": "m@1",
        "copy_threads": 1,
        "disk": Disk(str(path / "disk"), "8MiB"),
        "disk_commit_seconds": 0.01,
        "disk_write_budget": "unlimited",
    }
    return Config(**{**values, **changed})


def keys_of(config: Config, namespace: str = "") -> Keys:
    return kvtier.block_keys(np.arange(64), config, namespace=namespace)


def fill(engine: kvtier.Engine, namespace: str) -> Keys:
    """Stores eight blocks and waits until they are durable."""
    deadline = threading.Event()
    for _ in range(5000):
        if all(c.usable == c.capacity for disk in engine.stats().disks for c in disk.classes):
            break
        deadline.wait(0.002)
    data = np.random.default_rng(0).integers(0, 1 << 16, (2, 16, 2, 4, 2, 8), np.uint16)
    pages = engine.attach(list(data.view(np.float16)))
    keys = keys_of(engine.config, namespace)
    ticket = engine.store(keys, pages, range(16), namespace=namespace)
    ticket.durable.wait(PATIENCE)
    assert ticket.durable_blocks == 8
    pages.detach(PATIENCE)
    return keys


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a disk with eight blocks of tenant a and eight of b; nobody has it open."""
    config = config_of(tmp_path)
    with kvtier.open(config) as engine:
        fill(engine, "a")
        fill(engine, "b")
    return config


def directory(config: Config) -> str:
    return config.disks[0].path


def store_of(config: Config) -> Path:
    (store,) = (Path(directory(config)) / "stores").iterdir()
    return store


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    status = main([*argv, "--json", "-"])
    document = json.loads(capsys.readouterr().out)
    assert problems(document) == []
    assert all(document["checks"].values()) == (status == 0)
    return status, document["machine"][argv[0]]


def damage(config: Config, change: Callable[[bytearray], None]) -> None:
    file = store_of(config) / "slots.0"
    image = bytearray(file.read_bytes())
    change(image)
    file.write_bytes(image)


def first_block(image: bytearray) -> int:
    return image.index(b"\x89KVSLOT\n")


def snapshot(config: Config) -> dict[str, bytes]:
    root = Path(directory(config))
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- verify -------------------------------------------------------------------------------------------


def test_verify_counts_every_slot_and_changes_nothing(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(config)
    status, found = run(["verify", directory(config)], capsys)
    assert status == 0
    assert (found["good"], found["corrupt"], found["foreign"]) == (16, 0, 0)
    assert 16 + found["free"] == (store_of(config) / "slots.0").stat().st_size // 8192
    assert snapshot(config) == before


def flip_payload(image: bytearray) -> None:
    image[first_block(image) + 4096 + 17] ^= 1


def flip_header(image: bytearray) -> None:
    image[first_block(image) + 100] ^= 1


def move_block(image: bytearray) -> None:
    at = first_block(image)
    image[-8192:] = image[at : at + 8192]


@pytest.mark.parametrize(
    ("change", "name", "good"),
    [(flip_payload, "corrupt", 15), (flip_header, "corrupt", 15), (move_block, "foreign", 16)],
)
def test_verify_finds_what_is_wrong(
    config: Config,
    change: Callable[[bytearray], None],
    name: str,
    good: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(config, change)
    status, found = run(["verify", directory(config)], capsys)
    assert status == 1
    assert (found["good"], found[name], found["corrupt"] + found["foreign"]) == (good, 1, 1)


def test_verify_names_a_store_without_a_superblock(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    (store_of(config) / "superblock").write_bytes(b"x" * 4096)
    status, found = run(["verify", directory(config)], capsys)
    assert status == 1
    assert found["stores"][0]["not_read"] == "its superblock cannot be read"


def test_verify_passes_over_stores_in_use_unless_told(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with kvtier.open(config):
        status, found = run(["verify", directory(config)], capsys)
        assert (status, found["good"]) == (0, 0)
        assert found["stores"][0]["not_read"] == "a process has it open"
        status, found = run(["verify", directory(config), "--live"], capsys)
        assert (status, found["good"]) == (0, 16)


def test_verify_proves_encrypted_blocks_with_their_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_text("17" * 32)
    other.write_text("18" * 32)
    config = config_of(tmp_path, disk_key=str(key))
    with kvtier.open(config) as engine:
        fill(engine, "a")
    for option, good in (([], 0), (["--key", str(other)], 0), (["--key", f"{other},{key}"], 8)):
        status, found = run(["verify", directory(config), *option], capsys)
        assert status == 0
        assert (found["good"], found["unreadable"]) == (good, 8 - good)
    damage(config, flip_payload)
    status, found = run(["verify", directory(config), "--key", str(key)], capsys)
    assert (status, found["good"], found["corrupt"]) == (1, 7, 1)


@pytest.mark.parametrize("what", ["missing", "file", "empty"])
def test_verify_of_what_is_no_disk_is_status_2(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / what
    if what == "file":
        path.write_text("mine")
    elif what == "empty":
        path.mkdir(mode=0o700)
    assert main(["verify", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    assert not path.is_dir() or list(path.iterdir()) == []
    assert what != "missing" or not path.exists()


@pytest.mark.parametrize(
    ("command", "status"), [(["verify"], 2), (["inspect"], 1), (["purge", "--namespace", "a"], 1)]
)
def test_a_json_file_without_a_folder_is_known_before_anything_is_done(
    command: list[str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stores, command[0], lambda *_, **__: pytest.fail("must not begin"))
    out = tmp_path / "no" / "x.json"
    assert main([*command, str(tmp_path), "--json", str(out)]) == status
    printed = capsys.readouterr()
    assert printed.err == f"kvtier {command[0]}: --json {out}: there is no such folder\n"
    assert printed.out == ""


def test_verify_that_cannot_write_what_it_found_does_not_call_it_corrupt(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kvtier.cli.verify.write_json", full)
    assert main(["verify", directory(config), "--json", str(tmp_path / "x.json")]) == 2
    assert "kvtier verify: [Errno 28] No space left" in capsys.readouterr().err


# --- inspect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["catalog", "headers", "in use"])
def test_inspect_says_what_is_there(config: Config, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    if source == "headers":
        (store_of(config) / "catalog.mdb").unlink()
    engine = kvtier.open(config) if source == "in use" else None
    before = snapshot(config)
    status, found = run(["inspect", directory(config)], capsys)
    assert snapshot(config) == before
    if engine is not None:
        assert engine.lookup(keys_of(config, "a")).ready_blocks == 8
        engine.close()
    assert status == 0
    assert found["capacity_bytes"] == 8 << 20
    (store,) = found["stores"]
    assert store["source"].startswith("headers" if source == "headers" else "catalog")
    assert store["in_use"] is (source == "in use")
    assert (store["blocks"], store["payload_bytes"]) == (16, 16 * 1024)
    tags = {stores.namespace_tag(name): {"blocks": 8, "bytes": 8192} for name in ("a", "b")}
    assert store["namespaces"] == tags
    assert store["depths"] == {"0": 2, "1": 2, "2": 4, "4": 8}
    assert (store["ages"] is None) is (source == "headers")


def test_inspect_shows_the_hits_of_the_engine_that_has_it_open(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    (store,) = stores.inspect(directory(config))["stores"]
    assert store["hits"] is None  # nobody has it open
    with kvtier.open(config) as engine:
        (store,) = stores.inspect(directory(config))["stores"]
        assert store["hits"] == {"read": 0, "lookup_blocks": 0, "lookup_hits_host": 0, "lookup_hits_disk": 0}
        keys = keys_of(config, "a")
        engine.lookup(keys)
        engine.prefetch(keys[:3]).wait(PATIENCE)
        engine.lookup(keys)
        (store,) = run(["inspect", directory(config)], capsys)[1]["stores"]
        hits = {"read": 3, "lookup_blocks": 16, "lookup_hits_host": 3, "lookup_hits_disk": 13}
        assert store["hits"] == hits
        assert main(["inspect", directory(config)]) == 0
        printed = capsys.readouterr().out
        assert printed.splitlines()[2].split()[-2:] == ["hits", "from"]
        assert [line.split()[-3:] for line in printed.splitlines() if line.endswith(" 13")] == [
            ["16", "3", "13"]
        ]


def test_inspect_goes_on_where_the_engine_does_not_answer(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with kvtier.open(config):
        (store_of(config) / "control").unlink()
        (store,) = run(["inspect", directory(config)], capsys)[1]["stores"]
        assert (store["in_use"], store["hits"], store["blocks"]) == (True, None, 16)
        assert main(["inspect", directory(config)]) == 0
        assert " unknown " in capsys.readouterr().out


def test_inspect_prints_names_that_it_is_told(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", directory(config), "--namespace", "a"]) == 0
    said = capsys.readouterr().out
    assert "'a'" in said
    assert f"tag {stores.namespace_tag('b')}" in said


def test_the_documentation_names_every_field_of_the_json(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "disk.md").read_text()
    said = set(re.findall(r"`(\w+)`", text.partition("### `--json FILE`")[2].partition("## Purging")[0]))
    with kvtier.open(config):
        for command in (["verify", "--live"], ["inspect"], ["purge", "--namespace", "a"]):
            _, found = run([command[0], directory(config), *command[1:]], capsys)
            (store,) = found["stores"]
            assert {*found, *store, *(store.get("hits") or ()), *(store.get("ages") or ())} <= said


# --- purge --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("catalog", ["catalog", "headers"])
def test_a_purged_tenant_stays_away_after_a_restart(
    config: Config, catalog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, purged = run(["purge", directory(config), "--namespace", "a"], capsys)
    assert (status, purged["dropped"]) == (0, 8)
    if catalog == "headers":
        (store_of(config) / "catalog.mdb").unlink()
    assert run(["verify", directory(config)], capsys)[1]["good"] == 8
    with kvtier.open(config) as engine:
        assert engine.stats().disks[0].opened_from.startswith(catalog)
        assert engine.lookup(keys_of(config, "a")).tiers().tolist() == [Tier.NONE] * 8
        assert engine.lookup(keys_of(config, "b")).tiers().tolist() == [Tier.DISK] * 8


def test_everything_is_purged(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    damage(config, flip_header)
    assert run(["purge", directory(config), "--all"], capsys)[1]["dropped"] == 16
    status, found = run(["verify", directory(config)], capsys)
    assert (status, found["good"], found["corrupt"]) == (0, 0, 0)


def test_a_live_engine_purges_for_us(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with kvtier.open(config) as engine:
        status, purged = run(["purge", directory(config), "--namespace", "a"], capsys)
        assert (status, purged["dropped"]) == (0, 8)
        assert purged["stores"][0]["in_use"] is True
        assert engine.lookup(keys_of(config, "a")).ready_blocks == 0
        assert engine.lookup(keys_of(config, "b")).ready_blocks == 8
        status, purged = run(["purge", directory(config), "--all"], capsys)
        assert (status, purged["dropped"]) == (1, 0)
    (store_of(config) / "catalog.mdb").unlink()
    with kvtier.open(config) as engine:
        assert engine.lookup(keys_of(config, "a")).ready_blocks == 0


@pytest.mark.parametrize("argv", [[], ["--namespace", "a", "--all"]])
def test_purge_wants_to_know_what(config: Config, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["purge", directory(config), *argv])
    assert ended.value.code == 2


# --- the control socket -------------------------------------------------------------------------------


def hits_of(store: Path) -> dict[str, int]:
    return {"read": len(store.name)}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ControlServer]:
    def purge(namespace: str) -> int:
        if namespace == "bad":
            raise StorageError(5, "the drive failed")
        return len(namespace)

    server = ControlServer([tmp_path], purge, hits_of)
    yield server
    server.close(PATIENCE)


def ask(path: Path, line: bytes) -> Any:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(path / "control"))
        connection.sendall(line)
        return json.loads(connection.makefile("rb").readline())


def test_the_socket_is_its_owners_alone(tmp_path: Path, server: ControlServer) -> None:
    mode = (tmp_path / "control").lstat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_a_purge_is_asked_for_and_answered(tmp_path: Path, server: ControlServer) -> None:
    assert ask_to_purge(tmp_path, "four", PATIENCE) == 4
    with pytest.raises(StorageError, match="the drive failed"):
        ask_to_purge(tmp_path, "bad", PATIENCE)
    assert ask_to_purge(tmp_path, "", PATIENCE) == 0


def test_hits_are_those_of_the_store_that_is_asked(tmp_path: Path) -> None:
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
    server = ControlServer([tmp_path / "one", tmp_path / "three"], len, hits_of)
    assert ask_for_hits(tmp_path / "three") == {"read": 5}
    assert ask_for_hits(tmp_path / "one") == {"read": 3}
    server.close(PATIENCE)
    with pytest.raises(StorageError, match="does not answer"):
        ask_for_hits(tmp_path / "one")


@pytest.mark.parametrize(
    "line",
    [
        b"what\n",
        b"[]\n",
        b"[" * 60_000 + b"\n",
        b"1" * 5_000 + b"\n",
        b'{"op": "stop"}\n',
        b'{"op": "purge"}\n',
        b'{"op":"purge","namespace":3}\n',
    ],
)
def test_nonsense_is_answered_with_what_is_allowed(
    tmp_path: Path, server: ControlServer, line: bytes
) -> None:
    assert "error" in ask(tmp_path, line)
    assert ask_to_purge(tmp_path, "x", PATIENCE) == 1  # and it goes on


def test_what_fails_for_one_peer_fails_for_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def purge(namespace: str) -> int:
        if namespace == "bad":
            raise RuntimeError("never seen before")
        return 1

    server = ControlServer([tmp_path], purge, hits_of)
    with pytest.raises(StorageError):
        ask_to_purge(tmp_path, "bad", PATIENCE)
    assert ask_to_purge(tmp_path, "good", PATIENCE) == 1
    server.close(PATIENCE)
    assert "never seen before" in caplog.text


def test_a_purge_that_takes_too_long_says_that_it_may_still_be_done(tmp_path: Path) -> None:
    go_on = threading.Event()
    server = ControlServer([tmp_path], lambda _: int(go_on.wait(PATIENCE)), hits_of)
    with pytest.raises(StorageError, match=r"no answer within 0.05 s .* may still do it: ask again"):
        ask_to_purge(tmp_path, "x", 0.05)
    go_on.set()
    assert ask_to_purge(tmp_path, "x", PATIENCE) == 1
    server.close(PATIENCE)


def test_purge_does_not_wait_for_ever(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []
    timeout_of = control.socket.socket.settimeout

    def settimeout(connection: socket.socket, seconds: float | None) -> None:
        if threading.current_thread() is threading.main_thread():
            waits.append(seconds)
        timeout_of(connection, seconds)

    with kvtier.open(config):
        monkeypatch.setattr(control.socket.socket, "settimeout", settimeout)
        assert [store["problem"] for store in stores.purge(directory(config), "a")] == [""]
        monkeypatch.undo()
    assert waits == [600.0]


def test_a_server_without_descriptors_sleeps_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 4
    tried: list[float] = []
    accept = socket.socket.accept

    def scarce(listener: socket.socket) -> Any:
        tried.append(time.monotonic())
        if len(tried) <= left:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    server = ControlServer([tmp_path], len, hits_of)
    monkeypatch.setattr(socket.socket, "accept", scarce)
    assert ask_to_purge(tmp_path, "xyz", PATIENCE) == 3  # the peer has waited
    pauses = [after - before for before, after in itertools.pairwise(tried)]
    assert len(pauses) == left
    assert min(pauses) > 0.09

    left = 10**9
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(tmp_path / "control"))
        server.close(PATIENCE)  # the pause does not keep us


def test_other_users_are_refused(
    tmp_path: Path, server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control.os, "geteuid", lambda: 12345)
    assert "allowed: 12345" in ask(tmp_path, b'{"op": "purge", "namespace": "x"}\n')["error"]


def test_a_peer_that_asks_nothing_keeps_nobody(tmp_path: Path, server: ControlServer) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(tmp_path / "control"))
        silent.sendall(b"{")
        server.close(5)
    assert not (tmp_path / "control").exists()


def test_the_socket_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control"))
    with pytest.raises(StorageError, match="does not answer"):
        ask_to_purge(tmp_path, "x", 1)
    server = ControlServer([tmp_path], len, hits_of)
    assert ask_to_purge(tmp_path, "xyz", PATIENCE) == 3
    server.close(PATIENCE)
    server.close(PATIENCE)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_without_a_disk_has_no_thread(tmp_path: Path) -> None:
    with kvtier.open(config_of(tmp_path, disk=())):
        assert "kvtier-control" not in [thread.name for thread in threading.enumerate()]


def test_thread_socket_and_descriptors_end_with_the_engine(config: Config) -> None:
    def held() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    kvtier.open(config).close()
    before = held()
    for _ in range(5):
        engine = kvtier.open(config)
        assert (store_of(config) / "control").is_socket()
        engine.close()
        assert not (store_of(config) / "control").exists()
        assert "kvtier-control" not in [thread.name for thread in threading.enumerate()]
    assert held() <= before


# --- doctor -------------------------------------------------------------------------------------------


def test_doctor_says_which_blocks_it_could_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_text("17" * 32)
    other.write_text("18" * 32)
    config = config_of(tmp_path, disk_key=str(key))
    with kvtier.open(config) as engine:
        fill(engine, "a")
    for option, status, line in (
        ([], 0, "note   disk blocks: 8 of 8 are encrypted"),
        (["--key", str(other)], 1, "FAILED disk blocks: 8 of 8 are encrypted"),
        (["--key", f"{other},{key}"], 0, "ok     disk blocks: 8, all readable"),
        (["--key", str(tmp_path / "none")], 1, "FAILED disk blocks: disk_key names"),
    ):
        assert main(["doctor", "--disk", directory(config), *option]) == status
        assert line in capsys.readouterr().out


def test_doctor_says_what_the_disk_tier_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--disk", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for name in ("disk queue", "disk files", "disk file system", "disk memlock", "catalog helper"):
        assert f" {name}: " in said
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    assert main(["doctor", "--disk", str(tmp_path / "file")]) == 1
    assert f"FAILED disk: {tmp_path / 'file'}: " in capsys.readouterr().out


def test_doctor_makes_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no" / "such"
    assert main(["doctor", "--disk", str(missing)]) == 1
    assert f"FAILED disk: {missing} is not there\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_doctor_wants_a_disk_for_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--key", "env:KEY"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "kvtier doctor: --key needs --disk DIR, whose blocks it reads\n"
    assert printed.out == ""
