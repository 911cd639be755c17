"""GPU tests: skipped, with the reason, where there is no GPU; failed where REQUIRE_GPU says there is one."""

import os
from pathlib import Path

import pytest

from kvtier.errors import UnsupportedError
from kvtier.gpus import cuda_facts

HERE = Path(__file__).parent


def _missing() -> str | None:
    try:
        cuda_facts()
    except UnsupportedError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    missing = _missing() if ours else None
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if missing is not None and "REQUIRE_GPU" not in os.environ:
            item.add_marker(pytest.mark.skip(reason=missing))
