"""Batch prefill over a paged key/value cache: the public wrapper."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np

from cupaged import arrays, schedule, unserved, validate, validate_run
from cupaged import backend as backend_room
from cupaged.spec import DTYPES, KVLayout

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

#: Index arrays that can't be on a device.
_ON_THE_HOST = (np.ndarray, list, tuple, range)


class BatchPrefillWithPagedKVCacheWrapper:
    """Attention of a ragged batch of requests over a paged key/value cache.

    Call `plan()` once for a batch's lengths, then `run()` for every layer.

    Parameters
    ----------
    float_workspace_buffer : array, optional
        Device memory for the partial states of split requests, of any dtype, contiguous. Where it
        is not given, the library allocates what the plan needs. Its device is the one planned for.
    kv_layout : {"NHD", "HND"}
        Order of the cache's axes: `[num_pages, page_size, num_kv_heads, head_dim]` or
        `[num_pages, num_kv_heads, page_size, head_dim]`.
    use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, \
paged_kv_last_page_len_buf, custom_mask_buf, mask_indptr_buf, jit_args, jit_kwargs
        Not served yet; anything but the default raises `NotImplementedError`.
    backend : {"auto", "reference", "cuda"}
        "auto" takes host arrays to the reference backend and device arrays to the GPU.

    Notes
    -----
    A plan's counters and partial states are its own: run one plan on one stream at a time.
    Names and argument orders follow FlashInfer's class of this name.
    """

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Any = None,
        paged_kv_indptr_buf: Any = None,
        paged_kv_indices_buf: Any = None,
        paged_kv_last_page_len_buf: Any = None,
        custom_mask_buf: Any = None,
        mask_indptr_buf: Any = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
    ) -> None:
        unserved.refuse(
            unserved.CONSTRUCTOR,
            (
                use_cuda_graph,
                qo_indptr_buf,
                paged_kv_indptr_buf,
                paged_kv_indices_buf,
                paged_kv_last_page_len_buf,
                custom_mask_buf,
                mask_indptr_buf,
                jit_args,
                jit_kwargs,
            ),
        )
        self._kv_layout = cast(KVLayout, validate.choice(kv_layout, "kv_layout", ("NHD", "HND")))
        self._backend = cast(
            backend_room.Backend, validate.choice(backend, "backend", backend_room.BACKENDS)
        )
        self._plan: backend_room.Plan | None = None
        self.reset_workspace_buffer(float_workspace_buffer)

    def reset_workspace_buffer(self, float_workspace_buffer: Any) -> None:
        """Take another workspace from the next `plan()` on.

        Parameters
        ----------
        float_workspace_buffer : array or None
            As the constructor takes it.
        """
        workspace = None
        if float_workspace_buffer is not None:
            workspace = arrays.import_tensor(float_workspace_buffer, "float_workspace_buffer")
            validate_run.workspace(workspace)
        self._workspace = workspace
        self._workspace_owner = float_workspace_buffer

    def plan(
        self,
        qo_indptr: Any,
        paged_kv_indptr: Any,
        paged_kv_indices: Any,
        paged_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Any = None,
        packed_custom_mask: Any = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        prefix_len_ptr: Any = None,
        token_pos_in_items_ptr: Any = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Any = None,
        seq_lens: Any = None,
        seq_lens_q: Any = None,
        block_tables: Any = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
    ) -> None:
        """Schedule a ragged batch; everything that depends on lengths alone is done here.

        Parameters
        ----------
        qo_indptr : int array [batch + 1]
            Rows of q that belong to each request; begins at 0, never decreases.
        paged_kv_indptr : int array [batch + 1]
            Entries of `paged_kv_indices` that belong to each request.
        paged_kv_indices : int array [>= paged_kv_indptr[-1]]
            Page numbers.
        paged_kv_last_page_len : int array [batch]
            Tokens in each request's last page, 1 to `page_size`.
        num_qo_heads, num_kv_heads : int
            The first a multiple of the second.
        head_dim_qk : {64, 128, 256}
        page_size : int
            Tokens of a page.
        head_dim_vo : int, optional
            Must be `head_dim_qk`.
        causal : bool
            Row `i` sees keys up to `kv_len - qo_len + i`: aligned to the bottom right.
        sm_scale : float, optional
            What multiplies `q·k`; by default `1 / sqrt(head_dim_qk)`.
        q_data_type, kv_data_type, o_data_type : dtype or str
            "float16" or "bfloat16", all three the same; the latter two follow `q_data_type`.
        non_blocking : bool
            False: wait until the plan has arrived on the device.
        fixed_split_size : int, optional
            Pages of a split. A request's bits then don't depend on its batch.
        disable_split_kv : bool
            Never split a request's keys. Its bits then don't depend on its batch.
        custom_mask, packed_custom_mask, pos_encoding_mode, use_fp16_qk_reduction, window_left, \
