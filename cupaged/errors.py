"""The library's own warnings and errors; everything else is a builtin exception."""

from __future__ import annotations

import sys
import warnings


class CupagedWarning(UserWarning):
    """An input that is legal and almost surely a mistake."""


class BackendUnavailableError(RuntimeError):
    """The CUDA backend can't run here; the message says what to install or use instead."""


def warn(message: str) -> None:
    """Warn with a `CupagedWarning` that points to where the library was called."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_between(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(message, CupagedWarning, stacklevel=level)


def _is_between(module: str) -> bool:
    return module.startswith("cupaged.") or module in ("contextlib", "torch._dynamo.eval_frame")
