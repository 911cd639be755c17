"""Tensor parallelism on one host: one keeper process owns index, policy and arena; the ranks' workers copy.

    keeper = kvtier.ranks.Keeper(engine, "/run/user/1000/kvtier")         # the scheduler's process
    worker = kvtier.ranks.Worker("/run/user/1000/kvtier", rank, config)   # each rank's, before or after
    pages = worker.attach(kv_tensors)

    instruction, ticket = keeper.store(keys)       # small and picklable: carry it to every rank
    worker.execute(instruction, pages, page_ids)   # in each of them; ticket is done when all have reported

docs/multi-process.md says what holds when a process dies.
"""

from kvtier.ranks.instruction import Instruction
from kvtier.ranks.keeper import Keeper, LoadOrder, StoreOrder
from kvtier.ranks.worker import RankPages, Worker

__all__ = ["Instruction", "Keeper", "LoadOrder", "RankPages", "StoreOrder", "Worker"]
