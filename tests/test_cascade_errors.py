"""Every error of a cascade, by its type and full text.

An earlier plan stands, and nothing is written.
"""

from __future__ import annotations

import inspect
from typing import Any

import cascades
import numpy as np
import pytest
from small_call import SPEAKS_DLPACK, check_error, ints, pages
from small_cascade import Wrapper, of_level_1, plan_arguments, planned, run_arguments

ONE = ": one for each level"
PLAN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    # What is common to all levels
    ({"head_dim": 80}, NotImplementedError, "head_dim = 80, served are 64, 96, 128, 256"),
    (
        {"num_kv_heads": 3},
        ValueError,
        "num_qo_heads = 4, expected a multiple of num_kv_heads = 3",
    ),
    ({"causal": 1}, TypeError, "causal is an int, expected a bool"),
    ({"page_size": 0}, ValueError, "page_size = 0, expected at least 1"),
    (
        {"kv_data_type": "bfloat16"},
        NotImplementedError,
        "kv_data_type = bfloat16, served are q_data_type = float16 and float8_e4m3fn, float8_e5m2",
    ),
    # What needs a row's place among the keys
    *(
        (
            {name: value},
            NotImplementedError,
            f"{name} = {value!r} with num_levels = 2: a row has no place among the keys of a level",
        )
        for name, value in (
            ("window_left", 0),
            ("pos_encoding_mode", "ALIBI"),
            ("pos_encoding_mode", "ROPE_LLAMA"),
        )
    ),
    (
        {"rope_scale": 1.0},
        ValueError,
        "rope_scale = 1.0 with pos_encoding_mode='NONE', expected 'ROPE_LLAMA'",
    ),
    # One of each for each level
    (
        {"qo_indptr_arr": ints(0, 9)},
        TypeError,
        "qo_indptr_arr is an ndarray, expected a list: one entry for each level",
    ),
    (
        {"paged_kv_indptr_arr": None},
        TypeError,
        "paged_kv_indptr_arr is a NoneType, expected a list: one entry for each level",
    ),
    (
        {"paged_kv_indices_arr": [ints(0, 1)]},
        ValueError,
        f"paged_kv_indices_arr has 1 entry, expected 2{ONE}",
    ),
    (
        {"paged_kv_last_page_len": (ints(1), ints(1), ints(1))},
        ValueError,
        f"paged_kv_last_page_len has 3 entries, expected 2{ONE}",
    ),
    # A level on its own
    (
        of_level_1("qo_indptr_arr", "rows"),
        TypeError,
        f"level 1: qo_indptr is a str, {SPEAKS_DLPACK}",
    ),
    (
        of_level_1("paged_kv_indptr_arr", np.zeros(4)),
        TypeError,
        "level 1: paged_kv_indptr has dtype float64, expected int32 or int64",
    ),
    (
        of_level_1("qo_indptr_arr", ints(0, 3, 2, 9)),
        ValueError,
        "level 1: qo_indptr[2] = 2 (end of request 1), expected at least 3 = qo_indptr[1]",
    ),
    (
        {"qo_indptr_arr": [ints(1, 9), ints(0, 3, 8, 9)]},
        ValueError,
        "level 0: qo_indptr[0] = 1, expected 0",
    ),
    (
        of_level_1("paged_kv_last_page_len", ints(4, 40, 1)),
        ValueError,
        "level 1: paged_kv_last_page_len[1] = 40, expected 1..16 (page_size=16)",
    ),
    (
        of_level_1("paged_kv_indices_arr", ints(2, 3)),
        ValueError,
        "level 1: paged_kv_indices has 2 entries, expected at least 3 = paged_kv_indptr[-1]",
    ),
    (
        of_level_1("paged_kv_indices_arr", ints(2, -3, 4)),
        ValueError,
        "level 1: paged_kv_indices[1] = -3 (request 1, its page 0), expected at least 0",
    ),
    # The levels beside each other
    (
        of_level_1("qo_indptr_arr", ints(0, 3, 8, 10)),
        ValueError,
        "level 1: qo_indptr[-1] = 10, expected 9 as at level 0: all levels have the same rows of q",
    ),
    (
        {"qo_indptr_arr": [ints(0, 5, 9), ints(0, 3, 8, 9)]},
        ValueError,
        "level 0: qo_indptr[1] = 5, which is inside of request 1 of level 1, rows 3..7: "
        "expected a request to be whole ones of the next level",
    ),
    (
        {"qo_indptr_arr": [ints(0, 8, 9), ints(0, 0, 0, 9)]},
        ValueError,
        "level 0: qo_indptr[1] = 8, which is inside of request 2 of level 1, rows 0..8: "
        "expected a request to be whole ones of the next level",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), PLAN_ERRORS)
