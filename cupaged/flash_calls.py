"""What FlashAttention's functions take: checked, and read."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged import arrays, bands, door, positions, validate, validate_lengths, validate_run
from cupaged.door import Append, Batch, Index, Pages, Rows
from cupaged.dtypes import dtype_name

Array = Any  # a numpy.ndarray or a cupy.ndarray
IntArray = npt.NDArray[np.int64]
Window = tuple[int | None, int | None]

#: Slopes that someone computed in float32 differ from the library's in their last bits.
_SAME_SLOPES = 2.0**-20


class Lengths:
    """The arrays of a call that say something about its lengths.

    Parameters
    ----------
    table : Index, optional
    alibi_slopes : array, optional
    given : dict
        Arrays by their names, None where there is none.

    Attributes
    ----------
    key : Hashable
        Differs where the values may differ, for as long as `owners` are kept.
    owners : tuple
    """

    def __init__(self, table: Index | None, alibi_slopes: Any, given: dict[str, Any]) -> None:
        self.table = table
        self.slopes = None
        if alibi_slopes is not None:
            self.slopes = Index(alibi_slopes, "alibi_slopes", _read_slopes)
        self._indices = {name: Index(x, name) for name, x in given.items() if x is not None}
        every = (self.table, self.slopes, *(self._indices.get(name) for name in given))
        self.key: Hashable = tuple(None if index is None else index.key for index in every)
        self.owners = tuple(index.x for index in every if index is not None)

    def get(self, name: str) -> Index | None:
        """An array by its name, None where there is none."""
        return self._indices.get(name)

    def __getitem__(self, name: str) -> Index:
        return self._indices[name]


class VarlenSizes(NamedTuple):
    """What else the lengths of `flash_attn_varlen_func()` depend on.

    Attributes
    ----------
    q : (int, int)
        total_q and num_heads.
    k : tuple of int
        total_k, or num_pages and page_size.
    max_seqlen_q, max_seqlen_k : int, optional
    window : Window
    """

    q: tuple[int, int]
    k: tuple[int, ...]
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    window: Window


class CacheSizes(NamedTuple):
    """What else the lengths of `flash_attn_with_kvcache()` depend on.

    Attributes
    ----------
    q : (int, int, int)
        batch, seqlen_q and num_heads.
    cache : (int, int)
        batch_cache and seqlen_cache, or num_pages and page_size.
    seqlen : int, optional
        Tokens in the cache, where it is one number; -1 for all that there is room for.
    seqlen_new : int
    flat : bool
        What `cache` counts first lies behind one another: all is rows at the same distance.
    window : Window
    """

    q: tuple[int, int, int]
    cache: tuple[int, int]
    seqlen: int | None
    seqlen_new: int
    flat: bool
    window: Window


def varlen_batch(sizes: VarlenSizes, lengths: Lengths) -> Batch:
    """The batch of `flash_attn_varlen_func()`, checked."""
    total_q, num_heads = sizes.q
    table = lengths.table
    _, qo_len = row_lengths(lengths["cu_seqlens_q"])
    batch = len(qo_len)
    if qo_len.sum() != total_q:
        raise ValueError(f"q has {total_q} rows, expected {qo_len.sum()} = cu_seqlens_q[-1]")
    kv_begin, room = np.zeros(batch, np.int64), None
    cu_seqlens_k, seqused_k = lengths.get("cu_seqlens_k"), lengths.get("seqused_k")
    if cu_seqlens_k is not None:
        kv_begin, room = row_lengths(cu_seqlens_k)
        if len(room) != batch:
            raise ValueError(
                f"cu_seqlens_k has {len(room) + 1} entries, "
                f"expected {batch + 1} as cu_seqlens_q has"
            )
        if table is None and room.sum() > sizes.k[0]:
            raise ValueError(
                f"k has {sizes.k[0]} rows, expected at least {room.sum()} = cu_seqlens_k[-1]"
            )
    if seqused_k is not None:
        kv_len = of_requests(seqused_k, batch)
        if room is not None:
            check_most("seqused_k", kv_len, room, "the request's rows in cu_seqlens_k")
    else:
        assert room is not None  # the call has one of the two
        kv_len = room
    check_longest("max_seqlen_q", sizes.max_seqlen_q, qo_len)
    check_longest("max_seqlen_k", sizes.max_seqlen_k, kv_len)
    check_slopes(lengths.slopes, num_heads, qo_len, sizes.window)
    band = bands.bottom_right(qo_len, kv_len, *sizes.window)
    if table is None:
        return Batch(band, Rows(kv_begin))
    pages = Pages(page_table(table, batch), np.zeros(batch, np.int64), sizes.k[1], table.name)
    return Batch(band, pages)


def cache_batch(sizes: CacheSizes, lengths: Lengths) -> Batch:
    """The batch of `flash_attn_with_kvcache()`, checked."""
    batch, seqlen_q, num_heads = sizes.q
    num_caches, page_size = sizes.cache
    name, numbers = "cache_batch_idx", np.arange(batch)[:, None]
    if lengths.table is not None:
        name, numbers = lengths.table.name, page_table(lengths.table, batch)
    elif lengths.get(name) is not None:
        numbers = of_requests(lengths[name], batch)[:, None]
        over = numbers[:, 0] >= num_caches
        if over.any():
            r = int(over.argmax())
            raise ValueError(
                f"{name}[{r}] = {numbers[r, 0]}, expected 0..{num_caches - 1}: "
                f"k_cache has {num_caches} rows"
            )
    elif batch > num_caches:
        raise ValueError(f"k_cache has {num_caches} rows, expected at least {batch} as q has")
    room = numbers.shape[1] * page_size
    if sizes.seqlen is None:
        kv_len = of_requests(lengths["cache_seqlens"], batch)
    else:
        kv_len = np.full(batch, room if sizes.seqlen < 0 else sizes.seqlen)
    check_most("cache_seqlens", kv_len, np.full(batch, room - sizes.seqlen_new), "so much fits")
    kv_len = kv_len + sizes.seqlen_new
    begin = np.zeros(batch, np.int64)
    if lengths.get("cache_leftpad") is not None:
        begin = of_requests(lengths["cache_leftpad"], batch)
        check_most("cache_leftpad", begin, kv_len, "the request's tokens")
    qo_len = np.full(batch, seqlen_q)
    check_slopes(lengths.slopes, num_heads, qo_len, sizes.window)
    append = _append(
        Pages(numbers, np.zeros_like(begin), page_size, name), kv_len, sizes.seqlen_new
    )
    band = bands.bottom_right(qo_len, kv_len - begin, *sizes.window)
    if sizes.flat and lengths.table is None:
        return Batch(band, Rows(numbers[:, 0] * page_size + begin), append)
    if not sizes.flat and (begin % page_size).any():
        raise NotImplementedError(
            "cache_leftpad inside of a page is not served where k_cache's or v_cache's pages do "
            "not lie behind one another"
        )
    return Batch(band, Pages(numbers, begin, page_size, name), append)


def imported(q: Any, k: Any, v: Any, names: tuple[str, str]) -> tuple[Array, Array, Array]:
    k_name, v_name = names
    return (
        arrays.import_tensor(q, "q"),
        arrays.import_tensor(k, k_name, q),
        arrays.import_tensor(v, v_name, q),
    )


def check_axes(x: Array, name: str, axes: tuple[str, ...]) -> None:
    if x.ndim != len(axes):
        raise ValueError(f"{name} has shape {x.shape}, expected ({', '.join(axes)})")


def window(window_size: Any, causal: Any) -> Window:
    """How many keys before and behind the diagonal a row sees; None for all."""
    sizes = window_size if isinstance(window_size, (tuple, list)) else ()
    if len(sizes) != 2 or any(
        isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in sizes
    ):
        raise TypeError(f"window_size = {window_size!r}, expected two ints")
    left, right = (None if n < 0 else int(n) for n in sizes)
    return left, 0 if validate.flag(causal, "causal") else right


def one_length(cache_seqlens: Any) -> int | None:
    """`cache_seqlens` where it is one number, -1 where there is none; None where it is an array."""
    if cache_seqlens is None:
        return -1
    if not isinstance(cache_seqlens, (int, np.integer)) or isinstance(cache_seqlens, bool):
        return None
    if cache_seqlens < 0:
        raise ValueError(f"cache_seqlens = {cache_seqlens}, expected at least 0")
    return int(cache_seqlens)


def longest(value: Any, name: str) -> int | None:
    """The length that no request exceeds, None where none is said."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {validate.what(value)}, expected an int")
    return int(value)


