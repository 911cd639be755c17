"""KVLayout: arithmetic, dtypes however they are written, and fingerprints that tell layouts apart."""

from typing import Any

import numpy as np
import pytest
import torch

from kvtier import ConfigError, KVLayout


def test_bytes_of_a_token_page_and_block_are_exact() -> None:
    layout = KVLayout(32, 8, 128, "bfloat16", 16)
    assert layout.token_bytes == 2 * 8 * 128 * 2
    assert layout.page_bytes(0) == 16 * layout.token_bytes
    assert layout.page_bytes() == 32 * layout.page_bytes(31)
    assert layout.block_bytes(64) == 64 * 32 * layout.token_bytes
    assert (layout.pages_per_block(64), layout.blocks_per_page(64)) == (4, 1)
    assert (layout.pages_per_block(4), layout.blocks_per_page(4)) == (1, 4)


def test_a_latent_has_one_part_and_one_head_on_every_rank() -> None:
    layout = KVLayout.mla(61, 576, "bfloat16", 64)
    assert layout.token_bytes == 1152
    assert (layout.num_parts, layout.page_order, layout.replicated) == (1, "TD", True)


@pytest.mark.parametrize(
    ("dtype", "name", "item_bytes"),
    [
        ("bfloat16", "bfloat16", 2),
        (torch.bfloat16, "bfloat16", 2),
        (torch.float8_e4m3fn, "float8_e4m3fn", 1),
        ("half", "float16", 2),
        (np.float32, "float32", 4),
        (np.dtype("int8"), "int8", 1),
        (float, "float64", 8),
        (3, "bytes3", 3),
        ("bytes3", "bytes3", 3),
    ],
)
def test_a_dtype_is_read_however_it_is_written(dtype: Any, name: str, item_bytes: int) -> None:
    layout = KVLayout(1, 1, 1, dtype, 1)
    assert (layout.dtype, layout.item_bytes) == (name, item_bytes)


@pytest.mark.parametrize("dtype", ["bfloat17", "O", object, None, 0, 65, True, "S4"])
def test_an_unknown_dtype_is_refused_by_name(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="dtype is"):
        KVLayout(1, 1, 1, dtype, 1)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "page_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", None, True, 2**31])
def test_a_bad_extent_names_field_value_and_range(field: str, value: Any) -> None:
    good = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "dtype": "int8", "page_tokens": 1}
    with pytest.raises(ConfigError, match=f"{field} is .*; allowed: an integer from 1 to 2147483647"):
        KVLayout(**{**good, field: value})


def test_numpy_integers_are_kept_as_ints() -> None:
    fields = ("num_layers", "num_kv_heads", "head_dim", "page_tokens", "window_tokens", "num_parts")
    numbers: dict[str, Any] = dict(zip(fields, (3, 2, 8, 16, 64, 2), strict=True))
    layout = KVLayout(dtype="int8", **{field: np.int64(number) for field, number in numbers.items()})
    assert layout.fingerprint() == KVLayout(dtype="int8", **numbers).fingerprint()
    assert {type(getattr(layout, field)) for field in fields} == {int}


@pytest.mark.parametrize("replicated", [1, None, "yes"])
def test_replicated_is_a_bool(replicated: Any) -> None:
    with pytest.raises(ConfigError, match=f"replicated is {replicated!r}; allowed: True or False"):
        KVLayout(1, 1, 1, "int8", 1, replicated=replicated)


@pytest.mark.parametrize("order", ["KTH", "KTHDD", "THD", "KTD", "XKTHD", "", None, ["K"]])
def test_a_page_order_without_a_needed_axis_is_refused(order: Any) -> None:
    with pytest.raises(ConfigError, match="page_order is"):
        KVLayout(1, 2, 4, "int8", 1, order)


def test_axes_of_extent_one_may_be_left_out_of_page_order() -> None:
    assert KVLayout(1, 1, 4, "int8", 1, "KTD").page_order == "KTD"


def test_fingerprints_differ_in_everything_but_the_name() -> None:
    layouts = [
        KVLayout(2, 2, 4, "float16", 16),
        KVLayout(3, 2, 4, "float16", 16),
        KVLayout(2, 4, 4, "float16", 16),
        KVLayout(2, 2, 8, "float16", 16),
        KVLayout(2, 2, 4, "bfloat16", 16),
        KVLayout(2, 2, 4, 2, 16),
        KVLayout(2, 2, 4, "float16", 32),
        KVLayout(2, 2, 4, "float16", 16, "KHTD"),
        KVLayout(2, 2, 4, "float16", 16, window_tokens=64),
        KVLayout.mla(2, 4, "float16", 16),
    ]
    assert len({layout.fingerprint() for layout in layouts}) == len(layouts)
    assert all(len(layout.fingerprint()) == 32 for layout in layouts)
    assert KVLayout(2, 2, 4, "float16", 16, name="a").fingerprint() == layouts[0].fingerprint()
