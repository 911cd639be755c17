"""A program, run by test_ranks.py: two ranks in processes of their own; one is killed while it stores.

usage: run_rank_dies.py MODEL DISK WHEN RESULT. WHEN is of the rank's copy: "before", "begun" or "copied";
then it dies. With "restored" nobody dies, and what was stored before is asked for. RESULT is JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from harness import Server, prompt

from kvtier.engine import BlockOutcome

HERE = Path(__file__).parent
SLOTS = ("filling", "ready", "leaving")
DURABLE = [prompt(seed, 300 + 50 * seed) for seed in range(3)]
KILLED = prompt(11, 1500)
STORES = 3  # the rank dies at this one


class Mortal:
    """Becomes a base of vLLM's workers."""

    def die(self, when: str) -> None:
        """Rank 1 kills itself at a store that comes."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        side = get_kv_transfer_group()._worker
        execute, seen = side._execute, 0
        if self.rank != 1:  # type: ignore[attr-defined]
            return

        def dying(copy: Any) -> Any:
            nonlocal seen
            seen += copy.instruction.is_store
            last = seen == STORES
            ticket = None if last and when == "before" else execute(copy)
            if last:
                if when == "copied":
                    ticket.wait(10)
                os.kill(os.getpid(), signal.SIGKILL)
            return ticket

        side._execute = dying


def main() -> None:
    model, path, when, result = sys.argv[1:]
    extra = {"host": "32MiB", "max_wait": 30, "disk": [{"path": path, "capacity": "128MiB"}]}
    more = {"tensor_parallel_size": 2, "max_num_batched_tokens": 256}
    server = Server(Path(model), extra=extra, worker_extension_cls="run_rank_dies.Mortal", **more)
    told: dict[str, Any] = {"durable": outcome(server, DURABLE)}
    if when == "restored":
        told["killed"] = outcome(server, [KILLED])
        server.forget_device()
        told["computed"] = outcome(server, [KILLED], {"tiers": []})
        told["failures"] = server.count("load_failures")
    else:
        assert server.scheduler._engine.flush(60).dropped == 0
        told |= killed(server, when)
    server.close()
    Path(result).write_text(json.dumps(told))


def outcome(server: Server, prompts: list[list[int]], options: Any = None) -> list[Any]:
    more = {"extra_args": {"kv_transfer_params": {"kvtier": options}}} if options else {}
    return [(r.tokens, r.cached) for r in server.generate(prompts, **more)]


def killed(server: Server, when: str) -> dict[str, Any]:
    engine, keeper = server.scheduler._engine, server.scheduler._keeper
    before = engine.stats().store_stored
    server.llm.collective_rpc("die", args=(when,))
    try:
        server.generate([KILLED])
    except Exception as error:  # noqa: BLE001 - vLLM's, whichever it is
        said = repr(error)
    else:
        raise AssertionError("nobody died")
    (state,) = server.scheduler._requests.values()
    server.wait(lambda: engine.stats().transfers_running == 0)
    server.wait(lambda: keeper.workers() == [None, None])
    keys = state.keys.rows(0, state.keys.update(state.request.block_hashes))
    later = keeper.store(keys).instruction.outcomes
    stats = engine.stats()
    return {
        "error": said,
        "visible": engine.lookup(keys).ready_blocks,
        "later": sorted({BlockOutcome(outcome).name for outcome in later.tolist()}),
        "pinned": (stats.pins, stats.leases, stats.quarantined_blocks),
        "slots": {name: sum(getattr(each, name) for each in stats.host) for name in SLOTS},
        "stored": (before, stats.store_stored),
    }


if __name__ == "__main__":
    main()
