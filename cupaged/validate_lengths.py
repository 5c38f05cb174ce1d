"""Every check of the arrays that say how long requests are and where their pages lie.

Checks are vectorised; the offender is looked for only once something is known to be wrong.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged.errors import warn
from cupaged.item_table import int32
from cupaged.schedule import Lengths
from cupaged.spec import AttentionSpec

HostIndex = npt.NDArray[Any]
IntArray = npt.NDArray[np.int32]
_INT32 = np.dtype(np.int32)
_INT32_MAX = 2**31 - 1
_UNSIGNED = {_INT32: np.uint32, np.dtype(np.int64): np.uint64}
_BLOCK = 12288
#: Where page numbers go further than that, sorting them takes less time, and far less memory.
_FLAGS_PER_ENTRY = 256
#: Packed rows and keys are counted in int32, the spare ones of the last tile or split too. More
#: would not fit the memory of any GPU.
_MAX_ROWS = _MAX_KEYS = 2**30


class Names(NamedTuple):
    """What a call names its index arrays and head_dim, and what it says of too few keys.

    Attributes
    ----------
    indptr, indices, last_page_len, head_dim : str
    why_causal : str
        What made the call causal.
    mistake : str
        What was probably forgotten.
    """

    indptr: str
    indices: str
    last_page_len: str
    head_dim: str
    why_causal: str
    mistake: str


_APPENDED = "Were the new keys and values appended to the cache, and counted in"
_OWN_KEYS = "Are the queries' own keys and values in k and v"
PREFILL_NAMES = Names(
    *("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "head_dim_qk"),
    "with causal=True ",
    f"{_APPENDED} paged_kv_indptr and paged_kv_last_page_len?",
)
DECODE_NAMES = Names(
    *("indptr", "indices", "last_page_len", "head_dim", ""),
    f"{_APPENDED} indptr and last_page_len?",
)
RAGGED_NAMES = Names(
    *("kv_indptr", "kv_indptr", "kv_indptr", "head_dim_qk", "with causal=True "),
    f"{_OWN_KEYS}, and counted in kv_indptr?",
)
SINGLE_NAMES = RAGGED_NAMES._replace(mistake=f"{_OWN_KEYS}?")


def check_indptr(indptr: HostIndex, name: str) -> tuple[IntArray, IntArray]:
    """Check an indptr array; a copy of its values, and their differences."""
    if indptr.ndim != 1 or len(indptr) == 0:
        raise ValueError(f"{name} has shape {indptr.shape}, expected (batch + 1,)")
    values = indptr.copy()
    counts = values[1:] - values[:-1]
    # Where 0 comes first and is the lowest, no difference has wrapped around.
    rising = len(counts) == 0 or (values.argmin() == 0 and counts.item(counts.argmin()) >= 0)
    if values.item(0) != 0 or not rising:
        _indptr_error(indptr, name)
    if values.dtype == _INT32:
        return values, counts
    if values.item(-1) > _INT32_MAX:
        raise ValueError(f"{name}[{len(counts)}] = {values[-1]}, expected at most {_INT32_MAX}")
    return values.astype(_INT32), counts.astype(_INT32)


def _indptr_error(indptr: HostIndex, name: str) -> None:
    if indptr[0] != 0:
        raise ValueError(f"{name}[0] = {indptr[0]}, expected 0")
    r = int((indptr[1:] < indptr[:-1]).argmax())
    raise ValueError(
        f"{name}[{r + 1}] = {indptr[r + 1]} (end of request {r}), "
        f"expected at least {indptr[r]} = {name}[{r}]"
    )


def lengths(
    qo_indptr: HostIndex,
    paged_kv_indptr: HostIndex,
    paged_kv_last_page_len: HostIndex,
    spec: AttentionSpec,
) -> Lengths:
    """Check the arrays that say how long each request is.

    Parameters
    ----------
    qo_indptr, paged_kv_indptr : int32 or int64 [batch + 1], on the host
    paged_kv_last_page_len : int32 or int64 [batch], on the host

    Raises
    ------
    ValueError
        Names the array, the request, what was expected and what came.
    """
    qo, qo_len = check_indptr(qo_indptr, "qo_indptr")
    kv, pages = check_indptr(paged_kv_indptr, "paged_kv_indptr")
    if len(qo) != len(kv):
        raise ValueError(
            f"paged_kv_indptr has {count_entries(len(kv))}, expected {len(qo)} = batch + 1: "
            f"qo_indptr has {count_entries(len(qo))}"
        )
    _check_num_rows(qo, spec)
    kv_len = _kv_len(kv, pages, paged_kv_last_page_len, spec, PREFILL_NAMES, "qo_indptr")
    return Lengths(qo, kv, qo_len, kv_len)


def ragged_lengths(
    qo_indptr: HostIndex, kv_begin: HostIndex, kv_len: HostIndex, spec: AttentionSpec
) -> tuple[Lengths, int]:
    """Check the lengths of requests whose keys lie in rows, anywhere.

    Parameters
    ----------
    qo_indptr : int32 or int64 [batch + 1], on the host
    kv_begin, kv_len : int32 or int64 [batch], on the host
        Each request's first row of K and V, and its rows.

    Returns
    -------
    lengths : Lengths
        One page a request, which holds all of its keys.
    num_rows : int
        Rows that K and V need.
    """
    qo, qo_len = check_indptr(qo_indptr, "qo_indptr")
    batch = len(qo_len)
    _check_num_rows(qo, spec)
    for name, values in (("kv_begin", kv_begin), ("kv_len", kv_len)):
        if values.shape != (batch,):
            raise ValueError(
                f"{name} has shape {values.shape}, expected ({batch},): qo_indptr has "
                f"{count_entries(batch + 1)}"
            )
        low = values < 0
        if low.any():
            r = int(low.argmax())
            raise ValueError(f"{name}[{r}] = {values[r]}, expected at least 0")
    if batch and kv_len[kv_len.argmax()] > _MAX_KEYS:
        r = int(kv_len.argmax())
        raise ValueError(f"request {r} has {kv_len[r]} keys, expected at most {_MAX_KEYS}")
    ends = kv_begin.astype(np.int64) + kv_len
    num_rows = int(ends.max(initial=0, where=kv_len > 0))
    if num_rows > _INT32_MAX:
        raise ValueError(f"kv_begin + kv_len = {num_rows}, expected at most {_INT32_MAX}")
    pages, _ = _equal_lengths(batch, 1)
    return Lengths(qo, pages, qo_len, kv_len.astype(np.int32)), num_rows


def _check_num_rows(qo: IntArray, spec: AttentionSpec) -> None:
    if qo.item(-1) * spec.num_qo_heads > _MAX_ROWS:
        raise ValueError(
            f"qo_indptr[{len(qo) - 1}] = {qo[-1]} query rows of {spec.num_qo_heads} heads, "
            f"expected at most {_MAX_ROWS} rows times heads in a call"
        )


def decode_lengths(
    indptr: HostIndex, last_page_len: HostIndex, q_len_per_req: int, spec: AttentionSpec
) -> Lengths:
    """As `lengths()`, of requests with `q_len_per_req` query rows each."""
    kv, pages = check_indptr(indptr, "indptr")
    batch = len(pages)
    if batch * q_len_per_req * spec.num_qo_heads > _MAX_ROWS:
        raise ValueError(
            f"indptr has {count_entries(batch + 1)}, {batch} requests of q_len_per_req = "
            f"{q_len_per_req} rows of {spec.num_qo_heads} heads, "
            f"expected at most {_MAX_ROWS} rows times heads in a call"
        )
    kv_len = _kv_len(kv, pages, last_page_len, spec, DECODE_NAMES, "indptr")
    qo, qo_len = _equal_lengths(batch, q_len_per_req)
    return Lengths(qo, kv, qo_len, kv_len)


def _kv_len(
    kv: IntArray,
    pages: IntArray,
    last: HostIndex,
    spec: AttentionSpec,
    names: Names,
    counted_by: str,
) -> IntArray:
    """Keys of each request, out of its pages and the tokens of its last one, checked."""
    page_size, batch = spec.page_size, len(pages)
    if last.shape != (batch,):
        raise ValueError(
            f"{names.last_page_len} has shape {last.shape}, "
            f"expected ({batch},): {counted_by} has {count_entries(batch + 1)}"
        )
    if batch == 0:
        return pages
    if last.item(last.argmin()) < 1 or last.item(last.argmax()) > page_size:
        # A request without pages may say 0; its length is ignored.
        lowest = pages > 0
        wrong = (last < lowest) | (last > page_size)
        if wrong.any():
            r = int(wrong.argmax())
            raise ValueError(
                f"{names.last_page_len}[{r}] = {last[r]}, "
                f"expected {int(lowest[r])}..{page_size} (page_size={page_size})"
            )
    if kv.item(-1) * page_size > _MAX_KEYS:  # else no request has that many
        r = int(pages.argmax())
        if int(pages[r]) * page_size > _MAX_KEYS:
            raise ValueError(
                f"{names.indptr}: request {r} has {pages[r]} pages of {page_size} tokens, "
                f"expected at most {_MAX_KEYS} tokens"
            )
    kv_len: IntArray = (pages - int32(1)) * int32(page_size)
    kv_len += last
    # Without pages that makes no more than 0.
    np.maximum(kv_len, int32(0), out=kv_len)
    return kv_len


@lru_cache(maxsize=64)
def _equal_lengths(batch: int, length: int) -> tuple[IntArray, IntArray]:
    """The indptr array of requests of one length, and their lengths."""
    indptr = np.arange(0, (batch + 1) * length, length, dtype=np.int32)
    lengths = np.full(batch, length, np.int32)
    indptr.flags.writeable = lengths.flags.writeable = False  # many plans share them
    return indptr, lengths


def page_indices(indices: HostIndex, lengths: Lengths, names: Names) -> tuple[IntArray, int]:
    """Check the page table as far as it can be without the cache.

    Returns
    -------
    indices : int32 [paged_kv_indptr[-1]]
        A copy.
    highest : int
        The highest page number, -1 where there is none.
    """
    needed = lengths.paged_kv_indptr.item(-1)
    if indices.ndim != 1:
        raise ValueError(f"{names.indices} has shape {indices.shape}, expected one axis")
    if len(indices) < needed:
        raise ValueError(
            f"{names.indices} has {count_entries(len(indices))}, "
            f"expected at least {needed} = {names.indptr}[-1]"
        )
    if needed == 0:
        return np.empty(0, np.int32), -1
    indices = indices[:needed]
    # As unsigned numbers, negative ones are the highest of all.
    unsigned = indices.view(_UNSIGNED[indices.dtype])
    highest = unsigned.item(unsigned.argmax())
    if highest > _INT32_MAX:
        if np.minimum.reduce(indices) < 0:
            i = int((indices < 0).argmax())
            raise ValueError(f"{_page(indices, i, lengths, names)}, expected at least 0")
        i = int(indices.argmax())
        raise ValueError(f"{_page(indices, i, lengths, names)}, expected at most {_INT32_MAX}")
    return indices.astype(np.int32), highest


def page_range(
    indices: HostIndex, highest: int, lengths: Lengths, num_pages: int, names: Names
) -> None:
    """Check the page table against a cache of `num_pages` pages."""
    if highest >= num_pages:
        i = int((indices >= num_pages).argmax())
        expected = f"0..{num_pages - 1}" if num_pages else "none"
        raise ValueError(
            f"{_page(indices, i, lengths, names)}, expected {expected}: "
            f"the cache holds {num_pages} pages"
        )


def warn_of_too_few_keys(spec: AttentionSpec, lengths: Lengths, names: Names) -> None:
    """Warn of rows that causality leaves no key."""
    if not spec.causal:
        return
    short = lengths.qo_len > lengths.kv_len
    count = np.count_nonzero(short)
    if count:
        r = int(short.argmax())
        qo_len, kv_len = int(lengths.qo_len[r]), int(lengths.kv_len[r])
        warn(
            f"request {r} has {qo_len} queries and {kv_len} keys{and_others(count - 1)}: "
            f"{names.why_causal}its first {qo_len - kv_len} rows see no key, and will be 0. "
            f"{names.mistake}"
        )


def warn_of_repeated_pages(lengths: Lengths, indices: IntArray, highest: int, names: Names) -> None:
    """Warn of requests that have a page twice."""
    if len(indices) < 2:
        return
    # The cheap question first: does any page occur twice in the batch at all?
    if not any_repeats(indices, highest):
        return
    pages = np.diff(lengths.paged_kv_indptr)
    request = np.arange(len(pages)).repeat(pages)
    keys = request * (highest + 1) + indices
    order = np.argsort(keys, kind="stable")
    repeats = np.flatnonzero(np.diff(keys[order]) == 0)
    if len(repeats) == 0:
        return
    first, again = int(order[repeats[0]]), int(order[repeats[0] + 1])
    r = int(request[first])
    others = len(np.unique(request[order[repeats]])) - 1
    begin = int(lengths.paged_kv_indptr[r])
    warn(
        f"request {r} has page {indices[first]} twice, as its pages {first - begin} and "
        f"{again - begin}{and_others(others)}: its keys will be attended to twice. Was another "
        f"page meant in {names.indices}?"
    )


def any_repeats(pages: IntArray, highest: int) -> bool:
    """Whether a page number, of 0 to `highest`, is there more than once."""
    if highest >= _FLAGS_PER_ENTRY * len(pages):
        ascending = np.sort(pages)
        return bool((ascending[1:] == ascending[:-1]).any())
    seen = np.zeros(highest + 1, np.bool_)
    for begin in range(0, len(pages), _BLOCK):  # small enough to stay in the cache
        seen[pages[begin : begin + _BLOCK].astype(np.intp)] = True
    return bool(np.count_nonzero(seen) < len(pages))


def _page(indices: HostIndex, i: int, lengths: Lengths, names: Names) -> str:
    r = int(np.searchsorted(lengths.paged_kv_indptr, i, side="right")) - 1
    place = i - int(lengths.paged_kv_indptr[r])
    return f"{names.indices}[{i}] = {indices[i]} (request {r}, its page {place})"


def and_others(count: int) -> str:
    return f" (and {count} more requests like it)" if count else ""


def count_entries(count: int) -> str:
    """A count of entries in words."""
    return f"{count} entry" if count == 1 else f"{count} entries"
