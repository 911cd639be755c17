"""block_keys(): the 32-byte names of a prompt's blocks.

A key is SHA-256 over the key before it, the block's token ids and what else the block depends on; the first
one follows a root made of namespace, model, layouts and extra content (csrc/core/include/kvtier/core/
key_chain.h, docs/formats/keys.md). Equal keys mean equal tokens in equal context under equal weights.
"""

import contextlib
import operator
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier import _core
from kvtier.config import Config
from kvtier.errors import ConfigError

Keys = npt.NDArray[np.uint8]
Span = tuple[int, int, bytes]

KEY_BYTES = 32
_MAX_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class KeyExtra:
    """What blocks depend on besides their token ids.

    Attributes:
        prompt: Content that the whole prompt depends on: name of a LoRA adapter, a salt.
        spans: (begin, end, content) for runs of tokens: the hash of an image behind placeholder tokens. The
            range is half-open and counted from token_ids[0]; with a parent it may begin below 0.
    """

    prompt: bytes = b""
    spans: Sequence[Span] = ()


def block_keys(
    token_ids: Any,
    config: Config,
    namespace: str = "",
    extra: bytes | Iterable[Span] | KeyExtra | None = None,
    parent: Any = None,
) -> Keys:
    """Makes the keys of the whole blocks of a prompt; a last partial block has none.

    Pure. Releases the GIL. A contiguous int32 array is read without a copy (1M tokens take about 10 ms).

    Args:
        token_ids: Token ids [num_tokens], 0 or more and within int32: any integer array or sequence.
        config: The engine's config; its model, layouts and block_tokens go into the keys.
        namespace: The tenant. Namespaces never share a block.
        extra: What the blocks depend on besides: bytes for the whole prompt, (begin, end, bytes) spans, or
            a KeyExtra for both.
        parent: Key of the block before token_ids[0]: 32 bytes or a row of an earlier result. It continues
            that chain, and namespace and whole-prompt extra, which are in it already, are not looked at.

    Returns:
        Keys [num_tokens // block_tokens, 32], uint8, contiguous.

    Raises:
        ConfigError: An argument is not allowed.
    """
    tokens = token_array(token_ids)
    given = _extra_of(extra)
    if parent is None:
        first = root_key(config, namespace, given.prompt)
    else:
        first = key_bytes(parent, "parent")
    spans = _checked_spans(given.spans, -(2**62) if parent is not None else 0, len(tokens))
    return _core.chain_keys(first, tokens, config.block_tokens, spans)


@dataclass(frozen=True, slots=True)
class KeyChain:
    """What the keys of a prompt that grows are made from besides its tokens.

    What is wrong with it `of` says; no token that comes later makes anything of it wrong.

    Attributes:
        root: Key that stands before the first block.
        spans: (begin, end, content), sorted, counted from the prompt's first token.
        block_tokens: Tokens of a block.
    """

    root: bytes
    spans: Sequence[Span]
    block_tokens: int

    @classmethod
    def of(cls, config: Config, namespace: str, extra: Any) -> "KeyChain":
        """Reads what block_keys() takes; but spans may reach beyond the tokens, over those still to come.

        Raises:
            ConfigError: An argument is not allowed.
        """
        given = _extra_of(extra)
        spans = _checked_spans(given.spans, 0, None)
        return cls(root_key(config, namespace, given.prompt), spans, config.block_tokens)

    def more(self, tokens: npt.NDArray[np.int32], keys: Keys) -> Keys:
        """Makes the keys of the whole blocks behind those that `keys` has, as block_keys() makes all.

        Args:
            tokens: All tokens from the first, as of token_array().
            keys: Of the blocks at their beginning.
        """
        begin, end = len(keys) * self.block_tokens, len(tokens) // self.block_tokens * self.block_tokens
        parent = keys[-1].tobytes() if len(keys) else self.root
        # What lies behind the whole blocks is not in their keys (docs/formats/keys.md).
        spans = [
            (first - begin, min(last, end) - begin, content)
            for first, last, content in self.spans
            if first < end and last > begin
        ]
        return _core.chain_keys(parent, tokens[begin:end], self.block_tokens, spans)


def empty_keys(count: int) -> Keys:
    """Memory for `count` keys, uint8 [count, 32]; what stands there is anything.

    As np.empty(), but that large arrays come from what the last one has left, without new pages.
    """
    return _core.empty_keys(count)


def mix_hashes(hashes: Sequence[bytes], first: int, step: int, root: bytes, keys: Keys) -> None:
    """Makes keys of a framework's own block hashes: each is combined (exclusive or) with a root.

    Args:
        hashes: At most 32 bytes each, all of one length; quickest as a list. Shorter ones are filled up with
            zeros.
        first: Index of the hash of the first key.
        step: From one to the next.
        root: 32 bytes, random-looking: what the hashes do not cover.
        keys: Is filled, uint8 [n, 32], contiguous.

    Raises:
        ConfigError: An argument is not allowed; what stands in `keys` then is anything.
    """
    _core.mix_hashes(hashes, first, step, root, keys)


