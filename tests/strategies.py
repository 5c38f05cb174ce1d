"""Random whole calls for hypothesis: everything about a call at once, so that combinations meet."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import batches
import numpy as np
import oracle
from hypothesis import strategies as st
from oracle import Formula

import cupaged

GROUPS = (1, 3, 4, 7, 12)

#: Elements of a request's q.
MOST_ELEMENTS = 200_000

#: Lengths around the edges of pages, of KV tiles (32, 64, 80, 128) and of query tiles (16, 64,
#: 128, 192).
_EDGES = [0, 1, 2, *(n + d for n in (16, 32, 64, 80, 128, 192) for d in (-1, 0, 1))]


@dataclass(frozen=True)
class Call:
    """A call to make: what to build, how to plan it, and what to ask of `run()`."""

    seed: int
    qo_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    build_options: dict[str, Any]
    plan_options: dict[str, Any]
    formula: Formula
    given_out: str | None  # of batches.Q_FORMS
    given_lse: str | None  # "contiguous" or "strided"
    return_lse: bool

    def batch(self) -> batches.Batch:
        rng = np.random.default_rng(self.seed)
        return batches.build(rng, self.qo_len, self.kv_len, **self.build_options)


def lengths(longest: int) -> st.SearchStrategy[int]:
    edges = [n for n in _EDGES if n <= longest]
    return st.one_of(st.sampled_from(edges), st.integers(0, longest))


def scales() -> st.SearchStrategy[float | None]:
    return st.one_of(st.none(), st.sampled_from([0.0, -1.0, 0.5]), st.floats(-2.0, 2.0, width=32))


@st.composite
def calls(
    draw: st.DrawFn, max_batch: int = 5, max_qo: int = 64, max_kv: int = 200, max_page: int = 33
) -> Call:
    """Whole calls; `max_qo` and `max_kv` bound the lengths of a request."""
    batch = draw(st.integers(0, max_batch))
    page_size = draw(st.one_of(st.sampled_from([1, 16, 32]), st.integers(1, max_page)))
    num_kv_heads = draw(st.integers(1, 3))
    group = draw(st.sampled_from(GROUPS))
    head_dim = draw(st.sampled_from([64, 128, 256]))
    # Long queries of many wide heads cost the formula much and find little.
    max_qo = min(max_qo, MOST_ELEMENTS // (num_kv_heads * group * head_dim))
    fixed = draw(st.one_of(st.none(), st.integers(1, 1 + max_kv // page_size)))
    given_out = draw(st.sampled_from([None, *batches.Q_FORMS]))
    factor = st.one_of(st.none(), scales())
    return Call(
        seed=draw(st.integers(0, 2**32 - 1)),
        qo_len=tuple(draw(lengths(max_qo)) for _ in range(batch)),
        kv_len=tuple(draw(lengths(max_kv)) for _ in range(batch)),
        build_options={
            "page_size": page_size,
            "num_kv_heads": num_kv_heads,
            "group": group,
            "head_dim": head_dim,
            "dtype": draw(st.sampled_from(["float16", "bfloat16"])),
            "kv_layout": draw(st.sampled_from(["NHD", "HND"])),
            "cache_form": draw(st.sampled_from(batches.CACHE_FORMS)),
            "q_form": draw(st.sampled_from(batches.Q_FORMS)),
            "shared_pages": draw(st.sampled_from([0, 0, 1, 3])),
            "magnitude": draw(st.sampled_from([0.1, 1.0, 8.0])),
            "index_dtype": draw(st.sampled_from([np.int32, np.int64])),
        },
        plan_options={
            "fixed_split_size": fixed,
            "disable_split_kv": fixed is None and draw(st.booleans()),
        },
        formula=Formula(
            causal=draw(st.booleans()),
            sm_scale=draw(st.one_of(st.none(), st.sampled_from([0.0, -0.125, 0.3]))),
            q_scale=draw(factor),
            k_scale=draw(factor),
            v_scale=draw(factor),
            lse_base=draw(st.sampled_from(["log2", "ln"])),
        ),
        given_out=given_out,
        given_lse=draw(st.sampled_from([None, "contiguous", "strided"])),
        return_lse=draw(st.booleans()),
    )


def check_call(
    call: Call,
    wrapper: Any,
    asarray: Callable[[Any], Any] = np.asarray,
    asnumpy: Callable[[Any], Any] = np.asarray,
) -> None:
    """Make a call and hold its result to the contract.

    `asarray` takes NumPy arrays to where the wrapper's backend works, `asnumpy` brings contiguous
    ones back.
    """
    host = call.batch()
    batch = host.on(asarray)
    views: dict[str, batches.View] = {}
    if call.given_out is not None:
        views["out"] = host.poisoned_out(call.given_out).on(asarray)
    if call.given_lse is not None:
        views["lse"] = host.poisoned_lse(call.given_lse == "strided").on(asarray)
    given = {name: view.array for name, view in views.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cupaged.CupagedWarning)
        batch.plan(wrapper, **call.plan_options, **call.formula.plan_options)
    result = wrapper.run(
        batch.q, batch.cache, return_lse=call.return_lse, **given, **call.formula.run_options
    )
    returned = dict(zip(("out", "lse"), result if call.return_lse else (result,), strict=False))
    for name in given.keys() & returned.keys():
        assert returned[name] is given[name], f"{name} is not the one given"
    arrays = {name: asnumpy(array) for name, array in returned.items() if name not in given}
    for name, view in views.items():
        on_host = view.on(asnumpy)
        arrays[name] = on_host.array
        assert np.isnan(on_host.outside()).all(), f"written outside of the given {name}"
    oracle.check_all(host, call.formula, arrays["out"], arrays.get("lse"))
