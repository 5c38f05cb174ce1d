"""Calls of the reference backend with what is off by default."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import batches
import numpy as np
import oracle
import pytest
from oracle import Formula
from test_reference import attention

LN_2 = float(np.log(2.0))
SPLITS: list[dict[str, Any]] = [{}, {"fixed_split_size": 2}, {"disable_split_kv": True}]
with_and_without_splits = pytest.mark.parametrize(
    "splits", SPLITS, ids=lambda splits: next(iter(splits), "free")
)


def check(batch: batches.Batch, formula: Formula, **plan_options: Any) -> None:
    """Against the formula; keys that no row sees are NaN, as are their values."""
    batch = batch.with_hidden_keys(formula)
    oracle.check_all(batch, formula, *attention(batch, formula, **plan_options))


def same_bits(batch: batches.Batch, *formulas: Formula) -> bool:
    """Whether formulas give the same results, where nothing is split."""
    results = [attention(batch, formula, disable_split_kv=True) for formula in formulas]
    return all(
        a.tobytes() == b.tobytes()
        for one, other in pairwise(results)
        for a, b in zip(one, other, strict=True)
    )


def masks_of(
    rng: np.random.Generator, batch: batches.Batch, window_left: int = 50
) -> tuple[np.ndarray, ...]:
    """Bits by chance, and keys that no row sees: a stretch, and others by chance.

    Some are there only for rows that causality hides them from, and some only for rows whose
    window, of `window_left`, has left them behind.
    """
    masks = []
    for qo_len, kv_len in zip(batch.qo_len, batch.kv_len, strict=True):
        mask = rng.random((qo_len, kv_len)) < 0.6
        mask[:, 20:150] = False
        own, key = kv_len - qo_len + np.arange(qo_len)[:, None], np.arange(kv_len)
        kind = rng.integers(0, 10, kv_len)
        mask &= (kind > 3) | ((kind == 2) & (key > own)) | ((kind == 3) & (key < own - window_left))
        masks.append(mask)
    return tuple(masks)


#: What leaves keys that no row of their request sees, or at least slots of no key; `hiding()` adds
#: the mask.
HIDING = {
    "causal": Formula(True),
    "soft cap": Formula(True, logits_soft_cap=3.0),
    "window": Formula(window_left=50),
    "causal window": Formula(True, window_left=50),
    "window of one key": Formula(True, window_left=0),
    "window and soft cap": Formula(True, window_left=50, logits_soft_cap=3.0),
    "window and alibi": Formula(True, window_left=50, pos_encoding_mode="ALIBI"),
    "window and rope": Formula(True, window_left=50, pos_encoding_mode="ROPE_LLAMA"),
    "mask": Formula(),
    "mask and causal": Formula(True),
    "mask and soft cap": Formula(logits_soft_cap=3.0),
    "mask and window": Formula(True, window_left=50),
    "mask, window and the rest": Formula(
        True, window_left=50, logits_soft_cap=3.0, pos_encoding_mode="ALIBI"
    ),
}


def hiding(rng: np.random.Generator, name: str, batch: batches.Batch) -> Formula:
    """A formula of `HIDING`, for a batch."""
    masks = masks_of(rng, batch) if name.startswith("mask") else None
    return replace(HIDING[name], custom_mask=masks)


def hidden_forms(batch: batches.Batch, formula: Formula) -> list[batches.Batch]:
    """The batch with one thing and another as K and V of what no row sees."""
    values = (0.0, np.nan, np.inf, -np.inf, 3e4)
    return [batch.with_hidden_keys(formula, value) for value in values]


def mixed(rng: np.random.Generator, **options: Any) -> batches.Batch:
    """Requests of every tile shape, with more keys than queries and fewer, with none of either."""
    qo_len, kv_len = [3, 70, 1, 0, 40, 5, 2], [200, 300, 130, 20, 25, 2, 0]
    return batches.build(
        rng, qo_len, kv_len, **{"group": 3, "num_kv_heads": 1, "page_size": 8, **options}
    )
