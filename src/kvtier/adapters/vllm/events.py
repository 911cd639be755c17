"""KV events: what vLLM's event stream hears of our tiers. Pure; vllm_events.py makes vLLM's own classes.

A block is announced when it has been stored in host memory, and again when a request loads it (in host memory
or, if it was on disk alone when the request arrived, on disk): after a restart that is how its tokens become
known, for we keep none. Evictions are not announced: the engine does not report which blocks it evicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MEDIUM_HOST, MEDIUM_DISK = "CPU", "STORAGE"  # vLLM's names

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Stored:
    """Consecutive blocks of one group that are there now.

    Attributes:
        block_hashes: vLLM's, one for each block.
        parent_block_hash: Of the block before, None at the beginning.
        token_ids: Of all blocks.
        block_size: Tokens of a block.
        lora_id: Of the adapter, None without.
        lora_name: Of the adapter, None without.
        medium: MEDIUM_HOST or MEDIUM_DISK.
        group_idx: vLLM's cache group.
    """

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    lora_name: str | None
    medium: str
    group_idx: int


@dataclass(frozen=True)
class Removed:
    """Blocks of one group that were dropped, from every tier."""

    block_hashes: list[bytes]
    medium: str
    group_idx: int


@dataclass(frozen=True)
class Cleared:
    """Every block of every tier is gone."""


Event = Stored | Removed | Cleared


@dataclass(frozen=True)
class Blocks:
    """Blocks of a request in one group, remembered until it is known what became of them.

    Attributes:
        first: Index of the first one in the request.
        hashes: vLLM's hash of each, and before them that of the block before the first (None at the
            beginning).
        token_ids: Of all of them.
        lora: (id, name), None without.
        group_idx: vLLM's cache group.
    """

    first: int
    hashes: list[bytes | None]
    token_ids: list[int]
    lora: tuple[int, str] | None
    group_idx: int


class EventLog:
    """Collects events between two calls of take(). Only for the scheduler's thread."""

    def __init__(self, block_tokens: int, hash_tokens: int) -> None:
        """Begins empty.

        Args:
            block_tokens: Tokens of a block.
            hash_tokens: Tokens of one of vLLM's hashes; the last one in a block names it.
        """
        self._tokens = block_tokens
        self._each = block_tokens // hash_tokens
        self._events: list[Event] = []

    def describe(self, request: Any, first: int, last: int, group_idx: int) -> Blocks:
        """Remembers blocks [first, last) of a request of vLLM's."""
        hashes: list[bytes | None] = [
            None if b < 0 else self._hash(request, b) for b in range(first - 1, last)
        ]
        tokens = list(request.all_token_ids[first * self._tokens : last * self._tokens])
        lora = request.lora_request
        name = None if lora is None else (int(lora.lora_int_id), str(lora.lora_name))
        return Blocks(first, hashes, tokens, name, group_idx)

    def _hash(self, request: Any, block: int) -> bytes:
        return bytes(request.block_hashes[(block + 1) * self._each - 1])

    def stored(self, blocks: Blocks, which: Mask, medium: str = MEDIUM_HOST) -> None:
        """Those of the blocks are in a tier now, bool [n]."""
        for begin, end in _runs(which):
            named = [each for each in blocks.hashes[1 + begin : 1 + end] if each is not None]
            lora_id, lora_name = blocks.lora or (None, None)
            self._events.append(
                Stored(
                    block_hashes=named,
                    parent_block_hash=blocks.hashes[begin],
                    token_ids=blocks.token_ids[begin * self._tokens : end * self._tokens],
                    block_size=self._tokens,
                    lora_id=lora_id,
                    lora_name=lora_name,
                    medium=medium,
                    group_idx=blocks.group_idx,
                )
            )

    def ended(self, about: tuple[Blocks, npt.NDArray[np.intp]], stored: Mask) -> None:
        """A store is over, of some blocks by index [n]; `stored` says which of these are there, bool [n]."""
        blocks, which = about
        there = np.zeros(len(blocks.hashes) - 1, np.bool_)
        there[which] = stored
        self.stored(blocks, there)

    def loaded(self, request: Any, first: int, on_disk: Mask, group_idx: int) -> Blocks:
        """A request loads blocks from `first` on: so they are there, some on disk alone when it arrived."""
        blocks = self.describe(request, first, first + len(on_disk), group_idx)
        self.stored(blocks, ~on_disk, MEDIUM_HOST)
        self.stored(blocks, on_disk, MEDIUM_DISK)
        return blocks

    def removed(self, blocks: Blocks) -> None:
        """The blocks were dropped."""
        named = [each for each in blocks.hashes[1:] if each is not None]
        for medium in (MEDIUM_HOST, MEDIUM_DISK):
            self._events.append(Removed(named, medium, blocks.group_idx))

    def cleared(self) -> None:
        """Everything was forgotten, what was not taken yet too."""
        self._events = [Cleared()]

    def take(self) -> Sequence[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events


def _runs(mask: Mask) -> list[tuple[int, int]]:
    """The half-open ranges in which a mask is true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
