"""Seeded traffic of other kinds than the conversation trace: what eviction policies are tried on.

python -m benchmarks.workloads agents --minutes 60 --seed 7 > agents.jsonl
"""

from benchmarks.workloads.traffic import FAMILIES, Request, generate
from benchmarks.workloads.writers import FORMATS, write

__all__ = ["FAMILIES", "FORMATS", "Request", "generate", "write"]
