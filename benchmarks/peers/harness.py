"""What every side of `kvtier bench peers` has in common, kvtier's own included.

A side is a process in its own environment. It reads one JSON object a line on standard input and answers
with one on standard output: {"op": "put", "number": 3} -> {"seconds": 0.21}, or {"error": "..."}. It holds
the pages (a source and a target, in huge pages, written before anything is timed), stamps and compares the
bytes, takes files out of the page cache and does all timing; the store under test is a class with the methods
of Store.
Needs Python >= 3.10 and NumPy, nothing else: it runs in the peers' environments.
"""

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import mmap
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

HUGE_PAGE = 2 << 20
STAMP_EVERY = 4096
FILL_SECONDS = 105.0  # less than an answer may take


class Store:
    """A store under test. `self.pages` (class Pages) is there before open()."""

    pages: "Pages"
    packages: tuple[str, ...] = ()  # whose versions are reported, where they are installed

    def versions(self) -> dict[str, str]:
        """Of what is under test. Not timed."""
        found = {}
        for name in self.packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return found

    def prepare(self, home: Path, size: int, blocks: int, capacity: int, options: dict) -> None:
        """What is not timed as an opening: imports, and memory outside of the store."""

    def open(self, home: Path, size: int, blocks: int, capacity: int, options: dict) -> dict:
        """Opens what lies in `home`, bounded by `capacity` bytes; returns what to report about it."""
        raise NotImplementedError

    def put(self, keys: list[bytes]) -> None:
        """Source pages -> store, value i under keys[i]; returns when the store calls them stored."""
        raise NotImplementedError

    def get(self, keys: list[bytes]) -> list[bool]:
        """Store -> target pages; says which were found."""
        raise NotImplementedError

    def found(self, keys: list[bytes]) -> int:
        """How many the store says it has."""
        raise NotImplementedError

    def forget(self, keys: list[bytes]) -> None:
        """Removes them: not timed, so that every round begins with the same room."""
        raise NotImplementedError

    def cold(self) -> None:
        """Lets go of copies in this process' memory; caches of the kernel are dropped by the harness."""

    def close(self) -> None:
        """Closes in good order."""

    def lose_holder(self) -> None:
        """Kills the other process that holds the values, if there is one."""
        raise NotImplementedError

    def steps_open(self, count: int, options: dict) -> None:
        """Fills a store with `count` small values, for steps()."""
        raise NotImplementedError

    def steps(self, number: int) -> dict[str, float]:
        """One round of index work: name of the step -> seconds. Raises where an answer was wrong."""
        raise NotImplementedError


