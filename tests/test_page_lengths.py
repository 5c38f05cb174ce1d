"""Where tokens lie, on the host: against plain loops, and every error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_call import INT_MAX, SPEAKS_DLPACK, check_error, ints

from cupaged.page import get_batch_indices_positions, get_seq_lens

INT_MIN = -(2**31)


def test_flashinfers_own_example() -> None:
    """Of its documentation."""
    batch_indices, positions = get_batch_indices_positions([0, 1, 3, 6, 10], [5, 5, 5, 5], 10)
    assert batch_indices.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert positions.tolist() == [4, 3, 4, 2, 3, 4, 1, 2, 3, 4]
    assert batch_indices.dtype == positions.dtype == np.int32


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2**30 - 20)), max_size=8), st.data())
def test_batch_indices_and_positions_equal_a_loop(
    requests: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Of requests with so many new tokens behind so many old ones."""
    expected = [(r, old + j) for r, (new, old) in enumerate(requests) for j in range(new)]
    padding = data.draw(st.integers(0, 5))
    dtype = data.draw(st.sampled_from([np.int32, np.int64]))
    batch_indices, positions = get_batch_indices_positions(
        np.cumsum([0, *(new for new, _ in requests)]).astype(dtype),
        np.array([new + old for new, old in requests], dtype),
        len(expected) + padding,
    )
    found = list(zip(batch_indices.tolist(), positions.tolist(), strict=True))
    assert found == expected + [(-1, 0)] * padding
    assert batch_indices.dtype == positions.dtype == np.int32


@pytest.mark.parametrize("which", ["both", "batch_indices", "positions"])
def test_given_arrays_are_written_and_returned(which: str) -> None:
    memory = np.full((2, 9), 77, np.int32)
    given = {"batch_indices": memory[0, 1:8], "positions": memory[1, 1:8]}
    if which != "both":
        given = {which: given[which]}
    found = dict(
        zip(
            ("batch_indices", "positions"),
            get_batch_indices_positions([0, 2, 2, 5], [4, 9, 3], 7, **given),
            strict=True,
        )
    )
    assert found["batch_indices"].tolist() == [0, 0, 2, 2, 2, -1, -1]
    assert found["positions"].tolist() == [2, 3, 0, 1, 2, 0, 0]
    for name, array in given.items():
        assert found[name] is array
    assert (memory[:, [0, -1]] == 77).all()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 16)), max_size=8))
def test_lengths_equal_a_loop(requests: list[tuple[int, int]]) -> None:
    """Whatever the last page's length says of a request without pages."""
    expected = [(pages - 1) * 16 + last if pages else 0 for pages, last in requests]
    indptr = np.cumsum([0, *(pages for pages, _ in requests)])
    found = get_seq_lens(indptr, np.array([last for _, last in requests], np.int64), 16)
    assert found.tolist() == expected
    assert (type(found), found.dtype) == (np.ndarray, np.int32)


def test_a_request_without_pages_is_empty() -> None:
    assert get_seq_lens([0, 0, 1, 1, 1], [0, 16, 3, 16], 16).tolist() == [0, 16, 0, 0]
    assert get_seq_lens([0], [], 16).tolist() == []


def test_results_are_new_arrays() -> None:
    """Writing to them changes no argument, and no later result."""
    indptr, last = np.array([0, 2], np.int32), np.array([3], np.int32)
    get_seq_lens(indptr, last, 16)[:] = 99
    for array in get_batch_indices_positions(indptr, last, 2):
        array[:] = 99
    assert (indptr.tolist(), last.tolist()) == ([0, 2], [3])
    assert get_seq_lens(indptr, last, 16).tolist() == [19]
    found = [x.tolist() for x in get_batch_indices_positions(indptr, last, 2)]
    assert found == [[0, 0], [1, 2]]


def test_lengths_of_torch_are_of_torch() -> None:
    torch = pytest.importorskip("torch")
    indptr, last = torch.tensor([0, 2, 2]), torch.tensor([3, 0], dtype=torch.int32)
    lengths = get_seq_lens(indptr, last, 16)
    assert (type(lengths), lengths.dtype, lengths.tolist()) == (torch.Tensor, torch.int32, [19, 0])
    batch_indices, positions = get_batch_indices_positions(indptr, lengths, 3)
    assert (batch_indices.tolist(), positions.tolist()) == ([0, 0, -1], [17, 18, 0])
    assert batch_indices.dtype == positions.dtype == torch.int32
    given = torch.full((3,), 77, dtype=torch.int32)
    found, _ = get_batch_indices_positions(indptr, lengths, 3, batch_indices=given)
    assert found is given
    assert given.tolist() == [0, 0, -1]
    # The first that is no list decides.
    assert type(get_seq_lens([0, 2, 2], last, 16)) is torch.Tensor
    assert type(get_seq_lens(indptr.numpy(), last, 16)) is np.ndarray


def test_lengths_of_jax_are_of_jax() -> None:
    jax = pytest.importorskip("jax")
    lengths = get_seq_lens(jax.numpy.array([0, 2, 2]), [3, 0], 16)
    assert isinstance(lengths, jax.Array)
    assert (lengths.dtype, lengths.tolist()) == (np.int32, [19, 0])


# Errors

