"""kvtier below vLLM's KV cache: the connector KVTierConnector, for vLLM 0.31 and later. See docs/vllm.md.

vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVTierConnector",
  "kv_connector_module_path": "kvtier.adapters.vllm", "kv_role": "kv_both",
  "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"host": "64GiB"}}'

This module imports neither vLLM nor CUDA; the connector is imported when it is asked for.
"""

import importlib
import importlib.util
import re
from typing import Any

from kvtier.errors import UnsupportedError

OLDEST = (0, 31)
MODULE = "kvtier.adapters.vllm"
CONNECTOR = "KVTierConnector"

__all__ = ["check_vllm", "register"]  # and KVTierConnector, where vLLM is installed


def check_vllm(version: str | None) -> None:
    """Refuses a vLLM whose connector interface is another one.

    Args:
        version: vllm.__version__, None if vLLM is not installed.

    Raises:
        UnsupportedError: It is older than 0.31, or not installed.
    """
    oldest = ".".join(map(str, OLDEST))
    if version is None:
        raise UnsupportedError(f"{MODULE} needs vLLM, which is not installed; allowed: {oldest} or later")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    # A build from source may have no number ("dev"): whoever builds one knows how old it is.
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST:
        raise UnsupportedError(
            f"vLLM is {version}; allowed: {oldest} or later, whose connectors have the interface that "
            f"{MODULE} implements"
        )


def register() -> None:
    """Makes the name KVTierConnector known to vLLM. Called by vLLM as a plugin, in every process; idempotent.

    Raises:
        UnsupportedError: vLLM is too old or not installed.
    """
    check_vllm(_vllm_version())
    factory = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.factory").KVConnectorFactory
    if CONNECTOR not in factory._registry:
        factory.register_connector(CONNECTOR, MODULE, CONNECTOR)


def _vllm_version() -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return None
    return str(importlib.import_module("vllm").__version__)


def __getattr__(name: str) -> Any:
    if name != CONNECTOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_vllm(_vllm_version())
    register()  # vLLM looks the class up by its name too: in MultiConnector, for statistics
    return importlib.import_module(f"{MODULE}.connector").KVTierConnector
