"""Attention inside of JAX's programs: a plan's run as one step of a jitted function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from cupaged import dlpack, validate, validate_run
from cupaged.backend import Plan
from cupaged.devices import cupy
from cupaged.paged_attention import PagedAttention
from cupaged.spec import DTYPES

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
    this has when it runs, which may be later than the call: `jax.block_until_ready` the results of
    a plan before the next `plan()`. The number of rows of q is that of the trace.

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
        An argument doesn't fit the plan, in the words of `run()`. What shapes and dtypes show is
        said when a function is traced; what is found when it runs, by a later plan or on the
        device, comes as an error of JAX's with it inside.

    Notes
    -----
    Neither gradients nor `jax.vmap` go through it; JAX says so.
    """
    if not isinstance(plan, PagedAttention):
        raise TypeError(f"plan is {validate.what(plan)}, expected a wrapper that was planned")
    planned = plan._plan
    if planned is None:
        raise RuntimeError("paged_attention() before plan()")
    spec = planned.spec
    if sinks is None and plan.needs_sinks:
        raise TypeError("sinks is None, expected a float32 array [num_qo_heads]")
    num_rows = _check(plan, planned, (q, k_pages, v_pages), sinks)
    validate.logit_scale(spec.sm_scale, q_scale, k_scale)
    factors = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    attend = _Attend(
        plan,
        **{name: None if x is None else validate.scale(x, name) for name, x in factors.items()},
        lse_base=validate.choice(lse_base, "lse_base", ("log2", "ln")),
        return_lse=validate.flag(return_lse, "return_lse"),
    )
    rows = (num_rows, spec.num_qo_heads)
    results = [jax.ShapeDtypeStruct((*rows, spec.head_dim_vo), DTYPES[spec.dtype])]
    if return_lse:
        results.append(jax.ShapeDtypeStruct(rows, DTYPES["float32"]))
    arguments = (q, k_pages, v_pages, *(() if sinks is None else (sinks,)))
    out, *lse = buffer_callback(attend, results)(*arguments)
    return (out, *lse) if return_lse else out


@dataclass(frozen=True)
class _Attend:
    """What XLA calls. Calls alike are equal: JAX keeps a program for each, and makes no other.

    Under the callback no function of JAX may be called.
    """

    wrapper: PagedAttention
    q_scale: float | None
    k_scale: float | None
    v_scale: float | None
    lse_base: str
    return_lse: bool

    def __call__(self, context: Any, results: list[Any], *buffers: Any) -> None:
        device_type, device = map(int, results[0].__dlpack_device__())
        if device_type in dlpack.HOST:
            self._run(list(map(np.asarray, results)), list(map(np.asarray, buffers)))
            return
        with cupy().cuda.Device(device), cupy().cuda.ExternalStream(context.stream, device):
            self._run(
                [_on_device(buffer, device) for buffer in results],
                [_on_device(buffer, device) for buffer in buffers],
            )

    def _run(self, results: list[Any], arrays: list[Any]) -> None:
        q, k, v, *sinks = arrays
        self.wrapper.attend(
            *(q, (k, v), self.q_scale, self.k_scale, self.v_scale),
            *(results[0], results[1] if self.return_lse else None, False, self.lse_base),
            sinks[0] if sinks else None,
        )


def _check(wrapper: PagedAttention, plan: Plan, arrays: tuple[Any, ...], sinks: Any) -> int:
    """Check shapes and dtypes as `run()` does; returns q's rows."""
    spec = plan.spec
    q, k, v = map(_like, arrays, ("q", *wrapper._kv_names))
    num_rows = validate_run.query(
        *(q, spec, plan.nnz_qo, wrapper._rows_are, wrapper._names.head_dim),
        more=wrapper.is_cuda_graph_enabled,
    )
    _, _, num_pages = wrapper._keys_and_values((k, v), q, spec)
    if plan.highest_page >= num_pages:
        wrapper.check_pages(plan, num_pages)
    if sinks is not None:
        validate_run.sinks(_like(sinks, "sinks"), spec, None)
    return num_rows


def _like(x: Any, name: str) -> Any:
    """A contiguous array of the shape and dtype of one that is being traced; nobody reads it."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} is {validate.what(x)}, expected a JAX array")
    dtype = np.dtype(x.dtype)
    strides = [dtype.itemsize * math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim)]
    # As raw bytes first: the array interface has no name for float8_e5m2.
    raw = np.empty(1, f"V{dtype.itemsize}")
    return np.lib.stride_tricks.as_strided(raw, x.shape, strides).view(dtype)


def _on_device(buffer: Any, device: int) -> Any:
    """A buffer of XLA's as a CuPy array."""
    dtype = np.dtype(buffer.dtype)
    # By DLPack: the CUDA array interface fails for float8, for which it has no name.
    pointer = dlpack.address(buffer.__dlpack__())
    size = math.prod(buffer.shape) * dtype.itemsize
    memory = cupy().cuda.UnownedMemory(pointer, size, buffer, device)
    return cupy().ndarray(buffer.shape, dtype, cupy().cuda.MemoryPointer(memory, 0))
