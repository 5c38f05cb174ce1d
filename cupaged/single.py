"""Attention of one request whose keys and values have no pages: FlashInfer's functions for that."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged import arrays, single_plans, unserved, validate, validate_lengths
from cupaged.opaque import opaque
from cupaged.spec import DTYPES, FLOAT8_DTYPES, RAGGED, SERVED_DTYPES, AttentionSpec
from cupaged.validate_lengths import SINGLE_NAMES
from cupaged.validate_run import words_of_dtype

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KV_DTYPES = (*SERVED_DTYPES, *FLOAT8_DTYPES)


@opaque
def single_prefill_with_kv_cache(
    q: Any,
    k: Any,
    v: Any,
    scale_q: Any = None,
    scale_k: Any = None,
    scale_v: Any = None,
    o_dtype: Any = None,
    custom_mask: Any = None,
    packed_custom_mask: Any = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: Any = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    sinks: Any = None,
) -> Any:
    """Attention of one request.

    The last plans are kept: a call with shapes, dtypes and options of one before, of the same
    thread on the same stream, doesn't plan. With a custom mask every call does.

    Parameters
    ----------
    q : array [qo_len, num_qo_heads, head_dim_qk]
        float16 or bfloat16.
    k : array [kv_len, num_kv_heads, head_dim_qk] (NHD) or [num_kv_heads, kv_len, head_dim_qk]
        Of q's dtype, or of a float8.
    v : array [kv_len, num_kv_heads, head_dim_vo] (NHD) or [num_kv_heads, kv_len, head_dim_vo]
        Of k's dtype.
    o_dtype : dtype or str, optional
        Must be q's.
    custom_mask : bool array [qo_len, kv_len] or flattened, optional
        Which keys each query row sees, beside what `causal` and `window_left` say.
    packed_custom_mask : uint8 array [ceil(qo_len * kv_len / 8)], optional
        The same as little-endian bits.
    return_lse : bool
        Return the log-sum-exp of the logits too, base 2.
    causal, kv_layout, pos_encoding_mode, sm_scale, window_left, logits_soft_cap, rope_scale, \
rope_theta, backend, k_scale, v_scale, sinks
        As `BatchPrefillWithRaggedKVCacheWrapper` takes them.
    scale_q, scale_k, scale_v, use_fp16_qk_reduction, kv_cache_sf
        Not served; anything but the default raises `NotImplementedError`.

    Returns
    -------
    out : array [qo_len, num_qo_heads, head_dim_vo]
        The kind of array that q is. A row that sees no key is 0.
    lse : float32 array [qo_len, num_qo_heads]
        Only with `return_lse`. A row that sees no key has -inf.

    Raises
    ------
    TypeError, ValueError
        Names the argument, what was expected and what came.
    RuntimeError
        A CUDA graph is being recorded, and no plan is kept, or there is a custom mask.
    NotImplementedError
        A legal request that no backend serves.
    BackendUnavailableError
        Device arrays without a GPU or NVRTC that serve them.

    Warns
    -----
    CupagedWarning
        `causal` with more queries than keys.

    Notes
    -----
    A call may be recorded in a CUDA graph once the same thread has made one alike, on any stream;
    replays have to come behind that one. The graph's plan is its own, and stays until the process
    ends; recorded again on the same stream without another call before, graphs share one, and must
    not be replayed at once.
    """
    unserved.refuse(
        unserved.SINGLE_PREFILL, (scale_q, scale_k, scale_v, use_fp16_qk_reduction, kv_cache_sf)
    )
    return _attend(
        "single_prefill_with_kv_cache",
        *(q, k, v, ("qo_len", "num_qo_heads"), kv_layout, backend),
        {"k_scale": k_scale, "v_scale": v_scale, "return_lse": return_lse, "sinks": sinks},
        o_dtype=o_dtype,
        custom_mask=custom_mask,
        packed_custom_mask=packed_custom_mask,
        causal=causal,
        pos_encoding_mode=pos_encoding_mode,
        sm_scale=sm_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
    )


def single_prefill_with_kv_cache_return_lse(*args: Any, **options: Any) -> Any:
    """`single_prefill_with_kv_cache()` with `return_lse=True`."""
    return single_prefill_with_kv_cache(*args, **options | {"return_lse": True})


@opaque
def single_decode_with_kv_cache(
    q: Any,
    k: Any,
    v: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
    sinks: Any = None,
) -> Any:
    """Attention of the newest token of one request.

    Plans are kept, and calls recorded in CUDA graphs, as with `single_prefill_with_kv_cache()`.

    Parameters
    ----------
    q : array [num_qo_heads, head_dim_qk]
        float16 or bfloat16.
    k : array [kv_len, num_kv_heads, head_dim_qk] (NHD) or [num_kv_heads, kv_len, head_dim_qk]
        Of q's dtype, or of a float8.
    v : array [kv_len, num_kv_heads, head_dim_vo] (NHD) or [num_kv_heads, kv_len, head_dim_vo]
        Of k's dtype.
    use_tensor_cores : bool
        For FlashInfer's callers; the kernels use tensor cores either way.
    return_lse : bool
        Return the log-sum-exp of the logits too, base 2.
    kv_layout, pos_encoding_mode, q_scale, k_scale, v_scale, window_left, logits_soft_cap, \
