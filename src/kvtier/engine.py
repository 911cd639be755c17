"""Engine: what users open and close. The only module, with keys.py and testing.py, that sees the native core.

layout = kvtier.KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", page_tokens=16)
config = kvtier.Config(groups=[layout], model="meta-llama/Llama-3.1-8B@0e9e39f", host="64GiB")
with kvtier.open(config) as engine:
    pages = engine.attach(kv_tensors)
    keys = kvtier.block_keys(token_ids, config)
    match = engine.lookup(keys)
    engine.load(match, pages, page_ids[: match.ready_blocks]).wait()
    ...
    engine.store(keys, pages, page_ids, stream=stream)
"""

import atexit
import contextlib
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier import _core
from kvtier.arrays import key_array, page_array, stream_handle, tensor_views
from kvtier.config import Config
from kvtier.control import ControlServer
from kvtier.disk_keys import read_keys
from kvtier.drops import Dropped, DroppedLog
from kvtier.epochs import find_epoch, named_epoch, random_epoch, save_epoch
from kvtier.errors import ClosedError, ConfigError, KVTierError
from kvtier.gpus import OpenGpus, located, numa_node_of
from kvtier.handles import (
    BlockState,
    EventKind,
    Events,
    Expected,
    Lease,
    Match,
    Pages,
    Prefetch,
    Tier,
    checked_ttl_us,
)
from kvtier.keys import Keys, check_namespace, key_bytes
from kvtier.layout import KVLayout, check_extent
from kvtier.metrics import Hops, Stats
from kvtier.tickets import (
    BlockOutcome,
    FlushResult,
    LoadResult,
    LoadTicket,
    Moment,
    StoreResult,
    StoreTicket,
    Ticket,
    checked_timeout,
)
from kvtier.traces import TraceRecorder

__all__ = [
    "BlockOutcome",
    "BlockState",
    "Dropped",
    "DroppedLog",
    "Engine",
    "EventKind",
    "Events",
    "Expected",
    "FlushResult",
    "Lease",
    "LoadResult",
    "LoadTicket",
    "Match",
    "Moment",
    "Pages",
    "Prefetch",
    "StoreResult",
    "StoreTicket",
    "Ticket",
    "Tier",
    "group_spec",
    "native_device",
    "open_engine",
]

_EXIT_PATIENCE_SECONDS = 5.0


def group_spec(layout: KVLayout, config: Config) -> _core.GroupSpec:
    """Makes the core's description of a cache group.

    Raises:
        ConfigError: The core does not allow it.
    """
    return _core.GroupSpec(
        name=layout.name,
        num_layers=layout.num_layers,
        num_parts=layout.num_parts,
        num_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        item_bytes=layout.item_bytes,
        page_tokens=layout.page_tokens,
        block_tokens=config.block_tokens,
        page_order=layout.page_order,
        window_tokens=layout.window_tokens,
        num_stripes=1 if layout.replicated else config.world_size,
    )


def native_device(device: Any) -> _core.Device | None:
    """Returns the core's device of a kvtier.testing device; None stays None."""
    native = getattr(device, "native", device)
    if native is None or isinstance(native, _core.Device):
        return native
    raise ConfigError(f"device is {device!r}; allowed: None or a device of kvtier.testing")


def native_priority(priority: str | None) -> _core.Priority | None:
    """The core's word for a caller's priority.

    Raises:
        ConfigError: Not one of those there are.
    """
    if priority is None:
        return None
    if priority not in ("low", "normal", "high"):
        raise ConfigError(f'priority is {priority!r}; allowed: None, "low", "normal" or "high"')
    native: _core.Priority = getattr(_core.Priority, priority)
    return native


def disk_options(config: Config) -> _core.DiskOptions | None:
    """Makes the core's description of the disk tier; None without one.

    Raises:
        ConfigError: A key for encryption cannot be read; the message never shows it.
    """
    if not config.disks:
        return None
    return _core.DiskOptions(
        disks=[(disk.path, disk.capacity_bytes) for disk in config.disks],
        fingerprint=config.fingerprint(),
        second_process=getattr(
            _core.SecondProcess, {"next": "next_store", "refuse": "refuse"}[config.disk_second_process]
        ),
        admission=getattr(_core.Admission, config.disk_admission.replace("-", "_")),
        eviction=config.disk_eviction,
        write_bytes_per_day=config.disk_write_bytes_per_day,
        keys=read_keys(config.disk_key),
        queue_depth=config.disk_queue_depth,
        commit_seconds=config.disk_commit_seconds,
        answer_seconds=config.disk_answer_seconds,
        catalog_helper="",
    )


