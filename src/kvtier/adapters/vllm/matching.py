"""What a lookup's answer means for a request of vLLM's. Pure: reads a Match, decides nothing."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvtier.adapters.vllm.groups import CacheGroup
from kvtier.engine import BlockState, Match

_NULL_PAGE = 0  # vLLM's block 0 stands for "nothing here"

PageIds = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]


def on_disk_alone(match: Match, num_groups: int) -> Mask:
    """For each block whether any group's part of it is on disk and not in host memory, bool [n]."""
    found = np.zeros(len(match.keys), np.bool_)
    for g in range(num_groups):
        found |= match.on_disk(g)
    return found


def servable_blocks(match: Match, groups: Sequence[CacheGroup]) -> int:
    """Blocks at the beginning of a match that are in host memory, and so will not fail.

    What a window does not reach has no tier; what counts is that nothing is on disk alone: a grant needs its
    slots now, and a read can fail where memory cannot. Where there are windows it is all or nothing, for
    another end would need other blocks.
    """
    ready = match.ready_blocks
    for g in range(len(groups)):
        on_disk = np.flatnonzero(match.on_disk(g)[:ready])
        if len(on_disk):
            ready = min(ready, int(on_disk[0]))
    whole = all(group.layout.window_tokens is None for group in groups)
    return ready if whole or ready == match.ready_blocks else 0


def pending_after(match: Match, ready: int, groups: Sequence[CacheGroup]) -> int:
    """Blocks behind the ready ones that would be usable if the running stores were over."""
    if ready >= len(match.keys):
        return 0
    run = len(match.keys) - ready
    pending = False
    for g, group in enumerate(groups):
        states = match.states(g)[ready:]
        pending = pending or bool(states[0] == BlockState.PENDING)
        if group.layout.window_tokens is None:
            gap = np.flatnonzero(states == BlockState.MISS)
            run = min(run, int(gap[0])) if len(gap) else run
    return run if pending else 0


def pages_of(block_ids: Sequence[int], group: CacheGroup, first: int, last: int) -> PageIds:
    """Pages of blocks [first, last), [last - first, pages_per_block]; missing ones are null."""
    each = group.pages_per_block
    ids = np.asarray(block_ids[first * each : last * each], np.uint32)
    if len(ids) < (last - first) * each:
        ids = np.pad(ids, (0, (last - first) * each - len(ids)), constant_values=_NULL_PAGE)
    return ids.reshape(-1, each)
