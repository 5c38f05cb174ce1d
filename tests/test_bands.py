"""What other libraries' masks become, against their definition, key by key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from formula import visible
from hypothesis import given
from hypothesis import strategies as st

from cupaged.bands import Band, View, bottom_right, top_left, view

Array = np.ndarray[Any, Any]

LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)
EDGE = st.none() | st.integers(0, 10)


def int64(values: Any) -> Array:
    return np.array(list(values), np.int64)


def defined(band: Band, r: int) -> Array:
    """Bool [qo_len, kv_len] of request `r`, by the letter."""
    rows, keys = int(band.qo_len[r]), int(band.kv_len[r])
    seen = np.zeros((rows, keys), np.bool_)
    for i in range(rows):
        for j in range(keys):
            on = i + band.diagonal[r]
            seen[i, j] = (band.left is None or j >= on - band.left) and (
                band.right is None or j <= on + band.right
            )
    return seen


def planned(band: Band, found: View, r: int, first_bit: int) -> tuple[Array, int]:
    """What `plan()` shows request `r`, and the bit at which the next one's mask begins."""
    rows, keys = int(band.qo_len[r]), int(found.kv_len[r])
    mask = None
    if found.packed_mask is not None:
        bits = np.unpackbits(found.packed_mask, bitorder="little")
        mask = bits[first_bit : first_bit + rows * keys].reshape(rows, keys).astype(np.bool_)
        first_bit += -(-rows * keys // 8) * 8
    seen = np.zeros((rows, int(band.kv_len[r])), np.bool_)
    seen[:, :keys] = visible(rows, keys, found.causal, found.window_left, mask)
    return seen, first_bit


def check(band: Band) -> View:
    found = view(band)
    first_bit = 0
    for r in range(len(band.qo_len)):
        seen, first_bit = planned(band, found, r, first_bit)
        np.testing.assert_array_equal(seen, defined(band, r), err_msg=f"request {r} of {found}")
    if found.packed_mask is not None:
        assert len(found.packed_mask) * 8 == first_bit
    return found


@given(LENGTHS, st.data(), EDGE, EDGE)
def test_any_band(lengths: list[tuple[int, int]], data: Any, left: Any, right: Any) -> None:
    qo_len, kv_len = (int64(column) for column in zip(*lengths, strict=True))
    diagonal = int64(data.draw(st.integers(-8, 8)) for _ in lengths)
    check(Band(qo_len, kv_len, diagonal, left, right))


@given(LENGTHS, EDGE)
def test_bottom_right_needs_no_mask_where_plan_has_words(
    lengths: list[tuple[int, int]], left: int | None
) -> None:
    qo_len, kv_len = (int64(column) for column in zip(*lengths, strict=True))
    for right in (None, 0):
        assert check(bottom_right(qo_len, kv_len, left, right)).packed_mask is None


@given(LENGTHS, EDGE)
def test_top_left_needs_no_mask_where_keys_reach(
    lengths: list[tuple[int, int]], left: int | None
) -> None:
    qo_len = int64(n for n, _ in lengths)
    kv_len = qo_len + int64(m for _, m in lengths)
    found = check(top_left(qo_len, kv_len, left, 0))
    assert found.packed_mask is None
    assert (found.kv_len[qo_len > 0] == qo_len[qo_len > 0]).all()  # others are never loaded


@pytest.mark.parametrize(
    ("band", "causal", "window_left", "masked"),
    [
        (bottom_right(int64([1, 1]), int64([7, 3]), None, 0), False, -1, False),
        (bottom_right(int64([1, 2]), int64([7, 3]), None, 0), True, -1, False),
        (bottom_right(int64([1, 2]), int64([7, 3]), 9, 0), True, -1, False),
        (bottom_right(int64([1, 2]), int64([7, 3]), 5, 0), True, 5, False),
        (bottom_right(int64([4, 2]), int64([7, 3]), None, 3), False, -1, False),
        (bottom_right(int64([4, 2]), int64([7, 3]), None, 2), False, -1, True),
        (top_left(int64([4]), int64([3]), None, 0), False, -1, True),
        (top_left(int64([4, 1]), int64([4, 9]), 2, 0), True, 2, False),
        (bottom_right(int64([0, 2]), int64([7, 7]), None, 0), True, -1, False),
    ],
)
def test_words(band: Band, causal: bool, window_left: int, masked: bool) -> None:
    found = check(band)
    assert (found.causal, found.window_left) == (causal, window_left)
    assert (found.packed_mask is not None) == masked
