"""Engine.reset(): nothing of before is served again, after a kill neither, unless it is named.

What is stored after a reset that has no name ends with the process: the next one may have other weights.
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier import BlockState, Config, ConfigError, Disk, Engine, KVLayout, StorageError, UnsupportedError
from kvtier.epochs import find_epoch, named_epoch

PATIENCE = 60
BLOCKS = 8
GOLDEN = Path(__file__).parents[2] / "golden" / "epoch_v1.bin"


def config_of(*paths: Path, **changed: Any) -> Config:
    values: dict[str, Any] = {
        "groups": [KVLayout(2, 2, 8, "float16", 4)],
        "block_tokens": 8,
        "host": "1MiB",
        "chunk": "1MiB",
        "model": "m@1",
        "disk": [Disk(str(path), "8MiB") for path in paths],
        "disk_commit_seconds": 0.01,
        "disk_write_budget": "unlimited",
    }
    return Config(**{**values, **changed})


def tensors(seed: int) -> list[Any]:
    return list(np.random.default_rng(seed).integers(0, 1 << 16, (2, 16, 2, 4, 2, 8), np.uint16))


def keys_of(config: Config) -> Any:
    return kvtier.block_keys(np.arange(8 * BLOCKS), config)


def store(engine: Engine, seed: int, durable: bool = True) -> None:
    pages = engine.attach([t.view(np.float16) for t in tensors(seed)])
    ticket = engine.store(keys_of(engine.config), pages, range(2 * BLOCKS)).wait(PATIENCE)
    if durable:
        engine.flush(PATIENCE)
        assert ticket.durable_blocks == BLOCKS
    pages.detach(PATIENCE)


def served(engine: Engine) -> int | None:
    """The seed of the bytes that the keys are served with, all of them or none; None for misses."""
    keys = keys_of(engine.config)
    states = set(engine.lookup(keys).states().flatten().tolist())
    target = [np.zeros_like(t) for t in tensors(0)]
    pages = engine.attach([t.view(np.float16) for t in target])
    loaded = engine.load(keys, pages, range(2 * BLOCKS)).wait(PATIENCE).result().valid_blocks
    pages.detach(PATIENCE)
    if loaded == 0:
        assert states == {BlockState.MISS}
        return None
    assert (loaded, states) == (BLOCKS, {BlockState.READY})
    (seed,) = (s for s in range(10) if all(map(np.array_equal, tensors(s), target)))
    return seed


def found(config: Config) -> bytes:
    return find_epoch(config, [(disk.path, False) for disk in config.disks])


def after_restart(config: Config) -> int | None:
    with kvtier.open(config) as engine:
        return served(engine)


def test_nothing_of_before_is_served_and_what_comes_after_is(tmp_path: Path) -> None:
    config = config_of(tmp_path / "disk")
    with kvtier.open(config) as engine:
        store(engine, 1)
        assert served(engine) == 1
        match = engine.lookup(keys_of(config))
        with match.pin() as lease:
            engine.reset()
            assert served(engine) is None
            pages = engine.attach([t.view(np.float16) for t in tensors(0)])
            assert engine.load(lease, pages, range(2 * lease.num_blocks)).result().valid_blocks == 0
            assert engine.touch(keys_of(config)) == 0
            assert engine.drop(keys_of(config)) == 0
            pages.detach(PATIENCE)
        store(engine, 2)
        assert served(engine) == 2
        engine.reset()
        assert served(engine) is None
        store(engine, 3)
        assert served(engine) == 3


def test_what_is_stored_after_a_reset_without_a_name_ends_with_the_process(tmp_path: Path) -> None:
    """Updated in memory, started again from the files: the weights of the third life are those of the first.

    An earlier kvtier found in the next life what was stored after a reset without a name.
    """
    one, both = config_of(tmp_path / "a"), config_of(tmp_path / "a", tmp_path / "b")
    with kvtier.open(both) as engine:
        store(engine, 1)
        engine.reset()
        store(engine, 2)
        saved = found(both)
        engine.reset()
        assert found(both) not in (b"", saved)
        assert served(engine) is None
        store(engine, 3)
        assert served(engine) == 3
    for config in (both, one, both):
        assert after_restart(config) is None
    with kvtier.open(both) as engine:  # what is stored before the next reset is of the files again
        store(engine, 4)
    assert after_restart(both) == 4
    with kvtier.open(both) as engine:
        engine.reset()
        store(engine, 5)
        engine.reset("v2")
        assert served(engine) is None
        store(engine, 6)
    assert after_restart(both) == 6
    assert found(both) == named_epoch("v2")


def test_named_weights_come_back_with_their_name(tmp_path: Path) -> None:
    config = config_of(tmp_path / "disk")
    with kvtier.open(config) as engine:
        store(engine, 1)
        engine.reset("v2")
        assert served(engine) is None
        store(engine, 2)
    assert after_restart(config) == 2
    with kvtier.open(config) as engine:
        engine.reset()
        assert served(engine) is None
        engine.reset(weights_version="v2")
        assert served(engine) == 2
        engine.reset("v3")
        assert served(engine) is None
    assert after_restart(config) is None
    with kvtier.open(config) as engine:
        engine.reset("v2")
        assert served(engine) == 2


def test_parents_hold_through_a_reset(tmp_path: Path) -> None:
    config = config_of(tmp_path / "disk")
    with kvtier.open(config) as engine:
        engine.reset("v2")
        pages = engine.attach([t.view(np.float16) for t in tensors(1)])
        keys = keys_of(config)
        engine.store(keys[:4], pages, range(8)).wait(PATIENCE)
        engine.store(keys[4:], pages, range(8, 16), first_block=4, parent=keys[3]).wait(PATIENCE)
        engine.flush(PATIENCE)
    assert after_restart(config) == 1


def test_without_a_disk_it_is_over_with_the_process() -> None:
    with kvtier.open(config_of()) as engine:
        store(engine, 1, durable=False)
        engine.reset()
        assert served(engine) is None
        store(engine, 2, durable=False)
        assert served(engine) == 2
        with pytest.raises(ConfigError, match="weights_version is ''"):
            engine.reset("")
    with pytest.raises(kvtier.ClosedError):
        engine.reset()


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_reset import *
engine = kvtier.open(config_of(*(Path(path) for path in sys.argv[3:])))
store(engine, 1)
engine.reset(sys.argv[2] or None)
store(engine, 2)
print("reset", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["", "v2"])
def test_a_reset_outlives_kill_9(tmp_path: Path, name: str) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    argv = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), name, *map(str, paths)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reset\n"
        process.send_signal(signal.SIGKILL)
    config = config_of(*paths)
    for catalog in tmp_path.glob("*/stores/*/catalog.mdb"):
        catalog.unlink()  # the slots' headers tell nothing else
    assert after_restart(config) == (2 if name else None)
    with kvtier.open(config) as engine:
        engine.reset("v2")
        assert served(engine) == (2 if name else None)


def test_a_drive_that_was_away_at_the_reset_brings_nothing_back(tmp_path: Path) -> None:
    one, both = config_of(tmp_path / "a"), config_of(tmp_path / "a", tmp_path / "b")
    with kvtier.open(both) as engine:
        store(engine, 1)
    with kvtier.open(one) as engine:
        engine.reset()
    with kvtier.open(one) as engine:
        store(engine, 2)
    assert after_restart(one) == 2
    assert after_restart(both) is None  # what was stored since is lost as well; nothing of before comes back
    assert after_restart(both) is None
    assert found(one) == found(both) != b""


def test_a_drive_that_is_new_takes_the_epoch_of_the_others(tmp_path: Path) -> None:
    one, both = config_of(tmp_path / "a"), config_of(tmp_path / "a", tmp_path / "b")
    with kvtier.open(one) as engine:
        engine.reset("v2")
        store(engine, 2)
    assert after_restart(both) == 2
    assert after_restart(both) == 2
    assert found(both) == named_epoch("v2")


def epoch_file(config: Config) -> Path:
    (file,) = Path(config.disks[0].path).glob("epoch-*")
    return file


def test_a_damaged_file_is_a_new_epoch_and_a_newer_one_is_left_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path / "disk")
    with kvtier.open(config) as engine:
        engine.reset("v2")
        store(engine, 2)
    file = epoch_file(config)
    good = file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600
    for bit in range(0, 8 * len(good), 37):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        assert found(config) not in (b"", named_epoch("v2"), found(config))
    assert after_restart(config) is None
    file.write_bytes(GOLDEN.read_bytes())
    assert found(config) == bytes(range(0x80, 0xA0))
    with kvtier.open(config) as engine:
        engine.reset("v2")
        assert served(engine) == 2
    assert file.read_bytes() == good
    sys.path.insert(0, str(GOLDEN.parent))
    try:
        from make_records import epoch  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(GOLDEN.parent))
    newer = epoch(bytes(32), version=2)
    file.write_bytes(newer)
    with pytest.raises(UnsupportedError, match=r"epoch-.* is of version 2; this kvtier knows 1"):
        kvtier.open(config)
    assert file.read_bytes() == newer


def test_a_drive_that_takes_no_epoch_is_an_error_and_nothing_of_before_is_served(tmp_path: Path) -> None:
    config = config_of(tmp_path / "disk")
    with kvtier.open(config) as engine:
        engine.reset("v2")
        store(engine, 1)
        file = epoch_file(config)
        file.unlink()
        file.mkdir()
        with pytest.raises(StorageError, match="epoch"):
            engine.reset()
        assert served(engine) is None
        file.rmdir()
        engine.reset()
    assert after_restart(config) is None
