"""BlockKeys: kvtier's keys of a request, made of vLLM's own block hashes. Pure.

vLLM's hash of a block covers its tokens, all before it, and what they depend on: LoRA name, image hashes,
cache_salt. The rest (model, weights, layouts, tenant, the adapter's weights) is in a root of 32
random-looking bytes, which is added (exclusive or) to every hash. For one root different hashes have
different keys; for two roots equal keys would need two hashes whose difference is that of two SHA-256 values.
"""

from collections.abc import Sequence

from kvtier.keys import Keys, empty_keys, mix_hashes


class BlockKeys:
    """The keys of one request's blocks; grows with the request. Not for several threads at once."""

    def __init__(self, root: bytes, hashes_per_block: int) -> None:
        """Begins without blocks.

        Args:
            root: 32 bytes.
            hashes_per_block: Consecutive vLLM hashes that make one block; the last one names it.
        """
        self._root = root
        self._each = hashes_per_block
        self._keys: Keys = empty_keys(0)
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
            self._append(block_hashes, count)
        return self._count

    def _append(self, hashes: Sequence[bytes], end: int) -> None:
        """Takes over the keys of blocks up to `end`."""
        if end > len(self._keys):
            grown = empty_keys(max(end, 2 * len(self._keys)))
            grown[: self._count] = self._keys[: self._count]
            self._keys = grown
        each = self._each
        mix_hashes(hashes, (self._count + 1) * each - 1, each, self._root, self._keys[self._count : end])
        self._count = end
        self._last = bytes(hashes[end * each - 1])

    def rows(self, begin: int, end: int) -> Keys:
        """Keys of blocks [begin, end), [end - begin, 32]; valid until the next update()."""
        return self._keys[begin : min(end, self._count)]
