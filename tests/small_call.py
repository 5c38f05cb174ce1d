"""A small legal call, to change one argument of, and how an error is checked."""

from __future__ import annotations

from typing import Any

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
