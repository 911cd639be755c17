"""Identity: what must be equal for two servers, or two lives of one, to share a block.

Everything that changes what the bytes of a page mean, and that vLLM does not hash into its blocks.
"""

import hashlib
import json
import logging
import platform
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError

_log = logging.getLogger(__name__)

_SAMPLES = 32
_SAMPLE_BYTES = 1 << 16
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")
_HUB_SNAPSHOT_DIGITS = 40
_MOST_ADAPTERS = 1024  # whose digests are kept


def model_identity(vllm_config: Any, kv_cache_config: Any, version: str, backend: str) -> str:
    """Names model, weights and everything that decides what a page's bytes mean.

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
        "revision": getattr(model, "revision", None),
        "weights": weights_identity(model.model, getattr(model, "revision", None)),
        "load_format": str(getattr(vllm_config.load_config, "load_format", None)),
        "seed": model.seed if _is_dummy(vllm_config) else None,
        "hf_overrides": repr(getattr(model, "hf_overrides", None)),
        "dtype": str(model.dtype),
        "quantization": str(getattr(model, "quantization", None)),
        "kv_cache_dtype": str(cache.cache_dtype),
        "layout": str(getattr(kv_cache_config, "kv_cache_layout", None)),
        "groups": [
            [type(group.kv_cache_spec).__name__, repr(group.kv_cache_spec)]
            for group in kv_cache_config.kv_cache_groups
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
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()
    return f"{Path(str(model.model)).name}@{digest}"


def weights_identity(model: str, revision: str | None) -> str:
    """Names the weights: the revision of a hub model, or a digest of a local directory.

    The digest is over names, sizes, times of change and samples of the files, so that it costs milliseconds
    for weights of any size; a file that is copied without its time counts as changed.
    """
    path = Path(model)
    if not path.exists():
        return f"revision {revision}"
    snapshot = path.resolve().name
    if len(snapshot) == _HUB_SNAPSHOT_DIGITS and path.resolve().parent.name == "snapshots":
        return f"snapshot {snapshot}"
    return f"files {files_digest(path)}"


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
        file for file in path.iterdir() if file.is_file() and file.name.endswith(_WEIGHT_SUFFIXES)
    )


class LoRAIdentity:
    """What an adapter's weights add to the keys: vLLM hashes its name and path, not what is in it."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()  # the last one was used last

    def of(self, lora_request: Any) -> bytes:
        """Bytes that name the adapter of a request; empty without one.

        The files are read again whenever name, size or time of change of one of them is another.

        Raises:
            OSError: The adapter is on this machine and cannot be read: what it is, is not known.
        """
        if lora_request is None:
            return b""
        name, path = str(lora_request.lora_name), str(lora_request.lora_path)
        try:
            Path(path).stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return f"lora\0{name}\0{path}".encode()  # not local: by name and path, as vLLM
        state = (name, path, *_states_of(_weight_files(Path(path))))
        found = self._known.pop(state, None)
        if found is None:
            found = f"lora\0{name}\0{files_digest(Path(path))}".encode()
        self._known[state] = found
        if len(self._known) > _MOST_ADAPTERS:
            self._known.popitem(last=False)
        return found


def _states_of(files: Iterable[Path]) -> Iterator[tuple[str, int, int, int]]:
    """What changes when a file is written again, in place or not."""
    for file in files:
        stat = file.stat()
        yield file.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def check_persistent(vllm_config: Any) -> None:
    """Refuses what a cache on disk could not stand on.

    Raises:
        ConfigError: Weights without identity, or block hashes that are not collision-proof.
    """
    if _is_dummy(vllm_config):
        raise ConfigError('load_format is "dummy"; allowed with a disk tier: weights from files')
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


def _is_dummy(vllm_config: Any) -> bool:
    load_format = getattr(vllm_config.load_config, "load_format", None)
    return str(getattr(load_format, "value", load_format)) == "dummy"
