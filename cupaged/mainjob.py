"""`python -m cupaged`: the batch of FlashInfer issue 192, and the cases that went wrong there.

Every request is compared with the plain formula over contiguous keys, which shares no line with
what it judges.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import cupaged
from cupaged import devices
from cupaged.backend import Backend
from cupaged.errors import BackendUnavailableError
from cupaged.examples import Batch, IntArray, draw_lengths
from cupaged.independent import Expected, attention
from cupaged.info import gpu_name

NUM_PAGES = 640
LSE_TOLERANCE = 1e-3

Half = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]

# What the warning about keys that were not appended has to say: which rows, what becomes of
# them, and what was probably forgotten.
_WARNING_WORDS = ("see no key", "will be 0", "appended")


@dataclass(frozen=True, slots=True)
class Case:
    """A batch whose requests each have a prefix in the cache, and new tokens.

    Attributes
    ----------
    title : str
    prefix, append : int64 [batch]
        Tokens that were there, and new ones, which are the queries.
    appended : bool
        The new tokens' keys are appended to the cache, as they should be.
    """

    title: str
    prefix: IntArray
    append: IntArray
    appended: bool = True

    @property
    def batch(self) -> Batch:
        """The batch that the library sees."""
        return Batch(self.append, self.prefix + self.append if self.appended else self.prefix)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Random inputs of a case.

    Attributes
    ----------
    q : float16 [nnz_qo, heads, head_dim]
    k, v : float16 [keys in the cache, heads, head_dim]
        Request after request, contiguous, as they were before they went into pages.
    k_cache, v_cache : float16 [NUM_PAGES, page_size, heads, head_dim]
        NaN wherever no key or value was put.
    page_indices : int32 [pages]
    """

    q: Half
    k: Half
    v: Half
    k_cache: Half
    v_cache: Half
    page_indices: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Row:
    """The table's row for a request; `fault` is empty where nothing is wrong."""

    prefix: int
    append: int
    pages: int
    error: float
    allowed: float
    lse_error: float
    zero_rows: int
    fault: str


