"""Every error of `run()`, by its type and full text, and that nothing is written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from small_call import (
    SPEAKS_DLPACK,
    Wrapper,
    check_error,
    ints,
    pages,
    planned,
    run_arguments,
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
        {"q": np.zeros((9, 4, 64), ">f2")},
        TypeError,
        "q is float16 in foreign byte order, expected q_data_type = float16",
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
        {"out": np.zeros((9, 4, 64), ">f2")},
        TypeError,
        "out is float16 in foreign byte order, expected float16",
    ),
    (
        {"paged_kv_cache": (pages(dtype=">f2"), pages())},
        TypeError,
        "k cache is float16 in foreign byte order, expected kv_data_type = float16",
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
    ({"k_scale": np.ones(3)}, TypeError, "k_scale is an ndarray, expected a number"),
    ({"k_scale": float("inf")}, ValueError, "k_scale = inf, expected a finite number"),
    ({"v_scale": float("nan")}, ValueError, "v_scale = nan, expected a finite number"),
    ({"v_scale": "big"}, TypeError, "v_scale is a str, expected a number"),
    ({"v_scale": False}, TypeError, "v_scale is a bool, expected a number"),
    ({"v_scale": 10**400}, ValueError, "v_scale = inf, expected a finite number"),
    ({"v_scale": 1e39}, ValueError, "v_scale = 1e+39, expected at most 3.403e+38 in magnitude"),
    ({"q_scale": 1e300}, ValueError, "q_scale = 1e+300, expected at most 3.403e+38 in magnitude"),
    (
        {"q_scale": 2.0**100, "k_scale": -(2.0**100)},  # times 1 / 8, by default
        ValueError,
        f"sm_scale * q_scale * k_scale = {-(2.0**197)}, expected at most 1.701e+38 in magnitude",
    ),
    ({"return_lse": "no"}, TypeError, "return_lse is a str, expected a bool"),
    ({"return_lse": None}, TypeError, "return_lse is a NoneType, expected a bool"),
    (
        {"lse_base": "log10"},
        ValueError,
        "lse_base = 'log10', expected one of 'log2', 'ln'",
    ),
    ({"lse_base": None}, TypeError, "lse_base is a NoneType, expected one of 'log2', 'ln'"),
    ({"lse_base": np.ones(2)}, TypeError, "lse_base is an ndarray, expected one of 'log2', 'ln'"),
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


def test_a_planned_scale_too_large_for_base_2() -> None:
    """A float32 that no longer is one once it is multiplied by log2(e)."""
    check_error(
        ValueError,
        "sm_scale * q_scale * k_scale = 3e+38, expected at most 1.701e+38 in magnitude",
        planned(sm_scale=3e38).run,
        **run_arguments(),
    )


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


class Behind:
    """An array that is seen only through DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("name", ["out", "lse"])
def test_what_is_read_only_behind_dlpack_is_refused_before_anything_is_written(name: str) -> None:
    given = {"out": np.full((9, 4, 64), 7, np.float16), "lse": np.full((9, 4), 7, np.float32)}
    given[name].flags.writeable = False
    arguments = run_arguments(**given | {name: Behind(given[name])})
    message = f"{name} is a read-only array, expected one that can be written"
    check_error(ValueError, message, planned().run, **arguments)
    for array in given.values():
        assert (array == 7).all()


@pytest.mark.parametrize("name", ["out", "lse"])
def test_an_output_with_one_place_for_many_elements_is_refused(name: str) -> None:
    shape, dtype = {"out": ((9, 4, 64), np.float16), "lse": ((9, 4), np.float32)}[name]
    row = np.full(shape[1:], 7, dtype)
    rows = np.lib.stride_tricks.as_strided(row, shape, (0, *row.strides))
    message = f"{name} has a stride of 0 on axis 0, expected elements of their own"
    check_error(ValueError, message, planned().run, **run_arguments(**{name: rows}))
    assert (row == 7).all()
