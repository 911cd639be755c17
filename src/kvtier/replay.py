"""Request traces through kvtier's tiers: as a simulation, which is fast, and for real through an engine.

The simulation runs the index, the eviction and admission policies and the write budget of the core itself,
without bytes and drives (csrc/replay). A real replay does what a server does: for each request it looks up
the prompt, loads the prefix that is there, checks its bytes, and stores the prompt. Both count the same hits,
block for block.
"""

import re
import reprlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvtier import _core
from kvtier.config import ADMISSIONS, DISK_EVICTION, EVICTIONS, Config, Disk, parse_size
from kvtier.engine import Engine, Expected, Tier, group_spec
from kvtier.errors import ConfigError
from kvtier.eviction import EvictionPolicy, load_policy
from kvtier.layout import KVLayout
from kvtier.traces import Trace

Progress = Callable[[int], None]  # requests done
_BLOCKS = re.compile(r"\s*([0-9][0-9_]*)\s*blocks?\s*", re.IGNORECASE)
_MOST_BLOCKS = 100_000_000  # of a tier: a simulation's memory goes by them, some 100 bytes each
_MOST_DIGITS = 20  # of a number of blocks
MOST_AHEAD = 2**32 - 1  # requests
_SECONDS_PER_DAY = 86400.0
LEAST_SECONDS = 60.0  # of a trace, for figures of a day
WORD_BYTES = 8  # of each block, proved by a real replay, whose blocks are multiples of it
_SEED = 7
_LONGEST_WAIT = 120.0
_RATES = ("host_bytes_per_s", "disk_bytes_per_s")  # of Speeds


def policies() -> list[str]:
    """Names of the eviction policies, the default first."""
    return [name for name, _ in _core.eviction_policies()]


def check_policy(name: str, key: str = "policy") -> str:
    """Returns the name of an eviction policy, or of a class of the user's, "module:Class".

    Raises:
        ConfigError: There is none of this name.
    """
    if ":" in name:
        load_policy(name)
    elif name not in policies():
        raise ConfigError(f"{key} is {name!r}; allowed: {', '.join(policies())}")
    return name


def capacity_blocks(size: int | str, bytes_per_block: int | None, key: str) -> int:
    """Reads the capacity of a tier.

    Args:
        size: "10000blocks", or bytes, as a number or as in "64GiB".
        bytes_per_block: Bytes of a block; needed where the size is in bytes.
        key: What the size is called in messages.

    Returns:
        Whole blocks.

    Raises:
        ConfigError: Not a capacity, less than one block, or more than a simulation may hold.
    """
    if isinstance(size, str) and (match := _BLOCKS.fullmatch(size)):
        digits = match[1].replace("_", "")
        blocks = int(digits) if len(digits) <= _MOST_DIGITS else 10**_MOST_DIGITS
    else:
        size_bytes = parse_size(size, key)
        if bytes_per_block is None:
            raise ConfigError(
                f"{key} is {size!r}, in bytes; allowed with bytes_per_block (--bytes-per-block), or as in "
                '"10000blocks"'
            )
        blocks = size_bytes // bytes_per_block
    if not 1 <= blocks <= _MOST_BLOCKS:
        count = f"{blocks}" if blocks < 10**_MOST_DIGITS else "far more"
        shown = reprlib.repr(size)
        raise ConfigError(f"{key} is {shown}, {count} blocks; allowed: 1 to {_MOST_BLOCKS} blocks")
    return blocks


