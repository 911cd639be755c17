"""RankServer: the keeper's side of the sockets - who is which rank, what they report, and when they end."""

import contextlib
import functools
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvtier.config import Config
from kvtier.errors import ClosedError, ConfigError, KVTierError
from kvtier.keys import root_key
from kvtier.layout import check_extent
from kvtier.ranks import wire

_BACKLOG = 128
_SHORTAGE_SECONDS = 0.05

_log = logging.getLogger(__name__)

Status = tuple[str, int, str]  # code, native code, message: a Status of the core; the code of success is "ok"


def _report_of(message: dict[str, Any]) -> tuple[int, Status, bool] | None:
    """Reads an `ended` message: (grant, status, drained), or None if it is not one of ours."""
    grant, status, drained = message.get("grant"), message.get("status"), message.get("drained")
    if type(grant) is not int or type(drained) is not bool:
        return None
    if not isinstance(status, list) or [type(part) for part in status] != [str, int, str]:
        return None
    code, native, text = status
    try:
        (code + text).encode()  # JSON can say what is no text
    except UnicodeEncodeError:
        return None
    if not -(2**31) <= native < 2**31:
        return None
    return grant, (code, native, text), drained


@dataclass(eq=False)
class Member:
    """A process that joined as a rank; until the process has ended, whatever becomes of its socket."""

    number: int
    rank: int
    pid: int
    pidfd: int
    connection: socket.socket
    outbox: wire.Outbox
    grants: set[int] = field(default_factory=set)  # that it has not reported
    connected: bool = True


# Called when the part of a grant is over: (member, grant, status, drained). Holds RankServer.changed.
OnPart = Callable[[Member, int, Status, bool], None]


