"""FlashInfer's modules whose names rooms of this package have, and what else is found there.

A program may name a function by its module, as `flashinfer.decode.single_decode_with_kv_cache`.
"""

from __future__ import annotations

from importlib import import_module

_BESIDES = {
    "cupaged.cascade": (
        "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
        "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
        "merge_state",
        "merge_state_in_place",
        "merge_states",
    ),
    "cupaged.decode": ("fast_decode_plan", "single_decode_with_kv_cache"),
    "cupaged.prefill": (
        "BatchPrefillWithRaggedKVCacheWrapper",
        "single_prefill_with_kv_cache",
        "single_prefill_with_kv_cache_return_lse",
    ),
}


def find(module: str, name: str) -> object:
    """A public name that FlashInfer has in its module of that name, and this package elsewhere.

    Raises
    ------
    AttributeError
        It has none.
    """
    if name not in _BESIDES[module]:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    found: object = getattr(import_module("cupaged"), name)
    return found
