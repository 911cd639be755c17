"""What tests of kvtier, and of what is built on it, need: a device without a GPU, faults, broken orders.

    device = SimulatedDevice(seed=7)                 # CUDA's semantics under a seeded adversary
    pages = [device.empty((64, 2, 16, 8, 128), np.float16) for _ in range(num_layers)]
    attached = engine.attach(pages)                  # knows by itself that they are on that device
    stream = device.stream()
    device.write(pages[0], values, stream)           # a kernel: it runs when the stream gets there
    engine.store(keys, attached, page_ids, stream=stream)
    assert (device.read(pages[0], stream).result() == values).all()

The memory of a simulated device is touched by kernels only, as on a GPU: write(), read(), copy() and launch()
put them into a stream. Kernels run late, in any order that the streams allow.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from kvtier import _core
from kvtier.arrays import RawTensor, stream_handle
from kvtier.errors import ConfigError
from kvtier.layout import check_extent, dtype_name_and_bytes
from kvtier.reference import ReferenceCache as ReferenceCache  # public here

Array = npt.NDArray[Any]
ManualClock = _core.ManualClock


@dataclass(frozen=True)
class Stream:
    """A framework stream of a simulated device; pass it as `stream` wherever kvtier takes one.

    Attributes:
        ptr: The native handle.
    """

    ptr: int


class TestDevice:
    """A device of the core by its handle; what Engine.attach(device=...) takes.

    Attributes:
        native: The handle.
    """

    __test__ = False  # not a test of pytest's

    def __init__(self, native: _core.Device) -> None:
        self.native = native

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.native.name

    def health(self) -> Exception | None:
        """The sticky error that ended the device, or None."""
        return cast("Exception | None", self.native.health())


class DeviceArray(RawTensor):
    """A tensor in a simulated device's memory. Its bytes are reached by kernels only.

    Attributes:
        dtype: Type of the items in NumPy; uint8, uint16 ... for types that NumPy does not have.
    """

    dtype: np.dtype[Any]

    def __init__(
        self,
        device: "SimulatedDevice",
        ptr: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: Any,
    ) -> None:
        kind = np.dtype(dtype)
        super().__init__(ptr, shape, strides, kind.itemsize, device)
        object.__setattr__(self, "dtype", kind)

    def kernel_view(self) -> Array:
        """A NumPy view of the memory; for use inside a kernel (SimulatedDevice.launch) only."""
        interface = {
            "data": (self.ptr, False),
            "shape": self.shape,
            "strides": self.strides,
            "typestr": self.dtype.str,
            "version": 3,
        }
        return np.asarray(_Exporter(interface))

    def like(self, ptr: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> "DeviceArray":
        """Another view of the same allocation.

        Args:
            ptr: Address of its first item.
            shape: Extents.
            strides: Bytes.
        """
        return DeviceArray(cast("SimulatedDevice", self.device), ptr, shape, strides, self.dtype)

    def __getitem__(self, index: int) -> "DeviceArray":
        """View of one element of the first axis."""
        if not -self.shape[0] <= index < self.shape[0]:
            raise IndexError(index)
        offset = (index % self.shape[0]) * self.strides[0]
        return self.like(self.ptr + offset, self.shape[1:], self.strides[1:])

    def transpose(self, *axes: int) -> "DeviceArray":
        """View with its axes in another order."""
        shape = tuple(self.shape[axis] for axis in axes)
        return self.like(self.ptr, shape, tuple(self.strides[axis] for axis in axes))


class _Exporter:
    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


class ReadBack:
    """What a read() kernel saw. Made by SimulatedDevice.read()."""

    def __init__(self, device: "SimulatedDevice", stream: int, values: Array) -> None:
        self._device = device
        self._stream = stream
        self._values = values

    def result(self) -> Array:
        """Waits for the stream, then gives a copy of the bytes as they were when the kernel ran.

        Raises:
            DeviceError: The device has a sticky error.
        """
        self._device.synchronize(self._stream)
        return self._values


class SimulatedDevice(TestDevice):
    """CUDA's asynchronous semantics without a GPU (csrc/platform/include/kvtier/platform/simulated_device.h).

    Threads: any. Calls release the GIL. The memory is freed with the last array's device.
    """

    def __init__(
        self,
        seed: int = 1,
        *,
        ordinal: int = 0,
        max_delay_us: int = 3000,
        patience_us: int = 100,
        relaxed_capture: bool = False,
    ) -> None:
        """Makes a device.

        Args:
            seed: Of the adversary that chooses the order of what CUDA leaves open.
            ordinal: The device's number.
            max_delay_us: What nobody waits for has run after about this time; 0: only when somebody waits.
            patience_us: How long a wait looks on before it drives the work itself.
            relaxed_capture: Calls are as in a thread of relaxed capture mode.
        """
        check_extent("seed", seed, 0, 2**64 - 1)
        self._simulated = _core.SimulatedDevice(seed, ordinal, max_delay_us, patience_us, relaxed_capture)
        super().__init__(self._simulated)

    # --- memory and streams ---

    def empty(self, shape: tuple[int, ...], dtype: Any, *, row_padding_bytes: int = 0) -> DeviceArray:
        """Allocates a poisoned array.

        Args:
            shape: Extents.
            dtype: NumPy type, or the name of any type that KVLayout takes.
            row_padding_bytes: Unused bytes behind each element of the first axis.

        Returns:
            A C-ordered array, but for the padding.
        """
        try:
            kind = np.dtype(dtype)
        except TypeError:
            kind = np.dtype(f"u{dtype_name_and_bytes(dtype)[1]}")
        strides = [kind.itemsize] * len(shape)
        for axis in range(len(shape) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * shape[axis + 1]
        if shape:
            strides[0] += row_padding_bytes
        size = strides[0] * shape[0] if shape else kind.itemsize
        if size <= 0:
            raise ConfigError(f"shape is {shape}; allowed: extents of at least 1")
        return DeviceArray(self, self._simulated.allocate(size), tuple(shape), tuple(strides), kind)

    def free(self, array: DeviceArray) -> None:
        """Frees the allocation that begins with `array`. Under a running copy that is a violation."""
        self._simulated.free(array.ptr)

    def stream(self) -> Stream:
        """Makes a framework stream. Stream 0 (None) is there from the start."""
        return Stream(self._simulated.create_framework_stream())

    # --- kernels ---

    def launch(self, kernel: Callable[..., object], *arrays: DeviceArray, stream: Any = None) -> None:
        """Puts kernel(*views of arrays) into a stream. It runs later, in any thread, under the device's lock.

        The kernel must be short, call no device and wait for nothing. What it raises goes to
        sys.unraisablehook.
        """
        views = [array.kernel_view() for array in arrays]
        self._simulated.launch(stream_handle(stream), lambda: kernel(*views))

    def write(self, array: DeviceArray, values: Any, stream: Any = None) -> None:
        """Puts a kernel into a stream that writes `values`; they are copied now, as kernel arguments are."""
        kept = np.array(np.broadcast_to(np.asarray(values, array.dtype), array.shape))
        self.launch(lambda view: np.copyto(view, kept), array, stream=stream)

    def read(self, array: DeviceArray, stream: Any = None) -> ReadBack:
        """Puts a kernel into a stream that reads the array when it runs."""
        seen = np.zeros(array.shape, array.dtype)
        self.launch(lambda view: np.copyto(seen, view), array, stream=stream)
        return ReadBack(self, stream_handle(stream), seen)

    def copy(self, target: DeviceArray, source: DeviceArray, stream: Any = None) -> None:
        """Puts a kernel into a stream that copies one array to another."""
        self.launch(lambda to, of: np.copyto(to, of), target, source, stream=stream)

    def synchronize(self, stream: Any = None) -> None:
        """Waits until everything in a stream has run.

        Raises:
            DeviceError: The device has a sticky error.
        """
        self._simulated.host_synchronize(stream_handle(stream))

    # --- the test's side ---

    def begin_capture(self, stream: Any) -> None:
        """The framework begins to capture a stream into a graph."""
        self._simulated.begin_capture(stream_handle(stream))

    def end_capture(self) -> None:
        """Ends the capture; DeviceError 901 if a call in between spoiled it."""
        self._simulated.end_capture()

    def hold(self, stream: Any = None) -> None:
        """Nothing runs (or nothing of one stream) until release(), except by step() and run_until_idle()."""
        self._simulated.hold(_optional(stream))

    def release(self, stream: Any = None) -> None:
        """Ends hold()."""
        self._simulated.release(_optional(stream))

    def step(self, stream: Any = None) -> bool:
        """Runs one step, of one stream if it is named. False if nothing could run."""
        return self._simulated.step(_optional(stream))

    def run_until_idle(self) -> int:
        """Runs until nothing can run; returns the number of steps."""
        return self._simulated.run_until_idle()

    @property
    def pending(self) -> int:
        """Operations submitted and not over."""
        return self._simulated.pending()

    def fail_sticky(self, code: int) -> None:
        """From now on every call fails with device error `code`, and pending work never runs."""
        self._simulated.fail_sticky(code)

    def fail_sticky_at_copy(self, n: int, code: int) -> None:
        """The same in the middle of the n-th copy to begin from now on, n >= 1."""
        self._simulated.fail_sticky_at_copy(check_extent("n", n), code)

    def violations(self) -> list[str]:
        """What was done against CUDA's rules and would have been punished by wrong bytes or a crash."""
        return self._simulated.violations()


