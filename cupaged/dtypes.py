"""Dtypes of tensors by name, and as PyTorch has them."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from cupaged.spec import DTYPES
from cupaged.validate import what

#: NumPy dtype → name, as attribute of `torch`
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(x: Any, argument: str) -> str:
    """Name of a tensor dtype, as in `spec.DTYPES`.

    Parameters
    ----------
    x : str, dtype or scalar type
        "float16", "half", `numpy.float16`, `ml_dtypes.bfloat16`, `torch.bfloat16`,
        `jax.numpy.bfloat16`, …
    argument : str
        Where it was given, for errors.

    Raises
    ------
    TypeError
        None of these.
    """
    name = _dtype_name(x)
    if name is None:
        # The repr of these may fill the screen.
        array = hasattr(x, "__dlpack__") and not isinstance(x, type)
        many = array or isinstance(x, (list, tuple))
        words = f"is {what(x)}" if many else f"= {x!r}"
        raise TypeError(f"{argument} {words}, expected one of {', '.join(DTYPES)}")
    return name


def _dtype_name(x: Any) -> str | None:
    if type(x).__module__ == "torch":
        x = str(x).removeprefix("torch.")
    if isinstance(x, str) and x in DTYPES:
        return x
    try:
        return _NAMES.get(np.dtype(x))
    except (TypeError, ValueError, SyntaxError):
        return None


@lru_cache(maxsize=64)
def from_torch_dtype(dtype: Any) -> np.dtype[Any] | None:
    """NumPy's dtype for one of PyTorch's, None where it has none."""
    name = str(dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        return None


def torch_dtype(dtype: np.dtype[Any]) -> Any:
    """PyTorch's dtype for one of `spec.DTYPES`."""
    return getattr(sys.modules["torch"], _NAMES[dtype])
