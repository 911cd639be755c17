"""A program, run by test_disk_faults.py: an engine that stores until it is killed.

usage: run_life.py MODEL DISK. It writes a line of JSON for each thing that happened.
"""

import json
import sys
from itertools import count
from pathlib import Path

from harness import Server, prompt

DURABLE = [prompt(seed, 300 + 50 * seed) for seed in range(3)]
DISK = {"host": "16MiB", "max_wait": 30, "load": "always"}


def more(n: int) -> list[int]:
    """The n-th prompt that is being stored when the end comes."""
    return prompt(10 + n, 700 + n % 5)


def disk(path: Path, capacity: str = "128MiB") -> dict[str, object]:
    return DISK | {"disk": [{"path": str(path), "capacity": capacity}]}


def main() -> None:
    server = Server(Path(sys.argv[1]), extra=disk(Path(sys.argv[2])))
    tell(durable=[r.tokens for r in server.generate(DURABLE)])
    tell(flushed=server.scheduler._engine.flush(60).durable)
    for n in count():
        (result,) = server.generate([more(n)])
        tell(more=result.tokens, running=server.scheduler._engine.stats().disk_waiting)


def tell(**what: object) -> None:
    sys.stdout.write(f"TOLD {json.dumps(what)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
