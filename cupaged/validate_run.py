"""Every check of `run()`'s arrays against the plan, and how each one is worded.

These are on the way of every layer's call: an attribute or a comparison each, words only when
something is wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged import arrays
from cupaged.spec import DTYPES, AttentionSpec

#: Kernels store partial states by 16 bytes.
_WORKSPACE_ALIGNMENT = 16


def _shape_words(spec: AttentionSpec, stacked: bool) -> str:
    page, heads = f"page_size={spec.page_size}", f"num_kv_heads={spec.num_kv_heads}"
    inner = f"{page}, {heads}" if spec.kv_layout == "NHD" else f"{heads}, {page}"
    return f"(num_pages, {'2, ' if stacked else ''}{inner}, head_dim={spec.head_dim_qk})"


def _check_pages(shape: tuple[int, ...], spec: AttentionSpec, name: str, stacked: bool) -> None:
    """Check the shape of K's, V's or the stacked pages."""
    tokens, heads = spec.page_size, spec.num_kv_heads
    expected = (tokens, heads) if spec.kv_layout == "NHD" else (heads, tokens)
    found = shape[2 if stacked else 1 :]
    if found == (*expected, spec.head_dim_qk) and (not stacked or shape[1] == 2):
        return
    words = (
        f"{name} has shape {shape}; kv_layout={spec.kv_layout!r} expects "
        f"{_shape_words(spec, stacked)}"
    )
    if found == (*expected[::-1], spec.head_dim_qk) and (not stacked or shape[1] == 2):
        words += f". It fits kv_layout={'HND' if spec.kv_layout == 'NHD' else 'NHD'!r}"
    raise ValueError(words)


def cache(paged_kv_cache: Any, spec: AttentionSpec) -> tuple[Any, Any, int]:
    """Check a cache, imported.

    Parameters
    ----------
    paged_kv_cache : tuple of array, or array
        `(k, v)`, or both stacked.
    spec : AttentionSpec

    Returns
    -------
    k, v : array
        In the plan's layout.
    num_pages : int
    """
    if isinstance(paged_kv_cache, tuple):
        k, v = paged_kv_cache
        shape, v_shape = k.shape, v.shape
        _check_pages(shape, spec, "k cache", stacked=False)
        if v_shape != shape:
            _check_pages(v_shape, spec, "v cache", stacked=False)
            raise ValueError(
                f"v cache holds {v_shape[0]} pages, expected {shape[0]} as the k cache does"
            )
    else:
        shape = paged_kv_cache.shape
        _check_pages(shape, spec, "paged_kv_cache", stacked=True)
        k, v = paged_kv_cache[:, 0], paged_kv_cache[:, 1]
    _check_elements(k, spec, "k cache", "kv_data_type")
    _check_elements(v, spec, "v cache", "kv_data_type")
    return k, v, shape[0]


def _check_elements(array: Any, spec: AttentionSpec, name: str, argument: str) -> None:
    """Check the dtype of an array, and that its elements lie one behind the other."""
    if array.dtype != DTYPES[spec.dtype]:
        raise TypeError(f"{name} is {words_of_dtype(array)}, expected {argument} = {spec.dtype}")
    check_last_axis(array, name)


def words_of_dtype(array: Any) -> str:
    return str(array.dtype.name) + ("" if array.dtype.isnative else " in foreign byte order")


def check_last_axis(array: Any, name: str) -> None:
    stride, itemsize = array.strides[-1], array.dtype.itemsize
    if stride != itemsize and array.size:
        raise ValueError(
            f"{name} has a stride of {stride // itemsize} elements on its last "
            "axis, expected 1: head_dim must be contiguous"
        )


def query(
    q: Any, spec: AttentionSpec, nnz_qo: int, rows_are: str, head_dim_name: str, more: bool
) -> int:
    """Check q against the plan; returns its rows.

    `rows_are` says what the plan's number of rows is, `head_dim_name` what the plan calls head_dim,
    and `more` that q may have more rows.
    """
    shape = q.shape
    if len(shape) != 3 or shape[1:] != (spec.num_qo_heads, spec.head_dim_qk):
        raise ValueError(
            f"q has shape {shape}, expected (nnz_qo, num_qo_heads={spec.num_qo_heads}, "
            f"{head_dim_name}={spec.head_dim_qk})"
        )
    num_rows: int = shape[0]
    if num_rows != nnz_qo and not (more and num_rows > nnz_qo):
        at_least = "at least " if more else ""
        raise ValueError(f"q has {num_rows} rows, expected {at_least}{nnz_qo} = {rows_are}")
    _check_elements(q, spec, "q", "q_data_type")
    return num_rows


def given(
    array: Any, name: str, shape: tuple[int, ...], dtype: np.dtype, device: int | None
) -> None:
    """Check an `out` or `lse` that the caller gave."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if array.dtype != dtype:
        raise TypeError(f"{name} is {words_of_dtype(array)}, expected {dtype.name}")
    found = arrays.device_id(array)
    if found != device:
        raise ValueError(f"{name} is on {place(found)}, expected {place(device)} as q is")
    if name == "out":
        check_last_axis(array, name)


def one_device(q: Any, k: Any, v: Any) -> int | None:
    """The device that q, K and V share; None for the host."""
    device = arrays.device_id(q)
    for name, array in (("k cache", k), ("v cache", v)):
        found = arrays.device_id(array)
        if found != device:
            raise ValueError(f"{name} is on {place(found)}, expected {place(device)} as q is")
    return device


def backend_serves(backend: str, device: int | None) -> None:
    """Refuse arrays that live where the chosen backend can't reach them."""
    if backend == "cuda" and device is None:
        raise ValueError("q is on the host, expected a CUDA device: backend='cuda'")
    if backend == "reference" and device is not None:
        raise ValueError(f"q is on {place(device)}, expected the host: backend='reference'")


def place(device: int | None) -> str:
    """A device in words."""
    return "the host" if device is None else f"cuda:{device}"


def workspace(array: Any) -> None:
    """Check a workspace: one contiguous piece of memory."""
    if not array.flags.c_contiguous:
        raise ValueError("float_workspace_buffer is not contiguous, expected one piece of memory")
    if arrays.device_id(array) is not None and array.data.ptr % _WORKSPACE_ALIGNMENT:
        raise ValueError(
            f"float_workspace_buffer begins at address {array.data.ptr:#x}, "
            f"expected a multiple of {_WORKSPACE_ALIGNMENT}"
        )


def workspace_size(array: Any, needed: int) -> None:
    """Refuse a workspace that is too small for a plan."""
    if array.nbytes < needed:
        raise ValueError(
            f"float_workspace_buffer has {array.nbytes} bytes, expected at least {needed}: "
            "the plan's partial states take that much"
        )


def workspace_device(array: Any, device: int | None, beside: str) -> None:
    """Refuse a workspace that isn't where what is `beside` it is."""
    found = arrays.device_id(array)
    if found != device:
        raise ValueError(
            f"float_workspace_buffer is on {place(found)}, expected {place(device)} as {beside}"
        )
