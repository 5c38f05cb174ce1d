"""The library's own warnings and errors; everything else is a builtin exception."""

from __future__ import annotations


class CupagedWarning(UserWarning):
    """An input that is legal and almost surely a mistake."""


class BackendUnavailableError(RuntimeError):
    """The CUDA backend can't run here; the message says what to install or use instead."""
