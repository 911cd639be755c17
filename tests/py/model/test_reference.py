"""The model itself, against cases worked out by hand: a wrong model would bless a wrong engine."""

import pytest

from kvtier import ClosedError, Config, ConfigError, KVLayout
from kvtier.reference import ReferenceCache, ReferenceOperation, SlotCounts


def key(name: str) -> bytes:
    return name.encode().ljust(32, b".")


def keys(names: str) -> list[bytes]:
    return [key(name) for name in names]


def contents(names: str) -> list[bytes]:
    return [b"bytes of " + name.encode() for name in names]


def store(
    cache: ReferenceCache, names: str, group: int = 0, parent: str = "", namespace: str = ""
) -> list[str]:
    above = key(parent) if parent else None
    return cache.store(keys(names), contents(names), group=group, parent=above, namespace=namespace)


def begin_store(cache: ReferenceCache, names: str) -> ReferenceOperation:
    return cache.begin_store(keys(names), contents(names))


def ages(cache: ReferenceCache, class_index: int = 0) -> str:
    """Names of the ready blocks, oldest first."""
    return "".join(block.decode()[0] for block, _ in cache.by_age(class_index))


def hits(cache: ReferenceCache, names: str) -> str:
    return "".join(state[0] for state in cache.lookup(keys(names)).states[0])


def test_a_stored_block_is_found_and_loaded():
    cache = ReferenceCache([4])
    assert store(cache, "ab") == ["stored", "stored"]
    match = cache.lookup(keys("abc"))
    assert match.states == [["ready", "ready", "miss"]]
    assert match.ready_blocks == 2
    assert cache.load(keys("bca")) == [b"bytes of b", None, b"bytes of a"]
    assert cache.counters["lookup_hits_host"] == 2
    assert cache.counters["lookup_misses_absent"] == 1
    assert cache.counters["load_missed"] == 1
    assert cache.counters["bytes_loaded"] == 2 * len(b"bytes of a")


def test_the_tail_of_a_prompt_is_the_oldest():
    cache = ReferenceCache([4])
    store(cache, "abcd")
    assert ages(cache) == "dcba"
    assert store(cache, "xy") == ["stored", "stored"]
    assert ages(cache) == "bayx"
    assert cache.counters["evictions"] == 2


@pytest.mark.parametrize("use", ["load", "pin", "touch", "store"])
def test_what_is_used_becomes_young_tail_first(use):
    cache = ReferenceCache([6])
    store(cache, "ab")
    store(cache, "xyz")
    assert ages(cache) == "bazyx"
    if use == "load":
        cache.load(keys("ab"))
    elif use == "pin":
        cache.pin(keys("ab")).release()
    elif use == "touch":
        assert cache.touch(keys("ab")) == 2
    else:
        assert store(cache, "ab") == ["present", "present"]
    assert ages(cache) == "zyxba"


def test_lookup_makes_nothing_young():
    cache = ReferenceCache([4])
    store(cache, "ab")
    store(cache, "x")
    cache.lookup(keys("ab"))
    assert ages(cache) == "bax"


def test_a_parent_is_never_evicted_before_its_child_and_keeps_its_age():
    cache = ReferenceCache([3])
    store(cache, "a")
    store(cache, "b", parent="a")
    store(cache, "x")
    assert ages(cache) == "abx"
    store(cache, "y")  # a is the oldest, but b hangs on it
    assert ages(cache) == "axy"
    store(cache, "z")  # nothing hangs on a any more
    assert ages(cache) == "xyz"


def test_a_parent_that_is_not_there_protects_nothing_and_is_not_made():
    cache = ReferenceCache([2])
    assert store(cache, "b", parent="a") == ["stored"]
    assert hits(cache, "ab") == "mr"


def test_the_parent_of_the_block_that_needs_the_slot_is_spared():
    cache = ReferenceCache([1])
    store(cache, "a")
    assert store(cache, "b", parent="a") == ["declined"]
    assert ages(cache) == "a"
    assert store(cache, "b") == ["stored"]


def test_the_first_block_without_a_slot_ends_a_store():
    cache = ReferenceCache([2])
    assert store(cache, "abcd") == ["stored", "stored", "declined", "declined"]
    assert store(cache, "abc") == ["present", "present", "declined"]  # a and b are in use by this store
    assert store(cache, "xab") == ["stored", "present", "declined"]  # b went for x; x and a are in use


