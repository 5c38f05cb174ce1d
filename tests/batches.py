"""Random batches: ragged lengths, permuted pages, and NaN wherever nothing may be read.

Every tensor is a view of a larger, contiguous storage. `Batch.on` moves the storages with a
function that makes arrays of another kind, and takes the same views of them, so that a batch runs
with NumPy, CuPy or another framework, strides and all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import oracle
from formula import Formula, visible

Array = np.ndarray[Any, Any]

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

#: What K and V may be beside q's dtype.
FLOAT8_DTYPES = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}

#: Widths of q's and K's heads that there are kernels for, and V's where it is another one.
HEAD_DIMS = (64, 96, 128, 192, 256)
VALUE_DIMS = {192: 128}

#: How q and out may lie in memory: on their own; the first heads of a projection that holds K and
#: V too; with odd row lengths; one element off every boundary.
Q_FORMS = ("contiguous", "fused", "odd", "offset")

#: How the cache may lie: K and V apart, apart with strides of their own, or in one array.
CACHE_FORMS = ("tuple", "strided", "stacked")


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a view of its storage."""

    storage: Any
    index: tuple[Any, ...] = ()

    @property
    def array(self) -> Any:
        return self.storage[self.index]

    def on(self, asarray: Callable[[Array], Any]) -> View:
        return replace(self, storage=asarray(self.storage))

    def outside(self) -> Array:
        """The storage's elements that the view does not show, of a storage on the host."""
        shown = np.zeros(self.storage.shape, np.bool_)
        shown[self.index] = True
        return self.storage[~shown]


def rows_view(form: str, rows: int, heads: int, head_dim: int, dtype: np.dtype[Any]) -> View:
    """A tensor [rows, heads, head_dim] in one of `Q_FORMS`, all NaN."""
    padding = {"contiguous": (0, 0), "fused": (5, 0), "odd": (0, 1), "offset": (1, 8)}
    more_heads, more_dim = padding[form]
    storage = np.full((rows, heads + more_heads, head_dim + more_dim), np.nan, dtype)
    begin = 1 if form == "offset" else 0
    return View(storage, (slice(None), slice(heads), slice(begin, begin + head_dim)))


