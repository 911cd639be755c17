"""What moves in and out of device pages: loads, stores and copies on write, and the drops they have to heed.

Pages wait for copies. A store reads pages that others want: every extent keeps the `released` moments of its
stores. A load writes into pages that nobody may have meanwhile. Where it cannot be known that the copies are
over, the extent is lost, and its pages are never used again.

What `Engine.drop` and `reset` have taken away must not come back from device pages. So whoever stores calls
`apply_drops` first, and both inside one `Engine.no_drop()`.

Threads: none of its own; the lock of the cache (`kvtier.paged`) guards the pool and the sequences.
"""

import contextlib
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtier.costs import Hit, LoadPlanner, Plan, tier_runs
from kvtier.engine import BlockState, Dropped, DroppedLog, Engine, Match, Pages, Tier
from kvtier.errors import ConfigError, DeviceError, KVTierError
from kvtier.page_pool import Extent, PagePool
from kvtier.paged_sequence import Load, PagedSequence
from kvtier.tickets import StoreTicket


def attach_tensors(
    engine: Engine, tensors: Any, group: int, axes: str, device: object
) -> tuple[list[Any], Pages]:
    """`Engine.attach` of tensors that `copy_pages` can copy in. Returns them as a list, and the pages.

    Raises:
        ConfigError: they do not fit, or cannot be indexed as NumPy does.
    """
    several = isinstance(tensors, Iterable) and not hasattr(tensors, "shape")  # or one for all layers
    listed = list(tensors) if several else [tensors]
    pages = engine.attach(listed, group, axes=axes, device=device)
    for i, tensor in enumerate(listed):
        if not _is_copyable(tensor, axes):
            pages.detach()
            allowed = "tensors whose pages can be copied by index, as those of torch, NumPy and CuPy"
            raise ConfigError(f"pages[{i}] is a {type(tensor).__name__}; allowed: {allowed}")
    return listed, pages


def plan_load(planner: LoadPlanner, match: Match, pages: Pages, seq: PagedSequence) -> Plan | None:
    """Decides how much to load of what the tiers have behind the sequence's cached tokens. Starts nothing.

    Args:
        planner: is told of the decision.
        match: of the keys behind the cached tokens.
        pages: where a load would go.
        seq: a sequence with nothing but whole blocks cached.

    Returns:
        None if nothing is to be loaded.
    """
    found = _leading(match.states(pages.group) == BlockState.READY)
    if not found:
        return None
    block_tokens = seq._cache._config.block_tokens
    plan = planner.plan(
        Hit(
            runs=tier_runs(match.tiers(pages.group)[:found] == Tier.DISK),
            first_token=seq.cached_tokens,
            prompt_tokens=seq.num_tokens,
            block_tokens=block_tokens,
            block_bytes=pages.layout.block_bytes(block_tokens),
        )
    )
    planner.record(plan)
    return plan if plan.decision.load_blocks else None


def start_load(engine: Engine, pages: Pages, seq: PagedSequence, plan: Plan, stream: object) -> Load:
    """Starts to load what the plan says into the sequence's pages, behind its cached tokens.

    Args:
        engine: where from.
        pages: what the sequence's page ids are of.
        seq: whose pages are there already.
        plan: of `plan_load`.
        stream: whose kernels used the pages before.
    """
    begin = seq.cached_tokens // seq._cache._config.block_tokens
    end = begin + plan.decision.load_blocks
    began = time.monotonic()
    ticket = engine.load(seq._keys.view()[begin:end], pages, seq._block_pages(begin, end), stream=stream)
    return Load(ticket, plan, end - begin, began)


def end_load(seq: PagedSequence, load: Load) -> int:
    """Takes the load, whose ticket is done, from the sequence.

    Where it did not bring everything and the device cannot prove that its copies are over, the sequence is
    broken and its pages are lost.

    Returns:
        Blocks that came and can be relied on.
    """
    valid = load.ticket.result().valid_blocks
    if valid < load.blocks:
        try:
            load.ticket.released.wait()
        except DeviceError as error:
            seq._broken = error
            valid = 0
            for extent in seq._extents[seq._published :]:
                extent.lost = True
    seq._load = None
    return valid


def store_extents(engine: Engine, pages: Pages, extents: Iterable[Extent], stream: object) -> None:
    """Starts to store the extents' blocks, those of one sequence that follow each other together.

    Inside no_drop() of the engine, after apply_drops().

    Args:
        engine: where to.
        pages: what the extents' page ids are of.
        extents: that have a key, in any order.
        stream: whose kernels have written the pages.
    """
    blocks_per_page = pages.layout.blocks_per_page(engine.config.block_tokens)
    for chain in _chains(extents):
        keys = np.concatenate([e.block_keys for e in chain if e.block_keys is not None])
        page_ids = np.array([e.pages for e in chain], np.int64).reshape(-1).repeat(blocks_per_page)
        with _lost_if_interrupted(chain):
            ticket = engine.store(
                keys,
                pages,
                page_ids,
                stream=stream,
                first_block=chain[0].first_block,
                parent=chain[0].parent,
                namespace=chain[0].namespace,
            )
            _add_store(chain, ticket)