@dataclass(frozen=True)
class Tiers:
    """What a trace is replayed through.

    Attributes:
        host_blocks: Blocks that the host tier holds.
        disk_blocks: Blocks that the disk tier holds; 0 for none.
        policy: Eviction policy of the host tier.
        disk_policy: Of the disk tier; None for the default of Config.disk_eviction.
        admission: Which blocks are written once the drive was full: as Config.disk_admission.
        write_bytes_per_day: Write budget of the drive; None for no limit. Needs bytes_per_block.
        bytes_per_block: Bytes of a block; None where nothing is counted in bytes.
        plain: As in the literature: blocks are touched or inserted one by one, tail first, and no policy runs
            leaf first. Otherwise as in the engine.
        share_of_budget: The whole trace writes no more than its length's share of the budget. Otherwise the
            bucket holds a whole day's bytes at first, as a new store's, and a trace of an hour may write them
            all. Not for traces of less than a minute.
    """

    host_blocks: int
    disk_blocks: int = 0
    policy: str = EVICTIONS[0]
    disk_policy: str | None = None
    admission: str = ADMISSIONS[0]
    write_bytes_per_day: int | None = None
    bytes_per_block: int | None = None
    plain: bool = False
    share_of_budget: bool = False

    def __post_init__(self) -> None:
        for key, low in (("host_blocks", 1), ("disk_blocks", 0)):
            if not low <= getattr(self, key) <= _MOST_BLOCKS:
                raise ConfigError(f"{key} is {getattr(self, key)!r}; allowed: {low} to {_MOST_BLOCKS}")
        check_policy(self.policy)
        check_policy(self.eviction_on_disk, "disk_policy")
        if self.admission not in ADMISSIONS:
            raise ConfigError(f"admission is {self.admission!r}; allowed: {', '.join(ADMISSIONS)}")
        if self.write_bytes_per_day is not None and self.bytes_per_block is None:
            raise ConfigError("a write budget needs bytes_per_block")

    @property
    def eviction_on_disk(self) -> str:
        """The disk tier's policy."""
        return DISK_EVICTION if self.disk_policy is None else self.disk_policy

    def bucket_bytes(self, trace: Trace) -> int | None:
        """What the bucket of the write budget holds, full at first, and fills with in a day; None: no limit.

        A bucket of B bytes gives B x (1 + days) in so many days. That is to be the budget's B x days.
        """
        budget = self.write_bytes_per_day
        if budget is None or not self.share_of_budget or not has_days(trace):
            return budget
        days = trace.seconds / _SECONDS_PER_DAY
        return int(budget * (days / (1 + days)))


@dataclass(frozen=True)
class Replay:
    """What came of a replay. Hits are blocks of the longest prefix that was there.

    Attributes:
        tiers: What was replayed through.
        references: Blocks asked for.
        hits_host: Of them found in the host tier.
        hits_disk: Found on disk alone.
        host_of_request: uint32 [requests]: hits in the host tier of each request.
        disk_of_request: uint32 [requests]: hits on disk.
        evictions: Blocks evicted, of both tiers.
        orphans: Blocks that lost their parent to an eviction while they were resident, of both tiers.
        promotions: Blocks brought from disk to the host tier.
        disk_blocks_written: Blocks written to disk.
        seconds: What the replay took.
        wrong_blocks: Of a real replay: loaded blocks whose bytes were not what was stored. Must be 0.
        look_ahead: Requests that were known before they ran.
        reads_hidden: Blocks that were on disk alone when their request became known, and in
            the host tier when it ran. hits_disk are those that were not.
        measured: Of a real replay: bytes a second of its loads, by the names of the rates in Speeds. Without
            what no load has shown.
    """

    tiers: Tiers
    references: int
    hits_host: int
    hits_disk: int
    host_of_request: npt.NDArray[np.uint32]
    disk_of_request: npt.NDArray[np.uint32]
    evictions: int
    orphans: int
    promotions: int
    disk_blocks_written: int
    seconds: float
    wrong_blocks: int = 0
    look_ahead: int = 0
    reads_hidden: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def hit_rate_host(self) -> float:
        """0 to 1."""
        return self.hits_host / max(1, self.references)

    @property
    def hit_rate_disk(self) -> float:
        """0 to 1."""
        return self.hits_disk / max(1, self.references)

    @property
    def hit_rate(self) -> float:
        """0 to 1: of both tiers."""
        return (self.hits_host + self.hits_disk) / max(1, self.references)

    @property
    def disk_reads_hidden(self) -> float | None:
        """0 to 1: of the blocks that came from disk, those that no request waited for. None: none came."""
        reads = self.reads_hidden + self.hits_disk
        return self.reads_hidden / reads if reads else None

    @property
    def references_per_s(self) -> float:
        """Blocks asked for in a second of the replay's own time."""
        return self.references / max(self.seconds, 1e-9)

    @property
    def disk_bytes_written(self) -> int:
        """Bytes written to disk; 0 where bytes_per_block is not known."""
        return self.disk_blocks_written * (self.tiers.bytes_per_block or 0)


