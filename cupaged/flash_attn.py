"""FlashAttention's door: its functions for inference over ragged batches and key/value caches."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged import arrays, cuda, door, flash_calls, validate, validate_run
from cupaged.door import Planned
from cupaged.opaque import opaque
from cupaged.page import append_paged_kv_cache

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache"]

Array = Any  # a numpy.ndarray or a cupy.ndarray


@opaque
def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
    *,
    seqused_k: Any = None,
    page_table: Any = None,
) -> Any:
    """Attention of a ragged batch, as FlashAttention's function of this name has it.

    Parameters
    ----------
    q : array [total_q, num_heads, head_dim]
        float16 or bfloat16.
    k, v : array [total_k, num_heads_k, head_dim]
        Or, with a page table, `[num_pages, page_size, num_heads_k, head_dim]`.
    cu_seqlens_q : int array [batch + 1]
        Where each request's rows of q begin; the last entry is `total_q`.
    cu_seqlens_k : int array [batch + 1], optional
        Where each request's rows of k begin; with a page table only the differences count. May be
        None where there are a page table and `seqused_k`.
    max_seqlen_q, max_seqlen_k : int, optional
        No request may be longer.
    dropout_p : float
        Must be 0.
    softmax_scale : float, optional
        What multiplies `q·k`; by default `1 / sqrt(head_dim)`.
    causal : bool
        Row `i` sees keys up to `seqlen_k - seqlen_q + i`.
    window_size : (int, int)
        Row `i` sees keys from `seqlen_k - seqlen_q + i - window_size[0]` to
        `seqlen_k - seqlen_q + i + window_size[1]`; -1 for all. With `causal` the second is 0. One
        that is above 0 and hides a key becomes a mask of bits.
    softcap : float
        Logits `x` become `softcap * tanh(x / softcap)`, where it is more than 0.
    alibi_slopes : float32 array [num_heads] or [batch, num_heads], optional
        Those of Press et al. for `num_heads`, with `causal` or one query a request.
    deterministic : bool
        The forward pass always is.
    return_attn_probs : bool
        Return the log-sum-exp too.
    block_table : int array [batch, pages], optional
        Each request's pages.
    seqused_k : int array [batch], optional
        Keys of each request, where it has room for more.
    page_table : int array [batch, pages], optional
        FlashAttention 3's name for `block_table`.

    Returns
    -------
    out : array [total_q, num_heads, head_dim]
        Of q's kind. A row that sees no key is 0.
    softmax_lse : float32 array [num_heads, total_q]
        Only with `return_attn_probs`; natural. A row that sees no key has -inf.
    attn_probs : array [0]
        Only with `return_attn_probs`; empty, as FlashAttention's is without dropout.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or has a wrong value; names it and the request.
    NotImplementedError
        A legal request that no backend serves; names the argument.
    RuntimeError
        A CUDA graph is being captured: the lengths would stay what they are now.
    BackendUnavailableError
        Device arrays without a GPU or NVRTC that serve them.

    Notes
    -----
    A call of the same lengths as one before, as for the next layer, finds its plan again; eight are
    kept. Index arrays on a device are read, which waits for it; one of PyTorch's only where
    PyTorch has counted a change of it, which it does not do for tensors made in inference mode.
    """
    if validate.scale(dropout_p, "dropout_p") != 0:
        raise NotImplementedError(f"dropout_p = {dropout_p}, served is 0: there is no dropout")
    validate.flag(deterministic, "deterministic")
    want_lse = validate.flag(return_attn_probs, "return_attn_probs")
    window = flash_calls.window(window_size, causal)
    table = flash_calls.one_table(block_table, page_table)
    given = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_k": seqused_k,
    }
    needed = ["cu_seqlens_q"] + ["cu_seqlens_k"] * (table is None or seqused_k is None)
    for name in needed:
        if given[name] is None:
            raise TypeError(f"{name} is None, expected an int array [batch + 1]")
    lengths = flash_calls.Lengths(table, alibi_slopes, given)
    queries, keys, values = flash_calls.imported(q, k, v, ("k", "v"))
    flash_calls.check_axes(queries, "q", ("total_q", "num_heads", "head_dim"))
    rows = ("total_k",) if table is None else ("num_pages", "page_size")
    for x, name in ((keys, "k"), (values, "v")):
        flash_calls.check_axes(x, name, (*rows, "num_heads_k", "head_dim"))
    call = flash_calls.call(queries, keys, values, softmax_scale, softcap, lengths, ("k", "v"))
    sizes = flash_calls.VarlenSizes(
        queries.shape[:2],
        keys.shape[: len(rows)],
        flash_calls.longest(max_seqlen_q, "max_seqlen_q"),
        flash_calls.longest(max_seqlen_k, "max_seqlen_k"),
        window,
    )
    device = validate_run.one_device(queries, keys, values, ("k", "v"))
    current, stream = arrays.on_stream_of(q, device)
    with current:
        plan = door.planned(
            *(call, (device, stream), (sizes, lengths.key)),
            *(lambda: flash_calls.varlen_batch(sizes, lengths), lengths.owners),
        )
        door.check_pages(plan, len(keys))
        shape = (*queries.shape[:2], values.shape[-1])
        out, lse = door.attend(plan, q, queries, keys, values, shape, want_lse)
        if not want_lse:
            return out
        empty, probs = arrays.allocate_output((0,), queries.dtype, queries, q)
        return out, lse, arrays.export(empty, q) if probs is None else probs


@opaque
def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Any = None,
) -> Any:
    """Attention over a key/value cache, as FlashAttention's function of this name has it.

    Parameters
    ----------
    q : array [batch, seqlen_q, num_heads, head_dim]
        float16 or bfloat16.
    k_cache, v_cache : array [batch_cache, seqlen_cache, num_heads_k, head_dim]
        Or, with a page table, `[num_pages, page_size, num_heads_k, head_dim]`.
    k, v : array [batch, seqlen_new, num_heads_k, head_dim], optional
        New tokens, which are written to the cache from place `cache_seqlens` on, and counted.
    rotary_cos, rotary_sin
        Must be None: rotate before.
    cache_seqlens : int or int array [batch], optional
        Tokens of each request in the cache; all that there is room for where not given.
    cache_batch_idx : int array [batch], optional
        Which of the cache's rows are a request's; without a page table.
    cache_leftpad : int array [batch], optional
        Where a request's tokens begin; those before are not seen.
    block_table : int array [batch, pages], optional
        Each request's pages.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As `flash_attn_varlen_func()` takes them.
    rotary_interleaved : bool
        Says nothing without a rotation.
    num_splits : int
        0: the planner splits keys as the GPU wants it; 1: it does not.
    return_softmax_lse : bool
    page_table : int array [batch, pages], optional
        FlashAttention 3's name for `block_table`.

    Returns
    -------
    out : array [batch, seqlen_q, num_heads, head_dim]
        Of q's kind. A row that sees no key is 0.
    softmax_lse : float32 array [batch, num_heads, seqlen_q]
        Only with `return_softmax_lse`; natural. A row that sees no key has -inf.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or has a wrong value; names it and the request. Nothing
        has been written to the cache.
    NotImplementedError
        A legal request that no backend serves; names the argument.
    RuntimeError
        A CUDA graph is being captured: the lengths would stay what they are now.
    BackendUnavailableError
        Device arrays without a GPU or NVRTC that serve them.

    Notes
    -----
    Plans are kept as `flash_attn_varlen_func()` says.
    """
    for name, x in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if x is not None:
            raise NotImplementedError(f"{name} is {validate.what(x)}, served is None")
    validate.flag(rotary_interleaved, "rotary_interleaved")
    one_split = flash_calls.one_split(num_splits)
    want_lse = validate.flag(return_softmax_lse, "return_softmax_lse")
    window = flash_calls.window(window_size, causal)
    table = flash_calls.one_table(block_table, page_table)
    if table is not None and cache_batch_idx is not None:
        raise ValueError(f"cache_batch_idx and {table.name} exclude each other")
    seqlen = flash_calls.one_length(cache_seqlens)
    given = {
        "cache_seqlens": cache_seqlens if seqlen is None else None,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
    }
    lengths = flash_calls.Lengths(table, alibi_slopes, given)
    queries, keys, values = flash_calls.imported(q, k_cache, v_cache, ("k_cache", "v_cache"))
    flash_calls.check_axes(queries, "q", ("batch", "seqlen_q", "num_heads", "head_dim"))
    rows = ("batch_cache", "seqlen_cache") if table is None else ("num_pages", "page_size")
    for x, name in ((keys, "k_cache"), (values, "v_cache")):
        flash_calls.check_axes(x, name, (*rows, "num_heads_k", "head_dim"))
    batch, seqlen_q = queries.shape[:2]
    new = None
    if k is not None or v is not None:
        for x, name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
            if arrays.framework(x) == "jax":
                raise TypeError(
                    f"{name} is a JAX array, which is immutable: write k and v into the cache "
                    "yourself, and omit k and v"
                )
            arrays.writable(x, name)
        new = flash_calls.new_tokens(q, k, v, batch, keys, values)
        if cache_seqlens is None:
            raise ValueError("cache_seqlens is None, expected where k and v go")
    call = flash_calls.call(
        *(queries, keys, values, softmax_scale, softcap, lengths, ("k_cache", "v_cache")),
        disable_split_kv=one_split,
    )
    flat = flash_calls.is_flat(keys) and flash_calls.is_flat(values)
    seqlen_new = 0 if new is None else new[0].shape[1]
    sizes = flash_calls.CacheSizes(
        *(queries.shape[:3], keys.shape[:2], seqlen, seqlen_new, flat, window)
    )
    device = validate_run.one_device(queries, keys, values, ("k_cache", "v_cache"))
    if new is not None:
        validate_run.own_memory(keys, values, ("k_cache", "v_cache"))
    current, stream = arrays.on_stream_of(q, device)
    with current:
        plan = door.planned(
            *(call, (device, stream), (sizes, lengths.key)),
            *(lambda: flash_calls.cache_batch(sizes, lengths), lengths.owners),
            names=("q", "k_cache", "v_cache"),
        )
        door.check_pages(plan, len(keys))
        _append_new(plan, new, keys, values)
        if flat and table is None:
            keys, values = (
                door.reshaped(x, (len(x) * x.shape[1], *x.shape[2:])) for x in (keys, values)
            )
        rows_q = door.reshaped(queries, (batch * seqlen_q, *queries.shape[2:]))
        shape = (*queries.shape[:3], values.shape[-1])
        out, lse = door.attend(plan, q, rows_q, keys, values, shape, want_lse)
        return (out, _by_batch(lse, batch, seqlen_q)) if want_lse else out


def _append_new(plan: Planned, new: tuple[Array, Array] | None, keys: Array, values: Array) -> None:
    """Write the new tokens to the cache, unless attention would refuse it."""
    if new is None or plan.batch.append is None:
        return
    if not isinstance(keys, np.ndarray):
        cuda.check_aligned(keys, values, ("k_cache", "v_cache"))
    k, v = (door.reshaped(x, (x.shape[0] * x.shape[1], *x.shape[2:])) for x in new)
    at = plan.batch.append
    append_paged_kv_cache(
        *(k, v, at.batch_indices, at.positions, (keys, values)),
        *(at.kv_indices, at.kv_indptr, at.kv_last_page_len),
    )


def _by_batch(lse: Any, batch: int, seqlen_q: int) -> Any:
    """[num_heads, batch * seqlen_q] → [batch, num_heads, seqlen_q]."""
    split = lse.reshape((lse.shape[0], batch, seqlen_q))
    if arrays.framework(split) == "numba":
        return split.transpose((1, 0, 2))
    return split.swapaxes(0, 1)
