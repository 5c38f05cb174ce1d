"""Attention inside of JAX's programs: a plan's run as one step of a jitted function."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from cupaged.devices import cupy
from cupaged.paged_attention import PagedAttention

__all__ = ["paged_attention"]


def paged_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    plan: PagedAttention,
    *,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    sinks: Any = None,
    return_lse: bool = False,
    lse_base: str = "log2",
) -> Any:
    """Compute the attention that was planned; works in `jax.jit` as outside of it.

    XLA hands over its buffers, and the kernels are launched on XLA's own stream: nothing is copied
    and nobody waits. A function that was jitted holds the wrapper and computes by the plan that
    this has when it runs; the number of rows of q is that of the trace.

    Parameters
    ----------
    q : jax.Array [nnz_qo, num_qo_heads, head_dim_qk]
    k_pages, v_pages : jax.Array
        As the wrapper's `run()` takes K and V: `[num_pages, page_size, num_kv_heads, head_dim]`
        (NHD) or `[num_pages, num_kv_heads, page_size, head_dim]` (HND); of a plan without pages
        `[nnz_kv, num_kv_heads, head_dim]`.
    plan : BatchPrefillWithPagedKVCacheWrapper, BatchDecodeWithPagedKVCacheWrapper or \
BatchPrefillWithRaggedKVCacheWrapper
        Planned.
    q_scale, k_scale, v_scale : float, optional
        The first two multiply the logits, the third the output.
    sinks : float32 jax.Array [num_qo_heads], optional
        A logit for each head that takes part in the softmax and has no value.
    return_lse : bool
        Return the log-sum-exp too.
    lse_base : {"log2", "ln"}

    Returns
    -------
    out : jax.Array [nnz_qo, num_qo_heads, head_dim_vo]
    lse : float32 jax.Array [nnz_qo, num_qo_heads]
        Only with `return_lse`.

    Raises
    ------
    RuntimeError
        There is no plan yet.
    TypeError, ValueError
        An array doesn't fit the plan. What its shape and dtype show is said when a function is
        traced; what is found when it runs comes as an error of JAX's with it inside.

    Notes
    -----
    Neither gradients nor `jax.vmap` go through it; JAX says so.
    """
    planned = plan._plan
    if planned is None:
        raise RuntimeError("paged_attention() before plan()")
    spec = planned.schedule.spec
    shape, dtype = (planned.nnz_qo, spec.num_qo_heads, spec.head_dim_qk), jnp.dtype(spec.dtype)
    if q.shape != shape or q.dtype != dtype:
        raise ValueError(
            f"q is {q.dtype} {list(q.shape)}, expected {dtype} {list(shape)} as planned"
        )
    rows = shape[:2]
    out = jax.ShapeDtypeStruct((*rows, spec.head_dim_vo), dtype)
    lse = jax.ShapeDtypeStruct(rows, jnp.float32)
    scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "lse_base": lse_base}
    ragged = k_pages.ndim == 3

    def attend(context: Any, results: Any, *buffers: Any) -> None:
        # Under the callback no function of JAX may be called.
        try:
            stream = context.stream
        except jax.errors.JaxRuntimeError:  # on the host there is none
            run(list(map(np.asarray, results)), list(map(np.asarray, buffers)))
            return
        targets, arrays = list(map(_on_device, results)), list(map(_on_device, buffers))
        device = targets[0].device
        with device, cupy().cuda.ExternalStream(stream, device.id):
            run(targets, arrays)

    def run(results: list[Any], arrays: list[Any]) -> None:
        queries, keys, values, *rest = arrays
        options = {**scales, "out": results[0], "lse": results[1] if return_lse else None}
        if rest:
            options["sinks"] = rest[0]
        cache = (keys, values) if ragged else ((keys, values),)
        plan.run(queries, *cache, **options)

    arguments = (q, k_pages, v_pages, *(() if sinks is None else (sinks,)))
    result = buffer_callback(attend, (out, lse) if return_lse else (out,))(*arguments)
    return tuple(result) if return_lse else result[0]


def _on_device(buffer: Any) -> Any:
    """A buffer of XLA's as a CuPy array."""
    dtype = np.dtype(buffer.dtype)
    # Only where it lies is asked for: the interface has no name for bfloat16.
    pointer, _ = buffer.__cuda_array_interface__["data"]
    memory = cupy().cuda.UnownedMemory(pointer, math.prod(buffer.shape) * dtype.itemsize, buffer)
    return cupy().ndarray(buffer.shape, dtype, cupy().cuda.MemoryPointer(memory, 0))
