"""xFormers' door: its attention over block-diagonal and paged masks.

`memory_efficient_attention_forward` takes xFormers' own biases, known by their classes' names, and
the twins of `cupaged.xformers.attn_bias`, for where xFormers is absent.
"""

from __future__ import annotations

import math
from typing import Any

from cupaged import arrays, door, validate, validate_run
from cupaged.dtypes import dtype_name
from cupaged.opaque import opaque
from cupaged.xformers import attn_bias
from cupaged.xformers.attn_bias import *  # noqa: F403  its __all__ is its twins
from cupaged.xformers.reading import read

__all__ = ["attn_bias", "memory_efficient_attention_forward", *attn_bias.__all__]

Array = Any  # a numpy.ndarray or a cupy.ndarray

_BATCH, _ROWS, _GROUPS, _HEADS = range(4)


@opaque
def memory_efficient_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> Any:
    """Attention, as xFormers' function of this name has it.

    Parameters
    ----------
    query : array [batch, num_queries, num_heads, head_dim]
        Or `[batch, num_queries, groups, heads of a group, head_dim]`, or without heads,
        `[batch, num_queries, head_dim]`. float16 or bfloat16.
    key : array [batch, num_keys, num_heads, head_dim]
    value : array [batch, num_keys, num_heads, head_dim_vo]
        With as many axes as `query`. The heads of a group share one of K and V where that axis is
        of size 1, or broadcast; so do all heads. With pages, `num_keys` is of all pages.
    attn_bias : None or attention bias
        xFormers' own or a twin. A block-diagonal one is of `batch` 1.
    p : float
        Must be 0: there is no dropout.
    scale : float, optional
        What multiplies `q·k`; by default `1 / sqrt(head_dim)`.
    op
        Must be None: the library chooses its kernels.
    output_dtype : dtype, optional
        Must be the query's.

    Returns
    -------
    array [batch, num_queries, num_heads, head_dim_vo]
        With the query's axes and of its kind. A row that sees no key is 0, where xFormers has NaN
        or leaves it open.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or has a wrong value; names it.
    NotImplementedError
        A legal request that no backend serves.
    RuntimeError
        A CUDA graph is being captured: the lengths would stay what they are now.
    BackendUnavailableError
        Device arrays without a GPU or NVRTC that serve them.

    Notes
    -----
    Every call reads a bias's lengths, from the lists on the host that xFormers keeps beside its
    tensors, so that a bias changed in place by xFormers' own methods is seen. A call of the same
    lengths, as for the next layer, finds its plan again; eight are kept. A page table of CuPy, or
    of PyTorch made in inference mode, is read too, which waits for the device; any other of
    PyTorch's is read again once PyTorch has counted a change of it.

    Arrays are copied where strides can't say their heads as one axis, or their batches and rows.

    A mask that `causal` and a window can't say becomes bits: causal from the top left with more
    queries than keys, a window to the right of the diagonal.
    """
    _refuse(p, op)
    q, k, v = (
        arrays.import_tensor(x, name, query)
        for name, x in (("query", query), ("key", key), ("value", value))
    )
    _check_shapes(q.shape, k.shape, v.shape)
    device = validate_run.one_device(q, k, v, ("key", "value"))
    dtype, kv_dtype = _dtypes(q, k, v, output_dtype)
    current, stream = arrays.on_stream_of(query, device)
    with current:
        batch, num_queries, *heads, head_dim = q.shape
        num_keys, num_heads = k.shape[1], math.prod(heads)
        shape = (*q.shape[:-1], v.shape[-1])
        k, v = _shared_heads(_with_groups(k), _with_groups(v))
        # A batch without keys is no page.
        flat = not num_keys or (_is_flat(k) and _is_flat(v))
        reading = read(attn_bias, batch, num_queries, num_keys, flat)
        call = door.Call(
            *(num_heads, k.shape[2], head_dim, v.shape[-1], dtype, kv_dtype),
            sm_scale=None if scale is None else validate.factor(scale, "scale"),
        )
        plan = door.planned(
            *(call, (device, stream), reading.key, reading.describe, reading.owners),
            names=("query", "key", "value"),
        )
        k, v = (_rows_or_pages(x, reading.page_size) for x in (k, v))
        door.check_pages(plan, len(k))
        q = door.reshaped(q, (batch * num_queries, num_heads, head_dim))
        return door.attend(plan, query, q, k, v, shape, want_lse=False)[0]


