"""Merges attention states in NumPy: the backend for host arrays.

A state is an output over a set of keys and the log-sum-exp, base 2, of their logits. States over
disjoint sets make up the one over all of the keys: with `w_i = 2^(s_i - max s)`, the output is
`sum w_i v_i / sum w_i` and the log-sum-exp `max s + log2(sum w_i)` (Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]

#: A weight below this is 0, as on a GPU.
_SMALLEST_WEIGHT = np.float32(2.0**-126)


class States(NamedTuple):
    """States to be merged, NumPy or CuPy arrays of any strides with a contiguous last axis of v.

    Attributes
    ----------
    v : array [num_rows, num_heads, head_dim] or None
        Output of the first state; None where there is no state at all.
    s : float32 array [num_rows, num_heads] or None
        Its log-sum-exp; -inf where it has no keys, and then v is not read into a result.
    v_rest : array [num_states - 1, num_rows, num_heads, head_dim] or None
        Outputs of the other states.
    s_rest : float32 array [num_states - 1, num_rows, num_heads] or None
    """

    v: Any = None
    s: Any = None
    v_rest: Any = None
    s_rest: Any = None

    @property
    def num_states(self) -> int:
        """How many they are."""
        return 0 if self.v is None else 1 + len(self.v_rest)


def run(states: States, v_out: Any, s_out: Any, mask: Any | None) -> None:
    """Merge states on the host.

    Parameters
    ----------
    states : States
    v_out : array [num_rows, num_heads, head_dim]
        Written; may be the first state's.
    s_out : float32 array [num_rows, num_heads]
        Written; may be the first state's.
    mask : bool or uint8 array [num_rows], optional
        Rows where it is 0 are not written.
    """
    rows = slice(None) if mask is None else np.flatnonzero(mask)
    outputs: list[Any] = []
    lses = np.empty((0, *s_out[rows].shape), np.float32)
    if states.v is not None:
        outputs = [v[rows] for v in (states.v, *states.v_rest)]
        lses = np.stack([s[rows] for s in (states.s, *states.s_rest)])
    with np.errstate(over="ignore", invalid="ignore"):
        shares, lse = _shares(lses)
        total = np.zeros(v_out[rows].shape, np.float32)
        for output, share in zip(outputs, shares, strict=True):
            # What weighs nothing may hold anything: 0 * NaN is not 0.
            weighs = (share != 0)[..., None]
            total += np.where(weighs, share[..., None] * output.astype(np.float32), 0)
        merged = total.astype(v_out.dtype)
    # One state alone is the result, to the bit.
    live = lses != -np.inf
    for output, alone in zip(outputs, live & (live.sum(axis=0) == 1), strict=True):
        merged[alone] = output[alone]
    v_out[rows] = merged
    s_out[rows] = lse


def _shares(lses: Float) -> tuple[Float, Float]:
    """Every state's share of the result, and the log-sum-exp of all: float32 [num_states, ..]."""
    live = lses != -np.inf  # NaN is
    # fmax passes over NaN, as the GPU's maximum does; the weight is NaN all the same.
    top = np.fmax.reduce(lses, axis=0, initial=-np.inf)
    shift = np.where(top == -np.inf, np.float32(0), top)
    weights = np.exp2(lses - shift)
    weights[weights < _SMALLEST_WEIGHT] = 0
    total = weights.sum(axis=0)
    count = live.sum(axis=0)
    empty = count == 0
    safe = np.where(empty, np.float32(1), total)
    lse = np.where(empty, np.float32(-np.inf), shift + np.log2(safe))
    for state, alone in zip(lses, live & (count == 1), strict=True):
        lse[alone] = state[alone]
    return weights / safe, lse
