"""RecomputeClock: how long vLLM would need to compute tokens, measured from its own steps. Pure."""

import math

_MIN_TOKENS = 64  # steps of pure decode say nothing about a prefill
_WEIGHT = 0.25
_LONGEST_STEP_SECONDS = 60.0


class RecomputeClock:
    """A moving average of seconds per token over steps that compute many tokens."""

    def __init__(self) -> None:
        self._per_token: float | None = None
        self._began: tuple[int, float] | None = None

    def step(self, num_tokens: int, now: float) -> None:
        """A step with so many tokens begins; the one before it is over. `now` is monotonic seconds."""
        if self._began is not None:
            tokens, began = self._began
            seconds = now - began
            if tokens >= _MIN_TOKENS and 0 < seconds < _LONGEST_STEP_SECONDS:
                rate = seconds / tokens
                old = self._per_token
                self._per_token = rate if old is None else old + _WEIGHT * (rate - old)
        self._began = (num_tokens, now)

    def seconds(self, num_tokens: int) -> float:
        """How long computing so many tokens would take; infinite if nothing was measured yet.

        The first requests after a restart are those that find most on disk.
        """
        return math.inf if self._per_token is None else self._per_token * num_tokens
