"""kvtier below vLLM's KV cache: the connector KVTierConnector, for vLLM 0.31 and later. See docs/vllm.md.

vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVTierConnector",
  "kv_connector_module_path": "kvtier.adapters.vllm", "kv_role": "kv_both",
  "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"host": "64GiB"}}'

This module imports neither vLLM nor CUDA; the connector is imported when it is asked for.
"""

import functools
import importlib
import importlib.util
import logging
import re
from typing import Any

from kvtier.errors import UnsupportedError

_log = logging.getLogger(f"vllm.{__name__}")  # below vLLM's logger, so that it is shown

OLDEST = (0, 31)
NEWEST = (0, 33)  # whose interface this was written against; newer ones are tried
MODULE = "kvtier.adapters.vllm"
CONNECTOR = "KVTierConnector"

__all__ = ["check_vllm", "register"]  # and KVTierConnector, where vLLM is installed


def check_vllm(version: str | None) -> None:
    """Refuses a vLLM whose connector interface is another one; warns once of one that is newer than NEWEST.

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
    if _is_newer(version):
        _warn_of(version)


def _is_newer(version: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) > NEWEST


@functools.cache
def _warn_of(version: str) -> None:
    newest = ".".join(map(str, NEWEST))
    _log.warning(
        "vLLM is %s; %s is written for vLLM up to %s, and was not tried with it", version, MODULE, newest
    )


def register() -> None:
    """Makes the name KVTierConnector known to vLLM. Called by vLLM as a plugin, in every process; idempotent.

    Raises:
        UnsupportedError: vLLM is too old or not installed.
    """
    check_vllm(_vllm_version())
    factory = _import("vllm.distributed.kv_transfer.kv_connector.factory").KVConnectorFactory
    if CONNECTOR not in factory._registry:
        factory.register_connector(CONNECTOR, MODULE, CONNECTOR)


def _import(name: str) -> Any:
    """A module of vLLM, or one of ours that builds on it."""
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError, TypeError) as error:
        version = _vllm_version() or ""
        if not _is_newer(version):
            raise
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise UnsupportedError(
            f"vLLM is {version}, and its connector interface is not the one that {MODULE} implements "
            f"({error}); allowed: {oldest} to {newest}, or a newer kvtier"
        ) from error


def _vllm_version() -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return None
    return str(importlib.import_module("vllm").__version__)


def __getattr__(name: str) -> Any:
    if name != CONNECTOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_vllm(_vllm_version())
    register()  # vLLM looks the class up by its name too: in MultiConnector, for statistics
    return _import(f"{MODULE}.connector").KVTierConnector
