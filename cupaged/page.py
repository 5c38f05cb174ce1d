"""Functions that manage a paged key/value cache: where tokens lie, and how new ones get there.

Names and argument orders follow FlashInfer's functions of these names.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cupaged import append, append_cuda, arrays, streams, validate, validate_page, validate_run
from cupaged.append import Indices
from cupaged.devices import cupy, is_recorded
from cupaged.opaque import opaque
from cupaged.spec import KVLayout

IntArray = npt.NDArray[np.int32]

_ON_THE_HOST = (np.ndarray, list, tuple)
_LAYOUTS = ("NHD", "HND")


@opaque
def append_paged_kv_cache(
    append_key: Any,
    append_value: Any,
    batch_indices: Any,
    positions: Any,
    paged_kv_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
    kv_layout: str = "NHD",
) -> None:
    """Copy the keys and values of new tokens to their slots in a paged cache.

    Row `i` goes to place `positions[i] % page_size` of page
    `kv_indices[kv_indptr[r] + positions[i] // page_size]`, with `r = batch_indices[i]`. Nothing
    else is written.

    Parameters
    ----------
    append_key, append_value : array [nnz, num_kv_heads, head_dim]
        Of the cache's dtype, whatever that is. Any strides with a contiguous last axis; no memory
        that the cache lies in.
    batch_indices : int array [nnz]
        Which request each row belongs to; -1 for padding, which is passed over, whatever its
        position and data.
    positions : int array [nnz]
        Each row's place in its request, below the request's length.
    paged_kv_cache : (array, array) or array
        `(k, v)`, each `[num_pages, page_size, num_kv_heads, head_dim]` (NHD) or
        `[num_pages, num_kv_heads, page_size, head_dim]` (HND); or both in one array with an
        axis of size 2 behind the first, `[num_pages, 2, ...]`. Pages of one token may lack the
        axis of the tokens. Any strides with a contiguous last axis, and a place of its own for
        each element. Its framework's stream is the one that is worked on.
    kv_indices : int array [>= kv_indptr[-1]]
        Page numbers.
    kv_indptr : int array [batch + 1]
        Entries of `kv_indices` that belong to each request, the appended tokens counted.
    kv_last_page_len : int array [batch]
        Tokens in each request's last page, the appended ones counted.
    kv_layout : {"NHD", "HND"}

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or has a wrong value; names it and the request. Nothing
        has been written. Among these: a position that its request does not have, a page that the
        cache does not have, two rows that go to the same slot.
    RuntimeError
        A CUDA graph is being captured, and no call before has loaded the kernel.
    BackendUnavailableError
        Device arrays without a GPU or NVRTC that serve them.

    Notes
    -----
    Index arrays may live on the host, and then nothing waits for the device; or on the device,
    which costs a wait for what is pending there, since they are checked before anything is
    launched. A later call with index arrays of the same values, as for the next layer, is quicker.

    While a CUDA graph is captured, all index arrays have to be on the device, and only their
    shapes and dtypes are checked. A launch of the graph reads what they then hold, and passes over
    rows that have no slot: of a request or position that does not exist, or of a page outside the
    cache.
    """
    layout = cast(KVLayout, validate.choice(kv_layout, "kv_layout", _LAYOUTS))
    home, caches = _import_cache(paged_kv_cache)
    key = arrays.import_tensor(append_key, "append_key", home)
    value = arrays.import_tensor(append_value, "append_value", home)
    validate_page.appended(key, value)
    k_name = "k cache" if isinstance(caches, tuple) else "paged_kv_cache"
    if isinstance(caches, tuple):
        k, v = caches
        page_size = validate_page.cache(k.shape, key, layout, k_name, stacked=False)
    else:
        page_size = validate_page.cache(caches.shape, key, layout, k_name, stacked=True)
        k, v = caches[:, 0], caches[:, 1]
    if page_size == 1:
        k, v = (validate_run.with_token_axis(x, layout) for x in (k, v))
    if isinstance(caches, tuple):
        validate_page.same_pages(k, v)
    device = arrays.device_id(k)
    tensors = ((k_name, k), ("v cache", v), ("append_key", key), ("append_value", value))
    validate_page.elements(tensors, device)
    if isinstance(caches, tuple):
        validate_run.own_beginnings(k, v)
    elif 0 in caches.strides:
        validate_run.own_elements(caches, k_name)
    given = Indices(batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    indices, on_device = _import_indices(given, home, device)
    validate_page.index_shapes(len(key), *indices)
    if device is None:
        append.write(append.find_slots(indices, page_size, len(k)), key, value, k, v, layout)
        return
    current, stream = arrays.on_stream_of(home, device)
    with current:
        slots = None
        if is_recorded(stream):
            for name, array in zip(Indices._fields, indices, strict=True):
                validate_page.read_by_graph(array, name, device)
        else:
            on_host = append_cuda.on_host(indices, stream) if on_device else indices
            slots = append.find_slots(on_host, page_size, len(k))
        all_on_device = on_device == len(indices)
        if not key.size or (slots is not None and not len(slots.entries) and not all_on_device):
            return
        # Index arrays on the device ask for the same kernel whether or not the host has seen them,
        # and even where all rows are padding: what a call has loaded serves one in a capture.
        where = indices if slots is None or all_on_device else slots
        append_cuda.run(device, stream, key, value, k, v, layout, where)
    v_owner = paged_kv_cache[1] if isinstance(caches, tuple) else home
    kind = type(home)
    foreign = type(append_key) is not kind or type(append_value) is not kind
    if foreign or type(v_owner) is not kind or on_device:
        owners = (append_key, append_value, v_owner, *given)
        _hold_until_done(owners, home, device, stream)


@opaque
def get_batch_indices_positions(
    append_indptr: Any,
    seq_lens: Any,
    nnz: int,
    batch_indices: Any = None,
    positions: Any = None,
) -> tuple[Any, Any]:
    """Say of each appended token which request it belongs to, and its position there.

    Entry `j` of request `r` is at position
    `seq_lens[r] - (append_indptr[r + 1] - append_indptr[r]) + (j - append_indptr[r])`: the new
    tokens are a request's last.

    Parameters
    ----------
    append_indptr : int array [batch + 1]
        Appended tokens that belong to each request; begins at 0, never decreases.
    seq_lens : int array [batch]
        Length of each request, the appended tokens counted.
    nnz : int
        Entries of the results, at least `append_indptr[-1]`.
    batch_indices, positions : int32 array [nnz], optional
        Where the results go, contiguous and apart; new arrays where not given.

    Returns
    -------
    batch_indices, positions : int32 array [nnz]
        Those given, or arrays of the kind that came in (of lists: NumPy). What lies past
        `append_indptr[-1]` is padding: -1 and 0.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or has a wrong value; names it and the request.
    NotImplementedError
        A CUDA graph is being captured.
    BackendUnavailableError
        Device arrays without a GPU or NVRTC that serve them.

    Notes
    -----
    Arrays on a device are brought to the host, which waits for what is pending there.
    """
    nnz = validate_page.count(nnz, "nnz")
    call = "get_batch_indices_positions()"
    like = _first_array(append_indptr, seq_lens)
    indptr, lengths = _on_host(call, append_indptr=append_indptr, seq_lens=seq_lens)
    begins, counts = validate_page.append_lengths(indptr, lengths, nnz)
    targets = [
        _import_target(x, name, nnz)
        for name, x in (("batch_indices", batch_indices), ("positions", positions))
    ]
    one, other = targets
    if one is not None and other is not None and arrays.device_id(one) == arrays.device_id(other):
        validate_run.own_memory(one, other, ("batch_indices", "positions"))
    total = int(begins[-1])
    requests = np.full(nnz, -1, np.int32)
    requests[:total] = np.arange(len(counts), dtype=np.int32).repeat(counts)
    places = np.zeros(nnz, np.int32)
    places[:total] = np.arange(total) + (lengths - begins[1:]).repeat(counts)
    found = [
        _as_kind_of(like, values) if x is None else _write(values, x, target)
        for values, x, target in zip(
            (requests, places), (batch_indices, positions), targets, strict=True
        )
    ]
    return found[0], found[1]


@opaque
def get_seq_lens(kv_indptr: Any, kv_last_page_len: Any, page_size: int) -> Any:
    """Tokens of each request.

    Parameters
    ----------
    kv_indptr : int array [batch + 1]
        Pages that belong to each request; begins at 0, never decreases.
    kv_last_page_len : int array [batch]
        Tokens in each request's last page, 1 to `page_size`.
    page_size : int

    Returns
    -------
    int32 array [batch]
        `(pages - 1) * page_size + last_page_len`, and 0 for a request without pages; the kind of
        array that came in (of lists: NumPy).

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or has a wrong value; names it and the request.
    NotImplementedError
        A CUDA graph is being captured.
    BackendUnavailableError
        Device arrays without a GPU or NVRTC that serve them.

    Notes
    -----
    Arrays on a device are brought to the host, which waits for what is pending there.
    """
    page_size = validate.positive_int(page_size, "page_size")
    like = _first_array(kv_indptr, kv_last_page_len)
    indptr, last_page_len = _on_host(
        "get_seq_lens()", kv_indptr=kv_indptr, kv_last_page_len=kv_last_page_len
    )
    _, lengths = validate_page.request_lengths(indptr, last_page_len, page_size)
    return _as_kind_of(like, lengths)


def _import_cache(paged_kv_cache: Any) -> tuple[Any, Any]:
    """The array whose owner's stream is worked on; and K and V, or both stacked, imported."""
    if not isinstance(paged_kv_cache, (tuple, list)):
        return paged_kv_cache, _import_pages(paged_kv_cache, "paged_kv_cache", None)
    if len(paged_kv_cache) != 2:
        raise ValueError(f"paged_kv_cache has {len(paged_kv_cache)} arrays, expected two: (k, v)")
    k, v = paged_kv_cache
    return k, (_import_pages(k, "k cache", None), _import_pages(v, "v cache", k))


