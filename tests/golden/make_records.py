"""Writes budget_v1.bin and epoch_v1.bin from docs/formats/budget.md and epoch.md, with none of kvtier's code.

Usage: python tests/golden/make_records.py
"""

import hashlib
import struct
from pathlib import Path

from make_slots import checksum


def budget(bytes_per_day: int, left_bytes: int, at_s: int, version: int = 1) -> bytes:
    fields = struct.pack("<8sIIQQq", b"\x89KVBDGT\n", version, 0, bytes_per_day, left_bytes, at_s)
    checked = fields.ljust(496, b"\0")
    return checked + checksum(checked)


def epoch(value: bytes, version: int = 1) -> bytes:
    checked = struct.pack("<8sII32s", b"\x89KVEPCH\n", version, 0, value)
    return checked + hashlib.sha256(checked).digest()[:16]


def main() -> None:
    here = Path(__file__).parent
    (here / "budget_v1.bin").write_bytes(budget(10**12, 123_456_789_012, 1_700_000_000))
    (here / "epoch_v1.bin").write_bytes(epoch(bytes(range(0x80, 0xA0))))


if __name__ == "__main__":
    main()
