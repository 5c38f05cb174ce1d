"""Every error and warning, by its type and full text, through the public wrapper."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import batches
import ml_dtypes
import numpy as np
import pytest

import cupaged

Wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper
INT_MAX = 2**31 - 1
SERVED = "expected one of float16, bfloat16, float32, float8_e4m3fn, float8_e5m2"
SPEAKS_DLPACK = "expected an array that speaks DLPack (CuPy, NumPy, PyTorch, JAX, numba)"


def plan_arguments(**changes: Any) -> dict[str, Any]:
    """Three requests over pages of 16 tokens: 3, 5 and 1 queries; 20, 16 and no keys."""
    return {
        "qo_indptr": np.array([0, 3, 8, 9], np.int32),
        "paged_kv_indptr": np.array([0, 2, 3, 3], np.int32),
        "paged_kv_indices": np.array([4, 1, 0], np.int32),
        "paged_kv_last_page_len": np.array([4, 16, 0], np.int32),
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim_qk": 64,
        "page_size": 16,
        **changes,
    }


def planned(**changes: Any) -> Wrapper:
    wrapper = Wrapper(backend="reference", kv_layout=changes.pop("kv_layout", "NHD"))
    wrapper.plan(**plan_arguments(**changes))
    return wrapper


def pages(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.zeros(shape or (5, 16, 2, 64), dtype)


def run_arguments(**changes: Any) -> dict[str, Any]:
    return {
        "q": np.zeros((9, 4, 64), np.float16),
        "paged_kv_cache": (pages(), pages()),
        **changes,
    }


def check_error(error: type[Exception], message: str, call: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(Exception) as raised:
        call(*args, **kwargs)
    assert raised.type is error, f"{raised.type.__name__}: {raised.value}"
    assert str(raised.value) == message
    assert "\n" not in message


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


# (arguments changed, error, its message)
PLAN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    # Numbers
    ({"num_qo_heads": 4.0}, TypeError, "num_qo_heads is a float, expected an int"),
    ({"num_qo_heads": True}, TypeError, "num_qo_heads is a bool, expected an int"),
    ({"num_qo_heads": 0}, ValueError, "num_qo_heads = 0, expected at least 1"),
    ({"num_kv_heads": "2"}, TypeError, "num_kv_heads is a str, expected an int"),
    ({"num_kv_heads": -2}, ValueError, "num_kv_heads = -2, expected at least 1"),
    (
        {"num_qo_heads": 5},
        ValueError,
        "num_qo_heads = 5, expected a multiple of num_kv_heads = 2",
    ),
    (
        {"num_qo_heads": 2, "num_kv_heads": 4},
        ValueError,
        "num_qo_heads = 2, expected a multiple of num_kv_heads = 4",
    ),
    ({"head_dim_qk": None}, TypeError, "head_dim_qk is a NoneType, expected an int"),
    ({"head_dim_qk": 0}, ValueError, "head_dim_qk = 0, expected at least 1"),
    ({"head_dim_qk": 96}, NotImplementedError, "head_dim_qk = 96, served are 64, 128, 256"),
    ({"head_dim_vo": 64.0}, TypeError, "head_dim_vo is a float, expected an int"),
    ({"head_dim_vo": -1}, ValueError, "head_dim_vo = -1, expected at least 1"),
    (
        {"head_dim_vo": 128},
        NotImplementedError,
        "head_dim_vo = 128 differs from head_dim_qk = 64, which no backend serves",
    ),
    ({"page_size": 16.0}, TypeError, "page_size is a float, expected an int"),
    ({"page_size": 0}, ValueError, "page_size = 0, expected at least 1"),
    ({"causal": 1}, TypeError, "causal is an int, expected a bool"),
    ({"causal": None}, TypeError, "causal is a NoneType, expected a bool"),
    ({"disable_split_kv": "no"}, TypeError, "disable_split_kv is a str, expected a bool"),
    ({"sm_scale": "small"}, TypeError, "sm_scale is a str, expected a number"),
    ({"sm_scale": np.zeros(2)}, TypeError, "sm_scale is a ndarray, expected a number"),
    ({"sm_scale": float("nan")}, ValueError, "sm_scale = nan, expected a finite number"),
    ({"sm_scale": float("-inf")}, ValueError, "sm_scale = -inf, expected a finite number"),
    ({"fixed_split_size": 2.5}, TypeError, "fixed_split_size is a float, expected an int"),
    ({"fixed_split_size": 0}, ValueError, "fixed_split_size = 0, expected at least 1"),
    (
        {"fixed_split_size": 2, "disable_split_kv": True},
        ValueError,
        "fixed_split_size and disable_split_kv exclude each other",
    ),
    # Dtypes
    ({"q_data_type": "float64"}, TypeError, f"q_data_type = 'float64', {SERVED}"),
    ({"q_data_type": None}, TypeError, f"q_data_type = None, {SERVED}"),
    ({"q_data_type": np.int8}, TypeError, f"q_data_type = <class 'numpy.int8'>, {SERVED}"),
    ({"kv_data_type": "fp8"}, TypeError, f"kv_data_type = 'fp8', {SERVED}"),
    ({"o_data_type": "int4"}, TypeError, f"o_data_type = 'int4', {SERVED}"),
    (
        {"q_data_type": "float32"},
        NotImplementedError,
        "q_data_type = float32, served are float16, bfloat16",
    ),
    (
        {"kv_data_type": "float8_e4m3fn"},
        NotImplementedError,
        "kv_data_type = float8_e4m3fn differs from q_data_type = float16, which no backend serves",
    ),
    (
        {"q_data_type": ml_dtypes.bfloat16, "kv_data_type": np.float16},
        NotImplementedError,
        "kv_data_type = float16 differs from q_data_type = bfloat16, which no backend serves",
    ),
    (
        {"o_data_type": np.dtype(np.float32)},
        NotImplementedError,
        "o_data_type = float32 differs from q_data_type = float16, which no backend serves",
    ),
    # Words
    (
        {"pos_encoding_mode": "ROPE"},
        ValueError,
        "pos_encoding_mode = 'ROPE', expected one of 'NONE', 'ROPE_LLAMA', 'ALIBI'",
    ),
    # qo_indptr
    ({"qo_indptr": None}, TypeError, f"qo_indptr is None, {SPEAKS_DLPACK}"),
    ({"qo_indptr": 7}, TypeError, f"qo_indptr is an int, {SPEAKS_DLPACK}"),
    (
        {"qo_indptr": np.array([0.0, 3, 8, 9])},
        TypeError,
        "qo_indptr has dtype float64, expected int32 or int64",
    ),
    ({"qo_indptr": [0, 3.5]}, TypeError, "qo_indptr has dtype float64, expected int32 or int64"),
    ({"qo_indptr": [0, [3]]}, TypeError, "qo_indptr is a list of an int, expected ints"),
    (
        {"qo_indptr": np.array([0, 3, 8, 9], np.uint32)},
        TypeError,
        "qo_indptr has dtype uint32, expected int32 or int64",
    ),
    ({"qo_indptr": []}, ValueError, "qo_indptr has shape (0,), expected (batch + 1,)"),
    (
        {"qo_indptr": np.zeros((1, 4), np.int32)},
        ValueError,
        "qo_indptr has shape (1, 4), expected (batch + 1,)",
    ),
    ({"qo_indptr": ints(1, 3, 8, 9)}, ValueError, "qo_indptr[0] = 1, expected 0"),
    (
        {"qo_indptr": ints(0, 3, 2, 9)},
        ValueError,
        "qo_indptr[2] = 2 (end of request 1), expected at least 3 = qo_indptr[1]",
    ),
    (
        {"qo_indptr": ints(0, INT_MAX, -5, 9)},
        ValueError,
        f"qo_indptr[2] = -5 (end of request 1), expected at least {INT_MAX} = qo_indptr[1]",
    ),
    (
        {"qo_indptr": np.array([0, 3, 8, 2**40])},
        ValueError,
        f"qo_indptr[3] = 1099511627776, expected at most {INT_MAX}",
    ),
    (
        {"qo_indptr": ints(0, 3, 8, 2**28 + 1)},
        ValueError,
        "qo_indptr[3] = 268435457 query rows of 4 heads, "
        "expected at most 1073741824 rows times heads in a call",
    ),
    # paged_kv_indptr
    (
        {"paged_kv_indptr": np.array([0, 2, 3, 3], np.float32)},
        TypeError,
        "paged_kv_indptr has dtype float32, expected int32 or int64",
    ),
    ({"paged_kv_indptr": ints(-1, 2, 3, 3)}, ValueError, "paged_kv_indptr[0] = -1, expected 0"),
    (
        {"paged_kv_indptr": ints(0, 2, 3, 1)},
        ValueError,
        "paged_kv_indptr[3] = 1 (end of request 2), expected at least 3 = paged_kv_indptr[2]",
    ),
    (
        {"paged_kv_indptr": ints(0, 2, 3)},
        ValueError,
        "paged_kv_indptr has 3 entries, expected 4 = batch + 1: qo_indptr has 4 entries",
    ),
    (
        {"paged_kv_indptr": ints(0)},
        ValueError,
        "paged_kv_indptr has 1 entry, expected 4 = batch + 1: qo_indptr has 4 entries",
    ),
    (
        {"paged_kv_indptr": ints(0, 2, 3, 2**28), "paged_kv_last_page_len": ints(4, 16, 9)},
        ValueError,
        "paged_kv_indptr: request 2 has 268435453 pages of 16 tokens, "
        "expected at most 1073741824 tokens",
    ),
    (
        {"paged_kv_indptr": np.array([0, 2, 3, 2**31])},
        ValueError,
        f"paged_kv_indptr[3] = 2147483648, expected at most {INT_MAX}",
    ),
    # paged_kv_last_page_len
    (
        {"paged_kv_last_page_len": None},
        TypeError,
        f"paged_kv_last_page_len is None, {SPEAKS_DLPACK}",
    ),
    (
        {"paged_kv_last_page_len": ints(4, 16)},
        ValueError,
        "paged_kv_last_page_len has shape (2,), expected (3,): qo_indptr has 4 entries",
    ),
    (
        {"paged_kv_last_page_len": ints(4, 17, 0)},
        ValueError,
        "paged_kv_last_page_len[1] = 17, expected 1..16 (page_size=16)",
    ),
    (
        {"paged_kv_last_page_len": ints(0, 16, 0)},
        ValueError,
        "paged_kv_last_page_len[0] = 0, expected 1..16 (page_size=16)",
    ),
    (
        {"paged_kv_last_page_len": ints(4, 16, -1)},
        ValueError,
        "paged_kv_last_page_len[2] = -1, expected 0..16 (page_size=16)",
    ),
    (
        {"paged_kv_last_page_len": ints(4, 16, 17)},
        ValueError,
        "paged_kv_last_page_len[2] = 17, expected 0..16 (page_size=16)",
    ),
    # paged_kv_indices
    (
        {"paged_kv_indices": np.array([4, 1, 0], np.int16)},
        TypeError,
        "paged_kv_indices has dtype int16, expected int32 or int64",
    ),
    (
        {"paged_kv_indices": np.zeros((3, 1), np.int32)},
        ValueError,
        "paged_kv_indices has shape (3, 1), expected one axis",
    ),
    (
        {"paged_kv_indices": ints(4)},
        ValueError,
        "paged_kv_indices has 1 entry, expected at least 3 = paged_kv_indptr[-1]",
    ),
    (
        {"paged_kv_indices": ints(4, 1, -3)},
        ValueError,
        "paged_kv_indices[2] = -3 (request 1, its page 0), expected at least 0",
    ),
    (
        {"paged_kv_indices": np.array([4, 2**31, 0])},
        ValueError,
        f"paged_kv_indices[1] = 2147483648 (request 0, its page 1), expected at most {INT_MAX}",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), PLAN_ERRORS)
def test_plan_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    wrapper = Wrapper(backend="reference")
    check_error(error, message, wrapper.plan, **plan_arguments(**changes))
    check_error(RuntimeError, "run() before plan()", wrapper.run, **run_arguments())


def test_the_contract_s_own_examples() -> None:
    """The wording that the design gives, word for word."""
    lengths = {
        "qo_indptr": ints(0, 1, 2, 3, 4),
        "paged_kv_indptr": ints(0, 1, 2, 3, 4),
        "paged_kv_indices": ints(0, 1, 2, 3),
        "page_size": 32,
    }
    check_error(
        ValueError,
        "paged_kv_last_page_len[3] = 40, expected 1..32 (page_size=32)",
        planned,
        **lengths,
        paged_kv_last_page_len=ints(1, 1, 1, 40),
    )
    indices = np.arange(120, dtype=np.int32)
    indices[117] = 640
    wrapper = planned(
        qo_indptr=ints(0, 100, 200, 300, 400, 500, 645),
        paged_kv_indptr=ints(0, 10, 20, 30, 50, 115, 120),
        paged_kv_indices=indices,
        paged_kv_last_page_len=ints(1, 1, 1, 1, 1, 1),
        num_qo_heads=8,
        num_kv_heads=8,
        head_dim_qk=128,
        page_size=32,
    )
    q = np.zeros((645, 8, 128), np.float16)
    nhd, hnd = pages(640, 32, 8, 128), pages(640, 8, 32, 128)
    check_error(
        ValueError,
        "paged_kv_indices[117] = 640 (request 5, its page 2), expected 0..639: "
        "the cache holds 640 pages",
        wrapper.run,
        q,
        (nhd, nhd),
    )
    check_error(
        ValueError,
        "k cache has shape (640, 8, 32, 128); kv_layout='NHD' expects "
        "(num_pages, page_size=32, num_kv_heads=8, head_dim=128). It fits kv_layout='HND'",
        wrapper.run,
        q,
        (hnd, hnd),
    )
    check_error(
        ValueError,
        "q has 640 rows, expected 645 = qo_indptr[-1]",
        wrapper.run,
        q[:640],
        (nhd, nhd),
    )


NHD_WORDS = "kv_layout='NHD' expects (num_pages, page_size=16, num_kv_heads=2, head_dim=64)"
STACKED_WORDS = "kv_layout='NHD' expects (num_pages, 2, page_size=16, num_kv_heads=2, head_dim=64)"

RUN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    # q
    ({"q": None}, TypeError, f"q is None, {SPEAKS_DLPACK}"),
    ({"q": [[1.0]]}, TypeError, f"q is a list, {SPEAKS_DLPACK}"),
    (
        {"q": np.zeros((9, 2, 64), np.float16)},
        ValueError,
        "q has shape (9, 2, 64), expected (nnz_qo, num_qo_heads=4, head_dim_qk=64)",
    ),
    (
        {"q": np.zeros((9, 256), np.float16)},
        ValueError,
        "q has shape (9, 256), expected (nnz_qo, num_qo_heads=4, head_dim_qk=64)",
    ),
    (
        {"q": np.zeros((8, 4, 64), np.float16)},
        ValueError,
        "q has 8 rows, expected 9 = qo_indptr[-1]",
    ),
    (
        {"q": np.zeros((9, 4, 64), ml_dtypes.bfloat16)},
        TypeError,
        "q is bfloat16, expected q_data_type = float16",
    ),
    (
        {"q": np.zeros((9, 4, 64), np.float32)},
        TypeError,
        "q is float32, expected q_data_type = float16",
    ),
    (
        {"q": np.zeros((9, 4, 128), np.float16)[..., ::2]},
        ValueError,
        "q has a stride of 2 elements on its last axis, expected 1: head_dim must be contiguous",
    ),
    (
        {"q": np.zeros((9, 4, 64), np.float16)[..., ::-1]},
        ValueError,
        "q has a stride of -1 elements on its last axis, expected 1: head_dim must be contiguous",
    ),
    # The cache
    ({"paged_kv_cache": None}, TypeError, f"paged_kv_cache is None, {SPEAKS_DLPACK}"),
    ({"paged_kv_cache": (pages(), 3)}, TypeError, f"v cache is an int, {SPEAKS_DLPACK}"),
    ({"paged_kv_cache": (None, pages())}, TypeError, f"k cache is None, {SPEAKS_DLPACK}"),
    (
        {"paged_kv_cache": (pages(),)},
        ValueError,
        "paged_kv_cache has 1 arrays, expected two: (k, v)",
    ),
    (
        {"paged_kv_cache": [pages(), pages(), pages()]},
        ValueError,
        "paged_kv_cache has 3 arrays, expected two: (k, v)",
    ),
    (
        {"paged_kv_cache": (pages(5, 2, 16, 64), pages())},
        ValueError,
        f"k cache has shape (5, 2, 16, 64); {NHD_WORDS}. It fits kv_layout='HND'",
    ),
    (
        {"paged_kv_cache": (pages(), pages(5, 16, 4, 64))},
        ValueError,
        f"v cache has shape (5, 16, 4, 64); {NHD_WORDS}",
    ),
    (
        {"paged_kv_cache": (pages(), pages(16, 2, 64))},
        ValueError,
        f"v cache has shape (16, 2, 64); {NHD_WORDS}",
    ),
    (
        {"paged_kv_cache": (pages(), pages(6, 16, 2, 64))},
        ValueError,
        "v cache holds 6 pages, expected 5 as the k cache does",
    ),
    (
        {"paged_kv_cache": pages(5, 2, 2, 16, 64)},
        ValueError,
        f"paged_kv_cache has shape (5, 2, 2, 16, 64); {STACKED_WORDS}. It fits kv_layout='HND'",
    ),
    (
        {"paged_kv_cache": pages(5, 3, 16, 2, 64)},
        ValueError,
        f"paged_kv_cache has shape (5, 3, 16, 2, 64); {STACKED_WORDS}",
    ),
    (
        {"paged_kv_cache": pages(5, 16, 2, 64)},
        ValueError,
        f"paged_kv_cache has shape (5, 16, 2, 64); {STACKED_WORDS}",
    ),
    (
        {"paged_kv_cache": pages(5)},
        ValueError,
        f"paged_kv_cache has shape (5,); {STACKED_WORDS}",
    ),
    (
        {"paged_kv_cache": (pages(dtype=ml_dtypes.bfloat16), pages())},
        TypeError,
        "k cache is bfloat16, expected kv_data_type = float16",
    ),
    (
        {"paged_kv_cache": (pages(), pages(dtype=np.int16))},
        TypeError,
        "v cache is int16, expected kv_data_type = float16",
    ),
    (
        {"paged_kv_cache": pages(5, 2, 16, 2, 64, dtype=np.float32)},
        TypeError,
        "k cache is float32, expected kv_data_type = float16",
    ),
    (
        {"paged_kv_cache": (pages(), pages(5, 16, 2, 192)[..., ::3])},
        ValueError,
        "v cache has a stride of 3 elements on its last axis, expected 1: "
        "head_dim must be contiguous",
    ),
    (
        {"paged_kv_cache": (pages(4, 16, 2, 64), pages(4, 16, 2, 64))},
        ValueError,
        "paged_kv_indices[0] = 4 (request 0, its page 0), expected 0..3: the cache holds 4 pages",
    ),
    (
        {"paged_kv_cache": pages(0, 2, 16, 2, 64)},
        ValueError,
        "paged_kv_indices[0] = 4 (request 0, its page 0), expected none: the cache holds 0 pages",
    ),
    # Factors
    ({"q_scale": [1.0]}, TypeError, "q_scale is a list, expected a number"),
    ({"k_scale": np.ones(3)}, TypeError, "k_scale is a ndarray, expected a number"),
    ({"k_scale": float("inf")}, ValueError, "k_scale = inf, expected a finite number"),
    ({"v_scale": float("nan")}, ValueError, "v_scale = nan, expected a finite number"),
    ({"v_scale": "big"}, TypeError, "v_scale is a str, expected a number"),
    (
        {"lse_base": "log10"},
        ValueError,
        "lse_base = 'log10', expected one of 'log2', 'ln'",
    ),
    ({"lse_base": None}, TypeError, "lse_base is a NoneType, expected one of 'log2', 'ln'"),
    # out and lse; a given `out` itself stands in for this test's own
    ({"out": "here"}, TypeError, f"out is a str, {SPEAKS_DLPACK}"),
    (
        {"out": np.zeros((9, 4, 128), np.float16)},
        ValueError,
        "out has shape (9, 4, 128), expected (9, 4, 64)",
    ),
    (
        {"out": np.zeros((9, 4, 64), np.float32)},
        TypeError,
        "out is float32, expected float16",
    ),
    (
        {"out": np.zeros((9, 4, 128), np.float16)[..., ::2]},
        ValueError,
        "out has a stride of 2 elements on its last axis, expected 1: head_dim must be contiguous",
    ),
    (
        {"out": np.broadcast_to(np.float16(0), (9, 4, 64))},
        ValueError,
        "out is a read-only array, expected one that can be written",
    ),
    ({"lse": 1.0}, TypeError, f"lse is a float, {SPEAKS_DLPACK}"),
    (
        {"lse": np.zeros((9, 2), np.float32)},
        ValueError,
        "lse has shape (9, 2), expected (9, 4)",
    ),
    (
        {"lse": np.zeros((4, 9), np.float32)},
        ValueError,
        "lse has shape (4, 9), expected (9, 4)",
    ),
    ({"lse": np.zeros((9, 4))}, TypeError, "lse is float64, expected float32"),
    (
        {"lse": np.broadcast_to(np.float32(0), (9, 4))},
        ValueError,
        "lse is a read-only array, expected one that can be written",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), RUN_ERRORS)
def test_run_errors_and_nothing_is_written(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    wrapper = planned()
    out = np.full((9, 4, 64), 7, np.float16)
    lse = np.full((9, 4), 7, np.float32)
    given = {"out": out, "lse": lse}
    check_error(error, message, wrapper.run, **run_arguments(**(given | changes)))
    assert (out == 7).all()
    assert (lse == 7).all()


def test_hnd_pages_are_recognised_as_nhd() -> None:
    wrapper = planned(kv_layout="HND")
    check_error(
        ValueError,
        "k cache has shape (5, 16, 2, 64); kv_layout='HND' expects "
        "(num_pages, num_kv_heads=2, page_size=16, head_dim=64). It fits kv_layout='NHD'",
        wrapper.run,
        **run_arguments(),
    )


@pytest.mark.parametrize("call", ["run", "run_return_lse"])
def test_run_before_plan(call: str) -> None:
    wrapper = Wrapper()
    check_error(RuntimeError, "run() before plan()", getattr(wrapper, call), **run_arguments())
    check_error(RuntimeError, "explain() before plan()", wrapper.explain)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kv_layout": "HDN"}, ValueError, "kv_layout = 'HDN', expected one of 'NHD', 'HND'"),
        ({"kv_layout": None}, TypeError, "kv_layout is a NoneType, expected one of 'NHD', 'HND'"),
        (
            {"backend": "fa2"},
            ValueError,
            "backend = 'fa2', expected one of 'auto', 'reference', 'cuda'",
        ),
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
    ],
)
def test_constructor_errors(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    check_error(error, message, Wrapper, **arguments)


def test_a_workspace_too_small_says_how_many_bytes() -> None:
    """One request of 6 pages, split by 2: 3 partial states of 16 rows for each of 2 KV heads."""
    lengths = {
        "qo_indptr": ints(0, 1),
        "paged_kv_indptr": ints(0, 6),
        "paged_kv_indices": ints(0, 1, 2, 3, 4, 5),
        "paged_kv_last_page_len": ints(9),
        "fixed_split_size": 2,
    }
    needed = 3 * 2 * 16 * (64 + 1) * 4
    wrapper = Wrapper(np.zeros(needed - 1, np.uint8), backend="reference")
    check_error(
        ValueError,
        f"float_workspace_buffer has {needed - 1} bytes, expected at least {needed}: "
        "the plan's partial states take that much",
        wrapper.plan,
        **plan_arguments(**lengths),
    )
    wrapper.reset_workspace_buffer(np.zeros(needed // 4, np.float32))
    wrapper.plan(**plan_arguments(**lengths))
    wrapper.reset_workspace_buffer(None)
    wrapper.plan(**plan_arguments(**lengths))


# What no backend serves

CONSTRUCTOR_UNSERVED: dict[str, tuple[Any, str]] = {
    "use_cuda_graph": (True, "True"),
    "qo_indptr_buf": (ints(0), "a ndarray"),
    "paged_kv_indptr_buf": (ints(0), "a ndarray"),
    "paged_kv_indices_buf": (ints(0), "a ndarray"),
    "paged_kv_last_page_len_buf": (ints(0), "a ndarray"),
    "custom_mask_buf": (ints(0), "a ndarray"),
    "mask_indptr_buf": (ints(0), "a ndarray"),
    "jit_args": ([1], "a list"),
    "jit_kwargs": ({"a": 1}, "a dict"),
}
PLAN_UNSERVED: dict[str, tuple[Any, str]] = {
    "custom_mask": (np.ones(60, np.bool_), "a ndarray"),
    "packed_custom_mask": (np.ones(8, np.uint8), "a ndarray"),
    "pos_encoding_mode": ("ALIBI", "'ALIBI'"),
    "use_fp16_qk_reduction": (True, "True"),
    "window_left": (0, "0"),
    "logits_soft_cap": (30.0, "30.0"),
    "rope_scale": (1.0, "1.0"),
    "rope_theta": (1e4, "10000.0"),
    "prefix_len_ptr": (ints(0), "a ndarray"),
    "token_pos_in_items_ptr": (ints(0), "a ndarray"),
    "token_pos_in_items_len": (4, "4"),
    "max_item_len_ptr": (ints(0), "a ndarray"),
    "seq_lens": (ints(0), "a ndarray"),
    "seq_lens_q": (ints(0), "a ndarray"),
    "block_tables": (ints(0), "a ndarray"),
    "max_token_per_sequence": (8, "8"),
    "max_sequence_kv": (8, "8"),
    "uniform_q_len": (8, "8"),
}
RUN_UNSERVED: dict[str, tuple[Any, str]] = {
    "lse_layout": ("HN", "'HN'"),
    "enable_pdl": (True, "True"),
    "window_left": (4, "4"),
    "sinks": (np.zeros(4, np.float32), "a ndarray"),
    "kv_cache_sf": (np.zeros(4, np.uint8), "a ndarray"),
    "skip_softmax_threshold_scale_factor": (1.0, "1.0"),
    "use_fp16_softmax": (True, "True"),
    "uses_spcompress": (True, "True"),
}


@pytest.mark.parametrize(("name", "row"), CONSTRUCTOR_UNSERVED.items())
def test_unserved_by_the_constructor(name: str, row: tuple[Any, str]) -> None:
    value, words = row
    check_error(
        NotImplementedError,
        f"{Wrapper.__name__}: {name}={words} is not served by any backend",
        Wrapper,
        **{name: value},
    )


@pytest.mark.parametrize(("name", "row"), PLAN_UNSERVED.items())
def test_unserved_by_plan(name: str, row: tuple[Any, str]) -> None:
    value, words = row
    check_error(
        NotImplementedError,
        f"plan(): {name}={words} is not served by any backend",
        planned,
        **{name: value},
    )


@pytest.mark.parametrize(("name", "row"), RUN_UNSERVED.items())
def test_unserved_by_run(name: str, row: tuple[Any, str]) -> None:
    value, words = row
    out = np.full((9, 4, 64), 7, np.float16)
    check_error(
        NotImplementedError,
        f"run(): {name}={words} is not served by any backend",
        planned().run,
        **run_arguments(out=out, **{name: value}),
    )
    assert (out == 7).all()


def test_no_argument_is_ignored() -> None:
    """Every argument is served, checked above, or one that these lists know."""
    served = {
        "__init__": {"float_workspace_buffer", "kv_layout", "backend"} | set(CONSTRUCTOR_UNSERVED),
        "plan": set(plan_arguments())
        | {"head_dim_vo", "causal", "sm_scale", "q_data_type", "kv_data_type", "o_data_type"}
        | {"non_blocking", "fixed_split_size", "disable_split_kv"}
        | set(PLAN_UNSERVED),
        "run": {"q", "paged_kv_cache", "q_scale", "k_scale", "v_scale", "out", "lse"}
        | {"return_lse", "lse_base"}
        | set(RUN_UNSERVED),
    }
    for method, names in served.items():
        parameters = set(inspect.signature(getattr(Wrapper, method)).parameters) - {"self"}
        assert parameters == names, method


def test_what_is_off_in_flashinfer_is_served() -> None:
    """Values that FlashInfer's users pass and that ask for nothing."""
    Wrapper(use_cuda_graph=False)
    wrapper = planned(
        logits_soft_cap=0.0,
        window_left=-1,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        custom_mask=None,
        rope_scale=None,
        token_pos_in_items_len=0,
        non_blocking=False,
    )
    wrapper.run(**run_arguments(window_left=-1, enable_pdl=False, lse_layout="NH", sinks=None))


