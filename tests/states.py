"""Random attention states, what they merge into by the plain formula, and how results are checked.

Nothing here imports the library under test. Outputs of states without keys are NaN, as is what lies
around the arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import batches
import ml_dtypes
import numpy as np
from batches import View
from hypothesis import strategies as st

Array = np.ndarray[Any, Any]

DTYPES = {**batches.DTYPES, "float32": np.dtype(np.float32)}
#: Largest relative error of one rounding, and half the distance of the smallest numbers.
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
HALF_SMALLEST = {"float16": 2.0**-25, "bfloat16": 2.0**-134, "float32": 2.0**-126}
#: Of a weight in float32, by approximate exponentials, and of each addition.
WEIGHT_ERROR = 2.0**-20

#: How v may lie in memory: on its own; with more heads behind; every other row of something; in
#: rows of odd length; one element off every boundary; backwards.
FORMS = ("contiguous", "fused", "every other row", "odd", "offset", "backwards")


def view(form: str, shape: tuple[int, ...], dtype: Any) -> View:
    """A tensor [.., num_heads, head_dim] in one of `FORMS`, all NaN."""
    *outer, heads, head_dim = shape
    dtype = np.dtype(dtype)
    if form == "every other row":
        storage = np.full((2 * outer[0], *shape[1:]), np.nan, dtype)
        return View(storage, (slice(None, None, 2),))
    if form == "backwards":
        storage = np.full(shape, np.nan, dtype)
        return View(storage, (slice(None, None, -1),))
    more_heads, more_dim, begin = {
        "contiguous": (0, 0, 0),
        "fused": (3, 0, 0),
        "odd": (0, 1, 0),
        "offset": (1, 8, 1),
    }[form]
    storage = np.full((*outer, heads + more_heads, head_dim + more_dim), np.nan, dtype)
    return View(storage, (..., slice(heads), slice(begin, begin + head_dim)))


def lse_view(strided: bool, shape: tuple[int, ...]) -> View:
    """A float32 array [.., num_heads], all NaN; where it is strided, every other element is it."""
    *outer, heads = shape
    step = 2 if strided else 1
    return View(np.full((*outer, heads * step), np.nan, np.float32), (..., slice(None, None, step)))


@dataclass(frozen=True, slots=True)
class States:
    """States to merge.

    Attributes
    ----------
    v_view : View
        [seq_len, num_states, num_heads, head_dim]
    s_view : View
        float32 [seq_len, num_states, num_heads]
    """

    v_view: View
    s_view: View

    @property
    def v(self) -> Any:
        return self.v_view.array

    @property
    def s(self) -> Any:
        return self.s_view.array

    def on(self, asarray: Callable[[Array], Any]) -> States:
        return States(self.v_view.on(asarray), self.s_view.on(asarray))

    def pair(self, i: int, j: int) -> tuple[Any, Any, Any, Any]:
        """Two of them, as `merge_state()` takes them."""
        return self.v[:, i], self.s[:, i], self.v[:, j], self.s[:, j]


def build(
    rng: np.random.Generator,
    shape: tuple[int, int, int, int],
    dtype: str = "float16",
    *,
    form: str = "contiguous",
    strided_lse: bool = False,
    empty: float = 0.3,
    spread: float = 4.0,
) -> States:
    """Random states.

    Parameters
    ----------
    shape : tuple of int
        [seq_len, num_states, num_heads, head_dim]
    form : str
        Of `FORMS`.
    empty : float
        How many of them have no keys: an LSE of -inf, and NaN for an output.
    spread : float
        Standard deviation of the LSEs.
    """
    found = States(view(form, shape, DTYPES[dtype]), lse_view(strided_lse, shape[:-1]))
    v = rng.standard_normal(shape).astype(DTYPES[dtype])
    s = (rng.standard_normal(shape[:-1]) * spread).astype(np.float32)
    without = rng.random(s.shape) < empty
    v[without], s[without] = np.nan, -np.inf
    found.v[...], found.s[...] = v, s
    return found


def merged(v: Array, s: Array) -> tuple[Array, Array]:
    """What states merge into, in float64.

    Parameters
    ----------
    v : [seq_len, num_states, num_heads, head_dim]
    s : [seq_len, num_states, num_heads]

    Returns
    -------
    v : float64 [seq_len, num_heads, head_dim]
    s : float64 [seq_len, num_heads]
    """
    seen = s > -np.inf
    lse = s.astype(np.float64)
    top = np.where(seen.any(axis=1), lse.max(axis=1, initial=-np.inf), 0)
    weights = np.where(seen, np.exp2(lse - top[:, None]), 0)
    total = weights.sum(axis=1)
    values = np.where(seen[..., None], v.astype(np.float64), 0)
    out = (weights[..., None] * values).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.where(total[..., None] > 0, out / total[..., None], 0)
        return out, np.where(total > 0, top + np.log2(total), -np.inf)


def bits(x: Array) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def check(v: Array, s: Array, found_v: Array, found_s: Array) -> None:
    """Hold what states were merged into to the formula.

    Where one state alone has keys it is the result, to the bit; where none has, 0 and -inf are.

    Parameters
    ----------
    v : [seq_len, num_states, num_heads, head_dim]
    s : float32 [seq_len, num_states, num_heads]
    found_v : [seq_len, num_heads, head_dim]
    found_s : float32 [seq_len, num_heads]
    """
    expected, expected_s = merged(v, s)
    assert (found_v.shape, found_v.dtype) == (expected.shape, v.dtype)
    assert (found_s.shape, found_s.dtype) == (expected_s.shape, np.float32)
    live = s > -np.inf
    count = live.sum(axis=1)
    for state in range(s.shape[1]):
        alone = live[:, state] & (count == 1)
        assert bits(found_v[alone]) == bits(v[:, state][alone])
        assert bits(found_s[alone]) == bits(s[:, state][alone])
    assert bits(found_v[count == 0]) == bytes(found_v[count == 0].nbytes)
    assert np.isneginf(found_s[count == 0]).all()
    got, some = found_v.astype(np.float64), count > 0
    assert np.isfinite(got).all()
    name = v.dtype.name
    largest = np.where(live[..., None], np.abs(v.astype(np.float64)), 0).max(axis=1, initial=0)
    allowed = largest * (UNIT_ROUNDOFF[name] + WEIGHT_ERROR * s.shape[1]) + HALF_SMALLEST[name]
    worst = np.where(got == expected, 0, np.abs(got - expected) / allowed)
    assert worst.max(initial=0) <= 1, f"off by {worst.max():.3g} times what is allowed"
    error = np.abs(found_s[some] - expected_s[some])
    assert (error <= WEIGHT_ERROR * (4 + np.abs(expected_s[some]))).all(), error.max()


@st.composite
def draws(draw: st.DrawFn, num_states: st.SearchStrategy[int]) -> States:
    """Random states, of any shape, dtype and layout."""
    head_dim = st.one_of(st.sampled_from([1, 8, 64, 100, 128, 256, 264, 512]), st.integers(1, 600))
    shape = (draw(st.integers(0, 5)), draw(num_states), draw(st.integers(0, 5)), draw(head_dim))
    return build(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        shape,
        draw(st.sampled_from(list(DTYPES))),
        form=draw(st.sampled_from(FORMS)),
        strided_lse=draw(st.booleans()),
        empty=draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        spread=draw(st.sampled_from([0.0, 1.0, 10.0, 300.0])),
    )


#: Bit patterns that arithmetic would change: a NaN with a payload, one that signals, minus zero.
ODD_BITS = {
    "float16": (np.uint16, (0x7E57, 0x7C01, 0x8000)),
    "bfloat16": (np.uint16, (0x7FD3, 0x7F81, 0x8000)),
    "float32": (np.uint32, (0x7FC12345, 0x7F800001, 0x80000000)),
}


def odd(dtype: str, shape: tuple[int, ...]) -> Array:
    """An array of `ODD_BITS`."""
    unsigned, patterns = ODD_BITS[dtype]
    count = int(np.prod(shape))
    return np.resize(np.array(patterns, unsigned), count).reshape(shape).view(DTYPES[dtype])


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