POSITIONS_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"nnz": 2.0}, TypeError, "nnz is a float, expected an int"),
    ({"nnz": True}, TypeError, "nnz is a bool, expected an int"),
    ({"nnz": -1}, ValueError, "nnz = -1, expected 0..1073741824"),
    ({"nnz": 2**31}, ValueError, "nnz = 2147483648, expected 0..1073741824"),
    ({"nnz": 4}, ValueError, "nnz = 4, expected at least 5 = append_indptr[-1]"),
    ({"append_indptr": None}, TypeError, f"append_indptr is None, {SPEAKS_DLPACK}"),
    (
        {"append_indptr": np.zeros(4)},
        TypeError,
        "append_indptr has dtype float64, expected int32 or int64",
    ),
    ({"append_indptr": ints()}, ValueError, "append_indptr has shape (0,), expected (batch + 1,)"),
    ({"append_indptr": ints(1, 2, 3, 5)}, ValueError, "append_indptr[0] = 1, expected 0"),
    (
        {"append_indptr": ints(0, 2, 1, 5)},
        ValueError,
        "append_indptr[2] = 1 (end of request 1), expected at least 2 = append_indptr[1]",
    ),
    ({"seq_lens": "x"}, TypeError, f"seq_lens is a str, {SPEAKS_DLPACK}"),
    (
        {"seq_lens": ints(4, 9)},
        ValueError,
        "seq_lens has shape (2,), expected (3,): append_indptr has 4 entries",
    ),
    (
        {"seq_lens": ints(4, 9, 2)},
        ValueError,
        "seq_lens[2] = 2, expected at least 3: append_indptr gives request 2 3 tokens. "
        "Were they counted in seq_lens?",
    ),
    (
        {"append_indptr": ints(0, 2, 3, 3), "seq_lens": ints(2, 0, 0)},
        ValueError,
        "seq_lens[1] = 0, expected at least 1: append_indptr gives request 1 1 token. "
        "Were they counted in seq_lens?",
    ),
    (
        {"seq_lens": ints(4, INT_MIN, 3)},
        ValueError,
        f"seq_lens[1] = {INT_MIN}, expected at least 0: append_indptr gives request 1 0 tokens",
    ),
    (
        {"seq_lens": ints(4, INT_MAX, 3)},
        ValueError,
        "seq_lens[1] = 2147483647, expected at most 1073741824",
    ),
    ({"batch_indices": [0] * 7}, TypeError, f"batch_indices is a list, {SPEAKS_DLPACK}"),
    (
        {"positions": np.zeros(6, np.int32)},
        ValueError,
        "positions has shape (6,), expected (7,)",
    ),
    (
        {"batch_indices": np.zeros(7, np.int64)},
        TypeError,
        "batch_indices is int64, expected int32",
    ),
    (
        {"positions": np.zeros(14, np.int32)[::2]},
        ValueError,
        "positions is not contiguous, expected one piece of memory",
    ),
    (
        {"positions": np.broadcast_to(np.int32(0), 7)},
        ValueError,
        "positions is a read-only array, expected one that can be written",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), POSITIONS_ERRORS)
def test_position_errors_and_nothing_is_written(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    batch_indices, positions = np.full((2, 7), 77, np.int32)
    arguments = {
        "append_indptr": ints(0, 2, 2, 5),
        "seq_lens": ints(4, 9, 3),
        "nnz": 7,
        "batch_indices": batch_indices,
        "positions": positions,
        **changes,
    }
    check_error(error, message, get_batch_indices_positions, **arguments)
    assert (batch_indices == 77).all()
    assert (positions == 77).all()


def test_results_that_would_share_memory() -> None:
    given = np.full(16, 77, np.int32)
    message = "batch_indices and positions share memory, expected elements of their own"
    for first, second in ((0, 0), (0, 6), (3, 0)):
        check_error(
            *(ValueError, message, get_batch_indices_positions, [0, 2, 2, 5], [4, 9, 3], 7),
            *(given[first : first + 7], given[second : second + 7]),
        )
    assert (given == 77).all()
    found = get_batch_indices_positions([0, 2, 2, 5], [4, 9, 3], 7, given[:7], given[7:14])
    assert [x.tolist() for x in found] == [[0, 0, 2, 2, 2, -1, -1], [2, 3, 0, 1, 2, 0, 0]]


LENGTH_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"page_size": 0}, ValueError, "page_size = 0, expected at least 1"),
    ({"page_size": 16.0}, TypeError, "page_size is a float, expected an int"),
    ({"kv_indptr": None}, TypeError, f"kv_indptr is None, {SPEAKS_DLPACK}"),
    (
        {"kv_indptr": ints(0, 2, 1, 1)},
        ValueError,
        "kv_indptr[2] = 1 (end of request 1), expected at least 2 = kv_indptr[1]",
    ),
    (
        {"kv_last_page_len": ints(4, 16)},
        ValueError,
        "kv_last_page_len has shape (2,), expected (3,): kv_indptr has 4 entries",
    ),
    (
        {"kv_last_page_len": ints(17, 16, 0)},
        ValueError,
        "kv_last_page_len[0] = 17, expected 1..16 (page_size=16)",
    ),
    (
        {"kv_last_page_len": np.zeros(3, np.int16)},
        TypeError,
        "kv_last_page_len has dtype int16, expected int32 or int64",
    ),
    (
        {"page_size": 2**30},
        ValueError,
        "kv_indptr: request 0 has 2 pages of 1073741824 tokens, expected at most 1073741824 tokens",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), LENGTH_ERRORS)
def test_length_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "kv_indptr": ints(0, 2, 3, 3),
        "kv_last_page_len": ints(4, 16, 0),
        "page_size": 16,
        **changes,
    }
    check_error(error, message, get_seq_lens, **arguments)
