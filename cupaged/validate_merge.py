"""Every check of the functions that merge attention states, and how each one is worded."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged import arrays
from cupaged.spec import DTYPES
from cupaged.validate_run import check_last_axis, own_elements, place, words_of_dtype

#: What is merged, by name.
_SERVED = ("float16", "bfloat16", "float32")
_SERVED_DTYPES = tuple(DTYPES[name] for name in _SERVED)
_MASK_DTYPES = (np.dtype(np.bool_), np.dtype(np.uint8))

#: Rows and heads are counted in int32, those of the last thread block's end too.
_MAX_PLACES = 2**30


def state(v: Any, s: Any, v_name: str, s_name: str, axes: tuple[str, ...]) -> int | None:
    """Check a state, or several in one array.

    Parameters
    ----------
    v, s : array
        Imported.
    v_name, s_name : str
        The arguments'.
    axes : tuple of str
        What v's axes are, the last two heads and elements.

    Returns
    -------
    int or None
        Their device; None for the host.

    Raises
    ------
    TypeError, ValueError
        Names the argument, what was expected and what came.
    """
    shape = v.shape
    if len(shape) != len(axes):
        raise ValueError(f"{v_name} has shape {shape}, expected ({', '.join(axes)})")
    if shape[-1] == 0:
        raise ValueError(f"{v_name} has shape {shape}, expected a head_dim of at least 1")
    if v.dtype not in _SERVED_DTYPES:
        raise TypeError(f"{v_name} is {words_of_dtype(v)}, expected one of {', '.join(_SERVED)}")
    if shape[0] * shape[-2] > _MAX_PLACES:
        raise ValueError(
            f"{v_name} has {shape[0]} rows of {shape[-2]} heads, "
            f"expected at most {_MAX_PLACES} rows times heads in a call"
        )
    check_last_axis(v, v_name)
    device = arrays.device_id(v)
    expected = f"{shape[:-1]} = ({', '.join(axes[:-1])})"
    _check(s, s_name, shape[:-1], expected, DTYPES["float32"], "float32", device, v_name)
    return device


def other(v: Any, s: Any, v_name: str, s_name: str, first: Any, first_name: str) -> None:
    """Check the other state of two, `first` being v of the one that `state()` has checked."""
    shape, device = first.shape, arrays.device_id(first)
    as_first = f"as {first_name}"
    _check(
        *(v, v_name, shape, f"{shape} {as_first} has", first.dtype),
        *(f"{first.dtype.name} {as_first} is", device, first_name),
    )
    check_last_axis(v, v_name)
    expected = f"{shape[:-1]} = (seq_len, num_heads)"
    _check(s, s_name, shape[:-1], expected, DTYPES["float32"], "float32", device, first_name)


def mask(array: Any, v: Any) -> None:
    """Check which rows are to be merged."""
    if array.shape != v.shape[:1]:
        raise ValueError(f"mask has shape {array.shape}, expected {v.shape[:1]} = (seq_len,)")
    if array.dtype not in _MASK_DTYPES:
        raise TypeError(f"mask is {words_of_dtype(array)}, expected bool or uint8")
    _check_device(array, "mask", arrays.device_id(v), "v")


def mutable(x: Any, name: str) -> Any:
    """Refuse what can't be merged in place; returns `x`.

    Raises
    ------
    TypeError
        A JAX array.
    ValueError
        A read-only NumPy array.
    """
    if arrays.framework(x) == "jax":
        raise TypeError(
            f"{name} is a JAX array, which is immutable: merge_state() returns new arrays"
        )
    return arrays.writable(x, name)


def written(array: Any, name: str) -> None:
    """Check an imported array that is merged in place."""
    arrays.writable(array, name)
    own_elements(array, name, ": it is merged in place")


def _check(
    array: Any,
    name: str,
    shape: tuple[int, ...],
    shape_words: str,
    dtype: np.dtype[Any],
    dtype_words: str,
    device: int | None,
    beside: str,
) -> None:
    """Check an array against the one `beside` it."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape_words}")
    if array.dtype != dtype:
        raise TypeError(f"{name} is {words_of_dtype(array)}, expected {dtype_words}")
    _check_device(array, name, device, beside)


def _check_device(array: Any, name: str, device: int | None, beside: str) -> None:
    found = arrays.device_id(array)
    if found != device:
        raise ValueError(f"{name} is on {place(found)}, expected {place(device)} as {beside} is")
