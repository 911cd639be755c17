"""The epoch of a cache on disk: what was stored before a reset is not found after a restart either."""

import os
import secrets
from pathlib import Path

from kvtier.config import Config

_EPOCH_BYTES = 16


def load_epoch(config: Config) -> bytes:
    """Returns the epoch that the last reset moved to, on any drive; empty before the first.

    Drives that disagree (one was away at the reset), or a damaged file, give a new epoch, which is saved:
    then nothing of before is found on any of them.
    """
    found = {_read(path) for path in _paths(config)}
    if len(found) > 1 or None in found:
        return new_epoch(config)
    return found.pop() or b"" if found else b""


def new_epoch(config: Config) -> bytes:
    """Moves to a random epoch; it is durable on every drive when this returns.

    Raises:
        OSError: A drive did not take it: after a restart it would answer with what is older.
    """
    epoch = secrets.token_bytes(_EPOCH_BYTES)
    for path in _paths(config):
        _write(path, epoch)
    return epoch


def _paths(config: Config) -> list[Path]:
    name = f"vllm-epoch-{config.fingerprint().hex()[:16]}"
    return [Path(disk.path) / name for disk in config.disks if Path(disk.path).is_dir()]


def _read(path: Path) -> bytes | None:
    try:
        epoch = path.read_bytes()
    except FileNotFoundError:
        return b""
    return epoch if len(epoch) == _EPOCH_BYTES else None


def _write(path: Path, epoch: bytes) -> None:
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    _synced(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, epoch)
    new.rename(path)
    _synced(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def _synced(path: Path, flags: int, content: bytes = b"") -> None:
    fd = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    try:
        if content:
            os.write(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)
