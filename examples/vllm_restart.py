"""A vLLM server with kvtier reads a long prompt, is ended and started again: then the prompt comes from disk.

Run it where vLLM and kvtier are installed: python examples/vllm_restart.py [--model MODEL] [--tokens 8193]
Without --model it makes a small one with random weights, which needs no network.
"""

import argparse
import random
import tempfile
from pathlib import Path

from kvtier.cli.bench_vllm_model import write_model
from kvtier.cli.vllm_server import Answer, VllmServer


def main() -> None:
    parser = argparse.ArgumentParser(description="What a restart of vLLM costs with kvtier below it.")
    parser.add_argument("--model", help="a folder, or a hub name")
    parser.add_argument("--tokens", type=int, default=8193, help="of the prompt (default: %(default)s)")
    parser.add_argument("--dir", help="folder of the disk tier; it is kept (default: a temporary one)")
    parser.add_argument("--host", default="1GiB", help="size of the host tier (default: %(default)s)")
    parser.add_argument("--disk", default="4GiB", help="capacity of the disk tier (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvtier-example-") as folder:
        model = args.model
        if model is None:
            model = str(Path(folder) / "model")
            write_model(Path(model), seed=1)
        drive = {"path": str(Path(args.dir or Path(folder) / "disk").absolute()), "capacity": args.disk}
        transfer = {  # what stands behind `vllm serve MODEL --kv-transfer-config`
            "kv_connector": "KVTierConnector",
            "kv_connector_module_path": "kvtier.adapters.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"host": args.host, "disk": [drive]},
        }
        numbers = random.Random(1)
        prompt = [numbers.randrange(4, 500) for _ in range(args.tokens)]
        other = prompt[: args.tokens // 8][::-1]  # lets each server warm up

        def server() -> VllmServer:
            more = ["--enforce-eager", "--max-model-len", str(args.tokens + 64)]
            return VllmServer(model, transfer, more, VLLM_CPU_KVCACHE_SPACE="2")

        print("starting vLLM", flush=True)
        with server() as first:
            first.wait_until_up()
            first.ask(other)
            show("computed", cold := first.ask(prompt))
            show("on the device", device := first.ask(prompt))
            first.forget_device()
            show("from host memory", first.ask(prompt))
        print("restarting vLLM", flush=True)
        with server() as second:
            second.wait_until_up()
            second.ask(other)
            show("from disk, after a restart", restored := second.ask(prompt))
        same = "the same" if restored.tokens == device.tokens else "ANOTHER"
        print(
            f"{same} answer as from the device, {cold.seconds / restored.seconds:.0f} x sooner than computed"
        )


def show(where: str, answer: Answer) -> None:
    cached = f"{answer.cached_tokens:6} tokens of the prompt not computed"
    print(f"{where:28} first token after {answer.seconds:7.3f} s, {cached}", flush=True)


if __name__ == "__main__":
    main()
