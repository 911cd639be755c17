"""The epoch of a cache on disk: what was stored before a reset is not found after a restart either.

docs/formats/epoch.md is the file; every drive has one for each model. Engine.reset() is what uses it.
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from kvtier.config import Config
from kvtier.errors import StorageError, UnsupportedError

EPOCH_BYTES = 32
_MAGIC = b"\x89KVEPCH\n"
_VERSION = 1
_CHECKSUM_BYTES = 16
_FILE_BYTES = 64


def random_epoch() -> bytes:
    """An epoch that nobody can come back to."""
    return secrets.token_bytes(EPOCH_BYTES)


def named_epoch(weights_version: str) -> bytes:
    """The epoch of named weights: the same whenever they come back."""
    return hashlib.sha256(b"kvtier.epoch.v1\0" + weights_version.encode()).digest()


def find_epoch(config: Config, drives: Iterable[tuple[str, bool]]) -> bytes:
    """Returns the epoch that the last reset left for this start, on any drive; empty before the first.

    Drives that disagree (one was away at the reset), or a file that is damaged or cannot be read, give a
    random epoch: nothing of before is found on any of them.

    Args:
        config: The engine's config.
        drives: Directories that are in use, and whether the store there holds no block yet: without a file
            such a drive has no say.

    Raises:
        UnsupportedError: A file is of a newer version.
    """
    found: set[bytes | None] = set()
    for directory, is_fresh in drives:
        epoch = _read(Path(directory) / _name(config))
        if epoch != b"" or not is_fresh:
            found.add(epoch)
    if len(found) > 1 or None in found:
        return random_epoch()
    return (found.pop() or b"") if found else b""


def save_epoch(config: Config, epoch: bytes, directories: Iterable[str | os.PathLike[str]]) -> None:
    """Makes an epoch durable on drives that do not have it; their directories are there.

    Raises:
        StorageError: A drive did not take it: after a restart it may answer with what is older. The others
            have it.
    """
    failure: OSError | None = None
    for directory in directories:
        path = Path(directory) / _name(config)
        try:
            with contextlib.suppress(UnsupportedError):
                if _read(path) == epoch:
                    continue
            _write(path, epoch)
        except OSError as error:
            failure = error
    if failure is not None:
        raise StorageError(
            failure.errno or 0, f"the epoch is not saved on every drive: {failure}"
        ) from failure


def _name(config: Config) -> str:
    return f"epoch-{config.fingerprint().hex()[:16]}"


def _read(path: Path) -> bytes | None:
    """The epoch there; empty without a file, None for one that proves nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            content = file.read(_FILE_BYTES + 1)
    except FileNotFoundError:
        return b""
    except OSError:
        return None
    checked, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if len(content) != _FILE_BYTES or checked[:8] != _MAGIC or _checksum(checked) != checksum:
        return None
    version = int.from_bytes(checked[8:12], "little")
    if version > _VERSION:
        raise UnsupportedError(
            f"{path} is of version {version}; this kvtier knows {_VERSION}. It is left as it is"
        )
    return checked[16:] if version == _VERSION and not any(checked[12:16]) else None


def _write(path: Path, epoch: bytes) -> None:
    """Atomic and durable: a crash leaves the old file or the new one."""
    checked = _MAGIC + _VERSION.to_bytes(4, "little") + bytes(4) + epoch
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)
    _synced(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, checked + _checksum(checked))
    new.rename(path)
    _synced(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def _synced(path: Path, flags: int, content: bytes = b"") -> None:
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if os.write(fd, content) != len(content) if content else False:
            raise OSError(f"{path}: a short write")
        os.fsync(fd)
    finally:
        os.close(fd)


def _checksum(checked: bytes) -> bytes:
    return hashlib.sha256(checked).digest()[:_CHECKSUM_BYTES]
