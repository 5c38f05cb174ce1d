"""The decode wrapper on host arrays, against the plain formula and against prefill."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import batches
import decode_calls
import ml_dtypes
import numpy as np
import oracle
import pytest
import strategies
from decode_calls import DECODING, Decode, Decoder, build, planned
from hypothesis import given
from hypothesis import strategies as st
from oracle import Formula

import cupaged

Results = tuple[np.ndarray, np.ndarray]


def run(decoder: Decoder, batch: batches.Batch, formula: Formula = DECODING) -> Results:
    """Run into poisoned arrays; out and LSE."""
    out, lse = batch.poisoned_out().array, batch.poisoned_lse().array
    decoder.run(batch.q, batch.cache, out=out, lse=lse, **formula.run_options)
    return out, lse


def check(batch: batches.Batch, formula: Formula = DECODING, **options: Any) -> Decoder:
    """Plan, run, and hold the result to the formula."""
    decoder = planned(batch, formula, **options)
    oracle.check_all(batch, formula, *run(decoder, batch, formula))
    return decoder


def same_bits(one: Results, other: Results) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


# What is served


@given(decode_calls.calls())
def test_random_calls_equal_the_formula(drawn: tuple[strategies.Call, int]) -> None:
    call, q_len = drawn
    kv_layout = call.build_options["kv_layout"]
    strategies.check_call(call, Decoder(q_len, kv_layout=kv_layout, backend="reference"))


@pytest.mark.parametrize("group", decode_calls.GROUPS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_groups_widths_and_dtypes(
    rng: np.random.Generator, dtype: str, head_dim: int, group: int
) -> None:
    for q_len in (1, 5):
        batch = build(
            rng, [70, 5, 16, 33], q_len, group=group, head_dim=head_dim, dtype=dtype, page_size=16
        )
        check(batch)


@pytest.mark.parametrize("page_size", [1, 2, 5, 16, 24, 32, 128])
def test_page_sizes_layouts_and_kinds_of_cache(rng: np.random.Generator, page_size: int) -> None:
    for kv_layout, cache_form in itertools.product(("NHD", "HND"), batches.CACHE_FORMS):
        batch = build(
            rng,
            [page_size, page_size + 1, 2 * page_size - 1, 40],
            page_size=page_size,
            group=4,
            kv_layout=kv_layout,
            cache_form=cache_form,
        )
        check(batch)


@pytest.mark.parametrize("group", [1, 4, 12])
@pytest.mark.parametrize("q_len", range(1, decode_calls.MOST_Q_LEN + 1))
def test_rows_of_a_request_see_up_to_their_own_key(
    rng: np.random.Generator, q_len: int, group: int
) -> None:
    """A last key of Inf reaches each request's last row, and no other."""
    batch = build(rng, [200, q_len, q_len + 1, 9], q_len, group=group, num_kv_heads=1)
    check(batch)
    check(batch, fixed_split_size=1)
    k, _ = batch.keys_and_values()
    for r, kv_len in enumerate(batch.kv_len):
        k[batch.slot(r, kv_len - 1)] = np.inf
    out, _ = run(planned(batch), batch)
    broken = np.isnan(out.astype(np.float32)).any(axis=(1, 2))
    assert broken.reshape(4, q_len).tolist() == [[False] * (q_len - 1) + [True]] * 4


@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (8, 1), (4, 4), (12, 8)])
def test_long_requests_are_split(rng: np.random.Generator, group: int, q_len: int) -> None:
    batch = build(rng, [3000, 700], q_len, group=group, num_kv_heads=1, page_size=7)
    decoder = check(batch)
    assert any(launch.num_merges for launch in decoder.schedule.launches)


@pytest.mark.parametrize("pages", [1, 2, 7, 1000])
@pytest.mark.parametrize("q_len", [1, 3])
def test_fixed_splits(rng: np.random.Generator, q_len: int, pages: int) -> None:
    batch = build(rng, [150, 333, 4, 0], q_len, group=3, page_size=3, dtype="bfloat16")
    decoder = check(batch, fixed_split_size=pages)
    (launch,) = decoder.schedule.launches
    assert (launch.items["kv_begin"] % (3 * pages) == 0).all()
    assert (launch.items["kv_end"] - launch.items["kv_begin"] <= 3 * pages).all()


