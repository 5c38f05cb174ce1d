"""What is measured: batches by their lengths, the work they hold, and their paged arrays.

Everything here is NumPy and needs no GPU. Lengths are the same in every run, so that runs can be
compared; values and the order of the pages are drawn afresh from the generator that is passed in.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

#: page sizes of the sweep; 24 is there because nothing but multiplication is easy with it
SWEEP_PAGE_SIZES = (1, 2, 4, 8, 16, 24, 32, 64, 128, 256)

#: lengths of the other sweep, and the tokens that the requests of each length have together
SWEEP_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SWEEP_TOKENS = 16384

PAGE_SWEEP = "page-sweep"
LENGTH_SWEEP = "length-sweep"

#: pages that no request names, in every pool; they hold NaN
SPARE_PAGES = 3

#: numbers drawn by one thread at a time
DRAW_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Workload:
    """A batch of attention requests, by its lengths.

    Attributes
    ----------
    name : str
        What tables and `--workloads` call it.
    qo_lens, kv_lens : tuple of int
        Queries and keys of each request; the keys include the queries' own.
    num_qo_heads, num_kv_heads : int
        Query heads, and the key/value heads they share.
    causal : bool
        Row `i` sees the keys up to `kv_len - qo_len + i`.
    page_size : int
        Tokens of a page.
    head_dim : int
        Elements of a head.
    min_pages : int
        The pool holds at least so many pages.
    sweep : str
        The sweep it is a point of, `PAGE_SWEEP` or `LENGTH_SWEEP`; empty for none.
    dtype : str
        "float16" or "bfloat16", whatever the run's is; empty for the run's.
    kv_layout : str
        "NHD" or "HND".
    """

    name: str
    qo_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_qo_heads: int
    num_kv_heads: int
    causal: bool
    page_size: int
    head_dim: int = 128
    min_pages: int = 0
    sweep: str = ""
    dtype: str = ""
    kv_layout: str = "NHD"

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.qo_lens)

    @property
    def paged_only(self) -> bool:
        """It is about paging: contenders without pages have nothing to say on it."""
        return self.sweep == PAGE_SWEEP

    def flops(self) -> int:
        """Floating-point operations: 4 * head_dim for each (query head row, visible key) pair."""
        pairs = sum(
            visible_pairs(qo, kv, self.causal)
            for qo, kv in zip(self.qo_lens, self.kv_lens, strict=True)
        )
        return 4 * self.head_dim * self.num_qo_heads * pairs

    def kv_bytes(self, itemsize: int = 2) -> int:
        """Bytes of the keys and values that some row sees."""
        tokens = sum(kv if qo > 0 else 0 for qo, kv in zip(self.qo_lens, self.kv_lens, strict=True))
        return 2 * tokens * self.num_kv_heads * self.head_dim * itemsize

    def bytes(self, itemsize: int = 2) -> int:
        """Bytes that must move: K and V read once, Q read once, the output written once."""
        rows = sum(self.qo_lens) * self.num_qo_heads * self.head_dim
        return self.kv_bytes(itemsize) + 2 * rows * itemsize


def visible_pairs(qo_len: int, kv_len: int, causal: bool) -> int:
    """Pairs (query row, visible key) of one request."""
    if not causal:
        return qo_len * kv_len
    # Only the last min(qo_len, kv_len) rows see a key; from the last one upwards they see
    # kv_len, kv_len - 1, ... of them.
    rows = min(qo_len, kv_len)
    return rows * kv_len - rows * (rows - 1) // 2


def log_normal_lengths(
    rng: np.random.Generator, count: int, median: float, low: int, high: int
) -> tuple[int, ...]:
    """`count` whole lengths, log-normal with sigma 1 around `median`, clipped to [low, high]."""
    drawn = rng.lognormal(math.log(median), 1.0, count)
    return tuple(int(n) for n in np.clip(np.rint(drawn), low, high))


def log_normal_of_mean(rng: np.random.Generator, count: int, mean: int) -> tuple[int, ...]:
    """`count` whole lengths, log-normal with sigma 1, scaled to that mean; none is 0."""
    drawn = rng.lognormal(0.0, 1.0, count)
    return tuple(int(n) for n in np.maximum(1, np.rint(drawn * (mean / drawn.mean()))))


def ragged(name: str, batch: int, query_median: float, page_size: int) -> Workload:
    """Requests of log-normal query and prefix lengths, 32/8 heads, causal."""
    rng = np.random.default_rng(20261122 + batch)
    queries = log_normal_lengths(rng, batch, query_median, 1, 4096)
    prefixes = log_normal_lengths(rng, batch, 1024, 0, 16384)
    keys = tuple(q + p for q, p in zip(queries, prefixes, strict=True))
    return Workload(name, queries, keys, 32, 8, True, page_size)


def issue192() -> Workload:
    """The ten short requests of FlashInfer issue 192: prefix and append uniform in 16..128."""
    rng = np.random.default_rng(192)
    appends = tuple(int(n) for n in rng.integers(16, 129, 10))
    prefixes = tuple(int(n) for n in rng.integers(16, 129, 10))
    keys = tuple(a + p for a, p in zip(appends, prefixes, strict=True))
    return Workload("issue192", appends, keys, 8, 8, True, page_size=32, min_pages=640)


def prefill_workloads(page_size: int) -> list[Workload]:
    """The prefill table."""
    among = 31  # the long prefill's place among the decodes: neither first nor last
    return [
        Workload("1x16384-full", (16384,), (16384,), 16, 16, False, page_size),
        Workload("1x16384-causal", (16384,), (16384,), 16, 16, True, page_size),
        Workload("4x4096", (4096,) * 4, (4096,) * 4, 32, 8, True, page_size),
        Workload("4x4096-hd64", (4096,) * 4, (4096,) * 4, 32, 8, True, page_size, head_dim=64),
        Workload("4x4096-hd256", (4096,) * 4, (4096,) * 4, 32, 8, True, page_size, head_dim=256),
        Workload("16x1024", (1024,) * 16, (1024,) * 16, 32, 8, True, page_size),
        Workload("8x512-over-8192", (512,) * 8, (8192,) * 8, 32, 8, True, page_size),
        ragged("ragged-64", 64, 256, page_size),
        Workload(
            "prefill-among-decodes",
            (1,) * among + (2048,) + (1,) * (63 - among),
            (4096,) * among + (32768,) + (4096,) * (63 - among),
            32,
            8,
            True,
            page_size,
        ),
        issue192(),
    ]


def page_sweep() -> list[Workload]:
    """4 x 4,096 at every page size of the sweep."""
    return [
        Workload(f"4x4096-page{p}", (4096,) * 4, (4096,) * 4, 32, 8, True, p, sweep=PAGE_SWEEP)
        for p in SWEEP_PAGE_SIZES
    ]


def length_sweep(page_size: int) -> list[Workload]:
    """Equal requests of each length of the sweep, as many as make its tokens."""
    table = []
    for length in SWEEP_LENGTHS:
        lens = (length,) * max(1, SWEEP_TOKENS // length)
        name = f"length-{length}"
        table.append(Workload(name, lens, lens, 32, 8, True, page_size, sweep=LENGTH_SWEEP))
    return table


def shrink(workload: Workload) -> Workload:
    """The same shape at a size that NumPy computes in milliseconds."""
    by = 64 if max(workload.kv_lens) > 256 else 1
    kv_heads = min(workload.num_kv_heads, 2)
    group = workload.num_qo_heads // workload.num_kv_heads

    def smaller(lens: Iterable[int]) -> tuple[int, ...]:
        return tuple(max(1, n // by) if n else 0 for n in lens)

    return dataclasses.replace(
        workload,
        qo_lens=smaller(workload.qo_lens),
        kv_lens=smaller(workload.kv_lens),
        num_qo_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        min_pages=0,
    )


@dataclass(frozen=True, slots=True)
class PageTable:
    """A batch's index arrays, all int32 on the host, as `plan()` takes them."""

    page_size: int
    num_pages: int
    qo_indptr: np.ndarray  # [batch + 1]
    kv_indptr: np.ndarray  # [batch + 1]
    kv_indices: np.ndarray  # [kv_indptr[-1]]
    last_page_len: np.ndarray  # [batch]

    def kv_len(self, request: int) -> int:
        """Keys of a request."""
        pages = int(self.kv_indptr[request + 1] - self.kv_indptr[request])
        return (pages - 1) * self.page_size + int(self.last_page_len[request]) if pages else 0

    def slots(self, request: int) -> np.ndarray:
        """Where a request's keys lie in the pool seen as [num_pages * page_size] tokens."""
        pages = self.kv_indices[self.kv_indptr[request] : self.kv_indptr[request + 1]]
        slots = pages.astype(np.int64)[:, None] * self.page_size + np.arange(self.page_size)
        return slots.reshape(-1)[: self.kv_len(request)]

    def all_slots(self) -> np.ndarray:
        """The slots of all requests' keys, request after request."""
        return np.concatenate([self.slots(r) for r in range(len(self.last_page_len))])

    def unused_slots(self) -> np.ndarray:
        """The slots of the pool that hold no key of the batch."""
        unused = np.ones(self.num_pages * self.page_size, bool)
        unused[self.all_slots()] = False
        return np.flatnonzero(unused)


