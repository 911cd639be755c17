"""Identity: what must be equal for two servers, or two lives of one, to share a block.

Everything that changes what the bytes of a page mean, and that vLLM does not hash into its blocks.
"""

import hashlib
import json
import logging
import platform
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from kvtier.adapters.vllm.groups import group_spec
from kvtier.errors import ConfigError, UnsupportedError

_log = logging.getLogger(__name__)

_SAMPLES = 32
_SAMPLE_BYTES = 1 << 16
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_DIGEST_SUFFIXES = (*_WEIGHT_SUFFIXES, ".json")
_COMMIT = re.compile("[0-9a-f]{40}")
# Those that read the model's own files; others read what no digest covers.
_FILE_FORMATS = (
    "auto",
    "hf",
    "safetensors",
    "pt",
    "npcache",
    "mistral",
    "gguf",
    "bitsandbytes",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
    "runai_streamer_sharded",
    "sharded_state",
)
# What of vLLM's configuration of images and videos decides the numbers that stand for one.
_MEDIA = (
    "mm_processor_kwargs",
    "video_pruning_rate",
    "video_pruning_method",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
)
_MOST_ADAPTERS = 1024  # that are remembered; vLLM itself keeps fewer, and reads one that it forgot again


def model_identity(vllm_config: Any, kv_cache_config: Any, version: str, backend: str) -> str:
    """Names model, weights and what decides how a page is packed.

    Args:
        vllm_config: VllmConfig.
        kv_cache_config: KVCacheConfig.
        version: vllm.__version__.
        backend: What computes the pages: device type, and on the CPU its instruction set, for pages are
            packed for it.

    Returns:
        "name@SHA-256", to be Config.model. The same in every process of a server.
    """
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    parallel = vllm_config.parallel_config
    attention = getattr(vllm_config, "attention_config", None)
    facts = {
        "model": model.model,
        "weights": weights_identity(model.model, _revision(model)),
        "load_format": _load_format(vllm_config),
        "seed": model.seed if _load_format(vllm_config) == "dummy" else None,
        "dtype": str(model.dtype),
        "quantization": str(getattr(model, "quantization", None)),
        "kv_cache_dtype": str(cache.cache_dtype),
        "layout": str(getattr(kv_cache_config, "kv_cache_layout", None)),
        "groups": [
            [type(spec).__name__, repr(spec)] for spec in map(group_spec, kv_cache_config.kv_cache_groups)
        ],
        "layers": [list(group.layer_names) for group in kv_cache_config.kv_cache_groups],
        "vllm": version,
        "attention": str(getattr(attention, "backend", None)),
        "backend": backend,
        "machine": platform.machine(),
        "tp": parallel.tensor_parallel_size,
        "hash": str(cache.prefix_caching_hash_algo),
        "speculative": repr(getattr(vllm_config.speculative_config, "method", None)),
    }
    return f"{Path(str(model.model)).name}@{_digest_of(facts).hex()}"


def computed_as(vllm_config: Any, capability: str = "") -> bytes:
    """What else decides the numbers in a page, 32 bytes. Only the scheduler may ask, and mixes it into keys.

    Models rewrite their configuration as they are built, each worker its own: there it would differ from
    the scheduler's, and the worker could not join.

    Args:
        vllm_config: VllmConfig.
        capability: Of the GPUs, by which vLLM chooses kernels where nobody does; "" without any.
    """
    model = vllm_config.model_config
    media = getattr(model, "multimodal_config", None)
    drafter = getattr(vllm_config.speculative_config, "draft_model_config", None)
    fitted = getattr(model, "original_max_model_len", None) == -1  # to the memory, after the model was built
    facts = {
        "config": _config_in_force(model),
        # Long RoPE chooses its factors by it, Llama 4 scales queries by it, others set RoPE's length to it.
        "max_model_len": "fitted" if fitted else model.max_model_len,
        "code_revision": getattr(model, "code_revision", None),
        "model_impl": str(getattr(model, "model_impl", None)),
        "quantization_config": getattr(model, "quantization_config", None),
        "loader": getattr(vllm_config.load_config, "model_loader_extra_config", None),
        "generation_config": getattr(model, "generation_config", None),  # Llama 4 has attention's there
        "attention_tuning": (getattr(model, "override_generation_config", None) or {}).get(
            "attn_temperature_tuning"
        ),
        "media": {name: getattr(media, name, None) for name in _MEDIA},
        "drafter": None if drafter is None else weights_identity(drafter.model, _revision(drafter)),
        "attention": _plain_fields(getattr(vllm_config, "attention_config", None)),
        "capability": capability,
    }
    return _digest_of(facts)