class Engine:
    """Keeps KV blocks below the framework's device memory and moves them. Made by kvtier.open().

    Threads: every method from any thread. None waits for copies but detach(), flush(), close() and
    wait_until_whole(). Calls release the GIL. In a forked child every call raises ClosedError.

    Attributes:
        config: What it was opened with.
    """

    def __init__(
        self,
        config: Config,
        *,
        memory: Any = None,
        clock: Any = None,
        hash_seed: int | None = None,
        drive: Any = None,
    ) -> None:
        """Opens an engine; kvtier.open() is the same.

        Args:
            config: The config.
            memory: For tests: a host memory of kvtier.testing.
            clock: For tests: a kvtier.testing.ManualClock.
            hash_seed: For tests: seed of the index; None is random.
            drive: For tests: a kvtier.testing.SimulatedDrive; the disk tier is on it.
        """
        if not isinstance(config, Config):
            raise ConfigError(f"config is {config!r}; allowed: a kvtier.Config")
        self.config = config
        # Held while a drop is announced, and by who must not store behind it what he had from before.
        self._dropping = threading.RLock()
        self._dropped_logs: weakref.WeakSet[DroppedLog] = weakref.WeakSet()
        self._recorder: TraceRecorder | None = None
        if config.trace is not None:
            self._recorder = TraceRecorder(config.trace, config.block_tokens)
            weakref.finalize(self, self._recorder.close)
        self._gpus = OpenGpus(config)
        disk = disk_options(config)
        if drive is not None and disk is not None:
            drive.native.simulate(disk)
        self._native = _core.Engine.open(
            groups=[group_spec(layout, config) for layout in config.groups],
            host_bytes=config.host_bytes,
            chunk_bytes=config.chunk_bytes,
            copy_threads=config.copy_threads or 0,
            memory=getattr(memory, "native", memory),
            clock=clock,
            hash_seed=hash_seed,
            eviction=config.eviction,
            disk=disk,
            ghosts=config.ghosts,
            numa_node=numa_node_of(config),
            numa_required=isinstance(config.host_numa_node, int),
            events=config.events,
        )
        drives = [disk for disk in self.stats().disks if disk.store]
        self._drives = [disk.path for disk in drives]
        try:
            if epoch := find_epoch(config, [(disk.path, disk.opened_from == "fresh") for disk in drives]):
                self._move_to(epoch, next_start=epoch)
        except KVTierError:
            self._native.close(_EXIT_PATIENCE_SECONDS)
            raise
        self._control: ControlServer | None = None
        if stores := [Path(disk.path) / "stores" / disk.store for disk in drives]:
            # Not bound to us: an engine that nobody refers to any more ends, and its sockets with it.
            engine = weakref.ref(self)
            self._control = ControlServer(
                stores,
                lambda namespace: _purge(engine(), namespace),
                lambda store: _hits(engine(), store),
            )
            weakref.finalize(self, self._control.close, _EXIT_PATIENCE_SECONDS).atexit = False
        _open_engines.add(self)

    def attach(self, tensors: Any, group: int = 0, *, axes: str | None = None, device: Any = None) -> Pages:
        """Makes a framework's tensors the pages of a group. Copies nothing.

        Args:
            tensors: One tensor per layer; or two per layer, key, value, key, value ... (axes without K); or
                one for all layers (axes with L). torch, NumPy, CuPy, anything with
                DLPack or __cuda_array_interface__, or (ptr, shape, strides_bytes,
                itemsize); writable, any strides of 0 or more, dimension D contiguous.
            group: Index into Config.groups.
            axes: A letter for each dimension: P page, L layer, K part, T token, H head, D dimension.
                Default: "P" and the layout's page_order. "PKTHD" FlashInfer NHD, "PKHTD" HND, "KPTHD" vLLM.
            device: None: where the tensors are, on the CPU or a GPU. Or a device of kvtier.testing.

        Returns:
            The pages. The engine keeps the tensors alive until they are detached.

        Raises:
            ConfigError: A tensor does not fit; the message names tensor, axis, value and what is allowed.
            UnsupportedError: GPU tensors, and no CUDA device; the message says what is missing.
            ClosedError: The engine is closed.
        """
        check_extent("group", group, 0, len(self.config.groups) - 1)
        layout = self.config.groups[group]
        views, owners, where = tensor_views(tensors, layout, axes, device_given=device is not None)
        native = native_device(located(where, views, self._gpus) if device is None else device)
        pages = self._native.attach(native, group, views, owners)
        return Pages(self._native, pages, self.config.groups[group], group)

    def lookup(self, keys: Any, *, record: bool = True) -> Match:
        """Says which blocks are there. Never waits, does no I/O and touches no recency.

        Args:
            keys: Keys [n, 32] in prompt order, as from block_keys(); read without a copy.
            record: Whether this is a request's whole prompt and so belongs into a trace (Config(trace=)).
                Who looks up parts of a prompt, or again, says False and tells record() of the prompt.

        Raises:
            ConfigError: Not keys.
            ClosedError: The engine is closed.
        """
        array = key_array(keys)
        found = self._native.lookup(array)
        if record and self._recorder is not None:
            self._recorder.request(array)
        return Match(self._native, self.config, array, found)

    def record(self, keys: Any) -> None:
        """Adds a request to the trace that is being recorded. Without Config(trace=) it does nothing.

        For who knows requests apart: a lookup() that repeats the one before counts as the same request.

        Args:
            keys: Keys [n, 32] of its whole prompt.

        Raises:
            ConfigError: Not keys.
            ClosedError: In a forked child.
        """
        if self._recorder is not None:
            self._recorder.request(key_array(keys), may_repeat=False)

    def _transfer_arguments(
        self, keys: Any, pages: Any, page_ids: Any, first_block: int
    ) -> tuple[Keys, npt.NDArray[np.uint32]]:
        if not isinstance(pages, Pages) or pages._engine is not self._native:
            raise ConfigError(f"pages is {pages!r}; allowed: what attach() of this engine returned")
        array = key_array(keys)
        check_extent("first_block", first_block, 0, 2**32 - 1)
        each = pages.layout.pages_per_block(self.config.block_tokens)
        ids = page_array(
            page_ids, pages.num_pages, len(array) * each, f"{each} for each of {len(array)} keys"
        )
        return array, ids

    def store(
        self,
        keys: Any,
        pages: Pages,
        page_ids: Any,
        *,
        stream: Any = None,
        first_block: int = 0,
        parent: Any = None,
        namespace: str = "",
        priority: str | None = None,
        ttl: float | None = None,
    ) -> StoreTicket:
        """Copies blocks from pages into the tier, behind what `stream` has been given so far.

        Does not wait for the copies: the pages must not change until `released` of the ticket.

        Args:
            keys: Keys [n, 32] in prompt order.
            pages: Where the blocks are.
            page_ids: Page ids [n * pages_per_block], in order; where a page holds several blocks one per key,
                and block i is part (first_block + i) % blocks_per_page of its page. Any integers.
            stream: Stream whose kernels write the pages: None for the framework's default stream, a native
                handle, or a torch or CuPy stream. On the CPU there is only None, the calling thread.
            first_block: Index of keys[0] in its sequence.
            parent: Key of the block before keys[0], where it is known. Parents outlive their descendants.
            namespace: The tenant, for drop(namespace=...).
            priority: "low", "normal" or "high": blocks of a lower one are evicted first, whatever the policy,
                and no block takes the place of one of a higher one: it is declined. Also of blocks that are
                there already; the last word counts. None leaves those as they are, and new ones "normal".
            ttl: Seconds from now after which the blocks are gone, as if dropped; until then they are in the
                host tier alone. Of several stores the longest counts, and None is for ever: a block that was
                stored without, or is on a drive, gets none.

        Raises:
            ConfigError: An argument is not allowed; nothing was done.
            ClosedError: The engine is closed, or the pages are detached.
        """
        array, ids = self._transfer_arguments(keys, pages, page_ids, first_block)
        above = None if parent is None else key_bytes(parent, "parent")
        native = self._native.store(
            pages._native,
            array,
            ids,
            stream_handle(stream),
            first_block,
            above,
            check_namespace(namespace),
            native_priority(priority),
            checked_ttl_us(ttl),
        )
        return StoreTicket(native, _core.Moment, self.config.block_tokens)

    def load(
        self,
        what: Any,
        pages: Pages,
        page_ids: Any,
        *,
        stream: Any = None,
        first_block: int = 0,
        layers_per_batch: int | None = None,
    ) -> LoadTicket:
        """Copies blocks from the tier into pages, behind what `stream` has been given so far.

        Does not wait for the copies: read the pages when the ticket is done, or, where nothing comes
        from disk, behind its wait_stream().

        Args:
            what: A Lease or a Match (its ready prefix), or keys [n, 32].
            pages: Where the blocks go.
            page_ids: As for store(); no place twice.
            stream: Stream whose kernels used the pages before; as for store().
            first_block: Index of the first key in its sequence.
            layers_per_batch: Load layer by layer, with one batch of copies and one event for so many layers
                (LoadTicket.wait_layer). Needs every block ready. None loads whole blocks.

        Raises:
            ConfigError: An argument is not allowed; nothing was done.
            UnsupportedError: Layer-wise, and a block is not ready; load whole blocks instead.
            ClosedError: The engine is closed, or the pages are detached.
        """
        keys = what
        if isinstance(what, Lease):
            keys = what.keys
        elif isinstance(what, Match):
            keys = what.keys[: what.ready_blocks]
        array, ids = self._transfer_arguments(keys, pages, page_ids, first_block)
        batch = 0 if layers_per_batch is None else check_extent("layers_per_batch", layers_per_batch)
        native = self._native.load(pages._native, array, ids, stream_handle(stream), first_block, batch)
        return LoadTicket(native, _core.Moment, self.config.block_tokens)

    def prefetch(self, keys: Any, deadline: float | None = None) -> Prefetch:
        """Brings blocks that are on disk alone into the host tier, behind all loads. Never waits.

        To be called as soon as a request is known. Nothing holds the blocks there but their recency.

        Args:
            keys: Keys [n, 32] in prompt order.
            deadline: Seconds from now; reads that have not begun by then are given up. None for never.

        Raises:
            ConfigError: Not keys, or not a number of seconds.
            ClosedError: The engine is closed.
        """
        native = self._native.prefetch(key_array(keys), checked_timeout(deadline, "deadline"))
        return Prefetch(self._native, native, _core.Moment.ready, len(self.config.groups))

    def expect(self, keys: Any, *, prefetch: bool = True) -> Expected:
        """Says that a request waits which will want these blocks. Never waits.

        To be called when it is queued, and ended when it is scheduled. What is on disk alone is brought into
        the host tier as by prefetch(). Until the end, a policy that looks ahead ("return-hazard") lets these
        blocks go only when nothing else is left; to the others it is no more than the prefetch.

        Args:
            keys: Keys [n, 32] in prompt order.
            prefetch: False where somebody else sees to what is on disk.

        Raises:
            ConfigError: Not keys.
            ClosedError: The engine is closed.
        """
        array = key_array(keys)
        native = self._native.expect(array)
        return Expected(native, self.prefetch(array) if prefetch else None)

    def touch(self, keys: Any) -> int:
        """Makes blocks the most recently used, the last key the oldest of them.

        Returns:
            Blocks that were there, summed over groups.
        """
        return self._native.touch(key_array(keys))

    def drop(self, keys: Any = None, namespace: str | None = None) -> int:
        """Forgets blocks: no lookup finds them when it returns. Running loads of them finish unharmed.

        With a disk tier, waits without the GIL until the drives confirm that no restart finds them either.
        A PagedKVCache does not match or store their device pages any more either.

        Args:
            keys: Keys [n, 32], or None.
            namespace: Or all that was stored under a namespace.

        Returns:
            Blocks that were there, summed over groups.

        Raises:
            ConfigError: Neither or both are given.
            StorageError: The blocks are gone from memory, but a drive did not confirm it.
        """
        if (keys is None) == (namespace is None):
            given = "neither keys nor namespace" if keys is None else "both keys and namespace"
            raise ConfigError(f"drop() is given {given}; allowed: one of the two")
        if namespace is not None:
            with self._logged(Dropped(namespace=check_namespace(namespace))):
                return self._native.drop_namespace(namespace)
        array = key_array(keys)
        with self._logged(Dropped(keys=array.copy())):
            return self._native.drop(array)

    def reset(self, weights_version: str | None = None) -> None:
        """Says that the model's weights have changed: no call finds what was stored before it.

        The device pages of a PagedKVCache included; its open sequences run on with what they hold.

        Moves to a new epoch, which keys are mixed with from now on, and makes durable on every drive that a
        restart finds nothing of before either. Blocks of before are not wiped (drop() does that); they make
        room as what is used least. Stores that are running end under the old epoch, running loads finish.

        Without a name what is stored from now on is served as long as this engine lives, and is not found
        after a restart: that may well begin with other weights, those of the model's files.

        Engines of the same model that share a directory each have to be reset; the last one's epoch is that
        of the next start. Never waits for copies; waits for the drives (a sync each), with the GIL.

        Args:
            weights_version: Names the weights from now on. Whoever resets to the same name again, in this
                process or after a restart, finds what was stored under it; a restart begins with it. None
                for weights that nobody comes back to.

        Raises:
            ConfigError: Not a str, or an empty one.
            StorageError: A drive did not take the epoch. This engine finds nothing of before, but that drive
                may after a restart: call again.
            ClosedError: The engine is closed.
        """
        if weights_version is not None and (not isinstance(weights_version, str) or not weights_version):
            raise ConfigError(
                f"weights_version is {weights_version!r}; allowed: None or a str that is not empty"
            )
        epoch = random_epoch() if weights_version is None else named_epoch(weights_version)
        self._move_to(epoch, next_start=random_epoch() if weights_version is None else epoch)

    def _move_to(self, epoch: bytes, *, next_start: bytes) -> None:
        with self._logged(Dropped()):
            self._native.set_epoch(epoch)  # first: whatever happens, nothing of before is served
        save_epoch(self.config, next_start, self._drives)

    @contextlib.contextmanager
    def _logged(self, dropped: Dropped) -> Iterator[None]:
        """Inside, something is dropped; the logs say so from before on."""
        dropped.running = True
        with self.no_drop():
            for log in self._dropped_logs:
                log.add(dropped)
        try:
            yield
        finally:
            dropped.running = False

    def dropped_log(self) -> DroppedLog:
        """A log of what drop() and reset() take away from now on, for as long as somebody keeps it."""
        log = DroppedLog()
        with self._dropping:
            self._dropped_logs.add(log)
        return log

    def no_drop(self) -> contextlib.AbstractContextManager[object]:
        """Inside, no drop() or reset() of another thread begins. Does not wait for those that run.

        What is stored from there, and no drop in the log names, is not from before a drop: it is stored
        before the drop, which finds it then, or made after it.
        """
        # A forked child may have it locked by a thread that it does not have. There every call fails anyway.
        return contextlib.nullcontext() if self.closed else self._dropping

    def poll(self) -> int:
        """Ends leases whose time is over. Never waits; nothing needs it to make progress.

        Returns:
            Transfers that are running.
        """
        return self._native.poll()

    def flush(self, timeout: float | None = None) -> FlushResult:
        """Waits, without the GIL, until every store submitted before the call has settled.

        With a disk tier, also until each of their blocks is durable or will never be.

        Args:
            timeout: Seconds, None for as long as it takes.

        Raises:
            TimeoutError: The time is over. The stores go on.
        """
        return FlushResult(*self._native.flush(checked_timeout(timeout)))

    def events(self, most: int | None = None) -> Events:
        """Takes the events since the last call: which blocks came into and left which tier. Never waits.

        Each is told once, so there is one reader. A block in both tiers has events of both. What the drives
        held at open is not announced; what leaves them is. What is evicted after a reset() of blocks from
        before it has keys that nobody knows.

        Args:
            most: At most so many, the oldest; None for all.

        Raises:
            UnsupportedError: Config.events is 0.
            ClosedError: The engine is closed.
        """
        limit = 2**63 - 1 if most is None else check_extent("most", most, 0, 2**63 - 1)
        return Events(*self._native.take_events(limit))

    def wait_until_whole(self) -> None:
        """Waits, without the GIL, until the whole host tier is prefaulted. For benchmarks."""
        self._native.wait_until_whole()

    @contextlib.contextmanager
    def _without_ghosts(self) -> Iterator[None]:
        """Inside, the ghost caches note nothing. For benchmarks: what do they cost?"""
        self._native.pause_ghosts()
        try:
            yield
        finally:
            self._native.resume_ghosts()

    def hops(self) -> Hops:
        """How fast loads and reads from disk go, as in stats(); cheap enough for every request."""
        return Hops.from_native(self._native.hops())

    def stats(self) -> Stats:
        """One consistent snapshot."""
        return Stats.from_native(self._native.stats())

    @property
    def closed(self) -> bool:
        """Whether close() was called (or a fork made this somebody else's engine)."""
        return self._native.closed

    def close(self, timeout: float | None = None) -> None:
        """Refuses new work, waits without the GIL until running transfers have ended, frees everything.

        With a disk tier, what was stored is made durable first.

        Idempotent; ends leases and lets go of attached tensors.

        Args:
            timeout: Seconds, None for as long as it takes.

        Raises:
            TimeoutError: Copies, or a purge over the control socket, still run. The engine takes no new work,
                its memory and the tensors stay until a later close() succeeds.
            DeviceError: A device cannot prove that its copies are over. The engine is closed; its memory and
                the attached tensors are never freed.
        """
        seconds = checked_timeout(timeout)
        try:
            if self._control is not None:
                self._control.close(seconds)
        finally:  # a purge that still runs is no reason to leave transfers running at exit
            self._native.close(seconds)
        if self._recorder is not None:
            self._recorder.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _purge(engine: Engine | None, namespace: str) -> int:
    """What the control socket asks for."""
    if engine is None:
        raise ClosedError("the engine is closed")
    return engine.drop(namespace=namespace)


