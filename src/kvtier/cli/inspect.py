"""`kvtier inspect DIR`: what is on a drive: occupancy, namespaces, ages, hits. Changes nothing."""

from __future__ import annotations

import argparse
from typing import Any

from kvtier import stores
from kvtier.cli.results import check_json, out_of, table, told, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier inspect`."""
    parser.add_argument("directory", metavar="DIR", help="of a disk, as in Disk(path=...)")
    parser.add_argument("--json", metavar="FILE", help="write it there; - for standard output")
    parser.add_argument(
        "--namespace", metavar="NAME", action="append", default=[], help="show this one by its name"
    )


def run(args: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    check_json(args.json)
    found = stores.inspect(args.directory)
    _print(found, {stores.namespace_tag(name): name for name in ["", *args.namespace]}, out_of(args.json))
    write_json(args.json, told("inspect", found))
    return 0


_HITS = """
hits: blocks read from the store, and proved, since the engine that has it open opened it. All its drives
together, and host memory:"""


def _print(found: dict[str, Any], names: dict[str, str], out: Any) -> None:
    capacity, used = found["capacity_bytes"], found["allocated_bytes"]
    share = f" ({100 * used / capacity:.0f} %)" if capacity else ""
    print(f"{_bytes(used)} of {_bytes(capacity)} on the drive{share}\n", file=out)
    ages = ("oldest", "median", "newest")
    header = ("store", "state", "blocks", "payload", "allocated", *ages, "hits", "from")
    rows = []
    for store in found["stores"]:
        state = "in use" if store["in_use"] else ("clean" if store["clean"] else "not closed in order")
        if not store["readable"]:
            state = "unreadable"
        times = [_age(store["ages"][f"{name}_s"]) if store["ages"] else "" for name in ages]
        sizes = (_bytes(store["payload_bytes"]), _bytes(store["allocated_bytes"]))
        unknown = "unknown" if store["in_use"] else ""  # its engine does not answer
        hits = unknown if store["hits"] is None else str(store["hits"]["read"])
        rows.append((store["name"], state, str(store["blocks"]), *sizes, *times, hits, store["source"]))
    print(table(header, rows), file=out)
    if asked := [(store["name"], store["hits"]) for store in found["stores"] if store["hits"] is not None]:
        print(_HITS, file=out)
        columns = ("lookup_blocks", "lookup_hits_host", "lookup_hits_disk")
        lines = [(name, *(str(of[column]) for column in columns)) for name, of in asked]
        print(table(("store", "blocks looked up", "in host memory", "on disk"), lines), file=out)
    tenants = [
        (store["name"], _name(tag, names), str(of["blocks"]), _bytes(of["bytes"]))
        for store in found["stores"]
        for tag, of in sorted(store["namespaces"].items(), key=lambda item: -item[1]["blocks"])
    ]
    if tenants:
        print("\n" + table(("store", "namespace", "blocks", "payload"), tenants), file=out)
    depths = [
        (store["name"], depth if int(depth) < 2 else f"{depth}-{2 * int(depth) - 1}", str(count))
        for store in found["stores"]
        for depth, count in store["depths"].items()
    ]
    if depths:
        print("\n" + table(("store", "depth", "blocks"), depths), file=out)


def _name(tag: str, names: dict[str, str]) -> str:
    if tag in names:
        return repr(names[tag])
    return f"tag {tag}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _age(seconds: int) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds} s"
