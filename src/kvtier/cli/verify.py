"""`kvtier verify DIR`: reads every block on a drive and proves it.

Exit status 0 if all is right, 1 if something is corrupt or foreign, 2 if it cannot be told.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from kvtier import stores
from kvtier.cli.progress import Progress
from kvtier.cli.results import check_json, out_of, table, told, write_json
from kvtier.disk_keys import read_keys
from kvtier.errors import KVTierError

_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvtier verify`."""
    parser.add_argument("directory", metavar="DIR", help="of a disk, as in Disk(path=...)")
    parser.add_argument("--json", metavar="FILE", help="write the counts there; - for standard output")
    parser.add_argument("--key", metavar="PLACES", help="as Config.disk_key: proves encrypted blocks too")
    parser.add_argument("--live", action="store_true", help="also stores that a process has open")


def run(args: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    out = out_of(args.json)
    begin = time.monotonic()
    bar: Progress | None = None
    done_mib = 0

    def progress(done: int, total: int) -> None:
        nonlocal bar, done_mib
        if bar is None:
            bar = Progress(out, total // _MIB)
            bar.__enter__()
            bar.phase("reading")
        bar.step(done // _MIB - done_mib)
        done_mib = done // _MIB

    try:
        check_json(args.json)
        keys = read_keys(args.key)
        try:
            found = stores.verify(args.directory, keys=keys, live=args.live, progress=progress)
        finally:
            if bar is not None:
                bar.__exit__(None, None, None)
        seconds = time.monotonic() - begin
        _print(found, seconds, out)
        out.flush()
        write_json(args.json, told("verify", {**found, "seconds": seconds}, ok=found["ok"]))
    except (KVTierError, OSError) as error:
        print(f"kvtier verify: {error}", file=sys.stderr)
        return 2  # 1 says that something is wrong with the blocks
    return 0 if found["ok"] else 1


def _print(found: dict[str, Any], seconds: float, out: Any) -> None:
    rows = [
        (store["name"], *(str(store[name]) for name in stores.COUNTS), store["not_read"])
        for store in found["stores"]
    ]
    rows.append(("sum", *(str(found[name]) for name in stores.COUNTS), ""))
    print(table(("store", *stores.COUNTS, "not read"), rows), file=out)
    read = sum(store["read_bytes"] for store in found["stores"])
    print(f"read {read / 2**30:.2f} GiB in {seconds:.1f} s", file=out)
    if found["unreadable"]:
        print(f"{found['unreadable']} blocks are encrypted under a key that was not given (--key)", file=out)
    print("ok" if found["ok"] else "NOT ok", file=out)
