"""A decoder with random weights that does the arithmetic of a shape: chunked prefill over a KV cache.

Llama's layer (arXiv:2302.13971: RMSNorm, rotary positions, SwiGLU) with grouped queries, or DeepSeek's latent
attention (arXiv:2405.04434, section 2.1) whose keys and values are made from the latents in every chunk.
Attention is torch's scaled_dot_product_attention over the cache in place. The cache's memory is what kvtier
attaches: page `p` holds tokens `[p * page_tokens, (p + 1) * page_tokens)`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch.nn.attention.bias import causal_lower_right

from kvtier.cli.shapes import Shape

_ROPE_BASE = 500_000.0


class Decoder:
    """One sequence's model and cache.

    Args:
        shape: What it computes.
        capacity: Tokens of the cache, whole pages.
        device: torch's name.
        dtype: Of weights and arithmetic.
        kv_dtype: Of the cache; another one is converted when read.
        own_weights: Every layer has its own; else one layer's serve all.
        seed: Of the weights: two processes with the same have the same model.
    """

    def __init__(
        self,
        shape: Shape,
        capacity: int,
        *,
        device: str,
        dtype: str,
        kv_dtype: str,
        own_weights: bool,
        seed: int,
    ) -> None:
        self.shape = shape
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._random = torch.Generator(self.device).manual_seed(seed)
        layers = [self._layer() for _ in range(shape.num_layers if own_weights else 1)]
        self._layers = [layers[i % len(layers)] for i in range(shape.num_layers)]
        self._vocabulary = self._matrix(shape.vocab_size, shape.hidden_size)  # embedding and output
        # Tokens outermost on a GPU, as its kernels want them; on a CPU heads, so that a head's keys follow
        # each other (of 64 numbers in bfloat16: 32 against 24 GFLOP/s in a suffix of 128 tokens).
        self.heads_first = self.device.type == "cpu"
        self.buffers: list[torch.Tensor] = []
        kv: torch.dtype = getattr(torch, kv_dtype)
        for _ in range(shape.num_layers):
            size: tuple[int, ...] = (capacity, shape.num_kv_heads, shape.head_dim)
            if shape.latent is not None:
                size = (capacity, shape.latent.cached_dim)
            elif self.heads_first:
                size = (shape.num_kv_heads, capacity, shape.head_dim)
            parts = 2 if shape.latent is None else 1
            self.buffers += [torch.zeros(size, dtype=kv, device=self.device) for _ in range(parts)]

    def _matrix(self, rows: int, columns: int) -> torch.Tensor:
        made = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        return made.normal_(0.0, 1 / math.sqrt(columns), generator=self._random)

    def _layer(self) -> dict[str, torch.Tensor]:
        s, hidden = self.shape, self.shape.hidden_size
        found = {
            "gate_up": self._matrix(2 * s.intermediate_size, hidden),
            "down": self._matrix(hidden, s.intermediate_size),
        }
        if (latent := s.latent) is None:
            found["qkv"] = self._matrix((s.num_heads + 2 * s.num_kv_heads) * s.head_dim, hidden)
            found["out"] = self._matrix(hidden, s.num_heads * s.head_dim)
            return found
        query = s.num_heads * (latent.key_dim + latent.rope_dim)
        found["query"] = self._matrix(query, latent.query_rank or hidden)
        if latent.query_rank is not None:
            found["query_down"] = self._matrix(latent.query_rank, hidden)
        found["latent"] = self._matrix(latent.cached_dim, hidden)
        found["expand"] = self._matrix(s.num_heads * (latent.key_dim + latent.value_dim), latent.rank)
        found["out"] = self._matrix(hidden, s.num_heads * latent.value_dim)
        return found

    def page_tensors(self, page_tokens: int) -> tuple[list[torch.Tensor], str]:
        """The cache as `Engine.attach` takes it, and the axes of each tensor."""
        if self.shape.latent is not None:
            return [b.view(-1, page_tokens, b.shape[-1]) for b in self.buffers], "PTD"
        if self.heads_first:
            each = [
                b.view(b.shape[0], -1, page_tokens, b.shape[-1]).permute(1, 0, 2, 3) for b in self.buffers
            ]
            return each, "PHTD"
        return [b.view(-1, page_tokens, *b.shape[1:]) for b in self.buffers], "PTHD"

    @property
    def page_order(self) -> str:
        """Of the layout, for separate keys and values."""
        return "KHTD" if self.heads_first else "KTHD"

    def tokens(self, begin: int, end: int) -> list[torch.Tensor]:
        """Views of the cache's tokens `[begin, end)`, one for each buffer."""
        heads_first = self.heads_first and self.shape.latent is None
        return [b[:, begin:end] if heads_first else b[begin:end] for b in self.buffers]

    def fill(self, begin: int, end: int, seed: int) -> None:
        """Puts random numbers where no prefill has been run."""
        random = torch.Generator(self.device).manual_seed(seed)
        for part in self.tokens(begin, end):
            for some in torch.split(part, 4096, dim=1 if part.dim() == 3 and self.heads_first else 0):
                made = torch.empty(some.shape, dtype=self.dtype, device=self.device)
                some.copy_(made.normal_(generator=random))

    def poison(self, end: int) -> None:
        """NaN in the first `end` tokens: what is not brought back shows in the logits."""
        for part in self.tokens(0, end):
            part.fill_(float("nan"))

    def damage(self, begin: int, end: int) -> None:
        """Other numbers in the tokens `[begin, end)`."""
        for part in self.tokens(begin, end):
            part.copy_((part.to(self.dtype) * -4).to(part.dtype))

    @property
    def gpu_uuid(self) -> str | None:
        """As NVML names the GPU (its numbers are not CUDA's); None without one."""
        if self.device.type != "cuda":
            return None
        return f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prefill(self, token_ids: Any, prefix: int) -> torch.Tensor:
        """Computes tokens behind the first `prefix`, whose KV is in the cache; waits for the device.

        Args:
            token_ids: int32 NumPy array [n].
            prefix: Tokens before them.

        Returns:
            The logits after the last one, float32 on the CPU, [vocab_size].
        """
        with torch.inference_mode():
            ids = torch.from_numpy(token_ids).to(self.device, torch.long)
            end = prefix + len(ids)
            x = self._vocabulary[ids] * math.sqrt(self.shape.hidden_size)
            rope_dim = self.shape.latent.rope_dim if self.shape.latent else self.shape.head_dim
            rotation = _rotation(prefix, end, rope_dim, self.device)
            bias = _bias(end - prefix, end, self.device, self.dtype)
            for index, layer in enumerate(self._layers):
                attend = self._attend if self.shape.latent is None else self._attend_latent
                x = x + attend(layer, index, _norm(x), prefix, rotation, bias)
                gate, up = (_norm(x) @ layer["gate_up"].T).chunk(2, dim=-1)
                x = x + (functional.silu(gate) * up) @ layer["down"].T
            return (_norm(x[-1]) @ self._vocabulary.T).float().cpu()

    def _attend(
        self,
        layer: dict[str, torch.Tensor],
        index: int,
        x: torch.Tensor,
        prefix: int,
        rotation: Any,
        bias: Any,
    ) -> torch.Tensor:
        s, n = self.shape, x.shape[0]
        heads = (x @ layer["qkv"].T).view(n, -1, s.head_dim).transpose(0, 1)  # [heads, n, head_dim]
        q, k, v = torch.split(heads, [s.num_heads, s.num_kv_heads, s.num_kv_heads])
        k, v = (
            self._cached(self.buffers[2 * index + part], new, prefix)
            for part, new in enumerate((_rotate(k, rotation), v))
        )
        out = functional.scaled_dot_product_attention(
            _rotate(q, rotation)[None], k, v, attn_mask=bias, enable_gqa=s.num_heads != s.num_kv_heads
        )
        return out[0].transpose(0, 1).reshape(n, -1) @ layer["out"].T

    def _cached(self, buffer: torch.Tensor, new: torch.Tensor, prefix: int) -> torch.Tensor:
        """Writes new keys or values [heads, n, head_dim] behind the prefix; all of them, a view if it can."""
        whole = buffer if self.heads_first else buffer.transpose(0, 1)
        end = prefix + new.shape[1]
        whole[:, prefix:end] = new.to(whole.dtype)
        return whole[None, :, :end].to(self.dtype)

    def _attend_latent(
        self,
        layer: dict[str, torch.Tensor],
        index: int,
        x: torch.Tensor,
        prefix: int,
        rotation: Any,
        bias: Any,
    ) -> torch.Tensor:
        s, n = self.shape, x.shape[0]
        assert s.latent is not None  # noqa: S101 - for the type checker
        latent, buffer = s.latent, self.buffers[index]
        down = _norm(x @ layer["query_down"].T) if latent.query_rank is not None else x
        q = (down @ layer["query"].T).view(n, s.num_heads, -1).transpose(0, 1)
        q_plain, q_rope = torch.split(q, [latent.key_dim, latent.rope_dim], dim=-1)
        q = torch.cat([q_plain, _rotate(q_rope, rotation)], dim=-1)
        new, rope = torch.split(x @ layer["latent"].T, [latent.rank, latent.rope_dim], dim=-1)
        buffer[prefix : prefix + n, : latent.rank] = _norm(new).to(buffer.dtype)
        buffer[prefix : prefix + n, latent.rank :] = _rotate(rope[None], rotation)[0].to(buffer.dtype)
        whole = buffer[: prefix + n].to(self.dtype)
        cached, ropes = torch.split(whole, [latent.rank, latent.rope_dim], dim=-1)
        heads = (cached @ layer["expand"].T).view(prefix + n, s.num_heads, -1).transpose(0, 1)
        k, v = torch.split(heads, [latent.key_dim, latent.value_dim], dim=-1)
        k = torch.cat([k, ropes[None].expand(s.num_heads, -1, -1)], dim=-1)
        v = functional.pad(v, (0, k.shape[-1] - v.shape[-1]))  # kernels want keys and values of one width
        out = functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias)
        return out[0, ..., : latent.value_dim].transpose(0, 1).reshape(n, -1) @ layer["out"].T


def _norm(x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],))


def _rotation(begin: int, end: int, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions `[begin, end)`, float32 [n, dim / 2] (arXiv:2104.09864)."""
    powers = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    positions = torch.arange(begin, end, device=device, dtype=torch.float32)
    angles = torch.outer(positions, _ROPE_BASE**-powers)
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates the halves of the last axis of [heads, n, dim] against each other."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _bias(n: int, end: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Token i of the last n sees the first `end - n + i + 1`."""
    if device.type == "cuda":
        return causal_lower_right(n, end)  # no matrix: the kernel knows it
    seen = torch.ones(n, end, dtype=torch.bool).tril(end - n)
    return torch.zeros(n, end, dtype=dtype).masked_fill_(~seen, float("-inf"))
