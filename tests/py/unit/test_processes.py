"""SIGTERM unwinds a command, and what a command has started ends with it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.cli.processes import Terminated, bound, unwound_by_sigterm

STARTS = """
import signal, subprocess, sys, time
from kvtier.cli.processes import bound
command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
child = subprocess.Popen(
    bound(command, signal.SIGTERM), stdout=subprocess.PIPE, text=True, start_new_session=True
)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def _as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("_as_before")
def test_sigterm_unwinds_and_only_the_first() -> None:
    unwound = []

    def work() -> None:
        with unwound_by_sigterm():
            try:
                terminate()
            finally:
                terminate()
                unwound.append("whole")

    with pytest.raises(Terminated):
        work()
    terminate()  # while the interpreter ends, with the status that was meant
    assert unwound == ["whole"]


@pytest.mark.usefixtures("_as_before")
def test_who_ignores_sigterm_goes_on_ignoring_it() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with unwound_by_sigterm():
        terminate()


def test_nothing_is_left_of_it() -> None:
    with unwound_by_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_was_started_ends_with_the_one_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTS], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert runs(child)
        parent.kill()
    until = time.monotonic() + 30
    while runs(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not runs(child)


def test_the_command_is_the_process_and_its_status_is_its_own() -> None:
    code = "import os, sys; print(os.getpid(), sys.argv[1:]); sys.exit(7)"
    with subprocess.Popen(
        bound([sys.executable, "-c", code, "a", "--b c"], signal.SIGKILL), stdout=subprocess.PIPE, text=True
    ) as child:
        said, _ = child.communicate(timeout=60)
    assert (said, child.returncode) == (f"{child.pid} ['a', '--b c']\n", 7)
