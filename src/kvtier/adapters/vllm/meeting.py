"""Where keeper and workers of one engine meet: a folder that all its processes can name, and no others."""

import contextlib
import hashlib
import os
import socket
import tempfile
import time
from pathlib import Path

from kvtier.errors import ConfigError
from kvtier.ranks import wire

_YOUNG_SECONDS = 60.0


def meeting_place(parent: str | None, engine_id: str) -> Path:
    """The engine's folder; the keeper makes it.

    Args:
        parent: Folder to make it in; None for the user's runtime folder, or the one for temporary files.
        engine_id: vLLM's, equal in all processes of an engine.
    """
    base = parent or os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    name = hashlib.sha256(engine_id.encode()).hexdigest()[:16]
    return Path(base) / f"{_prefix()}{name}"


def sweep(place: Path) -> None:
    """Removes the folders beside `place` that killed servers of this user have left.

    vLLM ends its engine's process the hard way when that is slow to stop, so this happens.
    """
    for folder in place.parent.glob(_prefix() + "*"):
        try:
            fd = wire.open_directory(folder)
        except (ConfigError, OSError):
            continue
        try:
            # One that is young may be a keeper's that begins just now.
            if time.time() - os.fstat(fd).st_mtime > _YOUNG_SECONDS and not _answers(fd):
                for name in (wire.SOCKET, wire.LOCK):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=fd)
                with contextlib.suppress(OSError):  # somebody else's things stand there
                    folder.rmdir()
        finally:
            os.close(fd)


def _prefix() -> str:
    return f"kvtier-{os.geteuid()}-"


def _answers(directory_fd: int) -> bool:
    """Whether a keeper lives there. Its lock is not asked: closing that would end one of our own process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.setblocking(False)
        try:
            connection.connect(wire.address(directory_fd))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
