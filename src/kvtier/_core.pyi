# Written by `make stubs` from the native module; do not edit.
"""
The native core of kvtier. Private: use the package kvtier.
"""

from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing

__all__: list[str] = [
    "Admission",
    "Clock",
    "CudaBench",
    "Device",
    "DisableOrdering",
    "DiskBench",
    "DiskOptions",
    "Engine",
    "Expectation",
    "FaultPlan",
    "GroupSpec",
    "HostMemory",
    "Lease",
    "ManualClock",
    "Match",
    "Moment",
    "Pages",
    "Priority",
    "RankWorker",
    "SecondProcess",
    "SimulatedDevice",
    "SimulatedDrive",
    "StoresInUse",
    "SurveyDepth",
    "Ticket",
    "arena_of",
    "belady_hits",
    "bytes_for_blocks",
    "catalog_blocks",
    "chain_keys",
    "copy_limit",
    "copy_paths",
    "copy_runs_limit",
    "cpu_device",
    "cuda_device",
    "cuda_facts",
    "cuda_ordinal_of",
    "empty_keys",
    "eviction_policies",
    "fault_calls",
    "faulty_device",
    "faulty_memory",
    "finish_part",
    "grant_load",
    "grant_store",
    "host_memory",
    "mix_hashes",
    "namespace_tag",
    "ordering_points",
    "probe_file",
    "probe_queue",
    "purge_stores",
    "replay_keys",
    "root_key",
    "simulate",
    "stream_isa",
    "survey_stores",
]

class Device:
    def health(self) -> typing.Any: ...
    @property
    def name(self) -> str: ...

class HostMemory:
    pass

class FaultPlan:
    def __init__(self) -> None: ...
    def fail(
        self,
        call: str | None,
        n: typing.SupportsInt | typing.SupportsIndex,
        code: str,
        native_code: typing.SupportsInt | typing.SupportsIndex,
        from_then_on: bool,
    ) -> None: ...
    def injected(self) -> int: ...
    def reset(self) -> None: ...
    def seen(self, call: str | None) -> int: ...

class Clock:
    def now_us(self) -> int: ...

class ManualClock(Clock):
    def __init__(self) -> None: ...
    def advance_us(self, us: typing.SupportsInt | typing.SupportsIndex) -> None: ...

class DisableOrdering:
    def __enter__(self) -> None: ...
    def __exit__(self, *args) -> None: ...
    def __init__(self, name: str) -> None: ...

