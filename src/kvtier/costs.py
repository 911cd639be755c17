"""Load or recompute: how much of a hit is worth loading, from what this machine and server have measured.

A hit's blocks are runs in host memory and on disk, in the order of the prompt. What is loaded is a prefix of
them and what is left is computed, so the question is where to cut. With everything measured, cutting behind
block c takes, in seconds,

    load(c)    = to_device.latency + (to_device.queue + bytes(c)) / to_device.bandwidth        (host)
                 from_disk.latency + (from_disk.queue + disk bytes(c)) / from_disk.bandwidth   (disk)
    compute(c) = per_token * tokens + per_pair * (tokens attended to)      of what is behind the cut

where of the two lines of a hit on disk only the longer counts if its blocks go on while others are read.
Attention makes later tokens dearer to compute, while each block of a tier costs the same to load. So the sum
is concave in c but where the longer line changes, and its least value is there or at the end of a run.

`decide()` is pure. `LoadPlanner` learns the prefill rate, decides, and keeps what it decided, so that
`regret()` can say afterwards what would have been best. Sources of the idea: "Compute Or Load KV Cache? Why
Not Both?" (arXiv:2410.03065) and "Strata" (arXiv:2508.18572), which load and compute at once.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

from kvtier.errors import ConfigError
from kvtier.metrics import Hops, HopStats

LoadPolicy = Literal["auto", "always"]
LOAD_POLICIES = ("auto", "always")

LEAST_GAIN_SECONDS = 0.02
_LEAST_GAIN_SHARE = 0.1  # of the load that is not done: a load takes no time of the processor that computes
_PROBE_EVERY = 16  # decisions against a load, of which one loads all the same: else nothing more is learned
_KEPT_DECISIONS = 512
_FEWEST_STEPS = 3
_STEPS_REMEMBERED = 32
_LEAST_TOKENS = 64  # steps of pure decode say nothing about a prefill
_LONGEST_STEP_SECONDS = 60.0


class Choice(Enum):
    """What a decision came to."""

    ALL = "all"  # loading all of it is fastest, or too little would be gained otherwise
    PART = "part"  # a prefix is loaded, the rest is left
    NONE = "none"  # all of it is left
    UNMEASURED = "unmeasured"  # all of it is loaded, for something was not measured yet
    PROBE = "probe"  # all of it is loaded, to see whether loading still is as slow


@dataclass(frozen=True)
class Prefill:
    """How long computing takes.

    Attributes:
        per_token: Seconds for a token, whatever is before it.
        per_pair: Seconds for a token and one token before it: attention.
    """

    per_token: float
    per_pair: float = 0.0

    def seconds(self, begin: int, end: int) -> float:
        """To compute tokens [begin, end) of a prompt."""
        return self.per_token * (end - begin) + self.per_pair * pairs(begin, end)


def pairs(begin: int, end: int) -> float:
    """Pairs of a token in [begin, end) and one before it."""
    return (end - begin) * (begin + end - 1) / 2 if end > begin else 0.0


@dataclass(frozen=True)
class Hit:
    """What a lookup found behind what the device has.

    Attributes:
        runs: In the order of the prompt, (blocks, whether they are on disk alone).
        first_token: Tokens of the prompt whose KV is on the device.
        prompt_tokens: Tokens whose KV is wanted.
        block_tokens: Of a block.
        block_bytes: That loading a block moves, all groups.
        pipelined: Whether blocks go on to the device while later ones are read from disk; else all are read
            first.
    """

    runs: tuple[tuple[int, bool], ...]
    first_token: int
    prompt_tokens: int
    block_tokens: int
    block_bytes: int
    pipelined: bool = True

    @property
    def num_blocks(self) -> int:
        """Blocks of all runs."""
        return sum(blocks for blocks, _ in self.runs)

    def disk_blocks(self, count: int) -> int:
        """Of the first `count` blocks those that are on disk alone."""
        found = 0
        for blocks, on_disk in self.runs:
            taken = min(blocks, count)
            found += taken if on_disk else 0
            count -= taken
        return found

    def load_seconds(self, count: int, hops: Hops) -> float:
        """How long loading the first `count` blocks takes, by measured hops; 0 for none."""
        if count == 0:
            return 0.0
        on_disk = self.disk_blocks(count)
        to_device = _hop_seconds(hops.to_device, count * self.block_bytes)
        if not on_disk:
            return to_device
        from_disk = _hop_seconds(hops.from_disk, on_disk * self.block_bytes)
        if self.pipelined:
            return max(to_device, from_disk + hops.to_device.latency_seconds)
        return to_device + from_disk

    def cuts(self, hops: Hops) -> list[int]:
        """Counts of blocks, rising, among which is the best one to load, whatever computing takes."""
        cuts = [0]
        for blocks, _ in self.runs:
            begin, end = cuts[-1], cuts[-1] + blocks
            first, last = self._lead(begin, hops), self._lead(end, hops)
            if first * last < 0:
                change = begin + int(blocks * first / (first - last))
                cuts += [at for at in (change, change + 1) if begin < at < end]
            cuts.append(end)
        return cuts

    def _lead(self, count: int, hops: Hops) -> float:
        """By how much the way to the device takes longer than the disk, seconds; 0 if they do not overlap."""
        if not self.pipelined or not hops.from_disk.bytes_per_second:
            return 0.0
        to_device = _hop_seconds(hops.to_device, count * self.block_bytes)
        from_disk = _hop_seconds(hops.from_disk, self.disk_blocks(count) * self.block_bytes)
        return to_device - from_disk - hops.to_device.latency_seconds

    def compute_seconds(self, count: int, prefill: Prefill) -> float:
        """How long computing what is behind the first `count` blocks takes."""
        return prefill.seconds(self.first_token + count * self.block_tokens, self.prompt_tokens)


@dataclass(frozen=True)
class Decision:
    """How much of a hit is to be loaded, and why.

    Attributes:
        load_blocks: Blocks at its beginning to load; the rest is left to be computed.
        disk_blocks: Of these, those that have to come from disk first.
        choice: Why.
        load_seconds: Predicted for the load; 0 where it was not measured.
        compute_seconds: Predicted for computing the rest of the prompt; 0 where it was not measured.
        all_seconds: Predicted for loading everything and computing what is behind it.
    """

    load_blocks: int
    disk_blocks: int
    choice: Choice
    load_seconds: float = 0.0
    compute_seconds: float = 0.0
    all_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Predicted until the whole prompt's KV is there."""
        return self.load_seconds + self.compute_seconds


