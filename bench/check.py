"""Is an output right? The plain formula in float64, for a sample of every request's rows.

It serves NumPy and CuPy arrays alike (`xp`), so what judges the GPU is tested without one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from workloads import PageTable, Workload, head_rows

#: An (output row, head) is wrong when it differs from the formula by more than this many unit
#: roundoffs of its dtype, in the 2-norm over head_dim. A right kernel rounds the probabilities
#: and the output once each, which is less than two.
TOLERATED_ROUNDOFFS = 4
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
EXPONENT_BITS = {"float16": 0x7C00, "bfloat16": 0x7F80}

#: NaN in float16 and in bfloat16 alike
POISON_BITS = 0x7FFF

#: rows looked at: so many in all where requests are few, and at least so many of each request
ROWS_PER_BATCH = 64
ROWS_PER_REQUEST = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found.

    Attributes
    ----------
    ok : bool
        Every value is finite, and every sampled row within tolerance.
    max_abs_err, max_rel_err : float
        Largest difference of a value; largest of a row and head in the 2-norm, relative.
    detail : str
        Where the worst is, in words; empty when `ok`.
    """

    ok: bool
    max_abs_err: float
    max_rel_err: float
    detail: str = ""


def sample_rows(qo_len: int, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of a request to look at: the first, the last, and some between."""
    count = max(ROWS_PER_REQUEST, ROWS_PER_BATCH // batch)
    if qo_len <= count:
        return np.arange(qo_len)
    between = rng.choice(qo_len, count - 2, replace=False)
    return np.unique(np.concatenate([[0, qo_len - 1], between]))


def visible_keys(rows: np.ndarray, qo_len: int, kv_len: int, causal: bool) -> np.ndarray:
    """How many keys, from the first on, each row sees."""
    if not causal:
        return np.full(len(rows), kv_len)
    seen: np.ndarray = np.clip(kv_len - qo_len + rows + 1, 0, kv_len)
    return seen


def attention_rows(xp: Any, q: Any, k: Any, v: Any, visible: Any, sm_scale: float) -> Any:
    """Attention of some rows of one request.

    Parameters
    ----------
    xp : module
        `numpy` or `cupy`.
    q : array, float64, [rows, num_qo_heads, head_dim]
    k, v : array, float64, [kv_len, num_kv_heads, head_dim]
    visible : array, int, [rows]
        How many keys, from the first on, a row sees.
    sm_scale : float
        What multiplies `q·k`.

    Returns
    -------
    array, float64, [rows, num_qo_heads, head_dim]
        0 for a row that sees no key.
    """
    rows, num_qo_heads, head_dim = q.shape
    kv_len, num_kv_heads, _ = k.shape
    if kv_len == 0:
        return xp.zeros_like(q)
    group = num_qo_heads // num_kv_heads
    grouped = q.reshape(rows, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    grouped = grouped.reshape(num_kv_heads, rows * group, head_dim)
    logits = sm_scale * xp.matmul(grouped, k.transpose(1, 2, 0))
    logits = logits.reshape(num_kv_heads, rows, group, kv_len)
    seen = xp.arange(kv_len) < visible[:, None]
    logits = xp.where(seen[None, :, None, :], logits, -math.inf)
    peak = logits.max(axis=-1, keepdims=True)
    weights = xp.exp(logits - xp.where(peak == -math.inf, 0.0, peak))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / xp.where(total == 0.0, 1.0, total)
    out = xp.matmul(weights.reshape(num_kv_heads, rows * group, kv_len), v.transpose(1, 0, 2))
    out = out.reshape(num_kv_heads, rows, group, head_dim).transpose(1, 0, 2, 3)
    return out.reshape(rows, num_qo_heads, head_dim)


def widen(xp: Any, bits: Any, dtype: str) -> Any:
    """float64 values of a 16-bit array given by its bits."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    # bfloat16 is the upper half of a float32; no conversion kernel has to know the dtype.
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Answers:
    """What the formula gives for a sample of a batch's rows.

    Attributes
    ----------
    requests, rows : int array [sampled], on the host
        Whose row it is, and which of that request's.
    places : int array [sampled]
        Which row of q, and of the output.
    expected : array, float64, [sampled, num_qo_heads, head_dim]
    """

    requests: np.ndarray
    rows: np.ndarray
    places: Any
    expected: Any


def answers(
    xp: Any,
    workload: Workload,
    table: PageTable,
    dtype: str,
    q: Any,
    k: Any,
    v: Any,
    rng: np.random.Generator,
) -> Answers:
    """Draw rows of every request, and compute them.

    Parameters
    ----------
    xp : module
        `numpy` or `cupy`, whose arrays the others are.
    workload, table : Workload, PageTable
        The batch.
    dtype : str
        "float16" or "bfloat16", of all three arrays.
    q : array, [nnz_qo, num_qo_heads, head_dim]
    k, v : array, in pages, as the workload's layout has it
    rng : numpy.random.Generator
        Draws the sample.
    """
    keys, values = (cache.view(np.uint16).reshape(-1, workload.head_dim) for cache in (k, v))
    queries = q.view(np.uint16)
    requests, sampled, places = [], [], []
    expected = [xp.zeros((0, *q.shape[1:]))]
    for request, (qo_len, kv_len) in enumerate(
        zip(workload.qo_lens, workload.kv_lens, strict=True)
    ):
        rows = sample_rows(qo_len, workload.batch, rng)
        if len(rows) == 0:
            continue
        requests.append(np.full(len(rows), request))
        sampled.append(rows)
        places.append(rows + int(table.qo_indptr[request]))
        lie = xp.asarray(head_rows(workload, table, table.slots(request)))
        expected.append(
            attention_rows(
                xp,
                widen(xp, queries[xp.asarray(places[-1])], dtype),
                widen(xp, keys[lie], dtype),
                widen(xp, values[lie], dtype),
                xp.asarray(visible_keys(rows, qo_len, kv_len, workload.causal)),
                1.0 / math.sqrt(workload.head_dim),
            )
        )
    none = np.zeros(0, np.int64)
    return Answers(
        np.concatenate([none, *requests]),
        np.concatenate([none, *sampled]),
        xp.asarray(np.concatenate([none, *places])),
        xp.concatenate(expected),
    )


def compare(xp: Any, known: Answers, dtype: str, out_bits: Any, shape: tuple[int, ...]) -> Verdict:
    """Hold an output against what the formula gives.

    Parameters
    ----------
    xp : module
        `numpy` or `cupy`, whose arrays the others are.
    known : Answers
        The formula's rows.
    dtype : str
        "float16" or "bfloat16", of the output.
    out_bits : array, uint16, [nnz_qo, num_qo_heads, head_dim]
        The output's bits. All are looked at for NaN and Inf, the sampled rows for their values.
    shape : tuple of int
        What the output's shape has to be.
    """
    if out_bits.shape != shape:
        return Verdict(False, math.inf, math.inf, f"shape {out_bits.shape}, expected {shape}")
    exponent = np.uint16(EXPONENT_BITS[dtype])
    broken = (out_bits & exponent) == exponent
    num_broken = int(broken.sum())
    if num_broken:
        row, head, _ = np.unravel_index(int(broken.argmax()), out_bits.shape)
        detail = f"{num_broken} values are not finite, the first in row {row}, head {head}"
        return Verdict(False, math.inf, math.inf, detail)
    if len(known.rows) == 0:
        return Verdict(True, 0.0, 0.0)
    difference = widen(xp, out_bits[known.places], dtype) - known.expected
    error = xp.sqrt((difference**2).sum(axis=-1))
    norm = xp.sqrt((known.expected**2).sum(axis=-1))
    # A row that sees no key must be exactly 0: any difference there is out of all proportion.
    relative = error / xp.maximum(norm, 1e-300)
    worst = float(relative.max())
    ok = worst <= TOLERATED_ROUNDOFFS * UNIT_ROUNDOFF[dtype]
    detail = ""
    if not ok:
        place, head = np.unravel_index(int(relative.argmax()), relative.shape)
        request, row = known.requests[place], known.rows[place]
        detail = f"request {request}, row {row}, head {head}: off by {worst:.1e}"
    return Verdict(ok, float(xp.abs(difference).max()), worst, detail)
