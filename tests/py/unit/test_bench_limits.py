"""What benchmarks stand on: plain copies and reads, the time left, processes that are killed."""

import errno
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.cli import limits, lives, progress
from kvtier.cli.limits import DriveFile, HostCopy, huge_buffer
from kvtier.cli.progress import Progress
from kvtier.errors import StorageError


def test_buffers_begin_with_a_huge_page_and_can_be_written() -> None:
    buffer = huge_buffer(3 << 20)
    assert buffer.ctypes.data % (2 << 20) == 0
    buffer[:] = 7
    assert (len(buffer), int(buffer.sum())) == (3 << 20, 7 * (3 << 20))


def test_a_plain_copy_copies() -> None:
    copy = HostCopy(1 << 20, threads=2)
    copy._source[:] = np.arange(1 << 20, dtype=np.uint32).view(np.uint8)[: 1 << 20]
    assert copy.rate() > 0
    assert np.array_equal(copy._source, copy._target)


def test_a_plain_read_reads_the_whole_file_and_leaves_none(tmp_path: Path) -> None:
    drive = DriveFile(tmp_path, 5 << 20)
    assert drive.size == 4 << 20  # whole requests
    assert drive.read_rate() > 0
    written = (tmp_path / "limit").read_bytes()
    # One thread may have been so quick as to read both requests.
    assert any(written[: 2 << 20] == buffer.tobytes() for buffer in drive._buffers)
    (tmp_path / "limit").write_bytes(b"short")
    with pytest.raises(OSError, match="of 2097152 bytes"):
        drive.read_rate()
    drive.close()
    assert list(tmp_path.iterdir()) == []


def test_a_plain_write_writes_the_whole_file(tmp_path: Path) -> None:
    drive = DriveFile(tmp_path, 4 << 20)
    for i, buffer in enumerate(drive._buffers):
        buffer[:] = i + 1
    assert drive.write_rate() > 0
    written = (tmp_path / "limit").read_bytes()
    assert len(written) == drive.size
    assert {written[0], written[-1]} <= {1, 2}  # whichever thread had it
    drive.close()


@pytest.mark.parametrize("name", ["pwritev", "preadv"])
def test_what_the_drive_refuses_has_no_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    drive = DriveFile(tmp_path, 8 << 20)
    done = getattr(limits.os, name)

    def full(handle: int, buffers: Any, offset: int) -> int:
        if offset == 4 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(done(handle, buffers, offset))

    monkeypatch.setattr(limits.os, name, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        drive.write_rate() if name == "pwritev" else drive.read_rate()
    assert caught.value.errno == errno.ENOSPC
    drive.close()


def test_lines_tell_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(out, 10) as shown:
        shown.phase("first")
        now[0] += 6
        shown.step(2)
        shown.expect(20)
        now[0] += 6
        shown.step(4)
    assert out.getvalue().splitlines() == [
        "[  0 %] first",
        "[ 20 %] first (about 24 s left)",
        "[ 30 %] first (about 28 s left)",
        "[ 30 %] done",
    ]


LIFE = """
import os, sys
from kvtier.cli.lives import end, say
def main(what, arguments):
    say(phase=what)
    say(step=2)
    say(heard=arguments)
    if what == "dies":
        sys.exit(3)
    end({"pid": os.getpid()})
main(*sys.argv[1:])
"""


class TestLives:
    @pytest.fixture(autouse=True)
    def _module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a_life.py").write_text(LIFE)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def test_it_says_what_it_has_to_say_and_is_killed(self) -> None:
        out, heard = io.StringIO(), []
        shown = Progress(out, 4)
        ended: Any = lives.live("a_life", "saves", {"a": 1}, shown, heard.append)
        assert heard == [{"heard": '{"a": 1}'}]
        assert shown.done == 2
        assert "saves" in out.getvalue()
        assert not Path(f"/proc/{ended['pid']}").exists()

    def test_one_that_ends_by_itself_is_an_error(self) -> None:
        with pytest.raises(StorageError, match="ended by itself, with status 3"):
            lives.live("a_life", "dies", {}, Progress(io.StringIO(), 1))