def test_splits_disabled(rng: np.random.Generator) -> None:
    (launch,) = check(build(rng, [3000, 5], page_size=7), disable_split_kv=True).schedule.launches
    assert launch.num_partials == 0


@pytest.mark.parametrize("lse_base", ["log2", "ln"])
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 2}])
def test_scales_and_bases(rng: np.random.Generator, options: dict[str, Any], lse_base: str) -> None:
    batch = build(rng, [70, 90, 0], 2, group=3, magnitude=2.0)
    for sm_scale in (-0.2, 0.0, 2.0):
        formula = Formula(True, sm_scale, q_scale=0.5, k_scale=1.5, v_scale=-3.0, lse_base=lse_base)
        check(batch, formula, **options)


def test_tensor_cores_serve_either_way(rng: np.random.Generator) -> None:
    batch = build(rng, [70, 9], group=4)
    results = []
    for use_tensor_cores in (False, True):
        decoder = Decoder(use_tensor_cores=use_tensor_cores, backend="reference")
        batch.plan(decoder)
        results.append(run(decoder, batch))
    assert same_bits(*results)


# The empty cases


@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 1}, {"disable_split_kv": True}])
@pytest.mark.parametrize("q_len", [1, 3])
def test_requests_without_keys_are_zero(
    rng: np.random.Generator, q_len: int, options: dict[str, Any]
) -> None:
    batch = build(rng, [0, 50, 0], q_len, group=2)
    decoder = check(batch, **options)
    out, lse = run(decoder, batch)
    for r in (0, 2):
        assert (out[r * q_len : (r + 1) * q_len] == 0).all()
        assert np.isneginf(lse[r * q_len : (r + 1) * q_len]).all()
    assert np.isfinite(lse[q_len : 2 * q_len]).all()


def test_rows_before_the_first_key_are_zero(rng: np.random.Generator) -> None:
    batch = build(rng, [2, 5, 1], 5, group=3)
    out, lse = run(check(batch), batch)
    unseen = [0, 1, 2, 10, 11, 12, 13]
    assert (out[unseen] == 0).all()
    assert np.isneginf(lse).all(axis=1).nonzero()[0].tolist() == unseen


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_request_at_all_is_an_empty_result(
    rng: np.random.Generator, dtype: str, q_len: int
) -> None:
    batch = batches.build(rng, [], [], dtype=dtype)
    decoder = Decoder(q_len, backend="reference")
    batch.plan(decoder)
    assert decoder.schedule.launches == ()
    out, lse = decoder.run(batch.q, batch.cache, return_lse=True)
    assert (out.shape, out.dtype) == ((0, 2, 64), batches.DTYPES[dtype])
    assert (lse.shape, lse.dtype) == ((0, 2), np.float32)


def test_a_cache_without_pages_serves_requests_without_keys(rng: np.random.Generator) -> None:
    batch = build(rng, [0, 0], spare_pages=0)
    assert batch.keys_and_values()[0].shape[0] == 0
    check(batch)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 3}])
def test_what_is_in_unseen_slots_changes_nothing(
    rng: np.random.Generator, poison: float, options: dict[str, Any]
) -> None:
    batch = build(rng, [101, 60, 3], 2, group=2, page_size=5, spare_pages=4)
    clean = run(planned(batch, **options), batch)
    for pages in batch.keys_and_values():
        pages[np.isnan(pages)] = poison
    assert same_bits(run(planned(batch, **options), batch), clean)


# Fewer keys than rows


def caught(batch: batches.Batch, q_len: int) -> list[warnings.WarningMessage]:
    """What planning in a line of this file warns of."""
    wrapper = Decode(backend="reference")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        wrapper.plan(*batch.index_arrays[1:], *batch.geometry, q_len_per_req=q_len)
    return found


def test_fewer_keys_than_rows_warns(rng: np.random.Generator) -> None:
    """At the caller's line, in decoding's words: it has no argument `causal`."""
    (warning,) = caught(build(rng, [9, 3, 0, 4], 4), 4)
    assert warning.category is cupaged.CupagedWarning
    assert warning.filename == __file__
    words = str(warning.message)
    assert words.startswith("request 1 has 4 queries and 3 keys (and 1 more requests like it): ")
    assert words.endswith(
        "its first 1 rows see no key, and will be 0. Were the new keys and values appended to the "
        "cache, and counted in indptr and last_page_len?"
    )
    assert "causal" not in words


