"""What an attention call must return: the plain formula in float64, request by request.

No tiles, no online softmax, no pages: keys and values are gathered and contiguous before the
formula sees them. Nothing here imports the library under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from formula import Formula, alibi_slope, rotated, visible

Array = np.ndarray[Any, Any]

#: Largest relative error of one rounding, and half the distance of the smallest numbers.
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
HALF_SMALLEST = {"float16": 2.0**-25, "bfloat16": 2.0**-134}

LSE_TOLERANCE = 1e-3


def _grouped(x: Array, group: int) -> Array:
    """[rows, num_kv_heads * group, head_dim] → [num_kv_heads, group, rows, head_dim]."""
    rows, heads, head_dim = x.shape
    return x.reshape(rows, heads // group, group, head_dim).transpose(1, 2, 0, 3)


def _ungrouped(x: Array) -> Array:
    """[num_kv_heads, group, rows, ...] → [rows, num_kv_heads * group, ...]."""
    moved = np.moveaxis(x, 2, 0)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])


def _weights(logits: Array, seen: Array) -> tuple[Array, Array, Array]:
    """Softmax numerators over the seen keys, their sums, and what was subtracted.

    A NaN among the seen logits makes the row NaN, as does an infinite one.
    """
    hidden = np.where(seen, logits, -np.inf)
    top = hidden.max(axis=-1, initial=-np.inf)
    top = np.where(seen.any(axis=-1), top, 0)
    with np.errstate(invalid="ignore"):
        weights = np.where(seen, np.exp(logits - top[..., None]), 0)
    return weights, weights.sum(axis=-1), top


def _weighted_sum(weights: Array, values: Array) -> Array:
    """Weights [kv_heads, group, rows, keys] times values [kv_heads, keys, head_dim].

    A value that is not finite meets only the rows that give it a weight: 0 * NaN is not 0, and a
    key that a row does not see has no part in its output.
    """
    finite = np.isfinite(values)
    total = weights @ np.where(finite, values, 0)[:, None]
    used = (weights != 0).any(axis=(1, 2))[..., None]
    for head, key, d in np.argwhere(~finite & used):
        weight = weights[head, :, :, key]
        with np.errstate(invalid="ignore"):
            total[head, :, :, d] += np.where(weight == 0, 0, weight * values[head, key, d])
    return total


def attend(q: Array, k: Array, v: Array, formula: Formula) -> tuple[Array, Array]:
    """Attention of one request in float64.

    Parameters
    ----------
    q : [qo_len, num_qo_heads, head_dim_qk]
    k, v : [kv_len, num_kv_heads, head_dim_qk or head_dim_vo]
        Gathered: key `j` is the request's `j`-th.
    formula : Formula
        With the request's own mask, if any.

    Returns
    -------
    out : float64 [qo_len, num_qo_heads, head_dim_vo]
    lse : float64 [qo_len, num_qo_heads]
    """
    return _attend(q, k, v, formula, np.dtype(np.float64), None)


def plain_same_dtype(q: Array, k: Array, v: Array, formula: Formula) -> Array:
    """The formula as one would write it in q's dtype, with a float32 softmax.

    Queries and keys are rounded to q's dtype once they are rotated. Products accumulate in float32
    and the logits stay there; the normalised weights are rounded to q's dtype before they meet V,
    and so is the output. float8 keys and values are numbers of q's dtype, too.
    """
    return _attend(q, k, v, formula, np.dtype(np.float32), q.dtype)[0]


def _attend(
    q: Array, k: Array, v: Array, formula: Formula, compute: np.dtype[Any], rounded: Any
) -> tuple[Array, Array]:
    group = q.shape[1] // k.shape[1]
    (mask,) = (None,) if formula.custom_mask is None else formula.custom_mask
    seen = visible(len(q), len(k), formula.causal, formula.window_left, mask)
    queries, keys, values = (x.astype(compute) for x in (q, k, v))
    own, key = len(k) - len(q) + np.arange(len(q)), np.arange(len(k))
    with np.errstate(invalid="ignore", over="ignore"):
        if formula.pos_encoding_mode == "ROPE_LLAMA":
            queries, keys = (
                rotated(x, positions, formula.rope_scale or 1.0, formula.rope_theta or 1e4)
                for x, positions in ((queries, own), (keys, key))
            )
            if rounded is not None:
                queries, keys = (x.astype(rounded).astype(compute) for x in (queries, keys))
        keys, values = keys.transpose(1, 0, 2), values.transpose(1, 0, 2)
        logits = _grouped(queries, group) @ keys[:, None].transpose(0, 1, 3, 2)
        logits *= compute.type(formula.logit_scale(q.shape[2]))
        if formula.logits_soft_cap is not None and formula.logits_soft_cap > 0:
            cap = compute.type(formula.logits_soft_cap)
            logits = cap * np.tanh(logits / cap)
        if formula.pos_encoding_mode == "ALIBI":
            slopes = [alibi_slope(head, q.shape[1]) for head in range(q.shape[1])]
            slopes_of = np.array(slopes, compute).reshape(-1, group, 1, 1)
            logits += slopes_of * (key - own[:, None]).astype(compute)
        weights, total, top = _weights(logits, seen)
        if formula.sinks is not None:
            sinks = formula.sinks.astype(compute).reshape(-1, group, 1)
            # The larger of both is subtracted: neither exponential overflows.
            higher = np.maximum(top, sinks)
            weights *= np.exp(top - higher)[..., None]
            total, top = total * np.exp(top - higher) + np.exp(sinks - higher), higher
        empty = ~seen.any(axis=-1)
        total = np.where(empty, 1, total)
        weights /= total[..., None]
        if rounded is not None:
            weights = weights.astype(rounded).astype(compute)
        out = _weighted_sum(weights, values) * compute.type(formula.output_scale())
        lse = np.where(empty, -np.inf, top + np.log(total))
    if formula.lse_base == "log2":
        lse = lse / math.log(2.0)
    out = _ungrouped(out)
    return (out if rounded is None else out.astype(rounded)), _ungrouped(lse)


def tolerance(expected: Array, same_dtype: Array) -> float:
    """The largest error allowed in a request's output.

    Twice the largest error of the same-dtype formula, plus one rounding of the output's dtype at
    the largest magnitude of the output.
    """
    dtype = same_dtype.dtype.name
    plain = same_dtype.astype(np.float64)
    finite = np.isfinite(expected) & np.isfinite(plain)
    if not finite.any():
        return HALF_SMALLEST[dtype]
    error = np.abs(plain[finite] - expected[finite]).max()
    magnitude = np.abs(expected[finite]).max()
    return float(2 * error + UNIT_ROUNDOFF[dtype] * magnitude + HALF_SMALLEST[dtype])


def _worst(differs: Array) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(differs.argmax()), differs.shape))


def _place(index: tuple[int, ...]) -> str:
    return ", ".join(
        f"{name} {i}" for name, i in zip(("row", "head", "element"), index, strict=False)
    )


def _check_kind(got: Array, expected: Array, what: str) -> None:
    """NaN and Inf first: a maximum over differences would pass over them."""
    for kind, test in (("NaN", np.isnan), ("Inf", np.isposinf), ("-Inf", np.isneginf)):
        differs = test(got) != test(expected)
        if differs.any():
            index = _worst(differs)
            raise AssertionError(
                f"{what}, {_place(index)}: got {got[index]}, expected {expected[index]}: "
                f"{np.count_nonzero(differs)} of {got.size} differ in being {kind}"
            )


def assert_close(
    out: Array, expected: Array, same_dtype: Array, seen_rows: Array, what: str = "out"
) -> None:
    """Hold one request's output to the accuracy rule of the contract.

    Parameters
    ----------
    out : [qo_len, num_qo_heads, head_dim]
        What the library returned.
    expected : float64, of the same shape
        What `attend` returned.
    same_dtype : of the same shape
        What `plain_same_dtype` returned.
    seen_rows : bool [qo_len]
        Rows that see a key; the others must be exactly 0.
    what : str
        The request, in words, for the message.
    """
    assert out.shape == expected.shape, f"{what}: shape {out.shape}, expected {expected.shape}"
    assert out.dtype == same_dtype.dtype, f"{what}: {out.dtype}, expected {same_dtype.dtype}"
    got = out.astype(np.float64)
    _check_kind(got, expected, what)
    empty = (got != 0) & ~seen_rows[:, None, None]
    if empty.any():
        index = _worst(empty)
        raise AssertionError(
            f"{what}, {_place(index)}: got {got[index]}, expected exactly 0: the row sees no key"
        )
    finite = np.isfinite(expected)
    if not finite.any():
        return
    error = np.abs(np.where(finite, got, 0) - np.where(finite, expected, 0))
    allowed = tolerance(expected, same_dtype)
    index = _worst(error)
    if error[index] > allowed:
        raise AssertionError(
            f"{what}, {_place(index)}: got {got[index]:.8g}, expected {expected[index]:.8g}: "
            f"off by {error[index]:.3g}, allowed {allowed:.3g}; "
            f"{np.count_nonzero(error > allowed)} of {got.size} are off"
        )


def lse_tolerance(q: Array, k: Array, formula: Formula) -> float:
    """The largest error allowed in a request's LSE.

    With RoPE, rotated queries and keys are rounded: a logit may be wrong by two roundings of the
    longest ones' product. Rotating changes no length.
    """
    if formula.pos_encoding_mode != "ROPE_LLAMA" or not q.size or not k.size:
        return LSE_TOLERANCE
    longest_q, longest_k = (
        np.linalg.norm(np.nan_to_num(x.astype(np.float64), posinf=0, neginf=0), axis=-1).max()
        for x in (q, k)
    )
    product = abs(formula.logit_scale(q.shape[2])) * float(longest_q * longest_k)
    base = math.log(2.0) if formula.lse_base == "log2" else 1.0
    return LSE_TOLERANCE + 2 * UNIT_ROUNDOFF[q.dtype.name] * product / base


def assert_lse_close(
    lse: Array, expected: Array, what: str = "lse", allowed: float = LSE_TOLERANCE
) -> None:
    """Hold one request's LSE [qo_len, num_qo_heads] to the contract."""
    assert lse.shape == expected.shape, f"{what}: shape {lse.shape}, expected {expected.shape}"
    assert lse.dtype == np.float32, f"{what}: {lse.dtype}, expected float32"
    got = lse.astype(np.float64)
    # An infinite logit makes the sum of weights NaN, and the LSE NaN or Inf by what was
    # subtracted; a row without keys has -inf and nothing else.
    broken = ~np.isfinite(expected) & ~np.isneginf(expected)
    got, expected = np.where(broken & ~np.isfinite(got), 0, got), np.where(broken, 0, expected)
    _check_kind(got, expected, what)
    with np.errstate(invalid="ignore"):
        error = np.nan_to_num(np.abs(got - expected), nan=0.0)
    if error.size and error.max() > allowed:
        index = _worst(error)
        raise AssertionError(
            f"{what}, {_place(index)}: got {got[index]:.8g}, expected {expected[index]:.8g}: "
            f"off by {error[index]:.3g}, allowed {allowed:g}"
        )


