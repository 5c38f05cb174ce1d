"""Two levels of a cascade as FlashInfer once had them: one shared prefix, contiguous, and pages."""

from __future__ import annotations

from typing import Any

from cupaged.decode import BatchDecodeWithPagedKVCacheWrapper
from cupaged.merging import merge_state
from cupaged.prefill import BatchPrefillWithPagedKVCacheWrapper
from cupaged.single import single_prefill_with_kv_cache


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper:
    """Decoding of a batch whose requests all share one prefix.

    `MultiLevelCascadeAttentionWrapper` serves any number of levels, all of them paged; this class
    is for FlashInfer's callers.

    Parameters
    ----------
    float_workspace_buffer, kv_layout
        As `BatchDecodeWithPagedKVCacheWrapper` takes them.
    """

    def __init__(self, float_workspace_buffer: Any = None, kv_layout: str = "NHD") -> None:
        self._unique = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)

    def reset_workspace_buffer(
        self, float_workspace_buffer: Any, int_workspace_buffer: Any = None
    ) -> None:
        """Take another workspace from the next plan on, as the paged wrapper does."""
        self._unique.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def end_forward(self) -> None:
        """Nothing, as for the paged wrapper."""

    def begin_forward(
        self,
        unique_kv_indptr: Any,
        unique_kv_indices: Any,
        unique_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: Any = "float16",
    ) -> None:
        """Plan what follows the prefix.

        Parameters
        ----------
        unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len
            The page table of each request's own keys, those of the prefix left out.
        num_qo_heads, num_kv_heads, head_dim, page_size, data_type
            As `BatchDecodeWithPagedKVCacheWrapper.plan()` takes them, and raises.
        """
        self._unique.plan(
            *(unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len),
            *(num_qo_heads, num_kv_heads, head_dim, page_size),
            data_type=data_type,
        )

    def forward(self, q: Any, k_shared: Any, v_shared: Any, unique_kv_cache: Any) -> Any:
        """Attend to the prefix and to each request's own keys.

        Parameters
        ----------
        q : array [batch, num_qo_heads, head_dim]
        k_shared, v_shared : array [prefix_len, num_kv_heads, head_dim] (NHD), or with "HND" the \
first two axes swapped
        unique_kv_cache : (array, array) or array
            The pages, as `BatchDecodeWithPagedKVCacheWrapper.run()` takes them.

        Returns
        -------
        array [batch, num_qo_heads, head_dim]
            The kind of array that q is.

        Raises
        ------
        RuntimeError, TypeError, ValueError, NotImplementedError, BackendUnavailableError
            As `single_prefill_with_kv_cache()` and the paged wrapper's `run()` do.
        """
        unique = self._unique.run(q, unique_kv_cache, return_lse=True)
        layout = self._unique.kv_layout
        shared = single_prefill_with_kv_cache(
            q, k_shared, v_shared, kv_layout=layout, return_lse=True
        )
        return merge_state(*shared, *unique)[0]


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper:
    """Prefill of a batch whose requests all share one prefix.

    `MultiLevelCascadeAttentionWrapper` serves any number of levels, all of them paged; this class
    is for FlashInfer's callers.

    Parameters
    ----------
    float_workspace_buffer, kv_layout
        As `BatchPrefillWithPagedKVCacheWrapper` takes them.
    """

    def __init__(self, float_workspace_buffer: Any = None, kv_layout: str = "NHD") -> None:
        self._unique = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)

    def reset_workspace_buffer(
        self, float_workspace_buffer: Any, int_workspace_buffer: Any = None
    ) -> None:
        """Take another workspace from the next plan on, as the paged wrapper does."""
        self._unique.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def end_forward(self) -> None:
        """Nothing, as for the paged wrapper."""

    def begin_forward(
        self,
        qo_indptr: Any,
        paged_kv_indptr: Any,
        paged_kv_indices: Any,
        paged_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        q_data_type: Any = "float16",
    ) -> None:
        """Plan what follows the prefix.

        Parameters
        ----------
        paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
            The page table of each request's own keys, those of the prefix left out.
        qo_indptr, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type
            As `BatchPrefillWithPagedKVCacheWrapper.plan()` takes them, and raises. FlashInfer has
            no `q_data_type` here.
        """
        self._unique.plan(
            *(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len),
            *(num_qo_heads, num_kv_heads, head_dim, page_size),
            q_data_type=q_data_type,
        )

    def forward(
        self,
        q: Any,
        k_shared: Any,
        v_shared: Any,
        unique_kv_cache: Any,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Any:
        """Attend to the prefix and to each request's own keys.

        Parameters
        ----------
        q : array [nnz_qo, num_qo_heads, head_dim]
        k_shared, v_shared : array [prefix_len, num_kv_heads, head_dim] (NHD), or with "HND" the \
first two axes swapped
        unique_kv_cache : (array, array) or array
            The pages, as `BatchPrefillWithPagedKVCacheWrapper.run()` takes them.
        causal : bool
            Of each request's own keys; every row sees the whole prefix.
        sm_scale : float, optional
            What multiplies `q·k`; by default `1 / sqrt(head_dim)`.
        use_fp16_qk_reduction, rope_scale, rope_theta
            Nothing is rotated here: anything but the default raises, as
            `single_prefill_with_kv_cache()` does.

        Returns
        -------
        array [nnz_qo, num_qo_heads, head_dim]
            The kind of array that q is.

        Raises
        ------
        RuntimeError, TypeError, ValueError, NotImplementedError, BackendUnavailableError
            As `single_prefill_with_kv_cache()` and the paged wrapper's `forward()` do.
        """
        unique = self._unique.forward_return_lse(
            *(q, unique_kv_cache),
            causal=causal,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        layout = self._unique.kv_layout
        shared = single_prefill_with_kv_cache(
            *(q, k_shared, v_shared), kv_layout=layout, sm_scale=sm_scale, return_lse=True
        )
        return merge_state(*shared, *unique)[0]
