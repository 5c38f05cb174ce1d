"""Every check of the functions of `cupaged.page`, and how each one is worded.

Checks are vectorised; the offender is looked for only once something is known to be wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cupaged import arrays
from cupaged.spec import KVLayout
from cupaged.validate import what
from cupaged.validate_lengths import check_indptr, count_entries
from cupaged.validate_run import check_last_axis, place, words_of_dtype

HostIndex = npt.NDArray[Any]
IntArray = npt.NDArray[np.int32]
#: The entries of an array that were looked at: all of them, or these.
Rows = npt.NDArray[np.intp] | slice

_MAX_INT = 2**30
_INT32_MAX = 2**31 - 1
_CACHE = "the cache"
_INT32 = np.dtype(np.int32)
_INT64 = np.dtype(np.int64)

# Tensors


def writable(x: Any, name: str) -> Any:
    """Refuse a cache that can't be written; returns `x`.

    Raises
    ------
    TypeError
        A JAX array.
    ValueError
        A read-only NumPy array.
    """
    if arrays.framework(x) == "jax":
        raise TypeError(
            f"{name} is a JAX array, which is immutable: keep the cache in arrays of CuPy or "
            "PyTorch, which JAX reads without a copy, or update it in JAX with .at[...].set()"
        )
    return arrays.writable(x, name) if isinstance(x, np.ndarray) else x


def appended(key: Any, value: Any) -> None:
    """Check the shapes of what is appended."""
    shape = key.shape
    if len(shape) != 3:
        raise ValueError(
            f"append_key has shape {shape}, expected three axes: (nnz, num_kv_heads, head_dim)"
        )
    if value.ndim == 3 and value.shape[:2] == shape[:2] and value.shape[2] != shape[2]:
        raise NotImplementedError(
            f"append_value has head_dim {value.shape[2]}, served is that of append_key, {shape[2]}"
        )
    if value.shape != shape:
        raise ValueError(
            f"append_value has shape {value.shape}, expected {shape} as append_key has"
        )
    if shape[0] > _MAX_INT:
        raise ValueError(f"append_key has {shape[0]} rows, expected at most {_MAX_INT}")


def cache(shape: tuple[int, ...], key: Any, kv_layout: KVLayout, name: str, stacked: bool) -> int:
    """Check the shape of K's, V's or the stacked pages; returns the page size.

    Pages of one token may lack the axis of the tokens.
    """
    _, heads, head_dim = key.shape
    axes = 4 + stacked
    inner = shape[axes - 3 :]
    whole = len(shape) == axes and (not stacked or shape[1] == 2) and inner[2] == head_dim
    tokens_axis, heads_axis = (0, 1) if kv_layout == "NHD" else (1, 0)
    if whole and inner[heads_axis] == heads:
        page_size = inner[tokens_axis]
    elif inner == (heads, head_dim) and (not stacked or shape[1] == 2):
        page_size = 1
    else:
        words = ["page_size", f"num_kv_heads={heads}"][:: 1 if kv_layout == "NHD" else -1]
        expected = ", ".join(["num_pages", *(["2"] if stacked else []), *words])
        fits = ""
        if whole and inner[tokens_axis] == heads:
            fits = f". It fits kv_layout={'HND' if kv_layout == 'NHD' else 'NHD'!r}"
        raise ValueError(
            f"{name} has shape {shape}; kv_layout={kv_layout!r} expects "
            f"({expected}, head_dim={head_dim}) for an append_key of shape {key.shape}{fits}"
        )
    if not 1 <= page_size <= _MAX_INT:
        raise ValueError(
            f"{name} has shape {shape}: page_size = {page_size}, expected 1..{_MAX_INT}"
        )
    if shape[0] > _INT32_MAX:
        raise ValueError(f"{name} holds {shape[0]} pages, expected at most {_INT32_MAX}")
    return page_size


def same_pages(k: Any, v: Any) -> None:
    """Check V's pages against K's, whose shape is right."""
    if v.shape != k.shape:
        raise ValueError(f"v cache has shape {v.shape}, expected {k.shape} as the k cache has")


def elements(tensors: tuple[tuple[str, Any], ...], device: int | None) -> None:
    """Check dtypes, last axes and places. The first tensor, a cache, decides."""
    dtype = tensors[0][1].dtype
    for name, tensor in tensors:
        found = tensor.dtype
        if found is not dtype and found != dtype:
            expected = words_of_dtype(tensors[0][1])
            raise TypeError(
                f"{name} is {words_of_dtype(tensor)}, expected {expected} as {_CACHE} is"
            )
        if tensor.strides[-1] != dtype.itemsize and tensor.shape[-1] > 1:
            check_last_axis(tensor, name)
        if arrays.device_id(tensor) != device:
            raise ValueError(
                f"{name} is on {place(arrays.device_id(tensor))}, "
                f"expected {place(device)} as {_CACHE} is"
            )


# Index arrays


def device_index(array: Any, name: str, device: int) -> None:
    """Check the dtype and the place of an index array that is not on the host."""
    if array.dtype != _INT32 and array.dtype != _INT64:
        raise TypeError(f"{name} has dtype {array.dtype}, expected int32 or int64")
    found = arrays.device_id(array)
    if found != device:
        raise ValueError(
            f"{name} is on {place(found)}, expected the host or {place(device)} as {_CACHE} is"
        )


def read_by_graph(array: Any, name: str, device: int) -> None:
    """Refuse an index array on the host while a CUDA graph is being captured."""
    if isinstance(array, np.ndarray):
        raise ValueError(
            f"{name} is on the host, expected {place(device)}: a CUDA graph is being captured, "
            "which would append to the same slots whenever it is launched"
        )


def no_capture(call: str) -> None:
    """Refuse a call that has to wait for the device, while a CUDA graph is being captured."""
    raise NotImplementedError(
        f"{call} can't be captured in a CUDA graph: call it before, and let the graph read what "
        "it returned"
    )


def index_shapes(
    nnz: int,
    batch_indices: Any,
    positions: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
) -> None:
    """Check the shapes of an append's index arrays, wherever they are."""
    for name, array in (("batch_indices", batch_indices), ("positions", positions)):
        if array.shape != (nnz,):
            raise ValueError(
                f"{name} has shape {array.shape}, expected ({nnz},): append_key has {nnz} rows"
            )
    if kv_indices.ndim != 1:
        raise ValueError(f"kv_indices has shape {kv_indices.shape}, expected one axis")
    indptr_shape = kv_indptr.shape
    if len(indptr_shape) != 1 or not indptr_shape[0]:
        raise ValueError(f"kv_indptr has shape {indptr_shape}, expected (batch + 1,)")
    if kv_last_page_len.shape != (indptr_shape[0] - 1,):
        raise ValueError(_last_page_len_words(kv_last_page_len, indptr_shape[0]))


