"""Joules that the machine used, where it tells: the packages' counters of RAPL, a GPU's of NVML.

RAPL: docs.kernel.org/power/powercap/powercap.html, `energy_uj` of each package, which on most machines root
alone may read; memory and the rest of the machine are not in it. NVML: nvmlDeviceGetTotalEnergyConsumption,
through nvidia-ml-py. A counter steps: RAPL's about every millisecond, NVML's every 20 to 100.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtier.errors import UnsupportedError

POWERCAP = Path("/sys/class/powercap")


class Energy:
    """What has been used since some moment, of all counters together. Never waits, never guesses.

    The device that computes has to be known: a GPU's counter if one is named, else every package's.

    Attributes:
        sources: What is counted, such as "RAPL package-0"; empty: nothing is known.
        missing: Why the others are not.
    """

    def __init__(self, gpu: str | None = None, *, powercap: Path = POWERCAP, nvml: Any = None) -> None:
        """Looks for the counters.

        Args:
            gpu: UUID of the GPU that computes, "GPU-...", None if the CPU does.
            powercap: Where the kernel keeps RAPL's counters.
            nvml: The module of nvidia-ml-py; None: it is imported.
        """
        self._counters: list[_Counter] = []
        self.missing: list[str] = []
        try:
            self._counters += _packages(powercap)
        except UnsupportedError as error:
            self.missing.append(str(error))
        if gpu is not None:
            try:
                self._counters.append(_of_gpu(gpu, nvml))
            except UnsupportedError as error:
                self.missing.append(str(error))
                self._counters.clear()  # the packages' part alone would say nothing about it
        self.sources = [counter.name for counter in self._counters]

    def read(self) -> list[float]:
        """Joules of each source, for `since`. To be called often enough that no counter goes round twice."""
        return [counter.read() for counter in self._counters]

    def since(self, before: list[float]) -> float | None:
        """Joules of all sources since `before`; None if there are none, or one failed or did not step."""
        used = [now - then for now, then in zip(self.read(), before, strict=True)]
        return sum(used) if used and all(joules > 0 for joules in used) else None


class _Counter:
    """A counter that goes up, and begins again at 0 behind `most` joules; once it failed it stays NaN."""

    def __init__(self, name: str, joules: Callable[[], float], most: float) -> None:
        self.name = name
        self._joules, self._most = joules, most
        self._last, self._total = joules(), 0.0

    def read(self) -> float:
        try:
            now = self._joules()
        except UnsupportedError:
            now = math.nan
        step = now - self._last
        self._total += step if step >= 0 else step + self._most
        self._last = now
        return self._total


def _packages(powercap: Path) -> list[_Counter]:
    """All of them; "psys" would count them twice, as "intel-rapl-mmio" would."""
    zones = sorted(powercap.glob("intel-rapl:*")) if powercap.is_dir() else []
    found = []
    for zone in zones:
        if re.fullmatch(r"intel-rapl:\d+", zone.name) is None:
            continue
        name = _text(zone / "name")
        if name.startswith("package"):
            most = _microjoules(zone / "max_energy_range_uj")
            found.append(_Counter(f"RAPL {name}", _reader(zone / "energy_uj"), most))
    if not found:
        raise UnsupportedError("RAPL: the kernel shows no package")
    return found


def _reader(path: Path) -> Callable[[], float]:
    return lambda: _microjoules(path)


def _microjoules(path: Path) -> float:
    text = _text(path)
    if not text.isdecimal():
        raise UnsupportedError(f"RAPL: {path.parent.name}/{path.name} is {text!r}")
    return int(text) / 1e6


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise UnsupportedError(f"RAPL: {path.parent.name}/{path.name}: {error.strerror}") from error


def _of_gpu(uuid: str, nvml: Any) -> _Counter:
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            raise UnsupportedError("NVML: nvidia-ml-py is not installed") from None

    def joules() -> float:
        try:
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(device)) / 1e3
        except nvml.NVMLError as error:
            raise UnsupportedError(f"NVML: {error}") from error

    try:
        nvml.nvmlInit()
        device = nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError as error:
        raise UnsupportedError(f"NVML: {error}") from error
    return _Counter("NVML", joules, math.nan)
