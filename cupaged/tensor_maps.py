"""Tensor maps: how Hopper's copy engine is told where the pages of a cache lie.

The driver encodes them, through a function that CuPy doesn't wrap; the driver is loaded by then,
so that its own C interface is the shortest way there.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache, lru_cache
from typing import Any

TENSOR_MAP_BYTES = 128
_ALIGNMENT = 64  # what the driver wants of the place it encodes into
_GROUP = 8  # rows that a swizzle spans
# Of CUtensorMapDataType, CUtensorMapInterleave, CUtensorMapL2promotion and CUtensorMapFloatOOBfill.
_UINT16, _NO_INTERLEAVE, _PROMOTE_256B, _FILL_ZEROS = 1, 0, 3, 0
# Elements of a row that lie together in shared memory → CUtensorMapSwizzle: over as many bytes as
# they take.
_SWIZZLE = {64: 3, 32: 2}


@cache
def _driver_encode() -> Any:
    """The driver's `cuTensorMapEncodeTiled`."""
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    function = driver.cuTensorMapEncodeTiled
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    function.argtypes = [pointer, number, number, *[pointer] * 5, *[number] * 4]
    return function


def box_rows(page_size: int, cta_tile_kv: int) -> int:
    """Keys of a box: a power of two that divides the page and the tile, as the kernel has it."""
    return min(page_size & -page_size, cta_tile_kv & -cta_tile_kv)


@lru_cache(maxsize=4096)
def pair(
    k_address: int,
    v_address: int,
    num_pages: int,
    page_shape: tuple[int, int, int, int],
    k_page: int,
    k_token: int,
    k_head: int,
    v_page: int,
    v_token: int,
    v_head: int,
    rows: int,
) -> bytes | None:
    """The tensor maps of K and V, one behind the other; None where one of them can't be.

    Parameters
    ----------
    k_address, v_address, num_pages, rows : int
        As `pages` takes them.
    page_shape : tuple of int
        (page_size, num_kv_heads, head_dim_qk, head_dim_vo)
    k_page, k_token, k_head, v_page, v_token, v_head : int
        Strides in bytes.
    """
    page_size, num_heads, head_dim_qk, head_dim_vo = page_shape
    k_shape, v_shape = (
        (num_pages, page_size, num_heads, dim) for dim in (head_dim_qk, head_dim_vo)
    )
    k = pages(k_address, k_shape, (k_page, k_token, k_head), rows)
    v = pages(v_address, v_shape, (v_page, v_token, v_head), rows)
    return None if k is None or v is None else k + v


def pages(
    address: int,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    rows: int,
) -> bytes | None:
    """The tensor map of a paged K or V cache of 16-bit elements.

    Its dimensions are a panel's 64 elements; 8 tokens; the panels of a row, of all heads; groups of
    8 tokens in a page; pages. Heads that are no multiple of 64 wide have panels of 32. So one box
    holds `rows` tokens of a head, `wgmma.cuh` says how.

    Parameters
    ----------
    address : int
        Of its first element.
    shape : tuple of int
        (num_pages, page_size, num_kv_heads, head_dim), the page size a multiple of 8.
    strides : tuple of int
        Of pages, tokens and heads, in bytes.
    rows : int
        Tokens of a box, see `box_rows`.

    Returns
    -------
    bytes or None
        None where the copy engine can't address such a cache.
    """
    num_pages, page_size, num_heads, head_dim = shape
    page, token, head = strides
    panel = 32 if head_dim % 64 else 64
    panel_bytes = panel * 2
    if num_heads == 1:
        head = 0
    if head % panel_bytes or head < 0 or not num_pages:
        return None
    panels = (num_heads - 1) * head // panel_bytes + head_dim // panel
    storage = ctypes.create_string_buffer(TENSOR_MAP_BYTES + _ALIGNMENT)
    place = -ctypes.addressof(storage) % _ALIGNMENT
    dims = (panel, _GROUP, panels, page_size // _GROUP, num_pages)
    steps = (token, panel_bytes, _GROUP * token, page)
    if min(steps) < 0:
        return None
    box = (panel, _GROUP, head_dim // panel, rows // _GROUP, 1)
    status = _driver_encode()(
        ctypes.addressof(storage) + place,
        _UINT16,
        len(dims),
        address,
        (ctypes.c_uint64 * 5)(*dims),
        (ctypes.c_uint64 * 4)(*steps),
        (ctypes.c_uint32 * 5)(*box),
        (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1),
        _NO_INTERLEAVE,
        _SWIZZLE[panel],
        _PROMOTE_256B,
        _FILL_ZEROS,
    )
    return storage.raw[place : place + TENSOR_MAP_BYTES] if status == 0 else None
