"""Paged attention for LLM inference, on CuPy, without PyTorch."""

from cupaged.errors import BackendUnavailableError, CupagedWarning
from cupaged.prefill import BatchPrefillWithPagedKVCacheWrapper

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BatchPrefillWithPagedKVCacheWrapper",
    "CupagedWarning",
    "__version__",
]
