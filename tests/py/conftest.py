"""What all Python tests share."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Machines that run the tests differ in speed; pytest-timeout is what ends a test that hangs.
settings.register_profile("kvtier", deadline=None)
settings.load_profile("kvtier")

# What a shell puts into the background ignores Ctrl-C, and so do its children; some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_bench_lock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests measure nothing: they neither wait for a benchmark that runs on this machine nor hold one up."""
    folder = tmp_path_factory.mktemp("lock")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvtier.cli.bench_lock.lock_file", lambda: folder / "kvtier-bench.lock")
        yield