def one_split(num_splits: Any) -> bool:
    """Whether keys are never split."""
    if isinstance(num_splits, bool) or not isinstance(num_splits, (int, np.integer)):
        raise TypeError(f"num_splits is {validate.what(num_splits)}, expected an int")
    if num_splits not in (0, 1):
        raise NotImplementedError(f"num_splits = {num_splits}, served are 0 and 1")
    return bool(num_splits == 1)


def one_table(block_table: Any, page_table: Any) -> Index | None:
    if block_table is not None and page_table is not None:
        raise ValueError("block_table and page_table exclude each other: they are two names")
    if page_table is not None:
        return Index(page_table, "page_table")
    return None if block_table is None else Index(block_table, "block_table")


def _read_slopes(x: Any, name: str) -> npt.NDArray[Any]:
    array = arrays.import_tensor(x, name)
    device = arrays.device_id(array)
    if device is not None:
        current, _ = arrays.on_stream_of(x, device)
        with current:
            array = array.get()
    if array.dtype != np.float32:
        raise TypeError(f"{name} is {array.dtype}, expected float32")
    return np.asarray(array)


def check_slopes(slopes: Index | None, num_heads: int, qo_len: IntArray, window: Window) -> None:
    """Refuse slopes and masks for which the library's ALiBi is not FlashAttention's."""
    if slopes is None:
        return
    values = slopes.values
    if values.shape not in ((num_heads,), (len(qo_len), num_heads)):
        raise ValueError(
            f"alibi_slopes has shape {values.shape}, expected ({num_heads},) or "
            f"({len(qo_len)}, {num_heads})"
        )
    if not np.allclose(values, positions.alibi_slopes(num_heads), rtol=_SAME_SLOPES, atol=0):
        raise NotImplementedError(
            f"alibi_slopes are others than those of Press et al. for {num_heads} heads, "
            "which alone are served"
        )
    if window[1] != 0 and qo_len.max(initial=0) > 1:
        # FlashAttention takes the distance's magnitude, the library its sign.
        raise NotImplementedError(
            "alibi_slopes with causal=False and several queries a request: keys behind a row's own "
            "have another bias, which no backend serves"
        )