def test_dtypes_are_taken_in_any_form() -> None:
    for dtype in ("bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        wrapper = planned(q_data_type=dtype, kv_data_type="bfloat16", o_data_type=dtype)
        cache = pages(dtype=ml_dtypes.bfloat16)
        wrapper.run(np.zeros((9, 4, 64), ml_dtypes.bfloat16), (cache, cache))
    for dtype in ("float16", "half", np.float16, np.dtype(np.float16)):
        planned(q_data_type=dtype).run(**run_arguments())


# Warnings

NOT_APPENDED = (
    "request 1 has 5 queries and 2 keys (and 1 more requests like it): with causal=True its first "
    "3 rows see no key, and will be 0. Were the new keys and values appended to the cache, and "
    "counted in paged_kv_indptr and paged_kv_last_page_len?"
)
NOT_APPENDED_CALL = {"causal": True, "paged_kv_last_page_len": ints(4, 2, 0)}
TWICE = (
    "request 0 has page 4 twice, as its pages 0 and 1: its keys will be attended to twice. "
    "Was another page meant in paged_kv_indices?"
)
TWICE_CALL = {"paged_kv_indices": ints(4, 4, 0)}


def caught(call: Any, **changes: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call(**plan_arguments(**changes))
    return found


@pytest.mark.parametrize(
    ("changes", "message"), [(NOT_APPENDED_CALL, NOT_APPENDED), (TWICE_CALL, TWICE)]
)
def test_warnings(changes: dict[str, Any], message: str) -> None:
    """Once a plan, at the caller's line, and not again at every run."""
    wrapper = Wrapper(backend="reference")
    (warning,) = caught(wrapper.plan, **changes)
    assert str(warning.message) == message
    assert warning.category is cupaged.CupagedWarning
    assert issubclass(cupaged.CupagedWarning, UserWarning)
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper.run(**run_arguments())
    (again,) = caught(wrapper.plan, **changes)
    assert str(again.message) == message


def test_both_mistakes_warn() -> None:
    found = caught(Wrapper(backend="reference").plan, **NOT_APPENDED_CALL, **TWICE_CALL)
    assert [str(warning.message) for warning in found] == [NOT_APPENDED, TWICE]


def test_one_request_alone_has_no_others_like_it() -> None:
    (warning,) = caught(
        Wrapper(backend="reference").plan,
        causal=True,
        paged_kv_last_page_len=ints(4, 2, 0),
        qo_indptr=ints(0, 3, 8, 8),
    )
    assert str(warning.message) == NOT_APPENDED.replace(" (and 1 more requests like it)", "")


def test_a_page_repeated_in_several_requests() -> None:
    (warning,) = caught(
        Wrapper(backend="reference").plan,
        qo_indptr=ints(0, 1, 2, 3),
        paged_kv_indptr=ints(0, 1, 4, 7),
        paged_kv_indices=ints(2, 3, 5, 3, 9, 9, 9),
        paged_kv_last_page_len=ints(1, 1, 1),
    )
    assert str(warning.message) == (
        "request 1 has page 3 twice, as its pages 0 and 2 (and 1 more requests like it): its keys "
        "will be attended to twice. Was another page meant in paged_kv_indices?"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"causal": True, "qo_indptr": ints(0, 3, 8, 8)},  # fewer queries than keys, or as many
        {"paged_kv_last_page_len": ints(4, 2, 0)},  # fewer keys, and no causal mask
        {"paged_kv_indices": ints(4, 1, 4)},  # a shared prefix: two requests, one page
        {"paged_kv_indices": ints(4, 1, 0, 0, 0)},  # repeats beyond paged_kv_indptr[-1]
        {"paged_kv_last_page_len": ints(4, 16, 5)},  # of a request without pages: ignored
    ],
)
def test_what_does_not_warn(changes: dict[str, Any]) -> None:
    assert caught(Wrapper(backend="reference").plan, **changes) == []


