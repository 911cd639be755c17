"""The two processes of `kvtier bench ttft`: `python -m kvtier.cli.bench_ttft_life first|second ARGUMENTS`.

The first recomputes, saves the longest prefix durably, restores it from every tier and is killed; the second
opens what it left on disk. How they talk and end: `kvtier.cli.lives`. What they say beside it:

    {"facts": {...}}          for the report's `machine`
    {"expect": seconds}       how long all of it takes
    {"left_out": {"tokens": n, "why": "..."}}
    {"check": {name: bool}, "tokens": n}      tokens: of a check that is of one length alone
    {"row": {"tokens": n, "tier": ..., "seconds": [...], ...}}    the fields of Samples
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvtier
from kvtier.cli.bench_ttft_model import Decoder
from kvtier.cli.bench_ttft_plan import (
    LIMIT_BYTES,
    RECOMPUTE_AT_MOST,
    SUFFIX_TOKENS,
    Fit,
    Layer,
    Schedule,
    calibration_chunk,
    fit,
    run_seconds,
    schedule,
)
from kvtier.cli.demo_life import wait_for_room
from kvtier.cli.energy import Energy
from kvtier.cli.limits import DriveFile, HostCopy
from kvtier.cli.lives import Lines, end, say
from kvtier.cli.shapes import Latent, Shape

_PATIENCE_SECONDS = 600.0
_CALIBRATION_PREFIX = 4096
_FEW_TOKENS = 32
_COPY_THREADS = 2


@dataclass(frozen=True)
class Life:
    """What both processes are told, as JSON types; `shape` and `layer` are fields of Shape and Layer."""

    folder: str
    shape: dict[str, Any]
    layer: dict[str, Any]
    device: str
    seed: int
    rounds: int
    minutes: float


@dataclass
class Samples:
    """Measurements of one tier at one length."""

    seconds: list[float] = field(default_factory=list)
    restore: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)


class World:
    """Model, prompt and tiers of one process."""

    def __init__(self, life: Life) -> None:
        latent = life.shape["latent"]
        self.life = life
        self.shape = Shape(**{**life.shape, "latent": latent and Latent(**latent)})
        self.layer = Layer(**{**life.layer, "lengths": tuple(life.layer["lengths"])})
        self.longest = self.layer.lengths[-1]
        layer = self.layer
        # Whole pages, also behind the suffix.
        capacity = -(-(self.longest + SUFFIX_TOKENS) // layer.block_tokens) * layer.block_tokens
        self.decoder = Decoder(
            self.shape,
            capacity,
            device=life.device,
            dtype=layer.dtype,
            kv_dtype=layer.kv_dtype,
            own_weights=layer.own_weights,
            seed=life.seed,
        )
        rng = np.random.default_rng(life.seed)
        ids = rng.integers(0, self.shape.vocab_size, self.longest + SUFFIX_TOKENS, np.int32)
        self.prefix, self.suffix = ids[: self.longest], ids[self.longest :]
        self.energy = Energy(self.decoder.gpu_uuid)
        self.lines = Lines()
        self.opens: list[float] = []

    def config(self, tokens: int) -> kvtier.Config:
        """Of an engine whose host tier holds so many tokens; on disk is room for the longest prefix."""
        layer = self.layer
        layout = self.shape.layout(layer.kv_dtype, layer.block_tokens, self.decoder.page_order)
        slot = layout.block_bytes(layer.block_tokens) + (8 << 10)  # header, and rounding up to its size
        host, disk = ((n // layer.block_tokens + 16) * slot for n in (tokens, self.longest))
        weights = "own" if layer.own_weights else "shared"
        return kvtier.Config(
            groups=[layout],
            block_tokens=layer.block_tokens,
            model=f"kvtier-bench-{self.shape.name}@{self.life.seed}-{layer.dtype}-{weights}",
            host=host,
            copy_threads=_COPY_THREADS,
            disk=kvtier.Disk(str(Path(self.life.folder) / "disk"), disk + (64 << 20)),
            disk_admission="all",
            disk_write_budget="unlimited",
        )

    @contextmanager
    def engine(self, tokens: int) -> Iterator[tuple[kvtier.Engine, kvtier.Pages]]:
        """An engine whose host tier is empty and holds so many tokens, and its pages."""
        begin = time.perf_counter()
        with kvtier.open(self.config(tokens)) as engine:
            self.opens.append(time.perf_counter() - begin)
            engine.wait_until_whole()
            tensors, axes = self.decoder.page_tensors(self.layer.block_tokens)
            pages = engine.attach(tensors, axes=axes)
            try:
                yield engine, pages
            finally:
                pages.detach()

    def limit_bytes(self, tokens: int) -> int:
        """What a plain copy or read moves beside a restored prefix of so many tokens."""
        return min(LIMIT_BYTES, tokens * self.shape.kv_bytes_per_token(self.layer.kv_dtype))

    def logits_file(self, tokens: int) -> Path:
        """Where the first process leaves what the second must find."""
        return Path(self.life.folder) / f"logits-{tokens}.npy"

    def first_token(self, tokens: int, samples: Samples, restore: Any = None) -> Any:
        """One measured run: what brings the prefix back, if anything does, and the suffix; the logits."""
        self.decoder.synchronize()
        joules = self.energy.read()
        begin = time.perf_counter()
        if restore is not None:
            restore()
            self.decoder.synchronize()
        middle = time.perf_counter()
        logits = self.decoder.prefill(self.suffix, tokens)
        samples.seconds.append(time.perf_counter() - begin)
        if restore is not None:
            samples.restore.append(middle - begin)
        if (used := self.energy.since(joules)) is not None:
            samples.joules.append(used)
        return logits

    def restored(self, on: Any, tier: kvtier.Tier, tokens: int, samples: Samples) -> Any:
        """A run whose prefix comes from a tier; the logits, or None if not all of it came from there."""
        engine, pages = on
        count = tokens // self.layer.block_tokens
        prompt = np.concatenate([self.prefix[:tokens], self.suffix])
        came: list[bool] = []

        def restore() -> None:
            keys = kvtier.block_keys(prompt, engine.config)[:count]
            match = engine.lookup(keys)
            ticket = engine.load(match, pages, np.arange(match.ready_blocks))
            whole = ticket.result().valid_blocks == count
            came.append(whole and bool((match.tiers() == tier).all()))

        self.decoder.poison(tokens + SUFFIX_TOKENS)
        logits = self.first_token(tokens, samples, restore)
        return logits if came == [True] else None


def row(tokens: int, tier: str, samples: Samples) -> None:
    """Says what was measured."""
    say(row={"tokens": tokens, "tier": tier, **asdict(samples)})


# --- the first ----------------------------------------------------------------------------------------------


def calibrate(world: World) -> Fit:
    """Rates of a chunk, or of a part of one, without and with a prefix; the first run warms up."""
    world.lines.phase("calibration")
    begin = time.perf_counter()
    world.decoder.prefill(world.prefix[:_FEW_TOKENS], 0)
    took = time.perf_counter() - begin
    chunk = min(world.layer.chunk, world.longest)
    chunk = calibration_chunk(chunk, min(_FEW_TOKENS, world.longest), took, world.life.minutes)
    behind = min(_CALIBRATION_PREFIX, world.longest - chunk)
    world.decoder.fill(0, behind, world.life.seed)
    points: dict[tuple[int, int], float] = {}
    for prefix in dict.fromkeys((0, 0, behind)):
        world.decoder.prefill(world.prefix[:chunk], prefix)
        begin = time.perf_counter()
        world.decoder.prefill(world.prefix[:chunk], prefix)
        points[chunk, prefix] = time.perf_counter() - begin
    return fit(world.shape, points)


def recompute(world: World, plan: Schedule, model: Fit) -> dict[int, Any]:
    """Chunked prefill of the prefix, which is timed at every length, with the suffix behind each.

    Returns:
        Logits by length.
    """
    samples = {tokens: Samples() for tokens in plan.recomputed}
    expected: dict[int, Any] = {}
    same = True
    allowed = 60 * world.life.minutes * RECOMPUTE_AT_MOST
    passes = [plan.repeated] * (world.life.rounds - 1) if plan.repeated else []
    for lengths in [*passes, plan.recomputed]:
        took, done = 0.0, 0
        joules: float | None = 0.0
        for tokens in lengths:
            if done and took * model.seconds(tokens) / model.seconds(done) > allowed:
                break  # slower than the calibration said
            world.lines.phase(f"recompute {tokens} tokens")
            before, begin = world.energy.read(), time.perf_counter()
            for at in range(done, tokens, world.layer.chunk):
                until = min(at + world.layer.chunk, tokens)
                world.decoder.prefill(world.prefix[at:until], at)
                world.energy.read()  # so that no counter goes round twice
                world.lines.step(model.seconds(until - at, at))
            took += time.perf_counter() - begin
            used = world.energy.since(before)
            joules = None if joules is None or used is None else joules + used
            done = tokens
            one = Samples()
            logits = world.first_token(tokens, one)
            same = same and torch.equal(expected.setdefault(tokens, logits), logits)
            samples[tokens].seconds.append(took + one.seconds[0])
            samples[tokens].joules += [joules + j for j in one.joules if joules is not None]
            if lengths is plan.recomputed and same:
                row(tokens, "recompute", samples[tokens])
    if passes:
        say(check={"recompute_repeats": same})
    return expected


def save(world: World) -> None:
    """Stores the longest prefix and waits until it is durable."""
    world.lines.phase("saving the prefix")
    with world.engine(world.longest) as (engine, pages):
        keys = kvtier.block_keys(world.prefix, engine.config)
        wait_for_room(engine)
        engine.store(keys, pages, np.arange(len(keys))).wait()
        engine.flush(_PATIENCE_SECONDS)
        say(check={"saved_whole_prefix": engine.stats().disk_durable >= len(keys)})


class Tiers:
    """Restores at one length, tier after tier in every round, beside the limits."""

    def __init__(self, world: World, tokens: int, expected: Any, drive: DriveFile) -> None:
        self.world, self.tokens, self.expected, self.drive = world, tokens, expected, drive
        self.samples = {tier: Samples() for tier in ("device", "host", "disk")}
        self.right = dict.fromkeys(self.samples, True)
        self.copy = _plain_copy(world, world.limit_bytes(tokens))

    def round(self) -> None:
        """One run from each tier. Each ends with the prefix whole in the pages."""
        world, tokens = self.world, self.tokens
        self._check("device", world.first_token(tokens, self.samples["device"]))
        with world.engine(tokens) as on:
            self.samples["disk"].bandwidth.append(self.drive.read_rate())
            self._check("disk", world.restored(on, kvtier.Tier.DISK, tokens, self.samples["disk"]))
            # What came from disk is in the host tier now.
            self.samples["host"].bandwidth.append(self.copy())
            self._check("host", world.restored(on, kvtier.Tier.HOST, tokens, self.samples["host"]))

    def control(self) -> bool:
        """Whether one damaged block shows in the logits. The block is broken afterwards."""
        block, middle = self.world.layer.block_tokens, self.tokens // 2
        self.world.decoder.damage(middle // block * block, middle // block * block + block)
        logits = self.world.first_token(self.tokens, Samples())
        return bool(torch.isfinite(logits).all()) and not torch.equal(logits, self.expected)

    def _check(self, tier: str, logits: Any) -> None:
        if self.expected is None:
            self.expected = logits
        self.right[tier] = self.right[tier] and logits is not None and torch.equal(logits, self.expected)


def _plain_copy(world: World, size: int) -> Any:
    """A function that copies so many bytes from the host to where the pages are: bytes per second."""
    if world.decoder.device.type == "cpu":
        return HostCopy(size, _COPY_THREADS).rate
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=world.decoder.device)

    def rate() -> float:
        world.decoder.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        world.decoder.synchronize()
        return size / (time.perf_counter() - begin)

    return rate


def first(life: Life) -> None:
    """Everything but the restart."""
    world = World(life)
    model = calibrate(world)
    plan = schedule(world.layer.lengths, model, life.rounds, life.minutes)
    say(
        expect=plan.seconds,
        facts={
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            **({} if life.device == "cpu" else {"device": torch.cuda.get_device_name(life.device)}),
            "energy_from": world.energy.sources,
            "energy_missing": world.energy.missing,
            "kv_bytes_per_token": world.shape.kv_bytes_per_token(world.layer.kv_dtype),
            "calibration": {"linear": model.linear, "attention": model.attention},
        },
    )
    for tokens in sorted(set(world.layer.lengths) - set(plan.rounds)):
        minutes = run_seconds(model, tokens) / 60
        why = f"its tiers do not fit the time given: a run of each takes about {minutes:.1f} min"
        say(left_out={"tokens": tokens, "why": why})
    if not plan.rounds:
        end({"rounds": {}, "steps": {}})
    expected = recompute(world, plan, model)
    world.decoder.fill(max(expected, default=0), world.longest, life.seed)
    save(world)
    drive = DriveFile(Path(life.folder), world.limit_bytes(world.longest))
    say(facts={"disk_limit_past_page_cache": drive.direct})
    for tokens, rounds in plan.rounds.items():
        tiers = Tiers(world, tokens, expected.get(tokens), drive)
        for i in range(rounds):
            world.lines.phase(f"{tokens} tokens from device, host and disk: round {i + 1} of {rounds}")
            tiers.round()
            world.lines.step(3 * run_seconds(model, tokens))
        np.save(world.logits_file(tokens), tiers.expected.numpy())
        world.lines.phase("control: one damaged block")
        say(check={"control_differs": tiers.control()}, tokens=tokens)
        for tier, right in tiers.right.items():
            say(check={f"logits_{tier}": right})
            if right:
                row(tokens, tier, tiers.samples[tier])
        _mend(world)
    drive.close()
    steps = {tokens: run_seconds(model, tokens) for tokens in plan.rounds}
    with world.engine(world.longest):  # killed while it is open
        end({"rounds": plan.rounds, "steps": steps})


def _mend(world: World) -> None:
    """Brings the whole prefix back into the pages."""
    with world.engine(world.longest) as (engine, pages):
        keys = kvtier.block_keys(world.prefix, engine.config)
        engine.load(keys, pages, np.arange(len(keys))).wait()


# --- the second ---------------------------------------------------------------------------------------------


def second(life: Life, rounds: dict[int, int], steps: dict[int, float]) -> None:
    """Opens the disk tier of the process that was killed, and restores every length.

    Args:
        life: As the first had.
        rounds: By length.
        steps: Seconds that each of them is thought to take.
    """
    world = World(life)
    world.lines.phase("warm-up in the new process")
    world.decoder.prefill(world.suffix, 0)
    drive = DriveFile(Path(life.folder), world.limit_bytes(world.longest))
    for tokens, count in rounds.items():
        samples, right = Samples(), True
        expected = torch.from_numpy(np.load(world.logits_file(tokens)))
        for i in range(count):
            world.lines.phase(f"{tokens} tokens from disk in a new process: round {i + 1} of {count}")
            with world.engine(tokens) as on:
                samples.bandwidth.append(drive.read_rate())
                logits = world.restored(on, kvtier.Tier.DISK, tokens, samples)
                right = right and logits is not None and torch.equal(logits, expected)
            world.lines.step(steps[tokens])
        say(check={"logits_disk_restarted": right})
        if right:
            row(tokens, "disk_restarted", samples)
    drive.close()
    end({"open": world.opens})


def main(what: str, arguments: str) -> None:
    """Lives."""
    given = json.loads(arguments)
    life = Life(**given["life"])
    say(phase=f"a process starts: {life.shape['about']}")
    if what == "first":
        first(life)
    else:
        rounds, steps = ({int(n): v for n, v in given[key].items()} for key in ("rounds", "steps"))
        second(life, rounds, steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
