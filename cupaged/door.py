"""What the doors of other libraries share: plans that are kept, and running them.

Their functions are called anew for every layer, with all that `plan()` would be told: a call whose
lengths are those of one before finds its plan again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged import arrays, bands, devices
from cupaged.bands import Band
from cupaged.kept_plans import KeptPlans
from cupaged.prefill import BatchPrefillWithPagedKVCacheWrapper
from cupaged.ragged import BatchPrefillWithRaggedKVCacheWrapper
from cupaged.spec import FLOAT8_DTYPES, SERVED_DTYPES, SERVED_HEAD_DIMS

Array = Any  # a numpy.ndarray or a cupy.ndarray
IntArray = npt.NDArray[np.int64]

_MOST_PLANS = 8


class Call(NamedTuple):
    """What a call is, apart from lengths: the arguments of `plan()`.

    Attributes
    ----------
    num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo : int
    dtype, kv_dtype : str
        Of q, and of K and V.
    sm_scale, logits_soft_cap : float, optional
    pos_encoding_mode : str
    disable_split_kv : bool
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    dtype: str
    kv_dtype: str
    sm_scale: float | None = None
    logits_soft_cap: float | None = None
    pos_encoding_mode: str = "NONE"
    disable_split_kv: bool = False


class Rows(NamedTuple):
    """Keys that lie one behind the other: request `r`'s from row `begin[r]` of K on."""

    begin: IntArray


class Pages(NamedTuple):
    """Keys in pages: request `r`'s from key `begin[r]` of the pages `table[r]` on.

    `name` is what the caller calls the table. Where a request begins inside of a page, K's pages
    have to lie behind one another, at the same distance as their rows: they are cut into smaller
    ones.
    """

    table: npt.NDArray[Any]
    begin: IntArray
    page_size: int
    name: str


class Append(NamedTuple):
    """The index arrays of `append_paged_kv_cache()`, by its names for them."""

    batch_indices: IntArray
    positions: IntArray
    kv_indices: npt.NDArray[Any]
    kv_indptr: IntArray
    kv_last_page_len: IntArray


class Batch(NamedTuple):
    """What a caller's lengths say.

    Attributes
    ----------
    band : Band
        What each row sees.
    keys : Rows or Pages
    append : Append, optional
        Where new tokens go.
    """

    band: Band
    keys: Rows | Pages
    append: Append | None = None


class Index:
    """An array of the caller's that says something about lengths.

    Parameters
    ----------
    x : array, list or tuple
    name : str
    read : callable
        Brings it to the host.

    Attributes
    ----------
    key : Hashable
        Differs where the values may differ, for as long as `x` is kept. What can't be changed
        unseen is not read for it: a JAX array, and a PyTorch tensor on a device, which counts its
        changes. All else is, which waits for the device where it is on one.
    """

    def __init__(
        self,
        x: Any,
        name: str,
        read: Callable[[Any, str], npt.NDArray[Any]] = arrays.import_index,
    ) -> None:
        self.x, self.name, self._read = x, name, read
        kind = arrays.framework(x)
        if kind == "jax":
            self.key: Hashable = id(x)
        elif kind == "torch" and x.is_cuda and not x.is_inference():
            place = (x.data_ptr(), x.get_device(), x.dtype)
            self.key = (*place, tuple(x.shape), x.stride(), x._version)
        else:
            self.key = (self.values.dtype.char, self.values.shape, self.values.tobytes())

    @cached_property
    def values(self) -> npt.NDArray[Any]:
        """On the host."""
        return self._read(self.x, self.name)


class Planned(NamedTuple):
    """A plan that is kept.

    Attributes
    ----------
    wrapper : wrapper of a batch prefill
    batch : Batch
    highest : int
        The highest page number, -1 where there is none.
    page_size : int
        Of the pages that are planned for, of which the caller's are multiples; 0 of rows.
    owners : tuple
        What its key is about.
    """

    wrapper: Any
    batch: Batch
    highest: int
    page_size: int
    owners: tuple[Any, ...]


_plans: KeptPlans[Hashable, Planned] = KeptPlans(_MOST_PLANS)


