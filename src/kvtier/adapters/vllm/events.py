"""KV events: what vLLM's event stream hears of our tiers. Pure; vllm_events.py makes vLLM's own classes.

What comes into a tier and leaves it is the engine's word (Engine.events()). It names blocks by kvtier's keys,
so hashes and tokens of a block are remembered from the store that brings it, or from a load, until it has
left every tier. Of what an earlier server left on the drives nothing is known until a request loads it: then
it is announced, and every later load announces its blocks again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtier.handles import EventKind, Events, Tier
from kvtier.keys import Keys

MEDIUM_HOST, MEDIUM_DISK = "CPU", "STORAGE"  # vLLM's names

_MEDIA = {int(Tier.HOST): MEDIUM_HOST, int(Tier.DISK): MEDIUM_DISK}

Mask = npt.NDArray[np.bool_]
ExtraKey = tuple[Any, ...] | None
# Of a request's blocks of so many tokens from one to before another: request, first, last, tokens.
ExtraKeys = Callable[[Any, int, int, int], list[ExtraKey] | None]


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
        extra_keys: What each block's hash covers besides tokens, as vLLM publishes it; None if nothing.
        session_id: Of the request that stored or loaded them, None without.
    """

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    lora_name: str | None
    medium: str
    group_idx: int
    extra_keys: list[ExtraKey] | None = None
    session_id: str | None = None


@dataclass(frozen=True)
class Removed:
    """Blocks of one group that have left a tier."""

    block_hashes: list[bytes]
    medium: str
    group_idx: int


@dataclass(frozen=True)
class Cleared:
    """Every block of every tier is gone."""


Event = Stored | Removed | Cleared


@dataclass(frozen=True, eq=False)
class Blocks:
    """Consecutive blocks of a request in one group.

    Attributes:
        hashes: vLLM's hash of each, and before them that of the block before the first (None at the
            beginning).
        token_ids: Of all of them, int32 [blocks * block_tokens].
        lora: (id, name), None without.
        group: kvtier's.
        extra_keys: As in Stored.
        session_id: As in Stored.
    """

    hashes: list[bytes | None]
    token_ids: npt.NDArray[np.int32]
    lora: tuple[int, str] | None
    group: int
    extra_keys: list[ExtraKey] | None
    session_id: str | None


@dataclass(eq=False)
class _Known:
    blocks: Blocks
    place: int  # in them
    media: set[str]  # in which it was announced and from which it was not removed


class _Coming(NamedTuple):
    blocks: Blocks
    which: Mask
    medium: str