def _plain_fields(config: Any) -> dict[str, str]:
    """What of a configuration says the same in every process: no objects that may print their address."""
    plain = (bool, int, float, str, Enum, dict, list, tuple)
    fields = vars(config) if config is not None else {}
    return {name: str(value) for name, value in fields.items() if isinstance(value, plain)}


def _digest_of(facts: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).digest()


def _config_in_force(model: Any) -> str:
    """The model's configuration with all overrides, of whatever kind, and the version of transformers."""
    try:
        return str(model.hf_config.to_json_string())
    except (AttributeError, TypeError, ValueError) as error:  # a model's own code may put anything there
        _log.warning("after a restart nothing is found: the model's configuration is no JSON: %s", error)
        return secrets.token_hex()


def _revision(model: Any) -> str | None:
    """The commit of a hub model's files; where nobody has resolved it, what was asked for."""
    revision = getattr(model, "revision", None)
    commit = getattr(revision, "resolved", None)
    if not commit and not _is_commit(revision) and not getattr(model, "hf_config_path", None):
        commit = getattr(getattr(model, "hf_config", None), "_commit_hash", None)
    return str(commit) if commit else revision


def _is_commit(revision: object) -> bool:
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def weights_identity(model: str, revision: str | None) -> str:
    """Names the weights: the revision of a hub model, or a digest of a local directory.

    The digest is over names, sizes, times of change and samples of the files, so that it costs milliseconds
    for weights of any size; a file that is copied without its time counts as changed.
    """
    path = Path(model)
    if not path.exists():
        return f"revision {revision}"
    if (snapshot := _snapshot(path)) is not None:
        return f"snapshot {snapshot}"
    return f"files {files_digest(path)}"


def has_weights(model: str) -> bool:
    """Whether weights_identity() of a local path covers any: some loaders put only a configuration there."""
    path = Path(model)
    names = [path.name] if path.is_file() else [file.name for file in path.iterdir()]
    return _snapshot(path) is not None or any(name.endswith(_WEIGHT_SUFFIXES) for name in names)


def _snapshot(path: Path) -> str | None:
    """The commit whose files the hub's own cache keeps there."""
    resolved = path.resolve()
    return resolved.name if _is_commit(resolved.name) and resolved.parent.name == "snapshots" else None


