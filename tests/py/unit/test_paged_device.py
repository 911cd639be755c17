"""PagedKVCache where kernels run late: what is stored behind which stream, and calls that Ctrl-C ends."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier.paged import PagedKVCache, PagedSequence
from kvtier.testing import DeviceArray, SimulatedDevice, Stream

NUM_PAGES = 8


class Tensor(DeviceArray):
    """Pages that a list of them indexes, as a framework's; the default stream writes what is written so."""

    device: Any

    def __getitem__(self, index: Any) -> Any:
        return [self[page] for page in index[0]] if isinstance(index, tuple) else super().__getitem__(index)

    def __setitem__(self, index: Any, values: list[DeviceArray]) -> None:
        for page, value in zip(index[0], values, strict=True):
            self.device.copy(self[page], value)


class Rig:
    """A paged cache on a simulated device."""

    def __init__(self, page: int = 4, seed: int = 1, **options: Any) -> None:
        layout = kvtier.KVLayout(1, 1, 8, "int32", page)
        self.config = kvtier.Config(groups=[layout], block_tokens=4, model="m@1", host="2MiB", chunk="1MiB")
        self.engine = kvtier.open(self.config)
        self.device = SimulatedDevice(seed=seed)
        pages = self.device.empty((NUM_PAGES, 2, page, 1, 8), np.int32)
        self.pages = Tensor(self.device, pages.ptr, pages.shape, pages.strides, pages.dtype)
        self.write(-1)
        self.stream = self.device.stream()
        self.cache = PagedKVCache(self.engine, pages=[self.pages], **options)

    def close(self) -> None:
        self.device.release(self.stream)
        self.device.run_until_idle()
        self.cache.close()
        self.engine.close()

    def write(self, value: int) -> None:
        self.device.write(self.pages, value)
        self.device.synchronize()

    def open(self, tokens: range, stream: Stream | None = None) -> PagedSequence:
        seq = self.cache.open(tokens, stream=stream)
        assert isinstance(seq, PagedSequence)
        return seq

    def values(self, seq: PagedSequence, count: int) -> set[int]:
        """The values in the first pages of a sequence."""
        return set(self.device.read(self.pages).result()[seq.page_ids[:count]].ravel().tolist())


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def expect_the_tail_behind_its_stream(rig: Rig) -> None:
    """What the held stream writes, 777 in 12 tokens, is stored when it has run, and not before."""
    with pytest.raises(kvtier.TimeoutError):
        rig.engine.flush(0.05)
    rig.device.release(rig.stream)
    rig.engine.flush()
    rig.write(-1)
    again = rig.open(range(13))
    assert again.wait() == 12
    got = rig.device.read(rig.pages).result()[again.page_ids[0], :, :12]
    assert set(got.ravel().tolist()) == {777}


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_closing_stores_the_tail_behind_the_stream_that_wrote_it(seed: int, forked: bool) -> None:
    rig = Rig(page=16, seed=seed)
    seq = rig.open(range(12), rig.stream)
    seq.wait()
    rig.device.hold(rig.stream)  # its kernels are slow
    rig.device.write(rig.pages[int(seq.page_ids[0])], 777, rig.stream)
    seq.commit(stream=rig.stream)
    last = seq.fork() if forked else seq
    seq.close()
    last.close()
    expect_the_tail_behind_its_stream(rig)
    assert not rig.device.violations()
    rig.close()


def test_after_a_copy_on_write_that_failed_the_tail_is_stored_behind_the_stream_that_wrote_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(page=16)
    seq = rig.open(range(12), rig.stream)
    rig.device.hold(rig.stream)
    rig.device.write(rig.pages[int(seq.page_ids[0])], 777, rig.stream)
    seq.commit(stream=rig.stream)
    twin = seq.fork()
    before = rig.cache.stats()

    def fail(*args: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__setitem__", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            seq.append([5], stream=rig.device.stream())
    assert rig.cache.stats() == before
    twin.close()
    seq.close()
    expect_the_tail_behind_its_stream(rig)
    assert not rig.device.violations()
    rig.close()


def interrupted(call: Any) -> Any:
    """The call, with Ctrl-C arriving while it runs."""

    def method(*args: Any, **options: Any) -> None:
        call(*args, **options)
        raise KeyboardInterrupt

    return method


def test_pages_that_an_interrupted_open_loads_into_are_never_used_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seq = rig.open(range(17))
    rig.write(7)
    seq.commit(16)
    seq.close()
    with rig.open(range(1000, 1032)):
        pass
    rig.engine.flush()
    rig.device.hold(rig.stream)
    with monkeypatch.context() as patch:
        patch.setattr(rig.engine, "load", interrupted(rig.engine.load))
        with pytest.raises(KeyboardInterrupt):
            rig.cache.open(range(17), stream=rig.stream)
    stats = rig.cache.stats()
    assert (stats.free_pages, stats.quarantined_pages, stats.sequences) == (3, 5, 0)
    other = rig.open(range(500, 512))
    rig.write(9)
    rig.device.release(rig.stream)
    rig.device.run_until_idle()
    assert rig.values(other, 3) == {9}


def test_an_open_that_the_engine_refuses_gives_its_pages_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seq = rig.open(range(17))
    seq.commit(16)
    seq.close()
    rig.open(range(1000, 1032)).close()
    before = rig.cache.stats()

    def refused(*args: Any, **options: Any) -> None:
        raise kvtier.DeviceError("no")

    monkeypatch.setattr(rig.engine, "load", refused)
    with pytest.raises(kvtier.DeviceError):
        rig.cache.open(range(17))
    after = rig.cache.stats()
    assert (after.free_pages, after.sequences) == (before.free_pages, 0) == (8, 0)


@pytest.mark.parametrize("how", ["evict", "through", "tail"])
def test_pages_that_an_interrupted_store_reads_are_never_used_again(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(page=16 if how == "tail" else 4, write="through" if how == "through" else "evict")
    seq = rig.open(range(12))
    rig.write(7)
    ids = set(seq.page_ids.tolist())
    calls: dict[str, Any] = {
        "evict": lambda: rig.cache.open(range(1000, 1032), stream=rig.stream),
        "through": lambda: seq.commit(stream=rig.stream),
        "tail": seq.close,
    }
    if how != "through":
        seq.commit(stream=rig.stream)
    if how == "evict":
        seq.close()
    rig.device.hold(rig.stream)
    with monkeypatch.context() as patch:
        patch.setattr(rig.engine, "store", interrupted(rig.engine.store))
        with pytest.raises(KeyboardInterrupt):
            calls[how]()
    seq.close()
    assert not rig.cache.open(range(2000, 2000 + NUM_PAGES * rig.cache.page_tokens))
    assert rig.cache.stats().quarantined_pages == len(ids)
    with rig.open(range(2000, 2000 + (NUM_PAGES - len(ids)) * rig.cache.page_tokens)) as other:
        assert not ids & set(other.page_ids.tolist())
    rig.close()
