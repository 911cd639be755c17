"""Config: what is accepted, and that every refusal names the key, the value and what is allowed."""

import copy
import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier import Config, ConfigError, KVLayout, parse_size

LAYOUT = KVLayout(2, 2, 8, "float16", 16)
GOOD: dict[str, Any] = {"groups": [LAYOUT], "host": "1MiB", "model": "m@1"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64GiB", 64 << 30),
        ("1.5 GB", 1_500_000_000),
        ("2 kib", 2048),
        ("3M", 3_000_000),
        ("1TiB", 1 << 40),
        ("4096", 4096),
        ("12B", 12),
        (7, 7),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1 XB", "1..5GB", 0, -1, 1.5, None, True, "1iB", 2**63, "9" * 309]
)
def test_a_bad_size_names_key_value_and_what_is_allowed(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"^host is .*; allowed: ") as caught:
        parse_size(text, "host")
    assert repr(text) in str(caught.value)


def test_a_config_knows_its_sizes_in_bytes() -> None:
    config = Config(**GOOD, chunk="2MiB")
    assert (config.host_bytes, config.chunk_bytes, config.block_tokens) == (1 << 20, 2 << 20, 16)
    assert config.groups == (LAYOUT,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"groups": []}, "groups is"),
        ({"groups": ["x"]}, r"groups\[0\] is 'x'"),
        ({"groups": None}, "groups is None"),
        ({"host": 8191}, "host is 8191; allowed: at least one block of every group, 8192 bytes"),
        ({"host": "10 bananas"}, "host is '10 bananas'"),
        ({"model": ""}, "model is ''"),
        ({"block_tokens": 0}, "block_tokens is 0; allowed"),
        ({"block_tokens": 24}, "block_tokens is 24 and page_tokens of groups.0. is 16"),
        ({"block_tokens": 16.0}, "block_tokens is 16.0"),
        ({"world_size": 0}, "world_size is 0"),
        ({"copy_threads": 0}, "copy_threads is 0; allowed: an integer from 1 to 64"),
        ({"copy_threads": True}, "copy_threads is True"),
        ({"chunk": "0"}, "chunk is '0'"),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_allowed(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**{**GOOD, **changed})


@pytest.mark.parametrize(
    ("groups", "options", "least"),
    [
        ([LAYOUT], {}, 8192),
        ([LAYOUT], {"block_tokens": 32}, 8192),  # 4096 bytes: no padding
        ([LAYOUT], {"world_size": 3}, 12288),
        ([KVLayout.mla(1, 8, "uint8", 16)], {"world_size": 3}, 8192),  # has its bytes once
        ([LAYOUT, KVLayout(2, 5, 8, "float16", 16)], {}, 20480),
    ],
)
def test_the_least_host_tier_opens_and_a_byte_less_is_refused_by_the_config(
    groups: list[KVLayout], options: dict[str, int], least: int
) -> None:
    given = {"groups": groups, "model": "m@1", **options}
    message = f"host is {least - 1}; allowed: at least one block of every group, {least} bytes"
    with pytest.raises(ConfigError, match=message):
        Config(host=least - 1, **given)
    with kvtier.open(Config(host=least, **given)) as engine:
        assert all(size_class.capacity > 0 for size_class in engine.stats().host)


def test_a_key_that_there_is_not_is_named_with_those_there_are() -> None:
    message = "^Config: 'hots' is not a key; allowed: groups, host, model, .*gpu_load_rate$"
    with pytest.raises(ConfigError, match=message):
        Config(**GOOD, hots=1)
    config = Config(**GOOD, chunk="2MiB")
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, hots=1)  # type: ignore[call-arg]
    assert pickle.loads(pickle.dumps(config)) == copy.copy(config) == config
    assert list(inspect.signature(Config).parameters) == [field.name for field in dataclasses.fields(Config)]
    with pytest.raises(TypeError, match="'groups'"):
        Config(host=1, model="m@1")  # type: ignore[call-arg]