def decide(
    hit: Hit, hops: Hops, prefill: Prefill | None, least_gain_seconds: float = LEAST_GAIN_SECONDS
) -> Decision:
    """Where to cut. Pure.

    Args:
        hit: What was found.
        hops: As measured, with what is under way now.
        prefill: As measured; None if it was not.
        least_gain_seconds: Less than this, or than a tenth of the time that loading everything takes, is no
            reason not to load: a load spares the device's time for other requests.

    Returns:
        Everything where something that it takes was not measured.
    """
    everything = hit.num_blocks
    on_disk = hit.disk_blocks(everything)
    measured = hops.to_device.bytes_per_second > 0 and (not on_disk or hops.from_disk.bytes_per_second > 0)
    if prefill is None or not measured:
        return Decision(everything, on_disk, Choice.UNMEASURED)

    def at(count: int) -> float:
        return hit.load_seconds(count, hops) + hit.compute_seconds(count, prefill)

    all_seconds = at(everything)
    best = min(hit.cuts(hops), key=lambda count: (at(count), -count))
    if all_seconds - at(best) < max(least_gain_seconds, _LEAST_GAIN_SHARE * all_seconds):
        best = everything
    choice = Choice.ALL if best == everything else Choice.PART if best else Choice.NONE
    return Decision(
        best,
        hit.disk_blocks(best),
        choice,
        hit.load_seconds(best, hops),
        hit.compute_seconds(best, prefill),
        all_seconds,
    )


def _hop_seconds(hop: HopStats, num_bytes: int) -> float:
    return hop.latency_seconds + (hop.running_bytes + num_bytes) / hop.bytes_per_second


class PrefillMeter:
    """Learns a Prefill from steps: least squares over the last of them, neither cost below 0."""

    def __init__(self) -> None:
        self._steps = 0
        self._nn = self._np = self._pp = self._ny = self._py = 0.0

    def observe(self, tokens: int, token_pairs: float, seconds: float) -> None:
        """A step has computed so many tokens.

        Args:
            tokens: Of all requests in it; steps of fewer than 64 are left out.
            token_pairs: `pairs()` of each request's tokens, summed.
            seconds: What it took; steps of more than a minute are left out.
        """
        if tokens < _LEAST_TOKENS or not 0 < seconds < _LONGEST_STEP_SECONDS:
            return
        self._steps += 1
        kept = 1 - 1 / _STEPS_REMEMBERED
        # Each step weighs by what it says about a token: a relative error counts the same in all of them.
        weight = 1 / (tokens * tokens)
        self._nn = kept * self._nn + weight * tokens * tokens
        self._np = kept * self._np + weight * tokens * token_pairs
        self._pp = kept * self._pp + weight * token_pairs * token_pairs
        self._ny = kept * self._ny + weight * tokens * seconds
        self._py = kept * self._py + weight * token_pairs * seconds

    @property
    def prefill(self) -> Prefill | None:
        """What was learned; None before three steps."""
        if self._steps < _FEWEST_STEPS:
            return None
        alone = Prefill(self._ny / self._nn)
        determinant = self._nn * self._pp - self._np * self._np
        if determinant <= 1e-6 * self._nn * self._pp:
            return alone  # all at the same position: the two costs cannot be told apart
        per_token = (self._ny * self._pp - self._py * self._np) / determinant
        per_pair = (self._py * self._nn - self._ny * self._np) / determinant
        if per_pair < 0:
            return alone
        return Prefill(per_token, per_pair) if per_token >= 0 else Prefill(0.0, self._py / self._pp)