def call(
    q: Array,
    k: Array,
    v: Array,
    softmax_scale: Any,
    softcap: Any,
    lengths: Lengths,
    names: tuple[str, str],
    disable_split_kv: bool = False,
) -> door.Call:
    """The call that the arrays make, checked against each other; `names` are K's and V's."""
    k_name, v_name = names
    if lengths.table is not None and not k.shape[1]:
        raise ValueError(f"{k_name} has shape {k.shape}, expected a page_size of at least 1")
    if v.dtype != k.dtype:
        raise TypeError(f"{v_name} is {v.dtype}, expected {k.dtype} as {k_name} is")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{v_name} has shape {v.shape}, expected {k.shape[:-1]} and head_dim: "
            f"{k_name}'s is {k.shape}"
        )
    validate_run.check_last_axis(q, "q")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{k_name} has head_dim {k.shape[-1]}, expected {q.shape[-1]} as q has")
    return door.Call(
        *(q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]),
        *(dtype_name(q.dtype, "q's dtype"), dtype_name(k.dtype, f"{k_name}'s dtype")),
        sm_scale=None if softmax_scale is None else validate.factor(softmax_scale, "softmax_scale"),
        logits_soft_cap=validate.factor(softcap, "softcap"),
        pos_encoding_mode="NONE" if lengths.slopes is None else "ALIBI",
        disable_split_kv=disable_split_kv,
    )


