"""What the demo runs: a model and a prompt, without downloading anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kvtier
from kvtier.cli import machine
from kvtier.errors import ConfigError

# Architectures of Llama with seeded random weights, by `--size`. The vocabulary is the 256 byte values.
SIZES: dict[str, dict[str, Any]] = {
    "100m": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
SEED = 20260


@dataclass(frozen=True)
class Prompt:
    """Token ids `[n]`, int32, and a sentence on where they come from."""

    token_ids: Any
    source: str


@dataclass(frozen=True)
class Model:
    """A causal language model in float32 on the CPU.

    Attributes:
        module: The transformers model.
        tokenizer: Its tokenizer; None for bytes.
        identity: For `kvtier.Config(model=...)`: differs wherever keys and values may.
        about: A sentence for people.
    """

    module: Any
    tokenizer: Any
    identity: str
    about: str


def load_model(path: str | None, size: str) -> Model:
    """The model in a local directory, or one of `SIZES` with random weights."""
    if path is None:
        return _random_model(size)
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {path}: must be a directory with a transformers model (config.json is missing)"
        )
    module: Any
    tokenizer: Any
    try:
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any kind: its files may hold anything
        what = next(iter(str(error).strip().splitlines()), "")
        raise ConfigError(
            f"--model {path}: transformers cannot load it: {type(error).__name__}: {what}"
        ) from error
    weights = max(p.stat().st_mtime_ns for p in folder.iterdir())
    about = f"{type(module).__name__} from {folder}, {_millions(module)} parameters, float32 on the CPU"
    return Model(module.eval(), tokenizer, f"{folder.resolve()}@{weights}", about)


def _random_model(size: str) -> Model:
    config = LlamaConfig(vocab_size=256, max_position_embeddings=1 << 17, **SIZES[size])
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        module: Any = LlamaForCausalLM(config)
    about = (
        f"Llama architecture with random weights (seed {SEED}), {_millions(module)} parameters, "
        f"{config.num_hidden_layers} layers, {config.num_key_value_heads} KV heads, float32 on the CPU; "
        "tokens are bytes"
    )
    return Model(module.eval(), None, f"kvtier-demo-{size}@{SEED}", about)


def _millions(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"


def make_prompt(model: Model, text_path: str | None, num_tokens: int) -> Prompt:
    """Exactly `num_tokens` tokens of the text; if it is too short, it is repeated under section numbers."""
    if text_path is not None:
        text, source = Path(text_path).read_text(errors="replace"), text_path
    else:
        text, source = _own_text()
    if not text.strip():
        raise ConfigError(f"--text {source}: the document is empty")
    ids = _tokens(model, text)
    copies = 1
    while len(ids) < num_tokens:
        copies += max(1, (num_tokens - len(ids)) // (len(ids) // copies + 1))
        ids = _tokens(model, "\n".join(f"Section {i + 1}\n{text}" for i in range(copies)))
    if copies > 1:
        source += f", repeated {copies} times under section numbers (it is shorter than {num_tokens} tokens)"
    return Prompt(ids[:num_tokens], source)


def _tokens(model: Model, text: str) -> Any:
    if model.tokenizer is None:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(torch.int32).numpy()
    return torch.tensor(model.tokenizer(text)["input_ids"], dtype=torch.int32).numpy()


def _own_text() -> tuple[str, str]:
    root = machine.checkout()
    if root is not None:
        files = [*root.glob("*.md"), *sorted((root / "docs").rglob("*.md"))]
        if text := _joined(files):
            return text, f"the documentation in {root}"
    package = Path(kvtier.__file__).resolve().parent
    return _joined(sorted(package.rglob("*.py"))), f"the sources in {package} (no documentation is installed)"


def _joined(files: list[Path]) -> str:
    return "\n\n".join(f.read_text(errors="replace") for f in files)