@dataclass(frozen=True)
class CostStats:
    """What was decided, and how good the predictions were. Counts grow only.

    Attributes:
        decisions: Hits that were decided about: the sum of the next five.
        chose_all, chose_part, chose_none, unmeasured, probes: By Choice.
        blocks_loaded: That were to be loaded.
        blocks_left: That were left to be computed although a tier had them.
        blocks_from_disk: Of blocks_loaded, those that had to come from disk first.
        settled: Loads with a prediction whose end is known.
        predicted_seconds: Of these loads.
        observed_seconds: Of these loads.
        gained_seconds: Predicted, over loading everything each time.
        prefill: As learned; None before.
    """

    decisions: int
    chose_all: int
    chose_part: int
    chose_none: int
    unmeasured: int
    probes: int
    blocks_loaded: int
    blocks_left: int
    blocks_from_disk: int
    settled: int
    predicted_seconds: float
    observed_seconds: float
    gained_seconds: float
    prefill: Prefill | None


@dataclass(eq=False)
class Plan:
    """A decision that was taken, for `LoadPlanner.settle`.

    Attributes:
        hit: What was decided about.
        hops: As they were, with what was under way.
        decision: What was decided.
        observed_seconds: Of the load, once it is over.
    """

    hit: Hit
    hops: Hops
    decision: Decision
    observed_seconds: float | None = None


@dataclass(frozen=True)
class Regret:
    """What decisions cost against the best that could have been decided, in seconds summed over `decisions`.

    Attributes:
        decisions: Those that can be replayed.
        decided: As it was decided.
        best: The best cut of each.
        load_all: Everything always loaded.
        load_none: Nothing ever loaded.
    """

    decisions: int
    decided: float
    best: float
    load_all: float
    load_none: float

    @property
    def seconds(self) -> float:
        """Lost against the best."""
        return self.decided - self.best


def regret(plans: Iterable[Plan], hops: Hops, prefill: Prefill) -> Regret:
    """Replays decisions with what is known now. Pure.

    Each is judged with the queues that it met and with today's rates; where its load's end was observed,
    that counts for what was decided.
    """
    decided = best = load_all = load_none = 0.0
    count = 0
    for plan in plans:
        known = Hops(
            to_device=replace(hops.to_device, running_bytes=plan.hops.to_device.running_bytes),
            from_disk=replace(hops.from_disk, running_bytes=plan.hops.from_disk.running_bytes),
        )
        hit, cut = plan.hit, plan.decision.load_blocks
        whole = hit.num_blocks
        on_disk = hit.disk_blocks(whole)
        if known.to_device.bytes_per_second <= 0 or (on_disk and known.from_disk.bytes_per_second <= 0):
            continue
        seconds = {
            at: hit.load_seconds(at, known) + hit.compute_seconds(at, prefill)
            for at in (*hit.cuts(known), cut)
        }
        if plan.observed_seconds is not None:
            seconds[cut] = plan.observed_seconds + hit.compute_seconds(cut, prefill)
        count += 1
        decided += seconds[cut]
        best += min(seconds.values())
        load_all += seconds[whole]
        load_none += seconds[0]
    return Regret(count, decided, best, load_all, load_none)


@dataclass
class _Counts:
    by_choice: dict[Choice, int] = field(default_factory=lambda: dict.fromkeys(Choice, 0))
    blocks_loaded: int = 0
    blocks_left: int = 0
    blocks_from_disk: int = 0
    settled: int = 0
    predicted_seconds: float = 0.0
    observed_seconds: float = 0.0
    gained_seconds: float = 0.0


