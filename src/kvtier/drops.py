"""DroppedLog: what drop() and reset() took away, for whoever keeps blocks of his own above an engine."""

import threading
from dataclasses import dataclass

from kvtier.keys import Keys


@dataclass(eq=False, slots=True)
class Dropped:
    """What one drop() takes away: these keys, or a namespace; neither is everything, as of reset().

    Attributes:
        keys: Keys [n, 32].
        namespace: The tenant.
        running: It may not have come to all of them yet.
    """

    keys: Keys | None = None
    namespace: str | None = None
    running: bool = False


class DroppedLog:
    """What an engine has dropped since the last look. For whoever keeps blocks of its own above the engine.

    Threads: any. Nothing waits.
    """

    _MOST = 64  # nobody may ever look: beyond that, it is everything

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._drops: list[Dropped] = []

    def add(self, dropped: Dropped) -> None:
        """Notes a drop."""
        with self._lock:
            if len(self._drops) >= self._MOST:
                self._drops = [Dropped(), *(drop for drop in self._drops if drop.running)]
            self._drops.append(dropped)

    def drops(self) -> list[Dropped]:
        """Those that nobody has said to be applied, oldest first."""
        with self._lock:
            return list(self._drops)

    def applied(self, dropped: Dropped) -> None:
        """Forgets a drop. Not one that was running when it was applied: it has to be applied again."""
        with self._lock:
            self._drops = [drop for drop in self._drops if drop is not dropped]
