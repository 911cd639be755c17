"""What a figure was measured on."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import kvtier


def facts() -> dict[str, Any]:
    """The machine and the versions, as JSON types. Unknown ones are left out."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "l3_bytes": l3_bytes(),
        "memory_bytes": _meminfo().get("MemTotal", 0),
        "memory_available_bytes": available_bytes(),
        "kernel": platform.release(),
        "transparent_hugepages": _selected("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **({"gpus": found} if (found := gpus()) else {}),
        "versions": {
            name: found_version
            for name in ("kvtier", "numpy", "torch", "transformers")
            if (found_version := _version(name))
        },
    }


def describe(found: dict[str, Any]) -> str:
    """The same for people: a line, and one for each kind of GPU."""
    gib = found["memory_bytes"] / 2**30
    versions = " ".join(f"{name} {number}" for name, number in found["versions"].items())
    line = (
        f"{found['cpu']}, {found['cores']} cores, L3 {found['l3_bytes'] >> 20} MiB, {gib:.0f} GiB; "
        f"Linux {found['kernel']}; Python {found['python']}, {versions}; commit {commit()}"
    )
    kinds = [
        f"{gpu['name']}, {gpu['memory.total']}, driver {gpu['driver_version']}"
        for gpu in found.get("gpus", [])
    ]
    return "\n".join([line, *(f"GPU: {kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))])


def describe_drive(found: dict[str, Any]) -> str:
    """What `drive` found, in one line for people."""
    facts = [found[key] for key in ("file_system", "name", "model") if key in found]
    if "bytes" in found:
        facts.append(f"{found['bytes'] / 1e9:.0f} GB")
    if "rotational" in found:
        facts.append("rotational" if found["rotational"] else "not rotational")
    if "scheduler" in found:
        facts.append(f"scheduler {found['scheduler']}")
    if "mount_options" in found:
        facts.append(f"mounted {found['mount_options']}")
    return f"drive: {', '.join(facts)}"


def version(name: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def file_system(path: Path) -> str:
    """The type of file system that a path is on, and its device; "unknown" where /proc does not tell."""
    mount = _mount(path)
    return "unknown" if mount is None else f"{mount[0]} on {mount[1]}"


def drive(path: Path) -> dict[str, Any]:
    """The drive that a path is on, as JSON types. Unknown facts are left out.

    Keys: file_system, mount_options, and of the block device below it (the whole drive, not the partition)
    model, bytes, rotational, scheduler, request_kib (the kernel's largest request).
    """
    found: dict[str, Any] = {"file_system": file_system(path)}
    mount = _mount(path)
    if mount is None:
        return found
    found["mount_options"] = mount[2]
    device = Path("/sys/dev/block") / mount[3]
    if not device.exists():
        return found
    device = device.resolve()
    if (device / "partition").exists():
        device = device.parent
    queue = device / "queue"
    sectors, rotational = _read(str(device / "size")).strip(), _read(str(queue / "rotational")).strip()
    facts: dict[str, Any] = {
        "name": device.name,
        "model": " ".join(_read(str(device / "device" / "model")).split()),
        "bytes": 512 * int(sectors) if sectors.isdigit() else None,
        "rotational": rotational == "1" if rotational else None,
        "scheduler": _selected(str(queue / "scheduler")),
        "request_kib": int(text)
        if (text := _read(str(queue / "max_sectors_kb")).strip()).isdigit()
        else None,
    }
    return found | {key: value for key, value in facts.items() if value not in ("", None)}


def gpus() -> list[dict[str, Any]]:
    """The GPUs with memory, driver, power limit and link, as nvidia-smi says; empty where it does not."""
    query = "name,memory.total,driver_version,power.limit,pcie.link.gen.current,pcie.link.width.current"
    try:
        done = subprocess.run(  # noqa: S603
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    keys = query.split(",")
    return [
        dict(zip(keys, (word.strip() for word in line.split(",")), strict=False))
        for line in done.stdout.splitlines()
    ]


def slug(found: dict[str, Any]) -> str:
    """A short name of the machine for file names: "epyc-2core"."""
    words = re.findall(r"[a-z0-9]+", found["cpu"].lower())
    families = ("epyc", "xeon", "ryzen", "threadripper", "core", "graviton", "neoverse", "altra", "grace")
    family = next((word for word in words if word in families), words[0] if words else "cpu")
    return f"{family}-{found['cores']}core"


def _mount(path: Path) -> tuple[str, str, str, str] | None:
    """Type, source, options and device number of the mount that a path is on."""
    best, found = -1, None
    for line in _read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split()
        point = Path(words[4])
        if path.resolve().is_relative_to(point) and len(point.parts) >= best:
            best, found = len(point.parts), (kind[0], kind[1], words[5], words[2])
    return found


@functools.cache
def commit() -> str:
    """The commit of the checkout that runs, "unknown" outside of one.

    With "+" if it has changes, other than in benchmarks/results: those are what it just measured.
    """
    root = checkout()
    if root is None:
        return "unknown"
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(  # noqa: S603
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        changes = subprocess.run(  # noqa: S603
            [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def checkout() -> Path | None:
    """The root of the source tree that the package runs from, if it does."""
    root = Path(kvtier.__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "kvtier").is_dir() else None


def cpu_model() -> str:
    """As /proc/cpuinfo names it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def l3_bytes() -> int:
    """Of the first CPU's largest cache; 0 if unknown."""
    sizes = [_read(str(p)).strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    kib = [int(size[:-1]) for size in sizes if re.fullmatch(r"\d+K", size)]
    return max(kib, default=0) << 10


def available_bytes() -> int:
    """Memory that this process can still have: what the kernel and the cgroup leave."""
    free = _meminfo().get("MemAvailable", 0)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        free = min(free, max(0, int(limit) - int(used)))
    return free


def _meminfo() -> dict[str, int]:
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    return {name: int(kib) << 10 for name, kib in lines}


def _selected(path: str) -> str:
    found = re.search(r"\[(\w+)\]", _read(path))
    return found[1] if found else ""


def _version(name: str) -> str | None:
    if name in ("torch", "transformers") and name not in sys.modules:
        return None  # not part of what was measured
    return version(name)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
