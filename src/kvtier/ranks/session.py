"""Session: a worker's membership with one life of the keeper."""

import builtins
import contextlib
import os
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvtier.errors import ClosedError, ConfigError, TimeoutError  # noqa: A004 - kvtier.TimeoutError
from kvtier.ranks import wire
from kvtier.ranks.instruction import Instruction


@dataclass(frozen=True)
class Arena:
    """What the keeper said about its arena, and its descriptor, which is good while connect() lasts."""

    chunk_bytes: int
    classes: list[tuple[int, int]]
    class_of_group: list[int]
    fd: int


class Session:
    """Knows which instructions may still be begun. Not for several threads at once.

    Attributes:
        outbox: What the keeper is to be told.
    """

    def __init__(self, epoch: bytes, member: int, rank: int, connection: socket.socket, pidfd: int) -> None:
        self.outbox = wire.Outbox(connection)
        self._epoch = epoch
        self._member = member
        self._rank = rank
        self._connection = connection
        self._pidfd = pidfd
        self._begun: set[int] = set()  # grants that were begun or refused, from the floor on
        self._floor = 0
        self._closed = False

    def begin(self, instruction: Instruction, *, mine: bool) -> None:
        """Lets an instruction be executed, once.

        Args:
            instruction: Which one.
            mine: Whether this rank has anything to copy.

        Raises:
            ClosedError: It is for another process or is over: its slots may be others' by now.
        """
        if instruction.epoch != self._epoch:
            raise ClosedError("the instruction is of another life of the keeper")
        if not mine:
            return
        if instruction.members[self._rank] != self._member:
            raise ClosedError(f"the instruction is for another process that was rank {self._rank}")
        if instruction.floor > self._floor:
            self._floor = instruction.floor
            self._begun = {grant for grant in self._begun if grant >= self._floor}
        if instruction.grant < self._floor or instruction.grant in self._begun:
            raise ClosedError(
                f"the instruction (grant {instruction.grant}) is over, cancelled or was executed before"
            )
        self._begun.add(instruction.grant)

    def ended(self, grant: int, status: tuple[str, int, str], *, drained: bool) -> None:
        """Puts a report into the outbox."""
        code, native, text = status
        short = (code, native, text[:4000].encode(errors="replace").decode())  # the keeper refuses other text
        self.outbox.put({"type": "ended", "grant": grant, "status": short, "drained": drained})

    def listen(self) -> bool:
        """Takes all that the keeper has said; never waits. False when the keeper has ended or hung up."""
        if self._closed:
            return False
        gone = wire.has_ended(self._pidfd)
        while True:
            try:
                received = wire.receive(self._connection)
            except BlockingIOError:
                return not gone
            except (ConfigError, OSError):
                return False
            if received is None:
                return False
            message, fd = received
            if fd is not None:
                os.close(fd)
            if message["type"] == "cancel":
                for grant in message["grants"]:
                    if grant >= self._floor and grant not in self._begun:
                        self._begun.add(grant)
                        self.ended(
                            grant, ("closed", 0, f"cancelled before rank {self._rank} began"), drained=True
                        )

    def watch(self, poll: "select.poll", *, for_writing: bool) -> None:
        """Registers what says that listen() or the outbox has something to do."""
        if not self._closed:
            poll.register(self._connection, select.POLLIN | (select.POLLOUT if for_writing else 0))
            poll.register(self._pidfd, select.POLLIN)

    def close(self) -> None:
        """Hangs up. Idempotent."""
        if not self._closed:
            self._closed = True
            self._connection.close()
            os.close(self._pidfd)


def _leave(connection: socket.socket) -> None:
    # A closed socket would not do: a forked child of ours may keep it open.
    with contextlib.suppress(OSError):
        wire.send(connection, {"type": "leave"})


@contextlib.contextmanager
def connect(
    directory: str, rank: int, introduction: dict[str, Any], seconds: float | None
) -> Iterator[tuple[Session, Arena] | None]:
    """Introduces a rank to the keeper; None when there is none at present.

    Args:
        directory: Where the keeper serves.
        rank: Which one.
        introduction: The message `join`, less what every such message has.
        seconds: For the keeper to answer, None for as long as it takes.

    Raises:
        TimeoutError: It does not answer.
        ConfigError: It refuses this rank or this config, or others can reach the directory.
        ClosedError: It is closing.
    """
    with contextlib.ExitStack() as undo:
        try:
            directory_fd = wire.open_directory(directory)
        except FileNotFoundError:
            yield None
            return
        undo.callback(os.close, directory_fd)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        unless_joined = undo.enter_context(contextlib.ExitStack())
        unless_joined.callback(connection.close)
        try:
            connection.settimeout(seconds)
            connection.connect(wire.address(directory_fd))
            start = wire.start_time()
            wire.send(
                connection,
                {"type": "join", "version": wire.VERSION, "rank": rank, "start": start} | introduction,
            )
            unless_joined.callback(_leave, connection)  # the keeper may count us as a member from now on
            received = wire.receive(connection)
        except builtins.TimeoutError:
            raise TimeoutError(f"the keeper of {directory!r} does not answer") from None
        except OSError:
            received = None  # none yet, or what a killed one left
        if received is None:
            yield None
            return
        message, fd = received
        if fd is not None:
            undo.callback(os.close, fd)
        if message["type"] != "welcome" or fd is None:
            kind = ConfigError if message.get("kind") == "config" else ClosedError
            raise kind(str(message.get("message")))
        try:
            pidfd = wire.peer_pidfd(connection, message["start"])
        except ClosedError:
            yield None
            return
        connection.setblocking(False)
        session = Session(bytes.fromhex(message["epoch"]), message["member"], rank, connection, pidfd)
        unless_joined.pop_all()
        unless_joined.callback(session.close)
        unless_joined.callback(_leave, connection)
        told = message["arena"]
        classes = [(stride, slots) for stride, slots in told["classes"]]
        yield session, Arena(told["chunk_bytes"], classes, told["class_of_group"], fd)
        unless_joined.pop_all()