def _optional(stream: Any) -> int | None:
    return None if stream is None else stream_handle(stream)


def cpu_device(copy_threads: int | None = None) -> TestDevice:
    """A CPU device of its own, apart from the engine's; None is the default number of threads."""
    threads = 0 if copy_threads is None else check_extent("copy_threads", copy_threads, 1, 64)
    return TestDevice(_core.cpu_device(threads))


# --- faults ---


class FaultPlan:
    """Which calls of faulty devices and memories fail: the n-th of one kind, or of all together.

    Shared by any number of decorators. A call that fails has no half effect.
    """

    def __init__(self) -> None:
        self.native = _core.FaultPlan()

    def fail(
        self,
        n: int,
        *,
        call: str | None = None,
        code: str = "device",
        native_code: int = 0,
        from_then_on: bool = False,
    ) -> None:
        """Plans a fault.

        Args:
            n: The n-th call since reset() fails, n >= 1.
            call: Only calls of this kind count, see fault_calls(); None counts all.
            code: Kind of failure: "device", "resource", "io" ... (StatusCode).
            native_code: errno or the driver's number.
            from_then_on: All later calls fail, too.

        Raises:
            ConfigError: Something is not known or not allowed.
        """
        check_extent("n", n)
        self.native.fail(call, n, code, native_code, from_then_on)

    def reset(self) -> None:
        """Forgets all faults and counts."""
        self.native.reset()

    def seen(self, call: str | None = None) -> int:
        """Calls since reset(), of one kind or all."""
        return self.native.seen(call)

    @property
    def injected(self) -> int:
        """Calls that were made to fail."""
        return self.native.injected()


