"""K and V that are to be written: which of them share memory, on the host and on a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_call import check_error, pages

from cupaged import validate_run


class OnDevice:
    """An array in the host's memory that passes for one on a device."""

    def __init__(self, host: np.ndarray) -> None:
        self.data = SimpleNamespace(ptr=host.ctypes.data)
        self.shape, self.strides, self.size = host.shape, host.strides, host.size


def tokens_of(kv_layout: str) -> tuple[int, ...]:
    return (5, 16, 2, 64) if kv_layout == "NHD" else (5, 2, 16, 64)


SHARED = "k cache and v cache share memory, expected elements of their own"


@pytest.mark.parametrize("on", [np.asarray, OnDevice])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_k_and_v_that_share_memory_are_found(on: Any, kv_layout: str) -> None:
    shape = tokens_of(kv_layout)
    same, (num_pages, one, other, _) = pages(*shape), shape
    more, wider = pages(num_pages + 1, *shape[1:]), pages(num_pages, one, other + 1, 64)
    for k, v in (
        (same, same),
        (same, same[::-1]),
        (same[::-1], same),
        (more[1:], more[:-1]),
        (more[:-1], more[1:]),
        (wider[:, :, 1:], wider[:, :, :-1]),
        (same[:3], same),
        (wider[1:, :, 1:], wider[:-1, :, :-1]),
    ):
        assert np.shares_memory(k, v)
        check_error(ValueError, SHARED, validate_run.own_memory, on(k), on(v))
    rows = np.lib.stride_tricks.as_strided(same, shape, (0, *same.strides[1:]))
    message = "v cache has a stride of 0 on axis 0, expected elements of their own"
    check_error(ValueError, message, validate_run.own_memory, on(more), on(rows))


@pytest.mark.parametrize("on", [np.asarray, OnDevice])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_k_and_v_beside_each_other_in_one_piece_of_memory(on: Any, kv_layout: str) -> None:
    num_pages, one, other, head_dim = tokens_of(kv_layout)
    for axis in range(5):
        shape = [num_pages, one, other, head_dim]
        shape.insert(axis, 2)
        k, v = np.moveaxis(pages(*shape), axis, 0)
        validate_run.own_memory(on(k), on(v))
        validate_run.own_memory(on(v), on(k[::-1]))
    both = pages(num_pages, one, other, 2 * head_dim)
    validate_run.own_memory(on(both[..., :head_dim]), on(both[..., head_dim:]))
    validate_run.own_memory(on(both[:0]), on(both[:0]))


@given(st.data())
def test_what_is_refused_does_share_memory(data: st.DataObject) -> None:
    """Whatever the strides are."""
    memory, found = np.zeros(4000, np.float16), []
    for _ in "kv":
        shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
        steps = data.draw(st.tuples(*[st.integers(1, 300)] * 3))
        begin = data.draw(st.integers(0, 1000))
        view = np.lib.stride_tricks.as_strided(memory[begin:], shape, [2 * step for step in steps])
        found.append(
            view[tuple(slice(None, None, data.draw(st.sampled_from((1, -1)))) for _ in shape)]
        )
    for on in (np.asarray, OnDevice):
        try:
            validate_run.own_memory(*map(on, found))
        except ValueError:
            assert np.shares_memory(*found)
