"""Keys and values of 8 bits, of other widths, and without pages, on the reference backend."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import batches
import numpy as np
import oracle
import pytest
import strategies
from oracle import Formula
from test_reference import attention, wrapper_for
from variant_calls import LN_2, check, mixed, with_and_without_splits

import cupaged
from cupaged import reference, schedule
from cupaged.spec import HOST_MODEL, RAGGED


@with_and_without_splits
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", batches.FLOAT8_DTYPES)
@pytest.mark.parametrize("cache_form", batches.CACHE_FORMS)
def test_float8(
    rng: np.random.Generator, cache_form: str, kv_dtype: str, dtype: str, splits: dict[str, Any]
) -> None:
    batch = mixed(rng, dtype=dtype, kv_dtype=kv_dtype, cache_form=cache_form, kv_layout="HND")
    check(batch, Formula(causal=True, k_scale=0.25, v_scale=3.0), **splits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", batches.FLOAT8_DTYPES)
def test_every_float8_is_itself(rng: np.random.Generator, kv_dtype: str, dtype: str) -> None:
    """Requests of one key: the output is its values, and the logit what the query picks of it."""
    batch = batches.build(
        rng, [1] * 256, [1] * 256, page_size=1, num_kv_heads=1, dtype=dtype, kv_dtype=kv_dtype
    )
    k, v = batch.keys_and_values()
    patterns = np.arange(256, dtype=np.uint8).view(k.dtype)
    batch.q[...] = 0
    batch.q[..., 5] = 0.5
    for r, pattern in enumerate(patterns):
        k[batch.slot(r, 0)] = 0
        k[batch.slot(r, 0)][0, 5] = pattern
        v[batch.slot(r, 0)] = np.roll(patterns, r)[:64]
    out, lse = attention(batch, Formula(sm_scale=2.0, lse_base="ln"))
    for r, pattern in enumerate(patterns.astype(np.float32)):
        got, values = (x.astype(np.float32) for x in (out[r, 0], np.roll(patterns, r)[:64]))
        if np.isfinite(pattern):
            np.testing.assert_array_equal(got, values)
            np.testing.assert_allclose(lse[r, 0], pattern, rtol=1e-6)
        elif np.isnan(pattern):
            assert np.isnan(got).all()


@with_and_without_splits
@pytest.mark.parametrize("head_dims", strategies.ALL_HEAD_DIMS)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_widths_of_heads(
    rng: np.random.Generator, kv_layout: str, head_dims: tuple[int, int], splits: dict[str, Any]
) -> None:
    head_dim, head_dim_vo = head_dims
    for cache_form in batches.CACHE_FORMS[: 3 if head_dim == head_dim_vo else 2]:
        batch = mixed(
            rng,
            head_dim=head_dim,
            head_dim_vo=head_dim_vo,
            kv_layout=kv_layout,
            cache_form=cache_form,
            dtype=str(rng.choice(["float16", "bfloat16"])),
        )
        out, lse = attention(batch, Formula(causal=True), **splits)
        assert out.shape[-1] == head_dim_vo
        oracle.check_all(batch, Formula(causal=True), out, lse)


@with_and_without_splits
@pytest.mark.parametrize("head_dims", [(64, 64), (192, 128)])
def test_keys_without_pages(
    rng: np.random.Generator, head_dims: tuple[int, int], splits: dict[str, Any]
) -> None:
    """A request is one page, whose number is its first row; rows between requests are NaN."""
    head_dim, head_dim_vo = head_dims
    batch = mixed(rng, head_dim=head_dim, head_dim_vo=head_dim_vo, num_kv_heads=2)
    formula = Formula(causal=True, window_left=100, sinks=rng.normal(0, 1, 6).astype(np.float32))
    wrapper = wrapper_for(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cupaged.CupagedWarning)
        batch.plan(wrapper, **formula.plan_options)
    paged = wrapper._plan.schedule
    has_keys = np.array(batch.kv_len) > 0
    indptr = np.cumsum([0, *has_keys]).astype(np.int32)
    lengths = paged.lengths._replace(paged_kv_indptr=indptr)
    spec = replace(paged.spec, page_size=RAGGED)
    begins = np.cumsum([5, *(n + 3 for n in batch.kv_len)]).astype(np.int32)
    k, v = (np.full((begins[-1], 2, dim), np.nan, np.float16) for dim in (head_dim, head_dim_vo))
    for r, begin in enumerate(begins[:-1]):
        for rows, tokens in zip((k, v), batch.gathered(r)[1:], strict=True):
            rows[begin : begin + batch.kv_len[r]] = tokens
    planned = schedule.build(spec, lengths, HOST_MODEL, **splits)
    out, lse = batch.poisoned_out().array, batch.poisoned_lse().array
    scale = formula.logit_scale(head_dim) / LN_2
    indices = begins[:-1][has_keys]
    reference.run(planned, indices, batch.q, k, v, out, lse, scale, 1.0, 1.0, formula.sinks)
    oracle.check_all(batch, formula, out, lse)
