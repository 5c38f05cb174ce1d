"""Every check of `run()`'s arrays against the plan, and how each one is worded.

These are on the way of every layer's call: an attribute or a comparison each, words only when
something is wrong.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cupaged import arrays
from cupaged.spec import DTYPES, AttentionSpec

#: Kernels store partial states by 16 bytes.
_WORKSPACE_ALIGNMENT = 16


def _shape_words(spec: AttentionSpec, head_dim: int, name: str, stacked: bool) -> str:
    page, heads = f"page_size={spec.page_size}", f"num_kv_heads={spec.num_kv_heads}"
    inner = f"{page}, {heads}" if spec.kv_layout == "NHD" else f"{heads}, {page}"
    return f"(num_pages, {'2, ' if stacked else ''}{inner}, {head_dim_words(spec, head_dim, name)})"


def head_dim_words(spec: AttentionSpec, head_dim: int, name: str) -> str:
    """The last axis of K, which is called `name`, or of V."""
    if spec.head_dim_qk == spec.head_dim_vo:
        return f"head_dim={head_dim}"
    return f"head_dim_{'qk' if name.startswith('k') else 'vo'}={head_dim}"


def _check_pages(
    shape: tuple[int, ...], spec: AttentionSpec, head_dim: int, name: str, stacked: bool
) -> None:
    """Check the shape of K's, V's or the stacked pages."""
    tokens, heads = spec.page_size, spec.num_kv_heads
    expected = (tokens, heads) if spec.kv_layout == "NHD" else (heads, tokens)
    found = shape[2 if stacked else 1 :]
    if found == (*expected, head_dim) and (not stacked or shape[1] == 2):
        return
    words = (
        f"{name} has shape {shape}; kv_layout={spec.kv_layout!r} expects "
        f"{_shape_words(spec, head_dim, name, stacked)}"
    )
    if found == (*expected[::-1], head_dim) and (not stacked or shape[1] == 2):
        words += f". It fits kv_layout={'HND' if spec.kv_layout == 'NHD' else 'NHD'!r}"
    raise ValueError(words)


def cache(paged_kv_cache: Any, spec: AttentionSpec) -> tuple[Any, Any, int]:
    """Check a cache, imported.

    Parameters
    ----------
    paged_kv_cache : tuple of array, or array
        `(k, v)`, or both stacked. Pages of one token may lack the axis of the tokens.
    spec : AttentionSpec

    Returns
    -------
    k, v : array
        In the plan's layout and dtype.
    num_pages : int
    """
    head_dim, head_dim_vo = spec.head_dim_qk, spec.head_dim_vo
    if isinstance(paged_kv_cache, tuple):
        k, v = paged_kv_cache
        if spec.page_size == 1:
            k, v = with_token_axis(k, spec.kv_layout), with_token_axis(v, spec.kv_layout)
        shape, v_shape = k.shape, v.shape
        _check_pages(shape, spec, head_dim, "k cache", stacked=False)
        if v_shape != shape or head_dim_vo != head_dim:
            _check_pages(v_shape, spec, head_dim_vo, "v cache", stacked=False)
            if v_shape[0] != shape[0]:
                raise ValueError(
                    f"v cache holds {v_shape[0]} pages, expected {shape[0]} as the k cache does"
                )
    else:
        if spec.page_size == 1:
            paged_kv_cache = with_token_axis(paged_kv_cache, spec.kv_layout, stacked=True)
        if head_dim_vo != head_dim:
            raise ValueError(
                "paged_kv_cache is one array, expected two, (k, v): "
                f"head_dim_qk = {head_dim} and head_dim_vo = {head_dim_vo}"
            )
        shape = paged_kv_cache.shape
        _check_pages(shape, spec, head_dim, "paged_kv_cache", stacked=True)
        k, v = paged_kv_cache[:, 0], paged_kv_cache[:, 1]
    k = keys_or_values(k, spec, "k cache")
    return k, keys_or_values(v, spec, "v cache"), shape[0]


def with_token_axis(pages: Any, kv_layout: str, stacked: bool = False) -> Any:
    """K's, V's or the stacked pages of one token, with an axis for it, which they may lack."""
    if pages.ndim != 3 + stacked:
        return pages
    behind = (slice(None),) * (2 if kv_layout == "NHD" else 1)
    place = (..., None, *behind)
    return pages[place]


def keys_or_values(array: Any, spec: AttentionSpec, name: str) -> Any:
    """Check the elements of K or V; what comes as the bits of a float8, as that."""
    dtype = DTYPES[spec.kv_dtype]
    if array.dtype != dtype:
        if array.dtype != np.uint8 or dtype.itemsize != 1:
            raise TypeError(
                f"{name} is {words_of_dtype(array)}, expected kv_data_type = {spec.kv_dtype}"
            )
        array = array.view(dtype)
    check_last_axis(array, name)
    return array


def _check_elements(array: Any, dtype: str, name: str, argument: str) -> None:
    """Check the dtype of an array, and that its elements lie one behind the other."""
    if array.dtype != DTYPES[dtype]:
        raise TypeError(f"{name} is {words_of_dtype(array)}, expected {argument} = {dtype}")
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
    _check_elements(q, spec.dtype, "q", "q_data_type")
    return num_rows


def sinks(array: Any, spec: AttentionSpec, device: int | None) -> None:
    """Check the logits of attention sinks, imported."""
    if array.shape != (spec.num_qo_heads,):
        raise ValueError(
            f"sinks has shape {array.shape}, expected (num_qo_heads={spec.num_qo_heads},)"
        )
    if array.dtype != DTYPES["float32"]:
        raise TypeError(f"sinks is {words_of_dtype(array)}, expected float32")
    if array.strides[0] != array.itemsize and spec.num_qo_heads > 1:
        raise ValueError(
            f"sinks has a stride of {array.strides[0] // array.itemsize} elements, expected 1"
        )
    found = arrays.device_id(array)
    if found != device:
        raise ValueError(f"sinks is on {place(found)}, expected {place(device)} as q is")


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
    arrays.writable(array, name)  # which the object that it came from may not have shown
    if 0 in array.strides:
        own_elements(array, name)


def own_elements(array: Any, name: str, why: str = "") -> None:
    """Refuse an array that is to be written and has one place for several elements."""
    for axis, (length, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
        if stride == 0 and length > 1 and array.size:
            raise ValueError(
                f"{name} has a stride of 0 on axis {axis}, expected elements of their own{why}"
            )


def own_beginnings(
    first: Any, second: Any, names: tuple[str, str] = ("k cache", "v cache")
) -> None:
    """Refuse one array given for two that are to be written, and one place for several elements.

    For what is called layer after layer: the least that a mistake looks like.
    """
    if 0 in first.strides or 0 in second.strides:
        own_elements(first, names[0])
        own_elements(second, names[1])
    if isinstance(first, np.ndarray) and not np.may_share_memory(first, second):
        return  # which takes less time than NumPy's addresses
    if address(first) == address(second) and first.size and second.size:
        raise ValueError(f"{names[0]} and {names[1]} share memory, expected elements of their own")


def own_memory(first: Any, second: Any, names: tuple[str, str] = ("k cache", "v cache")) -> None:
    """Refuse two arrays on one device that are to be written, where elements share a place."""
    own_beginnings(first, second, names)
    if share_memory(first, second):
        raise ValueError(f"{names[0]} and {names[1]} share memory, expected elements of their own")


def share_memory(first: Any, second: Any) -> bool:
    """Whether an array begins with an element of the other.

    K and V that lie in between each other don't. Not every shared element is found in this way.
    """
    if not first.size or not second.size:
        return False
    offset = address(second) - address(first)
    return _share_elements(offset, first.shape, first.strides, second.shape, second.strides)


@lru_cache(maxsize=4096)
def _share_elements(
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    other_shape: tuple[int, ...],
    other_strides: tuple[int, ...],
) -> bool:
    """What `share_memory` says; kept, as a layer's K and V lie alike step after step."""
    return _has_element_at(shape, strides, offset) or _has_element_at(
        other_shape, other_strides, -offset
    )


