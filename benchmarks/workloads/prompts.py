"""Prompts as runs of content, and the block ids that follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Content:
    """A run of tokens that is the same wherever this id stands."""

    id: int
    tokens: int


class BlockIds:
    """Numbers blocks as the public traces do: equal ids mean equal content and an equal prefix up to there.

    The last block of a prompt may be partly filled; filled up by the next turn it is another block.
    """

    def __init__(self, block_tokens: int) -> None:
        if block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, not {block_tokens}")
        self._block_tokens = block_tokens
        self._ids: dict[tuple[object, ...], int] = {}

    def of(self, prompt: Sequence[Content]) -> list[int]:
        """The ids of a prompt's blocks, ceil(tokens / block_tokens) of them."""
        ids: list[int] = []
        parent = -1
        for pieces in self._cut(prompt):
            parent = self._ids.setdefault((parent, *pieces), len(self._ids))
            ids.append(parent)
        return ids

    def _cut(self, prompt: Sequence[Content]) -> Iterator[list[tuple[int, int, int]]]:
        """Per block its pieces: (content id, first token of it, one past the last)."""
        pieces: list[tuple[int, int, int]] = []
        room = self._block_tokens
        for content in prompt:
            begin = 0
            while begin < content.tokens:
                end = min(content.tokens, begin + room)
                pieces.append((content.id, begin, end))
                room -= end - begin
                begin = end
                if room == 0:
                    yield pieces
                    pieces, room = [], self._block_tokens
        if pieces:
            yield pieces
