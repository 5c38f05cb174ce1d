"""Batch prefill over a paged key/value cache: the public wrapper."""

from __future__ import annotations

from typing import Any

from cupaged import arrays, flashinfer_modules, masks, unserved, validate, validate_lengths
from cupaged.graph_buffers import graph_buffers
from cupaged.paged_attention import PagedAttention
from cupaged.planned_attention import dtype_names


class BatchPrefillWithPagedKVCacheWrapper(PagedAttention):
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
    use_cuda_graph : bool
        `run()` may be recorded in a CUDA graph, and another `plan()` then changes what the graph
        computes.
    qo_indptr_buf, paged_kv_indptr_buf : int32 array [max_batch_size + 1], optional
    paged_kv_indices_buf : int32 array [max_num_pages], optional
    paged_kv_last_page_len_buf : int32 array [max_batch_size], optional
        With `use_cuda_graph`, where `plan()` puts its arrays, on the device; all of them or none.
        Kernels read the page table from the third.
    custom_mask_buf : uint8 array [max_mask_bytes], optional
    mask_indptr_buf : int32 array [max_batch_size + 1], optional
        With `use_cuda_graph`, where `plan()` puts a custom mask and the bytes at which each
        request's begins, on the device; plans with a mask need both.
    backend : {"auto", "reference", "cuda", "fa2", "fa3"}
        "auto" takes host arrays to the reference backend and device arrays to the GPU. FlashInfer's
        names "fa2" and "fa3" mean "cuda".
    jit_args, jit_kwargs
        Not served; anything but the default raises `NotImplementedError`.
    max_batch_size, max_num_pages : int, optional
        With `use_cuda_graph` and no buffers: the most requests of a plan and entries of its page
        table.

    Notes
    -----
    A plan's counters and partial states are its own: run one plan on one stream at a time.
    Names and argument orders follow FlashInfer's class of this name; the last two arguments are
    this library's.

    Once a run is recorded in a CUDA graph, a plan may have no more rows of q than it, nor than the
    largest plan before it: plan for the most rows first. It may change neither heads, dtypes, page
    size, `causal`, `sm_scale`, which features are on, nor how splits are asked for; the workspace
    stays. A plan goes to the stream of the buffers, of the workspace, or of the index arrays where
    they are CuPy's or PyTorch's; else to CuPy's current one, or PyTorch's where CuPy's is the
    default one. Replay the graph there, or behind it.
    """

    _names = validate_lengths.PREFILL_NAMES
    _rows_are = "qo_indptr[-1]"

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
        max_batch_size: int | None = None,
        max_num_pages: int | None = None,
    ) -> None:
        unserved.refuse(unserved.PREFILL_CONSTRUCTOR, (jit_args, jit_kwargs))
        buffers = {
            "qo_indptr_buf": qo_indptr_buf,
            "paged_kv_indptr_buf": paged_kv_indptr_buf,
            "paged_kv_indices_buf": paged_kv_indices_buf,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len_buf,
        }
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            backend,
            graph_buffers(
                *(use_cuda_graph, buffers, max_batch_size, max_num_pages),
                *(custom_mask_buf, mask_indptr_buf),
            ),
        )

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
        head_dim_qk : {64, 96, 128, 192, 256}
        page_size : int
            Tokens of a page.
        head_dim_vo : int, optional
            Elements of a value's head; by default `head_dim_qk`. Beside 192 it is 128.
        custom_mask : bool array [sum of qo_len * kv_len], optional
            Which keys each query row sees: every request's `[qo_len, kv_len]`, one after the other.
            A key is seen where the mask, `causal` and `window_left` all let it.
        packed_custom_mask : uint8 array, optional
            The same as little-endian bits, each request's beginning at a byte, as
            `segment_packbits` makes them.
        causal : bool
            Row `i` sees keys up to `kv_len - qo_len + i`: aligned to the bottom right.
        pos_encoding_mode : {"NONE", "ROPE_LLAMA", "ALIBI"}
            "ROPE_LLAMA" rotates queries and keys by their positions, that of row `i` being
            `kv_len - qo_len + i`; "ALIBI" biases logits by the distance of row and key.
        sm_scale : float, optional
            What multiplies `q·k`; by default `1 / sqrt(head_dim_qk)`.
        window_left : int
            Row `i` sees keys from `kv_len - qo_len + i - window_left` on; -1 for all.
        logits_soft_cap : float, optional
            Logits `x` become `cap * tanh(x / cap)`, where it is more than 0.
        rope_scale, rope_theta : float, optional
            With "ROPE_LLAMA": what positions are divided by, by default 1, and the base of the
            frequencies, by default 1e4.
        q_data_type, kv_data_type, o_data_type : dtype or str
            "float16" or "bfloat16"; the latter two follow `q_data_type`. K and V may be
            "float8_e4m3fn" or "float8_e5m2" too, with `k_scale` and `v_scale` of `run()`.
        non_blocking : bool
            False: wait until the plan has arrived on the device.
        fixed_split_size : int, optional
            Pages of a split. A request's bits then don't depend on its batch. -1 is None.
        disable_split_kv : bool
            Never split a request's keys, whatever `fixed_split_size` is. Its bits then don't
            depend on its batch.
        use_fp16_qk_reduction, prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, \
max_item_len_ptr, seq_lens, seq_lens_q, block_tables, max_token_per_sequence, max_sequence_kv, \
uniform_q_len
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
            `causal` with more queries than keys in a request; a page twice in a request.
        """
        unserved.refuse(
            unserved.PREFILL_PLAN,
            (
                use_fp16_qk_reduction,
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
        masked = custom_mask is not None or packed_custom_mask is not None
        spec = validate.attention_spec(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            head_dim_vo,
            page_size,
            causal,
            sm_scale,
            dtype_names(q_data_type, kv_data_type, o_data_type),
            self.kv_layout,
            self._names.head_dim,
            validate.Features(
                *(window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta, masked)
            ),
        )
        lengths = validate_lengths.lengths(
            arrays.import_index(qo_indptr, "qo_indptr"),
            arrays.import_index(paged_kv_indptr, "paged_kv_indptr"),
            arrays.import_index(paged_kv_last_page_len, "paged_kv_last_page_len"),
            spec,
        )
        mask = masks.read(custom_mask, packed_custom_mask, lengths) if masked else None
        self._take(
            spec,
            lengths,
            paged_kv_indices,
            (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len),
            fixed_split_size,
            disable_split_kv,
            non_blocking,
            mask=mask,
        )

    begin_forward = plan

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
        q : array [nnz_qo, num_qo_heads, head_dim_qk]
            Of the planned dtype. Any strides with a contiguous last axis.
            With `use_cuda_graph` there may be more rows than planned; the output's are then left
            as they are.
        paged_kv_cache : (array, array) or array
            `(k, v)`, each `[num_pages, page_size, num_kv_heads, head_dim]` (NHD) or
            `[num_pages, num_kv_heads, page_size, head_dim]` (HND); or both in one array with an
            axis of size 2 behind the first, `[num_pages, 2, ...]`. The bits of a float8 may come as
            uint8.
        q_scale, k_scale, v_scale : float, optional
            The first two multiply the logits, the third the output.
        out : array [nnz_qo, num_qo_heads, head_dim_vo], optional
            Where the output goes; a new array where not given. It may be q, and shares no memory
            with K, V or `lse`.
        lse : float32 array [nnz_qo, num_qo_heads], optional
            Where the log-sum-exp of the logits goes.
        return_lse : bool
            Return the log-sum-exp too.
        lse_base : {"log2", "ln"}
            The logarithm's base.
        window_left : int, optional
            The planned one.
        sinks : float32 array [num_qo_heads], optional
            Logits of each head's attention sink, which adds `exp(sink)` to the denominator alone.
        lse_layout, enable_pdl, kv_cache_sf, skip_softmax_threshold_scale_factor, \
use_fp16_softmax, uses_spcompress
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
        unserved.refuse(
            unserved.PREFILL_RUN,
            (
                lse_layout,
                enable_pdl,
                kv_cache_sf,
                skip_softmax_threshold_scale_factor,
                use_fp16_softmax,
                uses_spcompress,
            ),
        )
        if window_left is not None:
            self._check_window(window_left)
        return self._attend(
            q, paged_kv_cache, q_scale, k_scale, v_scale, out, lse, return_lse, lse_base, sinks
        )

    def forward(
        self,
        q: Any,
        paged_kv_cache: Any,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
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
            return self.run(
                q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse
            )

    def forward_return_lse(self, *args: Any, **options: Any) -> Any:
        """`forward()` with `return_lse=True`."""
        return self.forward(*args, **options | {"return_lse": True})


def __getattr__(name: str) -> object:
    return flashinfer_modules.find(__name__, name)
