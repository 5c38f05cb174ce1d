"""Attention sinks as FlashInfer has them: a wrapper whose `run()` takes them beside the cache."""

from __future__ import annotations

from typing import Any, NoReturn

from cupaged import unserved, validate
from cupaged.planned_attention import dtype_names
from cupaged.prefill import BatchPrefillWithPagedKVCacheWrapper
from cupaged.spec import POS_ENCODING_MODES, AttentionSpec


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """A `BatchPrefillWithPagedKVCacheWrapper` of heads that have an attention sink.

    `BatchPrefillWithPagedKVCacheWrapper.run(..., sinks=...)` computes the same; this class is for
    FlashInfer's callers.

    Parameters
    ----------
    float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf, \
paged_kv_indices_buf, paged_kv_last_page_len_buf, custom_mask_buf, mask_indptr_buf, backend
        As `BatchPrefillWithPagedKVCacheWrapper` takes them.
    pos_encoding_mode : {"NONE", "ROPE_LLAMA", "ALIBI"}
    q_data_type, kv_data_type : dtype or str
    head_dim_qk, head_dim_vo : int
    window_left : int
        What will be planned; of `window_left`, whether there is a window.
    use_fp16_qk_reduction
        Not served; anything but the default raises `NotImplementedError`.
    """

    needs_sinks = True

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
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        q_data_type: Any = "bfloat16",
        kv_data_type: Any = "bfloat16",
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ) -> None:
        unserved.refuse(unserved.SINK_CONSTRUCTOR, (use_fp16_qk_reduction,))
        q_dtype, kv_dtype, _ = dtype_names(q_data_type, kv_data_type, None)
        self._expected = {
            "q_data_type": q_dtype,
            "kv_data_type": kv_dtype,
            "head_dim_qk": validate.positive_int(head_dim_qk, "head_dim_qk"),
            "head_dim_vo": validate.positive_int(head_dim_vo, "head_dim_vo"),
            "pos_encoding_mode": validate.choice(
                pos_encoding_mode, "pos_encoding_mode", POS_ENCODING_MODES
            ),
        }
        self._has_window = validate.window_left(window_left) >= 0
        super().__init__(
            *(float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf),
            *(paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf),
            *(custom_mask_buf, mask_indptr_buf, backend),
        )

    def _take(self, spec: AttentionSpec, *args: Any, **options: Any) -> None:
        found = {
            "q_data_type": spec.dtype,
            "kv_data_type": spec.kv_dtype,
            "head_dim_qk": spec.head_dim_qk,
            "head_dim_vo": spec.head_dim_vo,
            "pos_encoding_mode": spec.pos_encoding_mode,
        }
        for name, value in found.items():
            if value != self._expected[name]:
                raise ValueError(
                    f"{name} = {value}, expected {self._expected[name]} as the constructor was told"
                )
        if (spec.window_left >= 0) != self._has_window:
            expected = "at least 0" if self._has_window else "-1"
            raise ValueError(
                f"window_left = {spec.window_left}, expected {expected}: "
                f"the constructor was told of {'a' if self._has_window else 'no'} window"
            )
        super()._take(spec, *args, **options)

    def run(  # type: ignore[override]
        self,
        q: Any,
        paged_kv_cache: Any,
        sink: Any,
        sm_scale: float | None = None,
        *,
        q_scale: float | None = None,
        **options: Any,
    ) -> Any:
        """Compute the attention that was planned.

        Parameters
        ----------
        sink : float32 array [num_qo_heads]
            Logits of each head's attention sink, which adds `exp(sink)` to the denominator alone.
        sm_scale : float, optional
            What multiplies `q·k`; the planned one where not given.
        q, paged_kv_cache, q_scale, **options
            As `BatchPrefillWithPagedKVCacheWrapper.run()` takes them.

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
        if sink is None:
            raise TypeError("sink is None, expected a float32 array [num_qo_heads]")
        if options.get("sinks") is not None:
            raise ValueError("sink and sinks exclude each other")
        if sm_scale is not None and self._plan is not None:
            planned = self._plan.spec.sm_scale
            given = validate.scale(sm_scale, "sm_scale")
            if given != planned:
                if planned == 0:
                    raise ValueError(f"sm_scale = {given}, expected 0 as planned")
                factor = 1.0 if q_scale is None else validate.scale(q_scale, "q_scale")
                q_scale = factor * given / planned
        options["sinks"] = sink
        return super().run(q, paged_kv_cache, q_scale=q_scale, **options)

    def forward(self, *args: Any, **options: Any) -> NoReturn:
        """Refused: FlashInfer's `forward()` has no argument for the sinks.

        Raises
        ------
        NotImplementedError
        """
        raise NotImplementedError(
            "forward() has no sink: call run(q, paged_kv_cache, sink), and give other features to "
            "plan()"
        )
