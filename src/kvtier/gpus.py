"""The CUDA devices: what there is, and the ones that an engine or a worker has opened."""

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier import _core
from kvtier.arrays import GpuMemory, TensorTuple
from kvtier.config import Config
from kvtier.errors import ConfigError, UnsupportedError

_NVIDIA = "0x10de"
_DISPLAY_CONTROLLER = "0x03"  # the PCI class, whatever follows


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU of this machine.

    Attributes:
        ordinal: As CUDA counts, CUDA_VISIBLE_DEVICES applied.
        name: The vendor's.
        compute_capability: 90 is sm_90.
        num_sms: Multiprocessors.
        memory_bytes: HBM.
        pci_bus: As in /sys/bus/pci/devices.
        link: Of PCIe, speed and width; "unknown" where the kernel does not tell.
        numa_node: That it hangs on, None where the kernel does not tell.
    """

    ordinal: int
    name: str
    compute_capability: int
    num_sms: int
    memory_bytes: int
    pci_bus: str
    link: str
    numa_node: int | None


@dataclass(frozen=True)
class CudaFacts:
    """What the CUDA driver says. Versions are 1000 * major + 10 * minor."""

    driver_version: int
    runtime_version: int
    gpus: tuple[Gpu, ...]


def cuda_facts() -> CudaFacts:
    """Asks the driver; makes no context on any GPU.

    Raises:
        UnsupportedError: No GPU, no driver or too old a one, or a build without CUDA; it says which.
    """
    found = _core.cuda_facts()
    gpus = tuple(Gpu(**gpu) for gpu in found["gpus"])
    return CudaFacts(found["driver_version"], found["runtime_version"], gpus)


def numa_node_of_gpus(devices: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """The NUMA node that all NVIDIA GPUs of this machine hang on; None where they differ or it is not known.

    Asks the kernel, not CUDA: a process that has asked CUDA cannot fork workers that use it.
    """
    nodes = set()
    for device in devices.glob("*"):
        with contextlib.suppress(OSError, ValueError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == _NVIDIA and kind.startswith(_DISPLAY_CONTROLLER):
                nodes.add(int((device / "numa_node").read_text()))
    node = nodes.pop() if len(nodes) == 1 else -1
    return node if node >= 0 else None  # -1: the kernel does not know either


def numa_node_of(config: Config) -> int | None:
    """Where the config wants the host tier's memory; None: anywhere."""
    if isinstance(config.host_numa_node, int):
        return config.host_numa_node
    return numa_node_of_gpus() if config.host_numa_node == "auto" else None


def copy_paths() -> list[str]:
    """The names of the ways in which a GPU can copy; not every machine has each."""
    return _core.copy_paths()


def device_bench(
    ordinal: int,
    *,
    max_sms: int,
    store_limit: int | float | None = None,
    load_limit: int | float | None = None,
) -> _core.CudaBench:
    """Opens one GPU for measurements, calibrated afresh, limits as parse_rate(). Waits for the calibration.

    Raises:
        UnsupportedError: As cuda_facts().
    """
    return _core.CudaBench(
        ordinal=ordinal,
        path=None,
        max_sms=max_sms,
        store_limit=store_limit,
        load_limit=load_limit,
        calibration="fresh",
    )


class OpenGpus:
    """The CUDA devices of one engine or worker, opened when their memory is first attached. Threads: any."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._open: dict[int, _core.Device] = {}

    def of(self, memory: GpuMemory, views: list[TensorTuple]) -> _core.Device:
        """Returns the device that has the memory of all `views`.

        Raises:
            ConfigError: They are on several GPUs, or no GPU knows them.
            UnsupportedError: As cuda_facts().
        """
        try:
            return self._of(memory.ordinal, views)
        except UnsupportedError as error:
            raise UnsupportedError(f"tensors are in GPU memory, but {error}") from None

    def _of(self, ordinal: int | None, views: list[TensorTuple]) -> _core.Device:
        if ordinal is None:
            ordinals = {_core.cuda_ordinal_of(pointer) for pointer, _ in views}
            if len(ordinals) != 1:
                raise ConfigError(
                    f"tensors are on GPUs {sorted(ordinals)}; allowed: one device for each attach()"
                )
            ordinal = ordinals.pop()
        with self._lock:
            if ordinal not in self._open:
                self._open[ordinal] = self._make(ordinal)
            return self._open[ordinal]

    def _make(self, ordinal: int) -> _core.Device:
        config = self._config
        path = None if config.gpu_copy_path == "auto" else config.gpu_copy_path
        return _core.cuda_device(
            ordinal=ordinal,
            path=path,
            max_sms=config.gpu_copy_sms,
            store_limit=config.gpu_store_limit,
            load_limit=config.gpu_load_limit,
            calibration="cached",
        )


def located(where: Any, views: list[TensorTuple], gpus: OpenGpus) -> Any:
    """Returns the device that `where` of tensor_views() stands for: a GPU's, or `where` itself."""
    return gpus.of(where, views) if isinstance(where, GpuMemory) else where
