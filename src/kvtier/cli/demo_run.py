"""The demo's measurements: time to first token with and without what was saved, and the proofs of equality.

TTFT is everything from token ids to next-token logits: hashing the keys, lookup, load, and the model on what
is left. Every run computes in the same pieces - the prefix in chunks, then a suffix of 128 tokens - because a
matrix product of another shape may round differently: so equal bytes give logits that are equal bit by bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvtier.adapters.transformers import KVTierCache
from kvtier.cli.progress import Progress
from kvtier.engine import copy_limit

SUFFIX_TOKENS = 128


@dataclass
class Times:
    """Seconds, one entry a run; `restore` and `memcpy` alternate and move the same number of bytes."""

    cold: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    restore: list[float] = field(default_factory=list)
    memcpy: list[float] = field(default_factory=list)
    save: list[float] = field(default_factory=list)


@dataclass
class Run:
    """One prompt through one model and one cache.

    Attributes:
        model: A transformers causal language model.
        cache: Empty, of an engine that holds nothing of this prompt.
        token_ids: `[prefix + SUFFIX_TOKENS]`; the prefix is whole blocks.
        chunk_tokens: How the prefix is cut.
        copy_threads: Of the engine, and so of the memcpy beside it.
        progress: Told about computed tokens.
    """

    model: Any
    cache: KVTierCache
    token_ids: Any
    chunk_tokens: int
    copy_threads: int
    progress: Progress
    times: Times = field(default_factory=Times)
    checks: dict[str, bool] = field(default_factory=dict)
    expected: Any = None

    @property
    def prefix(self) -> int:
        """Tokens before the suffix."""
        return len(self.token_ids) - SUFFIX_TOKENS

    def warm_up(self) -> None:
        """Runs one chunk and one suffix, so that the first measurement pays for no first use."""
        self.progress.phase("warm-up")
        for ids in (self.token_ids[: min(self.chunk_tokens, self.prefix)], self.token_ids[:SUFFIX_TOKENS]):
            self._forward(ids)
            self.cache.reset()

    def cold(self) -> None:
        """Nothing is saved: the whole prompt is computed."""
        self.progress.phase(f"cold: computing {len(self.token_ids)} tokens")
        begin = time.perf_counter()
        restored = self.cache.restore(self.token_ids)
        logits = self._compute(restored)
        self.times.cold.append(time.perf_counter() - begin)
        if self.expected is None:
            self.expected = logits
        self._check("cold_restored_nothing", restored == 0)
        self._check("identical_logits", torch.equal(logits, self.expected))

    def save(self) -> None:
        """Hands the prefix to the engine."""
        self.progress.phase("saving the prefix in the host tier")
        begin = time.perf_counter()
        result = self.cache.save(self.token_ids[: self.prefix]).result()
        self.times.save.append(time.perf_counter() - begin)
        self._check("saved_whole_prefix", result.error is None)

    def device(self) -> None:
        """The prefix is still in the cache: only the suffix is computed."""
        self.progress.phase("prefix still in the cache")
        begin = time.perf_counter()
        self.cache.crop(self.prefix - self.cache.num_tokens)
        logits = self._compute(self.prefix)
        self.times.device.append(time.perf_counter() - begin)
        self._check("identical_logits", torch.equal(logits, self.expected))

    def host(self) -> None:
        """The prefix comes from the host tier."""
        self.restored("host")

    def restored(self, tier: str) -> Any:
        """The prefix comes from a tier, "host" or "disk", and only the suffix is computed; the logits."""
        self.progress.phase(f"prefix from the {tier} tier")
        self._poison()
        begin = time.perf_counter()
        restored = self.cache.restore(self.token_ids)
        middle = time.perf_counter()
        logits = self._compute(restored)
        getattr(self.times, tier).append(time.perf_counter() - begin)
        self.times.restore.append(middle - begin)
        self._check("restored_whole_prefix", restored == self.prefix)
        self._check("identical_logits", torch.equal(logits, self.expected))
        return logits

    def machine_copy(self, source: Any, destination: Any) -> None:
        """The same bytes by plain copies, the faster of two kinds."""
        self.times.memcpy.append(
            min(
                copy_limit(destination, source, method=method, threads=self.copy_threads)
                for method in ("memcpy", "streaming")
            )
        )

    def control(self, block_tokens: int) -> None:
        """One restored block is damaged - the sign of all its numbers - and the logits must show it."""
        self.progress.phase("control: one damaged block")
        self._poison()
        self.cache.restore(self.token_ids)
        first = self.prefix // block_tokens // 2 * block_tokens
        for part in self.cache.buffers():
            part[:, :, first : first + block_tokens].neg_()
        logits = self._compute(self.prefix)
        differs = not torch.equal(logits, self.expected) and bool(torch.isfinite(logits).all())
        self._check("control_differs", differs)

    def _compute(self, begin: int) -> Any:
        """Logits after the last token, `[vocabulary]`, when the cache holds the first `begin` tokens."""
        while begin < self.prefix:
            end = min(begin + self.chunk_tokens, self.prefix)
            self._forward(self.token_ids[begin:end])
            self.progress.step(end - begin)
            begin = end
        logits = self._forward(self.token_ids[self.prefix :])
        self.progress.step(SUFFIX_TOKENS)
        return logits

    def _forward(self, ids: Any) -> Any:
        with torch.inference_mode():
            batch = torch.from_numpy(ids.astype(np.int64))[None]
            out = self.model(batch, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].clone()

    def _poison(self) -> None:
        # What is not brought back must not be there still: with NaN it shows in the logits.
        for part in self.cache.buffers():
            part.fill_(float("nan"))

    def _check(self, name: str, passed: bool) -> None:
        self.checks[name] = self.checks.get(name, True) and passed


def repeat(times: int, *steps: Callable[[], None]) -> None:
    """Runs the steps in turn, so that whatever slows the machine down meets all of them."""
    for _ in range(times):
        for step in steps:
            step()