logits_soft_cap, rope_scale, rope_theta, prefix_len_ptr, token_pos_in_items_ptr, \
token_pos_in_items_len, max_item_len_ptr, seq_lens, seq_lens_q, block_tables, \
max_token_per_sequence, max_sequence_kv, uniform_q_len
            Not served yet; anything but the default raises `NotImplementedError`.

        Raises
        ------
        TypeError, ValueError
            An argument is of the wrong kind or has a wrong value; names it and the request.
        NotImplementedError
            A legal request that no backend serves.
        BackendUnavailableError
            `backend="cuda"` without CuPy, NVRTC or a GPU.

        Warns
        -----
        CupagedWarning
            `causal` with more queries than keys in a request; a page twice in a request.
        """
        unserved.refuse(
            unserved.PLAN,
            (
                custom_mask,
                packed_custom_mask,
                use_fp16_qk_reduction,
                window_left,
                logits_soft_cap,
                rope_scale,
                rope_theta,
                prefix_len_ptr,
                token_pos_in_items_ptr,
                token_pos_in_items_len,
                max_item_len_ptr,
                seq_lens,
                seq_lens_q,
                block_tables,
                max_token_per_sequence,
                max_sequence_kv,
                uniform_q_len,
            ),
        )
        validate.pos_encoding_mode(pos_encoding_mode)
        q_dtype = arrays.dtype_name(q_data_type, "q_data_type")
        dtypes = (
            q_dtype,
            q_dtype if kv_data_type is None else arrays.dtype_name(kv_data_type, "kv_data_type"),
            q_dtype if o_data_type is None else arrays.dtype_name(o_data_type, "o_data_type"),
        )
        spec = validate.attention_spec(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            head_dim_vo,
            page_size,
            causal,
            sm_scale,
            dtypes,
            self._kv_layout,
        )
        disable_split_kv = validate.flag(disable_split_kv, "disable_split_kv")
        non_blocking = validate.flag(non_blocking, "non_blocking")
        if fixed_split_size is not None:
            fixed_split_size = validate.positive_int(fixed_split_size, "fixed_split_size")
            if disable_split_kv:
                raise ValueError("fixed_split_size and disable_split_kv exclude each other")
        lengths = validate.lengths(
            arrays.import_index(qo_indptr, "qo_indptr"),
            arrays.import_index(paged_kv_indptr, "paged_kv_indptr"),
            arrays.import_index(paged_kv_last_page_len, "paged_kv_last_page_len"),
            spec,
        )
        pages, highest = validate.page_indices(
            arrays.import_index(paged_kv_indices, "paged_kv_indices"), lengths
        )
        validate.warn_of_mistakes(spec, lengths, pages, highest)
        device, stream = self._planning_place(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        )
        built = schedule.build(
            spec, lengths, backend_room.device_model(device), fixed_split_size, disable_split_kv
        )
        if self._workspace is not None:
            validate_run.workspace_size(self._workspace, built.workspace_bytes)
        plan = backend_room.Plan(built, pages, highest, self._workspace)
        if device is not None:
            with arrays.on(device, stream):
                on_device = plan.on_device(device)
                if not non_blocking:
                    on_device.wait()
        self._plan = plan

    begin_forward = plan

    def _planning_place(self, *indices: Any) -> tuple[int | None, int]:
        """The CUDA device to plan for, None for the host, and the stream to upload on.

        Those of the workspace or of an index array; where all are on the host, the current ones.
        """
        if self._workspace is not None:
            device = arrays.device_id(self._workspace)
            return device, 0 if device is None else arrays.caller_stream(self._workspace_owner)
        for index in indices:
            if not isinstance(index, _ON_THE_HOST):
                device = arrays.device_id(arrays.import_tensor(index, "index array"))
                if device is not None:
                    return device, arrays.caller_stream(index)
        return backend_room.current_place(self._backend)

    def run(
        self,
        q: Any,
        paged_kv_cache: Any,
        *,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Any = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Any:
        """Compute the attention that was planned.

        Parameters
        ----------
        q : array [nnz_qo, num_qo_heads, head_dim]
            Of the planned dtype. Any strides with a contiguous last axis.
        paged_kv_cache : (array, array) or array
            `(k, v)`, each `[num_pages, page_size, num_kv_heads, head_dim]` (NHD) or
            `[num_pages, num_kv_heads, page_size, head_dim]` (HND); or both in one array with an
            axis of size 2 behind the first, `[num_pages, 2, ...]`.
        q_scale, k_scale, v_scale : float, optional
            The first two multiply the logits, the third the output.
        out : array [nnz_qo, num_qo_heads, head_dim], optional
            Where the output goes; a new array where not given.
        lse : float32 array [nnz_qo, num_qo_heads], optional
            Where the log-sum-exp of the logits goes.
        return_lse : bool
            Return the log-sum-exp too.
        lse_base : {"log2", "ln"}
            The logarithm's base.
        lse_layout, enable_pdl, window_left, sinks, kv_cache_sf, \