def _last_page_len_words(last: Any, entries: int) -> str:
    return (
        f"kv_last_page_len has shape {last.shape}, expected ({entries - 1},): "
        f"kv_indptr has {count_entries(entries)}"
    )


def request_lengths(
    kv_indptr: HostIndex, kv_last_page_len: HostIndex, page_size: int
) -> tuple[IntArray, IntArray]:
    """Check the arrays that say how long each request is.

    Returns
    -------
    kv_indptr : int32 [batch + 1]
        A copy.
    kv_len : int32 [batch]
    """
    indptr, pages = check_indptr(kv_indptr, "kv_indptr")
    last = kv_last_page_len
    if last.shape != pages.shape:
        raise ValueError(_last_page_len_words(last, len(indptr)))
    lowest = pages > 0  # a request without pages may say 0
    wrong = (last < lowest) | (last > page_size)
    if np.count_nonzero(wrong):
        r = int(wrong.argmax())
        raise ValueError(
            f"kv_last_page_len[{r}] = {last[r]}, "
            f"expected {int(lowest[r])}..{page_size} (page_size={page_size})"
        )
    # Without pages that makes no more than 0.
    kv_len = np.maximum((pages.astype(np.int64) - 1) * page_size + last, 0)
    if len(kv_len) and kv_len[kv_len.argmax()] > _MAX_INT:
        r = int(kv_len.argmax())
        raise ValueError(
            f"kv_indptr: request {r} has {pages[r]} pages of {page_size} tokens, "
            f"expected at most {_MAX_INT} tokens"
        )
    return indptr, kv_len.astype(np.int32)


def page_table(kv_indices: HostIndex, kv_indptr: IntArray) -> None:
    """Check that the page table holds the pages of every request."""
    if len(kv_indices) < kv_indptr[-1]:
        raise ValueError(
            f"kv_indices has {count_entries(len(kv_indices))}, "
            f"expected at least {kv_indptr[-1]} = kv_indptr[-1]"
        )


def batch_indices(values: HostIndex, batch: int) -> None:
    """Check which request each row belongs to."""
    if len(values) and (values[values.argmin()] < -1 or values[values.argmax()] >= batch):
        i = int(((values < -1) | (values >= batch)).argmax())
        expected = f"0..{batch - 1}, or -1 for padding" if batch else "-1, padding"
        raise ValueError(
            f"batch_indices[{i}] = {values[i]}, expected {expected}: "
            f"kv_indptr has {count_entries(batch + 1)}"
        )