@dataclass(frozen=True, slots=True)
class Batch:
    """A planned call's arrays.

    Attributes
    ----------
    qo_len, kv_len : tuple of int
    pages : tuple of tuple of int
        Page numbers of each request.
    page_size, num_qo_heads, num_kv_heads, head_dim, head_dim_vo : int
    dtype, kv_dtype, kv_layout : str
    stacked : bool
    q_view : View
        [nnz_qo, num_qo_heads, head_dim]
    cache_views : tuple of View
        One view if stacked, else two.
    index_dtype : type
        Of the index arrays.
    """

    qo_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    page_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_vo: int
    dtype: str
    kv_dtype: str
    kv_layout: str
    stacked: bool
    q_view: View
    cache_views: tuple[View, ...]
    index_dtype: Any = np.int32

    @property
    def nnz_qo(self) -> int:
        return sum(self.qo_len)

    @property
    def qo_indptr(self) -> Array:
        return np.cumsum([0, *self.qo_len]).astype(self.index_dtype)

    @property
    def paged_kv_indptr(self) -> Array:
        return np.cumsum([0, *map(len, self.pages)]).astype(self.index_dtype)

    @property
    def paged_kv_indices(self) -> Array:
        return np.array([page for pages in self.pages for page in pages], self.index_dtype)

    @property
    def paged_kv_last_page_len(self) -> Array:
        last = [n - (-(-n // self.page_size) - 1) * self.page_size if n else 0 for n in self.kv_len]
        return np.array(last, self.index_dtype)

    @property
    def index_arrays(self) -> tuple[Array, Array, Array, Array]:
        return (
            self.qo_indptr,
            self.paged_kv_indptr,
            self.paged_kv_indices,
            self.paged_kv_last_page_len,
        )

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        return self.num_qo_heads, self.num_kv_heads, self.head_dim, self.page_size

    @property
    def q(self) -> Any:
        return self.q_view.array

    @property
    def cache(self) -> Any:
        """As `run()` takes it."""
        views = tuple(view.array for view in self.cache_views)
        return views[0] if self.stacked else views

    @property
    def cost(self) -> int:
        """Pairs of a query head row and a key."""
        return self.num_qo_heads * sum(a * b for a, b in zip(self.qo_len, self.kv_len, strict=True))

    def on(self, asarray: Callable[[Array], Any]) -> Batch:
        """The same batch with its tensors made by another array module."""
        return replace(
            self,
            q_view=self.q_view.on(asarray),
            cache_views=tuple(view.on(asarray) for view in self.cache_views),
        )

    def plan(self, wrapper: Any, **options: Any) -> None:
        """Plan the batch, from index arrays on the host."""
        if self.head_dim_vo != self.head_dim:
            options["head_dim_vo"] = self.head_dim_vo
        if self.kv_dtype != self.dtype:
            options["kv_data_type"] = self.kv_dtype
        wrapper.plan(*self.index_arrays, *self.geometry, q_data_type=self.dtype, **options)

    def keys_and_values(self) -> tuple[Any, Any]:
        """K's and V's pages, in `kv_layout`."""
        if self.stacked:
            return self.cache[:, 0], self.cache[:, 1]
        k, v = self.cache
        return k, v

    def gathered(self, r: int) -> tuple[Array, Array, Array]:
        """Request `r`'s q [qo_len, ...], and its keys and values [kv_len, ...], on the host."""
        begin = sum(self.qo_len[:r])
        k, v = (
            oracle.gather(x, self.kv_layout, self.pages[r], self.kv_len[r], self.page_size)
            for x in self.keys_and_values()
        )
        return self.q[begin : begin + self.qo_len[r]], k, v

    def slot(self, r: int, key: int) -> tuple[Any, ...]:
        """Index of a key of a request in K's or V's pages: [num_kv_heads, head_dim] lie there."""
        page, place = self.pages[r][key // self.page_size], key % self.page_size
        return (page, place) if self.kv_layout == "NHD" else (page, slice(None), place)

    def with_hidden_keys(self, formula: Formula, value: float = np.nan) -> Batch:
        """The same batch with `value` as K and V of all slots but of keys that some row sees."""
        seen = np.zeros((len(self.cache_views[0].array), self.page_size), np.bool_)
        for r, (qo_len, kv_len) in enumerate(zip(self.qo_len, self.kv_len, strict=True)):
            mask = None if formula.custom_mask is None else formula.custom_mask[r]
            by_row = visible(qo_len, kv_len, formula.causal, formula.window_left, mask)
            index, place = np.divmod(np.arange(kv_len), self.page_size)
            page = np.array(self.pages[r], np.int64)[index]
            by_any = by_row.any(axis=0)
            seen[page[by_any], place[by_any]] = True
        batch = replace(self, cache_views=tuple(view.on(np.copy) for view in self.cache_views))
        for x in batch.keys_and_values():
            by_slot = x if self.kv_layout == "NHD" else x.swapaxes(1, 2)
            by_slot[~seen] = value
        return batch

    def alone(self, r: int) -> Batch:
        """Request `r` as a batch of its own, with the same cache."""
        begin = sum(self.qo_len[:r])
        q = np.ascontiguousarray(self.q[begin : begin + self.qo_len[r]])
        return replace(
            self,
            qo_len=(self.qo_len[r],),
            kv_len=(self.kv_len[r],),
            pages=(self.pages[r],),
            q_view=View(q, (slice(None),)),
        )

    def poisoned_out(self, form: str = "contiguous") -> View:
        """An `out`, all NaN."""
        dtype = DTYPES[self.dtype]
        return rows_view(form, self.nnz_qo, self.num_qo_heads, self.head_dim_vo, dtype)

    def poisoned_lse(self, strided: bool = False) -> View:
        """An `lse`, all NaN."""
        shape = (self.nnz_qo, self.num_qo_heads * (2 if strided else 1))
        return View(
            np.full(shape, np.nan, np.float32),
            (slice(None), slice(None, None, 2 if strided else 1)),
        )


def _cache_views(
    form: str, shape: tuple[int, ...], head_dim_vo: int, dtype: np.dtype[Any], kv_layout: str
) -> tuple[View, ...]:
    """A cache of NaN; `shape` is K's, [num_pages, page_size, num_kv_heads, head_dim]."""
    num_pages, page_size, heads, head_dim = shape
    inner = (page_size, heads) if kv_layout == "NHD" else (heads, page_size)

    def nan(*axes: int) -> Array:
        return np.full(axes, np.nan, dtype)

    if form == "stacked":
        assert head_dim == head_dim_vo
        return (View(nan(num_pages, 2, *inner, head_dim), (slice(None),)),)
    if form == "tuple":
        dims = head_dim, head_dim_vo
        return tuple(View(nan(num_pages, *inner, dim), (slice(None),)) for dim in dims)
    pad = 16 // dtype.itemsize  # rows stay aligned to 16 bytes
    k = nan(num_pages, inner[0] + 1, inner[1], head_dim)
    v = nan(num_pages + 2, inner[0], inner[1] + 2, head_dim_vo + pad)
    return (
        View(k, (slice(None), slice(inner[0]))),
        View(v, (slice(2, None), slice(None), slice(1, 1 + inner[1]), slice(pad, None))),
    )


def build(
    rng: np.random.Generator,
    qo_len: Sequence[int],
    kv_len: Sequence[int],
    *,
    page_size: int = 16,
    num_kv_heads: int = 2,
    group: int = 1,
    head_dim: int = 64,
    head_dim_vo: int | None = None,
    dtype: str = "float16",
    kv_dtype: str | None = None,
    kv_layout: str = "NHD",
    cache_form: str = "tuple",
    q_form: str = "contiguous",
    spare_pages: int = 3,
    shared_pages: int = 0,
    magnitude: float = 1.0,
    index_dtype: Any = np.int32,
) -> Batch:
    """A random batch.

    Parameters
    ----------
    qo_len, kv_len : sequence of int
    group : int
        Query heads of a KV head.
    head_dim_vo, kv_dtype
        `dtype` where not given, and what goes with `head_dim`: see `VALUE_DIMS`.
    cache_form, q_form : str
        Of `CACHE_FORMS` and `Q_FORMS`.
    spare_pages : int
        Pages that no request names; all NaN, as are the unused slots of the others.
    shared_pages : int
        So many of every request's first pages are the same, where it has more than that.
    magnitude : float
        Of q; the larger, the fewer keys a row attends to.
    """
    needed = [-(-n // page_size) for n in kv_len]
    shared = [shared_pages if n > shared_pages else 0 for n in needed]
    count = sum(n - s for n, s in zip(needed, shared, strict=True)) + max(shared, default=0)
    numbers = [int(p) for p in rng.permutation(count + spare_pages)]
    common, rest = numbers[: max(shared, default=0)], iter(numbers[max(shared, default=0) :])
    pages = tuple(
        (*common[:s], *(next(rest) for _ in range(n - s)))
        for n, s in zip(needed, shared, strict=True)
    )
    element = DTYPES[dtype]
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    kv_element = {**DTYPES, **FLOAT8_DTYPES}[kv_dtype]
    head_dim_vo = head_dim_vo or VALUE_DIMS.get(head_dim, head_dim)
    shape = (count + spare_pages, page_size, num_kv_heads, head_dim)
    batch = Batch(
        qo_len=tuple(qo_len),
        kv_len=tuple(kv_len),
        pages=pages,
        page_size=page_size,
        num_qo_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_vo=head_dim_vo,
        dtype=dtype,
        kv_dtype=kv_dtype,
        kv_layout=kv_layout,
        stacked=cache_form == "stacked",
        q_view=rows_view(q_form, sum(qo_len), num_kv_heads * group, head_dim, element),
        cache_views=_cache_views(cache_form, shape, head_dim_vo, kv_element, kv_layout),
        index_dtype=index_dtype,
    )
    batch.q[...] = (rng.standard_normal(batch.q.shape) * magnitude).astype(element)
    for r, length in enumerate(batch.kv_len):
        for page, begin in zip(pages[r], range(0, length, page_size), strict=True):
            used = min(page_size, length - begin)
            for x in batch.keys_and_values():
                tokens = x[page] if kv_layout == "NHD" else x[page].swapaxes(0, 1)
                drawn = rng.standard_normal((used, num_kv_heads, x.shape[-1]))
                tokens[:used] = drawn.astype(kv_element)
    return batch
