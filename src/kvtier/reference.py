"""ReferenceCache: what an engine does, as a model that can be read in one sitting.

The engine is C++ with threads, devices and one mutex; this is the same observable behaviour in plain Python:
single-threaded, with blocks as `bytes` in a dict and the recency of each size class as a list, oldest first.
Tests run both side by side and compare outcomes, bytes, counters and the set of resident blocks after every
step, so the model predicts evictions exactly. It is deliberately naive: every operation costs O(blocks).

The rules, each stated once:

* A store reserves slots in prompt order. The first block that gets none ends it: that one and all behind it
  are declined. Blocks become ready tail first, so that the tail of a prompt is older than its head.
* load, pin, touch and (for what was there already) store make blocks young, tail first too; lookup does not.
* A slot is made free by evicting the oldest block that is not pinned, has no resident child and is not the
  parent of the block that the slot is for. Being passed over is no use: what may not go keeps its age.
* Of blocks that may go those of the lowest priority go first. None goes for a block of a lower one.
* A block whose time to live is over is dropped by the next call. The longest of its stores counts.
* A dropped block is gone for lookups at once. Its slot is free once nobody fills or reads it.

A copy takes time: begin_store() and begin_load() return an operation that holds its slots or pins until
finish(). store() and load() do both at once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvtier.config import Config
from kvtier.errors import ClosedError, ConfigError

_PRIORITIES = ("low", "normal", "high")
_SLOT_ALIGNMENT = 4096
_SLOT_HEADER_BYTES = 4096


@dataclass(eq=False)
class _Block:
    """One block, from the reservation of its slot until the slot is free again."""

    key: bytes
    group: int
    namespace: str
    content: bytes
    parent: "_Block | None"
    state: str = "filling"  # then "ready" or "gone"; from "ready" to "leaving" or "gone"
    linked: bool = True  # findable
    children: int = 0
    pins: int = 0
    priority: int = 1
    expires_us: int | None = None


@dataclass(frozen=True)
class SlotCounts:
    """Slots of one size class by state; the sum is its capacity (I1)."""

    free: int
    filling: int
    ready: int
    leaving: int


@dataclass(frozen=True)
class ReferenceMatch:
    """What lookup() found.

    Attributes:
        states: "miss", "pending" or "ready", [group][key].
        ready_blocks: Length of the longest prefix that every group can restore.
    """

    states: list[list[str]]
    ready_blocks: int


@dataclass(eq=False)
class ReferenceLease:
    """Pins on a prefix, until release(), ReferenceCache.close() or the end of its time."""

    num_blocks: int
    expires_us: int | None
    _cache: "ReferenceCache"
    _pinned: list[_Block] = field(default_factory=list)
    active: bool = True

    def release(self) -> None:
        """Ends the pins. Idempotent."""
        self._cache._end_lease(self)


@dataclass(eq=False)
class ReferenceOperation:
    """A store or load between its begin and its end.

    Attributes:
        outcomes: One name of a kvtier.BlockOutcome per key; "running" for what waits for finish().
        contents: Of a load, after finish(): the bytes of each block that was loaded, else None.
    """

    outcomes: list[str]
    contents: list[bytes | None]
    _finish: "Callable[[ReferenceOperation, bool], None]"
    _blocks: list[tuple[int, _Block]] = field(default_factory=list)
    _over: bool = False

    @property
    def has_copies(self) -> bool:
        """Whether anything is to be copied; if not, it was over when it began."""
        return bool(self._blocks)

    def finish(self, *, failed: bool = False) -> list[str]:
        """Ends the copies.

        Args:
            failed: The device refused or lost them: a store leaves nothing, a load no contents.

        Returns:
            The outcomes.
        """
        if not self._over:
            self._over = True
            self._finish(self, failed)
        return self.outcomes


class ReferenceCache:
    """The observable behaviour of an Engine, single-threaded and without memory of its own.

    Attributes:
        now_us: The clock that leases' times to live are measured with; tests advance it.
        counters: The counters of kvtier.Stats, under the same names.
    """

    def __init__(
        self,
        slots_per_class: Sequence[int],
        class_of_group: Sequence[int] = (0,),
        window_blocks: Sequence[int | None] | None = None,
    ) -> None:
        """Makes an empty cache.

        Args:
            slots_per_class: Capacity of each size class, in blocks.
            class_of_group: The size class of each group.
            window_blocks: Of each group, the blocks that its sliding window reaches back to; None for full
                attention, which needs all of them.

        Raises:
            ConfigError: The arguments do not fit each other.
        """
        windows = list(window_blocks) if window_blocks is not None else [None] * len(class_of_group)
        if len(windows) != len(class_of_group):
            raise ConfigError(
                f"window_blocks has {len(windows)} entries; there are {len(class_of_group)} groups"
            )
        if not all(0 <= c < len(slots_per_class) for c in class_of_group):
            raise ConfigError(f"class_of_group is {class_of_group}; allowed: 0 to {len(slots_per_class) - 1}")
        self._capacity = list(slots_per_class)
        self._class_of_group = list(class_of_group)
        self._windows = windows
        self._held: list[list[_Block]] = [[] for _ in slots_per_class]  # every block that has a slot
        self._by_age: list[list[_Block]] = [
            [] for _ in slots_per_class
        ]  # the ready and linked ones, oldest first
        self._found: dict[tuple[bytes, int], _Block] = {}  # the linked ones
        self._leases: list[ReferenceLease] = []
        self._closed = False
        self._failed = False
        self.now_us = 0
        self.counters = dict.fromkeys(_COUNTERS, 0)

    @classmethod
    def for_config(cls, config: Config) -> "ReferenceCache":
        """Makes an empty cache with the capacity of an engine of this config."""
        strides = []
        for layout in config.groups:
            stripes = 1 if layout.replicated else config.world_size
            image = _SLOT_HEADER_BYTES + layout.block_bytes(config.block_tokens) * stripes
            strides.append(-(-image // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT)
        blocks = config.host_bytes // sum(strides)  # of every group
        classes = sorted(set(strides))
        windows = [
            None
            if layout.window_tokens is None
            else max(1, -(-(layout.window_tokens - 1) // config.block_tokens))
            for layout in config.groups
        ]
        slots = [blocks * strides.count(stride) for stride in classes]
        return cls(slots, [classes.index(stride) for stride in strides], windows)

    # --- what it holds ---

    @property
    def num_groups(self) -> int:
        """Number of cache groups."""
        return len(self._class_of_group)

    @property
    def pins(self) -> int:
        """Pins of all leases and running loads."""
        return sum(block.pins for held in self._held for block in held)

    @property
    def pinned_blocks(self) -> int:
        """Blocks with at least one pin."""
        return sum(block.pins > 0 for held in self._held for block in held)

    @property
    def num_leases(self) -> int:
        """Leases that have not ended."""
        return len(self._leases)

    def slot_counts(self) -> list[SlotCounts]:
        """Slots by state, one entry per size class."""
        counts = []
        for capacity, held in zip(self._capacity, self._held, strict=True):
            states = [block.state for block in held]
            filling, ready, leaving = (states.count(state) for state in ("filling", "ready", "leaving"))
            counts.append(SlotCounts(capacity - len(held), filling, ready, leaving))
        return counts

    def by_age(self, class_index: int = 0) -> list[tuple[bytes, int]]:
        """(key, group) of the ready blocks of a size class, oldest first."""
        return [(block.key, block.group) for block in self._by_age[class_index]]

    def resident(self) -> dict[tuple[bytes, int], bytes]:
        """Content of every ready block, by (key, group)."""
        return {at: block.content for at, block in self._found.items() if block.state == "ready"}

    # --- lookups and leases ---

    def lookup(self, keys: Sequence[bytes]) -> ReferenceMatch:
        """Says which blocks are there; changes counters only."""
        self._check_open()
        self._expire_blocks()
        asked = len(keys) * self.num_groups
        self.counters["lookup_blocks"] += asked
        states = [[self._state(key, group) for key in keys] for group in range(self.num_groups)]
        everything = [state for of_group in states for state in of_group]
        if self._failed:
            self.counters["lookup_misses_failed"] += asked
        else:
            self.counters["lookup_hits_host"] += everything.count("ready")
            self.counters["lookup_misses_pending"] += everything.count("pending")
            self.counters["lookup_misses_absent"] += everything.count("miss")
        return ReferenceMatch(states, self._ready_prefix(states, len(keys)))

    def pin(
        self, keys: Sequence[bytes], max_blocks: int | None = None, ttl_us: int | None = None
    ) -> ReferenceLease:
        """Pins the ready prefix of `keys`, and makes it young."""
        self._check_open()
        self._expire_blocks()
        keys = keys if max_blocks is None else keys[:max_blocks]
        states = [[self._state(key, group) for key in keys] for group in range(self.num_groups)]
        prefix = self._ready_prefix(states, len(keys))
        expires_us = None if ttl_us is None else self.now_us + ttl_us
        lease = ReferenceLease(prefix, expires_us, self)
        for group in range(self.num_groups):
            for i in reversed(range(self._first_needed(group, prefix), prefix)):
                block = self._found[keys[i], group]
                block.pins += 1
                self._make_young(block)
                lease._pinned.append(block)
        self._leases.append(lease)
        return lease

    def poll(self) -> None:
        """Ends the leases and drops the blocks whose time is over."""
        self._check_open()
        self._expire_blocks()
        self._expire_leases()

    # --- stores and loads ---

    def begin_store(
        self,
        keys: Sequence[bytes],
        contents: Sequence[bytes],
        *,
        group: int = 0,
        parent: bytes | None = None,
        namespace: str = "",
        priority: str | None = None,
        ttl_us: int | None = None,
    ) -> ReferenceOperation:
        """Reserves a slot for every block that is not there.

        Args:
            keys: The blocks, in prompt order.
            contents: Their bytes.
            group: The cache group that they belong to.
            parent: Key of the block before keys[0], None when there is none or it is not known.
            namespace: Whom they belong to.
            priority: Of all of them from now on; None leaves it, and is "normal" for new ones.
            ttl_us: Until when they live, from now; None is for ever.
        """
        self._check_open()
        self._expire_blocks()
        self._expire_leases()
        expires_us = None if ttl_us is None else self.now_us + ttl_us
        rank = None if priority is None else _PRIORITIES.index(priority)
        operation = ReferenceOperation(["running"] * len(keys), [None] * len(keys), self._finish_store)
        touched: list[_Block] = []  # in use until the end, so that no reservation evicts them
        above = self._found.get((parent, group)) if parent is not None else None
        if above is not None and above.state == "ready":
            above.pins += 1
            touched.append(above)
        else:
            above = None
        declined = self._failed
        for i, key in enumerate(keys):
            if declined:
                operation.outcomes[i] = "declined"
                continue
            there = self._found.get((key, group))
            if there is not None:
                there.priority = there.priority if rank is None else rank
                if there.expires_us is not None:
                    there.expires_us = None if expires_us is None else max(there.expires_us, expires_us)
            if there is not None and there.state == "ready":
                operation.outcomes[i] = "present"
                there.pins += 1
                touched.append(there)
                above = there
            elif there is not None:
                operation.outcomes[i] = "pending"
                above = None  # its fate is not known, so nothing may hang on it
            elif not self._has_room(self._class_of_group[group], above, 1 if rank is None else rank):
                operation.outcomes[i] = "declined"
                declined = True
            else:
                block = _Block(key, group, namespace, contents[i], above, expires_us=expires_us)
                block.priority = block.priority if rank is None else rank
                if above is not None:
                    above.children += 1
                self._held[self._class_of_group[group]].append(block)
                self._found[key, group] = block
                operation._blocks.append((i, block))
                above = block
        for block in reversed(touched):
            self._make_young(block)
            self._unpin(block)
        if not operation.has_copies:
            operation.finish()
        return operation

    def begin_load(self, keys: Sequence[bytes], *, group: int = 0) -> ReferenceOperation:
        """Pins what is ready and makes it young; finish() delivers the bytes and ends the pins."""
        self._check_open()
        self._expire_blocks()
        operation = ReferenceOperation(["running"] * len(keys), [None] * len(keys), self._finish_load)
        for i, key in enumerate(keys):
            state = self._state(key, group)
            if state == "ready":
                block = self._found[key, group]
                block.pins += 1
                operation._blocks.append((i, block))
            else:
                operation.outcomes[i] = "pending" if state == "pending" else "missed"
        for _, block in reversed(operation._blocks):
            self._make_young(block)
        if not operation.has_copies:
            operation.finish()
        return operation

    def store(
        self,
        keys: Sequence[bytes],
        contents: Sequence[bytes],
        *,
        group: int = 0,
        parent: bytes | None = None,
        namespace: str = "",
        failed: bool = False,
    ) -> list[str]:
        """begin_store() and finish() in one; returns the outcomes."""
        operation = self.begin_store(keys, contents, group=group, parent=parent, namespace=namespace)
        return operation.finish(failed=failed)

    def load(self, keys: Sequence[bytes], *, group: int = 0) -> list[bytes | None]:
        """begin_load() and finish() in one; returns the bytes of each block, None for those not loaded."""
        operation = self.begin_load(keys, group=group)
        operation.finish()
        return operation.contents

    # --- the rest ---

    def touch(self, keys: Sequence[bytes]) -> int:
        """Makes the ready blocks of `keys` young, in every group; returns how many."""
        self._check_open()
        self._expire_blocks()
        touched = 0
        for key in reversed(keys):
            for group in range(self.num_groups):
                block = self._found.get((key, group))
                if block is not None and block.state == "ready":
                    self._make_young(block)
                    touched += 1
        return touched

    def drop(self, keys: Iterable[bytes]) -> int:
        """Makes the blocks of `keys` unfindable, in every group; returns how many."""
        self._check_open()
        found = (
            self._found.get((key, group)) for key in dict.fromkeys(keys) for group in range(self.num_groups)
        )
        return self._drop_all([block for block in found if block is not None])

    def drop_namespace(self, namespace: str) -> int:
        """Makes every block of a namespace unfindable; returns how many."""
        self._check_open()
        return self._drop_all([block for block in self._found.values() if block.namespace == namespace])

    def fail(self) -> None:
        """A sticky device error was seen: from now on lookups and loads miss, stores are declined."""
        self._failed = True

    def close(self) -> None:
        """Ends all leases, and every later call raises ClosedError. Requires that no operation runs."""
        self._closed = True
        for lease in list(self._leases):
            lease.release()

    # --- the inside ---

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the cache is closed")

    def _state(self, key: bytes, group: int) -> str:
        block = self._found.get((key, group))
        if block is None or self._failed:
            return "miss"
        return "ready" if block.state == "ready" else "pending"

    def _first_needed(self, group: int, prefix: int) -> int:
        """First block that a group must have for a prefix of so many blocks to be usable."""
        window = self._windows[group]
        return 0 if window is None else max(0, prefix - window)

    def _ready_prefix(self, states: list[list[str]], num_keys: int) -> int:
        def usable(prefix: int) -> bool:
            return all(
                state == "ready"
                for group, of_group in enumerate(states)
                for state in of_group[self._first_needed(group, prefix) : prefix]
            )

        return max(prefix for prefix in range(num_keys + 1) if usable(prefix))

    def _has_room(self, class_index: int, spared: _Block | None, priority: int) -> bool:
        """Makes room in a size class if it can. `spared` is the parent of what the slot is for."""
        if len(self._held[class_index]) < self._capacity[class_index]:
            return True
        for block in sorted(self._by_age[class_index], key=lambda block: block.priority):  # else oldest first
            if block.priority > priority:
                break
            if block.pins == 0 and block.children == 0 and block is not spared:
                self._unlink(block)
                self.counters["evictions"] += 1
                return True
        return False

    def _make_young(self, block: _Block) -> None:
        by_age = self._by_age[self._class_of_group[block.group]]
        by_age.remove(block)
        by_age.append(block)

    def _unlink(self, block: _Block) -> None:
        del self._found[block.key, block.group]
        block.linked = False
        if block.state == "filling":
            return  # whoever fills it frees the slot
        self._by_age[self._class_of_group[block.group]].remove(block)
        if block.pins > 0:
            block.state = "leaving"
        else:
            self._free(block)

    def _unpin(self, block: _Block) -> None:
        block.pins -= 1
        if block.pins == 0 and block.state == "leaving":
            self._free(block)

    def _free(self, block: _Block) -> None:
        block.state = "gone"
        self._held[self._class_of_group[block.group]].remove(block)
        if block.parent is not None:
            block.parent.children -= 1
            block.parent = None

    def _drop_all(self, blocks: list[_Block]) -> int:
        for block in blocks:
            self._unlink(block)
        self.counters["drops"] += len(blocks)
        return len(blocks)

    def _finish_store(self, operation: ReferenceOperation, failed: bool) -> None:
        for i, block in reversed(operation._blocks):
            if failed:
                if block.linked:
                    self._unlink(block)
                self._free(block)
                operation.outcomes[i] = "failed"
            elif block.linked:
                block.state = "ready"
                self._by_age[self._class_of_group[block.group]].append(block)
                self.counters["bytes_stored"] += len(block.content)
                operation.outcomes[i] = "stored"
            else:
                self._free(block)
                operation.outcomes[i] = "dropped"
        for outcome in operation.outcomes:
            self.counters[f"store_{outcome}"] += 1

    def _finish_load(self, operation: ReferenceOperation, failed: bool) -> None:
        for i, block in operation._blocks:
            operation.outcomes[i] = "failed" if failed else "loaded"
            if not failed:
                operation.contents[i] = block.content
                self.counters["bytes_loaded"] += len(block.content)
            self._unpin(block)
        for outcome in operation.outcomes:
            self.counters[f"load_{outcome}"] += 1

    def _expire_leases(self) -> None:
        for lease in list(self._leases):
            if lease.expires_us is not None and lease.expires_us <= self.now_us:
                lease.release()

    def _expire_blocks(self) -> None:
        for block in list(self._found.values()):
            if block.expires_us is not None and block.expires_us <= self.now_us:
                self._unlink(block)
                self.counters["expirations"] += 1

    def _end_lease(self, lease: ReferenceLease) -> None:
        if not lease.active:
            return
        lease.active = False
        self._leases.remove(lease)
        for block in lease._pinned:
            self._unpin(block)
        lease._pinned.clear()


_COUNTERS = (
    "lookup_blocks",
    "lookup_hits_host",
    "lookup_misses_absent",
    "lookup_misses_pending",
    "lookup_misses_failed",
    "store_stored",
    "store_present",
    "store_pending",
    "store_declined",
    "store_failed",
    "store_dropped",
    "load_loaded",
    "load_missed",
    "load_pending",
    "load_failed",
    "bytes_stored",
    "bytes_loaded",
    "evictions",
    "expirations",
    "drops",
)
