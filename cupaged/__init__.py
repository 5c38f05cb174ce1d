"""Paged attention for LLM inference, on CuPy, without PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cupaged.cascade import MultiLevelCascadeAttentionWrapper
    from cupaged.decode import BatchDecodeWithPagedKVCacheWrapper
    from cupaged.errors import BackendUnavailableError, CupagedWarning
    from cupaged.merging import merge_state, merge_state_in_place, merge_states
    from cupaged.page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
    from cupaged.page_pool import OutOfPagesError
    from cupaged.paged_cache import PagedKVCache
    from cupaged.prefill import BatchPrefillWithPagedKVCacheWrapper

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "CupagedWarning",
    "MultiLevelCascadeAttentionWrapper",
    "OutOfPagesError",
    "PagedKVCache",
    "__version__",
    "append_paged_kv_cache",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]

#: Public name → its module, imported when the name is first used: `import cupaged` costs nothing.
_HOMES = {
    "BackendUnavailableError": "cupaged.errors",
    "BatchDecodeWithPagedKVCacheWrapper": "cupaged.decode",
    "BatchPrefillWithPagedKVCacheWrapper": "cupaged.prefill",
    "CupagedWarning": "cupaged.errors",
    "MultiLevelCascadeAttentionWrapper": "cupaged.cascade",
    "OutOfPagesError": "cupaged.page_pool",
    "PagedKVCache": "cupaged.paged_cache",
    "append_paged_kv_cache": "cupaged.page",
    "get_batch_indices_positions": "cupaged.page",
    "get_seq_lens": "cupaged.page",
    "merge_state": "cupaged.merging",
    "merge_state_in_place": "cupaged.merging",
    "merge_states": "cupaged.merging",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
