"""Families of traffic: chat, agents, retrieval, scans, a mix of them and a mix that shifts.

None of the parameters comes from the conversation trace. Lengths and pauses are lognormal, sessions arrive as
a Poisson process; a family is a function that yields the turns of one session, so a mix is a choice between
them.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from benchmarks.workloads.prompts import BlockIds, Content


@dataclass(frozen=True)
class Request:
    """One request of a trace.

    Attributes:
        at_s: Arrival, seconds since the start of the trace.
        session: Number of the conversation, from 0.
        turn: Number of the turn in it, from 1.
        kind: The family that it belongs to.
        input_tokens: Length of the prompt.
        output_tokens: Length of the answer.
        block_ids: See BlockIds; one per block of the prompt, the last one may be partly filled.
    """

    at_s: float
    session: int
    turn: int
    kind: str
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]


@dataclass
class _World:
    """What the sessions of one trace share."""

    random: random.Random
    ids: Iterator[int] = field(default_factory=itertools.count)
    shared: dict[tuple[str, int], Content] = field(default_factory=dict)

    def fresh(self, median_tokens: float, spread: float = 0.8) -> Content:
        return Content(next(self.ids), self.length(median_tokens, spread))

    def common(self, kind: str, number: int, median_tokens: float, spread: float = 0.5) -> Content:
        if (kind, number) not in self.shared:
            self.shared[kind, number] = self.fresh(median_tokens, spread)
        return self.shared[kind, number]

    def length(self, median: float, spread: float) -> int:
        return max(1, round(self.random.lognormvariate(math.log(median), spread)))

    def pause(self, median_s: float, spread: float) -> float:
        return self.random.lognormvariate(math.log(median_s), spread)

    def zipf(self, n: int) -> int:
        """A rank in [0, n), drawn with probability about 1 / (rank + 1)."""
        return min(n - 1, int((n + 1) ** self.random.random()) - 1)


# A turn: seconds since the turn before it, the prompt, tokens of the answer.
_Turn = tuple[float, list[Content], int]
_Session = Iterator[_Turn]


def _conversation(
    world: _World, opening: list[Content], goes_on: float, pause_s: float, spread: float
) -> _Session:
    """Turns that repeat the whole history, each with the answer and a message more."""
    prompt = list(opening)
    wait = 0.0
    while True:
        answer = world.fresh(250)
        yield wait, list(prompt), answer.tokens
        if world.random.random() >= goes_on:
            return
        wait = 2 + answer.tokens / 50 + world.pause(pause_s, spread)
        prompt += [answer, world.fresh(80, 1.0)]


def _chat(world: _World) -> _Session:
    system = world.common("chat system", world.random.randrange(3), 900)
    first = world.fresh(1500, 1.3)
    # Users differ: most ask once or twice, some stay.
    return _conversation(world, [system, first], world.random.betavariate(1.2, 1.0), 60, 1.0)


def _slow_chat(world: _World) -> _Session:
    system = world.common("slow system", 0, 400)
    return _conversation(world, [system, world.fresh(3000, 1.2)], world.random.betavariate(1, 1), 400, 0.8)


def _agent(world: _World) -> _Session:
    """A loop of tool calls: long shared instructions, many quick steps, now and then a long tool."""
    prompt = [world.common("agent system", world.zipf(4), 6000), world.fresh(600)]
    wait = 0.0
    for _ in range(1 + world.length(10, 0.7)):
        call = world.fresh(120)
        yield wait, list(prompt), call.tokens
        slow_tool = world.random.random() < 0.1
        wait = 1 + call.tokens / 50 + world.pause(90 if slow_tool else 4, 0.8)
        prompt += [call, world.fresh(700, 1.2)]


def _retrieval(world: _World) -> _Session:
    """A question about a popular document; one in five asks on."""
    system = world.common("retrieval system", 0, 300)
    document = world.common("document", world.zipf(600), 8000, 0.6)
    return _conversation(world, [system, document, world.fresh(60)], 0.2, 40, 0.8)


def _scan(world: _World) -> _Session:
    """A batch job reads something long, once."""
    yield 0.0, [world.common("scan system", 0, 200), world.fresh(25_000, 0.5)], world.length(150, 0.5)


_Draw = Callable[[_World, float], tuple[str, _Session]]  # at a share [0, 1) of the trace


def _weighted(**weights: float) -> _Draw:
    sessions: dict[str, Callable[[_World], _Session]] = {
        "chat": _chat,
        "slow_chat": _slow_chat,
        "agent": _agent,
        "retrieval": _retrieval,
        "scan": _scan,
    }

    def draw(world: _World, _: float) -> tuple[str, _Session]:
        kind = world.random.choices(list(weights), list(weights.values()))[0]
        return kind, sessions[kind](world)

    return draw


def _shifting(*phases: _Draw) -> _Draw:
    def draw(world: _World, share: float) -> tuple[str, _Session]:
        return phases[min(len(phases) - 1, int(share * len(phases)))](world, share)

    return draw


@dataclass(frozen=True)
class Family:
    """Sessions per second, and how one is drawn."""

    sessions_per_s: float
    draw: _Draw


FAMILIES: dict[str, Family] = {
    "chat": Family(1.2, _weighted(chat=1)),
    "slow-chat": Family(1.0, _weighted(slow_chat=1)),
    "agents": Family(0.25, _weighted(agent=1)),
    "retrieval": Family(2.0, _weighted(retrieval=1)),
    "scans": Family(1.2, _weighted(scan=0.35, chat=0.65)),
    "mix": Family(1.0, _weighted(chat=0.45, slow_chat=0.15, agent=0.08, retrieval=0.25, scan=0.07)),
    "shift": Family(
        1.0,
        _shifting(
            _weighted(chat=1),
            _weighted(agent=0.25, retrieval=0.4, chat=0.35),
            _weighted(scan=0.4, chat=0.6),
            _weighted(retrieval=0.7, slow_chat=0.3),
        ),
    ),
}


def generate(family: str, minutes: float, seed: int, block_tokens: int = 512) -> list[Request]:
    """A trace in order of arrival; the same arguments give the same trace on every machine and Python.

    Args:
        family: A name of FAMILIES.
        minutes: Length of the trace; what a session would still ask afterwards is cut off.
        seed: Of everything random in it.
        block_tokens: Tokens per block id: 512 as in the Mooncake traces, 16 as in Bailian's.

    Raises:
        ValueError: The family is unknown, or a number is not positive.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is unknown; there are {', '.join(FAMILIES)}")
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes must be positive, not {minutes}")
    world = _World(random.Random(f"{family} {seed}"))
    blocks = BlockIds(block_tokens)
    requests = []
    for at_s, session, turn, kind, prompt, output in _arrivals(FAMILIES[family], world, minutes * 60):
        tokens = sum(content.tokens for content in prompt)
        requests.append(Request(at_s, session, turn, kind, tokens, output, tuple(blocks.of(prompt))))
    return requests


def _arrivals(
    family: Family, world: _World, end_s: float
) -> Iterator[tuple[float, int, int, str, list[Content], int]]:
    """Every turn of every session, in order of time."""
    waiting: list[tuple[float, int, int, str, list[Content], int, _Session]] = []
    new_session_s = world.random.expovariate(family.sessions_per_s)
    sessions = 0
    while True:
        if not waiting or new_session_s <= waiting[0][0]:
            if new_session_s >= end_s:
                if not waiting:
                    return
                new_session_s = math.inf
                continue
            kind, session = family.draw(world, new_session_s / end_s)
            _, prompt, output = next(session)
            heapq.heappush(waiting, (new_session_s, sessions, 1, kind, prompt, output, session))
            sessions += 1
            new_session_s += world.random.expovariate(family.sessions_per_s)
            continue
        at_s, number, turn, kind, prompt, output, session = heapq.heappop(waiting)
        if at_s >= end_s:
            continue
        yield at_s, number, turn, kind, prompt, output
        following = next(session, None)
        if following is not None:
            wait, prompt, output = following
            heapq.heappush(waiting, (at_s + wait, number, turn + 1, kind, prompt, output, session))
