"""What is right: attention by the plain formula, sharing nothing with what it judges.

No pages, no tiles, no loop over requests: one attention of all rows over all keys, under a
block-diagonal mask. It is what xFormers computes with `BlockDiagonalCausalFromBottomRightMask`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]
Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Expected:
    """What is right, and what the plain formula gives in float16.

    Attributes
    ----------
    out, plain : float64 [nnz_qo, heads, head_dim]
        0 in a row that sees no key.
    lse : float64 [nnz_qo, heads]
        In base 2; -inf in a row that sees no key.
    """

    out: Float64
    plain: Float64
    lse: Float64


def attention(qo_len: Lengths, kv_len: Lengths, q: Half, k: Half, v: Half) -> Expected:
    """Causal attention of a ragged batch, in float64 and, as plainly as can be, in float16.

    Parameters
    ----------
    qo_len, kv_len : int64 [batch]
    q : float16 [nnz_qo, heads, head_dim]
    k, v : float16 [sum of kv_len, heads, head_dim]
        Request after request, contiguous; as many heads as q has.
    """
    mask = block_diagonal_causal_mask(qo_len, kv_len)
    scale = 1 / math.sqrt(q.shape[2])
    exact_q, exact_k, exact_v = (x.astype(np.float64).transpose(1, 0, 2) for x in (q, k, v))
    weights, lse = _softmax(exact_q @ exact_k.transpose(0, 2, 1) * scale, mask)
    # Products sum in float32, as a matrix unit does, and the softmax has their sums as they are.
    plain_q, plain_k, plain_v = (x.astype(np.float32).transpose(1, 0, 2) for x in (q, k, v))
    logits = plain_q @ plain_k.transpose(0, 2, 1) * np.float32(scale)
    half_weights = _softmax(logits, mask)[0].astype(np.float16)
    plain = (half_weights.astype(np.float32) @ plain_v).astype(np.float16)
    return Expected(
        out=(weights @ exact_v).transpose(1, 0, 2),
        plain=plain.astype(np.float64).transpose(1, 0, 2),
        lse=lse.T / math.log(2),
    )


def block_diagonal_causal_mask(qo_len: Lengths, kv_len: Lengths) -> Mask:
    """Which row sees which key, over all requests at once: bool [all queries, all keys].

    A row sees keys of its own request alone, and the request's last row sees all of them.
    """
    q_request, k_request = (np.arange(len(n)).repeat(n) for n in (qo_len, kv_len))
    # Both count down to 1 at their request's end, which is where the bottom right corner is.
    q_left = qo_len.cumsum()[q_request] - np.arange(len(q_request))
    k_left = kv_len.cumsum()[k_request] - np.arange(len(k_request))
    own: Mask = q_request[:, None] == k_request
    return own & (k_left >= q_left[:, None])


def _softmax(logits: npt.NDArray[Any], mask: Mask) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Weights over the last axis and the natural LSE; 0 and -inf for a row that sees no key."""
    masked = np.where(mask, logits, -np.inf)
    top = masked.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(masked - np.where(top == -np.inf, 0, top))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return weights / np.where(total == 0, 1, total), lse
