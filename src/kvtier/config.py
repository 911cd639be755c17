"""Config: all that an engine is told when it is opened, from Python, a TOML file or the environment."""

import contextlib
import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError
from kvtier.layout import KVLayout, check_extent

# In the standard library since 3.11; before, the same module under another name.
tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*%\s*")
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)
_ENV_PREFIX = "KVTIER_"
_MAX_COPY_THREADS = 64
# The core's, the default first.
EVICTIONS = ("return-hazard", "lru", "fifo", "lfu", "slru", "sieve", "s3-fifo", "arc")
DISK_EVICTION = "lru"  # of the drives, unless said otherwise: its order survives a restart
ADMISSIONS = ("return-hazard", "all", "second-use", "tiny-lfu")
_SLOT_HEADER_BYTES = 4096
_SLOT_ALIGNMENT = 4096
_MAX_NUMA_NODE = 1023  # that the kernel can know
COPY_PATHS = ("auto", "plain", "merged", "batched", "kernel", "staged", "bulk")


def parse_size(value: int | str, key: str = "size") -> int:
    """Reads a size.

    Args:
        value: Bytes, or a number with a unit: "64GiB" (1024^3), "1.5 GB" (1000^3), "4096". Units need no
            "B" and no particular case.
        key: What the size is called in messages.

    Returns:
        Bytes, rounded down; at least 1.

    Raises:
        ConfigError: Not a size, or less than one byte.
    """
    allowed = 'allowed: a number of bytes of at least 1, or a size such as "64GiB" or "1.5 GB"'
    size = -1
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number, unit, binary, _ = match.groups()
        if not binary or unit:
            power = "kmgt".find(unit.lower()) + 1 if unit else 0
            size = int(min(float(number) * (1024 if binary else 1000) ** power, 2.0**63))
    if not 1 <= size < 2**63:
        raise ConfigError(f"{key} is {value!r}; {allowed}")
    return size


def parse_rate(value: int | str, key: str = "rate") -> int | float:
    """Reads what one direction of copies may take.

    Args:
        value: A size as parse_size() reads it, each second; or a percentage such as "5%": how much longer
            decoding may take beside the copies.
        key: What the rate is called in messages.

    Returns:
        Bytes per second as an int, or the percentage as a float above 0 and at most 1: 0.05 for "5%".

    Raises:
        ConfigError: Neither.
    """
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        share = float(match[1]) / 100
        if 0 < share <= 1:
            return share
    else:
        with contextlib.suppress(ConfigError):
            return parse_size(value, key)
    raise ConfigError(
        f'{key} is {value!r}; allowed: bytes per second of at least 1, a size such as "20GB", or a '
        'percentage of decoding above 0 and up to 100 such as "5%"'
    )


