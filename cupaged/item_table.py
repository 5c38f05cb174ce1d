"""Work items while they are a plain int32 array, and the few operations that planning is made of.

Plans are made of small arrays, for which a call of NumPy costs more than what it computes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cupaged.kernel_spec import ITEM_DTYPE

IntArray = npt.NDArray[np.int32]

#: The columns, those of ITEM_DTYPE.
ITEM_FIELDS = ITEM_DTYPE.itemsize // 4
REQUEST, ROW_BEGIN, KV_BEGIN, KV_END, SPLIT, NUM_SPLITS, FIRST_PARTIAL, MERGE = range(8)
QO_BEGIN, QO_LEN, KV_LEN, PAGE_BEGIN = range(8, ITEM_FIELDS)

_UINT16_MAX = 2**16 - 1

#: More numbers than these are sorted faster as they are than by where they are.
_MANY = 2048


@lru_cache(maxsize=64)
def counting(end: int) -> IntArray:
    """0, 1, … up to `end`."""
    numbers = np.arange(end, dtype=np.int32)
    numbers.flags.writeable = False  # many plans share them
    return numbers


@lru_cache(maxsize=256)
def int32(value: int) -> IntArray:
    """An operand for NumPy, for which converting an int takes as long as adding small arrays."""
    return np.array(value, np.int32)


@lru_cache(maxsize=8)
def _unsplit_items(count: int) -> IntArray:
    items = np.zeros((count, ITEM_FIELDS), np.int32)
    items[:, REQUEST] = counting(count)
    items[:, NUM_SPLITS] = 1
    return items


def unsplit_items(count: int) -> IntArray:
    """An unsplit item without rows and keys for each of so many requests."""
    items: IntArray = _unsplit_items(count).copy()
    return items


def ceil_div(dividends: IntArray, divisor: int) -> IntArray:
    """Quotients, rounded up, of numbers that are at least 0."""
    return (dividends + int32(divisor - 1)) // int32(divisor)


def kv_tiles_of(items: IntArray, cta_tile_kv: int) -> IntArray:
    """The KV tiles of each item: int32 [items]."""
    return ceil_div(items[:, KV_END] - items[:, KV_BEGIN], cta_tile_kv)


def sums_before(counts: IntArray) -> IntArray:
    """Of each number, the sum of those before it."""
    sums: IntArray = np.add.accumulate(counts, dtype=np.int32)
    sums -= counts
    return sums


def longest_first(kv_tiles: IntArray) -> npt.NDArray[np.intp]:
    """The order by descending KV tiles, equal ones as they come."""
    longest, count = kv_tiles.item(kv_tiles.argmax()), len(kv_tiles)
    if count > _MANY and longest < 1 << (31 - count.bit_length()):
        # NumPy sorts with vector instructions, but not where it has to say what went where. So what
        # is sorted has its place in its lowest bits, by which equal ones stay as they come, too.
        place = (1 << count.bit_length()) - 1
        keys = kv_tiles * int32(-1 - place)
        keys += counting(count)
        keys.sort()
        keys &= int32(place)
        return keys.astype(np.intp)
    if longest <= _UINT16_MAX:
        # NumPy sorts 16-bit integers by radix, several times as fast as wider ones.
        return (~kv_tiles).astype(np.uint16).argsort(kind="stable")
    return (~kv_tiles).argsort(kind="stable")