def test_a_page_twice_warns() -> None:
    wrapper = Decode(backend="reference")
    with pytest.warns(cupaged.CupagedWarning) as found:
        wrapper.plan([0, 2], [3, 3], [4], 4, 2, 64, 16)
    (warning,) = found
    assert str(warning.message) == (
        "request 0 has page 3 twice, as its pages 0 and 1: its keys will be attended to twice. Was "
        "another page meant in indices?"
    )
    assert warning.filename == __file__


@pytest.mark.parametrize(("kv_len", "q_len"), [([0, 5, 1], 1), ([4, 9], 4), ([], 8)])
def test_what_does_not_warn(rng: np.random.Generator, kv_len: list[int], q_len: int) -> None:
    assert caught(build(rng, kv_len, q_len), q_len) == []


# The same bits


@given(decode_calls.calls(max_batch=4))
def test_it_is_prefill_of_as_many_rows(drawn: tuple[strategies.Call, int]) -> None:
    """Bit for bit: it is the same planner and the same kernels."""
    call, _ = drawn
    batch = call.batch()
    prefill = cupaged.BatchPrefillWithPagedKVCacheWrapper(
        kv_layout=batch.kv_layout, backend="reference"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cupaged.CupagedWarning)
        batch.plan(prefill, **call.plan_options, **call.formula.plan_options)
    options = call.formula.run_options
    expected = prefill.run(batch.q, batch.cache, return_lse=True, **options)
    decoder = planned(batch, call.formula, **call.plan_options)
    assert same_bits(run(decoder, batch, call.formula), expected)


@given(decode_calls.calls(), st.data())
def test_bits_of_a_request_do_not_depend_on_its_batch(
    drawn: tuple[strategies.Call, int], data: st.DataObject
) -> None:
    """With fixed_split_size or disable_split_kv."""
    call, q_len = drawn
    batch = call.batch()
    if not batch.qo_len:
        return
    options = call.plan_options
    if options["fixed_split_size"] is None:
        options = {"disable_split_kv": True}
    out, lse = run(planned(batch, call.formula, **options), batch, call.formula)
    r = data.draw(st.integers(0, len(batch.qo_len) - 1))
    rows = slice(r * q_len, (r + 1) * q_len)
    alone = batch.alone(r)
    expected = run(planned(alone, call.formula, **options), alone, call.formula)
    assert same_bits((out[rows], lse[rows]), expected)


# The wrapper


def test_results_are_new_arrays_or_those_given(rng: np.random.Generator) -> None:
    batch = build(rng, [40, 3], group=2, dtype="bfloat16")
    decoder = planned(batch)
    out, lse = decoder.run(batch.q, batch.cache, return_lse=True)
    assert (type(out), out.dtype) == (np.ndarray, batches.DTYPES["bfloat16"])
    assert (type(lse), lse.dtype) == (np.ndarray, np.dtype(np.float32))
    oracle.check_all(batch, DECODING, out, lse)
    alone = decoder.run(batch.q, batch.cache)
    assert alone is not out
    assert alone.tobytes() == out.tobytes()
    assert same_bits(decoder.wrapper.run_return_lse(batch.q, batch.cache), (out, lse))
    given_out, given_lse = batch.poisoned_out().array, batch.poisoned_lse().array
    assert decoder.run(batch.q, batch.cache, out=given_out, lse=given_lse) is given_out
    assert same_bits((given_out, given_lse), (out, lse))


def test_host_arrays_are_served_by_default(rng: np.random.Generator) -> None:
    batch = build(rng, [40, 9], 2, group=3)
    wrapper = Decode()
    assert not wrapper.is_cuda_graph_enabled
    arguments = (*map(list, batch.index_arrays[1:]), *batch.geometry)
    wrapper.begin_forward(*arguments, q_len_per_req=2)
    oracle.check_all(batch, DECODING, wrapper.run(batch.q, batch.cache))


def test_a_plan_serves_many_layers(rng: np.random.Generator) -> None:
    first = build(rng, [20, 33, 4], 2, group=4)
    decoder = planned(first)
    for form in batches.Q_FORMS:
        view = batches.rows_view(form, *first.q.shape, first.q.dtype)
        view.array[...] = rng.standard_normal(first.q.shape)
        layer = replace(first, q_view=view)
        oracle.check_all(layer, DECODING, decoder.run(layer.q, layer.cache))


