"""Random whole calls for hypothesis: everything about a call at once, so that combinations meet."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import batches
import numpy as np
import oracle
from hypothesis import strategies as st
from oracle import Formula

import cupaged

GROUPS = (1, 3, 4, 7, 12)

HEAD_DIMS = (64, 128, 256)
#: head_dim_qk and head_dim_vo, where not only the usual ones are drawn.
ALL_HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))

#: Elements of a request's q.
MOST_ELEMENTS = 200_000

#: Lengths around the edges of pages, of KV tiles (32, 64, 80, 128) and of query tiles (16, 64,
#: 128, 192).
_EDGES = [0, 1, 2, *(n + d for n in (16, 32, 64, 80, 128, 192) for d in (-1, 0, 1))]


#: What a custom mask shows: nothing; every key; each key for itself, or runs of keys that all rows
#: see alike, by chance; for some rows none.
MASKS = ("nothing", "everything", "sparse", "even", "dense", "runs", "no rows")


@dataclass(frozen=True)
class Call:
    """A call to make: what to build, how to plan it, and what to ask of `run()`.

    The formula has neither the mask nor the sinks yet, whose shapes follow from the rest:
    `whole_formula()` draws them.
    """

    seed: int
    qo_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    build_options: dict[str, Any]
    plan_options: dict[str, Any]
    formula: Formula
    given_out: str | None  # of batches.Q_FORMS
    given_lse: str | None  # "contiguous" or "strided"
    return_lse: bool
    mask: str | None = None  # of MASKS
    packed_mask: bool = False
    sinks: float | None = None  # their mean

    def batch(self) -> batches.Batch:
        """What to call it with; keys that no row sees are NaN, as are their values."""
        rng = np.random.default_rng(self.seed)
        batch = batches.build(rng, self.qo_len, self.kv_len, **self.build_options)
        return batch.with_hidden_keys(self.whole_formula())

    def whole_formula(self) -> Formula:
        rng = np.random.default_rng([self.seed, 1])
        num_qo_heads = self.build_options["num_kv_heads"] * self.build_options["group"]
        formula = self.formula
        if self.sinks is not None:
            sinks = rng.normal(self.sinks, 3.0, num_qo_heads).astype(np.float32)
            formula = replace(formula, sinks=sinks)
        if self.mask is not None:
            lengths = zip(self.qo_len, self.kv_len, strict=True)
            masks = tuple(random_mask(rng, self.mask, *pair) for pair in lengths)
            formula = replace(formula, custom_mask=masks)
        return formula


def random_mask(rng: np.random.Generator, kind: str, qo_len: int, kv_len: int) -> np.ndarray:
    """A mask [qo_len, kv_len] of one of `MASKS`."""
    shape = (qo_len, kv_len)
    if kind == "runs":
        edges = rng.random(kv_len) < 1 / 40
        return np.broadcast_to(np.cumsum(edges) % 2 == 0, shape).copy()
    if kind == "no rows":
        return np.broadcast_to(rng.random(qo_len)[:, None] < 0.5, shape).copy()
    shown = {"nothing": 0.0, "everything": 1.0, "sparse": 0.02, "even": 0.5, "dense": 0.98}
    return rng.random(shape) < shown[kind]


def lengths(longest: int) -> st.SearchStrategy[int]:
    edges = [n for n in _EDGES if n <= longest]
    return st.one_of(st.sampled_from(edges), st.integers(0, longest))


def scales() -> st.SearchStrategy[float | None]:
    return st.one_of(st.none(), st.sampled_from([0.0, -1.0, 0.5]), st.floats(-2.0, 2.0, width=32))


def sometimes(strategy: st.SearchStrategy[Any], default: Any = None) -> st.SearchStrategy[Any]:
    return st.one_of(st.just(default), strategy)


@st.composite
def _with_variants(draw: st.DrawFn, call: Call, max_kv: int, decoding: bool) -> Call:
    """The same call with what is off by default; `decoding` has neither masks nor other V heads."""
    head_dim, head_dim_vo = draw(
        st.sampled_from([dims for dims in ALL_HEAD_DIMS if dims[0] == dims[1] or not decoding])
    )
    mode = draw(st.sampled_from(["NONE", "NONE", "ALIBI", "ROPE_LLAMA"]))
    factor = sometimes(st.floats(0.25, 64.0))
    float8 = draw(sometimes(st.sampled_from(list(batches.FLOAT8_DTYPES))))
    options: dict[str, Any] = {
        "head_dim": head_dim,
        "head_dim_vo": head_dim_vo,
        "kv_dtype": float8,
    }
    if head_dim != head_dim_vo and call.build_options["cache_form"] == "stacked":
        options["cache_form"] = "strided"
    formula = replace(
        call.formula,
        window_left=draw(sometimes(st.one_of(st.sampled_from([0, 1]), lengths(max_kv)), -1)),
        logits_soft_cap=draw(sometimes(st.sampled_from([-1.0, 0.0, 0.5, 8.0, 30.0, 1e4]))),
        pos_encoding_mode=mode,
        rope_scale=draw(factor) if mode == "ROPE_LLAMA" else None,
        rope_theta=draw(sometimes(st.floats(2.0, 1e7))) if mode == "ROPE_LLAMA" else None,
    )
    return replace(
        call,
        build_options=call.build_options | options,
        formula=formula,
        mask=None if decoding else draw(sometimes(st.sampled_from(MASKS))),
        packed_mask=draw(st.booleans()),
        sinks=draw(sometimes(st.sampled_from([-30.0, 0.0, 3.0, 60.0]))),
    )


@st.composite
def calls(
    draw: st.DrawFn,
    max_batch: int = 5,
    max_qo: int = 64,
    max_kv: int = 200,
    max_page: int = 33,
    variants: bool = False,
    decoding: bool = False,
) -> Call:
    """Whole calls.

    Parameters
    ----------
    max_batch, max_qo, max_kv, max_page : int
        Of requests, of the rows and keys of one, and of the slots of a page.
    variants : bool
        Draw what is off by default, too, and all of it at once.
    decoding : bool
        Only such variants as a decode wrapper takes.
    """
    batch = draw(st.integers(0, max_batch))
    page_size = draw(st.one_of(st.sampled_from([1, 16, 32]), st.integers(1, max_page)))
    num_kv_heads = draw(st.integers(1, 3))
    group = draw(st.sampled_from(GROUPS))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    # Long queries of many wide heads cost the formula much and find little.
    max_qo = min(max_qo, MOST_ELEMENTS // (num_kv_heads * group * head_dim))
    fixed = draw(st.one_of(st.none(), st.integers(1, 1 + max_kv // page_size)))
    given_out = draw(st.sampled_from([None, *batches.Q_FORMS]))
    factor = st.one_of(st.none(), scales())
    call = Call(
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
    return draw(_with_variants(call, max_kv, decoding)) if variants else call


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
    formula = call.whole_formula()
    plan_options, run_options = formula.plan_options, formula.run_options
    if formula.custom_mask is not None:
        name = "packed_custom_mask" if call.packed_mask else "custom_mask"
        mask = formula.packed_mask if call.packed_mask else formula.flat_mask
        plan_options |= {"custom_mask": None, name: asarray(mask)}
    if formula.sinks is not None:
        run_options["sinks"] = asarray(formula.sinks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cupaged.CupagedWarning)
        batch.plan(wrapper, **call.plan_options, **plan_options)
    result = wrapper.run(batch.q, batch.cache, return_lse=call.return_lse, **given, **run_options)
    returned = dict(zip(("out", "lse"), result if call.return_lse else (result,), strict=False))
    for name in given.keys() & returned.keys():
        assert returned[name] is given[name], f"{name} is not the one given"
    arrays = {name: asnumpy(array) for name, array in returned.items() if name not in given}
    for name, view in views.items():
        on_host = view.on(asnumpy)
        arrays[name] = on_host.array
        assert np.isnan(on_host.outside()).all(), f"written outside of the given {name}"
    oracle.check_all(host, formula, arrays["out"], arrays.get("lse"))