def test_errors_of_plan_keep_the_earlier_plan(
    rng: np.random.Generator, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    wrapper = Wrapper(2, backend="reference")
    check_error(error, message, wrapper.plan, **plan_arguments(**changes))
    check_error(RuntimeError, "run() before plan()", wrapper.run, **run_arguments())
    cascade = cascades.build(rng, [1, 5, 2], [[100], [1, 40, 7]], [[3]])
    cascade.plan(wrapper)
    before = wrapper.run(cascade.flat.q, cascade.flat.cache)
    check_error(error, message, wrapper.plan, **plan_arguments(**changes))
    assert wrapper.run(cascade.flat.q, cascade.flat.cache).tobytes() == before.tobytes()


def test_an_error_of_a_level_is_chained() -> None:
    with pytest.raises(ValueError, match=r"^level 1: ") as raised:
        planned(**of_level_1("paged_kv_indices_arr", ints(2, 3)))
    assert str(raised.value) == f"level 1: {raised.value.__cause__}"


def test_a_level_that_fails_last_keeps_the_earlier_plan(rng: np.random.Generator) -> None:
    """The workspace is enough for the first level and not for the second."""
    workspace = np.zeros(256, np.uint8)
    wrapper = Wrapper(2, workspace)
    cascade = cascades.build(rng, [4, 2], [[50], [9, 20]], [[2]], group=4)
    cascade.plan(wrapper)
    before = wrapper.run(cascade.flat.q, cascade.flat.cache)
    long = cascades.build(rng, [4, 2], [[0], [9000, 9000]], [[2]], group=4)
    with pytest.raises(ValueError, match=r"^level 1: float_workspace_buffer has 256 bytes, "):
        long.plan(wrapper)
    assert wrapper.run(cascade.flat.q, cascade.flat.cache).tobytes() == before.tobytes()


@pytest.mark.parametrize("num_levels", [0, -1, 1.0, None])
def test_errors_of_the_constructor(num_levels: Any) -> None:
    error, words = (ValueError, "at least 1") if isinstance(num_levels, int) else (TypeError, "int")
    with pytest.raises(error, match=f"^num_levels .*{words}"):
        Wrapper(num_levels)
    check_error(
        ValueError,
        "kv_layout = 'NDH', expected one of 'NHD', 'HND'",
        Wrapper,
        2,
        kv_layout="NDH",
    )
    check_error(TypeError, f"float_workspace_buffer is an int, {SPEAKS_DLPACK}", Wrapper, 2, 3)


def test_unserved() -> None:
    message = "plan(): use_fp16_qk_reduction=True is not served by any backend"
    check_error(NotImplementedError, message, planned, use_fp16_qk_reduction=True)


def test_what_is_off_in_flashinfer_is_served() -> None:
    planned(window_left=-1, logits_soft_cap=0.0, pos_encoding_mode="NONE", rope_scale=None)


def test_arguments_are_flashinfers() -> None:
    """In name and order; what is this library's own comes behind."""
    constructor = list(inspect.signature(Wrapper).parameters)
    assert constructor[:8] == [
        *("num_levels", "float_workspace_buffer", "kv_layout", "use_cuda_graph"),
        *("qo_indptr_buf_arr", "paged_kv_indptr_buf_arr", "paged_kv_indices_buf_arr"),
        "paged_kv_last_page_len_buf_arr",
    ]
    assert list(inspect.signature(Wrapper.plan).parameters)[1:] == [
        *plan_arguments(),
        *("causal", "pos_encoding_mode", "use_fp16_qk_reduction", "sm_scale", "window_left"),
        *("logits_soft_cap", "rope_scale", "rope_theta", "q_data_type", "kv_data_type"),
    ]
    assert list(inspect.signature(Wrapper.run).parameters)[1:3] == ["q", "paged_kv_cache"]


# run()

RUN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": None}, TypeError, f"q is None, {SPEAKS_DLPACK}"),
    (
        {"q": np.zeros((8, 4, 64), np.float16)},
        ValueError,
        "q has 8 rows, expected 9 = qo_indptr[-1] of every level",
    ),
    (
        {"paged_kv_cache": (pages(),)},
        ValueError,
        "paged_kv_cache has 1 arrays, expected two: (k, v)",
    ),
    (
        {"paged_kv_cache": (pages(4, 16, 2, 64), pages(4, 16, 2, 64))},
        ValueError,
        "level 1: paged_kv_indices[2] = 4 (request 2, its page 0), expected 0..3: "
        "the cache holds 4 pages",
    ),
    (
        {"paged_kv_cache": (pages(1, 16, 2, 64), pages(1, 16, 2, 64))},
        ValueError,
        "level 0: paged_kv_indices[1] = 1 (request 0, its page 1), expected 0..0: "
        "the cache holds 1 pages",
    ),
    ({"return_lse": 1}, TypeError, "return_lse is an int, expected a bool"),
    ({"out": np.zeros((9, 4, 64))}, TypeError, "out is float64, expected float16"),
    (
        {"out": np.broadcast_to(np.float16(0), (9, 4, 64))},
        ValueError,
        "out is a read-only array, expected one that can be written",
    ),
    (
        {"lse": np.zeros((9, 2), np.float32)},
        ValueError,
        "lse has shape (9, 2), expected (9, 4)",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), RUN_ERRORS)
def test_run_errors_and_nothing_is_written(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    wrapper = planned()
    out, lse = np.full((9, 4, 64), 7, np.float16), np.full((9, 4), 7, np.float32)
    given = {"out": out, "lse": lse}
    check_error(error, message, wrapper.run, **run_arguments(**(given | changes)))
    assert (out == 7).all()
    assert (lse == 7).all()