def make_page_table(workload: Workload, rng: np.random.Generator) -> PageTable:
    """Pages in random order from a pool that holds some more than the batch needs."""
    page_size = workload.page_size
    kv_lens = np.asarray(workload.kv_lens, np.int64)
    pages = -(-kv_lens // page_size)
    needed = int(pages.sum())
    num_pages = max(needed + SPARE_PAGES, workload.min_pages)
    return PageTable(
        page_size=page_size,
        num_pages=num_pages,
        qo_indptr=indptr(workload.qo_lens),
        kv_indptr=indptr(pages),
        kv_indices=rng.permutation(num_pages)[:needed].astype(np.int32),
        last_page_len=np.where(pages > 0, kv_lens - (pages - 1) * page_size, 0).astype(np.int32),
    )


def indptr(lens: Iterable[int]) -> np.ndarray:
    """Running sums from 0, int32, one more than there are lengths."""
    return np.concatenate([[0], np.cumsum(np.fromiter(lens, np.int64))]).astype(np.int32)


def standard_normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Normal random numbers, drawn by several threads: a big cache holds 10^8 of them."""
    flat = np.empty(math.prod(shape), DTYPES[dtype])
    starts = range(0, flat.size, DRAW_CHUNK)
    seeds = rng.integers(0, 1 << 63, len(starts))

    def fill(start: int, seed: int) -> None:
        part = flat[start : start + DRAW_CHUNK]
        part[:] = np.random.default_rng(seed).standard_normal(part.size, np.float32)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(fill, starts, seeds):
            pass
    return flat.reshape(shape)


def cache_shape(workload: Workload, table: PageTable) -> tuple[int, int, int, int]:
    """Shape of K, and of V, in pages, as the workload's layout has it."""
    heads, tokens = workload.num_kv_heads, table.page_size
    if workload.kv_layout == "HND":
        return table.num_pages, heads, tokens, workload.head_dim
    return table.num_pages, tokens, heads, workload.head_dim


def head_rows(workload: Workload, table: PageTable, slots: np.ndarray) -> np.ndarray:
    """Where each head of some slots lies in a cache that is seen as `[-1, head_dim]`.

    Returns
    -------
    int64 array [len(slots), num_kv_heads]
    """
    count = workload.num_kv_heads
    heads = np.arange(count)
    if workload.kv_layout == "HND":
        page, token = np.divmod(slots[:, None], table.page_size)
        return (page * count + heads) * table.page_size + token
    return slots[:, None] * count + heads
