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


def ceil_div(dividends: IntArray, divisor: int) -> IntArray:
    """Quotients, rounded up, of numbers that are at least 0."""
    return (dividends + int32(divisor - 1)) // int32(divisor)


def sums_before(counts: IntArray) -> IntArray:
    """Of each number, the sum of those before it."""
    sums = np.add.accumulate(counts, out=np.empty_like(counts))
    sums -= counts
    return sums


def longest_first(kv_tiles: IntArray) -> npt.NDArray[np.intp]:
    """The order by descending KV tiles, equal ones as they come."""
    descending = ~kv_tiles
    if kv_tiles[kv_tiles.argmax()] <= _UINT16_MAX:
        # NumPy sorts 16-bit integers by radix, several times as fast as wider ones.
        return descending.astype(np.uint16).argsort(kind="stable")
    return descending.argsort(kind="stable")