def check_namespace(namespace: object) -> str:
    """Returns the namespace; raises ConfigError if it is not a str that UTF-8 can hold."""
    if isinstance(namespace, str):
        with contextlib.suppress(UnicodeEncodeError):
            namespace.encode()
            return namespace
    raise ConfigError(f"namespace is {namespace!a}; allowed: a str that UTF-8 can hold")


def root_key(config: Config, namespace: str = "", prompt: bytes = b"") -> bytes:
    """Key that stands before the first block of every prompt of a namespace: 32 bytes.

    Args:
        config: The engine's config.
        namespace: The tenant.
        prompt: Content that the whole prompt depends on.

    Raises:
        ConfigError: The namespace is not a str.
    """
    encoded = check_namespace(namespace).encode()
    fingerprints = b"".join(layout.fingerprint() for layout in config.groups)
    shape = struct.pack("<III", len(config.groups), config.block_tokens, config.world_size)
    fields = [b"kvtier.keys.v1", encoded, config.model.encode(), shape + fingerprints, prompt]
    return _core.root_key(fields)


def key_bytes(key: Any, name: str = "key") -> bytes:
    """Returns one key as bytes; raises ConfigError if it is not 32 bytes."""
    try:
        raw = key.tobytes() if isinstance(key, np.ndarray) else bytes(memoryview(key))
    except TypeError:
        raise ConfigError(f"{name} is {key!r}; allowed: {KEY_BYTES} bytes") from None
    if len(raw) != KEY_BYTES:
        raise ConfigError(f"{name} has {len(raw)} bytes; allowed: {KEY_BYTES}")
    return raw


def token_array(token_ids: Any) -> npt.NDArray[np.int32]:
    """Reads token ids: contiguous int32 [num_tokens], without a copy where they are that already.

    Raises:
        ConfigError: Not one row of integers from 0 to 2**31 - 1.
    """
    try:
        tokens = np.asarray(token_ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"token_ids cannot be read as an array: {error}") from error
    if tokens.ndim != 1:
        raise ConfigError(f"token_ids has shape {tokens.shape}; allowed: one axis, [num_tokens]")
    if tokens.size == 0:
        return np.empty(0, np.int32)
    if tokens.dtype.kind not in "iu":
        raise ConfigError(f"token_ids has dtype {tokens.dtype}; allowed: integers")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > _MAX_TOKEN:
        index = int(np.argmin(tokens) if low < 0 else np.argmax(tokens))
        raise ConfigError(f"token_ids[{index}] is {tokens[index]}; allowed: 0 to {_MAX_TOKEN}")
    return np.ascontiguousarray(tokens, np.int32)


def _extra_of(extra: object) -> KeyExtra:
    if extra is None:
        return KeyExtra()
    if isinstance(extra, KeyExtra):
        prompt: object = extra.prompt
        if not isinstance(prompt, bytes):
            raise ConfigError(f"extra.prompt is {prompt!r}; allowed: bytes")
        try:
            return KeyExtra(prompt, tuple(extra.spans))
        except TypeError:
            what = f"extra.spans is {extra.spans!r}; allowed: a list of (begin, end, bytes)"
            raise ConfigError(what) from None
    if isinstance(extra, (bytes, bytearray, memoryview)):
        return KeyExtra(prompt=bytes(extra))
    if isinstance(extra, Iterable) and not isinstance(extra, str):
        with contextlib.suppress(TypeError):
            return KeyExtra(spans=tuple(extra))
    raise ConfigError(f"extra is {extra!r}; allowed: bytes, a list of (begin, end, bytes) or a KeyExtra")


def _checked_spans(spans: Iterable[Span], lowest: int, highest: int | None) -> list[Span]:
    """The spans, sorted; `lowest`: where the first may begin, `highest`: where the last has to end."""
    checked: list[Span] = []
    for i, span in enumerate(spans):
        try:
            first, last, content = span
            begin, end = operator.index(first), operator.index(last)
            checked.append((begin, end, bytes(memoryview(content))))
        except (TypeError, ValueError):
            raise ConfigError(f"extra[{i}] is {span!r}; allowed: (begin, end, bytes)") from None
        if not (lowest <= begin < end and end > 0 and (highest is None or end <= highest)):
            what = "" if lowest else ", begin at 0 or later"
            what += "" if highest is None else f", end within [1, {highest}]"
            raise ConfigError(
                f"extra[{i}] covers tokens [{begin}, {end}); allowed: ranges that are not empty{what}"
            )
    return sorted(checked)
