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
_PANEL = 64  # elements of a row that lie together in shared memory: 128 bytes
_GROUP = 8  # rows that the 128-byte swizzle spans
# Of CUtensorMapDataType, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion and
# CUtensorMapFloatOOBfill.
_UINT16, _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _FILL_ZEROS = 1, 0, 3, 3, 0


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
    page_shape: tuple[int, int, int],
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
        (page_size, num_kv_heads, head_dim)
    k_page, k_token, k_head, v_page, v_token, v_head : int
        Strides in bytes.
    """
    shape = (num_pages, *page_shape)
    k = pages(k_address, shape, (k_page, k_token, k_head), rows)
    v = pages(v_address, shape, (v_page, v_token, v_head), rows)
    return None if k is None or v is None else k + v


def pages(
    address: int,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    rows: int,
) -> bytes | None:
    """The tensor map of a paged K or V cache of 16-bit elements.

    Its dimensions are 64 elements; 8 tokens; a row's parts of 64 elements, of all heads; groups of
    8 tokens in a page; pages. So one box holds `rows` tokens of a head, `wgmma.cuh` says how.

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
    panel_bytes = _PANEL * 2
    if num_heads == 1:
        head = 0
    if head % panel_bytes or head < 0 or not num_pages:
        return None
    panels = (num_heads - 1) * head // panel_bytes + head_dim // _PANEL
    storage = ctypes.create_string_buffer(TENSOR_MAP_BYTES + _ALIGNMENT)
    place = -ctypes.addressof(storage) % _ALIGNMENT
    dims = (_PANEL, _GROUP, panels, page_size // _GROUP, num_pages)
    steps = (token, panel_bytes, _GROUP * token, page)
    if min(steps) < 0:
        return None
    box = (_PANEL, _GROUP, head_dim // _PANEL, rows // _GROUP, 1)
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
        _SWIZZLE_128B,
        _PROMOTE_256B,
        _FILL_ZEROS,
    )
    return storage.raw[place : place + TENSOR_MAP_BYTES] if status == 0 else None
