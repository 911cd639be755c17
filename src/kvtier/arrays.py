"""What arrays of other libraries say about their memory: pointer, shape, strides. None of them is imported.

Sources: the NumPy and CUDA array interfaces (version 3), DLPack 1.0 (dlpack.h; on the CPU through
numpy.from_dlpack), and torch's data_ptr(), stride() and element_size(), which know every dtype.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from kvtier.errors import ConfigError, UnsupportedError
from kvtier.layout import KVLayout

_MAX_PAGE = 2**32 - 1


@dataclass(frozen=True)
class GpuMemory:
    """Says that memory is an NVIDIA GPU's.

    Attributes:
        ordinal: Which one's, as CUDA counts; None where the array does not say, and the driver is asked.
    """

    ordinal: int | None = None


@dataclass(frozen=True)
class RawTensor:
    """A tensor by its address, for memory that no array library describes.

    The memory must stay where it is until the pages are detached.

    Attributes:
        ptr: Address of the first item.
        shape: Extent of each axis.
        strides: Bytes from one item to the next, per axis.
        itemsize: Bytes of an item.
        device: The kvtier.testing device that has the memory, or GpuMemory; None for the host's own.
    """

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    device: Any = None


def describe(tensor: Any, name: str, *, device_given: bool = False) -> RawTensor:
    """Finds out where a tensor's bytes are. Copies and writes nothing, and waits for nothing.

    Args:
        tensor: A RawTensor, a (ptr, shape, strides_bytes, itemsize) tuple, a torch tensor, or anything with
            __array_interface__, __cuda_array_interface__ (version 3; CuPy, Numba) or __dlpack__; writable.
        name: What messages call it.
        device_given: The caller names the device that has the memory, so what the array says is not asked.

    Returns:
        Its address, shape, strides in bytes and itemsize. The caller keeps `tensor` alive.

    Raises:
        ConfigError: Not a dense, writable tensor.
        UnsupportedError: Its memory is on a device that kvtier cannot copy from.
    """
    if isinstance(tensor, RawTensor):
        return tensor
    if isinstance(tensor, tuple):
        return _from_tuple(tensor, name)
    if all(hasattr(tensor, a) for a in ("data_ptr", "stride", "element_size", "device")):
        return _from_torch(tensor, name, device_given=device_given)
    if hasattr(tensor, "__cuda_array_interface__"):
        where = None if device_given else GpuMemory(_ordinal(tensor))
        return _from_interface(tensor.__cuda_array_interface__, name, where)
    if hasattr(tensor, "__array_interface__"):
        return _from_interface(tensor.__array_interface__, name)
    if hasattr(tensor, "__dlpack__"):
        return _from_dlpack(tensor, name, device_given=device_given)
    raise ConfigError(
        f"{name} is a {type(tensor).__name__}; allowed: a torch, NumPy or DLPack array, or a (ptr, shape, "
        "strides_bytes, itemsize) tuple"
    )


def _ordinal(tensor: Any) -> int | None:
    """The GPU as CuPy's arrays know it (`device.id`); nothing in the interface itself says."""
    found = getattr(getattr(tensor, "device", None), "id", None)
    return found if isinstance(found, int) else None


def _from_tuple(spec: tuple[Any, ...], name: str) -> RawTensor:
    try:
        ptr, shape, strides, itemsize = spec
        raw = RawTensor(int(ptr), tuple(map(int, shape)), tuple(map(int, strides)), int(itemsize))
    except (TypeError, ValueError):
        raise ConfigError(
            f"{name} is {spec!r}; allowed as a tuple: (ptr, shape, strides_bytes, itemsize)"
        ) from None
    if len(raw.shape) != len(raw.strides):
        raise ConfigError(
            f"{name} has {len(raw.shape)} extents and {len(raw.strides)} strides; allowed: as many"
        )
    if (
        not 0 < raw.ptr < 2**64
        or not 0 < raw.itemsize < 2**31
        or not all(0 <= extent < 2**63 for extent in raw.shape)
        or not all(abs(stride) < 2**63 for stride in raw.strides)
    ):
        raise ConfigError(
            f"{name} is {spec!r}; allowed: a pointer and an itemsize above 0, extents of 0 or more"
        )
    return raw


def _from_torch(tensor: Any, name: str, *, device_given: bool) -> RawTensor:
    kind = getattr(tensor.device, "type", str(tensor.device))
    where = None
    if kind == "cuda":
        where = None if device_given else GpuMemory(tensor.device.index)
    elif kind != "cpu":
        raise UnsupportedError(f"{name} is on device {str(tensor.device)!r}; allowed: 'cpu', 'cuda'")
    if str(getattr(tensor, "layout", "torch.strided")) != "torch.strided":
        raise ConfigError(f"{name} has layout {tensor.layout}; allowed: torch.strided")
    itemsize = int(tensor.element_size())
    strides = tuple(int(stride) * itemsize for stride in tensor.stride())
    return RawTensor(int(tensor.data_ptr()), tuple(map(int, tensor.shape)), strides, itemsize, where)