def _import_pages(x: Any, name: str, beside: Any) -> Any:
    array = arrays.import_tensor(validate_page.writable(x, name), name, beside)
    # It may have become a read-only NumPy array.
    return array if array is x else validate_page.writable(array, name)


def _import_indices(given: Indices, home: Any, device: int | None) -> tuple[Indices, int]:
    """The index arrays where they are, or on the host where the cache is; how many are not."""
    found, on_device = [], 0
    for name, x in zip(Indices._fields, given, strict=True):
        if device is None or isinstance(x, _ON_THE_HOST):
            array = arrays.import_index(x, name)
        else:
            array = arrays.import_tensor(x, name, home)
            if isinstance(array, np.ndarray):
                array = arrays.import_index(array, name)
            else:
                validate_page.device_index(array, name, device)
                on_device += 1
        found.append(array)
    return Indices._make(found), on_device


def _hold_until_done(owners: tuple[Any, ...], home: Any, device: int, stream: int) -> None:
    """Keep arrays' owners from reading, changing or freeing them before the launch is done.

    What is of home's own framework is in order.
    """
    others = {arrays.framework(x): x for x in owners if not isinstance(x, _ON_THE_HOST)}
    others.pop(arrays.framework(home), None)
    if others.pop("jax", None) is not None:
        # XLA's stream waits for nobody else's, see `arrays.export()`.
        cupy().cuda.runtime.streamSynchronize(stream)
    for other in others.values():
        streams.order_after(home, other, device)


