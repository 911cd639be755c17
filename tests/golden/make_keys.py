"""Writes keys.txt: key chains computed from docs/formats/keys.md with hashlib alone, none of kvtier's code.

Usage: python tests/golden/make_keys.py > tests/golden/keys.txt
"""

from __future__ import annotations

import hashlib
import struct
import sys

Extra = tuple[int, int, bytes]


def root_key(fields: list[bytes]) -> bytes:
    message = struct.pack("<Q", len(fields))
    for field in fields:
        message += struct.pack("<Q", len(field)) + field
    return hashlib.sha256(message).digest()


def chain_keys(parent: bytes, tokens: list[int], block_tokens: int, extras: list[Extra]) -> list[bytes]:
    keys = []
    for begin in range(0, len(tokens) - block_tokens + 1, block_tokens):
        end = begin + block_tokens
        message = parent + struct.pack(f"<{block_tokens}i", *tokens[begin:end])
        overlapping = [e for e in extras if e[0] < end and e[1] > begin]
        if overlapping:
            digest = hashlib.sha256()
            for first, last, content in overlapping:
                digest.update(struct.pack("<qQQ", first - begin, min(last, end) - begin, len(content)))
                digest.update(content)
            message += digest.digest()
        parent = hashlib.sha256(message).digest()
        keys.append(parent)
    return keys


def cases() -> list[tuple[str, list[bytes], list[int], int, list[Extra]]]:
    fields = [b"kvtier keys 1", b"model@revision", b"layout", b"tenant"]
    tokens = list(range(100, 133))
    image, other = hashlib.sha256(b"image").digest(), b"x"
    overlapping = [(-20, 33, image), (2, 3, other), (2, 20, b""), (16, 17, other)]
    return [
        ("no_fields_no_tokens", [], [], 16, []),
        ("one_block", fields, tokens[:16], 16, []),
        ("two_blocks_and_a_partial_one", fields, tokens, 16, []),
        ("another_tenant", [*fields[:3], b"tenant2"], tokens, 16, []),
        ("a_byte_moves_between_fields", [*fields[:2], b"layoutt", b"enant"], tokens, 16, []),
        ("an_empty_field", [*fields, b""], tokens, 16, []),
        ("one_token_blocks", fields, tokens[:5], 1, []),
        ("a_block_is_longer_than_the_prompt", fields, tokens, 64, []),
        ("extreme_tokens", fields, [-1, -(2**31), 2**31 - 1, 0], 2, []),
        ("extra_in_one_block", fields, tokens, 8, [(10, 14, image)]),
        ("extra_over_three_blocks", fields, tokens, 8, [(6, 18, image)]),
        ("extra_that_began_before", fields, tokens, 8, [(-5, 3, image)]),
        ("extra_in_the_partial_block", fields, tokens, 8, [(32, 33, image)]),
        ("extras_that_overlap", fields, tokens, 8, overlapping),
    ]


def main() -> None:
    lines = ["# Written by make_keys.py; read by tests/cpp/core/key_chain_test.cpp. In hex, - for none."]
    for name, fields, tokens, block_tokens, extras in cases():
        root = root_key(fields)
        lines += [f"case {name}"]
        lines += [f"field {field.hex() or '-'}" for field in fields]
        lines += [f"root {root.hex()}", f"block_tokens {block_tokens}"]
        lines += [f"token {token}" for token in tokens]
        lines += [f"extra {begin} {end} {content.hex() or '-'}" for begin, end, content in extras]
        lines += [f"key {key.hex()}" for key in chain_keys(root, tokens, block_tokens, extras)]
        lines += ["end"]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