@pytest.mark.parametrize(
    "options",
    [
        {"data_type": "bfloat16"},
        {"data_type": ml_dtypes.bfloat16},
        {"data_type": "bfloat16", "q_data_type": "bfloat16", "kv_data_type": "bfloat16"},
        {"data_type": "bfloat16", "q_data_type": ml_dtypes.bfloat16},
        {"data_type": np.dtype(ml_dtypes.bfloat16), "kv_data_type": "bfloat16"},
        {"q_data_type": "bfloat16"},
        {"q_data_type": "bfloat16", "kv_data_type": "bfloat16", "o_data_type": "bfloat16"},
    ],
)
def test_dtypes_are_named_in_any_way(rng: np.random.Generator, options: dict[str, Any]) -> None:
    """`data_type` stands for all three; the same dtype beside it is no contradiction."""
    batch = build(rng, [40, 9], dtype="bfloat16")
    wrapper = Decode(backend="reference")
    wrapper.plan(*batch.index_arrays[1:], *batch.geometry, **options)
    oracle.check_all(batch, DECODING, wrapper.run(batch.q, batch.cache))


def test_run_may_name_the_planned_rows(rng: np.random.Generator) -> None:
    batch = build(rng, [40, 9], 3)
    decoder = planned(batch)
    oracle.check_all(batch, DECODING, decoder.run(batch.q, batch.cache, q_len_per_req=3))
    oracle.check_all(batch, DECODING, decoder.run(batch.q, batch.cache, q_len_per_req=None))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_data_type_of_8_bits_is_that_of_keys_and_values(
    rng: np.random.Generator, dtype: str
) -> None:
    batch = build(rng, [40, 9], dtype=dtype, kv_dtype="float8_e4m3fn")
    wrapper = Decode(backend="reference")
    arguments = (*batch.index_arrays[1:], *batch.geometry)
    wrapper.plan(*arguments, data_type="float8_e4m3fn", q_data_type=dtype)
    oracle.check_all(batch, DECODING, wrapper.run(batch.q, batch.cache))


@pytest.mark.parametrize("changes", [{"window_left": -2}, {"q_len_per_req": 0}, {"sm_scale": "x"}])
def test_a_plan_that_fails_leaves_the_earlier_one(
    rng: np.random.Generator, changes: dict[str, Any]
) -> None:
    batch = build(rng, [40, 9], 3, group=2)
    decoder = planned(batch)
    before = run(decoder, batch)
    other = build(rng, [9, 9, 9], 2)
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        decoder.wrapper.plan(
            *other.index_arrays[1:], *other.geometry, **{"q_len_per_req": 2} | changes
        )
    assert same_bits(run(decoder, batch), before)
    decoder.run(batch.q, batch.cache, q_len_per_req=3)


def test_planning_anew_changes_rows_and_shape(rng: np.random.Generator) -> None:
    decoder = Decoder(backend="reference")
    for q_len, kv_len in ((1, [40, 9]), (8, [100, 8]), (2, [3000]), (1, [])):
        decoder.q_len = q_len
        batch = build(rng, kv_len, q_len, group=8)
        batch.plan(decoder)
        oracle.check_all(batch, DECODING, *run(decoder, batch))


def test_a_workspace_of_the_exact_size(rng: np.random.Generator) -> None:
    batch = build(rng, [90, 5], group=2, page_size=5)
    needed = planned(batch, fixed_split_size=2).schedule.workspace_bytes
    assert needed == 9 * 2 * 16 * (64 + 1) * 4  # 9 splits, for each of 2 KV heads 16 rows
    check(batch, fixed_split_size=2, workspace=np.zeros(needed, np.uint8))
    with pytest.raises(ValueError, match=rf"^float_workspace_buffer has {needed - 1} bytes, "):
        planned(batch, fixed_split_size=2, workspace=np.zeros(needed - 1, np.uint8))


def test_explain_shows_the_plan(rng: np.random.Generator) -> None:
    text = planned(build(rng, [3000, 9, 0], 2, group=4)).wrapper.explain()
    assert text.startswith("batch of 3 requests, causal attention, float16")
    assert planned(build(rng, [40])).wrapper.explain().startswith("batch of 1 request, full ")