def _first_array(*indices: Any) -> Any:
    """The first that is no list; or None."""
    return next((x for x in indices if not isinstance(x, (list, tuple))), None)


def _on_host(call: str, **indices: Any) -> list[IntArray]:
    """Index arrays on the host, by their names."""
    for name, x in indices.items():
        if not isinstance(x, _ON_THE_HOST):
            device = arrays.device_id(arrays.import_tensor(x, name))
            if device is not None and is_recorded(arrays.caller_stream(x, device)):
                validate_page.no_capture(call)
    return [arrays.import_index(x, name) for name, x in indices.items()]


def _import_target(x: Any, name: str, nnz: int) -> Any:
    """An output that the caller gave, imported; or None."""
    if x is None:
        return None
    target = arrays.import_tensor(arrays.writable(x, name), name)
    validate_page.given_index(arrays.writable(target, name), name, nnz)
    return target


def _write(values: IntArray, x: Any, target: Any) -> Any:
    """Copy values to the array that the caller gave; returns it."""
    if isinstance(target, np.ndarray):
        target[...] = values
    else:
        current, _ = arrays.on_stream_of(x, arrays.device_id(target))
        with current:
            target.set(values)
    return x


def _as_kind_of(like: Any, values: IntArray) -> Any:
    """Give values out as the kind of array that `like` is, where that is; of None: NumPy."""
    if like is None:
        return values
    imported = arrays.import_tensor(like, "index array")
    device = arrays.device_id(imported)
    current, _ = arrays.on_stream_of(like, device)
    with current:
        result = values
        if device is not None:
            result = arrays.empty(values.shape, values.dtype, imported)
            result.set(values)
        return arrays.export(result, like)
