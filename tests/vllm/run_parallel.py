"""A program, run by test_server.py: tensor parallelism of two, several processes; writes JSON.

usage: run_parallel.py MODEL BLOCK RESULT
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    model, block = sys.argv[1], int(sys.argv[2])
    prompts = [[(7 * i * (j + 1) + i * i * j) % 500 + 4 for i in range(400 + 50 * j)] for j in range(3)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=2048,
        enforce_eager=True,
        seed=0,
        block_size=block,
        disable_log_stats=False,
        tensor_parallel_size=2,
        # By the name alone: the plugin's entry point makes it known in every process.
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVTierConnector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"host": "64MiB", "load": "always"},
        ),
    )
    runs: list[Any] = []
    resets = []
    for run in ("cold", "device", "restored"):
        if run == "restored":
            resets.append(llm.reset_prefix_cache())
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        runs.append(
            {
                "tokens": [list(o.outputs[0].token_ids) for o in outputs],
                "cached": [o.num_cached_tokens for o in outputs],
            }
        )
    counters = {m.name: m.value for m in llm.get_metrics() if m.name.startswith("vllm:kvtier_")}
    lengths = [len(p) for p in prompts]
    result = {"runs": runs, "resets": resets, "counters": counters, "lengths": lengths}
    Path(sys.argv[3]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
