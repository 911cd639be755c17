"""The exception tree: each class is also the built-in that callers would expect."""

import builtins
import errno

import pytest

import kvtier
from kvtier.errors import error_from_status


@pytest.mark.parametrize(
    ("code", "kind", "builtin"),
    [
        ("invalid_argument", kvtier.ConfigError, ValueError),
        ("resource", kvtier.ResourceError, MemoryError),
        ("io", kvtier.StorageError, OSError),
        ("device", kvtier.DeviceError, RuntimeError),
        ("corruption", kvtier.CorruptionError, Exception),
        ("unsupported", kvtier.UnsupportedError, NotImplementedError),
        ("closed", kvtier.ClosedError, Exception),
        ("timeout", kvtier.TimeoutError, builtins.TimeoutError),
        ("internal", kvtier.InternalError, Exception),
        ("a code of the future", kvtier.InternalError, Exception),
    ],
)
def test_every_status_code_has_its_class(
    code: str, kind: type[kvtier.KVTierError], builtin: type[Exception]
) -> None:
    error = error_from_status(code, 0, "what happened")
    assert type(error) is kind
    assert isinstance(error, builtin)
    assert isinstance(error, kvtier.KVTierError)
    assert "what happened" in str(error)


def test_numbers_of_the_system_and_the_driver_are_kept() -> None:
    storage = error_from_status("io", errno.EIO, "read failed")
    assert isinstance(storage, kvtier.StorageError)
    assert storage.errno == errno.EIO
    device = error_from_status("device", 700, "illegal address")
    assert isinstance(device, kvtier.DeviceError)
    assert device.code == 700
    resource = error_from_status("resource", errno.ENOMEM, "no memory")
    assert isinstance(resource, kvtier.ResourceError)
    assert resource.code == errno.ENOMEM
