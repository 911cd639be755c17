"""kvtier keeps transformer KV-cache blocks in device memory, host memory and on disk.

No prefix is computed twice: blocks that a server evicts are copied down, looked up by the hash of their
tokens, and copied back asynchronously. Importing this package needs NumPy and no GPU.
"""

from typing import TYPE_CHECKING, Any

from kvtier.arrays import GpuMemory, RawTensor
from kvtier.config import Config, Disk, parse_size
from kvtier.engine import (
    BlockOutcome,
    BlockState,
    Engine,
    EventKind,
    Events,
    Expected,
    FlushResult,
    Lease,
    LoadResult,
    LoadTicket,
    Match,
    Moment,
    Pages,
    Prefetch,
    StoreResult,
    StoreTicket,
    Ticket,
    Tier,
)
from kvtier.engine import open_engine as open  # noqa: A004 - kvtier.open(), as gzip.open()
from kvtier.errors import (
    ClosedError,
    ConfigError,
    CorruptionError,
    DeviceError,
    InternalError,
    KVTierError,
    ResourceError,
    StorageError,
    TimeoutError,  # noqa: A004 - kvtier.TimeoutError, as asyncio.TimeoutError
    UnsupportedError,
)
from kvtier.keys import KeyExtra, block_keys
from kvtier.layout import KVLayout
from kvtier.metrics import DiskStats, GhostPoint, GhostStats, Hops, HopStats, SlotClassStats, Stats

if TYPE_CHECKING:
    from kvtier.paged import PagedKVCache
else:  # where a type checker would see it, it would take any name for one of this module's

    def __getattr__(name: str) -> Any:
        """PagedKVCache, imported when it is first asked for: most servers have pages of their own."""
        if name != "PagedKVCache":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from kvtier.paged import PagedKVCache

        globals()[name] = PagedKVCache
        return PagedKVCache


__all__ = [
    "BlockOutcome",
    "BlockState",
    "ClosedError",
    "Config",
    "ConfigError",
    "CorruptionError",
    "DeviceError",
    "Disk",
    "DiskStats",
    "Engine",
    "EventKind",
    "Events",
    "Expected",
    "FlushResult",
    "GhostPoint",
    "GhostStats",
    "GpuMemory",
    "HopStats",
    "Hops",
    "InternalError",
    "KVLayout",
    "KVTierError",
    "KeyExtra",
    "Lease",
    "LoadResult",
    "LoadTicket",
    "Match",
    "Moment",
    "PagedKVCache",
    "Pages",
    "Prefetch",
    "RawTensor",
    "ResourceError",
    "SlotClassStats",
    "Stats",
    "StorageError",
    "StoreResult",
    "StoreTicket",
    "Ticket",
    "Tier",
    "TimeoutError",
    "UnsupportedError",
    "block_keys",
    "open",
    "parse_size",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