class EventLog:
    """Collects events between two calls of take(). Only for the scheduler's thread."""

    def __init__(
        self,
        block_tokens: int,
        hash_tokens: int,
        groups: Sequence[int],
        extra_keys: ExtraKeys | None = None,
    ) -> None:
        """Begins empty.

        Args:
            block_tokens: Tokens of a block.
            hash_tokens: Tokens of one of vLLM's hashes; the last one in a block names it.
            groups: vLLM's index of each group of kvtier's.
            extra_keys: vLLM's word on what its hashes cover besides tokens; None: nothing.
        """
        self._tokens = block_tokens
        self._each = block_tokens // hash_tokens
        self._groups = groups
        self._extra_keys = extra_keys
        self._known: dict[tuple[int, bytes], _Known] = {}
        self._events: list[Event] = []

    def watch(self, request: Any, first: int, keys: Keys, coming: Mask, group: int) -> Blocks:
        """A request stores or loads blocks from index `first` on.

        Args:
            request: vLLM's.
            first: Index of the first one in the request.
            keys: kvtier's, [n, 32].
            coming: Which of them it brings, bool [n]: somebody else may bring the others.
            group: kvtier's.

        Returns:
            The blocks, for forget().
        """
        last = first + len(keys)
        hashes: list[bytes | None] = [
            None if b < 0 else bytes(request.block_hashes[(b + 1) * self._each - 1])
            for b in range(first - 1, last)
        ]
        tokens = np.asarray(request.all_token_ids[first * self._tokens : last * self._tokens], np.int32)
        lora = request.lora_request
        name = None if lora is None else (int(lora.lora_int_id), str(lora.lora_name))
        extra = None if self._extra_keys is None else self._extra_keys(request, first, last, self._tokens)
        session = getattr(request, "session_id", None)
        blocks = Blocks(hashes, tokens, name, group, extra, session)
        for i in np.flatnonzero(coming):
            known = self._known.get((group, keys[i].tobytes()))
            if known is None or not known.media:
                self._known[group, keys[i].tobytes()] = _Known(blocks, int(i), set())
        return blocks

    def forget(self, blocks: Blocks, keys: Keys) -> None:
        """What watch() was told of has come or will not: of what has not nothing is known any more."""
        for key in keys:
            known = self._known.get((blocks.group, key.tobytes()))
            if known is not None and known.blocks is blocks and not known.media:
                del self._known[blocks.group, key.tobytes()]

    def loaded(self, request: Any, first: int, keys: Keys, on_disk: Mask, group: int) -> None:
        """A request loads blocks from `first` on, [n, 32]: all are in host memory.

        Args:
            request: vLLM's.
            first: Index of the first one in the request.
            keys: kvtier's.
            on_disk: Which were on disk alone when it arrived, bool [n].
            group: kvtier's.
        """
        everywhere = np.ones(len(keys), np.bool_)
        blocks = self.watch(request, first, keys, everywhere, group)
        for medium, which in ((MEDIUM_DISK, on_disk), (MEDIUM_HOST, everywhere)):
            self._announce(blocks, which, medium)
            for key in keys[which]:
                self._known[group, key.tobytes()].media.add(medium)

    def heard(self, events: Events) -> None:
        """The engine's next events. If some were lost, all that was announced is taken back."""
        if events.lost:
            self._take_back()
        came: _Coming | None = None  # the engine tells of a store's blocks from its end; we from its head
        columns = (events.keys, events.groups, events.tiers, events.kinds)
        for key, group, tier, kind in zip(*columns, strict=True):
            known = self._known.get((int(group), key.tobytes()))
            medium = _MEDIA.get(int(tier))
            if known is None or medium is None or kind == EventKind.RESET:
                continue
            stored = kind == EventKind.STORED
            if came is not None and not (stored and came.blocks is known.blocks and came.medium == medium):
                self._announce(*came)
                came = None
            if stored and medium not in known.media:
                known.media.add(medium)
                came = came or _Coming(known.blocks, np.zeros(len(known.blocks.hashes) - 1, np.bool_), medium)
                came.which[known.place] = True
            elif not stored and medium in known.media:
                self._left(known, medium)
                if not known.media:
                    del self._known[int(group), key.tobytes()]
        if came is not None:
            self._announce(*came)

    def _take_back(self) -> None:
        """All that was announced; what is only about to come stays known."""
        announced = {name: known for name, known in self._known.items() if known.media}
        for medium in _MEDIA.values():
            for known in announced.values():
                if medium in known.media:
                    self._left(known, medium)
        for name in announced:
            del self._known[name]

    def _left(self, known: _Known, medium: str) -> None:
        known.media.discard(medium)
        group = self._groups[known.blocks.group]
        name = known.blocks.hashes[1 + known.place]
        last = self._events[-1] if self._events else None
        if name is not None:
            if isinstance(last, Removed) and (last.medium, last.group_idx) == (medium, group):
                last.block_hashes.append(name)
            else:
                self._events.append(Removed([name], medium, group))

    def _announce(self, blocks: Blocks, which: Mask, medium: str) -> None:
        for begin, end in _runs(which):
            named = [each for each in blocks.hashes[1 + begin : 1 + end] if each is not None]
            tokens = blocks.token_ids[begin * self._tokens : end * self._tokens].tolist()
            lora_id, lora_name = blocks.lora or (None, None)
            event = Stored(
                block_hashes=named,
                parent_block_hash=blocks.hashes[begin],
                token_ids=tokens,
                block_size=self._tokens,
                lora_id=lora_id,
                lora_name=lora_name,
                medium=medium,
                group_idx=self._groups[blocks.group],
                extra_keys=None if blocks.extra_keys is None else blocks.extra_keys[begin:end],
                session_id=blocks.session_id,
            )
            last = self._events[-1] if self._events else None
            if isinstance(last, Stored) and _continues(last, event):
                last.block_hashes.extend(named)
                last.token_ids.extend(tokens)
                if last.extra_keys is not None:
                    last.extra_keys.extend(event.extra_keys or [])
            else:
                self._events.append(event)

    def cleared(self) -> None:
        """Everything was forgotten, what was not taken yet too."""
        self._known.clear()
        self._events = [Cleared()]

    def take(self) -> Sequence[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events


def _continues(last: Stored, event: Stored) -> bool:
    """Whether an event can be told together with the one before it."""
    return event.parent_block_hash == last.block_hashes[-1] and _common(event) == _common(last)


def _common(event: Stored) -> tuple[object, ...]:
    """What blocks that are told of together have in common."""
    return event.medium, event.group_idx, event.lora_id, event.session_id, event.extra_keys is None


def _runs(mask: Mask) -> list[tuple[int, int]]:
    """The half-open ranges in which a mask is true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
