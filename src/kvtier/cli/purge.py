"""`kvtier purge DIR`: forgets a tenant's blocks for good, also in stores that an engine has open."""

from __future__ import annotations

import argparse

from kvtier import stores
from kvtier.cli.results import check_json, out_of, table, told, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier purge`."""
    parser.add_argument("directory", metavar="DIR", help="of a disk, as in Disk(path=...)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--namespace", metavar="NAME", help="all blocks of this tenant; '' for those of none")
    what.add_argument("--all", action="store_true", help="all blocks, of stores that nobody has open")
    parser.add_argument("--json", metavar="FILE", help="write what was done there; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Runs it; the exit status is 1 when something is left."""
    check_json(args.json)
    purged = stores.purge(args.directory, None if args.all else args.namespace)
    out = out_of(args.json)
    rows = [
        (store["name"], "its engine" if store["in_use"] else "here", str(store["dropped"]), store["problem"])
        for store in purged
    ]
    print(table(("store", "purged by", "blocks", "problem"), rows), file=out)
    dropped = sum(store["dropped"] for store in purged)
    whole = not any(store["problem"] for store in purged)
    write_json(args.json, told("purge", {"dropped": dropped, "stores": purged}, purged=whole))
    return 0 if whole else 1
