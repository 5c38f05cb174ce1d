"""Planning of a decode batch from lengths that are on the host, by FlashInfer's name for that."""

from __future__ import annotations

from typing import Any

from cupaged import arrays, validate_lengths
from cupaged.decode import BatchDecodeWithPagedKVCacheWrapper


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: Any,
    indices: Any,
    last_page_len: Any,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: Any = None,
    kv_data_type: Any = None,
    data_type: Any = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: Any = None,
) -> None:
    """`BatchDecodeWithPagedKVCacheWrapper.plan()` where `indptr` is known on the host.

    Also with a wrapper whose `plan` this function has taken the place of, as FlashInfer's callers
    have it: `wrapper.plan = functools.partial(fast_decode_plan, wrapper)`.

    Parameters
    ----------
    self : BatchDecodeWithPagedKVCacheWrapper
    q_data_type : dtype or str, optional
        By default "float16", or what `data_type` says of it.
    global_override_indptr_cpu : int array [batch + 1], optional
        What `indptr` holds, on the host; `indptr` is then not read, which would wait for the
        device.
    indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, \
pos_encoding_mode, window_left, logits_soft_cap, kv_data_type, data_type, sm_scale, rope_scale, \
rope_theta, non_blocking, fixed_split_size, disable_split_kv, q_len_per_req
        As `plan()` takes them.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, BackendUnavailableError
        As `plan()` does.

    Warns
    -----
    CupagedWarning
        As `plan()` does.
    """
    override = global_override_indptr_cpu
    try:
        type(self).plan(
            self,
            *(indptr if override is None else override, indices, last_page_len),
            *(num_qo_heads, num_kv_heads, head_dim, page_size),
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            q_data_type="float16" if q_data_type is None else q_data_type,
            kv_data_type=kv_data_type,
            data_type=data_type,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            non_blocking=non_blocking,
            fixed_split_size=fixed_split_size,
            disable_split_kv=disable_split_kv,
            q_len_per_req=q_len_per_req,
        )
    except (TypeError, ValueError):
        if override is not None:  # it may be what is wrong, and has another name here
            name = "global_override_indptr_cpu"
            validate_lengths.check_indptr(arrays.import_index(override, name), name)
        raise
