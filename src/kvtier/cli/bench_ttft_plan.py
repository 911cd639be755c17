"""What of `kvtier bench ttft` a machine can run: what fits its memory, and how long it takes. Pure.

Time of a prefill is taken as `a * F_linear + b * F_attention`: seconds per operation of the two kinds that
`shapes` counts, fitted to measured prefills by least squares of the relative errors. From it come the plan
and what could not be run; how good it is, `Fit.error` tells, and `held_out`: what it would have said of the
longest measured prefill had it seen only the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvtier.cli.shapes import Shape
from kvtier.errors import ConfigError
from kvtier.layout import dtype_name_and_bytes

SUFFIX_TOKENS = 128
FP8 = "float8_e4m3fn"
LIMIT_BYTES = 512 << 20  # moved at most by each plain copy or read beside a restored run
_MIN_BLOCK_BYTES = 2 << 20
_SLOT_OVERHEAD = 8 << 10  # header, and rounding up
_SPARE_SLOTS = 17  # what an engine gets more than a prefix needs, and a block behind the suffix
_DISK_SPARE = 64 << 20
_LONGER = 1.05  # a million tokens as people say it are 1,010,000 or 2**20
_TIERS = 4  # device, host, disk, disk after a restart
_ROUND_SECONDS = 0.15  # to open an engine and the like, for each of them
_ROUND_RATE = 4e9  # bytes a second to make its host tier and to poison the pages
_CPU_WEIGHTS_SHARE = 4  # of a CPU's memory the weights take no more than one part in so many
RECOMPUTE_AT_MOST = 0.5  # of the time given; planned are
_RECOMPUTE_SHARE, _REPEAT_SHARE, _TIER_SHARE = 0.35, 0.08, 0.42  # of the time given
_CALIBRATION_SHARE, _CALIBRATION_RUNS = 0.1, 6
_LEAST_CHUNK = 16
_DEVICE = "device memory"
_ONE_ROUND_AT_MOST = 2.0  # of the time given: with less than a round of the shortest length nothing is run


@dataclass(frozen=True)
class Room:
    """Bytes that may be used. `device` is None where the pages lie in the host's memory, too."""

    device: int | None
    host: int
    disk: int


@dataclass(frozen=True)
class Layer:
    """How a shape is run.

    Attributes:
        dtype: Of weights and arithmetic.
        kv_dtype: Of the pages, and so of every tier.
        own_weights: Every layer has its own; else one layer's stand for all, so that a model larger than
            the memory does the same arithmetic, layer by layer.
        chunk: Tokens of a prefill at once.
        block_tokens: Of a block, and of a page.
        lengths: Tokens of the prefixes, ascending.
        left_out: Why other lengths are not there.
    """

    dtype: str
    kv_dtype: str
    own_weights: bool
    chunk: int
    block_tokens: int
    lengths: tuple[int, ...]
    left_out: Mapping[int, str]


def block_tokens_for(shape: Shape, kv_dtype: str) -> int:
    """The least power of two, 16 or more, that makes blocks of 2 MiB or more; at most 256."""
    tokens = 16
    while tokens < 256 and tokens * shape.kv_bytes_per_token(kv_dtype) < _MIN_BLOCK_BYTES:
        tokens *= 2
    return tokens


def default_lengths(shape: Shape, lengths: Sequence[int]) -> list[int]:
    """Those up to the longest context that the model is made for, the shortest at least."""
    if shape.max_tokens <= 1:  # not known
        return list(lengths)
    return [n for n in lengths if n <= _LONGER * shape.max_tokens] or [min(lengths)]


def weight_bytes(shape: Shape, dtype: str, *, own: bool) -> int:
    """Of all matrices in memory; the embedding is the output matrix."""
    each = dtype_name_and_bytes(dtype)[1]
    layers = shape.num_layers if own else 1
    return each * (layers * shape.layer_parameters + shape.hidden_size * shape.vocab_size)