def simulate(
    trace: Trace, tiers: Tiers, *, look_ahead: int = 0, seed: int = _SEED, progress: Progress | None = None
) -> Replay:
    """Runs a trace through tiers that are empty at first. Does not hold the GIL.

    Args:
        trace: From load_trace().
        tiers: What it runs through; not `plain` with look-ahead.
        look_ahead: So many requests behind the one that runs wait and are known: Engine.expect(), with drives
            whose reads are over before the next request.
        seed: Of the index and the admission's sketch.
        progress: Told from time to time; what it raises ends the simulation.

    Raises:
        ConfigError: Look-ahead in the plain form, less than none, or of too many requests.
    """
    if not 0 <= look_ahead <= MOST_AHEAD:
        raise ConfigError(f"look_ahead is {look_ahead}; allowed: 0 to {MOST_AHEAD}")
    if look_ahead and tiers.plain:
        raise ConfigError("look-ahead is not for the plain form; an engine's has it")
    begun = time.perf_counter()
    result = _core.simulate(
        trace.blocks,
        trace.begins,
        trace.at_us,
        host_blocks=tiers.host_blocks,
        disk_blocks=tiers.disk_blocks,
        host_eviction=_eviction(tiers.policy),
        disk_eviction=_eviction(tiers.eviction_on_disk),
        plain=tiers.plain,
        admission=getattr(_core.Admission, tiers.admission.replace("-", "_")),
        write_bytes_per_day=tiers.bucket_bytes(trace),
        block_bytes=tiers.bytes_per_block or 0,
        seed=seed,
        writes_at_once=0,
        look_ahead=look_ahead,
        progress=progress,
    )
    return Replay(
        tiers=tiers,
        references=result["references"],
        hits_host=result["hits_host"],
        hits_disk=result["hits_disk"],
        host_of_request=result["host_of_request"],
        disk_of_request=result["disk_of_request"],
        evictions=result["evictions_host"] + result["evictions_disk"],
        orphans=result["orphans_host"] + result["orphans_disk"],
        promotions=result["promotions"],
        disk_blocks_written=result["disk_blocks_written"],
        seconds=time.perf_counter() - begun,
        look_ahead=look_ahead,
        reads_hidden=result["reads_hidden"],
    )


def _eviction(name: str) -> str | type[EvictionPolicy]:
    return load_policy(name) if ":" in name else name


def belady_hit_rate(trace: Trace, blocks: int) -> float:
    """The hit rate, 0 to 1, that no policy exceeds with so many blocks in all tiers together.

    Belady's MIN with bypass (IBM Systems Journal 5(2), 1966), each request's blocks used head first.
    """
    hits = _core.belady_hits(trace.blocks, trace.begins, trace.at_us, capacity=blocks)
    return hits / max(1, len(trace.blocks))


@dataclass(frozen=True)
class Speeds:
    """What a server does in a second, to turn hits into time.

    Attributes:
        prefill_tokens_per_s: Tokens that it prefills.
        host_bytes_per_s: From the host tier into the GPU.
        disk_bytes_per_s: From disk into the GPU, by way of the host tier.
    """

    prefill_tokens_per_s: float
    host_bytes_per_s: float
    disk_bytes_per_s: float


def times_to_first_token(trace: Trace, hits: Replay | None, speeds: Speeds) -> npt.NDArray[np.float64]:
    """Seconds from the start of each request to its first token [requests].

    A model without a queue: what hits is loaded at the tier's bandwidth, one tier after the other, then the
    rest is prefilled. Without `hits` nothing is cached.
    """
    tokens = trace.input_tokens.astype(np.float64)
    if hits is None:
        return tokens / speeds.prefill_tokens_per_s
    each = hits.tiers.bytes_per_block
    if each is None:
        raise ConfigError("times to first token need bytes_per_block")
    host = hits.host_of_request.astype(np.float64)
    disk = hits.disk_of_request.astype(np.float64)
    left = np.maximum(tokens - (host + disk) * trace.block_tokens, 0)
    load = host * each / speeds.host_bytes_per_s + disk * each / speeds.disk_bytes_per_s
    return load + left / speeds.prefill_tokens_per_s


def has_days(trace: Trace) -> bool:
    """Whether the trace takes long enough, a minute, to say anything of a day."""
    return trace.seconds >= LEAST_SECONDS


def written_per_day(trace: Trace, replay: Replay) -> float | None:
    """Bytes written to disk in a day of such traffic, never more than the budget.

    None where the bytes of a block are not known, or the trace takes less than a minute.
    """
    blocks = _blocks_per_day(trace, replay)
    each = replay.tiers.bytes_per_block
    return None if blocks is None or each is None else blocks * each


