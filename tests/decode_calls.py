"""Decoding the batches of `batches.py`: requests that all have the same number of query rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import batches
import numpy as np
import strategies
from hypothesis import strategies as st
from oracle import Formula
from small_call import ints, pages

import cupaged

Decode = cupaged.BatchDecodeWithPagedKVCacheWrapper

#: What a decode wrapper computes, in the formula's terms: it always aligns to the bottom right.
DECODING = Formula(causal=True)

GROUPS = (*strategies.GROUPS, 8)
MOST_Q_LEN = 8


def build(
    rng: np.random.Generator, kv_len: Sequence[int], q_len: int = 1, **options: Any
) -> batches.Batch:
    """A batch of requests of `q_len` rows each; options as `batches.build` takes them."""
    return batches.build(rng, [q_len] * len(kv_len), kv_len, **options)


def q_len_of(batch: batches.Batch) -> int:
    """Query rows of each request; 1 where there is no request."""
    return batch.qo_len[0] if batch.qo_len else 1


class Decoder:
    """A decode wrapper that `batches.Batch.plan()` and `strategies.check_call()` can use.

    They call it as they call a prefill wrapper: the first index array becomes `q_len_per_req`, and
    `causal`, which decoding always is, goes.
    """

    def __init__(self, q_len: int = 1, **options: Any) -> None:
        self.q_len = q_len
        self.wrapper = Decode(**options)
        self.run = self.wrapper.run

    def plan(self, qo_indptr: Any, *others: Any, causal: bool = True, **options: Any) -> None:
        self.wrapper.plan(*others, q_len_per_req=self.q_len, **options)

    @property
    def schedule(self) -> Any:
        return self.wrapper._plan.schedule


def planned(
    batch: batches.Batch, formula: Formula = DECODING, backend: str = "reference", **options: Any
) -> Decoder:
    """Plan a batch with its index arrays on the host."""
    workspace = options.pop("workspace", None)
    decoder = Decoder(
        q_len_of(batch),
        float_workspace_buffer=workspace,
        kv_layout=batch.kv_layout,
        backend=backend,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cupaged.CupagedWarning)
        batch.plan(decoder, **formula.plan_options, **options)
    return decoder


@st.composite
def calls(draw: st.DrawFn, variants: bool = False, **bounds: int) -> tuple[strategies.Call, int]:
    """Whole calls of decoding, and the rows of every request in them."""
    call = draw(strategies.calls(max_qo=1, variants=variants, decoding=True, **bounds))
    q_len = draw(st.one_of(st.just(1), st.integers(1, MOST_Q_LEN)))
    group = draw(st.sampled_from(GROUPS))
    call = replace(
        call,
        qo_len=(q_len,) * len(call.kv_len),
        build_options=call.build_options | {"group": group},
        formula=replace(call.formula, causal=True),
    )
    return call, q_len


# A small legal call, to change one argument of


def plan_arguments(**changes: Any) -> dict[str, Any]:
    """Three requests over pages of 16 tokens: 20, 16 and no keys."""
    return {
        "indptr": ints(0, 2, 3, 3),
        "indices": ints(4, 1, 0),
        "last_page_len": ints(4, 16, 0),
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "page_size": 16,
        **changes,
    }


def run_arguments(**changes: Any) -> dict[str, Any]:
    """For two rows of each request."""
    return {
        "q": np.zeros((6, 4, 64), np.float16),
        "paged_kv_cache": (pages(), pages()),
        **changes,
    }


def small_plan(**changes: Any) -> Decode:
    wrapper = Decode(backend="reference", kv_layout=changes.pop("kv_layout", "NHD"))
    wrapper.plan(**plan_arguments(**changes))
    return wrapper