def test_pinned_blocks_stay_i4():
    cache = ReferenceCache([2])
    store(cache, "ab")
    lease = cache.pin(keys("ab"))
    assert (cache.pins, cache.pinned_blocks) == (2, 2)
    second = cache.pin(keys("a"))
    assert (cache.pins, cache.pinned_blocks) == (3, 2)
    assert store(cache, "x") == ["declined"]
    lease.release()
    lease.release()
    assert (cache.pins, cache.pinned_blocks) == (1, 1)
    assert store(cache, "x") == ["stored"]
    assert hits(cache, "abx") == "rmr"
    second.release()
    assert cache.pins == 0


def test_a_lease_ends_when_its_time_is_over():
    cache = ReferenceCache([2])
    store(cache, "ab")
    lease = cache.pin(keys("ab"), ttl_us=10)
    cache.now_us = 9
    cache.poll()
    assert lease.active
    cache.now_us = 10
    cache.poll()
    assert not lease.active
    assert cache.pins == 0


def test_a_store_ends_leases_whose_time_is_over():
    cache = ReferenceCache([1])
    store(cache, "a")
    cache.pin(keys("a"), ttl_us=10)
    assert store(cache, "b") == ["declined"]
    cache.now_us = 10
    assert store(cache, "b") == ["stored"]


def test_a_block_is_pending_while_it_is_filled():
    cache = ReferenceCache([3])
    running = begin_store(cache, "ab")
    assert hits(cache, "ab") == "pp"
    assert cache.slot_counts() == [SlotCounts(free=1, filling=2, ready=0, leaving=0)]
    assert store(cache, "ax") == ["pending", "stored"]
    assert cache.begin_load(keys("a")).outcomes == ["pending"]
    assert store(cache, "y") == ["stored"]  # only x may go
    assert running.finish() == ["stored", "stored"]
    assert ages(cache) == "yba"


def test_nothing_hangs_on_a_block_that_somebody_else_fills():
    cache = ReferenceCache([3])
    running = begin_store(cache, "a")
    assert store(cache, "ab") == ["pending", "stored"]
    running.finish()
    assert ages(cache) == "ba"
    cache.touch(keys("b"))
    store(cache, "xy")
    assert ages(cache) == "byx"  # a went, though b came after it in the prompt


def test_a_failed_store_leaves_nothing():
    cache = ReferenceCache([2])
    store(cache, "a")
    assert cache.store(keys("abc"), contents("abc"), failed=True) == ["present", "failed", "declined"]
    assert hits(cache, "abc") == "rmm"
    assert cache.slot_counts() == [SlotCounts(free=1, filling=0, ready=1, leaving=0)]
    assert store(cache, "x") == ["stored"]
    assert store(cache, "y") == ["stored"]  # and b, which failed, does not hold a
    assert ages(cache) == "xy"


def test_a_failed_load_ends_its_pins():
    cache = ReferenceCache([2])
    store(cache, "ab")
    running = cache.begin_load(keys("ab"))
    assert cache.pins == 2
    assert running.finish(failed=True) == ["failed", "failed"]
    assert running.contents == [None, None]
    assert cache.pins == 0
    assert hits(cache, "ab") == "rr"


def test_a_block_dropped_while_filled_is_never_seen():
    cache = ReferenceCache([3])
    running = begin_store(cache, "ab")
    assert cache.drop(keys("b")) == 1
    assert hits(cache, "ab") == "pm"
    assert store(cache, "b") == ["stored"]  # anew, in a slot of its own
    assert cache.slot_counts() == [SlotCounts(free=0, filling=2, ready=1, leaving=0)]
    assert running.finish() == ["stored", "dropped"]
    assert cache.slot_counts() == [SlotCounts(free=1, filling=0, ready=2, leaving=0)]


