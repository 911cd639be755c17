"""BlockDrops: drops blocks in the background; those whose load has failed are hidden until they are gone."""

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator

import numpy as np

from kvtier.engine import Engine
from kvtier.errors import KVTierError
from kvtier.keys import KEY_BYTES, Keys

_log = logging.getLogger(__name__)

_MOST_WAITING = 1 << 18  # blocks; 30 MiB of names


class BlockDrops:
    """Drops blocks, for which nobody waits: a drive may take a minute to confirm it, or never will.

    Threads: one caller's; and one of its own, until close().
    """

    def __init__(self, engine: Engine) -> None:
        """Has nothing to do yet; the engine is the caller's."""
        self._engine = engine
        self._changed = threading.Condition()
        self._waiting: set[bytes] = set()
        self._running: set[bytes] = set()  # given to the engine, which has not answered
        self._namespaces: list[str] = []
        self._busy = False
        self._closed = False
        self._said = False
        self._thread = threading.Thread(target=self._run, name="kvtier-drops", daemon=True)
        self._thread.start()

    def add(self, keys: Keys) -> None:
        """Hides blocks at once and drops them soon, [n, 32]. Never waits, never raises.

        What would be more than 262144 blocks at a time is left as it is: whoever loads it fails once.
        """
        with self._changed:
            if self._closed or len(self._waiting) + len(keys) > _MOST_WAITING:
                return
            self._waiting.update(_names(keys))
            self._changed.notify_all()

    def add_namespaces(self, namespaces: Iterable[str]) -> None:
        """Drops what is in namespaces when their turn has come, and hides nothing. Never waits."""
        with self._changed:
            self._namespaces = list(dict.fromkeys([*self._namespaces, *namespaces]))
            self._changed.notify_all()

    def before_hidden(self, keys: Keys) -> int:
        """How many blocks at the beginning of `keys` [n, 32] are not being dropped. Never waits."""
        with self._changed:
            if self._waiting or self._running:
                for i, name in enumerate(_names(keys)):
                    if name in self._waiting or name in self._running:
                        return i
        return len(keys)

    def clear(self) -> None:
        """Hides nothing any more: after a reset the keys name other blocks. Never waits."""
        with self._changed:
            self._waiting.clear()
            self._running = set()

    def wait(self, timeout: float) -> bool:
        """Waits until nothing is left to drop; False if it is not over after so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._busy or self._asked()), timeout)

    def close(self, timeout: float) -> None:
        """Gives up what has not begun, and waits so many seconds at most for what has. Idempotent."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(timeout)

    def _asked(self) -> bool:
        return bool(self._waiting or self._namespaces)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running, self._busy = set(), False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._asked())
                if self._closed:
                    return
                self._busy = True
                self._running, self._waiting = self._waiting, set()
                names = list(self._running)
                namespace = None if names else self._namespaces.pop(0)
            if namespace is None:
                self._drop(np.frombuffer(b"".join(names), np.uint8).reshape(-1, KEY_BYTES))
            else:
                with contextlib.suppress(KVTierError):  # no key of a new epoch finds what is left there
                    self._engine.drop(namespace=namespace)

    def _drop(self, keys: Keys) -> None:
        try:
            self._engine.drop(keys)
        except KVTierError as error:  # they are gone from memory all the same
            if not self._said:
                _log.warning("blocks whose load failed may be found again after a restart: %s", error)
            self._said = True


def _names(keys: Keys) -> Iterator[bytes]:
    raw = keys.tobytes()
    return (raw[at : at + KEY_BYTES] for at in range(0, len(raw), KEY_BYTES))
