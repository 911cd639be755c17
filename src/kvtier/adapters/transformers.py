"""KVTierCache: a Hugging Face transformers cache whose contents kvtier keeps and brings back.

Keys and values live in buffers `[1, num_kv_heads, capacity, head_dim]`, one for the keys and one for the
values of each layer, allocated once. `update()` writes new tokens in place and returns views, so attention
reads the very bytes that kvtier moves. To the engine the same memory is a list of pages: page `p` holds the
tokens `[p * page_tokens, (p + 1) * page_tokens)`, seen through strides as `[num_pages, num_kv_heads,
page_tokens, head_dim]`. Nothing is ever copied into another layout.

    layout = layout_of(model, page_tokens=64)
    config = kvtier.Config(groups=[layout], block_tokens=64, model="my-model@rev", host="8GiB")
    with kvtier.open(config) as engine, KVTierCache(engine, model, capacity=8192) as cache:
        restored = cache.restore(token_ids)                        # tokens that need no prefill
        out = model(torch.tensor([token_ids[restored:]]), past_key_values=cache)
        cache.save(token_ids)                                      # and now others need none either

Source of the interface: `transformers.cache_utils`, release 5 (`Cache`, `CacheLayerMixin`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, CacheLayerMixin

from kvtier.engine import Engine, LoadTicket, Pages, Ticket
from kvtier.errors import ConfigError, KVTierError, ResourceError, UnsupportedError
from kvtier.keys import block_keys
from kvtier.layout import KVLayout

__all__ = ["KVTierCache", "layout_of"]

# Per-layer keys and values as [num_pages, num_kv_heads, page_tokens, head_dim].
_PAGE_ORDER = "KHTD"
_TENSOR_AXES = "PHTD"

TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]] | torch.Tensor"
TokenArray: TypeAlias = "NDArray[np.integer[Any]]"


def layout_of(model: Any, *, page_tokens: int, dtype: str | torch.dtype | None = None) -> KVLayout:
    """The layout of a transformers model's cache, for `kvtier.Config(groups=[...])`.

    Args:
        model: A `PreTrainedModel`, or its configuration.
        page_tokens: Tokens in a page.
        dtype: Of keys and values; the model's by default.

    Raises:
        UnsupportedError: The model does not keep plain keys and values of every token in every layer:
            sliding windows, linear attention, latent attention, layers that share a cache. Or they depend on
            more than the tokens up to there: on the prompt's length (rope_type "dynamic" and "longrope"), or
            on what an encoder was given.
    """
    config = _text_config(model)
    if getattr(getattr(model, "config", model), "is_encoder_decoder", False):
        raise UnsupportedError(f"KVTierCache supports decoders alone; {type(config).__name__} has an encoder")
    _require_full_attention(config)
    _require_lasting_positions(config)
    heads = config.num_attention_heads
    chosen = dtype or getattr(model, "dtype", None) or getattr(config, "dtype", None) or torch.float32
    return KVLayout(
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=str(chosen).removeprefix("torch."),
        page_tokens=page_tokens,
        page_order=_PAGE_ORDER,
    )


class KVTierCache(Cache):
    """The cache of one sequence (batch size 1) that restores and saves through an engine. For inference.

    Owns its buffers. Borrows the engine, which must outlive it: `close()`, or leave the `with` block, first.
    Threads: one at a time, like every transformers cache.

    Args:
        engine: Its configuration has one group, whose layout is `layout_of(model, ...)`.
        model: The `PreTrainedModel` (or its configuration) that will run with this cache.
        capacity: Tokens it holds at most; rounded up to whole blocks and pages.
        device: Where the buffers are; the model's device by default.
        namespace: Of the keys: what is saved under one is never restored under another.
        extra: Whatever else the keys and values depend on, such as the name of a LoRA adapter.

    Raises:
        ConfigError: The engine's group does not describe this model's cache.
        UnsupportedError: See `layout_of`; or the engine has several groups.
    """

    def __init__(
        self,
        engine: Engine,
        model: Any,
        capacity: int,
        *,
        device: str | torch.device | None = None,
        namespace: str = "",
        extra: bytes = b"",
    ) -> None:
        config = engine.config
        if len(config.groups) != 1:
            raise UnsupportedError(f"KVTierCache needs an engine with one group; it has {len(config.groups)}")
        layout = config.groups[0]
        wanted = layout_of(model, page_tokens=layout.page_tokens, dtype=str(layout.dtype))
        if layout.fingerprint() != wanted.fingerprint():
            raise ConfigError(f"groups[0] is {layout}; this model's cache is {wanted}")
        if capacity <= 0:
            raise ConfigError(f"capacity={capacity}: must be positive")
        self._engine = engine
        self._layout = layout
        self._block_tokens = config.block_tokens
        self._namespace = namespace
        self._extra = extra
        unit = math.lcm(layout.page_tokens, config.block_tokens)
        self._capacity = -(-capacity // unit) * unit
        shape = (1, layout.num_kv_heads, self._capacity, layout.head_dim)
        where = device or getattr(model, "device", None) or "cpu"
        dtype = getattr(torch, str(layout.dtype))
        layers = [_Layer(shape, dtype, torch.device(where)) for _ in range(layout.num_layers)]
        super().__init__(layers=list(layers))
        self._layers = layers
        self._pages = self._attached()
        self._saving: Ticket | None = None
        self._loading: LoadTicket | None = None
        self._interrupted = False  # between the start of a transfer and its ticket

    @property
    def capacity(self) -> int:
        """Tokens it holds at most."""
        return self._capacity

    @property
    def num_tokens(self) -> int:
        """Tokens it holds now, in every layer."""
        return min(layer.length for layer in self._layers)

    def buffers(self) -> list[torch.Tensor]:
        """Keys and values of each layer in turn, whole: `[1, num_kv_heads, capacity, head_dim]`."""
        return [part for layer in self._layers for part in layer.parts()]

    def restore(self, token_ids: TokenIds) -> int:
        """Forgets what it holds and brings back the longest saved prefix of `token_ids`. Waits for the copy.

        At least the last token is left to the model, which has to compute it to say what comes next. Ctrl-C
        ends the wait and leaves it empty; whatever uses the cache next waits until the copy is over. On a GPU
        it is ordered behind torch's current stream.

        Args:
            token_ids: The whole prompt, `[n]` or `[1, n]`; int32 is fastest.

        Returns:
            How many tokens were restored: a multiple of the engine's `block_tokens`, 0 if nothing was saved.
            The model is to be given the others.

        Raises:
            ClosedError: The engine or this cache is closed.
        """
        self.reset()
        ids = _token_array(token_ids)
        num_blocks = min(len(ids) - 1, self._capacity) // self._block_tokens
        if num_blocks <= 0:
            return 0
        match = self._engine.lookup(self._keys(ids, num_blocks))
        if match.ready_blocks == 0:
            return 0
        page_ids = self._page_ids(match.ready_blocks)
        with self._starting():
            ticket = self._loading = self._engine.load(match, self._pages, page_ids, stream=self._stream())
        self._settle()  # a failed load whose copies may still run must not meet the model's writes
        restored = int(ticket.result().valid_tokens)
        for layer in self._layers:
            layer.length = restored
        return restored

    def save(self, token_ids: TokenIds) -> Ticket:
        """Hands every whole block that the model has computed to the engine. Does not wait for the copy.

        Blocks that are there already are not copied again. On a GPU the copy is ordered behind torch's
        current stream: call it under the one on which the model ran.

        Args:
            token_ids: What the cache holds, from the first token on, `[n]` or `[1, n]`; tokens that the model
                has not seen yet may follow and are ignored. The cache cannot tell whether these are the
                tokens it was filled with.

        Returns:
            The ticket: others find the blocks once it is done. It may be dropped.

        Raises:
            ClosedError: The engine or this cache is closed.
        """
        self._settle()
        ids = _token_array(token_ids)
        num_blocks = min(len(ids), self.num_tokens) // self._block_tokens
        keys = self._keys(ids, num_blocks)
        page_ids, stream = self._page_ids(num_blocks), self._stream()
        with self._starting():
            ticket = self._saving = self._engine.store(
                keys, self._pages, page_ids, stream=stream, namespace=self._namespace
            )
        return ticket

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends to a layer. Waits for the copies of an interrupted `restore` first, never for others."""
        if self._loading is not None or self._interrupted:
            self._settle()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        """Forgets every token. The buffers stay; waits until a running `save` has read them."""
        self._settle()
        for layer in self._layers:
            layer.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens (a number <= 0, as transformers wants it)."""
        self._settle()
        super().crop(tokens_to_remove)

    def close(self) -> None:
        """Detaches the buffers from the engine. Waits for running copies. Idempotent."""
        self._pages.detach()
        self._saving = self._loading = None
        self._interrupted = False

    def __enter__(self) -> KVTierCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attached(self) -> Pages:
        parts = [_as_pages(part, self._layout.page_tokens) for part in self.buffers()]
        return self._engine.attach(parts, axes=_TENSOR_AXES)

    def _stream(self) -> Any:
        # The kernels that write and read the buffers run there; on the CPU there is only None.
        device = self._layers[0].device
        return torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        try:
            yield
        except KVTierError:  # nothing was started
            raise
        except BaseException:  # such as Ctrl-C
            self._interrupted = True
            raise

    def _settle(self) -> None:
        # A store reads the buffers until it is released; appending does not touch what it reads. A load
        # writes them. What Ctrl-C ends here is waited for the next time.
        if self._saving is not None:
            self._saving.released.wait()
            self._saving = None
        if self._loading is not None:
            self._loading.released.wait()
            self._loading = None
        if self._interrupted:  # a transfer may run whose ticket nobody has: detaching waits for it too
            self._pages.detach()
            self._pages = self._attached()
            self._interrupted = False

    def _keys(self, ids: TokenArray, num_blocks: int) -> NDArray[np.uint8]:
        whole = ids[: num_blocks * self._block_tokens]
        return block_keys(whole, self._engine.config, namespace=self._namespace, extra=self._extra)

    def _page_ids(self, num_blocks: int) -> NDArray[np.int64]:
        page_tokens = self._layout.page_tokens
        if page_tokens <= self._block_tokens:
            return np.arange(num_blocks * (self._block_tokens // page_tokens), dtype=np.int64)
        return np.arange(num_blocks, dtype=np.int64) // (page_tokens // self._block_tokens)


class _Layer(CacheLayerMixin):
    """Keys and values `[1, num_kv_heads, capacity, head_dim]` of one layer; `length` tokens of it count."""

    is_croppable = True
    supports_early_init = False

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.dtype, self.device = dtype, self.keys.device  # with its index
        self.is_initialized = True
        self.length = 0

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, whole."""
        return self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the engine knows the buffers from the beginning."""

    @torch.no_grad()
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `[1, num_kv_heads, n, head_dim]` in place; returns views of all tokens so far."""
        for new, part in zip((key_states, value_states), self.parts(), strict=True):
            self._check(new, part)
        begin, end = self.length, self.length + key_states.shape[2]
        self.keys[:, :, begin:end].copy_(key_states)
        self.values[:, :, begin:end].copy_(value_states)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` will return for `query_length` new tokens."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens it holds."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens it can hold."""
        return int(self.keys.shape[2])

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: must not be positive")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:  # noqa: ARG002
        """Refused: there is one sequence."""
        raise UnsupportedError("KVTierCache holds one sequence: beam search is not supported")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused, unless it changes nothing: there is one sequence."""
        if repeats != 1:
            raise UnsupportedError(f"KVTierCache holds one sequence: it cannot be repeated {repeats} times")

    def batch_select_indices(self, indices: torch.Tensor) -> None:  # noqa: ARG002
        """Refused: there is one sequence."""
        raise UnsupportedError("KVTierCache holds one sequence: none can be selected")

    def offload(self) -> None:
        """Refused: the engine knows the buffers by their address."""
        raise UnsupportedError("KVTierCache cannot move its buffers: it offloads through the engine")

    def _check(self, new: torch.Tensor, part: torch.Tensor) -> None:
        if new.shape[0] != 1:
            raise UnsupportedError(f"KVTierCache holds one sequence; got a batch of {new.shape[0]}")
        if new.shape[1] != part.shape[1] or new.shape[3] != part.shape[3] or new.dtype != part.dtype:
            raise UnsupportedError(
                f"the model hands over {tuple(new.shape)} of {new.dtype}; the engine's layout has "
                f"{part.shape[1]} heads of {part.shape[3]} {part.dtype}"
            )
        if self.length + new.shape[2] > part.shape[2]:
            raise ResourceError(
                f"a cache of {part.shape[2]} tokens holds {self.length}: no room for {new.shape[2]} more"
            )


def _as_pages(part: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """`[1, H, capacity, D]` seen as `[capacity / page_tokens, H, page_tokens, D]`: the same memory."""
    _, heads, capacity, dim = part.shape
    return part[0].view(heads, capacity // page_tokens, page_tokens, dim).transpose(0, 1)


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", model)
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if get else config


def _require_full_attention(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None) is not None:
        kinds = {"sliding_attention"}
    if getattr(config, "kv_lora_rank", None) is not None:
        kinds = {"latent attention"}
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0):
        kinds = {"layers that share a cache"}
    if kinds != {"full_attention"}:
        raise UnsupportedError(
            f"KVTierCache supports full attention in every layer; {type(config).__name__} has {sorted(kinds)}"
        )


def _require_lasting_positions(config: Any) -> None:
    """Refuses rotary embeddings whose frequencies, and so all keys, change as the prompt grows."""
    for name in ("rope_parameters", "rope_scaling"):
        options = getattr(config, name, None) or {}
        for each in (options, *options.values()):  # of all layers, or by layer type
            kind = str(each.get("rope_type", each.get("type"))) if isinstance(each, Mapping) else ""
            if "dynamic" in kind or kind in ("longrope", "su"):
                raise UnsupportedError(
                    "KVTierCache supports rotary embeddings that do not depend on the prompt's length; "
                    f"{type(config).__name__} has {name} of rope_type {kind!r}"
                )


def _token_array(token_ids: TokenIds) -> TokenArray:
    if isinstance(token_ids, torch.Tensor):
        token_ids = token_ids.detach().cpu().numpy()
    ids: NDArray[Any] = np.asarray(token_ids)
    if ids.size == 0:
        ids = ids.astype(np.int32)
    if ids.ndim == 2 and ids.shape[0] != 1:
        raise UnsupportedError(f"KVTierCache holds one sequence; got token ids of a batch of {ids.shape[0]}")
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise ConfigError(f"token_ids: {ids.ndim} dimensions of {ids.dtype}; must be integers [n] or [1, n]")
    return np.ascontiguousarray(ids.reshape(-1))
