"""The stores below the directory of a Disk, seen from outside: for `kvtier verify`, `inspect` and `purge`.

Looking changes nothing, and may be done while engines run. docs/disk.md says what the words mean.
"""

import contextlib
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kvtier import _core
from kvtier.control import ask_for_hits, ask_to_purge
from kvtier.errors import KVTierError, StorageError
from kvtier.keys import check_namespace

COUNTS = ("good", "corrupt", "foreign", "free", "unreadable", "newer", "failed")
_META_BYTES = 8192  # LMDB's two meta pages, written last in every transaction
_COPIES = 5

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Block = tuple[bytes, int, int, int, int]  # namespace tag, depth, group, payload bytes, last use


def verify(
    path: str, *, keys: Sequence[bytes] = (), live: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Reads every slot and proves what stands in it.

    Args:
        path: Directory of a Disk.
        keys: Master keys; encrypted blocks are `unreadable` without theirs.
        live: Also stores that a process has open.
        progress: Told from time to time; what it raises ends the reading.

    Returns:
        Sums by outcome (`COUNTS`), `capacity_bytes`, `allocated_bytes`, `ok`, and `stores`, a dict for each.

    Raises:
        ConfigError: Not a store directory.
        StorageError: It cannot be read.
    """
    in_use = _core.StoresInUse.read if live else _core.StoresInUse.skip
    found = _survey(path, _core.SurveyDepth.payloads, in_use, list(keys), None, progress)
    sums = {name: sum(store[name] for store in found["stores"]) for name in COUNTS}
    broken = [store for store in found["stores"] if not store["readable"] and not store["in_use"]]
    ok = not (sums["corrupt"] or sums["foreign"] or sums["failed"] or broken)
    return {**sums, "ok": ok, **found}


def headers(path: str, *, keys: Sequence[bytes] = (), progress: Progress | None = None) -> dict[str, Any]:
    """Reads every slot's header, also of stores that a process has open; payloads are not proved.

    Args:
        path: Directory of a Disk.
        keys: Master keys; blocks encrypted under others are `unreadable`.
        progress: Told from time to time; what it raises ends the reading.

    Returns:
        Sums by outcome (`COUNTS`).

    Raises:
        ConfigError: Not a store directory.
        StorageError: It cannot be read.
    """
    found = _survey(path, _core.SurveyDepth.headers, _core.StoresInUse.read, list(keys), None, progress)
    return {name: sum(store[name] for store in found["stores"]) for name in COUNTS}


def inspect(path: str) -> dict[str, Any]:
    """Says what is in the stores: occupancy, namespaces, ages, depths.

    From the catalogs, or from the slots' headers where there is none; ages are in catalogs alone. `hits` are
    asked of the engine that has a store open (`control.ask_for_hits`): drives keep no count of them. None
    where nobody has it open, or that engine does not answer.

    Raises:
        ConfigError: Not a store directory.
        StorageError: It cannot be read.
    """
    in_use = _core.StoresInUse.read
    found = _survey(path, _core.SurveyDepth.superblocks, in_use, [], None, None)
    missing: dict[str, list[Block]] = {}
    for store in found["stores"]:
        del store["not_read"]
        for name in COUNTS:
            del store[name]
        if not store["readable"]:
            store.update(source="none", **_summary([]))
            continue
        try:
            blocks = _catalog_blocks(Path(path) / "stores" / store["name"])
            store.update(source="catalog", **_summary(blocks))
        except (KVTierError, OSError) as error:
            missing[store["name"]] = []
            store["source"] = f"headers: {error}"
    if missing:

        def on_block(name: str, tag: bytes, depth: int, group: int, payload_bytes: int) -> None:
            if name in missing:
                missing[name].append((tag, depth, group, payload_bytes, 0))

        _survey(path, _core.SurveyDepth.headers, in_use, [], on_block, None)
    for store in found["stores"]:
        if store["name"] in missing:
            store.update(_summary(missing[store["name"]]))
        store["hits"] = None
        if store["in_use"]:
            with contextlib.suppress(StorageError):
                store["hits"] = ask_for_hits(Path(path) / "stores" / store["name"])
    return found


def purge(path: str, namespace: str | None) -> list[dict[str, Any]]:
    """Forgets all blocks of a namespace in every store below a directory; None for all blocks.

    Stores that a process has open are purged by that process, over its control socket; only its user may. It
    can purge namespaces, and not everything. Waits until it is done, but ten minutes at most for the process
    of each such store: then the store has a `problem`, though its purge may still be done. Ask again.

    Returns:
        For each store `name`, `in_use`, `dropped` (blocks), and `problem`, empty if it is purged.

    Raises:
        ConfigError: Not a store directory.
        StorageError: A drive failed; call again.
    """
    name_space = None if namespace is None else check_namespace(namespace)
    purged: list[dict[str, Any]] = []
    for store in _core.purge_stores(path=path, name_space=name_space):
        problem, dropped = store["not_purged"], store["dropped"]
        if store["in_use"] and name_space is not None:
            problem = ""
            try:
                dropped = ask_to_purge(Path(path) / "stores" / store["name"], name_space)
            except StorageError as error:
                problem = str(error)
        elif store["newer"]:
            problem = f"{store['newer']} blocks of a newer kvtier are left"
        purged.append(
            {"name": store["name"], "in_use": store["in_use"], "dropped": dropped, "problem": problem}
        )
    return purged


def probe(path: str) -> dict[str, Any]:
    """What a drive and the kernel offer the disk tier. Makes the directory if it is not there.

    Returns:
        `queue` and `queue_problem`, how requests reach the drive and why not by io_uring; `buffers_problem`,
        why 16 MiB could not be registered with it; `direct` and `alignment` of files.

    Raises:
        StorageError: The directory cannot be used.
        ResourceError: No queue can be made.
    """
    queue, problem, buffers_problem = _core.probe_queue(depth=8)
    direct, alignment = _core.probe_file(directory_path=path)
    return {
        "queue": queue,
        "queue_problem": problem,
        "buffers_problem": buffers_problem,
        "direct": direct,
        "alignment": alignment,
    }


def catalog_helper() -> Path:
    """Where the catalog's helper program stands, whether or not it does."""
    return Path(_core.__file__ or "").parent / "kvtier-catalog"


def _survey(
    path: str, depth: Any, in_use: Any, keys: list[bytes], on_block: Any, go_on: Any
) -> dict[str, Any]:
    found: dict[str, Any] = _core.survey_stores(
        path=path, depth=depth, in_use=in_use, keys=keys, on_block=on_block, go_on=go_on
    )
    return found


def _catalog_blocks(store: Path) -> list[Block]:
    """Reads a copy of a store's catalog, so that nothing is opened that an engine may have open."""
    catalog = store / "catalog.mdb"
    with tempfile.TemporaryDirectory(prefix="kvtier-inspect-") as folder:
        copy = Path(folder) / catalog.name
        for _ in range(_COPIES):
            before = _head(catalog)
            shutil.copyfile(catalog, copy)
            if _head(catalog) == before:  # no transaction ended meanwhile: the copy is of one state
                copy.chmod(0o600)
                blocks: list[Block] = _core.catalog_blocks(directory_path=folder, helper_path="")
                return blocks
    raise StorageError(0, f"{catalog} changes faster than it can be read")


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(_META_BYTES)


def _summary(blocks: Iterable[Block]) -> dict[str, Any]:
    namespaces: dict[str, dict[str, int]] = {}
    depths: Counter[int] = Counter()
    uses: list[int] = []
    num_blocks = payload_bytes = 0
    for tag, depth, _, size, last_use in blocks:
        of = namespaces.setdefault(tag.hex(), {"blocks": 0, "bytes": 0})
        of["blocks"] += 1
        of["bytes"] += size
        num_blocks += 1
        payload_bytes += size
        depths[1 << depth.bit_length() >> 1] += 1  # 0, 1, 2-3, 4-7 ...
        if last_use:
            uses.append(last_use)
    now = time.time()
    ages = None
    if uses:
        ages = {
            "newest_s": max(0, int(now - max(uses))),
            "median_s": max(0, int(now - statistics.median(uses))),
            "oldest_s": max(0, int(now - min(uses))),
        }
    return {
        "blocks": num_blocks,
        "payload_bytes": payload_bytes,
        "namespaces": namespaces,
        "ages": ages,
        "depths": {str(depth): depths[depth] for depth in sorted(depths)},
    }


def namespace_tag(name: str) -> str:
    """The tag that stands for a namespace on a drive, in hexadecimal digits."""
    tag: bytes = _core.namespace_tag(check_namespace(name))
    return tag.hex()
