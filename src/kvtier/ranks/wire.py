"""How keeper and workers meet and talk: a private directory, a SOCK_SEQPACKET socket, JSON, pidfds.

    worker -> keeper   join {version, rank, world_size, fingerprint, start}
    keeper -> worker   welcome {epoch, member, start, arena} and the descriptor, or refused {kind, message}
    worker -> keeper   ended {grant, status, drained}      a part of a grant is over
    keeper -> worker   cancel {grants}                     answered by `ended` for those never begun
    worker -> keeper   leave {}                            nothing of this worker runs or will run

Whether the other side lives is asked of its pidfd, never of the socket: a forked child of a dead process
keeps its sockets open, and a stopped process closes none. A pidfd becomes readable after the kernel has
taken down the process's memory and files, so no copy of it can be under way.
"""

import array
import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import stat
import struct
import time
from collections import deque
from pathlib import Path
from typing import Any

from kvtier.errors import ClosedError, ConfigError

VERSION = 1
SOCKET = "keeper.sock"
LOCK = "keeper.lock"
_MAX_MESSAGE = 1 << 16
_SO_PEERPIDFD = 77  # Linux 6.5
_UCRED = struct.Struct("3i")
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
_SHORTAGE_SECONDS = 0.05


def open_directory(path: str | os.PathLike[str], *, create: bool = False) -> int:
    """Opens the directory where keeper and workers meet.

    Returns:
        A descriptor; all else is done through it, so that no other directory can take its place.

    Raises:
        ConfigError: Not a directory, of another user, or open to others.
        FileNotFoundError: It does not exist, and `create` is false.
    """
    if create:
        with contextlib.suppress(FileExistsError):
            try:
                Path(path).mkdir(mode=0o700)
            except OSError as error:
                if isinstance(error, FileExistsError):
                    raise
                raise ConfigError(
                    f"directory is {os.fspath(path)!r}: cannot be made: {error.strerror}"
                ) from error
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(
            f"directory is {os.fspath(path)!r}: {error.strerror}; allowed: one's own directory, mode 0700"
        ) from error
    found = os.fstat(fd)
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid() or mode & 0o077:
        os.close(fd)
        raise ConfigError(
            f"directory is {os.fspath(path)!r}, of user {found.st_uid} with mode {mode:04o}; allowed: of "
            f"user {os.geteuid()} with mode 0700, since whoever can reach it can read and write the cache"
        )
    return fd


def address(directory_fd: int) -> str:
    """The socket's address: short whatever the directory is called, and in that very directory."""
    return f"/proc/self/fd/{directory_fd}/{SOCKET}"


def take_lock(directory_fd: int) -> int:
    """Takes the lock that one living keeper has. It is the process's own: a forked child does not keep it.

    Raises:
        ConfigError: Another keeper has it.
    """
    while True:
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=directory_fd)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ConfigError(
                "directory: a keeper that lives serves it already; allowed: one keeper"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(LOCK, dir_fd=directory_fd).st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)  # the keeper before us removed it as it closed


def start_time() -> str:
    """When this process began; with its number that names it for good."""
    return _start_time_of("self")


def _start_time_of(pid: int | str) -> str:
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()[19]


def peer_identity(connection: socket.socket) -> tuple[int, int]:
    """Process and user on the other side, from the kernel: whoever called connect() or listen()."""
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def peer_pidfd(connection: socket.socket, start: str) -> int:
    """Opens a pidfd of the very process on the other side, never of one that got its number later.

    Args:
        connection: A connected socket.
        start: What the other side says is its start_time(); for kernels before 6.5.

    Raises:
        ClosedError: That process is gone.
    """
    try:
        fd = struct.unpack("i", connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise ClosedError("the process on the other side has ended") from None
        pid, _ = peer_identity(connection)
        try:
            fd = os.pidfd_open(pid)
            if _start_time_of(pid) != start:  # the process that the pidfd names, or that one is dead by now
                os.close(fd)
                raise ClosedError(f"process {pid} has ended")
        except (ProcessLookupError, FileNotFoundError):
            raise ClosedError(f"process {pid} has ended") from None
    os.set_inheritable(fd, False)
    return int(fd)


def has_ended(pidfd: int) -> bool:
    """Whether a process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def receive(connection: socket.socket) -> tuple[dict[str, Any], int | None] | None:
    """Reads one message.

    Returns:
        The message and the descriptor that came with it; None when the other side closed the connection.

    Raises:
        BlockingIOError: Nothing is there to read.
        ConfigError: Not a message of ours.
    """
    try:
        data, ancillary, _, _ = connection.recvmsg(
            _MAX_MESSAGE, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionError:
        return None
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    for extra in fds[1:]:
        os.close(extra)
    fd = fds[0] if fds else None
    if not data:
        return None
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(data)
        if isinstance(message, dict) and isinstance(message.get("type"), str):
            return message, fd
    if fd is not None:
        os.close(fd)
    raise ConfigError("the other side does not speak kvtier's protocol")


def send(connection: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    """Sends one message whole. A socket that does not wait raises BlockingIOError when it is full."""
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    connection.sendmsg([json.dumps(message, separators=(",", ":")).encode()], rights, socket.MSG_NOSIGNAL)


class Outbox:
    """Messages on their way to one socket that does not wait. Not for several threads at once."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: deque[dict[str, Any]] = deque()

    def put(self, message: dict[str, Any]) -> None:
        """Adds a message; flush() sends it."""
        self._messages.append(message)

    def flush(self) -> bool:
        """Sends what the socket takes; returns whether that was all. What nobody will read is dropped.

        Waits only where the kernel is short of memory, for a moment: what is left then is kept.
        """
        while self._messages:
            try:
                send(self._connection, self._messages[0])
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in _GONE:
                    time.sleep(_SHORTAGE_SECONDS)  # the socket looks writable all the while
                    return False
                self._messages.clear()
                return True
            self._messages.popleft()
        return True
