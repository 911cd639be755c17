"""Options: what stands in kv_connector_extra_config, and in a request's kv_transfer_params. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvtier.config import parse_size
from kvtier.costs import LoadPolicy, check_load_policy
from kvtier.errors import ConfigError
from kvtier.keys import check_namespace
from kvtier.layout import check_extent

SOURCE = "kv_connector_extra_config"
PARAMS = "kv_transfer_params"
REQUEST_KEY = "kvtier"
STORE_CHOICES = ("all", "prompt")
TIERS = ("host", "disk")
PRIORITIES = ("low", "normal", "high")
_MAX_TOKENS = 2**31 - 1
_MAX_NAMESPACE_BYTES = 256
_MAX_PIN_SECONDS = 86400
_MAX_TTL_SECONDS = 366 * 86400
_SHOWN = 200  # characters of what a client sent, at each end of a message


@dataclass(frozen=True)
class DiskOption:
    """One entry of "disk": a directory of the disk tier.

    Attributes:
        path: Where it is.
        capacity: Bytes it may hold.
    """

    path: str
    capacity: int


@dataclass(frozen=True)
class Options:
    """The connector's configuration.

    Attributes:
        host: Bytes of the host tier.
        disk: Directories of the disk tier; empty without one.
        store: "all", or "prompt" to leave out what a request generates.
        max_wait: Seconds that a request may be kept waiting for blocks that are about to be ready; it is
            never kept longer than recomputing them would take.
        load: "auto" leaves blocks to be computed where loading them is predicted to take longer, "always"
            loads whatever is found.
        copy_threads: Threads that copy on the CPU platform, None for the default.
        directory: Where keeper and workers meet, of mode 0700; None for one of the engine's own.
        client_priority: Whether a request may say which priority its blocks have; else all are alike.
    """

    host: int
    disk: tuple[DiskOption, ...] = ()
    store: str = "all"
    max_wait: float = 2.0
    load: LoadPolicy = "auto"
    copy_threads: int | None = None
    directory: str | None = None
    client_priority: bool = True


def parse_options(values: Mapping[str, Any]) -> Options:
    """Reads kv_connector_extra_config.

    Raises:
        ConfigError: A key is not known or missing, or a value is not allowed.
    """
    known = [field.name for field in fields(Options)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{SOURCE}: {key!r} is not a key; allowed: {', '.join(known)}")
    if "host" not in values:
        raise ConfigError(f'{SOURCE}: "host" is missing; allowed: the size of the host tier, as "64GiB"')
    store = values.get("store", "all")
    if store not in STORE_CHOICES:
        raise ConfigError(f'{SOURCE}: store is {store!r}; allowed: "all" or "prompt"')
    wait = values.get("max_wait", 2.0)
    if isinstance(wait, bool) or not isinstance(wait, (int, float)) or not 0 <= wait <= 60:
        raise ConfigError(f"{SOURCE}: max_wait is {wait!r}; allowed: seconds from 0 to 60")
    load = check_load_policy(f"{SOURCE}: load", values.get("load", "auto"))
    threads = values.get("copy_threads")
    if threads is not None:
        check_extent(f"{SOURCE}: copy_threads", threads, 1, 64)
    directory = values.get("directory")
    if directory is not None and (not isinstance(directory, str) or not directory):
        raise ConfigError(f"{SOURCE}: directory is {directory!r}; allowed: a path")
    client_priority = values.get("client_priority", True)
    if not isinstance(client_priority, bool):
        raise ConfigError(f"{SOURCE}: client_priority is {client_priority!r}; allowed: true or false")
    return Options(
        host=parse_size(values["host"], f"{SOURCE}: host"),
        disk=parse_disk(values.get("disk")),
        store=store,
        max_wait=float(wait),
        load=load,
        copy_threads=threads,
        directory=directory,
        client_priority=client_priority,
    )


def parse_disk(value: object) -> tuple[DiskOption, ...]:
    """Reads the directories of the disk tier; none for None.

    Raises:
        ConfigError: A value is not allowed.
    """
    if value is None:
        return ()
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, (list, tuple)):
        raise ConfigError(f'{SOURCE}: disk is {value!r}; allowed: a list of {{"path": ..., "capacity": ...}}')
    disks: list[DiskOption] = []
    for i, entry in enumerate(entries):
        name = f"{SOURCE}: disk[{i}]"
        if not isinstance(entry, Mapping) or set(entry) != {"path", "capacity"}:
            raise ConfigError(f'{name} is {entry!r}; allowed: {{"path": ..., "capacity": ...}}')
        path = entry["path"]
        if not isinstance(path, str) or not path.startswith("/"):
            raise ConfigError(f"{name}: path is {path!r}; allowed: an absolute path")
        if any(path == other.path for other in disks):
            raise ConfigError(f"{name}: path {path!r} is given twice; allowed: once")
        disks.append(DiskOption(path, parse_size(entry["capacity"], f"{name}: capacity")))
    return tuple(disks)


@dataclass(frozen=True)
class RequestOptions:
    """What one request asks for, in kv_transfer_params["kvtier"].

    Attributes:
        tiers: From which tiers to load.
        max_load_tokens: At most so many tokens of it are loaded, None for no limit.
        max_store_tokens: At most so many of its first tokens are stored, None for no limit.
        namespace: The tenant: namespaces never share a block.
        prefetch_only: Whether it is there to have its blocks read from disk into host memory: it is put off
            until they are (max_wait at most) and stores nothing, and the reading goes on when it is aborted.
        pin: Seconds for which its blocks stay in host memory after it has finished, None for no longer
            than they are used.
        priority: "low", "normal" or "high" for what it stores (Engine.store()), None for the policy's choice.
        ttl: Seconds after which what it stores is gone, None for never.
    """

    tiers: tuple[str, ...] = TIERS
    max_load_tokens: int | None = None
    max_store_tokens: int | None = None
    namespace: str = ""
    prefetch_only: bool = False
    pin: float | None = None
    priority: str | None = None
    ttl: float | None = None


def parse_request_options(params: Mapping[str, Any] | None) -> RequestOptions:
    """Reads what a request asks for; other connectors' keys are not looked at.

    Raises:
        ConfigError: A key is not known, or a value is not allowed; the message is short whatever was sent.
    """
    if not params or REQUEST_KEY not in params:
        return RequestOptions()
    try:
        return _parse_request(params[REQUEST_KEY])
    except ConfigError as error:
        text = str(error)
        if len(text) <= 2 * _SHOWN:
            raise
        raise ConfigError(f"{text[:_SHOWN]} ... {text[-_SHOWN:]}") from None


def _parse_request(values: Any) -> RequestOptions:
    source = f'{PARAMS}["{REQUEST_KEY}"]'
    known = [field.name for field in fields(RequestOptions)]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source} is {values!r}; allowed: an object with {', '.join(known)}")
    for key in values:
        if key not in known:
            raise ConfigError(f"{source}: {key!r} is not a key; allowed: {', '.join(known)}")
    tiers = values.get("tiers", TIERS)
    if not isinstance(tiers, (list, tuple)) or any(tier not in TIERS for tier in tiers):
        raise ConfigError(f"{source}: tiers is {tiers!r}; allowed: a list of {', '.join(TIERS)}")
    limits: dict[str, int] = {}
    for key in ("max_load_tokens", "max_store_tokens"):
        if values.get(key) is not None:
            limits[key] = check_extent(f"{source}: {key}", values[key], 0, _MAX_TOKENS)
    prefetch_only = values.get("prefetch_only", False)
    if not isinstance(prefetch_only, bool):
        raise ConfigError(f"{source}: prefetch_only is {prefetch_only!r}; allowed: true or false")
    priority = values.get("priority")
    if priority is not None and priority not in PRIORITIES:
        raise ConfigError(f"{source}: priority is {priority!r}; allowed: {', '.join(PRIORITIES)}")
    return RequestOptions(
        tiers=tuple(tiers),
        namespace=_parse_namespace(values.get("namespace", ""), source),
        prefetch_only=prefetch_only,
        pin=_parse_seconds("pin", values.get("pin"), _MAX_PIN_SECONDS, source),
        priority=priority,
        ttl=_parse_seconds("ttl", values.get("ttl"), _MAX_TTL_SECONDS, source),
        **limits,
    )


def _parse_namespace(value: object, source: str) -> str:
    namespace = check_namespace(value)
    size = len(namespace.encode())
    if size > _MAX_NAMESPACE_BYTES:  # it is a client's, and the index keeps every one that stores
        raise ConfigError(
            f"{source}: namespace has {size} bytes; allowed: up to {_MAX_NAMESPACE_BYTES} (in UTF-8)"
        )
    return namespace


def _parse_seconds(name: str, value: object, most: int, source: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise ConfigError(f"{source}: {name} is {value!r}; allowed: seconds, above 0 and up to {most}")
    return float(value)
