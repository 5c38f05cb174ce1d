"""Batch prefill over keys and values that lie one behind the other: the public wrapper."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged import arrays, masks, unserved, validate, validate_lengths, validate_run
from cupaged.graph_buffers import ragged_graph_buffers
from cupaged.paged_attention import PagedAttention
from cupaged.planned_attention import dtype_names
from cupaged.schedule import IntArray, Lengths
from cupaged.spec import RAGGED, AttentionSpec
from cupaged.validate_lengths import RAGGED_NAMES, Names, count_entries


class BatchPrefillWithRaggedKVCacheWrapper(PagedAttention):
    """Attention of a ragged batch of requests over keys and values without pages.

    Request `r` has rows `kv_indptr[r]..kv_indptr[r + 1] - 1` of `k` and `v`. Call `plan()` once for
    a batch's lengths, then `run()` for every layer.

    Parameters
    ----------
    float_workspace_buffer : array, optional
        Device memory for the partial states of split requests, of any dtype, contiguous. Where it
        is not given, the library allocates what the plan needs. Its device is the one planned for.
    kv_layout : {"NHD", "HND"}
        Order of the axes of K and V: `[nnz_kv, num_kv_heads, head_dim]` or
        `[num_kv_heads, nnz_kv, head_dim]`.
    use_cuda_graph : bool
        `run()` may be recorded in a CUDA graph, and another `plan()` then changes what the graph
        computes.
    qo_indptr_buf, kv_indptr_buf : int32 array [max_batch_size + 1], optional
        With `use_cuda_graph`, where `plan()` puts its arrays, on the device; both or neither.
    custom_mask_buf : uint8 array [max_mask_bytes], optional
    mask_indptr_buf : int32 array [max_batch_size + 1], optional
        With `use_cuda_graph`, where `plan()` puts a custom mask and the bytes at which each
        request's begins, on the device; plans with a mask need both.
    backend : {"auto", "reference", "cuda", "fa2", "fa3"}
        "auto" takes host arrays to the reference backend and device arrays to the GPU. FlashInfer's
        names "fa2" and "fa3" mean "cuda".
    jit_args, jit_kwargs
        Not served; anything but the default raises `NotImplementedError`.
    max_batch_size : int, optional
        With `use_cuda_graph` and no buffers: the most requests of a plan.

    Notes
    -----
    A plan's counters and partial states are its own: run one plan on one stream at a time.
    Names and argument orders follow FlashInfer's class of this name; the last argument is this
    library's. What `BatchPrefillWithPagedKVCacheWrapper` says of CUDA graphs holds here too.

    The planner and the kernels are those of paged caches: a request has one page, which begins at
    its first row and is as long as a page may be.
    """

    _names = RAGGED_NAMES
    _rows_are = "qo_indptr[-1]"
    _kv_names = ("k", "v")
    _pages_may_repeat = False  # they are rows

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Any = None,
        kv_indptr_buf: Any = None,
        custom_mask_buf: Any = None,
        mask_indptr_buf: Any = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
        max_batch_size: int | None = None,
    ) -> None:
        unserved.refuse(unserved.RAGGED_CONSTRUCTOR, (jit_args, jit_kwargs))
        buffers = {"qo_indptr_buf": qo_indptr_buf, "kv_indptr_buf": kv_indptr_buf}
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            backend,
            ragged_graph_buffers(
                *(use_cuda_graph, buffers, max_batch_size, custom_mask_buf, mask_indptr_buf)
            ),
        )
        # Where the number of K's and V's rows comes from, and whether they may have more.
        self._kv_rows = ("kv_indptr[-1]", False)

    def plan(
        self,
        qo_indptr: Any,
        kv_indptr: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Any = None,
        packed_custom_mask: Any = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
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
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: Any = None,
        seq_lens_q: Any = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: Any = None,
        o_indptr: Any = None,
        uniform_q_len: int | None = None,
    ) -> None:
        """Schedule a ragged batch; everything that depends on lengths alone is done here.

        Parameters
        ----------
        qo_indptr : int array [batch + 1]
            Rows of q that belong to each request; begins at 0, never decreases.
        kv_indptr : int array [batch + 1]
            Rows of k and v that belong to each request; the same.
        fixed_split_size : int, optional
            Tokens of a split. A request's bits then don't depend on its batch. -1 is None.
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, custom_mask, packed_custom_mask, \
causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta, \
q_data_type, kv_data_type, o_data_type, non_blocking, disable_split_kv
            As `BatchPrefillWithPagedKVCacheWrapper.plan()` takes them.
        use_fp16_qk_reduction, prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, \
