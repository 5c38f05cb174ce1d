"""Merging attention states: the public functions.

Names and argument orders follow FlashInfer's functions of these names.
"""

from __future__ import annotations

from typing import Any

from cupaged import arrays, merge, merge_cuda, validate_merge
from cupaged.merge import States
from cupaged.opaque import opaque
from cupaged.spec import DTYPES

#: Names of the last axes of v.
_HEADS = ("num_heads", "head_dim")


@opaque
def merge_state(v_a: Any, s_a: Any, v_b: Any, s_b: Any) -> tuple[Any, Any]:
    """Merge two attention states over disjoint sets of keys into the one over both.

    Parameters
    ----------
    v_a, v_b : array [seq_len, num_heads, head_dim]
        Outputs over each set of keys: float16, bfloat16 or float32, both the same. Any strides with
        a contiguous last axis, any `head_dim`.
    s_a, s_b : float32 array [seq_len, num_heads]
        Their log-sum-exps, base 2. A state of -inf has no keys: it leaves the other one as it is,
        to the bit, whatever its output holds; two of them give 0 and -inf.

    Returns
    -------
    v : array [seq_len, num_heads, head_dim]
        The kind of array that `v_a` is, and of its dtype.
    s : float32 array [seq_len, num_heads]
        Base 2.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or has a wrong value; names it, what was expected and what
        came.
    BackendUnavailableError
        Device arrays without a GPU or NVRTC that serve them.

    Notes
    -----
    With `w = 2^(s - max(s_a, s_b))` the output is `(w_a v_a + w_b v_b) / (w_a + w_b)`, in float32
    and rounded once. A state that weighs less than `2^-126` weighs nothing; an infinite or NaN
    log-sum-exp goes through as IEEE arithmetic has it.
    """
    first, other = arrays.import_tensor(v_a, "v_a"), arrays.import_tensor(v_b, "v_b", v_a)
    s_first = arrays.import_tensor(s_a, "s_a", v_a)
    s_other = arrays.import_tensor(s_b, "s_b", v_a)
    device = validate_merge.state(first, s_first, "v_a", "s_a", ("seq_len", *_HEADS))
    validate_merge.other(other, s_other, "v_b", "s_b", first, "v_a")
    states = States(first, s_first, other[None], s_other[None])
    return _merged(states, first.shape, first, v_a, device)


@opaque
def merge_state_in_place(v: Any, s: Any, v_other: Any, s_other: Any, mask: Any = None) -> None:
    """Merge another attention state into one, as `merge_state()` merges two.

    Parameters
    ----------
    v : array [seq_len, num_heads, head_dim]
        Output of the state that is overwritten.
    s : float32 array [seq_len, num_heads]
        Its log-sum-exp, base 2; overwritten.
    v_other : array [seq_len, num_heads, head_dim]
        The other state's output. It shares no memory with `v`, unless it is `v`.
    s_other : float32 array [seq_len, num_heads]
        The other state's log-sum-exp.
    mask : bool or uint8 array [seq_len], optional
        Rows where it is False or 0 are left as they are.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or has a wrong value; names it, what was expected and what
        came. Nothing has been written.
    BackendUnavailableError
        Device arrays without a GPU or NVRTC that serve them.
    """
    first = arrays.import_tensor(validate_merge.mutable(v, "v"), "v")
    s_first = arrays.import_tensor(validate_merge.mutable(s, "s"), "s", v)
    other = arrays.import_tensor(v_other, "v_other", v)
    s_second = arrays.import_tensor(s_other, "s_other", v)
    device = validate_merge.state(first, s_first, "v", "s", ("seq_len", *_HEADS))
    validate_merge.other(other, s_second, "v_other", "s_other", first, "v")
    validate_merge.written(first, "v")
    validate_merge.written(s_first, "s")
    rows = None
    if mask is not None:
        rows = arrays.import_tensor(mask, "mask", v)
        validate_merge.mask(rows, first)
    states = States(first, s_first, other[None], s_second[None])
    current, stream = arrays.on_stream_of(v, device)
    with current:
        merge_where_they_are(states, first, s_first, rows, device, stream)


@opaque
def merge_states(v: Any, s: Any) -> tuple[Any, Any]:
    """Merge any number of attention states over disjoint sets of keys.

    Parameters
    ----------
    v : array [seq_len, num_states, num_heads, head_dim]
        As `merge_state()` takes the outputs of two.
    s : float32 array [seq_len, num_states, num_heads]
        Their log-sum-exps, base 2.

    Returns
    -------
    v : array [seq_len, num_heads, head_dim]
        The kind of array that `v` is, and of its dtype. Of no states at all it is 0.
    s : float32 array [seq_len, num_heads]
        Base 2. Of no states at all it is -inf.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or has a wrong value; names it, what was expected and what
        came.
    BackendUnavailableError
        Device arrays without a GPU or NVRTC that serve them.
    """
    outputs, lses = arrays.import_tensor(v, "v"), arrays.import_tensor(s, "s", v)
    device = validate_merge.state(outputs, lses, "v", "s", ("seq_len", "num_states", *_HEADS))
    seq_len, num_states, *rest = outputs.shape
    states = States()
    if num_states:
        by_state, s_by_state = outputs.swapaxes(0, 1), lses.swapaxes(0, 1)
        states = States(by_state[0], s_by_state[0], by_state[1:], s_by_state[1:])
    return _merged(states, (seq_len, *rest), outputs, v, device)


def _merged(
    states: States, shape: tuple[int, ...], like: Any, like_obj: Any, device: int | None
) -> tuple[Any, Any]:
    """Merge states into new arrays of the kind that the caller's `like_obj` is."""
    current, stream = arrays.on_stream_of(like_obj, device)
    with current:
        v_out, v = arrays.allocate_output(shape, like.dtype, like, like_obj)
        s_out, s = arrays.allocate_output(shape[:-1], DTYPES["float32"], like, like_obj)
        merge_where_they_are(states, v_out, s_out, None, device, stream)
        if v is None:
            v = arrays.export(v_out, like_obj)
        if s is None:
            s = arrays.export(s_out, like_obj)
    return v, s


def merge_where_they_are(
    states: States, v_out: Any, s_out: Any, mask: Any, device: int | None, stream: int
) -> None:
    """Merge states where they are; `stream` is the current one there."""
    if device is None:
        merge.run(states, v_out, s_out, mask)
    else:
        merge_cuda.run(device, stream, states, v_out, s_out, mask)
