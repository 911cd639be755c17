"""Mutates the config files of tests/golden/fuzz/config: each is read or refused with one ConfigError.

Deterministic: the same texts in every run. KVTIER_FUZZ_SECONDS=600 goes on for as long, KVTIER_FUZZ_SEED says
where (default 1). A failure leaves its file behind, named by its seed.
"""

import os
import random
import time
from pathlib import Path

from kvtier import Config
from kvtier.errors import ConfigError

CORPUS = [
    path.read_bytes()
    for path in sorted((Path(__file__).parents[2] / "golden" / "fuzz" / "config").glob("*.toml"))
]
ROUNDS = 4_000
VALUES = [
    *(b"0", b"-1", b"1", b"99999999999999999999", b"1e400", b"-inf", b"nan", b"0x7fffffffffffffff"),
    *(b"true", b"[]", b"{}", b"[[]]", b'""', b'"0"', b'"1%"', b'"16EiB"', b'"\\u0000"', b"1979-05-27"),
    *(b'["a", 1]', b'{path = "x", capacity = 0}', b"'''\n'''", b"\xff", b"\xf0\x9f\x92\xbe", b"1_0"),
]


def mutated(source: random.Random) -> bytes:
    text = bytearray(source.choice(CORPUS))
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(text) + 1)
        lines = text.split(b"\n")
        line = source.randrange(len(lines))
        match source.randrange(7):
            case 0:
                text[at : at + 1] = bytes([source.randrange(256)])
            case 1:
                del text[at : at + source.randint(1, 40)]
            case 2:  # another value
                lines[line] = lines[line].split(b"=")[0] + b"= " + source.choice(VALUES)
                text = bytearray(b"\n".join(lines))
            case 3:  # a line twice, or somewhere else
                lines.insert(source.randrange(len(lines)), lines[line])
                text = bytearray(b"\n".join(lines))
            case 4:
                del lines[line]
                text = bytearray(b"\n".join(lines))
            case 5:
                text[at:at] = source.choice(VALUES)
            case _:  # the value of another key
                lines[line] = lines[line].split(b"=")[0] + b"=" + source.choice(lines).split(b"=")[-1]
                text = bytearray(b"\n".join(lines))
    return bytes(text)


def refusal(path: Path) -> str | None:
    try:
        config = Config.load(path)
    except ConfigError as error:
        return str(error)
    assert len(config.fingerprint()) == 32
    assert min(config.host_bytes, config.chunk_bytes) > 0
    return None


def test_a_config_file_is_read_or_refused_with_one_error(tmp_path: Path) -> None:
    seconds = float(os.environ.get("KVTIER_FUZZ_SECONDS", "0"))
    first = int(os.environ.get("KVTIER_FUZZ_SEED", "1"))
    end = time.monotonic() + seconds
    read = refused = 0
    while read + refused < ROUNDS or time.monotonic() < end:
        seed = first + read + refused
        path = tmp_path / f"KVTIER_FUZZ_SEED={seed}.toml"
        path.write_bytes(mutated(random.Random(seed)))
        why = refusal(path)
        assert why is None or "allowed" in why or str(path) in why
        read, refused = read + (why is None), refused + (why is not None)
        path.unlink()
    assert read > ROUNDS // 50, "the mutations reach what is allowed, too"
    assert refused > ROUNDS // 4
