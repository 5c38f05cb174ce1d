"""Which keys a row sees, as other libraries say it, in the words of `plan()`.

Their masks are bands: a row sees the keys from so many before to so many behind a diagonal, which
need not end in the bottom right corner.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Band(NamedTuple):
    """Row `i` of request `r` sees key `j` where all of these hold.

    - `0 <= j < kv_len[r]`
    - `j >= i + diagonal[r] - left`, where `left` is not None
    - `j <= i + diagonal[r] + right`, where `right` is not None

    Attributes
    ----------
    qo_len, kv_len, diagonal : int64 [batch]
    left, right : int or None
    """

    qo_len: IntArray
    kv_len: IntArray
    diagonal: IntArray
    left: int | None
    right: int | None


class View(NamedTuple):
    """What `plan()` takes to show the rows the same keys.

    Attributes
    ----------
    kv_len : int64 [batch]
        The keys behind it are seen by no row.
    causal : bool
    window_left : int
    packed_mask : uint8 array, optional
        Each request's bits `[qo_len, kv_len]`, little-endian, from a byte on.
    """

    kv_len: IntArray
    causal: bool
    window_left: int
    packed_mask: npt.NDArray[np.uint8] | None


def bottom_right(qo_len: IntArray, kv_len: IntArray, left: int | None, right: int | None) -> Band:
    """The band whose diagonal ends at each request's last row and key."""
    return Band(qo_len, kv_len, kv_len - qo_len, left, right)


def top_left(qo_len: IntArray, kv_len: IntArray, left: int | None, right: int | None) -> Band:
    """The band whose diagonal begins at each request's first row and key."""
    return Band(qo_len, kv_len, np.zeros_like(kv_len), left, right)


def view(band: Band) -> View:
    """Say a band by `causal` and `window_left` where they can, by a mask where they can't."""
    qo_len, kv_len, diagonal = band.qo_len, band.kv_len, band.diagonal
    if band.right is not None:
        # The last row sees furthest. What it doesn't see moves the bottom right corner.
        seen = np.clip(qo_len + diagonal + band.right, 0, kv_len)
        kv_len = np.where(qo_len > 0, seen, kv_len)
    some = (qo_len > 0) & (kv_len > 0)
    # By how much the diagonal of `plan()` is further to the right than the band's.
    shift = kv_len - qo_len - diagonal
    causal = _causal(band, kv_len, shift, some)
    window_left = _window_left(band, shift, some)
    if causal is not None and window_left is not None:
        return View(kv_len, causal, window_left, None)
    return View(kv_len, False, -1, _bits(band, kv_len))


def _causal(
    band: Band, kv_len: IntArray, shift: IntArray, some: npt.NDArray[np.bool_]
) -> bool | None:
    """Whether the band is causal; None where one word for all requests does not say it."""
    if band.right is None:
        return False
    # To the first row, which sees the fewest.
    to_the_end = band.diagonal + band.right >= kv_len - 1
    if to_the_end[some].all():
        return False
    exact = (shift == band.right) | (to_the_end & (band.qo_len == 1))
    return True if exact[some].all() else None


def _window_left(band: Band, shift: IntArray, some: npt.NDArray[np.bool_]) -> int | None:
    """The window of `plan()`; None where one number for all requests does not say it."""
    if band.left is None:
        return -1
    # From the last row, which sees the fewest. Its diagonal is at its request's last key.
    last = band.qo_len - 1 + band.diagonal
    cuts = some & (last > band.left)
    if not cuts.any():
        return -1
    windows = band.left + shift[cuts]
    window: int = int(windows[0])
    uncut = some & ~cuts
    same = (windows == window).all() and ((last + shift)[uncut] <= window).all()
    return window if same and window >= 0 else None


def _bits(band: Band, kv_len: IntArray) -> npt.NDArray[np.uint8]:
    """Each request's bits, little-endian, from a byte on."""
    packed = [np.empty(0, np.uint8)]
    for r, (rows, keys) in enumerate(zip(band.qo_len, kv_len, strict=True)):
        key = np.arange(keys)
        seen: npt.NDArray[np.bool_] = np.ones((rows, keys), np.bool_)
        on_diagonal = np.arange(rows)[:, None] + band.diagonal[r]
        if band.left is not None:
            seen &= key >= on_diagonal - band.left
        if band.right is not None:
            seen &= key <= on_diagonal + band.right
        packed.append(np.packbits(seen, bitorder="little"))
    return np.concatenate(packed)
