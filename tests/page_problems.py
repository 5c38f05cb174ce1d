"""Tokens to append to a paged cache, random to the bit, and where a plain loop puts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from cupaged.spec import DTYPES

Array = np.ndarray[Any, Any]

#: How append_key and append_value may lie in memory: on their own; as the middle heads of a
#: projection; in rows of odd length; one element off every boundary; heads first; backwards.
ROW_FORMS = ("contiguous", "fused", "odd", "offset", "heads first", "backwards")

#: How the cache may lie: K and V apart; apart with strides of their own, by multiples of 8
#: elements or by odd ones; in one array; its pages backwards; a layer of many.
CACHE_FORMS = ("tuple", "strided", "odd", "stacked", "backwards", "layer")

#: Of a padding row: whatever it is, it is passed over.
_ANY_POSITION = (-(2**31), -1, 0, 7, 2**31 - 1)


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a view of its storage, with its first two axes swapped or not."""

    storage: Any
    index: tuple[Any, ...] = ()
    swapped: bool = False

    @property
    def array(self) -> Any:
        view = self.storage[self.index]
        return view.swapaxes(0, 1) if self.swapped else view

    def on(self, asarray: Callable[[Array], Any]) -> View:
        return replace(self, storage=asarray(self.storage))


def random_bits(rng: np.random.Generator, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """An array of any bits, NaN of every kind among them."""
    *outer, last = shape
    return rng.integers(0, 256, (*outer, last * dtype.itemsize), np.uint8).view(dtype)


@dataclass(frozen=True, slots=True)
class Problem:
    """An append's arrays.

    Attributes
    ----------
    key_view, value_view : View
        [nnz, num_kv_heads, head_dim]
    cache_views : tuple of View
        One if stacked, else two.
    batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len : array
    page_size : int
    kv_layout : str
    stacked : bool
    """

    key_view: View
    value_view: View
    cache_views: tuple[View, ...]
    batch_indices: Array
    positions: Array
    kv_indices: Array
    kv_indptr: Array
    kv_last_page_len: Array
    page_size: int
    kv_layout: str
    stacked: bool

    @property
    def cache(self) -> Any:
        """As `append_paged_kv_cache()` takes it."""
        views = tuple(view.array for view in self.cache_views)
        return views[0] if self.stacked else views

    @property
    def indices(self) -> dict[str, Array]:
        return {
            name: getattr(self, name)
            for name in (
                "batch_indices",
                "positions",
                "kv_indices",
                "kv_indptr",
                "kv_last_page_len",
            )
        }

    @property
    def storages(self) -> list[Any]:
        """All memory that the cache lies in, and more."""
        return [view.storage for view in self.cache_views]

    def on(
        self,
        asarray: Callable[[Array], Any],
        as_index: Callable[[Array], Any] = lambda array: array,
    ) -> Problem:
        """The same problem with its arrays made by other modules."""
        return replace(
            self,
            key_view=self.key_view.on(asarray),
            value_view=self.value_view.on(asarray),
            cache_views=tuple(view.on(asarray) for view in self.cache_views),
            **{name: as_index(array) for name, array in self.indices.items()},
        )

    def append(self, function: Callable[..., None]) -> None:
        """Call `append_paged_kv_cache()`."""
        function(
            self.key_view.array,
            self.value_view.array,
            self.batch_indices,
            self.positions,
            self.cache,
            self.kv_indices,
            self.kv_indptr,
            self.kv_last_page_len,
            self.kv_layout,
        )

    def solved(self) -> list[Array]:
        """What the storages hold after the append, by a plain loop over copies of them."""
        copies = [view.on(np.copy) for view in self.cache_views]
        views = [view.array for view in copies]
        k, v = (views[0][:, 0], views[0][:, 1]) if self.stacked else views
        key, value = self.key_view.array, self.value_view.array
        for i in range(len(key)):
            request, position = int(self.batch_indices[i]), int(self.positions[i])
            if request == -1:
                continue
            page = int(self.kv_indices[int(self.kv_indptr[request]) + position // self.page_size])
            for token, pages in ((key[i], k), (value[i], v)):
                if self.kv_layout == "NHD":
                    pages[page, position % self.page_size] = token
                else:
                    pages[page, :, position % self.page_size] = token
        return [view.storage for view in copies]


def torch_tensor(torch: Any, device: str) -> Callable[[Array], Any]:
    """What makes a tensor of an array's bits."""

    def tensor(array: Array) -> Any:
        bits = torch.tensor(array.view(f"i{array.itemsize}"), device=device)
        return bits if array.dtype.kind == "i" else bits.view(getattr(torch, str(array.dtype)))

    return tensor


def same_bits(found: Sequence[Array], expected: Sequence[Array]) -> bool:
    return [x.tobytes() for x in found] == [x.tobytes() for x in expected]


def _rows(
    rng: np.random.Generator, form: str, shape: tuple[int, int, int], dtype: np.dtype[Any]
) -> View:
    rows, heads, head_dim = shape
    everything = slice(None)
    if form == "heads first":
        bits = random_bits(rng, (heads, rows, head_dim), dtype)
        return View(bits, swapped=True)
    if form == "backwards":
        return View(random_bits(rng, shape, dtype), (slice(None, None, -1),))
    before, after, more = {
        "contiguous": (0, 0, 0),
        "fused": (2, 3, 0),
        "odd": (0, 0, 1),
        "offset": (0, 0, 8),
    }[form]
    storage = random_bits(rng, (rows, before + heads + after, head_dim + more), dtype)
    begin = 1 if form == "offset" else 0
    return View(
        storage, (everything, slice(before, before + heads), slice(begin, begin + head_dim))
    )


def _caches(
    rng: np.random.Generator,
    form: str,
    num_pages: int,
    inner: tuple[int, int],
    head_dim: int,
    dtype: np.dtype[Any],
) -> tuple[View, ...]:
    def bits(*shape: int) -> Array:
        return random_bits(rng, shape, dtype)

    everything = slice(None)
    one, other = inner
    if form == "stacked":
        return (View(bits(num_pages, 2, one, other, head_dim), (everything,)),)
    if form == "backwards":
        backwards = (slice(None, None, -1),)
        return tuple(View(bits(num_pages, one, other, head_dim), backwards) for _ in range(2))
    if form == "layer":
        return tuple(View(bits(3, num_pages, one, other, head_dim), (i,)) for i in (1, 2))
    more = {"tuple": 0, "strided": 8, "odd": 1}[form]
    if not more:
        return tuple(View(bits(num_pages, one, other, head_dim), (everything,)) for _ in range(2))
    return (
        View(bits(num_pages, one + 1, other, head_dim), (everything, slice(one))),
        View(
            bits(num_pages + 2, one, other + 2, head_dim + more),
            (slice(2, None), everything, slice(1, 1 + other), slice(more, None)),
        ),
    )


def build(
    rng: np.random.Generator,
    kv_len: Sequence[int],
    appended: Sequence[int],
    *,
    padding: int = 0,
    page_size: int = 16,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    dtype: str = "float16",
    kv_layout: str = "NHD",
    row_form: str = "contiguous",
    cache_form: str = "tuple",
    index_dtype: Any = np.int32,
    shuffled: bool = False,
    spare_pages: int = 3,
) -> Problem:
    """A random problem.

    Parameters
    ----------
    kv_len : sequence of int
        Tokens of each request, the appended ones counted.
    appended : sequence of int
        How many of its last tokens are appended.
    padding : int
        Rows that belong to no request; among the others if `shuffled`, else behind them.
    row_form, cache_form : str
        Of `ROW_FORMS` and `CACHE_FORMS`.
    shuffled : bool
        The rows come in any order.
    spare_pages : int
        Pages that no request has.
    """
    element = DTYPES[dtype]
    needed = [-(-n // page_size) for n in kv_len]
    num_pages = sum(needed) + spare_pages
    rows = [
        (r, position)
        for r, (length, new) in enumerate(zip(kv_len, appended, strict=True))
        for position in range(length - new, length)
    ]
    rows += [(-1, int(rng.choice(_ANY_POSITION))) for _ in range(padding)]
    if shuffled:
        rows = [rows[i] for i in rng.permutation(len(rows))]
    batch_indices, positions = np.array(rows, index_dtype).reshape(len(rows), 2).T
    last = [
        n - (pages - 1) * page_size if n else 0 for n, pages in zip(kv_len, needed, strict=True)
    ]
    inner = (page_size, num_kv_heads) if kv_layout == "NHD" else (num_kv_heads, page_size)
    shape = (len(rows), num_kv_heads, head_dim)
    # Entries past the last page may be anything.
    indices = np.concatenate([rng.permutation(num_pages)[: sum(needed)], [-5, 2**31 - 1]])
    return Problem(
        key_view=_rows(rng, row_form, shape, element),
        value_view=_rows(rng, row_form, shape, element),
        cache_views=_caches(rng, cache_form, num_pages, inner, head_dim, element),
        batch_indices=batch_indices.copy(),
        positions=positions.copy(),
        kv_indices=indices.astype(index_dtype),
        kv_indptr=np.cumsum([0, *needed]).astype(index_dtype),
        kv_last_page_len=np.array(last, index_dtype),
        page_size=page_size,
        kv_layout=kv_layout,
        stacked=cache_form == "stacked",
    )


@st.composite
def problems(draw: st.DrawFn, max_len: int = 60) -> Problem:
    """Any problem."""
    kv_len = draw(st.lists(st.integers(0, max_len), max_size=5))
    return build(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        kv_len,
        [draw(st.integers(0, n)) for n in kv_len],
        padding=draw(st.sampled_from([0, 0, 1, 5])),
        page_size=draw(st.one_of(st.sampled_from([1, 16]), st.integers(1, 20))),
        num_kv_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.one_of(st.sampled_from([64, 128]), st.integers(1, 40))),
        dtype=draw(st.sampled_from(list(DTYPES))),
        kv_layout=draw(st.sampled_from(["NHD", "HND"])),
        row_form=draw(st.sampled_from(ROW_FORMS)),
        cache_form=draw(st.sampled_from(CACHE_FORMS)),
        index_dtype=draw(st.sampled_from([np.int32, np.int64])),
        shuffled=draw(st.booleans()),
        spare_pages=draw(st.integers(0, 3)),
    )