def _refuse(p: Any, op: Any) -> None:
    if validate.scale(p, "p") != 0:
        raise NotImplementedError(f"p = {p}, served is 0: there is no dropout")
    if op is not None:
        raise NotImplementedError(f"op = {op!r}, served is None: the library chooses its kernels")


def _dtypes(q: Array, k: Array, v: Array, output_dtype: Any) -> tuple[str, str]:
    """Names of the dtypes of the query, and of key and value."""
    dtype = dtype_name(q.dtype, "query's dtype")
    kv_dtype = dtype_name(k.dtype, "key's dtype")
    if v.dtype != k.dtype:
        raise TypeError(f"value is {v.dtype}, expected {k.dtype} as key is")
    if output_dtype is not None and dtype_name(output_dtype, "output_dtype") != dtype:
        raise NotImplementedError(f"output_dtype = {output_dtype}, served is query's, {dtype}")
    return dtype, kv_dtype


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    if len(q) not in (3, 4, 5):
        raise ValueError(
            f"query has shape {q}, expected (batch, rows, head_dim), (batch, rows, heads, "
            "head_dim) or (batch, rows, groups, heads, head_dim)"
        )
    # The heads of a group may come as one, which is then all of theirs.
    heads = {q[2:-1], (*q[2:-2], 1)} if len(q) == 5 else {q[2:-1]}
    if len(k) != len(q) or k[0] != q[0] or k[-1] != q[-1] or k[2:-1] not in heads:
        words = ", ".join(str(size) for size in (*q[2:-1], q[-1]))
        raise ValueError(f"key has shape {k}, expected ({q[0]}, rows, {words}): query has {q}")
    if v[:-1] != k[:-1]:
        words = ", ".join(str(size) for size in k[:-1])
        raise ValueError(f"value has shape {v}, expected ({words}, head_dim): key has {k}")


def _with_groups(x: Array) -> Array:
    """`[batch, rows, groups, heads of a group, head_dim]`."""
    if x.ndim == 5:
        return x
    return x[:, :, None, None] if x.ndim == 3 else x[:, :, :, None]


def _shared_heads(k: Array, v: Array) -> tuple[Array, Array]:
    """K and V `[batch, rows, num_kv_heads, head_dim]`, each head once.

    Heads that are broadcast are one. Those of a group have to be: query heads of a KV head lie
    side by side.
    """
    for axis in (_HEADS, _GROUPS):
        if not all(x.shape[axis] == 1 or x.strides[axis] == 0 for x in (k, v)):
            break
        index = (*(slice(None),) * axis, slice(0, 1))
        k, v = k[index], v[index]
    k, v = (
        door.reshaped(x, (*x.shape[:2], x.shape[_GROUPS] * x.shape[_HEADS], x.shape[-1]))
        for x in (k, v)
    )
    return k, v


def _is_flat(x: Array) -> bool:
    """Whether a batch's rows lie behind the last one's, at the same distance."""
    flat: bool = len(x) <= 1 or x.strides[_BATCH] == x.shape[_ROWS] * x.strides[_ROWS]
    return flat


def _rows_or_pages(x: Array, page_size: int | None) -> Array:
    batch, rows, *heads = x.shape
    if page_size is None:
        return door.reshaped(x, (batch * rows, *heads))
    return door.reshaped(x, (batch * rows // page_size, page_size, *heads))