class LoadPlanner:
    """Decides for one server, learns from its steps and remembers its last 512 decisions.

    Threads: every method from any thread. Nothing waits.

    Args:
        hops: Where the engine's hops come from: `Engine.hops`.
        policy: "auto" decides; "always" loads whatever was found.
        least_gain_seconds: As in `decide`.

    Raises:
        ConfigError: A policy that there is not.
    """

    def __init__(
        self,
        hops: Callable[[], Hops],
        policy: LoadPolicy = "auto",
        least_gain_seconds: float = LEAST_GAIN_SECONDS,
    ) -> None:
        check_load_policy("load", policy)
        self._hops = hops
        self._policy = policy
        self._least_gain_seconds = least_gain_seconds
        self._meter = PrefillMeter()
        self._counts = _Counts()
        self._plans: deque[Plan] = deque(maxlen=_KEPT_DECISIONS)
        self._against = 0  # decisions against a load since the last probe
        self._lock = threading.Lock()

    def observe_prefill(self, tokens: int, token_pairs: float, seconds: float) -> None:
        """See PrefillMeter.observe."""
        with self._lock:
            self._meter.observe(tokens, token_pairs, seconds)

    @property
    def prefill(self) -> Prefill | None:
        """As learned; None before."""
        with self._lock:
            return self._meter.prefill

    def plan(self, hit: Hit, own_running_bytes: int = 0) -> Plan:
        """Decides about a hit. Changes nothing: `record` says that the decision was taken.

        Args:
            hit: What was found.
            own_running_bytes: Of what is being read from disk, what is the hit's own.
        """
        if self._policy == "always":
            return Plan(hit, _NOTHING, _everything(hit, Choice.ALL))
        hops = self._hops()
        if own_running_bytes:
            left = max(0, hops.from_disk.running_bytes - own_running_bytes)
            hops = replace(hops, from_disk=replace(hops.from_disk, running_bytes=left))
        with self._lock:
            decision = decide(hit, hops, self._meter.prefill, self._least_gain_seconds)
            if decision.load_blocks < hit.num_blocks and self._against + 1 >= _PROBE_EVERY:
                decision = replace(
                    _everything(hit, Choice.PROBE),
                    load_seconds=hit.load_seconds(hit.num_blocks, hops),
                    all_seconds=decision.all_seconds,
                )
        return Plan(hit, hops, decision)

    def record(self, plan: Plan) -> None:
        """The plan is carried out."""
        decision = plan.decision
        with self._lock:
            counts = self._counts
            counts.by_choice[decision.choice] += 1
            left = plan.hit.num_blocks - decision.load_blocks
            counts.blocks_loaded += decision.load_blocks
            counts.blocks_left += left
            counts.blocks_from_disk += decision.disk_blocks
            if left:
                self._against += 1
                counts.gained_seconds += decision.all_seconds - decision.seconds
            elif decision.choice is Choice.PROBE:
                self._against = 0
            if self._policy == "auto":
                self._plans.append(plan)

    def settle(self, plan: Plan, seconds: float) -> None:
        """The plan's load has ended well, so many seconds after it was begun."""
        with self._lock:
            plan.observed_seconds = seconds
            if plan.decision.load_seconds > 0:
                self._counts.settled += 1
                self._counts.predicted_seconds += plan.decision.load_seconds
                self._counts.observed_seconds += seconds

    def regret(self) -> Regret | None:
        """Of the last decisions, with what is known now; None before a prefill was measured."""
        hops = self._hops()
        with self._lock:
            prefill = self._meter.prefill
            return None if prefill is None else regret(self._plans, hops, prefill)

    def stats(self) -> CostStats:
        """Counts as of now."""
        with self._lock:
            counts, by = self._counts, self._counts.by_choice
            return CostStats(
                decisions=sum(by.values()),
                chose_all=by[Choice.ALL],
                chose_part=by[Choice.PART],
                chose_none=by[Choice.NONE],
                unmeasured=by[Choice.UNMEASURED],
                probes=by[Choice.PROBE],
                blocks_loaded=counts.blocks_loaded,
                blocks_left=counts.blocks_left,
                blocks_from_disk=counts.blocks_from_disk,
                settled=counts.settled,
                predicted_seconds=counts.predicted_seconds,
                observed_seconds=counts.observed_seconds,
                gained_seconds=counts.gained_seconds,
                prefill=self._meter.prefill,
            )


def check_load_policy(name: str, value: Any) -> LoadPolicy:
    """Returns a LoadPolicy.

    Raises:
        ConfigError: There is no such.
    """
    if value not in LOAD_POLICIES:
        raise ConfigError(f'{name} is {value!r}; allowed: "auto" or "always"')
    policy: LoadPolicy = value
    return policy


def tier_runs(on_disk: Iterable[bool]) -> tuple[tuple[int, bool], ...]:
    """The runs of a Hit from one value for each block, whether it is on disk alone."""
    runs: list[tuple[int, bool]] = []
    for each in on_disk:
        if runs and runs[-1][1] == bool(each):
            runs[-1] = (runs[-1][0] + 1, bool(each))
        else:
            runs.append((1, bool(each)))
    return tuple(runs)


def _everything(hit: Hit, choice: Choice) -> Decision:
    return Decision(hit.num_blocks, hit.disk_blocks(hit.num_blocks), choice)


_UNMEASURED_HOP = HopStats(
    transfers=0, bytes=0, seconds=0.0, running_bytes=0, latency_seconds=0.0, bytes_per_second=0.0
)
_NOTHING = Hops(to_device=_UNMEASURED_HOP, from_disk=_UNMEASURED_HOP)
