"""Writes slot/ and fuzz/slot/: slot images made from docs/formats/slot.md alone, none of kvtier's code.

XXH3-128 (its path for more than 240 bytes), AES-256 and GCM are written out here from their specifications,
so that the images are a second opinion on the core's.

Usage: python tests/golden/make_slots.py
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from pathlib import Path

HEADER_BYTES = 4096
MASK64 = 2**64 - 1

# --- XXH3-128, seed 0, more than 240 bytes (xxHash specification, "XXH3 algorithm for long inputs") ---------

P32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
P64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


def words(data: bytes, at: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}Q", data, at)


def accumulate(acc: list[int], stripe: tuple[int, ...], secret: tuple[int, ...]) -> None:
    for i in range(8):
        keyed = stripe[i] ^ secret[i]
        acc[i ^ 1] = (acc[i ^ 1] + stripe[i]) & MASK64
        acc[i] = (acc[i] + (keyed & 0xFFFFFFFF) * (keyed >> 32)) & MASK64


def merge(acc: list[int], secret_at: int, start: int) -> int:
    result = start
    for i in range(4):
        low, high = words(SECRET, secret_at + 16 * i, 2)
        product = (acc[2 * i] ^ low) * (acc[2 * i + 1] ^ high)
        result = (result + ((product & MASK64) ^ (product >> 64))) & MASK64
    result ^= result >> 37
    result = result * 0x165667919E3779F9 & MASK64
    return result ^ (result >> 32)


def checksum(data: bytes) -> bytes:
    size = len(data)
    assert size > 240, "shorter inputs take other paths of XXH3"
    acc = [P32[2], P64[0], P64[1], P64[2], P64[3], P32[1], P64[4], P32[0]]
    for stripe in range((size - 1) // 64):
        accumulate(acc, words(data, stripe * 64, 8), words(SECRET, stripe % 16 * 8, 8))
        if stripe % 16 == 15:
            for i, secret in enumerate(words(SECRET, 128, 8)):
                acc[i] = (acc[i] ^ (acc[i] >> 47) ^ secret) * P32[0] & MASK64
    accumulate(acc, words(data, size - 64, 8), words(SECRET, 121, 8))
    low = merge(acc, 11, size * P64[0] & MASK64)
    high = merge(acc, 117, ~(size * P64[1]) & MASK64)
    return struct.pack("<QQ", low, high)


# --- AES-256 (FIPS 197), GCM (NIST SP 800-38D), HKDF-SHA-256 (RFC 5869) -------------------------------------


def times(a: int, b: int) -> int:
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = (a << 1) ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


def make_sbox() -> bytes:
    inverse = [0] + [next(b for b in range(1, 256) if times(a, b) == 1) for a in range(1, 256)]
    box = bytearray()
    for value in inverse:
        rotations = [((value << n) | (value >> (8 - n))) & 0xFF for n in range(5)]
        box.append(rotations[0] ^ rotations[1] ^ rotations[2] ^ rotations[3] ^ rotations[4] ^ 0x63)
    return bytes(box)


SBOX = make_sbox()


def aes_round_keys(key: bytes) -> list[bytes]:
    schedule = [key[i : i + 4] for i in range(0, 32, 4)]
    rcon = 1
    for i in range(8, 60):
        word = schedule[-1]
        if i % 8 == 0:
            word = bytes(SBOX[b] for b in word[1:] + word[:1])
            word = bytes([word[0] ^ rcon]) + word[1:]
            rcon = times(rcon, 2)
        elif i % 8 == 4:
            word = bytes(SBOX[b] for b in word)
        schedule.append(xor(word, schedule[i - 8]))
    return [b"".join(schedule[i : i + 4]) for i in range(0, 60, 4)]


def xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def aes_block(round_keys: list[bytes], block: bytes) -> bytes:
    state = xor(block, round_keys[0])
    for number, round_key in enumerate(round_keys[1:], start=1):
        state = bytes(SBOX[state[(i + 4 * (i % 4)) % 16]] for i in range(16))  # SubBytes, ShiftRows
        if number < 14:
            mixed = bytearray()
            for c in range(0, 16, 4):
                column = state[c : c + 4]
                for r in range(4):
                    a, b, other, another = (column[(r + n) % 4] for n in range(4))
                    mixed.append(times(a, 2) ^ times(b, 3) ^ other ^ another)
            state = bytes(mixed)
        state = xor(state, round_key)
    return state


def ghash(subkey: int, data: bytes) -> int:
    total = 0
    for at in range(0, len(data), 16):
        total ^= int.from_bytes(data[at : at + 16], "big")
        product, shifted = 0, subkey
        for bit in range(127, -1, -1):
            product ^= shifted if total >> bit & 1 else 0
            shifted = (shifted >> 1) ^ (0xE1 << 120 if shifted & 1 else 0)
        total = product
    return total


def gcm(key: bytes, nonce: bytes, plain: bytes, aad: bytes) -> tuple[bytes, bytes]:
    """Ciphertext and tag."""
    round_keys = aes_round_keys(key)

    def stream(counter: int) -> bytes:
        return aes_block(round_keys, nonce + struct.pack(">I", counter))

    pad = b"".join(stream(2 + i) for i in range((len(plain) + 15) // 16))
    cipher = xor(plain, pad[: len(plain)])
    filled = [data + bytes(-len(data) % 16) for data in (aad, cipher)]
    lengths = struct.pack(">QQ", len(aad) * 8, len(cipher) * 8)
    total = ghash(int.from_bytes(aes_block(round_keys, bytes(16)), "big"), b"".join(filled) + lengths)
    return cipher, xor(total.to_bytes(16, "big"), stream(1))


def hkdf(master_key: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    extracted = hmac.digest(salt or bytes(32), master_key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")[:size]


# --- docs/formats/slot.md -----------------------------------------------------------------------------------

FINGERPRINT, STORE, KEY, PARENT = (bytes(range(a, b)) for a, b in ((0, 32), (32, 48), (48, 80), (80, 112)))
MASTER_KEY, OTHER_MASTER_KEY, SALT = bytes(range(128, 160)), bytes(range(1, 33)), bytes(range(160, 176))
WRITE_COUNTER = 11

Field = int | bytes
DEFAULTS: dict[str, Field] = {
    "magic": b"\x89KVSLOT\n",
    "version": 1,
    "header_bytes": HEADER_BYTES,
    "fingerprint": FINGERPRINT,
    "store": STORE,
    "class_index": 2,
    "slot": 7,
    "generation": 3 << 40 | 9,
    "key": KEY,
    "parent": PARENT,
    "namespace": hashlib.sha256(b"tenant-a").digest()[:16],
    "depth": 5,
    "group": 1,
    "has_parent": 1,
    "codec": 0,
    "payload_bytes": 0,
    "payload_checksum": bytes(16),
    "key_id": bytes(8),
    "salt": bytes(16),
    "write_counter": 0,
    "tag": bytes(16),
    "reserved": bytes(3840),
}
LAYOUT = "<8sII32s16sIIQ32s32s16sIHBBQ16s8s16sQ16s3840s"
TAG_AT, TAG_END, CHECKSUM_AT = 224, 240, 4080


def payload(size: int) -> bytes:
    return bytes((i * i + 7 * i) % 251 for i in range(size))


def header(**fields: Field) -> bytes:
    assert set(fields) <= set(DEFAULTS)
    packed = struct.pack(LAYOUT, *(DEFAULTS | fields).values())
    assert len(packed) == CHECKSUM_AT
    return with_sum(packed)


def plain_image(size: int, **fields: Field) -> bytes:
    """A plain image whose checksums hold, whatever else is wrong with it."""
    data = payload(size)
    return header(**({"payload_bytes": size, "payload_checksum": checksum(data)} | fields)) + data


def encrypted_image(size: int, master_key: bytes = MASTER_KEY, **fields: Field) -> bytes:
    """An encrypted image whose tag and header checksum hold, whatever else is wrong with it."""
    given = fields | {
        "payload_bytes": size,
        "codec": 1,
        "key_id": hkdf(master_key, b"", b"kvtier slot key id 1", 8),
        "salt": SALT,
        "write_counter": WRITE_COUNTER,
    }
    unsummed = header(**given)
    aad = unsummed[:TAG_AT] + unsummed[TAG_END:CHECKSUM_AT]
    nonce = bytes(4) + struct.pack("<Q", WRITE_COUNTER)
    cipher, tag = gcm(hkdf(master_key, SALT, b"kvtier slot subkey 1", 32), nonce, payload(size), aad)
    return header(**given, tag=tag) + cipher


def flip(image: bytes, at: int) -> bytes:
    return image[:at] + bytes([image[at] ^ 1]) + image[at + 1 :]


def with_sum(image: bytes) -> bytes:
    return image[:CHECKSUM_AT] + checksum(image[:CHECKSUM_AT]) + image[HEADER_BYTES:]


def golden() -> dict[str, bytes]:
    return {
        "plain_v1": plain_image(1000),
        "encrypted_v1": encrypted_image(1000),
        "newer_v2": plain_image(1000, version=2),
    }


def corpus() -> dict[str, bytes]:
    """Seeds of the fuzzer, named by their verdict (in a store with a cipher, where they are encrypted)."""
    plain, encrypted = plain_image(300), encrypted_image(300)
    return {
        "good-plain": plain,
        "good-plain_root": plain_image(300, has_parent=0, parent=bytes(32), depth=0),
        "good-encrypted": encrypted,
        "blank-zeros": bytes(HEADER_BYTES + 300),
        "foreign-magic_alone_missing": plain_image(300, magic=bytes(8)),
        "foreign-fingerprint": plain_image(300, fingerprint=FINGERPRINT[::-1]),
        "foreign-store": plain_image(300, store=STORE[::-1]),
        "foreign-class": plain_image(300, class_index=0),
        "foreign-slot": plain_image(300, slot=8),
        "newer_version-2": plain_image(300, version=2),
        "newer_version-with_unknown_fields": plain_image(
            300, version=2**32 - 1, codec=9, reserved=b"\x07" * 3840
        ),
        "corrupt_header-magic_alone": plain[:8] + bytes(HEADER_BYTES + 300 - 8),
        "corrupt_header-checksum": flip(plain, CHECKSUM_AT + 3),
        "corrupt_header-torn_sector": plain[:512] + bytes(HEADER_BYTES - 512) + plain[HEADER_BYTES:],
        "corrupt_header-version_0": plain_image(300, version=0),
        "corrupt_header-header_bytes": plain_image(300, header_bytes=512),
        "corrupt_header-generation_0": plain_image(300, generation=0),
        "corrupt_header-has_parent_2": plain_image(300, has_parent=2),
        "corrupt_header-has_parent_2_of_a_root": plain_image(300, has_parent=2, parent=bytes(32)),
        "corrupt_header-parent_of_a_root": plain_image(300, has_parent=0),
        "corrupt_header-codec_2": plain_image(300, codec=2),
        "corrupt_header-plain_with_salt": plain_image(300, salt=SALT),
        "corrupt_header-plain_with_tag": plain_image(300, tag=SALT),
        "corrupt_header-encrypted_with_checksum": encrypted_image(300, payload_checksum=SALT),
        "corrupt_header-reserved_first": plain_image(300, reserved=b"\x01" + bytes(3839)),
        "corrupt_header-reserved_last": plain_image(300, reserved=bytes(3839) + b"\x01"),
        "corrupt_header-payload_one_too_long": plain_image(300, payload_bytes=301),
        "corrupt_header-payload_wraps_around": plain_image(300, payload_bytes=2**64 - HEADER_BYTES),
        "corrupt_payload-plain": flip(plain, HEADER_BYTES),
        "corrupt_payload-plain_shorter": plain_image(300, payload_bytes=299),
        "corrupt_payload-encrypted": flip(encrypted, HEADER_BYTES + 299),
        "corrupt_payload-write_counter": with_sum(encrypted[:216] + b"\x0c" + encrypted[217:]),
        "stale-key": plain_image(300, key=KEY[::-1]),
        "stale-group": plain_image(300, group=0),
        "stale-generation": encrypted_image(300, generation=3 << 40 | 8),
        "unknown_key-other_master": encrypted_image(300, OTHER_MASTER_KEY),
    }


def main() -> None:
    here = Path(__file__).parent
    for folder, images in ((here / "slot", golden()), (here / "fuzz" / "slot", corpus())):
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            (folder / f"{name}.bin").write_bytes(image)


if __name__ == "__main__":
    main()
