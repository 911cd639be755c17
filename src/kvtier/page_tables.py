"""The arrays that paged-attention kernels take, made from page ids. Pure: no engine, no tensors, no locks.

Sources of the formats: vLLM's and FlashAttention's `block_table` and `seq_lens` / `cache_seqlens`;
FlashInfer's page table (`indptr`, `indices`, `last_page_len`); `slot_mapping` of vLLM's `reshape_and_cache`.

Cost: one slice copy per sequence; no work per page or token outside NumPy.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtier.errors import ConfigError

Pages = Sequence[NDArray[np.int32]]  # of each sequence, its page ids in token order
Int = TypeVar("Int", bound=np.integer[Any])


def block_table(pages: Pages, *, pad: int = 0, width: int | None = None) -> NDArray[np.int32]:
    """Page ids of each sequence, int32 `[num_seqs, width]`, rows filled up with `pad`.

    Raises:
        ConfigError: width is smaller than a sequence needs.
    """
    longest = max(map(len, pages), default=0)
    if width is not None and width < longest:
        raise ConfigError(f"width: {width}; a sequence has {longest} pages")
    table = np.full((len(pages), longest if width is None else width), pad, np.int32)
    for row, ids in zip(table, pages, strict=True):
        row[: len(ids)] = ids
    return table


def csr(
    pages: Pages, seq_lens: NDArray[np.int32], page_tokens: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """FlashInfer's `(indptr [num_seqs + 1], indices [total_pages], last_page_len [num_seqs])`, all int32.

    The pages of sequence i are `indices[indptr[i] : indptr[i + 1]]`; its last one holds last_page_len[i]
    tokens, at least 1.
    """
    indptr = _offsets(np.array([len(ids) for ids in pages], np.int32))
    last = (seq_lens - 1) % np.int32(page_tokens) + np.int32(1)
    return indptr, _joined(pages), last


def slot_mapping(pages: Pages, begins: ArrayLike, ends: ArrayLike, page_tokens: int) -> NDArray[np.int64]:
    """`page * page_tokens + offset` of tokens `[begins[i], ends[i])` of every sequence, int64 `[total]`.

    Raises:
        ConfigError: not one half-open range of existing tokens per sequence.
    """
    begin, end = np.asarray(begins, np.int64), np.asarray(ends, np.int64)
    capacity = np.array([len(ids) for ids in pages], np.int64) * page_tokens
    if begin.shape != capacity.shape or end.shape != capacity.shape:
        raise ConfigError(f"begin: one position for each of {len(pages)} sequences is wanted")
    if np.any(begin < 0) or np.any(begin > end) or np.any(end > capacity):
        raise ConfigError("begin: a position lies outside its sequence")
    counts, first = end - begin, begin // page_tokens
    tails = [ids[at:] for ids, at in zip(pages, first, strict=True)]
    offsets = _offsets(np.array([len(ids) for ids in tails], np.int64))[:-1]
    # The position of every token in its sequence, then the place of its page in the joined tails.
    position = np.arange(counts.sum()) + np.repeat(begin - _offsets(counts)[:-1], counts)
    place = position // page_tokens + np.repeat(offsets - first, counts)
    slots: NDArray[np.int64] = _joined(tails).astype(np.int64)[place] * page_tokens + position % page_tokens
    return slots


def _offsets(sizes: NDArray[Int]) -> NDArray[Int]:
    offsets = np.zeros(len(sizes) + 1, sizes.dtype)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _joined(pages: Pages) -> NDArray[np.int32]:
    return np.concatenate(pages) if len(pages) else np.empty(0, np.int32)