class Pages:
    """The framework's pages: `source` and `target`, uint8 [blocks, size], in one range of huge pages."""

    def __init__(self, blocks: int, size: int, seed: int) -> None:
        self.blocks, self.size = blocks, size
        self.both = huge_buffer(2 * blocks * size).reshape(2 * blocks, size)
        self.source, self.target = self.both[:blocks], self.both[blocks:]
        words = self.source.view(np.uint64)
        words[:] = np.random.default_rng(seed).integers(0, 1 << 63, words.shape, np.uint64)
        self.target[:] = 0

    def stamp(self, number: int) -> None:
        """Makes the source another round's: the first 8 bytes of every 4 KiB name round, block and place."""
        words = self.source.view(np.uint64).reshape(self.blocks, -1, STAMP_EVERY // 8)
        block = np.arange(self.blocks, dtype=np.uint64)[:, None] << np.uint64(24)
        words[:, :, 0] = np.uint64(number << 44) + block + np.arange(words.shape[1], dtype=np.uint64)

    def compare(self, found: list[bool]) -> dict:
        """Counts of the target's blocks: found, right, wrong (said to be found, and other bytes)."""
        right = [ok and bool(np.array_equal(self.source[i], self.target[i])) for i, ok in enumerate(found)]
        return {"found": sum(found), "right": sum(right), "wrong": sum(found) - sum(right)}


def huge_buffer(size: int) -> np.ndarray:
    """Written uint8 memory in transparent huge pages, beginning with one."""
    # Private: the kernel gives shared anonymous memory none by this advice (shmem_enabled "never").
    room = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(room, np.uint8)
    begin = -memory.ctypes.data % HUGE_PAGE
    memory = memory[begin : begin + size]
    memory[:] = 1
    return memory


def collapse(address: int, size: int) -> bool:
    """Puts memory that a peer allocated into huge pages, as all others' is; False where the kernel cannot."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    begin = -(-address // HUGE_PAGE) * HUGE_PAGE
    length = (address + size - begin) // HUGE_PAGE * HUGE_PAGE
    advise = lambda what: libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), what)  # noqa: E731
    return advise(14) == 0 and advise(25) == 0  # MADV_HUGEPAGE, MADV_COLLAPSE


class Memory:
    """What this process' memory grew by since, and how much of that is in huge pages, by /proc/PID/smaps.

    So buffers count, and what the interpreter had loaded before does not; nor do files on a drive.
    """

    def __init__(self) -> None:
        self._before = memory_kib(Path("/proc/self/smaps"))

    def grown(self) -> dict:
        """MiB and the share in huge pages; "started": the same of all of what this process started."""
        now, started = memory_kib(Path("/proc/self/smaps")), (0, 0)
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended, or is another user's
                if int(process.name) != os.getpid() and os.getpgid(int(process.name)) == os.getpid():
                    some = memory_kib(process / "smaps")
                    started = (started[0] + some[0], started[1] + some[1])
        own = (now[0] - self._before[0], now[1] - self._before[1])
        return _share(*own) | ({"started": _share(*started)} if started[0] else {})


def _share(kib: int, huge: int) -> dict:
    return {"mib": kib >> 10, "in_huge_pages": round(huge / kib, 3) if kib > 0 else 0.0}


def memory_kib(smaps: Path) -> tuple[int, int]:
    """KiB in memory, and how many of these are in huge pages."""
    total = huge = 0
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read_text())[1:]:
        first, *lines = mapping.splitlines()
        path = first.split(maxsplit=5)[5] if len(first.split(maxsplit=5)) == 6 else ""
        if path.startswith("/") and not path.startswith(("/dev/shm/", "/dev/zero", "/memfd:")):
            continue
        kib = {
            name: int(rest.split()[0])
            for name, _, rest in (line.partition(":") for line in lines)
            if rest.endswith(" kB")
        }
        reserved = kib.get("Private_Hugetlb", 0) + kib.get("Shared_Hugetlb", 0)  # not in Rss
        total += kib.get("Rss", 0) + reserved
        huge += kib.get("AnonHugePages", 0) + kib.get("ShmemPmdMapped", 0) + reserved
    return total, huge


def keys_of(number: int, count: int) -> list[bytes]:
    """The keys of a round, 32 bytes each."""
    return [hashlib.sha256(f"{number}/{i}".encode()).digest() for i in range(count)]


def batches(keys: list, each: int):
    """Parts of `each` keys, for filling a store. Raises TimeoutError when it takes too long to wait for."""
    until = time.monotonic() + FILL_SECONDS
    for begin in range(0, len(keys), each):
        if time.monotonic() > until:
            raise TimeoutError(f"{begin} of {len(keys)} keys were in after {FILL_SECONDS:.0f} s")
        yield keys[begin : begin + each]


def drop_caches(home: Path) -> str:
    """Takes the files out of the page cache, as far as this user may; returns how."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in home.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "posix_fadvise"
    return "drop_caches"


def sync_files(home: Path) -> None:
    """syncfs() of the file system that `home` is on."""
    import ctypes

    fd = os.open(home, os.O_RDONLY)
    try:
        if ctypes.CDLL(None).syncfs(fd) != 0:
            raise OSError(f"syncfs of {home} failed")
    finally:
        os.close(fd)


def usage(home: Path) -> int:
    """Bytes that everything below `home` takes on the drive (st_blocks)."""
    total = 0
    for folder, _, names in os.walk(home):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                total += os.lstat(Path(folder) / name).st_blocks * 512
    return total


def flip_bit(home: Path, needle: bytes) -> int:
    """Flips a bit behind `needle` in every file below `home` that has it; returns how many places."""
    flipped = 0
    for path in (p for p in home.rglob("*") if p.is_file() and p.stat().st_size):
        fd = os.open(path, os.O_RDWR)
        try:
            with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as view:
                place = view.find(needle)
            if place < 0:
                continue
            place += len(needle) // 2
            os.pwrite(fd, bytes([os.pread(fd, 1, place)[0] ^ 1]), place)
            os.fsync(fd)
            flipped += 1
        finally:
            os.close(fd)
    return flipped


class Server:
    """Answers the requests of `kvtier bench peers`."""

    def __init__(self, make) -> None:
        self.make = make
        self.store = make()
        self.is_open = False
        self.home = Path()
        self.on_disk = False
        self.stamped = -1
        self.memory = Memory()

    def op_open(self, home, size, blocks, capacity, seed, on_disk, options) -> dict:
        self._another()
        self.home, self.on_disk = Path(home), on_disk
        self.store.pages = Pages(blocks, size, seed)
        self.store.prepare(self.home, size, blocks, capacity, options)
        begin = time.perf_counter()
        about = self.store.open(self.home, size, blocks, capacity, options)
        took = time.perf_counter() - begin
        return {"seconds": took, "about": about or {}, "versions": self.store.versions()}

    def _another(self) -> None:
        """A process serves one store after the other: starting some takes long."""
        if self.is_open:
            self.store.close()
        self.store = self.make()
        gc.collect()
        self.stamped, self.is_open = -1, True

    def keys(self, number: int) -> list[bytes]:
        if number != self.stamped:
            self.store.pages.stamp(number)
            self.stamped = number
        return keys_of(number, self.store.pages.blocks)

    def op_put(self, number) -> dict:
        keys = self.keys(number)
        begin = time.perf_counter()
        self.store.put(keys)
        if self.on_disk:
            sync_files(self.home)
        return {"seconds": time.perf_counter() - begin}

    def op_get(self, number, cold) -> dict:
        keys = self.keys(number)
        self.store.pages.target[:] = 0
        if cold:
            self.store.cold()
            drop_caches(self.home)
        begin = time.perf_counter()
        found = self.store.get(keys)
        took = time.perf_counter() - begin
        return {"seconds": took, **self.store.pages.compare(found)}

    def op_found(self, number) -> dict:
        keys = self.keys(number)  # stamps the pages and hashes: the harness' own work
        begin = time.perf_counter()
        found = self.store.found(keys)
        return {"found": found, "seconds": time.perf_counter() - begin}

    def op_memory(self) -> dict:
        return self.memory.grown()

    def op_forget(self, number) -> dict:
        self.store.forget(self.keys(number))
        return {}

    def op_flip(self, number, block) -> dict:
        self.keys(number)
        size = self.store.pages.size
        middle = size // 2 // STAMP_EVERY * STAMP_EVERY
        needle = self.store.pages.source[block, middle : middle + 256].tobytes()
        self.store.cold()
        drop_caches(self.home)
        return {"flipped": flip_bit(self.home, needle)}

    def op_lose_holder(self) -> dict:
        self.store.lose_holder()
        return {}

    def op_usage(self) -> dict:
        return {"bytes": usage(self.home)}

    def op_steps_open(self, home, count, options) -> dict:
        self._another()
        self.home = Path(home)
        self.store.home = self.home
        self.store.steps_open(count, options)
        return {"versions": self.store.versions()}

    def op_steps(self, number) -> dict:
        gc.collect()
        return {"steps": self.store.steps(number)}

    def op_close(self) -> dict:
        self.store.close()
        self.is_open = False
        self.store = self.make()
        gc.collect()
        return {}


def serve(make) -> None:
    """Runs a side until its standard input ends. Whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server(make)
    gc.disable()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, "op_" + request.pop("op"))(**request)
        except Exception as error:  # noqa: BLE001 - whatever a library raises is the answer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # servers that the side started end with it
