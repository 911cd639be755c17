"""Instruction: what the keeper tells the ranks to copy."""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtier.errors import ConfigError

_MAGIC = b"kvti"
_HEADER = struct.Struct("<4sHBBHHIQQ16sII")
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Instruction:
    """One store or load for every rank: a value, small and picklable, that the serving framework carries.

    Every rank executes it at most once, and must execute it (or end) before its blocks are free again. It is
    good for the very processes that were ranks when it was made: any other refuses it.

    Attributes:
        epoch: The life of the keeper that made it, 16 bytes.
        grant: Number of the keeper's grant; 0 when there is nothing to copy.
        floor: Every grant below this one is over.
        is_store: A store, else a load.
        group: Index of the cache group.
        parts: Ranks that have something to copy: the first so many.
        first_block: Index of the first key in its sequence.
        members: For each rank the number under which its process joined.
        outcomes: One for each key [n], uint8: BlockOutcome.RUNNING is to be copied, else what became of it.
        slots: Where in the arena the running blocks are, uint32, in order.
    """

    epoch: bytes
    grant: int
    floor: int
    is_store: bool
    group: int
    parts: int
    first_block: int
    members: tuple[int, ...]
    outcomes: npt.NDArray[np.uint8]
    slots: npt.NDArray[np.uint32]

    @property
    def num_blocks(self) -> int:
        """Keys of the request; page ids are given for each of them."""
        return len(self.outcomes)

    def to_bytes(self) -> bytes:
        """The instruction as bytes, for frameworks that do not pickle."""
        head = _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.is_store,
            0,
            self.group,
            len(self.members),
            self.parts,
            self.grant,
            self.floor,
            self.epoch,
            self.first_block,
            len(self.outcomes),
        )
        members = np.asarray(self.members, "<u4").tobytes()
        return b"".join([head, members, self.outcomes.tobytes(), self.slots.astype("<u4").tobytes()])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Instruction":
        """Reads what to_bytes() wrote.

        Raises:
            ConfigError: Something else was given.
        """
        if len(data) < _HEADER.size or data[:4] != _MAGIC:
            raise ConfigError("instruction: these bytes are no instruction of kvtier")
        fields = _HEADER.unpack_from(data)
        _, version, is_store, _, group, num_members, parts, grant, floor, epoch, first_block, num_blocks = (
            fields
        )
        if version != _VERSION:
            raise ConfigError(f"instruction: its version is {version}; allowed: {_VERSION}")
        at = _HEADER.size
        body = len(data) - at - 4 * num_members - num_blocks
        if body < 0 or body % 4:
            raise ConfigError(f"instruction: it has {len(data)} bytes, which does not fit its header")
        members = tuple(np.frombuffer(data, "<u4", num_members, at).tolist())
        at += 4 * num_members
        outcomes = np.frombuffer(data, np.uint8, num_blocks, at)
        slots = np.frombuffer(data, "<u4", body // 4, at + num_blocks).astype(np.uint32)
        return cls(epoch, grant, floor, bool(is_store), group, parts, first_block, members, outcomes, slots)
