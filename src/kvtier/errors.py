"""The exceptions of kvtier: one small tree, each class also the built-in that callers would expect.

What became of a block (stored, missed, failed ...) is a value, never an exception. Raised are misuse,
an object that was closed, a deadline that passed, and what makes a whole call impossible.
"""

import builtins


class KVTierError(Exception):
    """What every exception of kvtier is."""


class ConfigError(KVTierError, ValueError):
    """Something that was passed in is not allowed; the message names it, its value and what is allowed."""


class ResourceError(KVTierError, MemoryError):
    """Memory, descriptors or threads could not be had.

    Attributes:
        code: errno, or 0 where there is none.
    """

    code: int = 0


class StorageError(KVTierError, OSError):
    """A file or a drive failed; `errno` says how."""


class DeviceError(KVTierError, RuntimeError):
    """A call of the device failed.

    Attributes:
        code: The driver's error number (a cudaError_t on CUDA), or 0 where there is none.
    """

    code: int = 0


class CorruptionError(KVTierError):
    """Bytes are not what they claim to be."""


class UnsupportedError(KVTierError, NotImplementedError):
    """This build or this machine cannot do it."""


class ClosedError(KVTierError):
    """The object was closed, or it belongs to the parent of this forked process."""


class TimeoutError(KVTierError, builtins.TimeoutError):  # noqa: A001 - kvtier.TimeoutError, as asyncio's
    """A deadline ended the wait; the operation itself goes on."""


class InternalError(KVTierError):
    """A bug in kvtier."""


_CLASS_OF_CODE: dict[str, type[KVTierError]] = {
    "invalid_argument": ConfigError,
    "resource": ResourceError,
    "io": StorageError,
    "device": DeviceError,
    "corruption": CorruptionError,
    "unsupported": UnsupportedError,
    "closed": ClosedError,
    "timeout": TimeoutError,
    "internal": InternalError,
}


def error_from_status(code: str, native_code: int, message: str) -> KVTierError:
    """Makes the exception for a Status of the core, which calls this.

    Args:
        code: Name of the StatusCode.
        native_code: errno or the driver's number, 0 where there is none.
        message: What happened.

    Returns:
        The exception; it is not raised.
    """
    kind = _CLASS_OF_CODE.get(code, InternalError)
    if kind is StorageError and native_code:
        return StorageError(native_code, message)
    error = kind(message)
    if isinstance(error, (DeviceError, ResourceError)):
        error.code = native_code
    return error
