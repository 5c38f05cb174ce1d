"""Launches a plan's kernels on a call's arrays."""

from __future__ import annotations

import functools
import operator
import struct
from typing import Any

import numpy as np

from cupaged import tensor_maps
from cupaged.device_plan import MAPS_BEGIN, PARAMS_BEGIN, PlacedPlan
from cupaged.devices import cupy, is_recorded
from cupaged.graph_plan import GraphPlan
from cupaged.kernel_spec import PARAMS_DTYPE, field_offset

#: What a kernel loads and stores at a time, in bytes; every row must begin at a multiple of it.
_ROW_ALIGNMENT = 16

# The fields of PARAMS_DTYPE that a call decides, in their order: five pointers and twelve strides;
# a pointer, a flag and seven factors.
_TENSORS = struct.Struct("5Q12q")
_FACTORS = struct.Struct("Qi7f")
_FACTORS_BEGIN = PARAMS_BEGIN + field_offset(PARAMS_DTYPE, "sinks")

#: What goes with a soft cap, where there is none.
_NO_CAP = (0.0,) * 4

#: The smallest float32 that isn't subnormal. A scale of 0 becomes this: products vanish beside
#: 1 all the same, and -inf stays -inf.
_SMALLEST_SCALE = 2.0**-126


def run(
    plan: PlacedPlan,
    stream: int,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any | None,
    factors: tuple[float, float, float],
    sinks: Any | None = None,
) -> bool:
    """Launch a plan's kernels.

    Parameters
    ----------
    plan : PlacedPlan
    stream : int
        The current one, on the plan's device.
    q, k, v, out, lse : cupy.ndarray
        On the plan's device; K and V in the plan's layout, or contiguous rows `[nnz_kv,
        num_kv_heads, head_dim]`. Rows of q and out that don't begin at multiples of 16 bytes go by
        way of a copy.
    factors : tuple of float
        What multiplies `q·k` in base 2, the output, and the base-2 LSE.
    sinks : cupy.ndarray, optional
        float32 [num_qo_heads], contiguous.

    Returns
    -------
    bool
        A CUDA graph holds the launches.

    Raises
    ------
    RuntimeError
        A CUDA graph is being recorded, and can't hold this plan's launches.
    ValueError
        K's or V's rows don't begin at multiples of 16 bytes; in the recording of a CUDA graph, q's
        or out's.
    """
    # Each of an array's properties takes CuPy a while: none is asked for twice.
    q_pointer, k_pointer, v_pointer, out_pointer = q.data.ptr, k.data.ptr, v.data.ptr, out.data.ptr
    (q_row, q_head, _), (out_row, out_head, _) = q.strides, out.strides
    k_strides, v_strides = k.strides, v.strides
    if plan.ragged:
        # A request's one page begins at any row.
        k_strides, v_strides = (k_strides[0], *k_strides), (v_strides[0], *v_strides)
    (k_page, k_token, k_head, _), (v_page, v_token, v_head, _) = k_strides, v_strides
    bits = q_pointer | k_pointer | v_pointer | out_pointer | q_row | q_head | out_row | out_head
    if (bits | k_page | k_token | k_head | v_page | v_token | v_head) % _ROW_ALIGNMENT:
        return _run_unaligned(plan, stream, q, k, v, out, lse, factors, sinks)
    if plan.heads_first:
        k_token, k_head, v_token, v_head = k_head, k_token, v_head, v_token
    lse_pointer, (lse_row, lse_head) = (0, (0, 0)) if lse is None else (lse.data.ptr, lse.strides)
    kv_itemsize = plan.kv_itemsize
    tensors = (
        *(q_pointer, k_pointer, v_pointer, out_pointer, lse_pointer),
        *(q_row // 2, q_head // 2),
        *(k_page // kv_itemsize, k_token // kv_itemsize, k_head // kv_itemsize),
        *(v_page // kv_itemsize, v_token // kv_itemsize, v_head // kv_itemsize),
        *(out_row // 2, out_head // 2, lse_row // 4, lse_head // 4),
    )
    logit_scale, v_scale, lse_scale = factors
    sinks_pointer = 0 if sinks is None else sinks.data.ptr
    if plan.transform.is_on:
        numbers = (sinks_pointer, False, *plan.transform.factors(logit_scale), v_scale, lse_scale)
    else:
        magnitude = max(abs(logit_scale), _SMALLEST_SCALE)
        numbers = (sinks_pointer, logit_scale < 0, magnitude, *_NO_CAP, v_scale, lse_scale)
    cuda = cupy().cuda
    waits = stream != plan.stream.ptr
    recorded = is_recorded(stream)
    if recorded:
        if waits and not isinstance(plan, GraphPlan):
            raise RuntimeError(
                "run() is being recorded in a CUDA graph on another stream than plan()'s: "
                "construct the wrapper with use_cuda_graph=True"
            )
        if not plan.recordable:
            raise RuntimeError(
                "run() is being recorded in a CUDA graph after reset_workspace_buffer(): "
                "plan() before"
            )
        waits = False  # who replays the graph orders it behind the plan
    if waits:
        cuda.get_current_stream().wait_event(plan.uploaded)
    for ready in plan.launches:
        function = ready.function
        maps = None
        if ready.box_rows:
            maps = tensor_maps.pair(
                *(k_pointer, v_pointer, len(k), plan.page_shape),
                *(k_page, k_token, k_head, v_page, v_token, v_head, ready.box_rows),
            )
            if maps is None:
                function = plan.without_maps(ready.config, recorded)
        memory, address = argument = ready.arguments.take()
        _TENSORS.pack_into(memory, PARAMS_BEGIN, *tensors)
        _FACTORS.pack_into(memory, _FACTORS_BEGIN, *numbers)
        if maps is not None:
            memory[MAPS_BEGIN:] = maps
        cuda.driver.launchKernel(
            *(function, ready.grid, 1, 1, ready.num_threads, 1, 1, ready.shared_bytes),
            *(stream, address, 0),
        )
        ready.arguments.put_back(argument)
    if waits:
        # The plan's memory is freed in the order of the stream it was made on.
        plan.stream.wait_event(cuda.get_current_stream().record())
    return recorded


def _run_unaligned(
    plan: PlacedPlan,
    stream: int,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any | None,
    factors: tuple[float, float, float],
    sinks: Any | None,
) -> bool:
    """Run by way of aligned copies of q and out; K and V are too large to be copied unasked.

    Bits are copied: CuPy's own kernels for 16-bit floats need CUDA's headers, which need not be
    installed.
    """
    q, k, v, target = map(_without_idle_strides, (q, k, v, out))
    check_aligned(k, v)
    if is_recorded(stream):
        for name, rows in (("q", q), ("out", target)):
            if not _aligned(rows):
                raise ValueError(
                    f"{name} begins at address {rows.data.ptr:#x} with strides {rows.strides} in "
                    f"bytes, expected multiples of {_ROW_ALIGNMENT}: a CUDA graph can't hold the "
                    "copy that it would go by way of"
                )
    if not _aligned(q):
        q = q.view(np.uint16).copy(order="C").view(q.dtype)
    if _aligned(target):
        return run(plan, stream, q, k, v, target, lse, factors, sinks)
    result = cupy().empty(out.shape, out.dtype)
    run(plan, stream, q, k, v, result, lse, factors, sinks)
    out.view(np.uint16)[...] = result.view(np.uint16)
    return False


def check_aligned(k: Any, v: Any, names: tuple[str, str] = ("k cache", "v cache")) -> None:
    """Refuse K and V on a device that no kernel can read.

    Raises
    ------
    ValueError
        A row doesn't begin at a multiple of 16 bytes.
    """
    # Both at once, for what is called layer after layer; strides that say nothing come later.
    bits = functools.reduce(operator.or_, (*k.strides[:-1], *v.strides[:-1]), k.data.ptr)
    if not (bits | v.data.ptr) % _ROW_ALIGNMENT:
        return
    for name, array in zip(names, (k, v), strict=True):
        if not _aligned(array):
            raise ValueError(
                f"{name} begins at address {array.data.ptr:#x} with strides {array.strides} in "
                f"bytes, expected multiples of {_ROW_ALIGNMENT}"
            )


def _without_idle_strides(array: Any) -> Any:
    """A view whose axes of length 1 have a stride of 0: whatever it was, nothing is at it."""
    strides = [
        0 if length == 1 else stride
        for length, stride in zip(array.shape[:-1], array.strides, strict=False)
    ]
    return cupy().ndarray(array.shape, array.dtype, array.data, (*strides, array.itemsize))


def _aligned(array: Any) -> bool:
    """Whether every row begins at a multiple of `_ROW_ALIGNMENT` bytes.

    Nothing is at the stride of an axis of length 1.
    """
    rows = zip(array.shape[:-1], array.strides, strict=False)
    strides = (stride for length, stride in rows if length != 1)
    bits = functools.reduce(operator.or_, strides, array.data.ptr)
    return bool(bits % _ROW_ALIGNMENT == 0)
