"""The order of the planner's items: the longest first, equal ones as they come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_schedule import build, spec_of

from cupaged.item_table import longest_first


def expected(kv_tiles: np.ndarray) -> list[int]:
    """Python's own sort, which is stable."""
    return sorted(range(len(kv_tiles)), key=lambda i: -int(kv_tiles[i]))


@given(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 2**25)), min_size=1))
def test_few_items(kv_tiles: list[int]) -> None:
    values = np.array(kv_tiles, np.int32)
    assert longest_first(values).tolist() == expected(values)


@pytest.mark.parametrize("count", [2047, 2048, 2049, 4095, 4096, 10_000])
@pytest.mark.parametrize("longest", [0, 3, 255, 256, 2**16 - 1, 2**16, 2**18 - 1, 2**19, 2**25])
def test_many_items(count: int, longest: int, rng: np.random.Generator) -> None:
    """Around the lengths and the counts from which on they are sorted otherwise."""
    values = rng.integers(0, longest + 1, count, dtype=np.int32)
    values[rng.integers(count)] = longest
    before = values.copy()
    assert longest_first(values).tolist() == expected(values)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("group", [1, 4, 5, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_every_tile_of_a_large_batch(group: int, causal: bool, rng: np.random.Generator) -> None:
    """Thousands of query tiles: request, row and keys of each, by plain Python."""
    spec = spec_of(group=group, num_kv_heads=8, causal=causal)
    qo_len, kv_len = rng.integers(200, 2000, 900), rng.integers(0, 9000, 900)
    batch = list(zip(qo_len.tolist(), kv_len.tolist(), strict=True))
    (launch,) = build(spec, batch, disable_split_kv=True).launches
    cta_tile_q, cta_tile_kv = launch.config.cta_tile_q, launch.config.cta_tile_kv
    found = []
    for r, (queries, keys) in enumerate(batch):
        for row_begin in range(0, queries * group, cta_tile_q):
            last = min((row_begin + cta_tile_q - 1) // group, queries - 1)
            found.append((r, row_begin, max(keys - queries + last + 1, 0) if causal else keys))
    assert len(found) > 2048
    found.sort(key=lambda tile: tile[2] // -cta_tile_kv)
    items = launch.items[["request", "row_begin", "kv_end"]].tolist()
    assert items == found