def positions(values: HostIndex, requests: HostIndex, lengths: IntArray, rows: Rows) -> None:
    """Check rows' positions against their requests' lengths.

    Parameters
    ----------
    values, requests : int array [rows]
        Positions and requests of the rows that are no padding.
    lengths : int32 [rows]
        Their requests' lengths.
    rows : Rows
        Which rows of the call these are.
    """
    wrong = (values < 0) | (values >= lengths)
    if not np.count_nonzero(wrong):
        return
    i = int(wrong.argmax())
    expected = f"0..{lengths[i] - 1}" if lengths[i] else "none"
    message = (
        f"positions[{_row(rows, i)}] = {values[i]}, expected {expected}: "
        f"request {requests[i]} has {_tokens(int(lengths[i]))}"
    )
    if values[i] >= 0:
        message += ". Were the appended tokens counted in kv_indptr and kv_last_page_len?"
    raise ValueError(message)


def pages(
    values: HostIndex, entries: npt.NDArray[np.intp], kv_indptr: IntArray, num_pages: int
) -> None:
    """Check the pages that rows go to: `values`, the given entries of kv_indices."""
    wrong = (values < 0) | (values >= num_pages)
    if not np.count_nonzero(wrong):
        return
    i = int(wrong.argmax())
    entry = int(entries[i])
    r = int(np.searchsorted(kv_indptr, entry, side="right")) - 1
    expected = f"0..{num_pages - 1}" if num_pages else "none"
    raise ValueError(
        f"kv_indices[{entry}] = {values[i]} (request {r}, its page {entry - kv_indptr[r]}), "
        f"expected {expected}: the cache holds {num_pages} pages"
    )


def distinct(
    slots: npt.NDArray[np.int64], requests: HostIndex, values: HostIndex, page_size: int, rows: Rows
) -> None:
    """Check that no two rows go to the same slot, where either may be the one that stays.

    Parameters
    ----------
    slots : int64 [rows]
        page * page_size + place in it.
    requests, values : int array [rows]
        Requests and positions of these rows.
    page_size : int
    rows : Rows
        Which rows of the call these are.
    """
    ascending = np.sort(slots)
    if not np.count_nonzero(ascending[1:] == ascending[:-1]):
        return
    order = np.argsort(slots, kind="stable")
    i = int((np.diff(slots[order]) == 0).argmax())
    first, second = int(order[i]), int(order[i + 1])
    page, in_page = divmod(int(slots[first]), page_size)
    raise ValueError(
        f"rows {_row(rows, first)} and {_row(rows, second)} go to the same slot, {in_page} of page "
        f"{page} (position {values[first]} of request {requests[first]}, position {values[second]} "
        f"of request {requests[second]}), expected one row a slot; padding has batch_indices -1"
    )


def _row(rows: Rows, i: int) -> int:
    return i if isinstance(rows, slice) else int(rows[i])


# Positions


def count(value: object, name: str) -> int:
    """`value` as an int of 0 to 2^30."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {what(value)}, expected an int")
    if not 0 <= value <= _MAX_INT:
        raise ValueError(f"{name} = {value}, expected 0..{_MAX_INT}")
    return int(value)


def append_lengths(
    append_indptr: HostIndex, seq_lens: HostIndex, nnz: int
) -> tuple[IntArray, IntArray]:
    """Check how many tokens are appended to each request, and how long they make it.

    Returns
    -------
    append_indptr : int32 [batch + 1]
        A copy.
    counts : int32 [batch]
        Its differences.
    """
    indptr, counts = check_indptr(append_indptr, "append_indptr")
    if seq_lens.shape != counts.shape:
        raise ValueError(
            f"seq_lens has shape {seq_lens.shape}, expected ({len(counts)},): "
            f"append_indptr has {count_entries(len(indptr))}"
        )
    wrong = (seq_lens < counts) | (seq_lens > _MAX_INT)
    if np.count_nonzero(wrong):
        r = int(wrong.argmax())
        if seq_lens[r] > _MAX_INT:
            raise ValueError(f"seq_lens[{r}] = {seq_lens[r]}, expected at most {_MAX_INT}")
        hint = ". Were they counted in seq_lens?" if counts[r] else ""
        raise ValueError(
            f"seq_lens[{r}] = {seq_lens[r]}, expected at least {counts[r]}: "
            f"append_indptr gives request {r} {_tokens(int(counts[r]))}{hint}"
        )
    if nnz < indptr[-1]:
        raise ValueError(f"nnz = {nnz}, expected at least {indptr[-1]} = append_indptr[-1]")
    return indptr, counts


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def given_index(array: Any, name: str, nnz: int) -> None:
    """Check a `batch_indices` or `positions` that the caller gave to be written."""
    if array.shape != (nnz,):
        raise ValueError(f"{name} has shape {array.shape}, expected ({nnz},)")
    if array.dtype != _INT32:
        raise TypeError(f"{name} is {words_of_dtype(array)}, expected int32")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous, expected one piece of memory")