def files_digest(path: Path) -> str:
    """SHA-256 over the weight files at `path`, a directory or one file: see weights_identity()."""
    digest = hashlib.sha256()
    for file in _weight_files(path):
        stat = file.stat()
        digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        with file.open("rb") as handle:
            for i in range(_SAMPLES):
                handle.seek(stat.st_size * i // _SAMPLES)
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _weight_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    yield from sorted(
        file for file in path.iterdir() if file.is_file() and file.name.endswith(_DIGEST_SUFFIXES)
    )


class _File(NamedTuple):
    """What changes when a file is written again, in place or not."""

    name: str
    size: int
    modified_ns: int
    changed_ns: int


class _Adapter(NamedTuple):
    files: list[_File] | None  # as they were last; None where none are here
    digest: str | None  # of what they were first; None once they were anything else
    weights: str  # what vLLM has loaded


class LoRAIdentity:
    """What an adapter's weights add to the keys: vLLM hashes its name and path, not what is in it.

    What vLLM has loaded under a number stays loaded, whatever becomes of the files. So they count as they
    were when the number was first seen. vLLM may have loaded it before that: files that are younger than this
    object name nothing, and the number itself counts, which is good for this process.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str, int], _Adapter] = OrderedDict()  # the last was used last
        self._here = secrets.token_hex(16)
        self._began_ns = time.time_ns()

    def of(self, lora_request: Any) -> bytes:
        """Bytes that name the adapter of a request; empty without one.

        An adapter that is not on this machine (vLLM fetches it from a hub) is another one in every process.

        Raises:
            OSError: The adapter is on this machine and cannot be read: what it is, is not known.
            UnsupportedError: Its files are others than under this number before: what vLLM has loaded, is
                not known.
        """
        if lora_request is None:
            return b""
        name, path = str(lora_request.lora_name), str(lora_request.lora_path)
        number = int(lora_request.lora_int_id)
        files = _files_of(path)
        known = self._known.get((name, path, number))
        if known is None or known.files != files:
            digest = "" if files is None else files_digest(Path(path))
            if known is None:
                told = files is not None and all(file.changed_ns < self._began_ns for file in files)
                known = _Adapter(files, digest, digest if told else f"{self._here} {number}")
            else:
                known = known._replace(files=files, digest=digest if known.digest == digest else None)
        self._known[name, path, number] = known
        self._known.move_to_end((name, path, number))
        if len(self._known) > _MOST_ADAPTERS:
            self._known.popitem(last=False)
        if known.digest is None:
            raise UnsupportedError(
                f"the files of {name!r} at {path!r} have changed while it was loaded as number {number}; "
                "allowed: to load it again, as a new one"
            )
        return f"lora\0{name}\0{path}\0{known.weights}".encode()


def _files_of(path: str) -> list[_File] | None:
    """None for a path that is not local."""
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    found = [(file.name, file.stat()) for file in _weight_files(Path(path))]
    return [_File(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found]


def check_persistent(vllm_config: Any) -> None:
    """Refuses what a cache on disk could not stand on.

    Raises:
        ConfigError: Weights without identity, or block hashes that are not collision-proof.
    """
    model = vllm_config.model_config
    if (load_format := _load_format(vllm_config)) not in _FILE_FORMATS:
        raise ConfigError(
            f'load_format is "{load_format}"; allowed with a disk tier: weights from the model\'s own files '
            f"({', '.join(_FILE_FORMATS)})"
        )
    if elsewhere := getattr(model, "model_weights", None):
        raise ConfigError(
            f"the weights are at {elsewhere!r}; allowed with a disk tier: a local folder or a hub model, "
            "whose files can be told from other ones"
        )
    if not Path(model.model).exists():
        if not _is_commit(revision := _revision(model)):
            raise ConfigError(
                f"revision of {model.model!r} is {revision!r}; allowed with a disk tier: a commit, which is "
                "40 hexadecimal digits (--revision), or a model in a local folder"
            )
    elif not has_weights(model.model):
        raise ConfigError(
            f"there are no weights in {model.model!r}; allowed with a disk tier: a folder with files of "
            f"{', '.join(_WEIGHT_SUFFIXES)}"
        )
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if not algorithm.startswith("sha256"):
        raise ConfigError(
            f'prefix_caching_hash_algo is {algorithm!r}; allowed with a disk tier: "sha256", "sha256_cbor"'
        )
    if algorithm == "sha256":
        _log.warning(
            "prefix_caching_hash_algo is sha256, which hashes pickles: after an update of Python or vLLM "
            "nothing on the disk is found. sha256_cbor is stable."
        )


def _load_format(vllm_config: Any) -> str:
    load_format = getattr(vllm_config.load_config, "load_format", None)
    return str(getattr(load_format, "value", load_format))