def _from_interface(interface: dict[str, Any], name: str, where: GpuMemory | None = None) -> RawTensor:
    data = interface.get("data")
    if not isinstance(data, tuple):
        raise ConfigError(f"{name} does not say where its data is")
    ptr, read_only = data
    if read_only:
        raise ConfigError(f"{name} is read-only; allowed: a writable array, for loads write into it")
    shape = tuple(map(int, interface["shape"]))
    itemsize = int(interface["typestr"][2:])
    strides = interface.get("strides")
    if strides is None:  # C-contiguous
        strides = [itemsize] * len(shape)
        for axis in range(len(shape) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * shape[axis + 1]
    return RawTensor(int(ptr), shape, tuple(map(int, strides)), itemsize, where)


class _DLTensor(ctypes.Structure):
    """DLTensor of dlpack.h; a DLManagedTensor begins with one."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _gpu_capsule(tensor: Any) -> tuple[_DLTensor, Any]:
    """What DLPack says of a GPU array, and the capsule that keeps it."""
    # Stream -1: no ordering is asked for; stores and loads name their stream themselves.
    capsule = tensor.__dlpack__(stream=-1)
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype = ctypes.c_void_p
    pointer_of.argtypes = (ctypes.py_object, ctypes.c_char_p)
    return _DLTensor.from_address(pointer_of(capsule, b"dltensor")), capsule


def _from_gpu_dlpack(tensor: Any, name: str, where: GpuMemory | None) -> RawTensor:
    found, _capsule = _gpu_capsule(tensor)
    itemsize = (found.bits * found.lanes + 7) // 8
    shape = tuple(found.shape[i] for i in range(found.ndim))
    interface: dict[str, Any] = {
        "data": ((found.data or 0) + found.byte_offset, False),
        "shape": shape,
        "typestr": f"|V{itemsize}",
        "strides": tuple(found.strides[i] * itemsize for i in range(found.ndim)) if found.strides else None,
    }
    return _from_interface(interface, name, where)


def _from_dlpack(tensor: Any, name: str, *, device_given: bool) -> RawTensor:
    device_type, device_id = map(int, tensor.__dlpack_device__())
    if device_type in (2, 13):  # kDLCUDA, kDLCUDAManaged
        return _from_gpu_dlpack(tensor, name, None if device_given else GpuMemory(device_id))
    if device_type not in (1, 3):  # kDLCPU, kDLCUDAHost
        raise UnsupportedError(
            f"{name} is on a device with DLPack type {device_type}; allowed: 1, the CPU, and 2, CUDA"
        )
    try:
        view = cast("npt.NDArray[Any]", np.from_dlpack(tensor))
    except (BufferError, RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"{name}: NumPy cannot read it through DLPack ({error}); allowed then: a (ptr, shape, "
            "strides_bytes, itemsize) tuple"
        ) from error
    return _from_interface(view.__array_interface__, name)


_DLPACK_FLOATS = {
    (2, 16): "float16",
    (2, 32): "float32",
    (2, 64): "float64",
    (4, 16): "bfloat16",
    (5, 64): "complex64",
    (5, 128): "complex128",
    (10, 8): "float8_e4m3fn",
    (11, 8): "float8_e4m3fnuz",
    (12, 8): "float8_e5m2",
    (13, 8): "float8_e5m2fnuz",
    (14, 8): "float8_e8m0fnu",
}  # by code and bits


def _type_name(tensor: Any) -> str:
    """Name of a tensor's item type, without its library; may be "" where that is no float or not known."""
    if (dtype := getattr(tensor, "dtype", None)) is not None:
        name = getattr(dtype, "name", None)
        return name if isinstance(name, str) else str(dtype).removeprefix("torch.")
    for protocol in ("__cuda_array_interface__", "__array_interface__"):
        if (interface := getattr(tensor, protocol, None)) is not None:
            kind = {"f": "float", "c": "complex"}.get(interface["typestr"][1])
            return f"{kind}{8 * int(interface['typestr'][2:])}" if kind else ""
    if not hasattr(tensor, "__dlpack__"):
        return ""
    if int(tensor.__dlpack_device__()[0]) in (1, 3):
        return str(np.from_dlpack(tensor).dtype.name)
    found, _capsule = _gpu_capsule(tensor)
    return _DLPACK_FLOATS.get((found.code, found.bits), "") if found.lanes == 1 else ""


def _is_float(name: str) -> bool:
    return name.startswith(("float", "bfloat", "complex"))


TensorTuple = tuple[int, list[tuple[str, int, int]]]


def tensor_views(
    tensors: Any, layout: KVLayout, axes: str | None, *, device_given: bool = False
) -> tuple[list[TensorTuple], list[Any], Any]:
    """Reads the tensors of attach().

    Args:
        tensors: One tensor or a sequence of them, each as for describe().
        layout: What a page holds.
        axes: A letter for each dimension; None is "P" and the layout's page_order.
        device_given: As for describe().

    Returns:
        (pointer, axes) of each tensor, the tensors themselves, and where they are: a device of
        kvtier.testing, GpuMemory, or None for the CPU.

    Raises:
        ConfigError: A tensor is not what `layout` and `axes` say, or they are on different devices.
        UnsupportedError: A tensor is on a device that kvtier cannot copy from.
    """
    letters = "P" + layout.page_order if axes is None else axes
    if not isinstance(letters, str):
        raise ConfigError(f"axes is {axes!r}; allowed: one letter per dimension, such as 'PKTHD'")
    if not set(letters) <= set("PLKTHD"):
        raise ConfigError(
            f"axes is {axes!r}; allowed letters: P page, L layer, K part, T token, H head, D dim"
        )
    if isinstance(tensors, RawTensor) or hasattr(tensors, "shape") or not isinstance(tensors, Sequence):
        tensors = [tensors]
    owners = list(tensors)
    views: list[TensorTuple] = []
    devices: list[Any] = []
    for i, tensor in enumerate(owners):
        name = f"tensors[{i}]"
        raw = describe(tensor, name, device_given=device_given)
        if len(raw.shape) != len(letters):
            raise ConfigError(f"{name} has shape {raw.shape}; allowed: {len(letters)} axes, {letters!r}")
        if raw.itemsize != layout.item_bytes:
            raise ConfigError(
                f"{name} has items of {raw.itemsize} bytes; allowed: {layout.item_bytes}, for the layout's "
                f"dtype is {layout.dtype}"
            )
        if _is_float(layout.dtype) and _is_float(kind := _type_name(tensor)) and kind != layout.dtype:
            raise ConfigError(
                f"{name} has items of type {kind}; allowed: {layout.dtype}, the layout's dtype, or integers "
                f"of {raw.itemsize} bytes that stand for it"
            )
        views.append((raw.ptr, list(zip(letters, raw.shape, raw.strides, strict=True))))
        devices.append(raw.device)
    if any(device != devices[0] for device in devices):
        raise ConfigError("tensors are on different devices; allowed: one device for each attach()")
    return views, owners, devices[0] if devices else None


def page_array(page_ids: Any, num_pages: int, wanted: int, what: str) -> npt.NDArray[np.uint32]:
    """Reads page ids.

    Args:
        page_ids: Any integer array or sequence [wanted].
        num_pages: Pages there are; an id is below.
        wanted: How many ids there must be.
        what: Why that many, for the message.

    Returns:
        The ids as contiguous uint32; without a copy when they are that already.

    Raises:
        ConfigError: Not integers, not one axis, not `wanted` many, or an id out of range.
    """
    try:
        ids = np.asarray(page_ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"page_ids cannot be read as an array: {error}") from error
    if ids.ndim != 1:
        raise ConfigError(f"page_ids has shape {ids.shape}; allowed: one axis, [{wanted}]")
    if ids.size != wanted:
        raise ConfigError(f"page_ids has {ids.size} entries; allowed: {wanted}, {what}")
    if ids.size == 0:
        return np.empty(0, np.uint32)
    if ids.dtype.kind not in "iu":
        raise ConfigError(f"page_ids has dtype {ids.dtype}; allowed: integers")
    last = min(num_pages - 1, _MAX_PAGE)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high > last:
        index = int(np.argmin(ids) if low < 0 else np.argmax(ids))
        raise ConfigError(f"page_ids[{index}] is {ids[index]}; allowed: 0 to {last}")
    return np.ascontiguousarray(ids, np.uint32)


def key_array(keys: Any) -> npt.NDArray[np.uint8]:
    """Reads keys; contiguous uint8 [n, 32] is taken as it is, and a sequence of 32 bytes each is joined.

    Raises:
        ConfigError: Not keys.
    """
    if isinstance(keys, np.ndarray):
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != 32:
            raise ConfigError(f"keys has dtype {keys.dtype} and shape {keys.shape}; allowed: uint8 [n, 32]")
        return np.ascontiguousarray(keys)
    if isinstance(keys, Sequence) and not isinstance(keys, (str, bytes, bytearray)):
        rows = [row.tobytes() if isinstance(row, np.ndarray) else row for row in keys]
        for i, row in enumerate(rows):
            if not isinstance(row, bytes) or len(row) != 32:
                raise ConfigError(f"keys[{i}] is {row!r}; allowed: 32 bytes")
        return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32)
    raise ConfigError(f"keys is a {type(keys).__name__}; allowed: a uint8 array [n, 32] as from block_keys()")


def stream_handle(stream: Any) -> int:
    """Reads a framework stream.

    Args:
        stream: None for the framework's default stream, a native handle, or an object that has one as
            `.cuda_stream` (torch), `.ptr` (CuPy) or `__cuda_stream__()` (the CUDA stream protocol).

    Raises:
        ConfigError: None of these.
    """
    if stream is None:
        return 0
    handle = stream
    if hasattr(stream, "cuda_stream"):
        handle = stream.cuda_stream
    elif hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        try:
            handle = (protocol() if callable(protocol) else protocol)[1]
        except (TypeError, IndexError):
            handle = None
    elif hasattr(stream, "ptr"):
        handle = stream.ptr
    if not isinstance(handle, (int, np.integer)) or isinstance(handle, bool) or not 0 <= handle < 2**64:
        raise ConfigError(f"stream is {stream!r}; allowed: None, a native handle, or a torch or CuPy stream")
    return int(handle)