def _hits(engine: Engine | None, store: Path) -> dict[str, int]:
    """Likewise."""
    if engine is None:
        raise ClosedError("the engine is closed")
    stats = engine.stats()
    return {
        "read": sum(
            disk.reads_good for disk in stats.disks if Path(disk.path, "stores", disk.store) == store
        ),
        "lookup_blocks": stats.lookup_blocks,
        "lookup_hits_host": stats.lookup_hits_host,
        "lookup_hits_disk": stats.lookup_hits_disk,
    }


def open_engine(config: Config) -> Engine:
    """Opens an engine; use it as a context manager, or close() it.

    Returns as soon as the first part of the host tier is ready; the rest follows in the background.

    Args:
        config: The config.

    Raises:
        ConfigError: The config is not allowed, or its trace cannot be written.
        ResourceError: The machine has not that much memory left.
    """
    return Engine(config)


_open_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()


@atexit.register
def _close_at_exit() -> None:
    """Ends transfers while their tensors are still there; what does not end in time is left to the kernel."""
    with contextlib.ExitStack() as every:  # each is closed, whatever another raises
        for engine in list(_open_engines):
            every.enter_context(contextlib.suppress(KVTierError))
            every.callback(engine.close, _EXIT_PATIENCE_SECONDS)


def copy_limit(destination: Any, source: Any, *, method: str, threads: int) -> float:
    """What the machine itself can do: a plain contiguous copy, for benchmarks. Waits, without the GIL.

    Args:
        destination: Contiguous uint8 array, as long as `source`.
        source: Contiguous uint8 array.
        method: "memcpy", the C library's, or "streaming", non-temporal.
        threads: That copy a share each.

    Returns:
        Seconds, without the start of the threads.
    """
    return _core.copy_limit(destination=destination, source=source, method=method, threads=threads)


