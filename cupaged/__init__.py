"""Paged attention for LLM inference, on CuPy, without PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cupaged.decode import BatchDecodeWithPagedKVCacheWrapper
    from cupaged.errors import BackendUnavailableError, CupagedWarning
    from cupaged.prefill import BatchPrefillWithPagedKVCacheWrapper

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "CupagedWarning",
    "__version__",
]

#: Public name → its module, imported when the name is first used: `import cupaged` costs nothing.
_HOMES = {
    "BackendUnavailableError": "cupaged.errors",
    "BatchDecodeWithPagedKVCacheWrapper": "cupaged.decode",
    "BatchPrefillWithPagedKVCacheWrapper": "cupaged.prefill",
    "CupagedWarning": "cupaged.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