def _has_element_at(shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> bool:
    """Whether an element is so many bytes behind the first one, taking long strides first."""
    axes = sorted(zip(strides, shape, strict=True), key=lambda axis: -abs(axis[0]))
    for stride, length in axes:
        if stride:
            offset -= min(max(offset // stride, 0), length - 1) * stride
    return offset == 0


def address(array: Any) -> int:
    """Where an imported array's first element is."""
    begin: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return begin


def one_device(
    q: Any, k: Any, v: Any, names: tuple[str, str] = ("k cache", "v cache")
) -> int | None:
    """The device that q, K and V, which are called `names`, share; None for the host."""
    device, of_k, of_v = arrays.device_id(q), arrays.device_id(k), arrays.device_id(v)
    if of_k == device == of_v:
        return device
    name, found = (names[0], of_k) if of_k != device else (names[1], of_v)
    raise ValueError(f"{name} is on {place(found)}, expected {place(device)} as q is")


def ragged(
    k: Any, v: Any, spec: AttentionSpec, kv_layout: str, num_rows: int, rows_are: str, more: bool
) -> tuple[Any, Any]:
    """Check K and V that have no pages, imported.

    Parameters
    ----------
    k, v : array
        [rows, num_kv_heads, head_dim], or with "HND" the first two axes swapped.
    spec : AttentionSpec
    kv_layout : str
    num_rows : int
        Rows that are planned.
    rows_are : str
        What that number is.
    more : bool
        There may be more.

    Returns
    -------
    k, v : array
        [rows, num_kv_heads, head_dim]
    """
    found = []
    for name, array, head_dim in (("k", k, spec.head_dim_qk), ("v", v, spec.head_dim_vo)):
        shape = array.shape
        if kv_layout == "HND" and len(shape) == 3:
            array = array.transpose(1, 0, 2)
        if array.shape[1:] != (spec.num_kv_heads, head_dim):
            axes = ["nnz_kv", f"num_kv_heads={spec.num_kv_heads}"]
            words = ", ".join(axes if kv_layout == "NHD" else axes[::-1])
            raise ValueError(
                f"{name} has shape {shape}; kv_layout={kv_layout!r} expects "
                f"({words}, {head_dim_words(spec, head_dim, name)})"
            )
        rows = len(array)
        if rows != num_rows and not (more and rows > num_rows):
            at_least = "at least " if more else ""
            raise ValueError(f"{name} has {rows} rows, expected {at_least}{num_rows} = {rows_are}")
        found.append(keys_or_values(array, spec, name))
    k, v = found
    if len(v) != len(k):
        raise ValueError(f"v has {len(v)} rows, expected {len(k)} as k does")
    return k, v


def backend_serves(backend: str, device: int | None) -> None:
    """Refuse arrays that live where the chosen backend can't reach them."""
    if backend == "cuda" and device is None:
        raise ValueError("q is on the host, expected a CUDA device: backend='cuda'")
    if backend == "reference" and device is not None:
        raise ValueError(f"q is on {place(device)}, expected the host: backend='reference'")


def place(device: int | None) -> str:
    """A device in words."""
    return "the host" if device is None else f"cuda:{device}"


def workspace(array: Any, given: Any) -> None:
    """Check a workspace, imported and as it was given: one piece of memory that can be written."""
    if arrays.framework(given) == "jax":
        raise TypeError(
            "float_workspace_buffer is a JAX array, which is immutable: omit it, or give memory of "
            "CuPy, PyTorch or NumPy"
        )
    arrays.writable(array, "float_workspace_buffer")
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
