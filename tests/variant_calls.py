"""Calls of the reference backend with what is off by default."""

from __future__ import annotations

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
    oracle.check_all(batch, formula, *attention(batch, formula, **plan_options))


def same_bits(batch: batches.Batch, *formulas: Formula) -> bool:
    """Whether formulas give the same results, where nothing is split."""
    results = [attention(batch, formula, disable_split_kv=True) for formula in formulas]
    return all(
        a.tobytes() == b.tobytes()
        for one, other in pairwise(results)
        for a, b in zip(one, other, strict=True)
    )


def mixed(rng: np.random.Generator, **options: Any) -> batches.Batch:
    """Requests of every tile shape, with more keys than queries and fewer, with none of either."""
    qo_len, kv_len = [3, 70, 1, 0, 40, 5, 2], [200, 300, 130, 20, 25, 2, 0]
    return batches.build(
        rng, qo_len, kv_len, **{"group": 3, "num_kv_heads": 1, "page_size": 8, **options}
    )