def drive_writes_per_day(trace: Trace, replay: Replay) -> float | None:
    """The same in capacities; None without a disk, or where the trace takes less than a minute."""
    blocks = _blocks_per_day(trace, replay)
    capacity = replay.tiers.disk_blocks
    return None if blocks is None or not capacity else blocks / capacity


def _blocks_per_day(trace: Trace, replay: Replay) -> float | None:
    if not has_days(trace):
        return None
    blocks = replay.disk_blocks_written * _SECONDS_PER_DAY / trace.seconds
    budget, each = replay.tiers.write_bytes_per_day, replay.tiers.bytes_per_block
    # A bucket that was full at first is spent once, not once every hour.
    return blocks if budget is None or each is None else min(blocks, budget / each)


def replay_real(
    trace: Trace,
    tiers: Tiers,
    directory: str | None = None,
    *,
    look_ahead: int = 0,
    seed: int = _SEED,
    progress: Progress | None = None,
) -> Replay:
    """Replays a trace through an engine of its own on the CPU device, one request after the other.

    Each request waits until its blocks are where they belong, on disk too, so that the outcome without
    look-ahead is that of the simulation. With it, reads go on beside the requests, which follow each other
    as fast as they can: no model slows them down, and the outcome is the simulation's as far as the drive
    keeps up. Every loaded block's bytes are checked. The engine's clock
    says the times of the trace.

    Args:
        trace: From load_trace().
        tiers: `bytes_per_block` is needed, a multiple of 8; `plain` is not for engines.
        directory: An absolute directory, empty or not there yet, for the disk tier's blocks.
        look_ahead: So many requests behind the one that runs wait and are known: Engine.expect().
        seed: Of the index and the admission's sketch.
        progress: Told after each request; what it raises ends the replay.

    Raises:
        ConfigError: `tiers` are not for a real replay.
        KVTierError: What the engine raises.
    """
    config = _real_config(tiers, directory, tiers.bucket_bytes(trace))
    clock = _core.ManualClock()
    longest = int(np.diff(trace.begins).max(initial=1))
    pages = np.zeros((max(longest, 1), config.groups[0].page_bytes() // WORD_BYTES), np.uint64)
    begun = time.perf_counter()
    with Engine(config, clock=clock, hash_seed=seed) as engine:
        engine.wait_until_whole()
        run = _RealRun(engine, trace, pages, look_ahead)
        for number in range(trace.num_requests):
            clock.advance_us(int(trace.at_us[number] - (trace.at_us[number - 1] if number else 0)))
            run.request(number)
            if progress is not None:
                progress(number + 1)
        stats = engine.stats()
    return Replay(
        tiers=tiers,
        references=len(trace.blocks),
        hits_host=int(run.host.sum()),
        hits_disk=int(run.disk.sum()),
        host_of_request=run.host,
        disk_of_request=run.disk,
        evictions=stats.evictions + stats.disk_evictions,
        orphans=stats.orphans + stats.disk_orphans,
        promotions=stats.promote_good,
        disk_blocks_written=stats.disk_durable,
        seconds=time.perf_counter() - begun,
        wrong_blocks=run.wrong,
        look_ahead=look_ahead,
        reads_hidden=run.hidden,
        measured=run.rates(config.groups[0].page_bytes()),
    )


class _RealRun:
    """The requests of one real replay."""

    def __init__(self, engine: Engine, trace: Trace, memory: npt.NDArray[np.uint64], look_ahead: int) -> None:
        self._engine = engine
        self._trace = trace
        self._memory = memory
        self._pages = engine.attach([memory.view(np.uint8)[:, None, :]])
        self.host = np.zeros(trace.num_requests, np.uint32)
        self.disk = np.zeros(trace.num_requests, np.uint32)
        self.wrong = 0
        self.hidden = 0
        self._loads = np.zeros((trace.num_requests, 3))  # blocks from the host tier, from disk, seconds
        # Of each request that waits: what ends it, and which of its keys were on disk alone.
        self._waiting: deque[tuple[Expected, npt.NDArray[np.bool_]]] = deque()
        self._look_ahead = look_ahead
        for waiting in range(min(look_ahead, trace.num_requests)):
            self._expect(waiting)

    def _expect(self, number: int) -> None:
        keys = _core.replay_keys(self._trace.request(number))
        match = self._engine.lookup(keys)
        on_disk = match.tiers() == Tier.DISK
        on_disk[match.ready_blocks :] = False
        self._waiting.append((self._engine.expect(keys[: match.ready_blocks]), on_disk))

    def request(self, number: int) -> None:
        was_on_disk = None
        if self._look_ahead:
            expected, was_on_disk = self._waiting.popleft()
            expected.end()
            if number + self._look_ahead < self._trace.num_requests:
                self._expect(number + self._look_ahead)
        blocks = self._trace.request(number)
        keys = _core.replay_keys(blocks)
        ids = np.arange(len(blocks), dtype=np.uint32)
        match = self._engine.lookup(keys)
        found = match.ready_blocks
        loaded = 0
        if found:
            self._memory[:found] = ~np.uint64(0)
            begun = time.perf_counter()
            ticket = self._engine.load(keys[:found], self._pages, ids[:found])
            loaded = ticket.result().valid_blocks
            seconds = time.perf_counter() - begun
            stands = self._memory[:loaded] == blocks[:loaded, None]
            self.wrong += loaded - int(stands.all(axis=1).sum())
        on_disk = match.tiers()[:loaded] == Tier.DISK
        self.disk[number] = int(on_disk.sum())
        self.host[number] = loaded - int(on_disk.sum())
        if loaded:
            self._loads[number] = (self.host[number], self.disk[number], seconds)
        if was_on_disk is not None:
            self.hidden += int((was_on_disk[:loaded] & ~on_disk).sum())
        self._memory[: len(blocks)] = blocks[:, None]
        self._engine.store(keys, self._pages, ids).result()
        self._engine.flush(_LONGEST_WAIT)

    def rates(self, block_bytes: int) -> dict[str, float]:
        """Bytes a second by the names in Speeds: least squares over all loads, through the origin.

        So a load's latency is in them, and long loads count most. Where the two together give no sense, one
        tier is fitted to the loads without the other.
        """
        blocks, seconds = self._loads[:, :2], self._loads[:, 2]
        both = np.full(len(seconds), True)
        for tiers, loads in (((0, 1), both), ((0,), blocks[:, 1] == 0), ((1,), blocks[:, 0] == 0)):
            used = blocks[loads][:, tiers]
            if not used.any(axis=0).all():
                continue
            of_block = np.linalg.lstsq(used, seconds[loads], rcond=None)[0]
            if (of_block > 0).all():
                rates = (block_bytes / of_block).tolist()
                return {_RATES[tier]: rate for tier, rate in zip(tiers, rates, strict=True)}
        return {}


def _real_config(tiers: Tiers, directory: str | None, bucket_bytes: int | None) -> Config:
    each = tiers.bytes_per_block
    if each is None or each % WORD_BYTES:
        raise ConfigError(f"bytes_per_block is {each!r}; allowed in a real replay: multiples of {WORD_BYTES}")
    for policy in (tiers.policy, tiers.eviction_on_disk):
        if ":" in policy:
            raise ConfigError(f"policy {policy!r} is for simulations; an engine's are native")
    if tiers.plain:
        raise ConfigError("plain is for simulations; an engine runs in its own form")
    if tiers.disk_blocks and directory is None:
        raise ConfigError("a real replay with a disk tier needs a directory for it")
    layout = KVLayout.mla(num_layers=1, latent_dim=each, dtype="uint8", page_tokens=1)
    probe = Config(groups=[layout], host=2**40, model="replay", block_tokens=1)
    spec = group_spec(layout, probe)
    host_bytes, _ = _core.bytes_for_blocks([spec], tiers.host_blocks)
    disk: tuple[Disk, ...] = ()
    if tiers.disk_blocks and directory is not None:
        disk = (Disk(directory, _core.bytes_for_blocks([spec], tiers.disk_blocks)[1]),)
    budget: int | str = "unlimited"
    if bucket_bytes is not None:  # the engine counts slots, which have a header
        budget = max(1, bucket_bytes * _core.bytes_for_blocks([spec], 1)[0] // each)
    return Config(
        groups=[layout],
        host=host_bytes,
        model="replay",
        block_tokens=1,
        eviction=tiers.policy,
        disk=disk,
        disk_eviction=tiers.eviction_on_disk,
        disk_admission=tiers.admission,
        disk_write_budget=budget,
        disk_queue_depth=1,  # so that writes and reads end in the order in which they began
    )