@dataclass(frozen=True)
class Disk:
    """One drive of the disk tier.

    Attributes:
        path: An absolute directory on the drive; made if it is not there. Several engines, models and tenants
            may share it.
        capacity: Hard bound of everything below it, bytes or as in "1TiB".
    """

    path: str
    capacity: int | str

    def __post_init__(self) -> None:
        path: object = os.fspath(self.path) if isinstance(self.path, os.PathLike) else self.path
        if not isinstance(path, str) or not Path(path).is_absolute() or "\0" in path:
            raise ConfigError(f"disk path is {self.path!r}; allowed: an absolute path")
        object.__setattr__(self, "path", path)
        parse_size(self.capacity, "disk capacity")

    @property
    def capacity_bytes(self) -> int:
        """The capacity in bytes."""
        return parse_size(self.capacity, "disk capacity")

    @classmethod
    def parse(cls, text: str) -> "Disk":
        """Reads "PATH=CAPACITY", as in "/mnt/nvme0/kvtier=1TiB".

        Raises:
            ConfigError: Not of that form, or a value is not allowed.
        """
        path, equals, capacity = text.rpartition("=")
        if not equals:
            raise ConfigError(f'disk is {text!r}; allowed: "PATH=CAPACITY", as in "/mnt/nvme0/kvtier=1TiB"')
        return cls(path, capacity)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What kvtier.open() needs to know.

    Attributes:
        groups: One layout for each cache group; most models have one.
        host: Size of the host tier, bytes or as in "64GiB". It is taken from the machine at once.
        model: Name and revision of the weights, "name@revision". Part of every key: two models never share
            a block.
        block_tokens: Tokens of a block, the unit of lookup and eviction. For each group, one of block_tokens
            and page_tokens divides the other.
        world_size: Ranks on this host that share one cache, each with its part of every block.
        eviction: Which block of the host tier goes when room is needed: one of EVICTIONS, the
            first of them unless docs/policies.md says better for your traffic.
        host_numa_node: The NUMA node that the host tier's memory is taken from as long as it has any: a
            number; "auto", the node of all NVIDIA GPUs if they hang on one; "any", the kernel's choice.
        copy_threads: Threads of the CPU device, None for the default.
        chunk: The arena is prefaulted and registered in chunks of this size.
        disk: The drives of the disk tier, one Disk or several; empty for none. Each block is on one of them.
        disk_admission: Which blocks are written once the drives were full: "return-hazard" (likelier to
            return than what drives give up, as learned; it spares a write budget too), "all", "second-use"
            (offered before) or "tiny-lfu" (offered more often than the block it replaces). Until then, all.
        disk_eviction: As `eviction`, for the drives; "lru" unless said otherwise.
        disk_write_budget: Bytes that may be written in a day over all drives, as a size; None for one
            capacity a day, "unlimited" for no limit.
        disk_second_process: What a second process with the same model and layout gets: "next", a store of
            its own within the same capacity, or "refuse", a ResourceError.
        disk_key: Encrypts what is written: the path of a file with 64 hexadecimal digits, or "env:NAME".
            Several, separated by commas: the first encrypts, the others only decrypt (for rotation).
        disk_queue_depth: Requests in flight on each drive.
        disk_commit_seconds: At most so long after a block was written it is durable.
        disk_answer_seconds: A drive that leaves a request without an answer for longer is out of service
            until it answers: what waits for it ends, loads as misses, stores as not durable. 0.1 to 3600.
        trace: A file to which every lookup is written as a request, for `kvtier replay`; no tokens and no
            contents (docs/formats/trace.md). It is replaced at open.
        ghosts: Whether stats() estimates what other capacities would give (docs/costs.md).
        events: How many events Engine.events() keeps for a reader who is late, 36 bytes each; 0 for none.
        gpu_copy_path: How a GPU copies: "auto", by calibration, or one path for all (docs/cuda.md).
        gpu_copy_sms: Multiprocessors that a copy kernel may use.
        gpu_store_rate: What stores from a GPU may take: bytes per second, or as in "20GB", or as in "5%", so
            much that decoding beside them takes at most that longer (docs/cuda.md); None: no limit.
        gpu_load_rate: The same for loads.
    """

    groups: Sequence[KVLayout]
    host: int | str
    model: str
    block_tokens: int = 16
    world_size: int = 1
    eviction: str = EVICTIONS[0]
    host_numa_node: int | str = "auto"
    copy_threads: int | None = None
    chunk: int | str = "128MiB"
    disk: Disk | Sequence[Disk] = ()
    disk_admission: str = ADMISSIONS[0]
    disk_eviction: str = DISK_EVICTION
    disk_write_budget: int | str | None = None
    disk_second_process: str = "next"
    disk_key: str | None = None
    disk_queue_depth: int = 32
    disk_commit_seconds: float = 0.5
    disk_answer_seconds: float = 30.0
    trace: str | None = None
    ghosts: bool = True
    events: int = 0
    gpu_copy_path: str = "auto"
    gpu_copy_sms: int = 8
    gpu_store_rate: int | str | None = None
    gpu_load_rate: int | str | None = None

    def __new__(cls, *_: Any, **values: Any) -> "Config":
        """Refuses keys that there are not; __init__ does the rest."""
        cls._check_keys(values, "Config")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        groups = _checked_groups(self.groups)
        object.__setattr__(self, "groups", groups)
        model: object = self.model
        if not isinstance(model, str) or not model:
            raise ConfigError(f'model is {model!r}; allowed: a name with its revision, "name@revision"')
        self._check_integer("block_tokens")
        self._check_integer("world_size", 1, 1024)
        if self.host_numa_node not in ("auto", "any"):
            if isinstance(self.host_numa_node, str):
                text = f'host_numa_node is {self.host_numa_node!r}; allowed: "auto", "any" or a number'
                raise ConfigError(text)
            self._check_integer("host_numa_node", 0, _MAX_NUMA_NODE)
        if self.copy_threads is not None:
            self._check_integer("copy_threads", 1, _MAX_COPY_THREADS)
        for i, layout in enumerate(groups):
            if self.block_tokens % layout.page_tokens and layout.page_tokens % self.block_tokens:
                raise ConfigError(
                    f"block_tokens is {self.block_tokens} and page_tokens of groups[{i}] is "
                    f"{layout.page_tokens}; allowed: one a multiple of the other"
                )
        one_of_each = sum(self._slot_bytes(layout) for layout in groups)
        if self.host_bytes < one_of_each:
            raise ConfigError(
                f"host is {self.host!r}; allowed: at least one block of every group, {one_of_each} bytes"
            )
        parse_size(self.chunk, "chunk")
        self._check_disk()
        trace: object = os.fspath(self.trace) if isinstance(self.trace, os.PathLike) else self.trace
        if trace is not None and (not isinstance(trace, str) or not trace):
            raise ConfigError(f"trace is {self.trace!r}; allowed: the path of a file")
        object.__setattr__(self, "trace", trace)
        if not isinstance(self.ghosts, bool):
            raise ConfigError(f"ghosts is {self.ghosts!r}; allowed: true or false")
        self._check_integer("events", 0, _MAX_EVENTS)
        if self.gpu_copy_path not in COPY_PATHS:
            raise ConfigError(f"gpu_copy_path is {self.gpu_copy_path!r}; allowed: {', '.join(COPY_PATHS)}")
        self._check_integer("gpu_copy_sms", 1, 1024)
        self.gpu_store_limit, self.gpu_load_limit  # noqa: B018 - they check

    def _slot_bytes(self, layout: KVLayout) -> int:
        """What a block takes in the host tier: header, all ranks' parts, padding (docs/architecture.md)."""
        stripes = 1 if layout.replicated else self.world_size
        image = _SLOT_HEADER_BYTES + layout.block_bytes(self.block_tokens) * stripes
        return -(-image // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT

    def _check_integer(self, key: str, *bounds: int) -> None:
        """Keeps a NumPy integer as an int, which the fingerprint and the core need."""
        object.__setattr__(self, key, check_extent(key, getattr(self, key), *bounds))

    def _check_disk(self) -> None:
        disks: object = (self.disk,) if isinstance(self.disk, Disk) else self.disk
        if not isinstance(disks, (list, tuple)) or not all(isinstance(disk, Disk) for disk in disks):
            raise ConfigError(f"disk is {self.disk!r}; allowed: a Disk or a list of them")
        if len({os.path.realpath(disk.path) for disk in disks}) < len(disks) or len(disks) > _MAX_DISKS:
            raise ConfigError(
                f"disk has {len(disks)} entries; allowed: at most {_MAX_DISKS}, each another path"
            )
        object.__setattr__(self, "disk", tuple(disks))
        for key, allowed in (
            ("eviction", EVICTIONS),
            ("disk_admission", ADMISSIONS),
            ("disk_eviction", EVICTIONS),
            ("disk_second_process", _SECOND_PROCESS),
        ):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{key} is {getattr(self, key)!r}; allowed: {', '.join(allowed)}")
        if self.disk_write_budget not in (None, "unlimited"):
            parse_size(self.disk_write_budget, "disk_write_budget")
        places: object = self.disk_key
        if places is not None and (
            not isinstance(places, str) or not all(place.strip() for place in places.split(","))
        ):
            raise ConfigError(
                f'disk_key is {places!r}; allowed: paths of files or "env:NAME", separated by commas'
            )
        self._check_integer("disk_queue_depth", 1, 1024)
        for name, least, most in _SECONDS_KEYS:
            seconds: object = getattr(self, name)
            number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if not number or not least <= seconds <= most:  # type: ignore[operator]
                raise ConfigError(f"{name} is {seconds!r}; allowed: {least} to {most}")

    @classmethod
    def _check_keys(cls, values: Mapping[str, Any], source: str) -> None:
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"{source}: {key!r} is not a key; allowed: {', '.join(known)}")

    @property
    def disks(self) -> tuple[Disk, ...]:
        """The drives, as a tuple."""
        return (self.disk,) if isinstance(self.disk, Disk) else tuple(self.disk)

    @property
    def disk_write_bytes_per_day(self) -> int | None:
        """The write budget: None for one capacity, 0 for no limit."""
        if self.disk_write_budget is None:
            return None
        return 0 if self.disk_write_budget == "unlimited" else parse_size(self.disk_write_budget)

    def fingerprint(self) -> bytes:
        """32 bytes that two configs share only if their blocks on disk are interchangeable."""
        digest = hashlib.sha256(b"kvtier.store.v1\0")
        digest.update(len(self.model.encode()).to_bytes(8, "little") + self.model.encode())
        digest.update(self.block_tokens.to_bytes(8, "little") + self.world_size.to_bytes(8, "little"))
        for layout in self.groups:
            digest.update(layout.fingerprint())
        return digest.digest()

    @property
    def host_bytes(self) -> int:
        """Size of the host tier in bytes."""
        return parse_size(self.host, "host")

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk in bytes."""
        return parse_size(self.chunk, "chunk")

    @property
    def gpu_store_limit(self) -> int | float | None:
        """What stores from a GPU may take, as parse_rate() returns it; None: no limit."""
        return None if self.gpu_store_rate is None else parse_rate(self.gpu_store_rate, "gpu_store_rate")

    @property
    def gpu_load_limit(self) -> int | float | None:
        """What loads into a GPU may take, as parse_rate() returns it; None: no limit."""
        return None if self.gpu_load_rate is None else parse_rate(self.gpu_load_rate, "gpu_load_rate")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "config") -> "Config":
        """Makes a Config from keys and values, as they stand in a TOML file.

        Args:
            values: Keyword arguments of Config; `groups` may hold tables with the arguments of KVLayout
                (or, where a table has `latent_dim`, of KVLayout.mla).
            source: Where the values come from, for messages.

        Raises:
            ConfigError: A key is not known or missing, or a value is not allowed.
        """
        given = dict(values)
        cls._check_keys(given, source)
        for key in ("groups", "host", "model"):
            if key not in given:
                raise ConfigError(f"{source}: {key!r} is missing")
        if isinstance(given["groups"], (list, tuple)):
            given["groups"] = [
                _layout_of(table, f"{source}: groups[{i}]") if isinstance(table, Mapping) else table
                for i, table in enumerate(given["groups"])
            ]
        if "disk" in given:
            given["disk"] = _disks_of(given["disk"], f"{source}: disk")
        return cls(**given)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Config":
        """Reads a TOML file whose keys are the attributes, with one [[groups]] table for each group.

        Raises:
            ConfigError: The file is not readable or not TOML, or says something that is not allowed.
        """
        return cls.from_mapping(_read_toml(path), str(path))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **defaults: Any) -> "Config":
        """Reads KVTIER_HOST, KVTIER_MODEL, KVTIER_BLOCK_TOKENS, KVTIER_COPY_THREADS and their like.

        KVTIER_DISK is "PATH=CAPACITY", several separated by semicolons. KVTIER_CONFIG names a TOML file. A
        variable beats the file, and the file beats `defaults`.

        Args:
            environ: The variables; None for those of the process.
            defaults: Keyword arguments of Config. Groups come from here or from the file.

        Raises:
            ConfigError: As load(), or a KVTIER_ variable that is not known.
        """
        environ = os.environ if environ is None else environ
        values = dict(defaults)
        given = {key: text for key, text in environ.items() if key.startswith(_ENV_PREFIX)}
        file = given.pop(_ENV_PREFIX + "CONFIG", None)
        given.pop(_ENV_PREFIX + "CATALOG_HELPER", None)  # the program that reads the catalog: the core's
        if file is not None:
            values.update(_read_toml(file))
        keys = f"{values.get('disk_key')},{given.get(_ENV_PREFIX + 'DISK_KEY')}"
        for holds_a_key in re.findall(r"\benv:(\w+)", keys):
            given.pop(holds_a_key, None)
        allowed = [field.name for field in fields(cls) if field.name != "groups"]
        for variable, text in given.items():
            key = variable.removeprefix(_ENV_PREFIX).lower()
            if key not in allowed:
                names = ", ".join(_ENV_PREFIX + name.upper() for name in ["config", *allowed])
                raise ConfigError(f"{variable} is not a variable of kvtier; allowed: {names}")
            values[key] = _read_variable(variable, key, text)
        return cls.from_mapping(values, "environment")


# What help() shows; else it would be that of __new__.
Config.__new__.__signature__ = inspect.signature(Config.__init__)  # type: ignore[attr-defined]


def _checked_groups(groups: object) -> tuple[KVLayout, ...]:
    if isinstance(groups, KVLayout):
        return (groups,)
    if not isinstance(groups, (list, tuple)) or not groups:
        raise ConfigError(f"groups is {groups!r}; allowed: a list of at least one KVLayout")
    for i, layout in enumerate(groups):
        if not isinstance(layout, KVLayout):
            raise ConfigError(f"groups[{i}] is {layout!r}; allowed: a KVLayout")
    return tuple(groups)


_SECONDS_KEYS = (("disk_commit_seconds", 0.001, 60), ("disk_answer_seconds", 0.1, 3600))
_INTEGER_KEYS = ("block_tokens", "world_size", "copy_threads", "disk_queue_depth", "events", "gpu_copy_sms")
_SECOND_PROCESS = ("next", "refuse")
_MAX_DISKS = 64
_MAX_EVENTS = 2**24


def _disks_of(value: object, source: str) -> list[Disk]:
    if isinstance(value, (str, Mapping, Disk)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{source} is {value!r}; allowed: tables with path and capacity")
    disks = []
    for i, each in enumerate(value):
        if isinstance(each, Mapping) and set(each) == {"path", "capacity"}:
            disks.append(Disk(each["path"], each["capacity"]))
        elif isinstance(each, str):
            disks.append(Disk.parse(each))
        elif isinstance(each, Disk):
            disks.append(each)
        else:
            raise ConfigError(f"{source}[{i}] is {each!r}; allowed: a table with path and capacity")
    return disks


def _read_variable(variable: str, key: str, text: str) -> Any:
    if key in _INTEGER_KEYS:
        return _integer(variable, text)
    if key == "host_numa_node" and text not in ("auto", "any"):
        return _integer(variable, text)
    if key == "disk":
        return [part for part in text.split(";") if part]
    if key == "ghosts":
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{variable} is {text!r}; allowed: true or false")
        return text.lower() == "true"
    if key in {name for name, _, _ in _SECONDS_KEYS}:
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"{variable} is {text!r}; allowed: seconds") from None
    return text


def _integer(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{key} is {text!r}; allowed: an integer") from None


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        table: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    return table


def _layout_of(table: Mapping[str, Any], source: str) -> KVLayout:
    latent = "latent_dim" in table
    required = [
        "num_layers",
        "dtype",
        "page_tokens",
        *(["latent_dim"] if latent else ["num_kv_heads", "head_dim"]),
    ]
    optional = ["window_tokens", "name", *([] if latent else ["page_order"])]
    for key in table:
        if key not in required + optional:
            raise ConfigError(f"{source}: {key!r} is not a key; allowed: {', '.join(required + optional)}")
    for key in required:
        if key not in table:
            raise ConfigError(f"{source}: {key!r} is missing")
    try:
        return KVLayout.mla(**table) if latent else KVLayout(**table)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
