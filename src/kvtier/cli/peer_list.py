"""The peers of `kvtier bench peers`, their best configurations, and their Python environments.

An environment is a venv with exactly what benchmarks/peers/requirements-ENV.txt pins, without dependencies
that the file does not name: so no CUDA libraries come along. It is made where one is missing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtier.cli.peer_side import SideError

_INSTALL_SECONDS = 1200.0
_STEPS = ("lookup",)
_MANAGER_STEPS = ("lookup", "prepare_load", "store_evicting_16", "store_evicting_at_once")


@dataclass(frozen=True)
class Peer:
    """A store beside kvtier.

    Attributes:
        name: In result names.
        about: What it is and how it is configured.
        environment: Of Python; see python_of().
        script: In benchmarks/peers, with its arguments.
        tier: Which of kvtier's tiers does the same: "host" or "disk".
        options: For open() of the script.
        steps: Index work that is timed, with as many small values.
        slots: Of the index that the steps are about; None: as many as keys.
        moves: Which of "put" and "get" is timed; the bytes are always compared.
        survives: Whether it keeps files, which can be looked for after a restart.
        bounded: Whether it takes a capacity on the drive, or promises none; None leaves the cap out.
        program: That has to be installed on the machine.
        holder: Whether another process than its client's holds the values, which can be killed alone.
    """

    name: str
    about: str
    environment: str
    script: tuple[str, ...]
    tier: str = "disk"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[str, ...] = ()
    slots: int | None = None
    moves: tuple[str, ...] = ("put", "get")
    survives: bool = True
    bounded: bool = True
    program: str | None = None
    holder: bool = False


def _lmcache(name: str, about: str, kind: str, **extra: Any) -> Peer:
    options = {"kind": kind, "extra": extra}
    return Peer(f"lmcache-{name}", about, "lmcache", ("lmcache_side.py",), options=options, steps=_STEPS)


KVTIER = Peer("kvtier", "the whole engine", "kvtier", ("kvtier_side.py",), options={"tier": "disk"})

PEERS = (
    Peer(
        "lmcache-cpu",
        "LMCache LocalCPUBackend, copies by torch",
        "lmcache",
        ("lmcache_side.py",),
        tier="host",
        options={"kind": "cpu"},
        steps=_STEPS,
        bounded=False,
    ),
    _lmcache("disk", "LMCache LocalDiskBackend, buffered, 4 threads", "disk"),
    _lmcache("disk-direct", "LMCache LocalDiskBackend, O_DIRECT, 4 threads", "disk", use_odirect=True),
    _lmcache("raw-posix", "LMCache raw block, POSIX", "raw", **{"rust_raw_block.io_engine": "posix"}),
    _lmcache(
        "raw-uring",
        "LMCache raw block, io_uring, O_DIRECT, fixed buffers",
        "raw",
        **{"rust_raw_block.io_engine": "io_uring"},
    ),
    *(
        Peer(
            f"vllm-manager-{policy}",
            f"vLLM CPUOffloadingManager, {policy.upper()}, 100,000 chunks",
            "vllm",
            ("vllm_side.py", "manager"),
            tier="host",
            options={"policy": policy},
            steps=_MANAGER_STEPS,
            slots=100_000,
            moves=(),
            survives=False,
            bounded=False,
        )
        for policy in ("lru", "arc")
    ),
    Peer(
        "vllm-files",
        "vLLM FileSystemTierManager, O_DIRECT, 16+16 threads, copies by torch",
        "vllm",
        ("vllm_side.py", "files"),
        steps=_STEPS,
    ),
    Peer(
        "mooncake",
        "Mooncake store, TCP on loopback, batch_put_from/batch_get_into",
        "mooncake",
        ("mooncake_side.py",),
        tier="host",
        steps=_STEPS,
        bounded=False,
        holder=True,
    ),
    Peer("lmdb", "LMDB, 32 MiB/txn, one sync at the end", "kv", ("kv_side.py", "lmdb"), steps=_STEPS),
    Peer(
        "redis",
        "redis-server without persistence, Unix socket, hiredis",
        "kv",
        ("kv_side.py", "redis"),
        tier="host",
        steps=_STEPS,
        bounded=False,
        program="redis-server",
    ),
    Peer(
        "redis-aof",
        "redis-server with AOF everysec, Unix socket, hiredis",
        "kv",
        ("kv_side.py", "redis"),
        options={"append_only": True},
        moves=("put",),  # it reads from memory: `redis` has that
        bounded=False,
        program="redis-server",
    ),
)


def python_of(peer: Peer, root: Path, cache: Path) -> str:
    """The Python of a peer's environment, which is made if it is missing (waits, up to minutes).

    Args:
        peer: Whose.
        root: Of the checkout.
        cache: Folder of the environments.

    Raises:
        SideError: It cannot be had here; the message says why.
    """
    if peer.program is not None and shutil.which(peer.program) is None:
        raise SideError(f"{peer.program} is not installed")
    if peer.environment == "kvtier":
        return sys.executable
    if peer.environment == "vllm":
        python = root / ".venv-vllm" / "bin" / "python"
        if not python.exists():
            raise SideError("there is no .venv-vllm (make vllm-env)")
        return str(python)
    folder = environment_folder(peer.environment, root, cache)
    if not (folder / ".ready").exists():
        _make(folder, requirements_of(peer.environment, root))
    return str(folder / "bin" / "python")


def requirements_of(environment: str, root: Path) -> Path:
    """The file that pins what is in an environment."""
    return root / "benchmarks" / "peers" / f"requirements-{environment}.txt"


def environment_folder(environment: str, root: Path, cache: Path) -> Path:
    """Where an environment is, or will be: another one for every change of its requirements."""
    digest = hashlib.sha256(requirements_of(environment, root).read_bytes()).hexdigest()[:10]
    return cache / f"{environment}-py{sys.version_info.major}{sys.version_info.minor}-{digest}"


def default_cache() -> Path:
    """Where environments are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvtier" / "peers"


def _make(folder: Path, requirements: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    folder.parent.mkdir(parents=True, exist_ok=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), *install, str(requirements)],
    ):
        try:
            done = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, check=False, timeout=_INSTALL_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SideError(f"its environment cannot be made: {type(error).__name__}") from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip failed"]
            raise SideError(f"does not install: {lines[-1].strip()[:200]}")
    (folder / ".ready").touch()
