"""Every error of keys and values without pages, by its type and full text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ragged_calls import Wrapper, kv, plan_arguments, planned, run_arguments
from small_call import INT_MAX, SPEAKS_DLPACK, check_error, ints

PLAN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"qo_indptr": None}, TypeError, f"qo_indptr is None, {SPEAKS_DLPACK}"),
    ({"qo_indptr": ints(1, 3, 8, 9)}, ValueError, "qo_indptr[0] = 1, expected 0"),
    (
        {"qo_indptr": np.zeros((1, 4), np.int32)},
        ValueError,
        "qo_indptr has shape (1, 4), expected (batch + 1,)",
    ),
    (
        {"qo_indptr": ints(0, 3, 8, 2**28 + 1)},
        ValueError,
        "qo_indptr[3] = 268435457 query rows of 4 heads, "
        "expected at most 1073741824 rows times heads in a call",
    ),
    ({"kv_indptr": "rows"}, TypeError, f"kv_indptr is a str, {SPEAKS_DLPACK}"),
    (
        {"kv_indptr": np.array([0.0, 20, 36, 36])},
        TypeError,
        "kv_indptr has dtype float64, expected int32 or int64",
    ),
    (
        {"kv_indptr": ints(0, 20, 19, 36)},
        ValueError,
        "kv_indptr[2] = 19 (end of request 1), expected at least 20 = kv_indptr[1]",
    ),
    (
        {"kv_indptr": ints(0, 20)},
        ValueError,
        "kv_indptr has 2 entries, expected 4 = batch + 1: qo_indptr has 4 entries",
    ),
    (
        {"kv_indptr": ints(0, 20, 2**30 + 21, 2**30 + 21)},
        ValueError,
        "request 1 has 1073741825 keys, expected at most 1073741824",
    ),
    (
        {"kv_indptr": np.array([0, 20, 36, 2**31])},
        ValueError,
        f"kv_indptr[3] = 2147483648, expected at most {INT_MAX}",
    ),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads = 0, expected at least 1"),
    (
        {"head_dim_qk": 192},
        NotImplementedError,
        "head_dim_qk = 192, served are 64, 96, 128, 256",
    ),
    (
        {"head_dim_vo": 96},
        NotImplementedError,
        "head_dim_qk = 64 with head_dim_vo = 96, served are equal ones of 64, 96, 128, 256, and "
        "192/128",
    ),
    ({"causal": None}, TypeError, "causal is a NoneType, expected a bool"),
    ({"non_blocking": 1}, TypeError, "non_blocking is an int, expected a bool"),
    ({"fixed_split_size": 0}, ValueError, "fixed_split_size = 0, expected at least 1"),
    (
        {"custom_mask": np.ones(141, np.bool_)},
        ValueError,
        "custom_mask has shape (141,), expected (140,): the sum of qo_len * kv_len",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), PLAN_ERRORS)
def test_plan_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    wrapper = Wrapper(backend="reference")
    check_error(error, message, wrapper.plan, **plan_arguments(**changes))
    check_error(RuntimeError, "run() before plan()", wrapper.run, **run_arguments())


ROWS_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"kv_begin": ints(0, 20)},
        ValueError,
        "kv_begin has shape (2,), expected (3,): qo_indptr has 4 entries",
    ),
    (
        {"kv_len": ints(20, 16, 0, 0)},
        ValueError,
        "kv_len has shape (4,), expected (3,): qo_indptr has 4 entries",
    ),
    ({"kv_begin": ints(0, -1, 3)}, ValueError, "kv_begin[1] = -1, expected at least 0"),
    ({"kv_len": ints(20, 16, -5)}, ValueError, "kv_len[2] = -5, expected at least 0"),
    (
        {"kv_begin": np.array([0, 2**31 - 16, 0])},
        ValueError,
        f"kv_begin + kv_len = 2147483648, expected at most {INT_MAX}",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), ROWS_ERRORS)
def test_errors_of_rows(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    rows = {"kv_begin": ints(0, 20, 36), "kv_len": ints(20, 16, 0), **changes}
    arguments = plan_arguments(**rows)
    del arguments["kv_indptr"]
    check_error(error, message, Wrapper(backend="reference")._plan_rows, **arguments)


K_WORDS = "kv_layout='NHD' expects (nnz_kv, num_kv_heads=2, head_dim=64)"
RUN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": None}, TypeError, f"q is None, {SPEAKS_DLPACK}"),
    ({"k": None}, TypeError, f"k is None, {SPEAKS_DLPACK}"),
    ({"v": 3}, TypeError, f"v is an int, {SPEAKS_DLPACK}"),
    (
        {"q": np.zeros((8, 4, 64), np.float16)},
        ValueError,
        "q has 8 rows, expected 9 = qo_indptr[-1]",
    ),
    ({"k": kv(36, 4, 64)}, ValueError, f"k has shape (36, 4, 64); {K_WORDS}"),
    ({"v": kv(36, 2, 128)}, ValueError, f"v has shape (36, 2, 128); {K_WORDS}"),
    ({"k": kv(2, 36, 64)}, ValueError, f"k has shape (2, 36, 64); {K_WORDS}"),
    ({"k": kv(36, 128)}, ValueError, f"k has shape (36, 128); {K_WORDS}"),
    ({"k": kv(35, 2, 64)}, ValueError, "k has 35 rows, expected 36 = kv_indptr[-1]"),
    ({"v": kv(37, 2, 64)}, ValueError, "v has 37 rows, expected 36 = kv_indptr[-1]"),
    (
        {"k": kv(dtype=np.float32)},
        TypeError,
        "k is float32, expected kv_data_type = float16",
    ),
    ({"v": kv(dtype=np.uint8)}, TypeError, "v is uint8, expected kv_data_type = float16"),
    (
        {"v": kv(36, 2, 128)[..., ::2]},
        ValueError,
        "v has a stride of 2 elements on its last axis, expected 1: head_dim must be contiguous",
    ),
    (
        {"sinks": np.zeros(2, np.float32)},
        ValueError,
        "sinks has shape (2,), expected (num_qo_heads=4,)",
    ),
    ({"window_left": 4}, ValueError, "window_left = 4, expected -1 as planned"),
    ({"v_scale": "big"}, TypeError, "v_scale is a str, expected a number"),
]


@pytest.mark.parametrize(("changes", "error", "message"), RUN_ERRORS)
def test_run_errors_and_nothing_is_written(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    out, lse = np.full((9, 4, 64), 7, np.float16), np.full((9, 4), 7, np.float32)
    arguments = run_arguments(out=out, lse=lse) | changes
    check_error(error, message, planned().run, **arguments)
    assert (out == 7).all()
    assert (lse == 7).all()


def test_errors_name_the_layout_and_the_heads_of_k_and_v() -> None:
    check_error(
        ValueError,
        "k has shape (36, 2, 64); kv_layout='HND' expects (num_kv_heads=2, nnz_kv, head_dim=64)",
        planned("HND").run,
        **run_arguments(),
    )
    wide = planned(head_dim_qk=192, head_dim_vo=128)
    q, k = np.zeros((9, 4, 192), np.float16), kv(36, 2, 192)
    for changes, found in (({"k": kv(36, 2, 128)}, "qk=192"), ({"v": kv(36, 2, 192)}, "vo=128")):
        arguments = {"q": q, "k": k, "v": kv(36, 2, 128), **changes}
        ((name, array),) = changes.items()
        check_error(
            ValueError,
            f"{name} has shape {array.shape}; kv_layout='NHD' expects "
            f"(nnz_kv, num_kv_heads=2, head_dim_{found})",
            wide.run,
            **arguments,
        )


def test_rows_that_leave_others_out_need_as_many_as_the_last() -> None:
    wrapper = Wrapper(backend="reference")
    wrapper._plan_rows([0, 1, 2], [3, 50], [10, 0], 4, 2, 64)
    arguments = {"q": np.zeros((2, 4, 64), np.float16), "v": kv(13, 2, 64)}
    message = "k has 12 rows, expected at least 13 = the last row that is planned"
    check_error(ValueError, message, wrapper.run, k=kv(12, 2, 64), **arguments)
    message = "v has 13 rows, expected 40 as k does"
    check_error(ValueError, message, wrapper.run, k=kv(40, 2, 64), **arguments)
    wrapper.run(k=kv(13, 2, 64), **arguments)


def test_a_plan_of_all_rows_after_one_that_leaves_rows_out() -> None:
    wrapper = Wrapper(backend="reference")
    wrapper._plan_rows([0, 1, 2], [3, 50], [10, 0], 4, 2, 64)
    wrapper.plan(**plan_arguments())
    message = "k has 40 rows, expected 36 = kv_indptr[-1]"
    check_error(ValueError, message, wrapper.run, **run_arguments(k=kv(40, 2, 64)))


def test_run_before_plan() -> None:
    for call in ("run", "run_return_lse", "forward", "forward_return_lse"):
        check_error(
            RuntimeError, "run() before plan()", getattr(Wrapper(), call), **run_arguments()
        )
