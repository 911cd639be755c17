"""TimedPins: blocks that requests asked to keep in host memory for some time after they have finished."""

import logging
from dataclasses import dataclass

from kvtier.engine import BlockState, Engine
from kvtier.handles import Lease
from kvtier.keys import Keys

_log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 10.0  # for the last stores of a request that has finished
_MOST_OF_HOST = 0.5  # pinned blocks cannot be evicted: others need room too


@dataclass
class _Wish:
    keys: Keys
    until: float
    give_up: float


class TimedPins:
    """Leases with an end. Only for the scheduler's thread.

    At most half of the host tier is pinned so; a request whose blocks would be more is not pinned.
    """

    def __init__(self, engine: Engine) -> None:
        """Pins nothing yet; the engine is the caller's."""
        self._engine = engine
        self._wishes: list[_Wish] = []
        self._leases: list[tuple[Lease, float]] = []
        self._refused = False

    def add(self, keys: Keys, seconds: float, now: float) -> None:
        """Pins blocks for so long, as soon as their stores are over. Copies the keys."""
        self._wishes.append(_Wish(keys.copy(), now + seconds, now + _PATIENCE_SECONDS))

    def poll(self, now: float) -> None:
        """Pins what has been stored meanwhile, and lets go of what is over."""
        if self._wishes:
            self._wishes = [wish for wish in self._wishes if not self._pinned(wish, now)]
        if self._leases:
            for lease, until in self._leases:
                if until <= now:
                    lease.release()
            self._leases = [each for each in self._leases if each[1] > now]

    def clear(self) -> None:
        """Lets go of all."""
        for lease, _ in self._leases:
            lease.release()
        self._leases.clear()
        self._wishes.clear()

    def _pinned(self, wish: _Wish, now: float) -> bool:
        """Whether nothing is left to do for a wish."""
        match = self._engine.lookup(wish.keys, record=False)
        groups = range(len(self._engine.config.groups))
        if now < wish.give_up and any((match.states(g) == BlockState.PENDING).any() for g in groups):
            return False
        stats = self._engine.stats()
        room = _MOST_OF_HOST * sum(of_class.capacity for of_class in stats.host) - stats.pinned_blocks
        if match.ready_blocks * len(groups) > room:
            if not self._refused:
                _log.warning("a request is not pinned: at most half of the host tier may be. Said once")
            self._refused = True
        elif match.ready_blocks and wish.until > now:
            self._leases.append((match.pin(wish.until - now), wish.until))
        return True
