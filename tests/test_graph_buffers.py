"""What the constructors take for CUDA graphs: sizes or buffers, by the full text of every error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from decode_calls import Decode
from machine import ndarray
from small_call import SPEAKS_DLPACK, Wrapper, check_error, ints

from cupaged.graph_buffers import graph_buffers

NAMES = {
    Wrapper: (
        "qo_indptr_buf",
        "paged_kv_indptr_buf",
        "paged_kv_indices_buf",
        "paged_kv_last_page_len_buf",
    ),
    Decode: (
        "paged_kv_indptr_buffer",
        "paged_kv_indices_buffer",
        "paged_kv_last_page_len_buffer",
    ),
}
ALL_OF = {
    Wrapper: "qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf and "
    "paged_kv_last_page_len_buf",
    Decode: "paged_kv_indptr_buffer, paged_kv_indices_buffer and paged_kv_last_page_len_buffer",
}
OWN = {"max_batch_size": 3, "max_num_pages": 5}
both_kinds = pytest.mark.parametrize("kind", [Wrapper, Decode])


def buffers_of(kind: type, batch: int = 3, pages: int = 5, **changes: Any) -> dict[str, Any]:
    """A constructor's buffers on the device."""
    *indptrs, indices, last_page_len = NAMES[kind]
    sizes = dict.fromkeys(indptrs, batch + 1) | {indices: pages, last_page_len: batch}
    return {name: ndarray(np.full(n, -7, np.int32)) for name, n in sizes.items()} | changes


@both_kinds
def test_sizes_or_buffers_are_needed_and_not_both(kind: type) -> None:
    without = (
        "use_cuda_graph=True without {}: expected " + ALL_OF[kind] + "; or max_batch_size and "
        "max_num_pages, for buffers of the library's own"
    )
    table: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"use_cuda_graph": 1, **OWN}, TypeError, "use_cuda_graph is an int, expected a bool"),
        ({"use_cuda_graph": None}, TypeError, "use_cuda_graph is a NoneType, expected a bool"),
        ({}, ValueError, without.format("max_batch_size")),
        ({"max_num_pages": 5}, ValueError, without.format("max_batch_size")),
        ({"max_batch_size": 3}, ValueError, without.format("max_num_pages")),
        (OWN | {"max_batch_size": 2.0}, TypeError, "max_batch_size is a float, expected an int"),
        (OWN | {"max_batch_size": 0}, ValueError, "max_batch_size = 0, expected at least 1"),
        (OWN | {"max_num_pages": True}, TypeError, "max_num_pages is a bool, expected an int"),
        (OWN | {"max_num_pages": -3}, ValueError, "max_num_pages = -3, expected at least 1"),
        (
            OWN | {"backend": "reference"},
            ValueError,
            "use_cuda_graph=True with backend='reference', which launches nothing",
        ),
    ]
    for name, value in {**buffers_of(kind), **OWN}.items():
        message = f"{name} is given, which takes effect with use_cuda_graph=True"
        table.append(({"use_cuda_graph": False, name: value}, ValueError, message))
    for name, value in OWN.items():
        message = f"{name} is given beside buffers, whose lengths say as much"
        table.append((buffers_of(kind, **{name: value}), ValueError, message))
    for name in NAMES[kind]:
        message = f"{name} is missing: expected {ALL_OF[kind]}, or none of them"
        table.append((buffers_of(kind, **{name: None}), ValueError, message))
    for arguments, error, message in table:
        check_error(error, message, kind, **{"use_cuda_graph": True} | arguments)


@both_kinds
def test_what_is_no_buffer(kind: type) -> None:
    table: list[tuple[Any, type[Exception], str]] = [
        (3, TypeError, f"is an int, {SPEAKS_DLPACK}"),
        ([0, 1, 2], TypeError, f"is a list, {SPEAKS_DLPACK}"),
        (ints(0, 1), ValueError, "is on the host, expected a CUDA device: use_cuda_graph=True"),
        (
            np.broadcast_to(np.int32(0), 9),
            ValueError,
            "is a read-only array, expected one that can be written",
        ),
        (ndarray(np.zeros(9, np.int64)), TypeError, "has dtype int64, expected int32"),
        (ndarray(np.zeros(9, np.uint32)), TypeError, "has dtype uint32, expected int32"),
        (
            ndarray(np.zeros((3, 3), np.int32)),
            ValueError,
            "has shape (3, 3), expected one contiguous axis",
        ),
        (
            ndarray(np.zeros(9, np.int32)[::2]),
            ValueError,
            "has shape (5,), expected one contiguous axis",
        ),
    ]
    for name in NAMES[kind]:
        for value, error, words in table:
            arguments = buffers_of(kind, **{name: value})
            check_error(error, f"{name} {words}", kind, use_cuda_graph=True, **arguments)


@both_kinds
def test_buffers_that_do_not_fit_each_other(kind: type) -> None:
    *indptrs, indices, last_page_len = NAMES[kind]
    for name in indptrs:
        arguments = buffers_of(kind, **{name: ndarray(ints(0, 0, 0))})
        message = f"{name} has 3 entries, expected 4: {last_page_len} has 3"
        check_error(ValueError, message, kind, use_cuda_graph=True, **arguments)
    for name in (*indptrs, last_page_len):
        there = ndarray(np.zeros(len(buffers_of(kind)[name]), np.int32), device=1)
        message = f"{name} is on cuda:1, expected cuda:0 as {indices} is"
        arguments = buffers_of(kind, **{name: there})
        check_error(ValueError, message, kind, use_cuda_graph=True, **arguments)


def test_no_buffers_without_graphs() -> None:
    names = dict.fromkeys(NAMES[Decode])
    assert graph_buffers(False, names, None, None) is None
    assert not Decode().is_cuda_graph_enabled
    found = graph_buffers(True, names, 3, np.int64(5))
    assert found is not None
    assert (found.max_batch, found.max_pages, found.indices) == (3, 5, None)
    given_buffers = buffers_of(Decode)
    found = graph_buffers(True, given_buffers, None, None)
    assert found is not None
    assert (found.max_batch, found.max_pages, found.qo_indptr) == (3, 5, None)
    assert [found.indptr, found.indices, found.last_page_len] == list(given_buffers.values())