def store_blocks(
    engine: Engine, pages: Pages, seq: PagedSequence, begin: int, end: int, stream: object
) -> None:
    """Starts to store the sequence's blocks `[begin, end)`, behind the stream that last wrote its pages.

    Inside no_drop() of the engine, after apply_drops(); not of a sequence some of which was dropped.
    """
    extents = seq._block_extents(begin, end)
    keys = seq._keys.view()
    with _lost_if_interrupted(extents):
        ticket = engine.store(
            keys[begin:end],
            pages,
            seq._block_pages(begin, end),
            stream=stream,
            first_block=begin,
            parent=keys[begin - 1].tobytes() if begin else None,
            namespace=seq._namespace,
        )
        _add_store(extents, ticket)


def apply_drops(log: DroppedLog, pool: PagePool, sequences: Iterable[PagedSequence]) -> None:
    """Hides what was dropped from the engine since the last time.

    Its extents are not found any more; sequences that have some of it neither offer nor store any more.

    Args:
        log: of the engine; drops that are over are taken out of it.
        pool: who has which page.
        sequences: those that are open.
    """
    for drop in log.drops():
        over = not drop.running  # else it is applied again, to what is loaded meanwhile
        gone = None if drop.keys is None else {key.tobytes() for key in drop.keys}
        for extent in list(pool.shareable):
            if extent.block_keys is not None and _concerns(drop, gone, extent.namespace, extent.block_keys):
                pool.unpublish(extent)
        for seq in sequences:
            seq._dropped |= _concerns(drop, gone, seq._namespace, seq._known_keys())
        if over:
            log.applied(drop)


def copy_pages(tensors: Sequence[Any], axes: str, pairs: Sequence[tuple[int, int]]) -> None:
    """Copies pages (from, to) in the framework's memory, on its current stream.

    Args:
        tensors: of `attach_tensors`.
        axes: a letter for each of their dimensions.
        pairs: page ids.
    """
    source = _place(axes, [pair[0] for pair in pairs])
    target = _place(axes, [pair[1] for pair in pairs])
    for tensor in tensors:
        tensor[target] = tensor[source]


def _is_copyable(tensor: Any, axes: str) -> bool:
    """Whether `copy_pages` can index a tensor as NumPy does. Writes nothing."""
    try:
        operator.getitem(tensor, _place(axes, []))
    except Exception:  # noqa: BLE001 - every library has its own
        return False
    return hasattr(tensor, "__setitem__")


def _place(axes: str, pages: list[int]) -> tuple[Any, ...]:
    """The index of pages in a tensor. One of a single page may have no axis for it: it is never copied."""
    before = (slice(None),) * axes.find("P")
    return (*before, pages)


def _leading(mask: NDArray[np.bool_]) -> int:
    """How many at the beginning are true."""
    return len(mask) if mask.all() else int(mask.argmin())


def _chains(extents: Iterable[Extent]) -> list[list[Extent]]:
    """The extents, those that follow each other in a sequence in one list, in order."""
    chains: list[list[Extent]] = []
    ending: dict[bytes | None, list[Extent]] = {}  # chains by the key of their last extent
    for extent in sorted(extents, key=lambda extent: extent.first_block):
        chain = ending.pop(extent.parent, None) if extent.parent is not None else None
        if chain is None:
            chains.append(chain := [])
        chain.append(extent)
        ending[extent.key] = chain
    return chains


@contextlib.contextmanager
def _lost_if_interrupted(extents: Iterable[Extent]) -> Iterator[None]:
    """Around a store. An exception that is not the engine's, Ctrl-C, may come when its copies have begun."""
    try:
        yield
    except KVTierError:
        raise
    except BaseException:
        for extent in extents:
            extent.lost = True
        raise


def _add_store(extents: Iterable[Extent], ticket: StoreTicket) -> None:
    """A store reads the extents' pages. Forgets those that are over: pages may be stored again and again."""
    for extent in extents:
        extent.settle_stores(running="keep")
        extent.stores.append(ticket.released)


def _concerns(drop: Dropped, gone: set[bytes] | None, namespace: str, keys: NDArray[np.uint8]) -> bool:
    """Whether one of these blocks was dropped; `gone`: the drop's keys."""
    if drop.namespace is not None:
        return namespace == drop.namespace
    return gone is None or not gone.isdisjoint(key.tobytes() for key in keys)
