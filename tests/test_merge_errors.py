"""Every error of the functions that merge states, by its type and full text; nothing is written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided as repeated
from small_call import SPEAKS_DLPACK, check_error

from cupaged.merging import merge_state, merge_state_in_place, merge_states

Row = tuple[dict[str, Any], type[Exception], str]
AXES = "(seq_len, num_heads, head_dim)"
SERVED = "expected one of float16, bfloat16, float32"


def output(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.full(shape or (5, 2, 16), 7, dtype)


def lse(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.full(shape or (5, 2), 7, dtype)


def rows(first: str, s_first: str, other: str, s_other: str) -> list[Row]:
    """What is wrong with two states, by what the call names its arguments."""
    strided = "elements on its last axis, expected 1: head_dim must be contiguous"
    return [
        ({first: None}, TypeError, f"{first} is None, {SPEAKS_DLPACK}"),
        ({s_first: [1.0]}, TypeError, f"{s_first} is a list, {SPEAKS_DLPACK}"),
        ({other: 3}, TypeError, f"{other} is an int, {SPEAKS_DLPACK}"),
        ({s_other: "s"}, TypeError, f"{s_other} is a str, {SPEAKS_DLPACK}"),
        # The first state
        ({first: output(5, 32)}, ValueError, f"{first} has shape (5, 32), expected {AXES}"),
        (
            {first: output(5, 2, 2, 16)},
            ValueError,
            f"{first} has shape (5, 2, 2, 16), expected {AXES}",
        ),
        (
            {first: output(5, 2, 0)},
            ValueError,
            f"{first} has shape (5, 2, 0), expected a head_dim of at least 1",
        ),
        ({first: output(dtype=np.float64)}, TypeError, f"{first} is float64, {SERVED}"),
        (
            {first: output(dtype=ml_dtypes.float8_e4m3fn)},
            TypeError,
            f"{first} is float8_e4m3fn, {SERVED}",
        ),
        ({first: output(dtype=np.int16)}, TypeError, f"{first} is int16, {SERVED}"),
        (
            {first: output(dtype=">f2")},
            TypeError,
            f"{first} is float16 in foreign byte order, {SERVED}",
        ),
        ({first: output(5, 2, 32)[..., ::2]}, ValueError, f"{first} has a stride of 2 {strided}"),
        ({first: output()[..., ::-1]}, ValueError, f"{first} has a stride of -1 {strided}"),
        (
            {first: repeated(output(1, 1, 1), (2**29 + 1, 2, 1), (0, 0, 2))},
            ValueError,
            f"{first} has 536870913 rows of 2 heads, expected at most 1073741824 rows times heads "
            "in a call",
        ),
        (
            {s_first: lse(5, 2, 1)},
            ValueError,
            f"{s_first} has shape (5, 2, 1), expected (5, 2) = (seq_len, num_heads)",
        ),
        (
            {s_first: lse(2, 5)},
            ValueError,
            f"{s_first} has shape (2, 5), expected (5, 2) = (seq_len, num_heads)",
        ),
        ({s_first: lse(dtype=np.float16)}, TypeError, f"{s_first} is float16, expected float32"),
        ({s_first: lse(dtype=np.float64)}, TypeError, f"{s_first} is float64, expected float32"),
        # The other one
        (
            {other: output(4, 2, 16)},
            ValueError,
            f"{other} has shape (4, 2, 16), expected (5, 2, 16) as {first} has",
        ),
        (
            {other: output(5, 2, 17)},
            ValueError,
            f"{other} has shape (5, 2, 17), expected (5, 2, 16) as {first} has",
        ),
        (
            {other: output(dtype=ml_dtypes.bfloat16)},
            TypeError,
            f"{other} is bfloat16, expected float16 as {first} is",
        ),
        ({other: output(5, 2, 48)[..., ::3]}, ValueError, f"{other} has a stride of 3 {strided}"),
        (
            {s_other: lse(5, 1)},
            ValueError,
            f"{s_other} has shape (5, 1), expected (5, 2) = (seq_len, num_heads)",
        ),
        ({s_other: lse(dtype=np.int32)}, TypeError, f"{s_other} is int32, expected float32"),
    ]


def two(**changes: Any) -> dict[str, Any]:
    return {"v_a": output(), "s_a": lse(), "v_b": output(), "s_b": lse(), **changes}


def in_place(**changes: Any) -> dict[str, Any]:
    return {"v": output(), "s": lse(), "v_other": output(), "s_other": lse(), **changes}


@pytest.mark.parametrize(("changes", "error", "message"), rows("v_a", "s_a", "v_b", "s_b"))
def test_errors_of_merge_state(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    check_error(error, message, merge_state, **two(**changes))


IN_PLACE: list[Row] = [
    *rows("v", "s", "v_other", "s_other"),
    (
        {"v": np.broadcast_to(np.float16(0), (5, 2, 16))},
        ValueError,
        "v is a read-only array, expected one that can be written",
    ),
    (
        {"s": np.broadcast_to(np.float32(0), (5, 2))},
        ValueError,
        "s is a read-only array, expected one that can be written",
    ),
    (
        {"v": repeated(output(5, 16), (5, 2, 16), (32, 0, 2))},
        ValueError,
        "v has a stride of 0 on axis 1, expected elements of their own: it is merged in place",
    ),
    (
        {"s": repeated(lse(1, 2), (5, 2), (0, 4))},
        ValueError,
        "s has a stride of 0 on axis 0, expected elements of their own: it is merged in place",
    ),
    ({"mask": [True] * 5}, TypeError, f"mask is a list, {SPEAKS_DLPACK}"),
    (
        {"mask": np.ones(4, np.bool_)},
        ValueError,
        "mask has shape (4,), expected (5,) = (seq_len,)",
    ),
    (
        {"mask": np.ones((5, 2), np.bool_)},
        ValueError,
        "mask has shape (5, 2), expected (5,) = (seq_len,)",
    ),
    ({"mask": np.ones(5, np.int32)}, TypeError, "mask is int32, expected bool or uint8"),
    ({"mask": np.ones(5, np.int8)}, TypeError, "mask is int8, expected bool or uint8"),
]


@pytest.mark.parametrize(("changes", "error", "message"), IN_PLACE)
def test_errors_of_merge_state_in_place(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = in_place(**changes)
    check_error(error, message, merge_state_in_place, **given)
    for name in {"v", "s", "v_other", "s_other"} - set(changes):
        assert (given[name] == 7).all(), name


STATES: list[Row] = [
    ({"v": None}, TypeError, f"v is None, {SPEAKS_DLPACK}"),
    ({"s": None}, TypeError, f"s is None, {SPEAKS_DLPACK}"),
    (
        {"v": output(5, 2, 16)},
        ValueError,
        "v has shape (5, 2, 16), expected (seq_len, num_states, num_heads, head_dim)",
    ),
    (
        {"v": output(5, 3, 2, 0)},
        ValueError,
        "v has shape (5, 3, 2, 0), expected a head_dim of at least 1",
    ),
    ({"v": output(5, 3, 2, 16, dtype=np.int8)}, TypeError, f"v is int8, {SERVED}"),
    (
        {"v": output(5, 3, 2, 32)[..., ::2]},
        ValueError,
        "v has a stride of 2 elements on its last axis, expected 1: head_dim must be contiguous",
    ),
    (
        {"s": lse(5, 2, 3)},
        ValueError,
        "s has shape (5, 2, 3), expected (5, 3, 2) = (seq_len, num_states, num_heads)",
    ),
    ({"s": lse(5, 3, 2, dtype=np.float16)}, TypeError, "s is float16, expected float32"),
]


@pytest.mark.parametrize(("changes", "error", "message"), STATES)
def test_errors_of_merge_states(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"v": output(5, 3, 2, 16), "s": lse(5, 3, 2), **changes}
    check_error(error, message, merge_states, **given)


def test_jax_arrays_are_not_merged_in_place() -> None:
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        for name, values in (("v", output()), ("s", lse())):
            check_error(
                TypeError,
                f"{name} is a JAX array, which is immutable: merge_state() returns new arrays",
                merge_state_in_place,
                **in_place(**{name: jax.numpy.asarray(values)}),
            )