def cases(rng: np.random.Generator) -> Iterator[Case]:
    """Issue 192's own batch, then what went wrong there."""
    prefix, append = draw_lengths(rng), draw_lengths(rng)
    none = np.zeros_like(prefix)
    turn = np.arange(len(prefix)) % 3
    yield Case("issue 192: prefix and append lengths uniform in 16..128", prefix, append)
    yield Case("no prefix: pure self attention", none, append)
    # The first request has neither prefix nor queries, and so no page.
    yield Case(
        "nothing appended to every third request",
        np.where(turn == 0, prefix * (np.arange(len(prefix)) > 0), prefix),
        np.where(turn == 0, 0, append),
    )
    page_size = Batch(append, prefix).page_size
    full_pages = -(-(prefix + append) // page_size) * page_size
    yield Case(
        f"lengths on a page's edge: one less than a multiple of {page_size}, on it, one more",
        full_pages + turn - 1 - append,
        append,
    )
    # The last request, without a prefix, has no key at all; half of the others have too few.
    longer, shorter = np.maximum(prefix, append) + 1, np.minimum(prefix, append)
    few = np.arange(len(prefix)) % 2 == 0
    prefix = np.where(few, shorter, longer)
    prefix[-1] = 0
    yield Case("keys not appended", prefix, np.where(few, longer, shorter), appended=False)


def append_to_cache(cache: Half, pages: npt.NDArray[np.int32], length: int, new: Half) -> None:
    """Put new tokens into a request's pages.

    Parameters
    ----------
    cache : float16 [num_pages, page_size, heads, head_dim]
        Written.
    pages : int32 [pages]
        The request's page numbers.
    length : int
        Tokens that the request has already.
    new : float16 [tokens, heads, head_dim]
    """
    page, slot = np.divmod(length + np.arange(len(new)), cache.shape[1])
    cache[pages[page], slot] = new


def make_inputs(case: Case, rng: np.random.Generator) -> Inputs:
    """Draw a case's inputs and fill its pages: the prefix first, then the new tokens."""
    batch = case.batch
    shape = (batch.num_kv_heads, batch.head_dim)
    starts = batch.paged_kv_indptr
    page_indices = rng.permutation(NUM_PAGES)[: starts[-1]].astype(np.int32)
    kept, caches = [], []
    for _ in ("k", "v"):
        cache = np.full((NUM_PAGES, batch.page_size, *shape), np.nan, np.float16)
        tokens = [np.empty((0, *shape), np.float16)]
        for r, (prefix, append) in enumerate(zip(case.prefix, case.append, strict=True)):
            pages = page_indices[starts[r] : starts[r + 1]]
            tokens.append(_normal(rng, (prefix, *shape)))
            append_to_cache(cache, pages, 0, tokens[-1])
            if case.appended:
                tokens.append(_normal(rng, (append, *shape)))
                append_to_cache(cache, pages, prefix, tokens[-1])
        kept.append(np.concatenate(tokens))
        caches.append(cache)
    q = _normal(rng, (case.append.sum(), batch.num_qo_heads, batch.head_dim))
    return Inputs(q, kept[0], kept[1], caches[0], caches[1], page_indices)


def run(case: Case, inputs: Inputs, backend: Backend) -> tuple[Half, Float32, list[str]]:
    """Let the library compute a case.

    Returns
    -------
    out : float16 [nnz_qo, heads, head_dim]
    lse : float32 [nnz_qo, heads]
        In base 2. Both given to the library, filled with NaN, and brought to the host after.
    warned : list of str
        The library's warnings.
    """
    wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapper.plan(**case.batch.plan_arguments(inputs.page_indices))
    warned = [str(w.message) for w in caught if issubclass(w.category, cupaged.CupagedWarning)]
    arrays: Sequence[Any] = (
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        np.full(inputs.q.shape, np.nan, np.float16),
        np.full(inputs.q.shape[:2], np.nan, np.float32),
    )
    if backend == "cuda":
        # Copies only: nothing that CuPy would have to compile, for which it needs CUDA's headers.
        arrays = [devices.cupy().asarray(array) for array in arrays]
    q, k_cache, v_cache, out, lse = arrays
    wrapper.run(q, (k_cache, v_cache), out=out, lse=lse, return_lse=True)
    if backend == "cuda":
        out, lse = out.get(), lse.get()
    return out, lse, warned


def compare(case: Case, expected: Expected, out: Half, lse: Float32) -> list[Row]:
    """Judge every request.

    The largest error may be twice that of the plain formula in float16, and one rounding more.
    """
    batch = case.batch
    eps = float(np.finfo(np.float16).eps)
    rows = []
    for r in range(len(case.append)):
        own = slice(batch.qo_indptr[r], batch.qo_indptr[r + 1])
        right, right_lse = expected.out[own], expected.lse[own]
        hidden = right_lse == -np.inf
        allowed = 2 * _largest(expected.plain[own] - right) + eps / 2 * _largest(right)
        error = _largest(out[own] - right)
        lse_error = _largest(lse[own][~hidden] - right_lse[~hidden])
        faults = []
        # Written so that a NaN is a fault.
        if not error <= allowed:
            faults.append("output")
        if not lse_error <= LSE_TOLERANCE:
            faults.append("LSE")
        if np.any(out[own][hidden] != 0) or np.any(lse[own][hidden] != -np.inf):
            faults.append("rows that see no key")
        rows.append(
            Row(
                prefix=int(case.prefix[r]),
                append=int(case.append[r]),
                pages=int(batch.pages[r]),
                error=error,
                allowed=allowed,
                lse_error=lse_error,
                zero_rows=int(hidden.all(axis=1).sum()),
                fault=", ".join(faults),
            )
        )
    return rows


def warning_fault(case: Case, warned: list[str]) -> str:
    """What is wrong with the warnings: one where keys are missing, that says so; else none."""
    batch = case.batch
    if not np.any(batch.qo_len > batch.kv_len):
        return f"unexpected warning: {warned[0]}" if warned else ""
    if any(all(word in message for word in _WARNING_WORDS) for message in warned):
        return ""
    return f"expected a CupagedWarning that says {', '.join(map(repr, _WARNING_WORDS))}"


def choose_backends(choice: Backend) -> tuple[tuple[Backend, ...], str]:
    """The backends to run on, and why CUDA is not one of them.

    Raises
    ------
    BackendUnavailableError
        CUDA was chosen, and can't be had.
    """
    if choice == "reference":
        return ("reference",), ""
    try:
        devices.device_model(devices.cupy().cuda.runtime.getDevice())
    except BackendUnavailableError as error:
        if choice == "cuda":
            raise
        return ("reference",), str(error)
    return ("cuda",) if choice == "cuda" else ("cuda", "reference"), ""


def place(backend: Backend) -> str:
    """A backend and its device in words."""
    if backend == "reference":
        return f"reference backend on the host (NumPy {np.__version__})"
    runtime = devices.cupy().cuda.runtime
    device = runtime.getDevice()
    return f"cuda backend on cuda:{device} ({gpu_name(runtime.getDeviceProperties(device))})"


def main(choice: Backend, seed: int) -> int:
    """Run every case on every backend, print a table for each, and the verdict.

    Parameters
    ----------
    choice : {"auto", "reference", "cuda"}
        "auto": on the GPU and on the host, or on the host alone where there is no GPU.
    seed : int
        Of all that is random.

    Returns
    -------
    int
        0, or 1 where anything is wrong.

    Raises
    ------
    BackendUnavailableError
        CUDA was chosen, and can't be had.
    """
    backends, why_not_cuda = choose_backends(choice)
    places = {backend: place(backend) for backend in backends}
    rng = np.random.default_rng(seed)
    print(f"cupaged {cupaged.__version__}: batch prefill with a paged KV cache")
    print(f"seed {seed}, {NUM_PAGES} pages, unused ones NaN; on: {'; '.join(places.values())}")
    if why_not_cuda:
        print(f"not on a GPU: {why_not_cuda}")
    checked = wrong = 0
    for case in cases(rng):
        inputs, batch = make_inputs(case, rng), case.batch
        expected = attention(batch.qo_len, batch.kv_len, inputs.q, inputs.k, inputs.v)
        for backend in backends:
            print(f"\n{case.title} -- {places[backend]}")
            out, lse, warned = run(case, inputs, backend)
            rows = compare(case, expected, out, lse)
            _print_table(rows)
            for message in warned:
                print(f"CupagedWarning: {message}")
            fault = warning_fault(case, warned)
            if fault:
                print(f"WRONG: {fault}")
            checked += len(rows)
            wrong += sum(bool(row.fault) for row in rows) + bool(fault)
    verdict = f"FAILED: {wrong} faults in" if wrong else "PASSED:"
    print(f"\n{verdict} {checked} requests on: {'; '.join(places.values())}")
    return 1 if wrong else 0


def _print_table(rows: list[Row]) -> None:
    print("request  prefix  append  pages  largest error   allowed  LSE error  verdict")
    for r, row in enumerate(rows):
        numbers = (
            f"{row.error:13.1e}  {row.allowed:8.1e}  {row.lse_error:9.1e}"
            if row.append
            else f"{'-':>13}  {'-':>8}  {'-':>9}"
        )
        verdict = f"WRONG: {row.fault}" if row.fault else "ok"
        if row.zero_rows:
            verdict += f" ({row.zero_rows} rows see no key)"
        print(f"{r:7}  {row.prefix:6}  {row.append:6}  {row.pages:5}  {numbers}  {verdict}")


def _largest(x: npt.NDArray[Any]) -> float:
    """Largest magnitude, 0 of nothing, NaN where there is one."""
    return float(np.abs(x).max(initial=0))


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Half:
    return rng.standard_normal(shape).astype(np.float16)
