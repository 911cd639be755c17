"""Fixtures for the tests against the real vLLM. Run by `make test-vllm`, in an environment of its own."""

import os

# Before vLLM is imported. In one process test, scheduler and worker can be looked into.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="2",
)

from pathlib import Path

import models
import pytest


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.gemma3(tmp_path_factory.mktemp("models") / "gemma3")


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.deepseek(tmp_path_factory.mktemp("models") / "deepseek")
