"""Master keys of the disk tier's encryption: read once, never logged, never part of a message."""

import os
from pathlib import Path

from kvtier.errors import ConfigError

_KEY_BYTES = 32


def read_keys(places: str | None) -> list[bytes]:
    """Reads the keys that Config.disk_key names.

    Args:
        places: Paths of files or "env:NAME", separated by commas; None for none. Each holds 64 hexadecimal
            digits.

    Returns:
        Keys of 32 bytes; the first encrypts.

    Raises:
        ConfigError: A place cannot be read or holds something else; the message does not show what.
    """
    if places is None:
        return []
    return [_read_key(place.strip()) for place in places.split(",")]


def _read_key(place: str) -> bytes:
    if place.startswith("env:"):
        text = os.environ.get(place.removeprefix("env:"))
        if text is None:
            raise ConfigError(f"disk_key names {place!r}, which is not set")
    else:
        try:
            text = Path(place).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise ConfigError(f"disk_key names {place!r}, which cannot be read: {reason}") from None
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"disk_key names {place!r}, which does not hold 64 hexadecimal digits")
    return key