skip_softmax_threshold_scale_factor, use_fp16_softmax, uses_spcompress
            Not served yet; anything but the default raises `NotImplementedError`.

        Returns
        -------
        out : array [nnz_qo, num_qo_heads, head_dim]
            The kind of array that q is, or the one given. A row that sees no key is 0.
        lse : float32 array [nnz_qo, num_qo_heads]
            Only with `return_lse`. A row that sees no key has -inf.

        Raises
        ------
        RuntimeError
            There is no plan yet.
        TypeError, ValueError
            An argument doesn't fit the plan; names it, what was expected and what came.
        NotImplementedError
            A legal request that no backend serves.
        BackendUnavailableError
            Device arrays without a GPU or NVRTC that serve them.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("run() before plan()")
        unserved.refuse(
            unserved.RUN,
            (
                lse_layout,
                enable_pdl,
                window_left,
                sinks,
                kv_cache_sf,
                skip_softmax_threshold_scale_factor,
                use_fp16_softmax,
                uses_spcompress,
            ),
        )
        spec = plan.schedule.spec
        nnz_qo = plan.nnz_qo
        queries = arrays.import_tensor(q, "q")
        keys, values, num_pages = validate_run.cache(_import_cache(paged_kv_cache, q), spec)
        validate_run.query(queries, spec, nnz_qo)
        device = validate_run.one_device(queries, keys, values)
        validate_run.backend_serves(self._backend, device)
        if plan.workspace is not None:
            validate_run.workspace_device(plan.workspace, device)
        validate.page_range(plan.page_indices, plan.highest_page, plan.schedule.lengths, num_pages)
        factors = (
            LOG2_E * validate.logit_scale(spec.sm_scale, q_scale, k_scale),
            1.0 if v_scale is None else validate.scale(v_scale, "v_scale"),
            LN_2 if validate.choice(lse_base, "lse_base", ("log2", "ln")) == "ln" else 1.0,
        )
        want_lse = validate.flag(return_lse, "return_lse") or lse is not None
        rows = (nnz_qo, spec.num_qo_heads)
        result, result_lse = None, None
        if out is not None:
            result = arrays.import_tensor(arrays.writable(out, "out"), "out", q)
            validate_run.given(result, "out", (*rows, spec.head_dim), queries.dtype, device)
        if lse is not None:
            result_lse = arrays.import_tensor(arrays.writable(lse, "lse"), "lse", q)
            validate_run.given(result_lse, "lse", rows, DTYPES["float32"], device)
        current, stream = arrays.on_stream_of(q, device)
        with current:
            if result is None:
                result, out = arrays.allocate_output(
                    (*rows, spec.head_dim), queries.dtype, queries, q
                )
            if result_lse is None and want_lse:
                result_lse, lse = arrays.allocate_output(rows, DTYPES["float32"], queries, q)
            if nnz_qo:
                plan.run(device, stream, (queries, keys, values, result, result_lse), factors)
            if out is None:
                out = arrays.export(result, q)
            if lse is None and return_lse:
                lse = arrays.export(result_lse, q)
        return (out, lse) if return_lse else out

    def run_return_lse(self, q: Any, paged_kv_cache: Any, **options: Any) -> Any:
        """`run()` with `return_lse=True`."""
        return self.run(q, paged_kv_cache, return_lse=True, **options)

    def explain(self) -> str:
        """The plan as text: tiles, splits, work for each thread block, predicted imbalance.

        Raises
        ------
        RuntimeError
            There is no plan yet.
        """
        if self._plan is None:
            raise RuntimeError("explain() before plan()")
        from cupaged.explain import explain  # which nothing else needs

        return explain(self._plan.schedule)


def _import_cache(paged_kv_cache: Any, q: Any) -> Any:
    """K and V, or both stacked, ordered behind what is pending on their owners' streams."""
    if isinstance(paged_kv_cache, tuple | list):
        if len(paged_kv_cache) != 2:
            raise ValueError(
                f"paged_kv_cache has {len(paged_kv_cache)} arrays, expected two: (k, v)"
            )
        k, v = paged_kv_cache
        return arrays.import_tensor(k, "k cache", q), arrays.import_tensor(v, "v cache", q)
    return arrays.import_tensor(paged_kv_cache, "paged_kv_cache", q)
