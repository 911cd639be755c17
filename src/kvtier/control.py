"""The control socket of a live engine: how `kvtier purge` and `inspect` reach who has a store open.

DIR/stores/<store>/control is a Unix socket (0600) in a directory that only the owner may enter. A peer of
another user is refused (SO_PEERCRED). One JSON object a line each way:

    {"op": "purge", "namespace": "tenant-a"}  ->  {"dropped": 17}  or  {"error": "..."}
    {"op": "hits"}  ->  {"hits": {"read": 3, "lookup_blocks": 9, ...}}  or  {"error": "..."}
"""

import contextlib
import json
import logging
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvtier import errors
from kvtier.errors import KVTierError, StorageError

NAME = "control"
_MAX_LINE_BYTES = 64 << 10
_PEER_PATIENCE_SECONDS = 10.0  # for a peer's line; a purge itself may take longer
_HITS_PATIENCE_SECONDS = 5.0
_PURGE_PATIENCE_SECONDS = 600.0  # a header of every block of the tenant is overwritten
_ACCEPT_PAUSE_SECONDS = 0.1
_BACKLOG = 8
_UCRED = struct.Struct("iII")  # pid, uid, gid

_log = logging.getLogger(__name__)

Purge = Callable[[str], int]  # a namespace -> blocks
Hits = Callable[[Path], dict[str, int]]  # a store -> counts since it was opened


