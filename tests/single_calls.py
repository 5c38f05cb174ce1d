"""What the tests of single requests share: plans that are counted, and calls on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import batches
import numpy as np
import oracle
import pytest
from graph_calls import Framework, put, take
from oracle import Formula

import cupaged
from cupaged import schedule, single_plans
from cupaged.kept_plans import KeptPlans

#: What a recording without a call before is told, with the function's name; and one with a mask.
NO_PLAN = (
    "{}() is being recorded in a CUDA graph, and no plan is kept for it: call it once before, in "
    "the same thread, with the same shapes, dtypes and options"
)
WITH_MASK = (
    "single_prefill_with_kv_cache() is being recorded in a CUDA graph with a custom mask, which is "
    "read on the host: record run() of a BatchPrefillWithRaggedKVCacheWrapper made with "
    "use_cuda_graph=True"
)


def count_plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Forget the plans that are kept or recorded; the schedules that are built from now on."""
    monkeypatch.setattr(single_plans, "_kept", KeptPlans(single_plans._MOST_PLANS))
    monkeypatch.setattr(single_plans, "_recorded", {})
    found: list[Any] = []
    build = schedule.build

    def counted(*args: Any, **options: Any) -> Any:
        found.append(build(*args, **options))
        return found[-1]

    monkeypatch.setattr(schedule, "build", counted)
    return found


def drawn(
    rng: np.random.Generator, qo_len: int = 5, kv_len: int = 40, dtype: Any = np.float16
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shapes = (qo_len, 4, 64), (kv_len, 2, 64), (kv_len, 2, 64)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return q, k, v


def check(host: tuple[np.ndarray, ...], formula: Formula, out: Any, lse: Any = None) -> None:
    """Hold a result to the contract, given q, k and v as rows on the host."""
    batch = SimpleNamespace(qo_len=(len(host[0]),), gathered=lambda request: host)
    oracle.check_all(batch, formula, out, lse)


@dataclass(frozen=True)
class Case:
    """A call: lengths, options of both functions, and whether one row is decoded."""

    qo_len: int
    kv_len: int
    options: dict[str, Any] = field(default_factory=dict)
    decodes: bool = False
    dtype: str = "float16"

    @property
    def function(self) -> Callable[..., Any]:
        return (
            cupaged.single_decode_with_kv_cache
            if self.decodes
            else cupaged.single_prefill_with_kv_cache
        )


#: Decoding that is split.
DECODING = Case(1, 3000, decodes=True)


class Layer:
    """The arrays of a call, which a graph reads and writes at every replay."""

    def __init__(self, of: Framework, case: Case) -> None:
        self.case = case
        q_shape = (4, 64) if case.decodes else (case.qo_len, 4, 64)
        self.q = of.empty(q_shape, case.dtype)
        self.k, self.v = (of.empty((case.kv_len, 2, 64), case.dtype) for _ in range(2))
        self.host: tuple[np.ndarray, ...] = ()
        self.results: Any = None

    def put(self, rng: np.random.Generator) -> None:
        """Bring other values; a result that is there already becomes NaN."""
        dtype = batches.DTYPES[self.case.dtype]
        q, k, v = self.host = drawn(rng, self.case.qo_len, self.case.kv_len, dtype)
        put(self.q, q[0] if self.case.decodes else q)
        put(self.k, k)
        put(self.v, v)
        for x in self.results or ():
            values = take(x)
            put(x, np.full(values.shape, np.nan, values.dtype))

    def call(self) -> None:
        options = {**self.case.options, "return_lse": True}
        self.results = self.case.function(self.q, self.k, self.v, **options)

    def check(self) -> None:
        out, lse = (take(x) for x in self.results)
        if self.case.decodes:
            out, lse = out[None], lse[None]
        check(self.host, Formula(**self.case.options), out, lse)
