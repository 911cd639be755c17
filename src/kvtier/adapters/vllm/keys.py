"""BlockKeys: kvtier's keys of a request, made of vLLM's own block hashes. Pure.

vLLM's hash of a block covers its tokens, all before it, and what they depend on: LoRA name, image hashes,
cache_salt. The rest (model, weights, layouts, tenant, the adapter's weights) is in a root of 32
random-looking bytes, which is added (exclusive or) to every hash. For one root different hashes have
different keys; for two roots equal keys would need two hashes whose difference is that of two SHA-256 values.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvtier.errors import ConfigError
from kvtier.keys import KEY_BYTES, Keys

_PIECE = 2048


class BlockKeys:
    """The keys of one request's blocks; grows with the request. Not for several threads at once."""

    def __init__(self, root: bytes, hashes_per_block: int) -> None:
        """Begins without blocks.

        Args:
            root: 32 bytes.
            hashes_per_block: Consecutive vLLM hashes that make one block; the last one names it.
        """
        self._root = np.frombuffer(root, np.uint64)
        self._each = hashes_per_block
        self._keys: Keys = np.empty((0, KEY_BYTES), np.uint8)
        self._count = 0
        self._last = b""  # hash of the last block taken

    def update(self, block_hashes: Sequence[bytes]) -> int:
        """Takes over what vLLM has hashed by now.

        Args:
            block_hashes: Request.block_hashes: one hash for every full run of tokens.

        Returns:
            Blocks that have a key.

        Raises:
            ConfigError: Hashes of more than 32 bytes, or of different lengths.
        """
        count = len(block_hashes) // self._each
        if self._count and (
            count < self._count or bytes(block_hashes[self._count * self._each - 1]) != self._last
        ):
            self._count = 0  # vLLM rewrote the request's tokens (a streaming session)
        if count > self._count:
            self._append(block_hashes[(self._count + 1) * self._each - 1 : count * self._each : self._each])
        return self._count

    def _append(self, hashes: Sequence[bytes]) -> None:
        end = self._count + len(hashes)
        if end > len(self._keys):
            grown = np.empty((max(end, 2 * len(self._keys)), KEY_BYTES), np.uint8)
            grown[: self._count] = self._keys[: self._count]
            self._keys = grown
        rows = self._keys[self._count : end].view(np.uint64)
        for begin in range(0, len(hashes), _PIECE):  # pieces that stay in the processor's cache
            piece = hashes[begin : begin + _PIECE]
            words = _joined(piece)
            for word, of_root in enumerate(self._root):  # long columns: five times quicker than short rows
                np.bitwise_xor(words[:, word], of_root, out=rows[begin : begin + _PIECE, word])
        self._count = end
        self._last = bytes(hashes[-1])

    def rows(self, begin: int, end: int) -> Keys:
        """Keys of blocks [begin, end), [end - begin, 32]; valid until the next update()."""
        return self._keys[begin : min(end, self._count)]


def _joined(hashes: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """Hashes of one length, filled up with zeros, [len(hashes), 4]."""
    length = len(hashes[0])
    joined = b"".join(hashes)
    if length > KEY_BYTES or len(joined) != length * len(hashes):
        raise ConfigError(
            f"a block hash of vLLM has {length} bytes; allowed: at most {KEY_BYTES}, all of one length"
        )
    plain = np.frombuffer(joined, np.uint8).reshape(-1, length)
    if length < KEY_BYTES:
        plain = np.pad(plain, ((0, 0), (0, KEY_BYTES - length)))
    return plain.view(np.uint64)
