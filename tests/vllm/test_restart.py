"""Two lives of a server over one directory: what the first stored, the second serves from disk."""

from pathlib import Path

import pytest
from harness import BLOCK, prompt, same, serving

PROMPTS = [prompt(seed, 300 + 50 * seed) for seed in range(3)]
HITS = [(len(p) - 1) // BLOCK * BLOCK for p in PROMPTS]


@pytest.mark.smoke
def test_the_second_life_restores_from_disk_what_the_first_computed(llama: Path, tmp_path: Path) -> None:
    extra = {
        "host": "32MiB",
        "disk": [{"path": str(tmp_path / "disk"), "capacity": "128MiB"}],
        "max_wait": 30,
    }
    with serving(llama, extra=extra) as server:
        cold = server.generate(PROMPTS)
        assert server.scheduler._engine.flush(60).durable >= sum(HITS) // BLOCK
    with serving(llama, extra=extra) as server:
        restored = server.generate(PROMPTS)
        assert same(restored, cold) == [True] * 3
        assert sum(r.cached for r in restored) > 0
        assert server.count("hit_tokens_disk") > 0
        assert server.count("load_failures") == 0
        assert server.scheduler._engine.stats().promote_good > 0
        server.drain()
        server.check_empty()
