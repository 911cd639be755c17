"""Damage that somebody else does to the files of a store.

Each function does one thing at random to a campaign's store, and returns which chains it has harmed: all
others must still be served.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

from disk_campaign import Campaign, Harm

STRIDES = {"slots.0": 8192, "slots.1": 16384}  # docs/formats/slot.md
KEY = slice(80, 112)
USED_SLOTS = 200  # where blocks are


def damage_catalog(campaign: Campaign) -> Harm | None:
    """Deletes, cuts, overwrites or turns back the catalog: it costs hits or time, never right bytes."""
    store = campaign.store
    if store is None or not (store / "catalog.mdb").exists():
        return None
    catalog = store / "catalog.mdb"
    older = campaign.home / f"catalog.{campaign.cycle}"
    kinds = {"keep a copy": 4, "delete": 4, "cut": 4, "older": 4, "zero": 1, "garbage": 1}
    what = campaign.random.choices(list(kinds), list(kinds.values()))[0]
    live = campaign.book.live
    if what == "keep a copy":
        shutil.copyfile(catalog, older)
        campaign.old_catalogs = [*campaign.old_catalogs[-4:], (older, set(live))]
        return None
    size = catalog.stat().st_size
    if what == "delete":
        catalog.unlink()
    elif what == "cut":
        os.truncate(catalog, campaign.random.randrange(size + 1))
    elif what in ("zero", "garbage"):
        with catalog.open("r+b") as file:
            begin = campaign.random.choice([0, campaign.random.randrange(size)])
            count = campaign.random.randint(1, size - begin)
            file.seek(begin)
            file.write(bytes(count) if what == "zero" else campaign.random.randbytes(count))
        # A record that lies about a slot costs the block that stands there.
        return Harm(set(range(campaign.book.next_chain)))
    elif campaign.old_catalogs:
        path, then = campaign.random.choice(campaign.old_catalogs)
        shutil.copyfile(path, catalog)
        # What came later may stand in a slot that the older catalog says to hold something else.
        return Harm(live - then)
    return Harm(set())


def damage_catalog_in_use(campaign: Campaign) -> Harm | None:
    """Cuts, removes or replaces the catalog under its helper, which maps it: the engine makes another, or the
    next one reads all headers."""
    catalog = None if campaign.store is None else campaign.store / "catalog.mdb"
    if catalog is None or not catalog.exists():
        return None
    what = campaign.random.choice(["cut", "cut", "empty", "remove", "replace"])
    if what == "remove":
        catalog.unlink()
    elif what == "replace":
        copy = catalog.with_suffix(".copy")
        shutil.copyfile(catalog, copy)
        copy.rename(catalog)
    else:
        os.truncate(catalog, 0 if what == "empty" else campaign.random.randrange(catalog.stat().st_size + 1))
    return Harm(set())


def damage_slots(campaign: Campaign) -> Harm | None:
    """Cuts, swaps, zeroes or overwrites slot files: misses of what was touched, and of nothing else."""
    store = campaign.store
    files = [] if store is None else sorted(store.glob("slots.*"))
    random = campaign.random
    if not files or random.random() < 0.3:
        return None
    chosen = random.choice(files)
    if chosen.stat().st_size == 0:
        return None
    what = random.choice(["cut", "swap slots", "swap files", "zero", "overwrite", "flip"])
    if what == "swap files" and len(files) > 1:
        return _swap_files(campaign, *files[:2])
    if what == "cut":
        return _cut(campaign, chosen)
    if what in ("zero", "overwrite"):
        return _overwrite(campaign, chosen, random.randbytes if what == "overwrite" else bytes)
    return _flip(campaign, chosen) if what == "flip" else _swap_slots(campaign, chosen)


def _chains_in(campaign: Campaign, file: Path, slots: Iterable[int]) -> set[int]:
    """By the headers that stand there."""
    found = set()
    with file.open("rb") as opened:
        for slot in slots:
            opened.seek(slot * STRIDES[file.name])
            chain = campaign.chain_of(opened.read(KEY.stop)[KEY])
            if chain is not None:
                found.add(chain)
    return found


def _num_slots(file: Path) -> int:
    return file.stat().st_size // STRIDES[file.name]


def _some_slot(random: Random, file: Path) -> int:
    return random.randrange(max(1, min(USED_SLOTS, _num_slots(file))))


def _swap_files(campaign: Campaign, one: Path, other: Path) -> Harm:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return Harm(set(range(campaign.book.next_chain)), lasting=True)


def _cut(campaign: Campaign, file: Path) -> Harm:
    size = campaign.random.randrange(file.stat().st_size)
    touched = _chains_in(campaign, file, range(size // STRIDES[file.name], _num_slots(file)))
    os.truncate(file, size)
    return Harm(touched)


def _overwrite(campaign: Campaign, file: Path, junk: Callable[[int], bytes]) -> Harm:
    stride, size = STRIDES[file.name], file.stat().st_size
    begin = campaign.random.randrange(min(size, stride * USED_SLOTS))
    count = campaign.random.randint(1, min(1 << 20, size - begin))
    touched = _chains_in(campaign, file, range(begin // stride, (begin + count - 1) // stride + 1))
    with file.open("r+b") as opened:
        opened.seek(begin)
        opened.write(junk(count))
    return Harm(touched)


def _flip(campaign: Campaign, file: Path) -> Harm:
    random, stride = campaign.random, STRIDES[file.name]
    slots = [_some_slot(random, file) for _ in range(20)]
    touched = _chains_in(campaign, file, slots)
    with file.open("r+b") as opened:
        for slot in slots:
            at = slot * stride + random.randrange(stride)
            opened.seek(at)
            byte = opened.read(1)
            if byte:
                opened.seek(at)
                opened.write(bytes([byte[0] ^ 1 << random.randrange(8)]))
    return Harm(touched)


def _swap_slots(campaign: Campaign, file: Path) -> Harm:
    random, stride = campaign.random, STRIDES[file.name]
    pairs = [(_some_slot(random, file), _some_slot(random, file)) for _ in range(20)]
    touched = _chains_in(campaign, file, {slot for pair in pairs for slot in pair})
    with file.open("r+b") as opened:
        for a, b in pairs:
            opened.seek(a * stride)
            one = opened.read(stride)
            opened.seek(b * stride)
            two = opened.read(stride)
            opened.seek(b * stride)
            opened.write(one)
            opened.seek(a * stride)
            opened.write(two)
    return Harm(touched)