class RankServer:
    """Lets ranks join, and tells when their parts are over. One thread, which sleeps until something happens.

    Attributes:
        epoch: Names this life of the keeper, 16 bytes.
        changed: Guards everything here and whatever its owner adds; notified after every change.
        members: The processes that are ranks, by rank.
        complete: Whether every rank has one that can be reached, as far as was heard; see missing().
        closing: Set by the owner: nobody may join any more.
    """

    def __init__(
        self, directory: str | os.PathLike[str], config: Config, arena: dict[str, Any], on_part: OnPart
    ) -> None:
        """Begins to serve.

        Args:
            directory: Where workers find us.
            config: What theirs must agree with.
            arena: Its geometry, and its descriptor `fd`.
            on_part: Told what is over. What it raises leaves the part as it was.

        Raises:
            ConfigError: Others can reach the directory, or a living keeper serves it.
        """
        self.epoch = secrets.token_bytes(16)
        self.changed = threading.Condition()
        self.members: dict[int, Member] = {}
        self.complete = False
        self.closing = False
        self._config = config
        self._fingerprint = root_key(config).hex()
        self._start = wire.start_time()
        self._arena = {name: value for name, value in arena.items() if name != "fd"}
        self._on_part = on_part
        self._next_member = 1
        self._stopped = False
        with contextlib.ExitStack() as undo:
            self._directory = wire.open_directory(directory, create=True)
            undo.callback(os.close, self._directory)
            undo.enter_context(_claimed(self._directory))
            self._arena_fd = os.dup(arena["fd"])
            undo.callback(os.close, self._arena_fd)
            lock_fd = wire.take_lock(self._directory)
            undo.callback(os.close, lock_fd)
            undo.callback(self._remove_names)
            self._listener = undo.enter_context(self._listen())
            self._selector = undo.enter_context(contextlib.closing(selectors.DefaultSelector()))
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._wake_fd)
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._selector.register(
                self._wake_fd, selectors.EVENT_READ, lambda: os.eventfd_read(self._wake_fd)
            )
            self._thread = threading.Thread(target=self._serve, name="kvtier-keeper", daemon=True)
            self._thread.start()
            self._undo = undo.pop_all()

    def missing(self) -> list[int]:
        """Ranks without a living worker that can be reached. The caller holds `changed`."""
        living = {rank for rank, m in self.members.items() if m.connected and not wire.has_ended(m.pidfd)}
        return [rank for rank in range(self._config.world_size) if rank not in living]

    def ask_to_cancel(self, grants: list[int]) -> None:
        """Asks every rank not to begin grants that it has not begun. The caller holds `changed`.

        Once stop() was called there is nobody to ask, and nothing is done.
        """
        if self._stopped:
            return
        for member in self.members.values():
            mine = [grant for grant in grants if grant in member.grants]
            for begin in range(0, len(mine), 1000):
                member.outbox.put({"type": "cancel", "grants": mine[begin : begin + 1000]})
        os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """Stops to serve; waits for the thread and leaves no name behind. Not while holding `changed`."""
        with self.changed:
            if self._stopped:
                return
            self._stopped = True
            os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        with self.changed:
            self._wake_fd = -1  # its number is soon somebody else's
            for member in list(self.members.values()):
                self._forget(member)
        self._undo.close()

    def _remove_names(self) -> None:
        for name in (wire.SOCKET, wire.LOCK):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._directory)

    # --- the thread ---

    def _serve(self) -> None:
        while True:
            well = True
            for key, _ in self._selector.select():
                action: Callable[[], None] = key.data
                with self.changed:
                    if self._stopped:
                        return
                    well = self._guarded(action) and well
            with self.changed:
                for member in self.members.values():
                    well = self._guarded(functools.partial(self._flush, member)) and well
            if not well:
                time.sleep(_SHORTAGE_SECONDS)  # what caused it may still stand there

    def _guarded(self, action: Callable[[], None]) -> bool:
        """Runs an action; one that an action before it has made moot does nothing. False: it failed.

        This thread is the only one that hears of ended copies and dead processes: nothing that a peer sends
        and no shortage may end it.
        """
        try:
            action()
        except Exception:  # noqa: BLE001 - see above; what went wrong is logged
            _log.exception("the keeper could not handle a message")
            return False
        return True

    def _flush(self, member: Member) -> None:
        if member.connected:
            wanted = selectors.EVENT_READ | (0 if member.outbox.flush() else selectors.EVENT_WRITE)
            key = self._selector.get_key(member.connection)
            if key.events != wanted:
                self._selector.modify(member.connection, wanted, key.data)

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # Renamed into place when it listens: a worker never meets a socket that nobody answers.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(wire.SOCKET + ".new", dir_fd=self._directory)
            listener.bind(wire.address(self._directory) + ".new")
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            os.rename(
                wire.SOCKET + ".new", wire.SOCKET, src_dir_fd=self._directory, dst_dir_fd=self._directory
            )
        except BaseException:
            listener.close()
            raise
        return listener

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            time.sleep(_SHORTAGE_SECONDS)  # no descriptor is left: the listener stays readable meanwhile
            return
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            _, user = wire.peer_identity(connection)
            if user != os.geteuid():
                connection.close()
                return
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._greet(connection))

    def _greet(self, connection: socket.socket) -> None:
        try:
            received = wire.receive(connection)
        except BlockingIOError:
            return
        except (ConfigError, OSError):
            received = None
        self._selector.unregister(connection)
        if received is None:
            connection.close()
            return
        message, fd = received
        if fd is not None:
            os.close(fd)
        try:
            member = self._admit(connection, message)
        except (KVTierError, OSError) as error:
            kind = "config" if isinstance(error, ConfigError) else "closed"
            with contextlib.suppress(OSError):
                wire.send(connection, {"type": "refused", "kind": kind, "message": str(error)})
            connection.close()
            return
        self.members[member.rank] = member
        self._count()
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(member))
        self._selector.register(member.pidfd, selectors.EVENT_READ, lambda: self._bury(member))
        self.changed.notify_all()

    def _admit(self, connection: socket.socket, message: dict[str, Any]) -> Member:
        if message["type"] != "join" or message.get("version") != wire.VERSION:
            raise ConfigError(f"the keeper speaks version {wire.VERSION} of the protocol; this is {message}")
        if message.get("world_size") != self._config.world_size:
            raise ConfigError(
                f"world_size is {message.get('world_size')} at the worker, "
                f"{self._config.world_size} at the keeper"
            )
        if message.get("fingerprint") != self._fingerprint:
            raise ConfigError(
                "the worker's config is not the keeper's: model, groups, block_tokens or world_size differ"
            )
        rank = check_extent("rank", message.get("rank"), 0, self._config.world_size - 1)
        if self.closing:
            raise ClosedError("the keeper is closed")
        if (there := self.members.get(rank)) is not None:
            self._make_room(there)
        pidfd = wire.peer_pidfd(connection, str(message.get("start")))
        pid, _ = wire.peer_identity(connection)
        member = Member(self._next_member, rank, pid, pidfd, connection, wire.Outbox(connection))
        welcome = {
            "type": "welcome",
            "epoch": self.epoch.hex(),
            "member": member.number,
            "start": self._start,
            "arena": self._arena,
        }
        try:
            wire.send(connection, welcome, self._arena_fd)
        except OSError as error:
            os.close(pidfd)
            raise ClosedError(f"rank {rank} closed its connection: {error}") from None
        self._next_member += 1
        return member

    def _make_room(self, there: Member) -> None:
        """Forgets a member of which nothing runs any more; raises ConfigError if it still has its rank."""
        if wire.has_ended(there.pidfd):
            self._bury(there)
            return
        self._read(there)  # its last word may have come before the one who wants its rank
        if self.members.get(there.rank) is there:
            if there.connected or there.grants:
                raise ConfigError(f"rank {there.rank} is taken by process {there.pid}, which lives")
            self._forget(there)

    def _read(self, member: Member) -> None:
        """Takes all that a member has said."""
        while member.connected:
            try:
                received = wire.receive(member.connection)
            except BlockingIOError:
                return
            except (ConfigError, OSError):
                received = None
            if received is None:
                # Its process may live on and copy. The slots and the rank stay its own until that ends.
                self._disconnect(member)
                return
            message, fd = received
            if fd is not None:
                os.close(fd)
            if message["type"] == "ended":
                report = _report_of(message)
                if report is None:
                    self._disconnect(member)
                    return
                grant, status, drained = report
                if grant in member.grants:
                    self._over(member, [grant], status, drained=drained)
            elif message["type"] == "leave":
                status = ("closed", 0, f"rank {member.rank} left")
                self._over(member, list(member.grants), status, drained=True)
                self._forget(member)
                return

    def _over(self, member: Member, grants: list[int], status: Status, *, drained: bool) -> None:
        for grant in grants:
            self._on_part(member, grant, status, drained)
            member.grants.discard(grant)  # not before: what could not be ended now ends with its process
        self.changed.notify_all()

    def _bury(self, member: Member) -> None:
        """The process has ended: nothing of it runs any more, and what it said before still counts."""
        self._read(member)
        if self.members.get(member.rank) is not member:
            return  # the last it said was that it left
        status = ("closed", 0, f"rank {member.rank}'s worker, process {member.pid}, has ended")
        self._over(member, list(member.grants), status, drained=True)
        self._forget(member)

    def _disconnect(self, member: Member) -> None:
        if member.connected:
            member.connected = False
            self._count()
            self._selector.unregister(member.connection)
            member.connection.close()

    def _count(self) -> None:
        reached = sum(member.connected for member in self.members.values())
        self.complete = reached == self._config.world_size

    def _forget(self, member: Member) -> None:
        self._disconnect(member)
        self._selector.unregister(member.pidfd)
        os.close(member.pidfd)
        self.members.pop(member.rank, None)
        self.changed.notify_all()


_claims: set[tuple[int, int]] = set()  # directories that keepers of this very process serve: a lock of the
_claims_lock = threading.Lock()  # process's own does not keep them apart


@contextlib.contextmanager
def _claimed(directory_fd: int) -> Iterator[None]:
    found = os.fstat(directory_fd)
    identity = (found.st_dev, found.st_ino)
    with _claims_lock:
        if identity in _claims:
            raise ConfigError("directory: a keeper of this process serves it already; allowed: one keeper")
        _claims.add(identity)
    try:
        yield
    finally:
        with _claims_lock:
            _claims.discard(identity)