class SimulatedDevice(Device):
    def __init__(
        self,
        seed: typing.SupportsInt | typing.SupportsIndex,
        ordinal: typing.SupportsInt | typing.SupportsIndex,
        max_delay_us: typing.SupportsInt | typing.SupportsIndex,
        patience_us: typing.SupportsInt | typing.SupportsIndex,
        relaxed_capture: bool,
    ) -> None: ...
    def allocate(self, bytes: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def begin_capture(self, stream: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def create_framework_stream(self) -> int: ...
    def end_capture(self) -> None: ...
    def fail_sticky(self, code: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def fail_sticky_at_copy(
        self, n: typing.SupportsInt | typing.SupportsIndex, code: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def free(self, begin: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def hold(self, stream: typing.SupportsInt | typing.SupportsIndex | None) -> None: ...
    def host_synchronize(self, stream: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def launch(
        self, stream: typing.SupportsInt | typing.SupportsIndex, function: collections.abc.Callable
    ) -> None: ...
    def pending(self) -> int: ...
    def release(self, stream: typing.SupportsInt | typing.SupportsIndex | None) -> None: ...
    def run_until_idle(self) -> int: ...
    def step(self, stream: typing.SupportsInt | typing.SupportsIndex | None) -> bool: ...
    def violations(self) -> list[str]: ...

class Moment:
    """
    Members:

      released

      ready

      durable
    """

    __members__: typing.ClassVar[dict[str, Moment]]
    durable: typing.ClassVar[Moment]
    ready: typing.ClassVar[Moment]
    released: typing.ClassVar[Moment]
    @typing.overload
    def __eq__(self, other: Moment) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: Moment) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Ticket:
    def done_fd(self) -> int: ...
    def durable_blocks(self) -> int: ...
    def failure(self) -> typing.Any: ...
    def outcomes(self) -> numpy.typing.NDArray[numpy.uint8]: ...
    def settled(self, moment: Moment) -> bool: ...
    def valid_blocks(self) -> int: ...
    def wait(
        self, moment: Moment, timeout: typing.SupportsFloat | typing.SupportsIndex | None = None
    ) -> None: ...
    def wait_layer(
        self,
        layer: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def wait_stream(self, stream: typing.SupportsInt | typing.SupportsIndex) -> None: ...

class SecondProcess:
    """
    Members:

      next_store

      refuse
    """

    __members__: typing.ClassVar[dict[str, SecondProcess]]
    next_store: typing.ClassVar[SecondProcess]
    refuse: typing.ClassVar[SecondProcess]
    @typing.overload
    def __eq__(self, other: SecondProcess) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: SecondProcess) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Admission:
    """
    Members:

      all

      second_use

      tiny_lfu

      return_hazard
    """

    __members__: typing.ClassVar[dict[str, Admission]]
    all: typing.ClassVar[Admission]
    return_hazard: typing.ClassVar[Admission]
    second_use: typing.ClassVar[Admission]
    tiny_lfu: typing.ClassVar[Admission]
    @typing.overload
    def __eq__(self, other: Admission) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: Admission) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class DiskOptions:
    def __init__(
        self,
        *,
        disks: collections.abc.Sequence[tuple[str, typing.SupportsInt | typing.SupportsIndex]],
        fingerprint: bytes,
        second_process: SecondProcess,
        admission: Admission,
        eviction: str,
        write_bytes_per_day: typing.SupportsInt | typing.SupportsIndex | None,
        keys: collections.abc.Sequence[bytes],
        queue_depth: typing.SupportsInt | typing.SupportsIndex,
        commit_seconds: typing.SupportsFloat | typing.SupportsIndex,
        answer_seconds: typing.SupportsFloat | typing.SupportsIndex,
        catalog_helper: str,
    ) -> None: ...

class SurveyDepth:
    """
    Members:

      superblocks

      headers

      payloads
    """

    __members__: typing.ClassVar[dict[str, SurveyDepth]]
    headers: typing.ClassVar[SurveyDepth]
    payloads: typing.ClassVar[SurveyDepth]
    superblocks: typing.ClassVar[SurveyDepth]
    @typing.overload
    def __eq__(self, other: SurveyDepth) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: SurveyDepth) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class StoresInUse:
    """
    Members:

      skip

      read
    """

    __members__: typing.ClassVar[dict[str, StoresInUse]]
    read: typing.ClassVar[StoresInUse]
    skip: typing.ClassVar[StoresInUse]
    @typing.overload
    def __eq__(self, other: StoresInUse) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: StoresInUse) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Priority:
    """
    Members:

      low

      normal

      high
    """

    __members__: typing.ClassVar[dict[str, Priority]]
    high: typing.ClassVar[Priority]
    low: typing.ClassVar[Priority]
    normal: typing.ClassVar[Priority]
    @typing.overload
    def __eq__(self, other: Priority) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: Priority) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class GroupSpec:
    def __init__(
        self,
        *,
        name: str,
        num_layers: typing.SupportsInt | typing.SupportsIndex,
        num_parts: typing.SupportsInt | typing.SupportsIndex,
        num_heads: typing.SupportsInt | typing.SupportsIndex,
        head_dim: typing.SupportsInt | typing.SupportsIndex,
        item_bytes: typing.SupportsInt | typing.SupportsIndex,
        page_tokens: typing.SupportsInt | typing.SupportsIndex,
        block_tokens: typing.SupportsInt | typing.SupportsIndex,
        page_order: str,
        window_tokens: typing.SupportsInt | typing.SupportsIndex | None,
        num_stripes: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    @property
    def slot_stride_bytes(self) -> int: ...
    @property
    def stripe_bytes(self) -> int: ...

class Pages:
    @property
    def attached(self) -> bool: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def num_pieces(self) -> int: ...

class Lease:
    def release(self) -> None: ...
    @property
    def active(self) -> bool: ...
    @property
    def num_blocks(self) -> int: ...

class Expectation:
    def end(self) -> None: ...

class Match:
    @property
    def ready_blocks(self) -> int: ...
    @property
    def states(self) -> list: ...

class Engine:
    @staticmethod
    def open(
        *,
        groups: collections.abc.Sequence[GroupSpec],
        host_bytes: typing.SupportsInt | typing.SupportsIndex,
        chunk_bytes: typing.SupportsInt | typing.SupportsIndex,
        copy_threads: typing.SupportsInt | typing.SupportsIndex,
        memory: HostMemory,
        clock: Clock,
        hash_seed: typing.SupportsInt | typing.SupportsIndex | None,
        eviction: str,
        disk: DiskOptions | None,
        ghosts: bool,
        numa_node: typing.SupportsInt | typing.SupportsIndex | None,
        numa_required: bool,
        events: typing.SupportsInt | typing.SupportsIndex,
    ) -> Engine: ...
    def attach(
        self,
        device: Device | None,
        group: typing.SupportsInt | typing.SupportsIndex,
        tensors: collections.abc.Sequence[
            tuple[
                typing.SupportsInt | typing.SupportsIndex,
                collections.abc.Sequence[
                    tuple[
                        str,
                        typing.SupportsInt | typing.SupportsIndex,
                        typing.SupportsInt | typing.SupportsIndex,
                    ]
                ],
            ]
        ],
        owner: typing.Any,
    ) -> Pages: ...
    def cancel_prefetch(self, ticket: Ticket) -> int: ...
    def close(self, timeout: typing.SupportsFloat | typing.SupportsIndex | None) -> None: ...
    def detach(self, pages: Pages, timeout: typing.SupportsFloat | typing.SupportsIndex | None) -> None: ...
    def drop(self, keys: numpy.typing.NDArray[numpy.uint8]) -> int: ...
    def drop_namespace(self, name_space: str) -> int: ...
    def expect(self, keys: numpy.typing.NDArray[numpy.uint8]) -> Expectation: ...
    def flush(self, timeout: typing.SupportsFloat | typing.SupportsIndex | None) -> tuple[int, int, int]: ...
    def hops(self) -> dict: ...
    def load(
        self,
        pages: Pages,
        keys: numpy.typing.NDArray[numpy.uint8],
        page_ids: numpy.typing.NDArray[numpy.uint32],
        stream: typing.SupportsInt | typing.SupportsIndex,
        first_block: typing.SupportsInt | typing.SupportsIndex,
        layers_per_batch: typing.SupportsInt | typing.SupportsIndex,
    ) -> Ticket: ...
    def lookup(self, keys: numpy.typing.NDArray[numpy.uint8]) -> Match: ...
    def pause_ghosts(self) -> None: ...
    def pin(
        self,
        keys: numpy.typing.NDArray[numpy.uint8],
        match: Match,
        ttl_us: typing.SupportsInt | typing.SupportsIndex | None,
    ) -> Lease: ...
    def poll(self) -> int: ...
    def prefetch(
        self,
        keys: numpy.typing.NDArray[numpy.uint8],
        timeout: typing.SupportsFloat | typing.SupportsIndex | None,
    ) -> Ticket: ...
    def resume_ghosts(self) -> None: ...
    def set_epoch(self, epoch: bytes) -> None: ...
    def stats(self) -> dict: ...
    def store(
        self,
        pages: Pages,
        keys: numpy.typing.NDArray[numpy.uint8],
        page_ids: numpy.typing.NDArray[numpy.uint32],
        stream: typing.SupportsInt | typing.SupportsIndex,
        first_block: typing.SupportsInt | typing.SupportsIndex,
        parent: bytes | None,
        name_space: str,
        priority: Priority | None,
        ttl_us: typing.SupportsInt | typing.SupportsIndex | None,
    ) -> Ticket: ...
    def take_events(self, most: typing.SupportsInt | typing.SupportsIndex) -> tuple: ...
    def touch(self, keys: numpy.typing.NDArray[numpy.uint8]) -> int: ...
    def wait_until_whole(self) -> None: ...
    @property
    def closed(self) -> bool: ...

class RankWorker:
    def __init__(
        self, *, groups: collections.abc.Sequence[GroupSpec], rank: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def attach(
        self,
        device: Device,
        group: typing.SupportsInt | typing.SupportsIndex,
        tensors: collections.abc.Sequence[
            tuple[
                typing.SupportsInt | typing.SupportsIndex,
                collections.abc.Sequence[
                    tuple[
                        str,
                        typing.SupportsInt | typing.SupportsIndex,
                        typing.SupportsInt | typing.SupportsIndex,
                    ]
                ],
            ]
        ],
        owner: typing.Any,
    ) -> Pages: ...
    def close(self, timeout: typing.SupportsFloat | typing.SupportsIndex | None) -> None: ...
    def detach(self, pages: Pages, timeout: typing.SupportsFloat | typing.SupportsIndex | None) -> None: ...
    def ended_fd(self) -> int: ...
    def join(
        self,
        *,
        chunk_bytes: typing.SupportsInt | typing.SupportsIndex,
        classes: collections.abc.Sequence[
            tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]
        ],
        class_of_group: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        fd: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def leave(self, timeout: typing.SupportsFloat | typing.SupportsIndex | None) -> None: ...
    def run(
        self,
        pages: Pages,
        *,
        id: typing.SupportsInt | typing.SupportsIndex,
        is_store: bool,
        outcomes: numpy.typing.NDArray[numpy.uint8],
        slots: numpy.typing.NDArray[numpy.uint32],
        page_ids: numpy.typing.NDArray[numpy.uint32],
        stream: typing.SupportsInt | typing.SupportsIndex,
        first_block: typing.SupportsInt | typing.SupportsIndex,
        layers_per_batch: typing.SupportsInt | typing.SupportsIndex,
    ) -> Ticket: ...
    def take_ended(self) -> list[tuple[int, tuple[str, int, str], bool]]: ...

class SimulatedDrive:
    def __init__(
        self,
        *,
        seed: typing.SupportsInt | typing.SupportsIndex,
        read_error: typing.SupportsFloat | typing.SupportsIndex,
        write_error: typing.SupportsFloat | typing.SupportsIndex,
        sync_error: typing.SupportsFloat | typing.SupportsIndex,
        bit_flip: typing.SupportsFloat | typing.SupportsIndex,
        misplaced: typing.SupportsFloat | typing.SupportsIndex,
        lost_write: typing.SupportsFloat | typing.SupportsIndex,
    ) -> None: ...
    def faults_injected(self) -> int: ...
    def power_loss(self) -> None: ...
    def simulate(self, options: DiskOptions) -> None: ...
    def unsynced_writes(self) -> int: ...

class DiskBench:
    def __init__(
        self,
        *,
        path: str,
        payload_bytes: typing.SupportsInt | typing.SupportsIndex,
        num_slots: typing.SupportsInt | typing.SupportsIndex,
        queue_depth: typing.SupportsInt | typing.SupportsIndex,
        window: typing.SupportsInt | typing.SupportsIndex,
        key: bytes | None,
    ) -> None:
        """
        A slot store of its own in a directory, to be measured. Every slot may be used.
        """
    def about(self) -> dict: ...
    def close(self) -> None: ...
    def read(self, order: numpy.typing.NDArray[numpy.uint32]) -> tuple[float, float, int, float]:
        """
        Reads slots and proves them: (seconds, CPU seconds, good blocks, seconds of the flush).
        """
    def write(
        self, order: numpy.typing.NDArray[numpy.uint32], rounds: typing.SupportsInt | typing.SupportsIndex
    ) -> tuple[float, float, int, float]:
        """
        Writes slots and waits until they are durable: (seconds, CPU seconds, blocks written, seconds of the flush).
        """

class CudaBench:
    def __init__(
        self,
        *,
        ordinal: typing.SupportsInt | typing.SupportsIndex,
        path: str | None,
        max_sms: typing.SupportsInt | typing.SupportsIndex,
        store_limit: typing.SupportsInt
        | typing.SupportsIndex
        | typing.SupportsFloat
        | typing.SupportsIndex
        | None,
        load_limit: typing.SupportsInt
        | typing.SupportsIndex
        | typing.SupportsFloat
        | typing.SupportsIndex
        | None,
        calibration: str,
    ) -> None: ...
    def chosen(self, direction: str, run_bytes: typing.SupportsInt | typing.SupportsIndex) -> str: ...
    def decode_alone(self) -> float: ...
    def device_memory(self, bytes: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def fill_device(
        self,
        begin: typing.SupportsInt | typing.SupportsIndex,
        value: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def host_memory(
        self, bytes: typing.SupportsInt | typing.SupportsIndex
    ) -> numpy.typing.NDArray[numpy.uint8]: ...
    def paths(self) -> list[str]: ...
    def read_device(
        self,
        begin: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> numpy.typing.NDArray[numpy.uint8]: ...
    def time(
        self,
        *,
        stores: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
        loads: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
        runs_per_batch: typing.SupportsInt | typing.SupportsIndex,
        path: str | None,
        beside: str,
    ) -> tuple: ...

def arena_of(engine: Engine) -> dict: ...
def belady_hits(
    blocks: numpy.typing.NDArray[numpy.uint32],
    begins: numpy.typing.NDArray[numpy.uint64],
    at_us: numpy.typing.NDArray[numpy.int64],
    *,
    capacity: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def bytes_for_blocks(
    groups: collections.abc.Sequence[GroupSpec], blocks: typing.SupportsInt | typing.SupportsIndex
) -> tuple[int, int]:
    """
    Bytes that the host tier and a disk need for so many blocks of every group.
    """

def catalog_blocks(*, directory_path: str, helper_path: str) -> list: ...
def chain_keys(
    parent: bytes,
    tokens: numpy.typing.NDArray[numpy.int32],
    block_tokens: typing.SupportsInt | typing.SupportsIndex,
    extras: collections.abc.Sequence[
        tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, bytes]
    ],
) -> numpy.typing.NDArray[numpy.uint8]:
    """
    Keys [n, 32] of the whole blocks of int32 tokens. Releases the GIL.
    """

def copy_limit(
    *,
    destination: numpy.typing.NDArray[numpy.uint8],
    source: numpy.typing.NDArray[numpy.uint8],
    method: str,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> float:
    """
    Seconds that a plain contiguous copy takes: by 'memcpy' (the C library's) or 'streaming' (non-temporal).
    """

def copy_paths() -> list[str]: ...
def copy_runs_limit(
    *,
    destination: numpy.typing.NDArray[numpy.uint8],
    source: numpy.typing.NDArray[numpy.uint8],
    to_offsets: numpy.typing.NDArray[numpy.int64],
    from_offsets: numpy.typing.NDArray[numpy.int64],
    run_bytes: typing.SupportsInt | typing.SupportsIndex,
    method: str,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> float:
    """
    Seconds that as many plain copies take as there are offsets, one after another in each thread.
    """

def cpu_device(copy_threads: typing.SupportsInt | typing.SupportsIndex) -> Device:
    """
    A CPU device; copy_threads 0 is the default number.
    """

def cuda_device(
    *,
    ordinal: typing.SupportsInt | typing.SupportsIndex,
    path: str | None,
    max_sms: typing.SupportsInt | typing.SupportsIndex,
    store_limit: typing.SupportsInt
    | typing.SupportsIndex
    | typing.SupportsFloat
    | typing.SupportsIndex
    | None,
    load_limit: typing.SupportsInt
    | typing.SupportsIndex
    | typing.SupportsFloat
    | typing.SupportsIndex
    | None,
    calibration: str,
) -> Device: ...
def cuda_facts() -> dict:
    """
    What GPUs there are; UnsupportedError says why there is none.
    """

def cuda_ordinal_of(memory: typing.SupportsInt | typing.SupportsIndex) -> int: ...
def empty_keys(count: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.uint8]:
    """
    Keys [count, 32] of which each holds anything.
    """

def eviction_policies() -> list[tuple[str, bool]]:
    """
    Names of the eviction policies and whether they run leaf first, the default first.
    """

def fault_calls() -> list[str]: ...
def faulty_device(inner: Device, plan: FaultPlan) -> Device: ...
def faulty_memory(inner: HostMemory, plan: FaultPlan) -> HostMemory: ...
def finish_part(
    engine: Engine,
    grant_id: typing.SupportsInt | typing.SupportsIndex,
    status: tuple[str, typing.SupportsInt | typing.SupportsIndex, str],
    drained: bool,
) -> None: ...
def grant_load(
    engine: Engine,
    group: typing.SupportsInt | typing.SupportsIndex,
    num_parts: typing.SupportsInt | typing.SupportsIndex,
    keys: numpy.typing.NDArray[numpy.uint8],
    first_block: typing.SupportsInt | typing.SupportsIndex,
) -> tuple: ...
def grant_store(
    engine: Engine,
    group: typing.SupportsInt | typing.SupportsIndex,
    num_parts: typing.SupportsInt | typing.SupportsIndex,
    keys: numpy.typing.NDArray[numpy.uint8],
    first_block: typing.SupportsInt | typing.SupportsIndex,
    parent: bytes | None,
    name_space: str,
    priority: Priority | None,
    ttl_us: typing.SupportsInt | typing.SupportsIndex | None,
) -> tuple: ...
def host_memory() -> HostMemory: ...
def mix_hashes(
    hashes: typing.Any,
    first: typing.SupportsInt | typing.SupportsIndex,
    step: typing.SupportsInt | typing.SupportsIndex,
    root: bytes,
    keys: numpy.typing.NDArray[numpy.uint8],
) -> None:
    """
    Fills keys [n, 32] with hashes[first::step], each exclusive or the root. Keeps the GIL.
    """

def namespace_tag(name: str) -> bytes: ...
def ordering_points() -> list[str]: ...
def probe_file(directory_path: str) -> tuple: ...
def probe_queue(depth: typing.SupportsInt | typing.SupportsIndex) -> tuple: ...
def purge_stores(*, path: str, name_space: str | None) -> list: ...
def replay_keys(blocks: numpy.typing.NDArray[numpy.uint32]) -> numpy.typing.NDArray[numpy.uint8]: ...
def root_key(fields: collections.abc.Sequence[bytes]) -> bytes:
    """
    Key that stands for namespace, model and layout.
    """

def simulate(
    blocks: numpy.typing.NDArray[numpy.uint32],
    begins: numpy.typing.NDArray[numpy.uint64],
    at_us: numpy.typing.NDArray[numpy.int64],
    *,
    host_blocks: typing.SupportsInt | typing.SupportsIndex,
    disk_blocks: typing.SupportsInt | typing.SupportsIndex,
    host_eviction: str | typing.Any,
    disk_eviction: str | typing.Any,
    plain: bool,
    admission: Admission,
    write_bytes_per_day: typing.SupportsInt | typing.SupportsIndex | None,
    block_bytes: typing.SupportsInt | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
    writes_at_once: typing.SupportsInt | typing.SupportsIndex,
    look_ahead: typing.SupportsInt | typing.SupportsIndex,
    progress: typing.Any,
) -> dict: ...
def stream_isa() -> str:
    """
    Which non-temporal stores this machine has.
    """

def survey_stores(
    *,
    path: str,
    depth: SurveyDepth,
    in_use: StoresInUse,
    keys: collections.abc.Sequence[bytes],
    on_block: typing.Any,
    go_on: typing.Any,
) -> dict: ...

__version__: str
