"""python -m benchmarks.workloads FAMILY: writes a generated trace to standard output."""

from __future__ import annotations

import argparse
import sys

from benchmarks.workloads import FAMILIES, FORMATS, generate, write


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workloads", description=__doc__)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--format", choices=list(FORMATS), default="mooncake")
    parser.add_argument("--block-tokens", type=int, help="default: 512, or 16 for bailian")
    asked = parser.parse_args()
    block_tokens = (
        asked.block_tokens if asked.block_tokens is not None else {"bailian": 16}.get(asked.format, 512)
    )
    try:
        write(generate(asked.family, asked.minutes, asked.seed, block_tokens), sys.stdout, asked.format)
    except ValueError as wrong:
        parser.error(str(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
