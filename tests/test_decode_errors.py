"""Every error of the decode wrapper, by its type and full text, and that nothing is written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from decode_calls import Decode, plan_arguments, run_arguments, small_plan
from small_call import INT_MAX, SERVED, SPEAKS_DLPACK, check_error, ints, pages

MODES = "expected one of 'NONE', 'ROPE_LLAMA', 'ALIBI'"


# (arguments changed, error, its message)
CONSTRUCTOR_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kv_layout": "HDN"}, ValueError, "kv_layout = 'HDN', expected one of 'NHD', 'HND'"),
    ({"kv_layout": None}, TypeError, "kv_layout is a NoneType, expected one of 'NHD', 'HND'"),
    (
        {"backend": "trtllm-gen"},
        ValueError,
        "backend = 'trtllm-gen', expected one of 'auto', 'reference', 'cuda', 'fa2', 'fa3'",
    ),
    ({"use_tensor_cores": 1}, TypeError, "use_tensor_cores is an int, expected a bool"),
    ({"use_tensor_cores": None}, TypeError, "use_tensor_cores is a NoneType, expected a bool"),
    (
        {"float_workspace_buffer": 1 << 20},
        TypeError,
        f"float_workspace_buffer is an int, {SPEAKS_DLPACK}",
    ),
    (
        {"float_workspace_buffer": np.zeros(100, np.uint8)[::2]},
        ValueError,
        "float_workspace_buffer is not contiguous, expected one piece of memory",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CONSTRUCTOR_ERRORS)
def test_constructor_errors(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    check_error(error, message, Decode, **arguments)


PLAN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    # Numbers
    ({"num_qo_heads": 4.0}, TypeError, "num_qo_heads is a float, expected an int"),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads = 0, expected at least 1"),
    (
        {"num_qo_heads": 5},
        ValueError,
        "num_qo_heads = 5, expected a multiple of num_kv_heads = 2",
    ),
    ({"head_dim": "64"}, TypeError, "head_dim is a str, expected an int"),
    ({"head_dim": -1}, ValueError, "head_dim = -1, expected at least 1"),
    ({"head_dim": 80}, NotImplementedError, "head_dim = 80, served are 64, 96, 128, 256"),
    ({"page_size": 0}, ValueError, "page_size = 0, expected at least 1"),
    ({"page_size": 2**31}, ValueError, "page_size = 2147483648, expected at most 1073741824"),
    ({"q_len_per_req": None}, TypeError, "q_len_per_req is a NoneType, expected an int"),
    ({"q_len_per_req": True}, TypeError, "q_len_per_req is a bool, expected an int"),
    ({"q_len_per_req": 2.0}, TypeError, "q_len_per_req is a float, expected an int"),
    ({"q_len_per_req": 0}, ValueError, "q_len_per_req = 0, expected at least 1"),
    (
        {"q_len_per_req": 2**30 + 1},
        ValueError,
        "q_len_per_req = 1073741825, expected at most 1073741824",
    ),
    (
        {"q_len_per_req": 89478486},  # times 3 requests times 4 heads: 2^30 and a bit
        ValueError,
        "indptr has 4 entries, 3 requests of q_len_per_req = 89478486 rows of 4 heads, "
        "expected at most 1073741824 rows times heads in a call",
    ),
    ({"sm_scale": "1.5"}, TypeError, "sm_scale is a str, expected a number"),
    ({"sm_scale": float("nan")}, ValueError, "sm_scale = nan, expected a finite number"),
    ({"non_blocking": 1}, TypeError, "non_blocking is an int, expected a bool"),
    ({"disable_split_kv": "no"}, TypeError, "disable_split_kv is a str, expected a bool"),
    ({"fixed_split_size": 2.5}, TypeError, "fixed_split_size is a float, expected an int"),
    ({"fixed_split_size": 0}, ValueError, "fixed_split_size = 0, expected at least 1"),
    ({"fixed_split_size": -2}, ValueError, "fixed_split_size = -2, expected at least 1"),
    # Dtypes
    ({"q_data_type": "float64"}, TypeError, f"q_data_type = 'float64', {SERVED}"),
    ({"kv_data_type": "fp8"}, TypeError, f"kv_data_type = 'fp8', {SERVED}"),
    ({"o_data_type": "int4"}, TypeError, f"o_data_type = 'int4', {SERVED}"),
    ({"data_type": "float64"}, TypeError, f"data_type = 'float64', {SERVED}"),
    ({"data_type": 16}, TypeError, f"data_type = 16, {SERVED}"),
    (
        {"q_data_type": "float32"},
        NotImplementedError,
        "q_data_type = float32, served are float16, bfloat16",
    ),
    (
        {"kv_data_type": "float32"},
        NotImplementedError,
        "kv_data_type = float32, served are q_data_type = float16 and float8_e4m3fn, float8_e5m2",
    ),
    (
        {"o_data_type": "bfloat16"},
        NotImplementedError,
        "o_data_type = bfloat16 differs from q_data_type = float16, which no backend serves",
    ),
    (
        {"data_type": "bfloat16", "o_data_type": "float16"},
        NotImplementedError,
        "o_data_type = float16 differs from q_data_type = bfloat16, which no backend serves",
    ),
    *(
        (
            {"data_type": one, name: other},
            ValueError,
            f"data_type and {name} exclude each other",
        )
        for name in ("q_data_type", "kv_data_type")
        for one, other in (("float16", "bfloat16"), (np.float16, ml_dtypes.bfloat16))
    ),
    (
        {"data_type": "float8_e5m2", "kv_data_type": "float8_e4m3fn"},
        ValueError,
        "data_type and kv_data_type exclude each other",
    ),
    # Words
    ({"pos_encoding_mode": "ROPE"}, ValueError, f"pos_encoding_mode = 'ROPE', {MODES}"),
    ({"pos_encoding_mode": None}, TypeError, f"pos_encoding_mode is a NoneType, {MODES}"),
    # indptr
    ({"indptr": None}, TypeError, f"indptr is None, {SPEAKS_DLPACK}"),
    ({"indptr": [0, 3.5]}, TypeError, "indptr has dtype float64, expected int32 or int64"),
    ({"indptr": []}, ValueError, "indptr has shape (0,), expected (batch + 1,)"),
    (
        {"indptr": np.zeros((1, 4), np.int32)},
        ValueError,
        "indptr has shape (1, 4), expected (batch + 1,)",
    ),
    ({"indptr": ints(1, 2, 3, 3)}, ValueError, "indptr[0] = 1, expected 0"),
    (
        {"indptr": ints(0, 2, 1, 3)},
        ValueError,
        "indptr[2] = 1 (end of request 1), expected at least 2 = indptr[1]",
    ),
    (
        {"indptr": np.array([0, 2, 3, 2**31])},
        ValueError,
        f"indptr[3] = 2147483648, expected at most {INT_MAX}",
    ),
    (
        {"indptr": ints(0, 2, 3, 2**28), "last_page_len": ints(4, 16, 9)},
        ValueError,
        "indptr: request 2 has 268435453 pages of 16 tokens, expected at most 1073741824 tokens",
    ),
    # last_page_len
    ({"last_page_len": None}, TypeError, f"last_page_len is None, {SPEAKS_DLPACK}"),
    (
        {"last_page_len": ints(4, 16)},
        ValueError,
        "last_page_len has shape (2,), expected (3,): indptr has 4 entries",
    ),
    (
        {"indptr": ints(0)},
        ValueError,
        "last_page_len has shape (3,), expected (0,): indptr has 1 entry",
    ),
    (
        {"last_page_len": ints(4, 17, 0)},
        ValueError,
        "last_page_len[1] = 17, expected 1..16 (page_size=16)",
    ),
    (
        {"last_page_len": ints(0, 16, 0)},
        ValueError,
        "last_page_len[0] = 0, expected 1..16 (page_size=16)",
    ),
    (
        {"last_page_len": ints(4, 16, -1)},
        ValueError,
        "last_page_len[2] = -1, expected 0..16 (page_size=16)",
    ),
    # indices
    (
        {"indices": np.array([4, 1, 0], np.int16)},
        TypeError,
        "indices has dtype int16, expected int32 or int64",
    ),
    (
        {"indices": np.zeros((3, 1), np.int32)},
        ValueError,
        "indices has shape (3, 1), expected one axis",
    ),
    (
        {"indices": ints(4)},
        ValueError,
        "indices has 1 entry, expected at least 3 = indptr[-1]",
    ),
    (
        {"indices": ints(4, 1, -3)},
        ValueError,
        "indices[2] = -3 (request 1, its page 0), expected at least 0",
    ),
    (
        {"indices": np.array([4, 2**31, 0])},
        ValueError,
        f"indices[1] = 2147483648 (request 0, its page 1), expected at most {INT_MAX}",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), PLAN_ERRORS)
def test_plan_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    wrapper = Decode(backend="reference")
    check_error(error, message, wrapper.plan, **plan_arguments(**changes))
    check_error(RuntimeError, "run() before plan()", wrapper.run, **run_arguments())


NHD_WORDS = "kv_layout='NHD' expects (num_pages, page_size=16, num_kv_heads=2, head_dim=64)"
RUN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    # q
    ({"q": None}, TypeError, f"q is None, {SPEAKS_DLPACK}"),
    (
        {"q": np.zeros((3, 4, 64), np.float16)},
        ValueError,
        "q has 3 rows, expected 6 = requests * q_len_per_req",
    ),
    (
        {"q": np.zeros((7, 4, 64), np.float16)},
        ValueError,
        "q has 7 rows, expected 6 = requests * q_len_per_req",
    ),
    (
        {"q": np.zeros((6, 4, 64), ml_dtypes.bfloat16)},
        TypeError,
        "q is bfloat16, expected q_data_type = float16",
    ),
    (
        {"q": np.zeros((6, 4, 128), np.float16)[..., ::2]},
        ValueError,
        "q has a stride of 2 elements on its last axis, expected 1: head_dim must be contiguous",
    ),
    ({"q_len_per_req": 1}, ValueError, "q_len_per_req = 1, expected 2 as planned"),
    ({"q_len_per_req": 3}, ValueError, "q_len_per_req = 3, expected 2 as planned"),
    ({"q_len_per_req": True}, TypeError, "q_len_per_req is a bool, expected an int"),
    ({"q_len_per_req": "2"}, TypeError, "q_len_per_req is a str, expected an int"),
    # The cache
    ({"paged_kv_cache": None}, TypeError, f"paged_kv_cache is None, {SPEAKS_DLPACK}"),
    (
        {"paged_kv_cache": (pages(),)},
        ValueError,
        "paged_kv_cache has 1 arrays, expected two: (k, v)",
    ),
    (
        {"paged_kv_cache": (pages(5, 2, 16, 64), pages())},
        ValueError,
        f"k cache has shape (5, 2, 16, 64); {NHD_WORDS}. It fits kv_layout='HND'",
    ),
    (
        {"paged_kv_cache": (pages(), pages(dtype=np.float32))},
        TypeError,
        "v cache is float32, expected kv_data_type = float16",
    ),
    (
        {"paged_kv_cache": (pages(4, 16, 2, 64), pages(4, 16, 2, 64))},
        ValueError,
        "indices[0] = 4 (request 0, its page 0), expected 0..3: the cache holds 4 pages",
    ),
    (
        {"paged_kv_cache": pages(0, 2, 16, 2, 64)},
        ValueError,
        "indices[0] = 4 (request 0, its page 0), expected none: the cache holds 0 pages",
    ),
    # Factors and words
    ({"q_scale": [1.0]}, TypeError, "q_scale is a list, expected a number"),
    ({"k_scale": float("inf")}, ValueError, "k_scale = inf, expected a finite number"),
    ({"v_scale": float("nan")}, ValueError, "v_scale = nan, expected a finite number"),
    ({"return_lse": 1}, TypeError, "return_lse is an int, expected a bool"),
    ({"lse_base": "e"}, ValueError, "lse_base = 'e', expected one of 'log2', 'ln'"),
    # out and lse
    (
        {"out": np.zeros((3, 4, 64), np.float16)},
        ValueError,
        "out has shape (3, 4, 64), expected (6, 4, 64)",
    ),
    ({"out": np.zeros((6, 4, 64))}, TypeError, "out is float64, expected float16"),
    (
        {"out": np.broadcast_to(np.float16(0), (6, 4, 64))},
        ValueError,
        "out is a read-only array, expected one that can be written",
    ),
    ({"lse": np.zeros((4, 6), np.float32)}, ValueError, "lse has shape (4, 6), expected (6, 4)"),
    ({"lse": np.zeros((6, 4))}, TypeError, "lse is float64, expected float32"),
]


@pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning")
@pytest.mark.parametrize(("changes", "error", "message"), RUN_ERRORS)
def test_run_errors_and_nothing_is_written(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    wrapper = small_plan(q_len_per_req=2)
    out = np.full((6, 4, 64), 7, np.float16)
    lse = np.full((6, 4), 7, np.float32)
    given = {"out": out, "lse": lse}
    check_error(error, message, wrapper.run, **run_arguments(**(given | changes)))
    assert (out == 7).all()
    assert (lse == 7).all()


def test_q_of_another_shape_names_the_argument_of_plan() -> None:
    """`head_dim`, as decoding's plan() calls it."""
    with pytest.raises(ValueError, match=r"^q has shape \(3, 4, 32\), expected .*\bhead_dim=64\)$"):
        small_plan().run(np.zeros((3, 4, 32), np.float16), (pages(), pages()))


@pytest.mark.parametrize("options", [{}, {"q_len_per_req": 2}])
@pytest.mark.parametrize("call", ["run", "run_return_lse"])
def test_run_before_plan(call: str, options: dict[str, Any]) -> None:
    wrapper = Decode()
    arguments = run_arguments(**options)
    check_error(RuntimeError, "run() before plan()", getattr(wrapper, call), **arguments)
    check_error(RuntimeError, "explain() before plan()", wrapper.explain)


@pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning")
def test_the_largest_numbers_are_taken() -> None:
    small_plan(q_len_per_req=89478485)
    small_plan(indptr=ints(0), indices=ints(), last_page_len=ints(), q_len_per_req=2**30)
    small_plan(
        page_size=2**30,
        indptr=ints(0, 1, 2, 2),
        last_page_len=ints(4, 2**30, 0),
        fixed_split_size=2**30,
        sm_scale=3.4e38,
    )