def planned(
    call: Call,
    place: tuple[int | None, int],
    key: Hashable,
    describe: Callable[[], Batch],
    owners: tuple[Any, ...] = (),
    names: tuple[str, str, str] = ("q", "k", "v"),
) -> Planned:
    """The plan of a call, kept or made.

    Parameters
    ----------
    call : Call
    place : tuple
        The device of the work, None for the host, and its stream; the current ones.
    key : Hashable
        Stands for all that `describe()` depends on.
    describe : callable
    owners : tuple
        What has to be kept for `key` to stay right.
    names : tuple of str
        What the caller calls q, K and V.

    Raises
    ------
    RuntimeError
        A CUDA graph is being captured.
    TypeError, ValueError, NotImplementedError, BackendUnavailableError
        As `describe()` and `plan()` do.
    """
    device, stream = place
    if device is not None and devices.is_recorded(stream):
        raise RuntimeError(
            "a CUDA graph is being captured, and lengths are read on the host: capture a wrapper "
            "made with use_cuda_graph=True"
        )
    key = (call, place, key)
    found = _plans.get(key)
    if found is None:
        _check_served(call, names)
        found = _plan(call, device, describe(), owners)
        _plans.put(key, found)
    return found


def _check_served(call: Call, names: tuple[str, str, str]) -> None:
    """Refuse what `plan()` refuses, whose names for it are not the caller's."""
    q, k, v = names
    heads, kv_heads, dim, dim_vo = call[:4]
    for name, number in ((q, heads), (k, kv_heads)):
        if not number:
            raise ValueError(f"{name} has no heads, expected at least 1")
    if heads % kv_heads:
        raise ValueError(f"{q} has {heads} heads, expected a multiple of {kv_heads} as {k} has")
    if (dim, dim_vo) not in SERVED_HEAD_DIMS:
        served = ", ".join(f"{each}" for each, out in SERVED_HEAD_DIMS if each == out)
        if dim == dim_vo:
            raise NotImplementedError(f"{q} has head_dim {dim}, served are {served}")
        others = ", ".join(f"{each}/{out}" for each, out in SERVED_HEAD_DIMS if each != out)
        raise NotImplementedError(
            f"{q} has head_dim {dim} and {v} {dim_vo}, served are equal ones of {served}, "
            f"and {others}"
        )
    if call.dtype not in SERVED_DTYPES:
        raise NotImplementedError(f"{q} is {call.dtype}, served are {', '.join(SERVED_DTYPES)}")
    if call.kv_dtype not in (call.dtype, *FLOAT8_DTYPES):
        raise NotImplementedError(
            f"{k} is {call.kv_dtype}, served are {call.dtype} as {q} is, and "
            f"{', '.join(FLOAT8_DTYPES)}"
        )


def _plan(call: Call, device: int | None, batch: Batch, owners: tuple[Any, ...]) -> Planned:
    keys = batch.keys
    view = bands.view(batch.band)
    backend = "reference" if device is None else "cuda"
    qo_indptr = starts(batch.band.qo_len)
    options: dict[str, Any] = {
        "causal": view.causal,
        "window_left": view.window_left,
        "packed_custom_mask": view.packed_mask,
        "sm_scale": call.sm_scale,
        "logits_soft_cap": call.logits_soft_cap,
        "pos_encoding_mode": call.pos_encoding_mode,
        "q_data_type": call.dtype,
        "kv_data_type": call.kv_dtype,
        "disable_split_kv": call.disable_split_kv,
    }
    heads = (call.num_qo_heads, call.num_kv_heads, call.head_dim_qk)
    if isinstance(keys, Rows):
        ragged = BatchPrefillWithRaggedKVCacheWrapper(backend=backend)
        ragged._plan_rows(
            *(qo_indptr, keys.begin, view.kv_len, *heads), head_dim_vo=call.head_dim_vo, **options
        )
        return Planned(ragged, batch, -1, 0, owners)
    inside = np.where(view.kv_len > 0, keys.begin, 0) % keys.page_size
    page_size = math.gcd(keys.page_size, *inside.tolist())
    counts, last_page_len = page_counts(view.kv_len, page_size)
    indices = page_numbers(keys, page_size, counts)
    paged = BatchPrefillWithPagedKVCacheWrapper(backend=backend)
    paged.plan(
        *(qo_indptr, starts(counts), indices, last_page_len, *heads, page_size),
        head_dim_vo=call.head_dim_vo,
        **options,
    )
    highest = int(indices.max(initial=-1)) // (keys.page_size // page_size)
    return Planned(paged, batch, highest, page_size, owners)


