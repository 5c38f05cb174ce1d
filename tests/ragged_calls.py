"""The batches of `batches.py` without their pages: keys and values one behind the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
from small_call import ints

import cupaged

Wrapper = cupaged.BatchPrefillWithRaggedKVCacheWrapper

#: How K and V may lie in memory: on their own; with heads and elements between theirs.
FORMS = ("contiguous", "strided")


def kv_rows(
    kv_layout: str, form: str, rows: int, heads: int, head_dim: int, dtype: np.dtype[Any]
) -> np.ndarray:
    """K or V, all NaN, as `run()` takes it."""
    # Padding in elements by multiples of 16, so that rows stay aligned to 16 bytes.
    more_heads, begin = (2, 16) if form == "strided" else (0, 0)
    axes = (rows, heads + more_heads) if kv_layout == "NHD" else (heads + more_heads, rows)
    storage = np.full((*axes, head_dim + begin), np.nan, np.float32).astype(dtype)
    own = (slice(None), slice(heads)) if kv_layout == "NHD" else (slice(heads),)
    return storage[(*own, ..., slice(begin, None))]


class Ragged:
    """A ragged wrapper that `batches.Batch.plan()` and `strategies.check_call()` can use.

    They call it as they call one of paged caches: what the pages hold is put one behind the other.

    Parameters
    ----------
    pages_layout : str
        The cache's `kv_layout`.
    gap : int
        Rows between requests, which are NaN; with 0, `plan()` is called.
    kv_layout, form : str
        Those of K and V.
    asarray, asnumpy : callable
        Take arrays to where the backend works, and back.
    """

    def __init__(
        self,
        pages_layout: str,
        gap: int = 0,
        kv_layout: str = "NHD",
        form: str = "contiguous",
        asarray: Callable[[Any], Any] = np.asarray,
        asnumpy: Callable[[Any], Any] = np.asarray,
        backend: str = "reference",
    ) -> None:
        self.pages_layout, self.gap = pages_layout, gap
        self.asarray, self.asnumpy = asarray, asnumpy
        self.kv_layout, self.form = kv_layout, form
        self.wrapper = Wrapper(kv_layout=kv_layout, backend=backend)

    def plan(
        self,
        qo_indptr: Any,
        paged_kv_indptr: Any,
        paged_kv_indices: Any,
        paged_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        fixed_split_size: int | None = None,
        **options: Any,
    ) -> None:
        counts = np.diff(paged_kv_indptr)
        kv_len = np.where(counts > 0, (counts - 1) * page_size + paged_kv_last_page_len, 0)
        self.pages = np.split(paged_kv_indices, paged_kv_indptr[1:-1]) if len(counts) else []
        self.kv_len, self.page_size = kv_len, page_size
        self.begin = np.cumsum([self.gap, *(kv_len + self.gap)])
        if fixed_split_size is not None:
            options["fixed_split_size"] = fixed_split_size * page_size  # tokens
        heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        self.num_kv_heads = num_kv_heads
        if self.gap:
            self.wrapper._plan_rows(qo_indptr, self.begin[:-1], kv_len, *heads, **options)
        else:
            self.wrapper.plan(qo_indptr, self.begin, *heads, **options)

    def rows(self, pages: np.ndarray) -> np.ndarray:
        """K or V of what a cache holds of it."""
        heads = pages.shape[2 if self.pages_layout == "NHD" else 1]
        shape = (int(self.begin[-1]), heads, pages.shape[-1])
        found = kv_rows(self.kv_layout, self.form, *shape, pages.dtype)
        by_row = found if self.kv_layout == "NHD" else found.swapaxes(0, 1)
        for begin, kv_len, numbers in zip(self.begin, self.kv_len, self.pages, strict=False):
            by_row[begin : begin + kv_len] = oracle.gather(
                pages, self.pages_layout, numbers, kv_len, self.page_size
            )
        return found

    def on_device(self, rows: np.ndarray) -> Any:
        """K or V where the backend works, strides and all."""
        storage = rows if rows.base is None else rows.base
        while storage.base is not None:
            storage = storage.base
        begin = storage.shape[-1] - rows.shape[-1]
        heads = slice(self.num_kv_heads)
        own = (slice(None), heads) if self.kv_layout == "NHD" else (heads,)
        return self.asarray(storage)[(*own, ..., slice(begin, None))]

    def run(self, q: Any, cache: Any, **options: Any) -> Any:
        pages = cache if isinstance(cache, tuple) else (cache[:, 0], cache[:, 1])
        k, v = (self.on_device(self.rows(self.asnumpy(x))) for x in pages)
        return self.wrapper.run(q, k, v, **options)

    @property
    def schedule(self) -> Any:
        return self.wrapper._plan.schedule


# A small legal call, to change one argument of


def plan_arguments(**changes: Any) -> dict[str, Any]:
    """Three requests: 3, 5 and 1 queries; 20, 16 and no keys."""
    return {
        "qo_indptr": ints(0, 3, 8, 9),
        "kv_indptr": ints(0, 20, 36, 36),
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim_qk": 64,
        **changes,
    }


def kv(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.zeros(shape or (36, 2, 64), dtype)


def run_arguments(**changes: Any) -> dict[str, Any]:
    return {"q": np.zeros((9, 4, 64), np.float16), "k": kv(), "v": kv(), **changes}


def planned(kv_layout: str = "NHD", **changes: Any) -> Wrapper:
    wrapper = Wrapper(backend="reference", kv_layout=kv_layout)
    wrapper.plan(**plan_arguments(**changes))
    return wrapper