def copy_runs_limit(
    destination: Any,
    source: Any,
    to_offsets: Any,
    from_offsets: Any,
    run_bytes: int,
    *,
    method: str,
    threads: int,
) -> float:
    """The same run by run, as a loop over scattered pages copies. Waits, without the GIL.

    Args:
        destination: Contiguous uint8 array.
        source: Contiguous uint8 array; the two do not overlap.
        to_offsets: int64 [runs]: where each run is written, bytes from the start of `destination`.
        from_offsets: int64 [runs]: where it is read in `source`.
        run_bytes: Of every run.
        method: "memcpy", the C library's, or "streaming", non-temporal.
        threads: That many, each with as many runs.

    Returns:
        Seconds, without the start of the threads.

    Raises:
        ConfigError: Offsets beyond their array or not equally many, an unknown method, no threads.
    """
    return _core.copy_runs_limit(
        destination=destination,
        source=source,
        to_offsets=to_offsets,
        from_offsets=from_offsets,
        run_bytes=run_bytes,
        method=method,
        threads=threads,
    )


def stream_isa() -> str:
    """Which non-temporal stores this machine has."""
    return _core.stream_isa()


# One slot store driven at full depth, for `kvtier bench disk`.
DiskBench = _core.DiskBench

# What kvtier.ranks needs of the core.
NativeMoment = _core.Moment
NativePages = _core.Pages
NativeRankWorker = _core.RankWorker
arena_of = _core.arena_of
cpu_device = _core.cpu_device
finish_part = _core.finish_part
grant_load = _core.grant_load
grant_store = _core.grant_store