max_item_len_ptr, seq_lens, seq_lens_q, max_token_per_sequence, max_sequence_kv, v_indptr, \
o_indptr, uniform_q_len
            Not served; anything but the default raises `NotImplementedError`.

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
            `causal` with more queries than keys in a request.
        """
        unserved.refuse(
            unserved.RAGGED_PLAN,
            (
                *(use_fp16_qk_reduction, prefix_len_ptr, token_pos_in_items_ptr),
                *(token_pos_in_items_len, max_item_len_ptr, seq_lens, seq_lens_q),
                *(max_token_per_sequence, max_sequence_kv, v_indptr, o_indptr, uniform_q_len),
            ),
        )
        qo = arrays.import_index(qo_indptr, "qo_indptr")
        kv, kv_len = validate_lengths.check_indptr(
            arrays.import_index(kv_indptr, "kv_indptr"), "kv_indptr"
        )
        if qo.shape != kv.shape and qo.ndim == 1:
            raise ValueError(
                f"kv_indptr has {count_entries(len(kv))}, expected {len(qo)} = batch + 1: "
                f"qo_indptr has {count_entries(len(qo))}"
            )
        self._plan_rows(
            *(qo, kv[:-1], kv_len, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo),
            custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask,
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            o_data_type=o_data_type,
            non_blocking=non_blocking,
            fixed_split_size=fixed_split_size,
            disable_split_kv=disable_split_kv,
            given=(qo_indptr, kv_indptr),
            kv_indptr=kv,
        )
        self._kv_rows = ("kv_indptr[-1]", self._graph is not None)

    begin_forward = plan

    def _plan_rows(
        self,
        qo_indptr: Any,
        kv_begin: Any,
        kv_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        *,
        custom_mask: Any = None,
        packed_custom_mask: Any = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        given: tuple[Any, ...] = (),
        kv_indptr: IntArray | None = None,
        names: Names = RAGGED_NAMES,
    ) -> None:
        """`plan()` of requests whose keys begin at any row of k and v, and which leave rows out.

        Parameters
        ----------
        qo_indptr : int array [batch + 1]
        kv_begin, kv_len : int array [batch]
            Each request's first row of k and v, and its rows.
        given : tuple of array
            What the caller gave: where it lives is planned for.
        kv_indptr : int32 array [batch + 1], optional
            For a buffer that takes it whole; begins as `kv_begin` does.
        names : Names
            Of the caller's arguments.
        """
        masked = custom_mask is not None or packed_custom_mask is not None
        spec = validate.attention_spec(
            *(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, RAGGED, causal, sm_scale),
            *(dtype_names(q_data_type, kv_data_type, o_data_type), "NHD", names.head_dim),
            validate.Features(
                *(window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta, masked)
            ),
        )
        choices = validate.plan_choices(fixed_split_size, disable_split_kv, non_blocking)
        begins = arrays.import_index(kv_begin, "kv_begin")
        lengths, num_rows = validate_lengths.ragged_lengths(
            arrays.import_index(qo_indptr, "qo_indptr"),
            begins,
            arrays.import_index(kv_len, "kv_len"),
            spec,
        )
        mask = masks.read(custom_mask, packed_custom_mask, lengths) if masked else None
        validate_lengths.warn_of_too_few_keys(spec, lengths, names)
        rows = begins.astype(np.int32) if kv_indptr is None else kv_indptr
        self._schedule(spec, lengths, rows, num_rows, given, choices, mask=mask)
        self._kv_rows = ("the last row that is planned", True)

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        o_scale: float | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
        window_left: int | None = None,
        sinks: Any = None,
    ) -> Any:
        """Compute the attention that was planned.

        Parameters
        ----------
        q : array [nnz_qo, num_qo_heads, head_dim_qk]
            Of the planned dtype. Any strides with a contiguous last axis.
        k : array [nnz_kv, num_kv_heads, head_dim_qk] (NHD) or [num_kv_heads, nnz_kv, head_dim_qk]
        v : array [nnz_kv, num_kv_heads, head_dim_vo] (NHD) or [num_kv_heads, nnz_kv, head_dim_vo]
            The same. With `use_cuda_graph` all three may have more rows than planned; the output's
            are then left as they are.
        q_scale, k_scale, v_scale, out, lse, return_lse, lse_base, window_left, sinks
            As `BatchPrefillWithPagedKVCacheWrapper.run()` takes them.
        o_scale, lse_layout, enable_pdl, kv_cache_sf
            Not served; anything but the default raises `NotImplementedError`.

        Returns
        -------
        out : array [nnz_qo, num_qo_heads, head_dim_vo]
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
        unserved.refuse(unserved.RAGGED_RUN, (o_scale, lse_layout, enable_pdl, kv_cache_sf))
        if window_left is not None:
            self._check_window(window_left)
        return self._attend(
            q, (k, v), q_scale, k_scale, v_scale, out, lse, return_lse, lse_base, sinks
        )

    def forward(
        self,
        q: Any,
        k: Any,
        v: Any,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """`run()` as FlashInfer once had it, with arguments of `plan()`.

        As there, these and their defaults stand whatever was planned. Where they differ from it the
        batch is planned again, once.
        """
        unserved.refuse(unserved.FORWARD, (use_fp16_qk_reduction,))
        features = {
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "sm_scale": sm_scale,
            "rope_scale": rope_scale,
            "rope_theta": rope_theta,
        }
        with self._planned_with(causal, pos_encoding_mode, features):
            return self.run(q, k, v, return_lse=return_lse)

    def forward_return_lse(self, *args: Any, **options: Any) -> Any:
        """`forward()` with `return_lse=True`."""
        return self.forward(*args, **options | {"return_lse": True})

    def _keys_and_values(self, cache: Any, q: Any, spec: AttentionSpec) -> tuple[Any, Any, int]:
        k, v = (
            arrays.import_tensor(x, name, q) for x, name in zip(cache, self._kv_names, strict=True)
        )
        assert self._plan is not None  # which `_attend()` has seen to
        k, v = validate_run.ragged(
            k, v, spec, self.kv_layout, self._plan.highest_page, *self._kv_rows
        )
        return k, v, len(k)

    def _check_range(self, pages: IntArray, highest: int, lengths: Lengths, num_pages: int) -> None:
        """`highest` rows are planned; against fewer only a plan may be held that follows others."""
        if highest > num_pages:
            raise ValueError(
                f"kv_indptr[-1] = {highest}, expected at most {num_pages}: run() was recorded in a "
                "CUDA graph with so many rows of k"
            )
