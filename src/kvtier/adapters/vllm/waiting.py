"""WaitingRequests: what queued requests will load outlives what nobody waits for."""

from collections.abc import Iterable

from kvtier.adapters.vllm.state import RequestState
from kvtier.engine import Engine
from kvtier.handles import Expected

_MOST_BLOCKS = 8192  # that are told in a step, a millisecond or two; a longer prompt's first ones


class WaitingRequests:
    """Tells the engine what requests will want that are still queued when a step ends (Engine.expect()).

    One that is scheduled in the step that follows its arrival, as where nobody waits, costs nothing. Threads:
    one, vLLM's scheduler.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._new: dict[str, RequestState] = {}  # the engine knows nothing of them yet; first come first
        self._expected: dict[str, Expected] = {}

    def add(self, request_id: str, state: RequestState) -> None:
        """A request has arrived."""
        if state.may_load and "host" in state.options.tiers and not state.options.prefetch_only:
            self._new[request_id] = state

    def end(self, request_id: str) -> None:
        """It runs, or is over. Idempotent."""
        self._new.pop(request_id, None)
        expected = self._expected.pop(request_id, None)
        if expected is not None:
            expected.end()

    def step(self, scheduled: Iterable[str]) -> None:
        """A step in which these run: of the others the engine is told, as many as there is time for."""
        if not self._new and not self._expected:
            return
        for request_id in scheduled:
            self.end(request_id)
        told = 0
        while self._new and told < _MOST_BLOCKS:
            request_id = next(iter(self._new))
            state = self._new.pop(request_id)
            count = min(state.keys.update(state.request.block_hashes), _MOST_BLOCKS - told)
            told += max(1, count)
            match = self._engine.lookup(state.keys.rows(0, count), record=False)
            if match.ready_blocks:
                here = match.keys[: match.ready_blocks]
                self._expected[request_id] = self._engine.expect(here, prefetch=False)

    def clear(self) -> None:
        """Nobody is waited for any more."""
        for request_id in [*self._new, *self._expected]:
            self.end(request_id)
