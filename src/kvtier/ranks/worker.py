"""Worker: one rank's process. It maps the keeper's arena and copies between slots and its own pages."""

import contextlib
import os
import select
import threading
import time
import weakref
from typing import Any

import numpy as np

from kvtier.arrays import page_array, stream_handle, tensor_views
from kvtier.config import Config
from kvtier.engine import (
    BlockOutcome,
    LoadTicket,
    NativeMoment,
    NativePages,
    NativeRankWorker,
    StoreTicket,
    cpu_device,
    group_spec,
    native_device,
)
from kvtier.errors import ClosedError, ConfigError, KVTierError, TimeoutError  # noqa: A004 - kvtier.TimeoutError
from kvtier.gpus import OpenGpus, located
from kvtier.keys import root_key
from kvtier.layout import KVLayout, check_extent
from kvtier.ranks.instruction import Instruction
from kvtier.ranks.session import Session, connect
from kvtier.tickets import checked_timeout

_RETRY_SECONDS = 0.05  # while there is no keeper yet


class RankPages:
    """Tensors of a framework, attached to a rank's worker. Made by Worker.attach().

    They stay attached when the keeper dies and another takes its place.
    """

    def __init__(self, worker: "Worker", native: NativePages, group: int) -> None:
        self._worker = worker
        self._native = native
        self.num_pages: int = native.num_pages
        self.group = group

    @property
    def layout(self) -> KVLayout:
        """The group's layout."""
        return self._worker.config.groups[self.group]

    def detach(self, timeout: float | None = None) -> None:
        """Refuses further copies and waits, without the GIL, until none touches the pages. Idempotent.

        Args:
            timeout: Seconds, None for as long as it takes.

        Raises:
            TimeoutError: Copies still run: the tensors must not be freed yet; call again.
            DeviceError: The device cannot prove that its copies are over: the tensors must never be freed.
        """
        self._worker._check_process()
        self._worker._native.detach(self._native, checked_timeout(timeout))