def starts(counts: IntArray) -> IntArray:
    """0, and where each request ends."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))


def page_counts(kv_len: IntArray, page_size: int) -> tuple[IntArray, IntArray]:
    """Pages of each request, and tokens in its last one."""
    counts = -(-kv_len // page_size)
    return counts, kv_len - np.maximum(counts - 1, 0) * page_size


def page_numbers(keys: Pages, page_size: int, counts: IntArray) -> IntArray:
    """The numbers of so many pages of each request, of `page_size` tokens each.

    A page of the caller's is a multiple of those, which are counted through.
    """
    parts = keys.page_size // page_size
    width = keys.table.shape[1] * parts
    first = keys.begin // page_size
    short = (counts > 0) & (first + counts > width)
    if short.any():
        r = int(short.argmax())
        needed = -(-(first[r] + counts[r]) // parts)
        raise ValueError(
            f"{keys.name} has {keys.table.shape[1]} pages a request, expected at least {needed}: "
            f"request {r} has as many of {keys.page_size} tokens"
        )
    request = np.arange(len(counts)).repeat(counts)
    place = np.arange(len(request)) + (first - starts(counts)[:-1]).repeat(counts)
    page, part = np.divmod(place, parts)
    chosen = keys.table[request, page]
    if len(chosen) and chosen.min() < 0:
        i = int(chosen.argmin())
        raise ValueError(f"{keys.name}[{request[i]}, {page[i]}] = {chosen[i]}, expected at least 0")
    numbers: IntArray = chosen.astype(np.int64) * parts + part
    return numbers


def check_pages(plan: Planned, num_pages: int) -> None:
    """Hold a plan over pages against a cache.

    Raises
    ------
    ValueError
        It has a page that the cache has not.
    """
    keys = plan.batch.keys
    if isinstance(keys, Pages) and plan.highest >= num_pages:
        kv_len = bands.view(plan.batch.band).kv_len
        end, _ = page_counts(keys.begin + kv_len, keys.page_size)
        place = np.arange(keys.table.shape[1])
        used = (place >= (keys.begin // keys.page_size)[:, None]) & (place < end[:, None])
        used &= (kv_len > 0)[:, None]
        request, page = np.argwhere(used & (keys.table >= num_pages))[0]
        raise ValueError(
            f"{keys.name}[{request}, {page}] = {keys.table[request, page]}, "
            f"expected 0..{num_pages - 1}: the cache holds {num_pages} pages"
        )


def reshaped(x: Array, shape: tuple[int, ...]) -> Array:
    """`x` in another shape; a copy where strides can't say it.

    CuPy copies what it has a name for: 16-bit floats go as integers.
    """
    bits = np.dtype(f"u{x.dtype.itemsize}")
    return x.view(bits).reshape(shape).view(x.dtype)


def attend(
    plan: Planned, home: Any, q: Array, k: Array, v: Array, shape: tuple[int, ...], want_lse: bool
) -> tuple[Any, Any]:
    """Run a plan, and give the result out as the kind of array that the caller's is.

    Parameters
    ----------
    plan : Planned
    home : array
        The caller's q, on whose stream the work goes, which is the current one.
    q, k, v : numpy.ndarray or cupy.ndarray
        [rows, num_qo_heads, head_dim]; K and V as rows, or in the caller's pages.
    shape : tuple of int
        Of the output.
    want_lse : bool

    Returns
    -------
    out : array of `shape`
    lse : float32 array [num_qo_heads, rows] or None
        Natural.
    """
    array, out = arrays.allocate_output(shape, q.dtype, q, home)
    lse_array = lse = rows_lse = None
    if want_lse:
        lse_shape = (q.shape[1], q.shape[0])
        lse_array, lse = arrays.allocate_output(lse_shape, np.dtype(np.float32), q, home)
        rows_lse = lse_array.T
    rows_out = array.reshape((q.shape[0], q.shape[1], shape[-1]))
    options = {"out": rows_out, "lse": rows_lse, "lse_base": "ln"}
    if plan.page_size:
        k, v = (reshaped(x, (-1, plan.page_size, *x.shape[2:])) for x in (k, v))
        plan.wrapper.run(q, (k, v), **options)
    else:
        plan.wrapper.run(q, k, v, **options)
    if out is None:
        out = arrays.export(array, home)
    if lse is None and want_lse:
        lse = arrays.export(lse_array, home)
    return out, lse