sm_scale, rope_scale, rope_theta, sinks
        As `BatchPrefillWithRaggedKVCacheWrapper` takes them.

    Returns
    -------
    out : array [num_qo_heads, head_dim_vo]
        The kind of array that q is; 0 where there is no key.
    lse : float32 array [num_qo_heads]
        Only with `return_lse`; -inf where there is no key.

    Raises
    ------
    TypeError, ValueError
        Names the argument, what was expected and what came.
    RuntimeError
        A CUDA graph is being recorded, and no plan is kept.
    NotImplementedError
        A legal request that no backend serves.
    BackendUnavailableError
        Device arrays without a GPU or NVRTC that serve them.
    """
    validate.flag(use_tensor_cores, "use_tensor_cores")
    scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    result = _attend(
        "single_decode_with_kv_cache",
        *(q, k, v, ("num_qo_heads",), kv_layout, "auto"),
        {**scales, "return_lse": return_lse, "sinks": sinks},
        pos_encoding_mode=pos_encoding_mode,
        sm_scale=sm_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
    )
    if not return_lse:
        return result.reshape(result.shape[1:])
    return tuple(x.reshape(x.shape[1:]) for x in result)


def _attend(
    function: str,
    q: Any,
    k: Any,
    v: Any,
    axes: tuple[str, ...],
    kv_layout: str,
    backend: str,
    run_options: dict[str, Any],
    *,
    o_dtype: Any = None,
    causal: bool = False,
    **options: Any,
) -> Any:
    """`run()` of a plan that is kept or made.

    Parameters
    ----------
    function : str
        The public function's name.
    q, k, v, kv_layout, backend
        As that one takes them.
    axes : tuple of str
        Of q, but for the last one.
    run_options : dict
        Of the wrapper's `run()`.
    o_dtype, causal, **options
        Of the plan, as `single_prefill_with_kv_cache()` takes them.
    """
    validate.flag(run_options["return_lse"], "return_lse")
    wrapper = _wrapper(q, kv_layout, backend)
    (qo_len, kv_len), geometry, dtypes = _describe(q, k, v, kv_layout, axes)
    spec = _spec(geometry, dtypes, o_dtype, causal, **options)
    place = single_plans.place_of(q)
    call = single_plans.Call(spec, qo_len, kv_len, kv_layout, backend)
    kept = None
    if spec.custom_mask:
        single_plans.refuse_recorded_mask(place, function)
    else:
        kept = single_plans.find(call, place, function)
    if kept is None:
        wrapper._plan_rows(
            *([0, qo_len], [0], [kv_len]),
            *geometry,
            q_data_type=dtypes[0],
            kv_data_type=dtypes[1],
            causal=causal,
            **options,
            given=(q,),
            names=SINGLE_NAMES,
        )
    else:
        wrapper = kept
        assert wrapper._plan is not None
        lengths = wrapper._plan.lengths
        validate_lengths.warn_of_too_few_keys(spec, lengths, SINGLE_NAMES)
    rows = q if len(axes) == 2 else _one_row(q)
    result = wrapper.run(rows, k, v, **run_options)
    if kept is None and not spec.custom_mask:
        single_plans.keep(call, place, wrapper)
    return result


def _one_row(q: Any) -> Any:
    """The queries of one token with an axis for it; what can't be reshaped is imported."""
    array = q if hasattr(q, "reshape") else arrays.import_tensor(q, "q")
    return array.reshape((1, *array.shape))