def work_bytes(shape: Shape, dtype: str, kv_dtype: str, tokens: int, chunk: int) -> int:
    """What a chunk needs beside weights and pages, at most."""
    each = dtype_name_and_bytes(dtype)[1]
    per_token = 6 * shape.hidden_size + 3 * shape.intermediate_size + 4 * shape.num_heads * shape.head_dim
    found = each * chunk * (per_token + tokens // 8)  # a mask, where the kernel wants one
    if shape.latent is not None:  # keys and values of all heads, made from the latents
        dims = shape.latent.key_dim + shape.latent.rope_dim
        found += 3 * each * tokens * shape.num_heads * dims
    if kv_dtype != dtype:  # one layer's, converted
        found += each * tokens * shape.kv_bytes_per_token("uint8") // shape.num_layers
    return found


def place(
    shape: Shape,
    lengths: Sequence[int],
    room: Room,
    *,
    dtype: str,
    kv_dtype: str | None = None,
    chunk: int,
    block_tokens: int | None = None,
) -> Layer:
    """Decides how a shape is run so that the longest possible prefix fits.

    Tried in this order: as it is; one layer's weights for all; 8-bit KV; both. KV of 8 bits is taken only for
    lengths that lack device memory otherwise: host memory or a disk that is too small leaves a length out.

    Args:
        shape: The model's.
        lengths: Tokens of the prefixes.
        room: What may be used.
        dtype: Of weights and arithmetic.
        kv_dtype: Of the pages; None: `dtype`, or 8 bits where only they fit a GPU's memory.
        chunk: Tokens of a prefill at once.
        block_tokens: Of a block; None: see `block_tokens_for`.

    Raises:
        ConfigError: No length, or one that is not whole blocks.
    """
    kinds = [kv_dtype] if kv_dtype is not None else [dtype, *([FP8] if room.device is not None else [])]
    best: Layer | None = None
    forced: set[int] = set()  # lengths that lack device memory in the best way so far
    for kind in kinds:
        for own in (True, False):
            block = block_tokens or block_tokens_for(shape, kind)
            wrong = [n for n in lengths if n < block or n % block]
            if wrong or not lengths:
                raise ConfigError(f"--tokens {wrong}: allowed: multiples of the block of {block} tokens")
            fits, left_out, lack_device = [], {}, set()
            for tokens in sorted(set(lengths)):
                lack = _lack(shape, tokens, room, dtype, kind, block, own=own, chunk=chunk)
                if lack is None:
                    fits.append(tokens)
                    continue
                left_out[tokens] = lack[1]
                if lack[0] == _DEVICE:
                    lack_device.add(tokens)
            found = Layer(dtype, kind, own, chunk, block, tuple(fits), left_out)
            more = best is not None and len(fits) > len(best.lengths)
            if best is None or (more and (kind == best.kv_dtype or forced & set(fits))):
                best, forced = found, lack_device
    if best is None:
        raise ConfigError("--tokens: at least one length is wanted")
    return best


def _lack(
    shape: Shape, tokens: int, room: Room, dtype: str, kv_dtype: str, block: int, *, own: bool, chunk: int
) -> tuple[str, str] | None:
    """What a length has too little of, and that in a sentence; None if it fits."""
    kv = (tokens + SUFFIX_TOKENS) * shape.kv_bytes_per_token(kv_dtype)
    weights = weight_bytes(shape, dtype, own=own)
    device = kv + weights + work_bytes(shape, dtype, kv_dtype, tokens, chunk)
    slot = block * shape.kv_bytes_per_token(kv_dtype) + _SLOT_OVERHEAD
    tier = (tokens // block + _SPARE_SLOTS) * slot + _DISK_SPARE
    host = tier + 2 * min(kv, LIMIT_BYTES)
    if room.device is None:
        if own and weights > room.host // _CPU_WEIGHTS_SHARE:
            have = f"{room.host / 1e9:.1f} GB of memory"
            return "host memory", f"weights of {weights / 1e9:.1f} GB are too many for {have}"
        host, device = host + device, 0
    for name, needed, there in (
        (_DEVICE, device, room.device or 0),
        ("host memory", host, room.host),
        ("disk", tier + min(kv, LIMIT_BYTES), room.disk),
    ):
        if needed > there:
            return name, f"needs {needed / 1e9:.1f} GB of {name}, {there / 1e9:.1f} are free"
    return None


@dataclass(frozen=True)
class Fit:
    """Seconds per operation."""

    shape: Shape
    linear: float
    attention: float

    def seconds(self, tokens: int, prefix: int = 0) -> float:
        """Of a prefill of `tokens` behind `prefix` cached ones."""
        by_linear = self.linear * self.shape.linear_flops(tokens)
        return by_linear + self.attention * self.shape.attention_flops(tokens, prefix)

    def error(self, points: Mapping[int, float]) -> float:
        """The largest relative error over measured prefills, tokens to seconds."""
        return max(abs(self.seconds(tokens) / seconds - 1) for tokens, seconds in points.items())


def fit(shape: Shape, points: Mapping[tuple[int, int], float]) -> Fit:
    """Fits both rates, neither of them negative.

    Args:
        shape: What was run.
        points: Seconds by (tokens, prefix), at least one.
    """
    rows = [(shape.linear_flops(n) / t, shape.attention_flops(n, p) / t) for (n, p), t in points.items()]
    ll, lq, qq = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    sl, sq = sum(r[0] for r in rows), sum(r[1] for r in rows)
    determinant = ll * qq - lq * lq
    if determinant > 1e-9 * ll * qq:
        linear, attention = (sl * qq - sq * lq) / determinant, (sq * ll - sl * lq) / determinant
        if linear >= 0 and attention >= 0:
            return Fit(shape, linear, attention)
    # One kind alone; of the two the better.
    only_linear, only_attention = Fit(shape, sl / ll, 0.0), Fit(shape, 0.0, sq / qq)
    return min(only_linear, only_attention, key=lambda f: _squares(f, points))


def _squares(found: Fit, points: Mapping[tuple[int, int], float]) -> float:
    return sum((found.seconds(n, p) / t - 1) ** 2 for (n, p), t in points.items())


def held_out(shape: Shape, prefills: Mapping[int, float]) -> float | None:
    """Relative error at the longest prefill of a fit to the others; None with fewer than three."""
    if len(prefills) < 3:
        return None
    longest = max(prefills)
    others = {(tokens, 0): s for tokens, s in prefills.items() if tokens != longest}
    return fit(shape, others).seconds(longest) / prefills[longest] - 1


@dataclass(frozen=True)
class Schedule:
    """What is run in the time given.

    Attributes:
        recomputed: Lengths that are recomputed; the others are extrapolated. None where even the shortest
            would take longer than everything is given.
        repeated: Lengths that are recomputed `rounds` times.
        rounds: Of the tiers, by length; lengths for which not even one round fits are not there. The shortest
            is, unless a round of it takes far longer than everything is given.
        seconds: How long all of it takes, by the fit.
    """

    recomputed: tuple[int, ...]
    repeated: tuple[int, ...]
    rounds: Mapping[int, int]
    seconds: float


def run_seconds(model: Fit, tokens: int) -> float:
    """How long a restored run takes, about."""
    around = _ROUND_SECONDS + tokens * model.shape.kv_bytes_per_token() / _ROUND_RATE
    return around + 1.3 * model.seconds(SUFFIX_TOKENS, tokens)


def calibration_chunk(chunk: int, few: int, seconds: float, minutes: float) -> int:
    """Tokens of the prefills that calibrate: a chunk, or less where that would take too much of the time.

    Args:
        chunk: Tokens of a prefill at once.
        few: Tokens of one that was timed.
        seconds: That it took.
        minutes: For everything.
    """
    while chunk > _LEAST_CHUNK and (
        _CALIBRATION_RUNS * seconds * max(1.0, chunk / few) > _CALIBRATION_SHARE * 60 * minutes
    ):
        chunk //= 2
    return chunk


def schedule(lengths: Sequence[int], model: Fit, rounds: int, minutes: float) -> Schedule:
    """Divides the time given.

    Args:
        lengths: Ascending.
        model: Of the calibration.
        rounds: Wanted at most.
        minutes: For all of it.
    """
    given = 60 * minutes
    recomputed = [n for n in lengths if model.seconds(n) <= _RECOMPUTE_SHARE * given]
    if not recomputed and model.seconds(lengths[0]) <= given:
        recomputed = [lengths[0]]
    if _TIERS * run_seconds(model, lengths[0]) > _ONE_ROUND_AT_MOST * given:
        return Schedule((), (), {}, 0.0)
    repeated = [n for n in recomputed if model.seconds(n) * max(1, rounds - 1) <= _REPEAT_SHARE * given]
    plan: dict[int, int] = {}
    spent = 0.0
    for _ in range(rounds):
        for tokens in lengths:
            one_round = _TIERS * run_seconds(model, tokens)
            if spent + one_round <= _TIER_SHARE * given or not plan:
                plan[tokens] = plan.get(tokens, 0) + 1
                spent += one_round
    seconds = spent + (model.seconds(recomputed[-1]) if recomputed else 0.0)
    seconds += (rounds - 1) * model.seconds(repeated[-1]) if repeated else 0.0
    return Schedule(tuple(recomputed), tuple(repeated), dict(sorted(plan.items())), seconds)
