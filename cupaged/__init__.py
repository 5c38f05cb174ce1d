"""Paged attention for LLM inference, on CuPy, without PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cupaged.cascade import MultiLevelCascadeAttentionWrapper
    from cupaged.decode import (
        BatchDecodeWithPagedKVCacheWrapper,
        CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    )
    from cupaged.errors import BackendUnavailableError, CupagedWarning
    from cupaged.fast_plan import fast_decode_plan
    from cupaged.masks import packbits, segment_packbits
    from cupaged.merging import merge_state, merge_state_in_place, merge_states
    from cupaged.page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
    from cupaged.page_pool import OutOfPagesError
    from cupaged.paged_cache import PagedKVCache
    from cupaged.prefill import BatchPrefillWithPagedKVCacheWrapper
    from cupaged.ragged import BatchPrefillWithRaggedKVCacheWrapper
    from cupaged.shared_prefix import (
        BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
        BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    )
    from cupaged.single import (
        single_decode_with_kv_cache,
        single_prefill_with_kv_cache,
        single_prefill_with_kv_cache_return_lse,
    )
    from cupaged.sink import BatchAttentionWithAttentionSinkWrapper

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BatchAttentionWithAttentionSinkWrapper",
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "CupagedWarning",
    "MultiLevelCascadeAttentionWrapper",
    "OutOfPagesError",
    "PagedKVCache",
    "__version__",
    "append_paged_kv_cache",
    "fast_decode_plan",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "packbits",
    "segment_packbits",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]

#: Public name → its module, imported when the name is first used: `import cupaged` costs nothing.
_HOMES = {
    "BackendUnavailableError": "cupaged.errors",
    "BatchAttentionWithAttentionSinkWrapper": "cupaged.sink",
    "BatchDecodeWithPagedKVCacheWrapper": "cupaged.decode",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper": "cupaged.shared_prefix",
    "BatchPrefillWithPagedKVCacheWrapper": "cupaged.prefill",
    "BatchPrefillWithRaggedKVCacheWrapper": "cupaged.ragged",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper": "cupaged.shared_prefix",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": "cupaged.decode",
    "CupagedWarning": "cupaged.errors",
    "MultiLevelCascadeAttentionWrapper": "cupaged.cascade",
    "OutOfPagesError": "cupaged.page_pool",
    "PagedKVCache": "cupaged.paged_cache",
    "append_paged_kv_cache": "cupaged.page",
    "fast_decode_plan": "cupaged.fast_plan",
    "get_batch_indices_positions": "cupaged.page",
    "get_seq_lens": "cupaged.page",
    "merge_state": "cupaged.merging",
    "merge_state_in_place": "cupaged.merging",
    "merge_states": "cupaged.merging",
    "packbits": "cupaged.masks",
    "segment_packbits": "cupaged.masks",
    "single_decode_with_kv_cache": "cupaged.single",
    "single_prefill_with_kv_cache": "cupaged.single",
    "single_prefill_with_kv_cache_return_lse": "cupaged.single",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