def _spec(
    geometry: tuple[int, int, int, int],
    dtypes: tuple[str, str],
    o_dtype: Any,
    causal: bool,
    *,
    custom_mask: Any = None,
    packed_custom_mask: Any = None,
    pos_encoding_mode: str,
    sm_scale: float | None,
    window_left: int,
    logits_soft_cap: float | None,
    rope_scale: float | None,
    rope_theta: float | None,
) -> AttentionSpec:
    """What a plan will be of, checked as `_plan_rows()` does: equal ones are served by one plan."""
    masked = custom_mask is not None or packed_custom_mask is not None
    if o_dtype is not None and (out := arrays.dtype_name(o_dtype, "o_dtype")) != dtypes[0]:
        raise NotImplementedError(
            f"o_dtype = {out} differs from that of q, {dtypes[0]}, which no backend serves"
        )
    return validate.attention_spec(
        *(*geometry, RAGGED, causal, sm_scale),
        (*dtypes, dtypes[0]),
        "NHD",
        SINGLE_NAMES.head_dim,
        validate.Features(
            *(window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta, masked)
        ),
    )


def _wrapper(q: Any, kv_layout: str, backend: str) -> single_plans.SingleRequestWrapper:
    """A wrapper that plans for where q is."""
    auto = isinstance(backend, str) and backend == "auto"
    if auto and arrays.device_id(arrays.import_tensor(q, "q")) is None:
        backend = "reference"
    return single_plans.SingleRequestWrapper(kv_layout=kv_layout, backend=backend)


def _describe(
    q: Any, k: Any, v: Any, kv_layout: str, axes: tuple[str, ...]
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[str, str]]:
    """Lengths, heads and dtypes of one request's arrays, in the order of `_plan_rows()`.

    `axes` are q's but for the last one.
    """
    found = []
    kv_axes = ("kv_len", "num_kv_heads") if kv_layout == "NHD" else ("num_kv_heads", "kv_len")
    for name, x, names in (("q", q, axes), ("k", k, kv_axes), ("v", v, kv_axes)):
        array = arrays.import_tensor(x, name)
        if array.ndim != len(names) + 1:
            raise ValueError(
                f"{name} has shape {array.shape}, expected ({', '.join(names)}, head_dim)"
            )
        found.append(array)
    queries, keys, values = found
    rows = kv_axes.index("kv_len")
    kv_len, num_kv_heads = keys.shape[rows], keys.shape[1 - rows]
    if values.shape[rows] != kv_len:
        raise ValueError(f"v has {values.shape[rows]} rows, expected {kv_len} as k does")
    head_dim, k_head_dim = queries.shape[-1], keys.shape[-1]
    if k_head_dim != head_dim:
        raise ValueError(f"k has head_dim {k_head_dim}, expected {head_dim} as q has")
    qo_len = queries.shape[0] if len(axes) == 2 else 1
    return (
        (qo_len, kv_len),
        (queries.shape[-2], num_kv_heads, head_dim, values.shape[-1]),
        _dtypes(queries, keys, values),
    )


def _dtypes(queries: Any, keys: Any, values: Any) -> tuple[str, str]:
    """Names of the dtypes of q, and of k and v."""
    q, k = _dtype(queries, "q", SERVED_DTYPES), _dtype(keys, "k", _KV_DTYPES)
    if k != q and k not in FLOAT8_DTYPES:
        raise NotImplementedError(
            f"k is {k}, served are {q} as q is and {', '.join(FLOAT8_DTYPES)}"
        )
    # The bits of a float8 are taken for it.
    if values.dtype != keys.dtype and (values.dtype != np.uint8 or k not in FLOAT8_DTYPES):
        raise TypeError(f"v is {words_of_dtype(values)}, expected {k} as k is")
    return q, k


def _dtype(array: Any, name: str, served: tuple[str, ...]) -> str:
    found = _NAMES.get(array.dtype)
    if found not in served:
        raise TypeError(f"{name} is {words_of_dtype(array)}, expected one of {', '.join(served)}")
    return found