class ControlServer:
    """Answers on the control sockets of an engine's stores. One thread, which sleeps until somebody asks.

    Where a socket cannot be made (a file system without them) the store has none, and `problem` says why.

    Attributes:
        problem: Why there are fewer sockets than stores; empty if there are not.
    """

    def __init__(self, stores: Sequence[str | os.PathLike[str]], purge: Purge, hits: Hits) -> None:
        """Begins to serve; a socket of a dead process is replaced.

        Args:
            stores: Directories of the stores. Their locks are ours: whoever had a socket there has ended.
            purge: Does it.
            hits: Counts them.
        """
        self.problem = ""
        self._purge = purge
        self._hits = hits
        self._pid = os.getpid()
        self._stopping = False
        self._listeners: list[tuple[int, int, socket.socket]] = []  # directory, inode, socket
        self._selector = selectors.DefaultSelector()
        self._wake_receive, self._wake_send = socket.socketpair()
        self._wake_receive.settimeout(_ACCEPT_PAUSE_SECONDS)
        self._selector.register(self._wake_receive, selectors.EVENT_READ)
        self._peers: set[socket.socket] = set()
        for store in stores:
            try:
                directory, inode, listener = _listen(store)
            except OSError as error:
                self.problem = f"{Path(store) / NAME}: {error.strerror or error}"
                continue
            self._listeners.append((directory, inode, listener))
            self._selector.register(listener, selectors.EVENT_READ, Path(store))
        self._thread = threading.Thread(target=self._serve, name="kvtier-control", daemon=True)
        self._thread.start()

    def close(self, timeout: float | None = None) -> None:
        """Removes the sockets and ends the thread; a purge that runs is waited for. Idempotent.

        Raises:
            TimeoutError: A purge still runs; call again.
        """
        if self._pid != os.getpid():
            self._close_descriptors()  # in a forked child: names and thread are the parent's
            return
        if self._listeners or self._thread.is_alive():
            self._stopping = True
            with contextlib.suppress(OSError):
                self._wake_send.send(b"x")
            for peer in list(self._peers):  # nobody who asks nothing, or slowly, keeps us
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RD)
            if self._thread is not threading.current_thread():
                self._thread.join(timeout)
                if self._thread.is_alive():
                    raise errors.TimeoutError("a purge over the control socket still runs")
        for directory, inode, _ in self._listeners:
            # Whoever locked the store after us may have put a socket of its own there.
            with contextlib.suppress(OSError):
                if os.stat(NAME, dir_fd=directory, follow_symlinks=False).st_ino == inode:
                    os.unlink(NAME, dir_fd=directory)
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        for peer in self._peers:
            peer.close()
        self._peers.clear()
        for directory, _, listener in self._listeners:
            listener.close()
            os.close(directory)
        self._listeners.clear()
        self._selector.close()
        self._wake_receive.close()
        self._wake_send.close()

    def _serve(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select():
                if key.fileobj is self._wake_receive or self._stopping:
                    continue
                listener: Any = key.fileobj
                try:
                    peer, _ = listener.accept()
                except BlockingIOError:
                    continue
                except OSError:  # no descriptor is left: the peer waits, and must not keep us busy
                    with contextlib.suppress(OSError):
                        self._wake_receive.recv(1, socket.MSG_PEEK)
                    continue
                self._serve_peer(peer, key.data)

    def _serve_peer(self, peer: socket.socket, store: Path) -> None:
        self._peers.add(peer)
        try:
            with peer:
                self._answer(peer, store)
        except OSError:
            pass  # it has gone, or took too long
        except Exception:  # noqa: BLE001 - the next peer must not suffer from it
            _log.exception("a question over the control socket failed")
        finally:
            self._peers.discard(peer)

    def _answer(self, peer: socket.socket, store: Path) -> None:
        peer.settimeout(_PEER_PATIENCE_SECONDS)
        _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        for line in _lines(peer):
            if uid != os.geteuid():
                # After its question: a socket that is closed unread would take our answer with it.
                _send(peer, {"error": f"you are user {uid}; allowed: {os.geteuid()}, who runs the engine"})
                return
            _send(peer, self._outcome(line, store))
            if self._stopping:
                return

    def _outcome(self, line: bytes, store: Path) -> dict[str, Any]:
        try:
            asked = json.loads(line)
        except (ValueError, RecursionError):
            return {"error": "not a line of JSON, or it nests too deep"}
        if not isinstance(asked, dict) or asked.get("op") not in ("purge", "hits"):
            return {"error": 'allowed: {"op": "purge", "namespace": NAME}, {"op": "hits"}'}
        namespace = asked.get("namespace")
        if asked["op"] == "purge" and not isinstance(namespace, str):
            return {"error": f"namespace is {namespace!r}; allowed: a string"}
        try:
            if asked["op"] == "hits":
                return {"hits": self._hits(store)}
            return {"dropped": self._purge(str(namespace))}
        except KVTierError as error:
            return {"error": str(error)}


def ask_to_purge(
    store: str | os.PathLike[str], namespace: str, timeout: float | None = _PURGE_PATIENCE_SECONDS
) -> int:
    """Asks the process that has a store open to purge a namespace; returns blocks. Waits until it is done.

    Args:
        store: Directory of the store.
        namespace: The tenant.
        timeout: Seconds, None for as long as it takes.

    Raises:
        StorageError: Nobody answers there, or not in time (it may still do it), or it could not do it.
    """
    return int(_ask(store, {"op": "purge", "namespace": namespace}, "dropped", int, timeout))


def ask_for_hits(store: str | os.PathLike[str], timeout: float = _HITS_PATIENCE_SECONDS) -> dict[str, int]:
    """Asks the process that has a store open what was found since it opened it.

    Args:
        store: Directory of the store.
        timeout: Seconds for the whole.

    Returns:
        `read`: blocks read from this store that proved themselves. `lookup_blocks`, `lookup_hits_host` and
        `lookup_hits_disk`: blocks that the whole engine was asked for and found, on whichever drive.

    Raises:
        StorageError: Nobody answers there, or not in time.
    """
    return {str(k): int(v) for k, v in _ask(store, {"op": "hits"}, "hits", dict, timeout).items()}


def _ask(
    store: str | os.PathLike[str], question: dict[str, str], wanted: str, kind: type, timeout: float | None
) -> Any:
    path = Path(store) / NAME
    directory = -1
    try:
        directory = os.open(store, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(_address(directory))
            _send(connection, question)
            answer = json.loads(next(_lines(connection), b"null"))
    except TimeoutError as error:
        what = (
            f"no answer within {timeout:g} s from the engine that has it open; it may still do it: ask again"
        )
        raise StorageError(0, f"{path}: {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(
            getattr(error, "errno", None) or 0,
            f"{path}: the engine that has it open does not answer: {error}",
        ) from error
    finally:
        if directory >= 0:
            os.close(directory)
    if not isinstance(answer, dict) or not isinstance(answer.get(wanted), kind):
        said = answer.get("error") if isinstance(answer, dict) else answer
        raise StorageError(0, f"{path}: {said}")
    return answer[wanted]


def _address(directory: int) -> str:
    # A path of its own would have to be shorter than 108 bytes.
    return f"/proc/self/fd/{directory}/{NAME}"


def _listen(store: str | os.PathLike[str]) -> tuple[int, int, socket.socket]:
    with contextlib.ExitStack() as undo:
        directory = os.open(store, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        undo.callback(os.close, directory)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(NAME, dir_fd=directory)
        listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        # Nobody else may enter the directory (0700); the mode is for whoever copies it.
        listener.bind(_address(directory))
        Path(_address(directory)).chmod(0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        inode = os.stat(NAME, dir_fd=directory, follow_symlinks=False).st_ino
        undo.pop_all()
        return directory, inode, listener


def _lines(connection: socket.socket) -> Iterator[bytes]:
    buffered = b""
    while len(buffered) <= _MAX_LINE_BYTES:
        piece = connection.recv(4096)
        if not piece:
            return
        *lines, buffered = (buffered + piece).split(b"\n")
        yield from lines


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")
