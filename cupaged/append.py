"""Where appended tokens go: their slots, found on the host; and the way there in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged import validate_page

IntArray = npt.NDArray[np.int32]
#: The values that an array of them has, as bytes: what no later change of the array can change.
Content = tuple[int | bytes, ...]


class Indices(NamedTuple):
    """A call's index arrays, int32 or int64 each.

    Attributes
    ----------
    batch_indices, positions : array [nnz]
    kv_indices : array [>= kv_indptr[-1]]
    kv_indptr : array [batch + 1]
    kv_last_page_len : array [batch]
    """

    batch_indices: Any
    positions: Any
    kv_indices: Any
    kv_indptr: Any
    kv_last_page_len: Any


class Uploaded(NamedTuple):
    """Slots on a device.

    Attributes
    ----------
    place : tuple of int
        Device and stream.
    block : cupy.cuda.MemoryPointer
    event : cupy.cuda.Event
        After the copy.
    """

    place: tuple[int, int]
    block: Any
    event: Any


@dataclass(slots=True)
class Slots:
    """Where each row of a call goes.

    Attributes
    ----------
    content : tuple
        What the index arrays held, but for `kv_indices`.
    rows : intp [rows that go anywhere], or slice
        The others are padding.
    entries : intp [rows]
        The entries of `kv_indices` that they need.
    pages : bytes
        What these held.
    table : int32 [nnz, 2]
        Page, or -1, and place in it. Not to be written.
    uploaded : Uploaded or None
        The table, where a launch needed it last.
    """

    content: Content
    rows: validate_page.Rows
    entries: npt.NDArray[np.intp]
    pages: bytes
    table: IntArray
    uploaded: Uploaded | None = None


# What the last call found. Every layer of a model asks for the same.
_last: Slots | None = None


def find_slots(indices: Indices, page_size: int, num_pages: int) -> Slots:
    """Find each row's slot; what the last call found serves as long as the values are the same.

    Parameters
    ----------
    indices : Indices
        On the host, of the right shapes.
    page_size, num_pages : int
        The cache's.

    Raises
    ------
    ValueError
        An index array is wrong, a row is no token of its request or goes to a page outside the
        cache, or two rows go to the same slot.
    """
    global _last
    batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len = indices
    content = (
        page_size,
        num_pages,
        len(kv_indices),
        len(batch_indices),
        len(kv_indptr),  # with the lengths, the bytes say whether entries are of 4 or of 8 bytes
        batch_indices.tobytes(),
        positions.tobytes(),
        kv_indptr.tobytes(),
        kv_last_page_len.tobytes(),
    )
    last = _last
    # Of kv_indices, only these entries matter.
    if (
        last is not None
        and last.content == content
        and kv_indices[last.entries].tobytes() == last.pages
    ):
        return last
    found = _last = _find_slots(indices, page_size, num_pages, content)
    return found


def _find_slots(indices: Indices, page_size: int, num_pages: int, content: Content) -> Slots:
    batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len = indices
    kv_begin, kv_len = validate_page.request_lengths(kv_indptr, kv_last_page_len, page_size)
    validate_page.page_table(kv_indices, kv_begin)
    validate_page.batch_indices(batch_indices, len(kv_len))
    rows: validate_page.Rows = slice(None)
    if len(batch_indices) and batch_indices[batch_indices.argmin()] < 0:
        rows = np.flatnonzero(batch_indices >= 0)
    requests, values = batch_indices[rows], positions[rows]
    validate_page.positions(values, requests, kv_len[requests], rows)
    place, in_page = np.divmod(values, page_size)
    entries = kv_begin[requests] + place.astype(np.intp)
    pages = kv_indices[entries]
    validate_page.pages(pages, entries, kv_begin, num_pages)
    slots = pages.astype(np.int64) * page_size + in_page
    validate_page.distinct(slots, requests, values, page_size, rows)
    table = np.empty((len(batch_indices), 2), np.int32)
    table.fill(-1)
    table[rows, 0], table[rows, 1] = pages, in_page
    table.flags.writeable = False
    return Slots(content, rows, entries, pages.tobytes(), table)


def write(slots: Slots, key: Any, value: Any, k: Any, v: Any, kv_layout: str) -> None:
    """Copy rows to their slots, all of it on the host.

    Parameters
    ----------
    slots : Slots
    key, value : numpy.ndarray [nnz, num_kv_heads, head_dim]
    k, v : numpy.ndarray
        The cache, in `kv_layout`.
    """
    pages, in_page = slots.table[slots.rows].T
    for source, target in ((key, k), (value, v)):
        tokens = target if kv_layout == "NHD" else target.swapaxes(1, 2)
        tokens[pages, in_page] = source[slots.rows]