@pytest.mark.parametrize("changes", [NOT_APPENDED_CALL, TWICE_CALL])
def test_warnings_as_errors_keep_the_earlier_plan(
    rng: np.random.Generator, changes: dict[str, Any]
) -> None:
    batch = batches.build(rng, [3, 9], [20, 40], page_size=16, group=2)
    wrapper = Wrapper(backend="reference")
    batch.plan(wrapper, causal=True)
    before = wrapper.run(batch.q, batch.cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(cupaged.CupagedWarning):
            wrapper.plan(**plan_arguments(**changes))
    after = wrapper.run(batch.q, batch.cache)
    assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize(
    "changes", [PLAN_ERRORS[0][0], PLAN_ERRORS[-1][0], {"custom_mask": np.ones(3)}]
)
def test_a_plan_that_fails_leaves_the_earlier_one(
    rng: np.random.Generator, changes: dict[str, Any]
) -> None:
    batch = batches.build(rng, [3, 9], [20, 40], page_size=16, group=2)
    wrapper = Wrapper(backend="reference")
    batch.plan(wrapper)
    before = wrapper.run(batch.q, batch.cache)
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        wrapper.plan(**plan_arguments(**changes))
    assert before.tobytes() == wrapper.run(batch.q, batch.cache).tobytes()
