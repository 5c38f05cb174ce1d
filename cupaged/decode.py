"""Batch decoding over a paged key/value cache: the public wrapper."""

from __future__ import annotations

from typing import Any

from cupaged import arrays, flashinfer_modules, unserved, validate, validate_lengths
from cupaged.graph_buffers import graph_buffers
from cupaged.paged_attention import PagedAttention
from cupaged.planned_attention import dtype_names
from cupaged.spec import FLOAT8_DTYPES


class BatchDecodeWithPagedKVCacheWrapper(PagedAttention):
    """Attention of the newest tokens of a batch of requests over a paged key/value cache.

    Every request has one query row, or the same few, of which each sees the keys up to its own.
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
    use_tensor_cores : bool
        For FlashInfer's callers; the kernels use tensor cores either way.
    paged_kv_indptr_buffer : int32 array [max_batch_size + 1], optional
    paged_kv_indices_buffer : int32 array [max_num_pages], optional
    paged_kv_last_page_len_buffer : int32 array [max_batch_size], optional
        With `use_cuda_graph`, where `plan()` puts its arrays, on the device; all of them or none.
        Kernels read the page table from the second.
    backend : {"auto", "reference", "cuda", "fa2", "fa3"}
        "auto" takes host arrays to the reference backend and device arrays to the GPU. FlashInfer's
        names "fa2" and "fa3" mean "cuda".
    jit_args
        Not served; anything but the default raises `NotImplementedError`.
    max_batch_size, max_num_pages : int, optional
        With `use_cuda_graph` and no buffers: the most requests of a plan and entries of its page
        table.

    Notes
    -----
    A plan's counters and partial states are its own: run one plan on one stream at a time.
    Names and argument orders follow FlashInfer's class of this name; the last two arguments are
    this library's.

    Once a run is recorded in a CUDA graph, a plan may have fewer requests than it, but no more, and
    may change neither heads, dtypes, page size, `q_len_per_req`, `sm_scale`, which features are on,
    nor how splits are asked for; the workspace stays. A plan goes to the stream of the buffers, of
    the workspace, or of the index arrays where they are CuPy's or PyTorch's; else to CuPy's current
    one, or PyTorch's where CuPy's is the default one. Replay the graph there, or behind it.
    """

    _names = validate_lengths.DECODE_NAMES
    _rows_are = "requests * q_len_per_req"

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Any = None,
        paged_kv_indices_buffer: Any = None,
        paged_kv_last_page_len_buffer: Any = None,
        backend: str = "auto",
        jit_args: Any = None,
        max_batch_size: int | None = None,
        max_num_pages: int | None = None,
    ) -> None:
        unserved.refuse(unserved.DECODE_CONSTRUCTOR, (jit_args,))
        self._use_tensor_cores = validate.flag(use_tensor_cores, "use_tensor_cores")
        buffers = {
            "paged_kv_indptr_buffer": paged_kv_indptr_buffer,
            "paged_kv_indices_buffer": paged_kv_indices_buffer,
            "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer,
        }
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            backend,
            graph_buffers(use_cuda_graph, buffers, max_batch_size, max_num_pages),
        )
        self._q_len_per_req = 1

    @property
    def use_tensor_cores(self) -> bool:
        """What the constructor was told, for FlashInfer's callers."""
        return self._use_tensor_cores

    def plan(
        self,
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
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Any = None,
        seq_lens: Any = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
    ) -> None:
        """Schedule a batch; everything that depends on lengths alone is done here.

        Parameters
        ----------
        indptr : int array [batch + 1]
            Entries of `indices` that belong to each request; begins at 0, never decreases.
        indices : int array [>= indptr[-1]]
            Page numbers.
        last_page_len : int array [batch]
            Tokens in each request's last page, 1 to `page_size`. The new tokens' keys and values
            are in the cache, and counted here.
        num_qo_heads, num_kv_heads : int
            The first a multiple of the second.
        head_dim : {64, 96, 128, 256}
        page_size : int
            Tokens of a page.
        pos_encoding_mode : {"NONE", "ROPE_LLAMA", "ALIBI"}
            "ROPE_LLAMA" rotates queries and keys by their positions, that of row `i` being
            `kv_len - q_len_per_req + i`; "ALIBI" biases logits by the distance of row and key.
        window_left : int
            Row `i` sees keys from `kv_len - q_len_per_req + i - window_left` on; -1 for all.
        logits_soft_cap : float, optional
            Logits `x` become `cap * tanh(x / cap)`, where it is more than 0.
        q_data_type, kv_data_type, o_data_type : dtype or str
            "float16" or "bfloat16"; the latter two follow `q_data_type`. K and V may be
            "float8_e4m3fn" or "float8_e5m2" too, with `k_scale` and `v_scale` of `run()`.
        data_type : dtype or str, optional
            All three at once, `q_data_type` then being left as it is; a float8 is K's and V's
            alone.
        sm_scale : float, optional
            What multiplies `q·k`; by default `1 / sqrt(head_dim)`.
        rope_scale, rope_theta : float, optional
            With "ROPE_LLAMA": what positions are divided by, by default 1, and the base of the
            frequencies, by default 1e4.
        non_blocking : bool
            False: wait until the plan has arrived on the device.
        fixed_split_size : int, optional
            Pages of a split. A request's bits then don't depend on its batch. -1 is None.
        disable_split_kv : bool
            Never split a request's keys, whatever `fixed_split_size` is. Its bits then don't
            depend on its batch.
        q_len_per_req : int
            Query rows of every request, its last tokens: row `i` of them sees keys up to
            `kv_len - q_len_per_req + i`.
        block_tables, seq_lens, window_right
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
            Fewer keys than `q_len_per_req` in a request; a page twice in a request.
        """
        unserved.refuse(unserved.DECODE_PLAN, (block_tables, seq_lens, window_right))
        if data_type is not None:
            dtype = arrays.dtype_name(data_type, "data_type")
            if dtype not in FLOAT8_DTYPES:
                # q_data_type's default may be what was given.
                if arrays.dtype_name(q_data_type, "q_data_type") not in ("float16", dtype):
                    raise ValueError("data_type and q_data_type exclude each other")
                q_data_type = dtype
            if kv_data_type is None:
                kv_data_type = dtype
            if arrays.dtype_name(kv_data_type, "kv_data_type") != dtype:
                raise ValueError("data_type and kv_data_type exclude each other")
        q_len_per_req = validate.positive_int(q_len_per_req, "q_len_per_req")
        spec = validate.attention_spec(
            num_qo_heads,
            num_kv_heads,
            head_dim,
            None,
            page_size,
            q_len_per_req > 1,
            sm_scale,
            dtype_names(q_data_type, kv_data_type, o_data_type),
            self.kv_layout,
            self._names.head_dim,
            validate.Features(
                *(window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta)
            ),
        )
        lengths = validate_lengths.decode_lengths(
            arrays.import_index(indptr, "indptr"),
            arrays.import_index(last_page_len, "last_page_len"),
            q_len_per_req,
            spec,
        )
        self._take(
            spec,
            lengths,
            indices,
            (indptr, indices, last_page_len),
            fixed_split_size,
            disable_split_kv,
            non_blocking,
            q_len_per_req,
        )
        self._q_len_per_req = q_len_per_req

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
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Any = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """Compute the attention that was planned.

        Parameters
        ----------
        q : array [batch * q_len_per_req, num_qo_heads, head_dim]
            Of the planned dtype; a request's rows one after the other. Any strides with a
            contiguous last axis.
            With `use_cuda_graph` there may be more rows than planned; the output's are then left
            as they are.
        paged_kv_cache : (array, array) or array
            `(k, v)`, each `[num_pages, page_size, num_kv_heads, head_dim]` (NHD) or
            `[num_pages, num_kv_heads, page_size, head_dim]` (HND); or both in one array with an
            axis of size 2 behind the first, `[num_pages, 2, ...]`. The bits of a float8 may come as
            uint8.
        q_scale, k_scale, v_scale : float, optional
            The first two multiply the logits, the third the output.
        out : array [batch * q_len_per_req, num_qo_heads, head_dim], optional
            Where the output goes; a new array where not given. It may be q, and shares no memory
            with K, V or `lse`.
        lse : float32 array [batch * q_len_per_req, num_qo_heads], optional
            Where the log-sum-exp of the logits goes.
        return_lse : bool
            Return the log-sum-exp too.
        lse_base : {"log2", "ln"}
            The logarithm's base.
        window_left, q_len_per_req : int, optional
            The planned ones.
        sinks : float32 array [num_qo_heads], optional
            Logits of each head's attention sink, which adds `exp(sink)` to the denominator alone.
        enable_pdl, skip_softmax_threshold_scale_factor, kv_cache_sf
            Not served; anything but the default raises `NotImplementedError`.

        Returns
        -------
        out : array [batch * q_len_per_req, num_qo_heads, head_dim]
            The kind of array that q is, or the one given. A row that sees no key is 0.
        lse : float32 array [batch * q_len_per_req, num_qo_heads]
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
            unserved.DECODE_RUN,
            (enable_pdl, kv_cache_sf, skip_softmax_threshold_scale_factor),
        )
        if window_left is not None:
            self._check_window(window_left)
        if q_len_per_req is not None and self._plan is not None:
            given = validate.positive_int(q_len_per_req, "q_len_per_req")
            if given != self._q_len_per_req:
                raise ValueError(
                    f"q_len_per_req = {given}, expected {self._q_len_per_req} as planned"
                )
        return self._attend(
            q, paged_kv_cache, q_scale, k_scale, v_scale, out, lse, return_lse, lse_base, sinks
        )

    def forward(
        self,
        q: Any,
        paged_kv_cache: Any,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
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
        features = {
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "sm_scale": sm_scale,
            "rope_scale": rope_scale,
            "rope_theta": rope_theta,
        }
        with self._planned_with(None, pos_encoding_mode, features):
            return self.run(
                *(q, paged_kv_cache),
                q_scale=q_scale,
                k_scale=k_scale,
                v_scale=v_scale,
                return_lse=return_lse,
            )

    def forward_return_lse(self, *args: Any, **options: Any) -> Any:
        """`forward()` with `return_lse=True`."""
        return self.forward(*args, **options | {"return_lse": True})


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """A `BatchDecodeWithPagedKVCacheWrapper` with `use_cuda_graph=True` and buffers.

    Parameters
    ----------
    workspace_buffer : array
        Its `float_workspace_buffer`.
    indptr_buffer, indices_buffer, last_page_len_buffer : int32 array
        Its `paged_kv_indptr_buffer`, `paged_kv_indices_buffer`, `paged_kv_last_page_len_buffer`.
    kv_layout : {"NHD", "HND"}
    use_tensor_cores : bool
        For FlashInfer's callers; the kernels use tensor cores either way.
    """

    def __init__(
        self,
        workspace_buffer: Any,
        indptr_buffer: Any,
        indices_buffer: Any,
        last_page_len_buffer: Any,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            *(workspace_buffer, kv_layout, True, use_tensor_cores),
            *(indptr_buffer, indices_buffer, last_page_len_buffer),
        )


def __getattr__(name: str) -> object:
    return flashinfer_modules.find(__name__, name)