class HostMemory:
    """The kernel's memory calls as a seam; what Engine(memory=...) takes.

    Attributes:
        native: The handle.
    """

    def __init__(self, native: _core.HostMemory) -> None:
        self.native = native


def host_memory() -> HostMemory:
    """The real one."""
    return HostMemory(_core.host_memory())


def fault_calls() -> list[str]:
    """The kinds of call that can fail."""
    return _core.fault_calls()


def faulty_device(inner: TestDevice, plan: FaultPlan) -> TestDevice:
    """A device that fails where the plan says so and else does what `inner` does."""
    return TestDevice(_core.faulty_device(inner.native, plan.native))


def faulty_memory(plan: FaultPlan, inner: HostMemory | None = None) -> HostMemory:
    """A host memory that fails where the plan says so and else does what `inner` (the real one) does."""
    return HostMemory(_core.faulty_memory((inner or host_memory()).native, plan.native))


# --- drives ---


class SimulatedDrive:
    """A drive that keeps writes in its memory until a sync, for an engine's disk tier: Engine(drive=...).

    csrc/platform/include/kvtier/platform/simulated_drive.h says what its faults do; each is a probability of
    a request.

    Attributes:
        native: The handle.
    """

    def __init__(
        self,
        seed: int,
        *,
        read_error: float = 0,
        write_error: float = 0,
        sync_error: float = 0,
        bit_flip: float = 0,
        misplaced: float = 0,
        lost_write: float = 0,
    ) -> None:
        self.native = _core.SimulatedDrive(
            seed=seed,
            read_error=read_error,
            write_error=write_error,
            sync_error=sync_error,
            bit_flip=bit_flip,
            misplaced=misplaced,
            lost_write=lost_write,
        )

    def power_loss(self) -> None:
        """Ends the drive: of what was not synced, a random part reaches the files. Requests fail then."""
        self.native.power_loss()

    @property
    def unsynced_writes(self) -> int:
        """Writes that a power loss now may lose."""
        return self.native.unsynced_writes()

    @property
    def faults_injected(self) -> int:
        """So far."""
        return self.native.faults_injected()


# --- orders ---


def ordering_points() -> list[str]:
    """The names of every place that waits or orders on the data path (core/ordering.h)."""
    return _core.ordering_points()


@contextmanager
def disable_ordering(name: str) -> Iterator[None]:
    """Disables one ordering point, process-wide, for the `with` block. A test must notice.

    Raises:
        ConfigError: There is no such point.
    """
    with _core.DisableOrdering(name):
        yield
