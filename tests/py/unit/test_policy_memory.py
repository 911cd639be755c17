"""What docs/policies.md says that a policy takes for each block, beside what an engine with it takes."""

import re
from pathlib import Path

import pytest

import kvtier
from kvtier.config import EVICTIONS

TABLE = Path(__file__).resolve().parents[3] / "docs" / "policies.md"
SLOT_BYTES = 8192
MIB = 1 << 20
ONE_MORE = 0.01  # ghost than the tier has blocks
FIGURE = r"\d[\d,]*(?:\.\d+)?(?<!,)"


def index_bytes(policy: str, blocks: int) -> float:
    """For each block of a host tier of so many, the policy's included."""
    layout = kvtier.KVLayout.mla(num_layers=1, latent_dim=64, dtype="uint8", page_tokens=1)
    config = kvtier.Config(
        groups=[layout], host=blocks * SLOT_BYTES, model="m@1", block_tokens=1, eviction=policy
    )
    with kvtier.open(config) as engine:
        stats = engine.stats()
        assert stats.host[0].capacity == blocks
        return stats.index_bytes_per_block


def said_bytes(blocks: int) -> dict[str, float]:
    """The table's column "bytes per block", worked out for a tier of so many."""
    rows = re.findall(
        r"^\| `([\w-]+)` \|[^|]+\| (\d[^|]*?) \| (?:yes|no) \|$", TABLE.read_text(), re.MULTILINE
    )
    said = {}
    for name, cell in rows:
        figures = [float(figure.replace(",", "")) for figure in re.findall(FIGURE, cell)]
        words = re.sub(FIGURE, "#", cell)
        if words == "#":
            (said[name],) = figures
        elif words == "#, at most # for each of # ghosts":
            said[name] = figures[0] + figures[1] * figures[2]
        elif words == "#, at most # for each of as many ghosts":
            said[name] = figures[0] + figures[1]
        else:
            assert words == "#, # for each of as many evicted blocks and # more, and # MiB"
            each, evicted, more, mib = figures
            said[name] = each + (evicted * (blocks + more) + mib * MIB) / blocks
    return said


@pytest.mark.parametrize("blocks", [4096, 4600, 65_536])  # tables of ghosts are fullest and emptiest
def test_a_policy_takes_no_more_than_the_table_says(blocks: int) -> None:
    said = said_bytes(blocks)
    assert set(said) == set(EVICTIONS)
    lru = index_bytes("lru", blocks)
    for policy in EVICTIONS:
        takes = index_bytes(policy, blocks) - lru + said["lru"]
        assert takes <= said[policy] + ONE_MORE, policy
        assert takes >= 0.85 * said[policy], f"{policy}: the table says too much"


def test_the_index_takes_what_the_documentation_says() -> None:
    text = " ".join(TABLE.read_text().split())
    assert "110 with LRU; 128 are promised (a tier of 65,536, " in text
    assert index_bytes("lru", 65_536) == pytest.approx(110, abs=1.5)
    assert ", takes 135)" in text
    assert index_bytes("return-hazard", 65_536) == pytest.approx(135, abs=0.5)