def row_lengths(cu_seqlens: Index) -> tuple[IntArray, IntArray]:
    """Where each request begins, and its rows."""
    indptr, counts = validate_lengths.check_indptr(cu_seqlens.values, cu_seqlens.name)
    return indptr[:-1].astype(np.int64), counts.astype(np.int64)


def of_requests(index: Index, batch: int) -> IntArray:
    """A number at least 0 for each request."""
    values = index.values
    if values.shape != (batch,):
        raise ValueError(f"{index.name} has shape {values.shape}, expected ({batch},)")
    if len(values) and values.min() < 0:
        r = int(values.argmin())
        raise ValueError(f"{index.name}[{r}] = {values[r]}, expected at least 0")
    return values.astype(np.int64)


def page_table(index: Index, batch: int) -> npt.NDArray[Any]:
    values = index.values
    if values.ndim != 2 or len(values) != batch:
        raise ValueError(f"{index.name} has shape {values.shape}, expected ({batch}, pages)")
    return values


def check_most(name: str, values: IntArray, most: IntArray, why: str) -> None:
    over = values > most
    if over.any():
        r = int(over.argmax())
        raise ValueError(f"{name}[{r}] = {values[r]}, expected at most {most[r]}: {why}")


def check_longest(name: str, given: int | None, lengths: IntArray) -> None:
    if given is not None and lengths.max(initial=0) > given:
        r = int(lengths.argmax())
        raise ValueError(
            f"{name} = {given}, expected at least {lengths[r]}: request {r} is as long"
        )


def is_flat(x: Array) -> bool:
    """Whether each batch's rows lie behind the last one's, at the same distance."""
    flat: bool = len(x) <= 1 or not x.size or x.strides[0] == x.shape[1] * x.strides[1]
    return flat


def new_tokens(
    q: Any, k: Any, v: Any, batch: int, keys: Array, values: Array
) -> tuple[Array, Array] | None:
    """New keys and values, imported and checked; or None."""
    if k is None and v is None:
        return None
    if k is None or v is None:
        raise ValueError(f"{'k' if k is None else 'v'} is None, expected both k and v, or neither")
    found = []
    for x, name, cache in ((k, "k", keys), (v, "v", values)):
        array = arrays.import_tensor(x, name, q)
        expected = (batch, "seqlen_new", *cache.shape[2:])
        if array.ndim != 4 or (array.shape[0], *array.shape[2:]) != (batch, *cache.shape[2:]):
            words = ", ".join(map(str, expected))
            raise ValueError(f"{name} has shape {array.shape}, expected ({words})")
        if array.dtype != cache.dtype:
            raise TypeError(f"{name} is {array.dtype}, expected {cache.dtype} as {name}_cache is")
        validate_run.check_last_axis(array, name)
        found.append(array)
    if found[0].shape[1] != found[1].shape[1]:
        raise ValueError(f"v has {found[1].shape[1]} tokens, expected {found[0].shape[1]} as k has")
    return found[0], found[1]


def _append(pages: Pages, kv_len: IntArray, seqlen_new: int) -> Append | None:
    """Where so many new tokens of each request go, which are its last."""
    if not seqlen_new:
        return None
    counts, last_page_len = door.page_counts(kv_len, pages.page_size)
    requests = np.arange(len(kv_len)).repeat(seqlen_new)
    places = (kv_len[:, None] - seqlen_new + np.arange(seqlen_new)).reshape(-1)
    numbers = door.page_numbers(pages, pages.page_size, counts)
    return Append(requests, places, numbers, door.starts(counts), last_page_len)