def gather(
    pages: Array, kv_layout: str, indices: Sequence[int], kv_len: int, page_size: int
) -> Array:
    """A request's keys or values, in order: [kv_len, num_kv_heads, head_dim]."""
    rows = []
    for j in range(kv_len):
        page = pages[indices[j // page_size]]
        rows.append(page[j % page_size] if kv_layout == "NHD" else page[:, j % page_size])
    num_kv_heads = pages.shape[2 if kv_layout == "NHD" else 1]
    shape = (0, num_kv_heads, pages.shape[-1])
    return np.stack(rows) if rows else np.empty(shape, pages.dtype)


@dataclass(frozen=True, slots=True)
class Expected:
    """What one request of a call must return."""

    what: str
    rows: slice
    out: Array
    lse: Array
    same_dtype: Array
    seen_rows: Array
    lse_allowed: float


def expect(batch: Any, formula: Formula) -> list[Expected]:
    """What every request of a call with rows must return; `batch` is on the host."""
    found, begin = [], 0
    for r, qo_len in enumerate(batch.qo_len):
        if qo_len:
            q, k, v = batch.gathered(r)
            own = formula.of(r)
            mask = None if own.custom_mask is None else own.custom_mask[0]
            seen = visible(qo_len, len(k), formula.causal, formula.window_left, mask)
            found.append(
                Expected(
                    f"request {r} ({qo_len} queries, {len(k)} keys)",
                    slice(begin, begin + qo_len),
                    *attend(q, k, v, own),
                    plain_same_dtype(q, k, v, own),
                    seen.any(axis=1),
                    lse_tolerance(q, k, own),
                )
            )
        begin += qo_len
    return found


def check_expected(expected: list[Expected], out: Array, lse: Array | None = None) -> None:
    """Hold a whole call's result to the contract, request by request.

    Parameters
    ----------
    expected : list of Expected
    out : [nnz_qo, num_qo_heads, head_dim]
    lse : float32 [nnz_qo, num_qo_heads], optional
    """
    for one in expected:
        assert_close(out[one.rows], one.out, one.same_dtype, one.seen_rows, f"out of {one.what}")
        if lse is not None:
            what = f"lse of {one.what}"
            assert_lse_close(lse[one.rows], one.lse, what, one.lse_allowed)
    rows = expected[-1].rows.stop if expected else 0
    assert len(out) == rows, f"out has {len(out)} rows, expected {rows}"
    assert lse is None or len(lse) == rows


def check_all(batch: Any, formula: Formula, out: Array, lse: Array | None = None) -> None:
    """Hold a whole call's result to the contract; `batch` is on the host."""
    check_expected(expect(batch, formula), out, lse)