class Worker:
    """One rank. Joins lazily: it may be made, and its pages attached, long before there is a keeper.

    Threads: any; it has one of its own, which sleeps until copies end or the keeper has something to say.
    When the keeper ends, copies that run end harmlessly (the arena lives as long as anybody maps it), and the
    next instruction of another keeper at the same place makes the worker join that one. In a forked child
    every call raises ClosedError.

    Attributes:
        config: As the keeper's; the worker refuses to join another. Its `host` is not looked at.
        rank: Which part of every block is this one's.
    """

    def __init__(
        self, directory: str | os.PathLike[str], rank: int, config: Config, *, join_timeout: float = 30.0
    ) -> None:
        """Starts no connection yet.

        Args:
            directory: Where the keeper serves or will serve.
            rank: 0 to world_size - 1; no other living process may have it.
            config: As the keeper's.
            join_timeout: Seconds that execute() waits for the keeper at most, where it has to join first.

        Raises:
            ConfigError: An argument is not allowed.
        """
        self.config = config
        self.rank = check_extent("rank", rank, 0, config.world_size - 1)
        self._join_timeout = checked_timeout(join_timeout)
        self._directory = os.fspath(directory)
        self._process = os.getpid()
        self._native = NativeRankWorker(
            groups=[group_spec(layout, config) for layout in config.groups], rank=self.rank
        )
        self._joining = threading.Lock()  # taken before the next
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._cpu: Any = None
        self._gpus = OpenGpus(config)
        self._closing = False
        self._stopping = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._wake_fd)
        self._thread = threading.Thread(target=self._serve, name="kvtier-worker", daemon=True)
        self._thread.start()

    @property
    def joined(self) -> bool:
        """Whether it is a member of a keeper that lives, as far as it knows."""
        self._check_process()
        with self._lock:
            if self._session is not None and not self._session.listen():
                self._end_session(self._session)
            return self._session is not None

    def attach(
        self, tensors: Any, group: int = 0, *, axes: str | None = None, device: Any = None
    ) -> RankPages:
        """Makes this rank's tensors the pages of a group, as Engine.attach(). Needs no keeper."""
        self._check_open()
        check_extent("group", group, 0, len(self.config.groups) - 1)
        views, owners, where = tensor_views(tensors, self.config.groups[group], axes)
        native = native_device(located(where, views, self._gpus) if device is None else device)
        if native is None:
            with self._lock:
                if self._cpu is None:
                    self._cpu = cpu_device(self.config.copy_threads or 0)
                native = self._cpu
        return RankPages(self, self._native.attach(native, group, views, owners), group)

    def join(self, timeout: float | None = None) -> None:
        """Joins the keeper now, unless that is done. execute() does it by itself.

        Args:
            timeout: Seconds to wait for a keeper to appear, None for as long as it takes.

        Raises:
            TimeoutError: There is no keeper, it does not answer, or another thread still tries to join.
            ConfigError: The keeper's config is another, the rank is taken, or others can reach the directory.
            ClosedError: The worker was closed, or the keeper is closing.
        """
        seconds = checked_timeout(timeout)
        self._check_open()
        deadline = None if seconds is None else time.monotonic() + seconds
        patience = -1 if seconds is None else min(seconds, threading.TIMEOUT_MAX)
        if not self._joining.acquire(timeout=patience):
            raise TimeoutError(f"another thread has not joined within {timeout} s")
        try:
            self._check_open()
            if self.joined:
                return
            self._native.leave(_left(deadline))  # the arena of a keeper that is gone, when no copy needs it
            while not self._try_join(deadline):
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"no keeper serves {self._directory!r} within {timeout} s")
                time.sleep(_RETRY_SECONDS)
                self._check_open()
        finally:
            self._joining.release()

    def execute(
        self,
        instruction: Instruction,
        pages: RankPages,
        page_ids: Any,
        *,
        stream: Any = None,
        layers_per_batch: int | None = None,
    ) -> StoreTicket | LoadTicket:
        """Does this rank's part of an instruction. Does not wait for copies, but joins first where needed.

        Args:
            instruction: From the keeper; each is executed once.
            pages: This rank's pages of the instruction's group.
            page_ids: Page ids [n * pages_per_block] for its n keys, as in Engine.store() and load().
            stream: As there.
            layers_per_batch: Of a load whose blocks are all ready, as in Engine.load().

        Returns:
            A ticket for this rank's copies: `stored` says that its part is in the slot; others can hit the
            block when all ranks have stored theirs.

        Raises:
            ClosedError: The instruction is of a keeper that is gone or for another process, it is over, or it
                was executed before. Nothing was done, and nothing is to be done.
            ConfigError: An argument is not allowed. This rank's part has failed; the keeper is told.
            UnsupportedError: Layer-wise, and a block is not ready. This rank's part has failed.
            TimeoutError: No keeper answers.
        """
        if not isinstance(instruction, Instruction):
            raise ConfigError(
                f"instruction is {instruction!r}; allowed: what the keeper's store() or load() gave"
            )
        self._check_open()
        if not self.joined:
            self.join(self._join_timeout)
        mine = instruction.grant != 0 and self.rank < instruction.parts
        # Under the lock: no other arena may take this one's place before the copies are submitted.
        with self._lock:
            session = self._session
            if session is None:
                raise ClosedError("the keeper has ended")
            session.begin(instruction, mine=mine)
            try:
                return self._run(instruction, pages, page_ids, stream, layers_per_batch, mine=mine)
            except Exception as error:
                # All of these come before anything is submitted.
                if mine:  # else the other ranks would wait for ever for this one
                    code = "invalid_argument" if isinstance(error, KVTierError) else "internal"
                    session.ended(instruction.grant, (code, 0, str(error)), drained=True)
                    self._wake()
                raise

    def close(self, timeout: float | None = None) -> None:
        """Refuses new work, waits without the GIL until no copy runs, and leaves the keeper. Idempotent.

        Instructions that were not executed have failed for all ranks.

        Args:
            timeout: Seconds, None for as long as it takes.

        Raises:
            TimeoutError: Copies still run; call again.
            DeviceError: A device cannot prove that its copies are over: its tensors must never be freed.
        """
        self._check_process()
        with self._lock:
            self._closing = True
        try:
            self._native.close(checked_timeout(timeout))
        except TimeoutError:
            raise
        except KVTierError:
            self._stop()
            raise
        self._stop()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- instructions ---

    def _check_process(self) -> None:
        # Before any lock: one that the parent held as it forked is never released here.
        if os.getpid() != self._process:
            raise ClosedError("the worker belongs to the parent of this forked process")

    def _check_open(self) -> None:
        self._check_process()
        if self._closing:
            raise ClosedError("the worker is closed")

    def _run(
        self,
        instruction: Instruction,
        pages: RankPages,
        page_ids: Any,
        stream: Any,
        batch: int | None,
        *,
        mine: bool,
    ) -> StoreTicket | LoadTicket:
        if not isinstance(pages, RankPages) or pages._worker is not self or pages.group != instruction.group:
            raise ConfigError(
                f"pages is {pages!r}; allowed: this worker's pages of group {instruction.group}"
            )
        each = pages.layout.pages_per_block(self.config.block_tokens)
        wanted = instruction.num_blocks * each
        ids = page_array(
            page_ids, pages.num_pages, wanted, f"{each} for each of {instruction.num_blocks} keys"
        )
        outcomes = np.ascontiguousarray(instruction.outcomes)
        slots = np.ascontiguousarray(instruction.slots)
        if not mine:  # another rank stores it for all
            done = BlockOutcome.STORED if instruction.is_store else BlockOutcome.LOADED
            outcomes = np.where(outcomes == BlockOutcome.RUNNING, np.uint8(done), outcomes)
            slots = slots[:0]
        native = self._native.run(
            pages._native,
            id=instruction.grant if mine else 0,
            is_store=instruction.is_store,
            outcomes=outcomes,
            slots=slots,
            page_ids=ids,
            stream=stream_handle(stream),
            first_block=instruction.first_block,
            layers_per_batch=0 if batch is None else check_extent("layers_per_batch", batch),
        )
        kind = StoreTicket if instruction.is_store else LoadTicket
        return kind(native, NativeMoment, self.config.block_tokens)

    # --- the keeper ---

    def _try_join(self, deadline: float | None) -> bool:
        """Joins the keeper; False when there is none at present."""
        introduction = {"world_size": self.config.world_size, "fingerprint": root_key(self.config).hex()}
        with connect(self._directory, self.rank, introduction, _left(deadline)) as joined:
            if joined is None:
                return False
            session, arena = joined
            with self._lock:
                self._native.join(
                    chunk_bytes=arena.chunk_bytes,
                    classes=arena.classes,
                    class_of_group=arena.class_of_group,
                    fd=arena.fd,
                )
                self._native.take_ended()  # what an earlier keeper would have been told
                self._session = session
        self._wake()
        return True

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _serve(self) -> None:
        """The thread."""
        while True:
            with self._lock:
                self._pass_on_ended()
                session = self._session
                if session is not None and not session.listen():
                    self._end_session(session)
                    session = None
                sent = session is None or session.outbox.flush()
                if self._stopping and sent:
                    break
                poll = select.poll()
                poll.register(self._wake_fd, select.POLLIN)
                poll.register(self._native.ended_fd(), select.POLLIN)
                if session is not None:
                    session.watch(poll, for_writing=not sent)
            poll.poll()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        if self._session is not None:
            self._end_session(self._session)

    def _pass_on_ended(self) -> None:
        for grant, status, drained in self._native.take_ended():
            if self._session is not None and grant:
                self._session.ended(grant, status, drained=drained)

    def _end_session(self, session: Session) -> None:
        if self._session is session:
            self._session = None
        session.close()

    def _stop(self) -> None:
        """No copy runs and none will: says so, and ends the thread."""
        with self._lock:
            self._pass_on_ended()
            if self._session is not None and not self._stopping:
                self._session.outbox.put({"type": "leave"})
            self._stopping = True
        self._wake()
        self._thread.join()


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())