def test_numpy_integers_are_kept_as_ints() -> None:
    numbers = {
        "block_tokens": 32,
        "world_size": 2,
        "host_numa_node": 0,
        "copy_threads": 3,
        "disk_queue_depth": 4,
        "events": 5,
        "gpu_copy_sms": 6,
    }
    config = Config(**GOOD, **{key: np.int64(number) for key, number in numbers.items()})
    assert config.fingerprint() == Config(**GOOD, **numbers).fingerprint()
    assert {key: getattr(config, key) for key in numbers} == numbers
    assert {type(getattr(config, key)) for key in numbers} == {int}


def test_a_toml_file_gives_the_same_config(tmp_path: Path) -> None:
    file = tmp_path / "kvtier.toml"
    file.write_text(
        'host = "1MiB"\nmodel = "m@1"\nblock_tokens = 32\n'
        '[[groups]]\nnum_layers = 2\nnum_kv_heads = 2\nhead_dim = 8\ndtype = "float16"\npage_tokens = 16\n'
        '[[groups]]\nnum_layers = 1\nlatent_dim = 8\ndtype = "bfloat16"\npage_tokens = 16\n'
    )
    mla = KVLayout.mla(1, 8, "bfloat16", 16)
    assert Config.load(file) == Config(groups=[LAYOUT, mla], host="1MiB", model="m@1", block_tokens=32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('hots = "1MiB"', "'hots' is not a key; allowed: groups, host"),
        ('host = "1MiB"', "'groups' is missing"),
        ('host = "1MiB"\nmodel = "m"\ngroups = []\ndisk = 3', "disk is 3; allowed: tables with path"),
        ('host = "1MiB"\nmodel = "m"\ngroups = []\ndisk = [{path = "/a"}]', r"disk\[0\] is .*; allowed"),
        ("host = ", "not TOML"),
        ('host = "1MiB"\nmodel = "m"\n[[groups]]\nlayers = 2', r"groups\[0\]: 'layers' is not a key"),
        ('host = "1MiB"\nmodel = "m"\n[[groups]]\nnum_layers = 2', r"groups\[0\]: 'dtype' is missing"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong_in_it(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "kvtier.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Config.load(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Config.load(tmp_path / "none.toml")


def test_the_environment_beats_defaults() -> None:
    environ = {"KVTIER_HOST": "2MiB", "KVTIER_COPY_THREADS": "3", "OTHER": "x"}
    config = Config.from_env(environ, **GOOD)
    assert (config.host_bytes, config.copy_threads) == (2 << 20, 3)


def test_variables_that_are_not_configuration_are_left_to_whom_they_are_for() -> None:
    environ = {"KVTIER_CATALOG_HELPER": "/opt/kvtier-catalog", "KVTIER_SECRET": 64 * "0"}
    assert Config.from_env({**environ, "KVTIER_DISK_KEY": "env:KVTIER_SECRET"}, **GOOD).disk_key is not None
    assert Config.from_env(environ, disk_key="env:KVTIER_SECRET", **GOOD).disk_key is not None
    with pytest.raises(ConfigError, match="KVTIER_SECRET is not a variable of kvtier"):
        Config.from_env(environ, **GOOD)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("KVTIER_HOTS", "1", "KVTIER_HOTS is not a variable of kvtier; allowed: KVTIER_CONFIG, KVTIER_HOST"),
        ("KVTIER_COPY_THREADS", "many", "KVTIER_COPY_THREADS is 'many'; allowed: an integer"),
    ],
)
def test_a_bad_variable_is_named(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_env({variable: text}, **GOOD)


def test_a_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="model"):
        Config(**{**GOOD, "model": 3})


def test_open_refuses_what_is_no_config() -> None:
    with pytest.raises(ConfigError, match="config is"):
        kvtier.open({"host": 1})  # type: ignore[arg-type]
