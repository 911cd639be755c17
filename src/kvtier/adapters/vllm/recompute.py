"""RecomputeClock: how long vLLM takes to compute tokens, measured from its own steps. Pure."""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

_MIN_TOKENS = 64  # steps of pure decode say nothing about a prefill
_WEIGHT = 0.25
_LONGEST_STEP_SECONDS = 60.0


class _Step(NamedTuple):
    tokens: int
    token_pairs: float
    began: float


class RecomputeClock:
    """A moving average of seconds per token over steps that compute many tokens.

    A step begins when vLLM has scheduled it and ends when vLLM has its output. With asynchronous scheduling
    the next one is scheduled before that: for the clock it begins when the one before it has ended.

    Args:
        observe: Is told of every such step too: its tokens, their pairs (`kvtier.costs.pairs`), its seconds.
    """

    def __init__(self, observe: Callable[[int, float, float], None] | None = None) -> None:
        self._observe = observe
        self._per_token: float | None = None
        self._running: deque[_Step] = deque()
        self._ended = -math.inf

    def step(self, num_tokens: int, now: float, token_pairs: float = 0.0) -> None:
        """A step with so many tokens is scheduled. `now` is monotonic seconds."""
        while self._running and now - self._running[0].began > _LONGEST_STEP_SECONDS:
            self._running.popleft()  # its output was lost
        self._running.append(_Step(num_tokens, token_pairs, now))

    def ended(self, now: float) -> None:
        """The output of the oldest running step is there."""
        if not self._running:
            return
        step = self._running.popleft()
        seconds = now - max(step.began, self._ended)
        self._ended = now
        if step.tokens < _MIN_TOKENS or not 0 < seconds < _LONGEST_STEP_SECONDS:
            return
        rate = seconds / step.tokens
        old = self._per_token
        self._per_token = rate if old is None else old + _WEIGHT * (rate - old)
        if self._observe is not None:
            self._observe(step.tokens, step.token_pairs, seconds)

    def seconds(self, num_tokens: int) -> float:
        """How long computing so many tokens would take; infinite if nothing was measured yet.

        The first requests after a restart are those that find most on disk.
        """
        return math.inf if self._per_token is None else self._per_token * num_tokens
