"""The wrapper on host arrays, against the plain formula."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import batches
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from oracle import Formula

import cupaged

Wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper


def wrapper_for(batch: batches.Batch, backend: str = "reference") -> Wrapper:
    return Wrapper(kv_layout=batch.kv_layout, backend=backend)


def attention(
    batch: batches.Batch, formula: Formula, backend: str = "reference", **plan_options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Plan, run into poisoned arrays; out and LSE."""
    wrapper = wrapper_for(batch, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cupaged.CupagedWarning)
        batch.plan(wrapper, **formula.plan_options, **plan_options)
    out, lse = batch.poisoned_out().array, batch.poisoned_lse().array
    wrapper.run(batch.q, batch.cache, out=out, lse=lse, **formula.run_options)
    return out, lse


@given(strategies.calls())
def test_random_calls_equal_the_formula(call: strategies.Call) -> None:
    kv_layout = call.build_options["kv_layout"]
    strategies.check_call(call, Wrapper(kv_layout=kv_layout, backend="reference"))


@pytest.mark.parametrize("group", strategies.GROUPS)
@pytest.mark.parametrize("causal", [False, True])
def test_many_tiles_and_splits_equal_the_formula(
    rng: np.random.Generator, group: int, causal: bool
) -> None:
    """A few long requests: the planner splits their keys of its own accord."""
    batch = batches.build(rng, [5, 200], [1500, 700], num_kv_heads=1, group=group, page_size=7)
    wrapper = wrapper_for(batch)
    batch.plan(wrapper, causal=causal)
    assert any(launch.num_merges for launch in wrapper._plan.schedule.launches)
    formula = Formula(causal=causal)
    oracle.check_all(batch, formula, *attention(batch, formula))


def test_auto_takes_host_arrays_to_the_reference_backend(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [4, 9], [40, 9], group=3)
    formula = Formula(causal=True)
    oracle.check_all(batch, formula, *attention(batch, formula, backend="auto"))


def test_the_output_is_the_kind_of_array_that_q_is(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [4], [40], dtype="bfloat16")
    wrapper = wrapper_for(batch)
    batch.plan(wrapper)
    out, lse = wrapper.run(batch.q, batch.cache, return_lse=True)
    assert type(out) is np.ndarray
    assert out.dtype == batches.DTYPES["bfloat16"]
    assert type(lse) is np.ndarray
    assert lse.dtype == np.float32
    again, lse_again = wrapper.run_return_lse(batch.q, batch.cache)
    assert out.tobytes() == again.tobytes()
    assert lse.tobytes() == lse_again.tobytes()


def test_plan_takes_lists_and_spare_page_entries(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [1, 1, 1], [16, 32, 48])
    wrapper = wrapper_for(batch)
    indices = [*map(int, batch.paged_kv_indices), 10**9, -7]  # beyond paged_kv_indptr[-1]
    wrapper.plan([0, 1, 2, 3], (0, 1, 3, 6), indices, [16, 16, 16], *batch.geometry)
    out = wrapper.run(batch.q, batch.cache)
    oracle.check_all(batch, Formula(), out)


def test_a_plan_serves_many_layers(rng: np.random.Generator) -> None:
    """One plan, other tensors in every run, in other memory layouts."""
    first = batches.build(rng, [5, 1], [20, 33], group=4)
    wrapper = wrapper_for(first)
    first.plan(wrapper, causal=True)
    for form in batches.Q_FORMS:
        view = batches.rows_view(form, *first.q.shape, first.q.dtype)
        view.array[...] = rng.standard_normal(first.q.shape)
        layer = replace(first, q_view=view)
        oracle.check_all(layer, Formula(causal=True), wrapper.run(layer.q, layer.cache))


def test_begin_forward_is_plan(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [3], [5])
    wrapper = wrapper_for(batch)
    wrapper.begin_forward(*batch.index_arrays, *batch.geometry)
    oracle.check_all(batch, Formula(), wrapper.run(batch.q, batch.cache))


@pytest.mark.parametrize("base", ["log2", "ln"])
def test_lse_bases(rng: np.random.Generator, base: str) -> None:
    """One key: the LSE is that key's logit, in the base asked for."""
    batch = batches.build(rng, [1], [1], num_kv_heads=1)
    _, lse = attention(batch, Formula(lse_base=base))
    q, k, _ = (x.astype(np.float64) for x in batch.gathered(0))
    logit = float((q[0, 0] * k[0, 0]).sum() / 8)
    np.testing.assert_allclose(lse, [[logit / (np.log(2) if base == "log2" else 1)]], atol=1e-5)


# The empty cases


def test_a_request_without_pages_is_zero(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [3, 2, 4], [0, 20, 0], group=2)
    out, lse = attention(batch, Formula())
    assert (out[[0, 1, 2, 5, 6, 7, 8]] == 0).all()
    assert np.isneginf(lse[[0, 1, 2, 5, 6, 7, 8]]).all()
    oracle.check_all(batch, Formula(), out, lse)


def test_rows_before_the_first_key_are_zero(rng: np.random.Generator) -> None:
    """Causal with more queries than keys: the first qo_len - kv_len rows see nothing."""
    batch = batches.build(rng, [150, 3], [140, 1], group=3, num_kv_heads=1)
    out, lse = attention(batch, Formula(causal=True))
    assert (out[:10] == 0).all()
    assert (out[150:152] == 0).all()
    assert np.isneginf(lse[:10]).all()
    assert np.isneginf(lse[150:152]).all()
    assert np.isfinite(lse[10:150]).all()
    assert np.isfinite(lse[152]).all()
    oracle.check_all(batch, Formula(causal=True), out, lse)