def test_a_block_dropped_while_pinned_leaves_with_its_last_pin():
    cache = ReferenceCache([2])
    store(cache, "a")
    lease = cache.pin(keys("a"))
    running = cache.begin_load(keys("a"))
    assert cache.drop(keys("a")) == 1
    assert hits(cache, "a") == "m"
    assert cache.slot_counts() == [SlotCounts(free=1, filling=0, ready=0, leaving=1)]
    assert running.finish() == ["loaded"]
    assert running.contents == [b"bytes of a"]
    assert cache.slot_counts() == [SlotCounts(free=1, filling=0, ready=0, leaving=1)]
    lease.release()
    assert cache.slot_counts() == [SlotCounts(free=2, filling=0, ready=0, leaving=0)]


def test_drop_counts_what_was_there_in_every_group():
    cache = ReferenceCache([4], class_of_group=[0, 0])
    store(cache, "ab", group=0)
    store(cache, "a", group=1)
    assert cache.drop(keys("aac")) == 2
    assert list(cache.resident()) == [(key("b"), 0)]
    assert cache.counters["drops"] == 2


def test_a_namespace_is_dropped_as_a_whole():
    cache = ReferenceCache([4])
    store(cache, "ab", namespace="one")
    store(cache, "xy", namespace="two")
    assert cache.drop_namespace("three") == 0
    assert cache.drop_namespace("one") == 2
    assert hits(cache, "abxy") == "mmrr"


@pytest.mark.parametrize(
    ("in_window_group", "ready_blocks"),
    [("abcd", 4), ("cd", 4), ("abc", 3), ("bc", 3), ("ad", 1), ("b", 0), ("", 0)],
)
def test_a_window_needs_only_the_blocks_that_it_reaches_back_to(in_window_group, ready_blocks):
    cache = ReferenceCache([8, 8], class_of_group=[0, 1], window_blocks=[None, 2])
    store(cache, "abcd", group=0)
    for name in in_window_group:
        store(cache, name, group=1)
    assert cache.lookup(keys("abcd")).ready_blocks == ready_blocks


def test_a_pin_holds_of_a_window_only_what_it_needs():
    cache = ReferenceCache([8, 8], class_of_group=[0, 1], window_blocks=[None, 2])
    store(cache, "abcd", group=0)
    store(cache, "abcd", group=1)
    lease = cache.pin(keys("abcd"), max_blocks=3)
    assert lease.num_blocks == 3
    assert cache.pins == 3 + 2
    assert ages(cache, 0) == "dcba"
    assert ages(cache, 1) == "dacb"


def test_groups_of_equal_slots_share_their_class():
    a, b = (KVLayout(1, 1, 8, "uint8", 4, window_tokens=window) for window in (None, 9))
    wide = KVLayout(1, 1, 2048, "uint8", 4, window_tokens=8)
    cache = ReferenceCache.for_config(
        Config(groups=[a, wide, b], block_tokens=4, model="m", host=36864 * 3 + 100)
    )
    assert [sum(vars(counts).values()) for counts in cache.slot_counts()] == [6, 3]
    store(cache, "a" * 1, group=0)
    store(cache, "b", group=1)
    store(cache, "c", group=2)
    assert ages(cache, 0) == "ac"
    assert ages(cache, 1) == "b"
    assert cache._windows == [None, 2, 2]


def test_after_a_device_has_failed_everything_misses():
    cache = ReferenceCache([2])
    store(cache, "a")
    cache.fail()
    match = cache.lookup(keys("ab"))
    assert match.states == [["miss", "miss"]]
    assert match.ready_blocks == 0
    assert cache.counters["lookup_misses_failed"] == 2
    assert cache.load(keys("a")) == [None]
    assert store(cache, "ab") == ["declined", "declined"]
    assert cache.pin(keys("a")).num_blocks == 0


def test_close_ends_leases_and_refuses_the_rest():
    cache = ReferenceCache([2])
    store(cache, "a")
    lease = cache.pin(keys("a"))
    cache.close()
    cache.close()
    assert not lease.active
    assert cache.pins == 0
    for call in (cache.lookup, cache.pin, cache.touch, cache.drop, cache.load):
        with pytest.raises(ClosedError):
            call(keys("a"))
    with pytest.raises(ClosedError):
        store(cache, "b")


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="window_blocks"):
        ReferenceCache([1], [0], [None, 2])
    with pytest.raises(ConfigError, match="class_of_group"):
        ReferenceCache([1], [0, 1])