@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 1}, {"disable_split_kv": True}])
def test_a_request_without_queries_adds_no_rows(
    rng: np.random.Generator, options: dict[str, Any]
) -> None:
    batch = batches.build(rng, [0, 3, 0], [50, 40, 0])
    out, lse = attention(batch, Formula(), **options)
    assert out.shape == (3, 2, 64)
    oracle.check_all(batch, Formula(), out, lse)


@pytest.mark.parametrize("lengths", [([], []), ([0, 0], [30, 0])])
def test_no_rows_at_all_is_an_empty_result(
    rng: np.random.Generator, lengths: tuple[list[int], list[int]]
) -> None:
    batch = batches.build(rng, *lengths, dtype="bfloat16")
    wrapper = wrapper_for(batch)
    batch.plan(wrapper, causal=True)
    assert wrapper._plan.schedule.launches == ()
    out, lse = wrapper.run(batch.q, batch.cache, return_lse=True)
    assert out.shape == (0, 2, 64)
    assert out.dtype == batches.DTYPES["bfloat16"]
    assert lse.shape == (0, 2)
    assert lse.dtype == np.float32


def test_a_cache_without_pages_serves_requests_without_keys(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [2], [0], spare_pages=0)
    assert batch.keys_and_values()[0].shape[0] == 0
    out, lse = attention(batch, Formula())
    assert (out == 0).all()
    assert np.isneginf(lse).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 60), st.integers(0, 30))
def test_merging_empty_states(seed: int, split: int, qo_len: int, kv_len: int) -> None:
    """Splits of one page each, most rows of which see nothing of most splits."""
    rng = np.random.default_rng(seed)
    batch = batches.build(rng, [qo_len], [kv_len], page_size=2, group=3)
    formula = Formula(causal=True)
    oracle.check_all(batch, formula, *attention(batch, formula, fixed_split_size=split))


# NaN and Inf


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 3}])
def test_what_is_in_unseen_slots_changes_nothing(
    rng: np.random.Generator, poison: float, options: dict[str, Any]
) -> None:
    batch = batches.build(rng, [40, 1, 7], [101, 60, 3], group=2, page_size=5, spare_pages=4)
    clean = attention(batch, Formula(causal=True), **options)
    for pages in batch.keys_and_values():
        pages[np.isnan(pages)] = poison
    assert not np.isnan(batch.cache[0]).any() or np.isnan(poison)
    dirty = attention(batch, Formula(causal=True), **options)
    assert clean[0].tobytes() == dirty[0].tobytes()
    assert clean[1].tobytes() == dirty[1].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", [0, 70, 127])
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 3}])
def test_a_visible_key_goes_through_as_ieee_has_it(
    rng: np.random.Generator, value: float, key: int, options: dict[str, Any]
) -> None:
    """Rows that see the key feel it; rows that don't, and other requests, don't."""
    batch = batches.build(rng, [100, 30], [128, 100], group=2)
    k, _ = batch.keys_and_values()
    k[batch.slot(0, key)][1, 5] = value
    formula = Formula(causal=True)
    out, lse = attention(batch, formula, **options)
    assert np.isnan(out[99, 2:]).all() or not np.isnan(value)
    assert np.isfinite(out[:, :2].astype(np.float32)).all()
    oracle.check_all(batch, formula, out, lse)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_visible_value_goes_through_as_ieee_has_it(
    rng: np.random.Generator, value: float
) -> None:
    batch = batches.build(rng, [40, 30], [128, 100], group=2, magnitude=0.5)
    _, v = batch.keys_and_values()
    v[batch.slot(0, 77)][1, 5] = value
    out, lse = attention(batch, Formula())
    np.testing.assert_array_equal(out[:40, 2:, 5].astype(np.float32), np.float32(value))
    oracle.check_all(batch, Formula(), out, lse)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_query_goes_through_as_ieee_has_it(rng: np.random.Generator, value: float) -> None:
    batch = batches.build(rng, [40, 30], [128, 100], group=2)
    batch.q[17, 3, 9] = value
    out, lse = attention(batch, Formula())
    broken = np.isnan(out.astype(np.float32))
    assert broken[17, 3].all()
    broken[17, 3] = False
    assert not broken.any()
    oracle.check_all(batch, Formula(), out, lse)


# The same bits


@given(strategies.calls(max_batch=3))
def test_the_same_call_gives_the_same_bits(call: strategies.Call) -> None:
    batch = call.batch()
    once = attention(batch, call.formula, **call.plan_options)
    again = attention(call.batch(), call.formula, **call.plan_options)
    assert once[0].tobytes() == again[0].tobytes()
    assert once[1].tobytes() == again[1].tobytes()


@given(strategies.calls(), st.data())
def test_bits_of_a_request_do_not_depend_on_its_batch(
    call: strategies.Call, data: st.DataObject
) -> None:
    """With fixed_split_size or disable_split_kv."""
    batch = call.batch()
    if not batch.qo_len:
        return
    options = call.plan_options
    if options["fixed_split_size"] is None:
        options = {"disable_split_kv": True}
    out, lse = attention(batch, call.formula, **options)
    r = data.draw(st.integers(0, len(batch.qo_len) - 1))
    begin = sum(batch.qo_len[:r])
    out_alone, lse_alone = attention(batch.alone(r), call.formula, **options)
    assert out[begin : begin + batch.qo_len[r]].tobytes() == out_alone.tobytes()
    assert lse[begin : begin + batch.qo_len[r]].tobytes() == lse_alone.tobytes()
