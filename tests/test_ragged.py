"""Keys and values without pages, on the reference backend."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any

import batches
import numpy as np
import oracle
import pytest
import ragged_calls
import strategies
from hypothesis import given
from hypothesis import strategies as st
from oracle import Formula
from ragged_calls import Ragged, Wrapper, plan_arguments
from small_call import check_error, ints

import cupaged

LAYOUTS = ("NHD", "HND")


def mixed(rng: np.random.Generator, **options: Any) -> batches.Batch:
    """Requests of every tile shape, with more keys than queries and fewer, with none of either."""
    qo_len, kv_len = [3, 70, 1, 0, 40, 5, 2], [200, 300, 130, 20, 25, 2, 0]
    return batches.build(
        rng, qo_len, kv_len, **{"group": 3, "num_kv_heads": 2, "page_size": 8, **options}
    )


def attention(
    batch: batches.Batch, formula: Formula, *, plan: dict[str, Any] | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Plan, run into poisoned arrays; out and LSE."""
    ragged = Ragged(batch.kv_layout, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cupaged.CupagedWarning)
        batch.plan(ragged, **formula.plan_options, **(plan or {}))
    out, lse = batch.poisoned_out().array, batch.poisoned_lse().array
    ragged.run(batch.q, batch.cache, out=out, lse=lse, **formula.run_options)
    return out, lse


# Results


@given(
    strategies.calls(variants=True),
    st.sampled_from([0, 0, 1, 7]),
    st.sampled_from(LAYOUTS),
    st.sampled_from(ragged_calls.FORMS),
)
def test_random_calls_equal_the_formula(
    call: strategies.Call, gap: int, kv_layout: str, form: str
) -> None:
    """All features at once; rows between requests are NaN, and so are keys that no row sees."""
    strategies.check_call(call, Ragged(call.build_options["kv_layout"], gap, kv_layout, form))


@pytest.mark.parametrize("plan", [{}, {"disable_split_kv": True}])
def test_it_is_attention_over_pages(rng: np.random.Generator, plan: dict[str, Any]) -> None:
    """Bit for bit: it is the same planner and the same kernels."""
    # Pages of 5, as larger ones have tiles of fewer keys here.
    wide = {"head_dim": 192, "head_dim_vo": 128, "page_size": 5}
    for options in (wide, {"kv_dtype": "float8_e5m2"}):
        batch, formula = mixed(rng, **options), Formula(causal=True, window_left=90)
        paged = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend="reference")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cupaged.CupagedWarning)
            batch.plan(paged, **formula.plan_options, **plan)
        out, lse = paged.run(batch.q, batch.cache, return_lse=True)
        for gap in (0, 3):
            found, found_lse = attention(batch, formula, plan=plan, gap=gap)
            assert found.tobytes() == out.tobytes()
            assert found_lse.tobytes() == lse.tobytes()


@pytest.mark.parametrize("tokens", [40, 64, 100])
def test_fixed_splits_are_of_tokens(rng: np.random.Generator, tokens: int) -> None:
    batch = batches.build(rng, [3, 70], [200, 300], page_size=1, group=2)
    ragged = Ragged("NHD")
    batch.plan(ragged, fixed_split_size=tokens)
    for launch in ragged.schedule.launches:
        assert (launch.items["kv_begin"] % tokens == 0).all()
        assert (launch.items["kv_end"] - launch.items["kv_begin"] <= tokens).all()
    oracle.check_all(batch, Formula(), *attention(batch, Formula(), plan={"fixed_split_size": 40}))


def test_requests_may_share_rows_and_come_in_any_order(rng: np.random.Generator) -> None:
    k, v = (rng.standard_normal((100, 2, 64)).astype(np.float16) for _ in range(2))
    q = rng.standard_normal((9, 4, 64)).astype(np.float16)
    wrapper = Wrapper(backend="reference")
    begins, kv_len = [60, 0, 70], [40, 80, 0]
    wrapper._plan_rows([0, 3, 8, 9], begins, kv_len, 4, 2, 64)
    out, lse = wrapper.run_return_lse(q, k, v)
    for rows, begin, count in zip((slice(3), slice(3, 8)), begins, kv_len, strict=False):
        own = slice(begin, begin + count)
        expected, expected_lse = oracle.attend(q[rows], k[own], v[own], Formula())
        plain = oracle.plain_same_dtype(q[rows], k[own], v[own], Formula())
        oracle.assert_close(
            out[rows], expected, plain, np.ones(rows.stop - (rows.start or 0), bool)
        )
        oracle.assert_lse_close(lse[rows], expected_lse)
    assert (out[8] == 0).all()
    assert np.isneginf(lse[8]).all()


@pytest.mark.parametrize("kv_layout", LAYOUTS)
def test_read_only_views_and_lists_are_taken(rng: np.random.Generator, kv_layout: str) -> None:
    batch = mixed(rng)
    ragged = Ragged("NHD", kv_layout=kv_layout)
    with pytest.warns(cupaged.CupagedWarning):
        batch.plan(ragged, causal=True)
    k, v = (ragged.rows(x) for x in batch.cache)
    k.flags.writeable = v.flags.writeable = False
    wrapper = Wrapper(kv_layout=kv_layout)
    with pytest.warns(cupaged.CupagedWarning):
        wrapper.begin_forward(
            batch.qo_indptr.tolist(), ragged.begin.tolist(), 6, 2, 64, causal=True
        )
    oracle.check_all(batch, Formula(causal=True), wrapper.run(batch.q, k, v))


@pytest.mark.parametrize("qo_len", [[], [0, 0], [3, 1]])
def test_no_keys_at_all(rng: np.random.Generator, qo_len: list[int]) -> None:
    batch = batches.build(rng, qo_len, [0] * len(qo_len), group=2)
    out, lse = attention(batch, Formula())
    assert (out == 0).all()
    assert np.isneginf(lse).all()
    assert len(out) == sum(qo_len)


def test_a_plan_that_fails_leaves_the_earlier_one(rng: np.random.Generator) -> None:
    batch = mixed(rng)
    ragged = Ragged("NHD")
    batch.plan(ragged)
    before = ragged.run(batch.q, batch.cache)
    for changes in ({"kv_indptr": ints(0, 1)}, {"window_left": -2}, {"custom_mask": np.ones(3)}):
        with pytest.raises((ValueError, TypeError)):
            ragged.wrapper.plan(**plan_arguments(**changes))
    assert ragged.run(batch.q, batch.cache).tobytes() == before.tobytes()


def test_forward_takes_the_arguments_of_plan(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [3, 9], [40, 60], group=2)
    ragged = Ragged("NHD")
    batch.plan(ragged)
    k, v = (ragged.rows(x) for x in batch.cache)
    for formula, options in (
        (Formula(), {}),
        (Formula(causal=True), {"causal": True}),
        (Formula(window_left=5), {"window_left": 5}),
    ):
        out, lse = ragged.wrapper.forward_return_lse(batch.q, k, v, **options)
        oracle.check_all(batch, formula, out, lse)
        again = ragged.wrapper.forward(batch.q, k, v, **options)
        assert again.tobytes() == out.tobytes()


def test_explain_shows_the_plan(rng: np.random.Generator) -> None:
    ragged = Ragged("NHD")
    mixed(rng).plan(ragged)
    assert ragged.wrapper.explain().startswith("batch of 7 requests, full attention, float16")


# Warnings


def test_fewer_keys_than_queries_warns() -> None:
    """At the caller's line."""
    wrapper = Wrapper(backend="reference")
    with pytest.warns(cupaged.CupagedWarning) as found:
        wrapper.plan(ints(0, 3, 8), ints(0, 2, 7), 4, 2, 64, causal=True)
    (warning,) = found
    assert warning.filename == __file__
    assert str(warning.message) == (
        "request 0 has 3 queries and 2 keys: with causal=True its first 1 rows see no key, and "
        "will be 0. Are the queries' own keys and values in k and v, and counted in kv_indptr?"
    )
    with pytest.warns(cupaged.CupagedWarning) as found:
        wrapper._plan_rows(ints(0, 3), ints(0), ints(2), 4, 2, 64, causal=True)
    assert found[0].filename == __file__


# Arguments


def test_arguments_are_flashinfers() -> None:
    """In name and order; what is this library's own comes behind."""
    constructor = list(inspect.signature(Wrapper).parameters)
    assert constructor == [
        *("float_workspace_buffer", "kv_layout", "use_cuda_graph", "qo_indptr_buf"),
        *("kv_indptr_buf", "custom_mask_buf", "mask_indptr_buf", "backend", "jit_args"),
        *("jit_kwargs", "max_batch_size"),
    ]
    assert list(inspect.signature(Wrapper.plan).parameters)[1:] == [
        *("qo_indptr", "kv_indptr", "num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo"),
        *("custom_mask", "packed_custom_mask", "causal", "pos_encoding_mode"),
        *("use_fp16_qk_reduction", "window_left", "logits_soft_cap", "sm_scale", "rope_scale"),
        *("rope_theta", "q_data_type", "kv_data_type", "o_data_type", "non_blocking"),
        *("prefix_len_ptr", "token_pos_in_items_ptr", "token_pos_in_items_len"),
        *("max_item_len_ptr", "fixed_split_size", "disable_split_kv", "seq_lens", "seq_lens_q"),
        *("max_token_per_sequence", "max_sequence_kv", "v_indptr", "o_indptr", "uniform_q_len"),
    ]
    run = list(inspect.signature(Wrapper.run).parameters)[1:]
    assert run[:4] == ["q", "k", "v", "q_scale"]
    assert inspect.signature(Wrapper.run).parameters["q_scale"].kind.name == "KEYWORD_ONLY"
    assert list(inspect.signature(Wrapper.forward).parameters)[1:12] == [
        *("q", "k", "v", "causal", "pos_encoding_mode", "use_fp16_qk_reduction", "window_left"),
        *("logits_soft_cap", "sm_scale", "rope_scale", "rope_theta"),
    ]


# Other widths


def test_values_of_one_head_dim_where_keys_have_another(rng: np.random.Generator) -> None:
    batch = mixed(rng, head_dim=192, head_dim_vo=128)
    out, lse = attention(batch, Formula(logits_soft_cap=8.0), gap=2, form="strided")
    assert out.shape[-1] == 128
    oracle.check_all(batch, Formula(logits_soft_cap=8.0), out, lse)


def test_bits_of_float8(rng: np.random.Generator) -> None:
    """As uint8 arrays, which say not which float8 they are."""
    batch = mixed(rng, kv_dtype="float8_e4m3fn")
    ragged = Ragged("NHD")
    batch.plan(ragged)
    k, v = (ragged.rows(x) for x in batch.cache)
    out = ragged.wrapper.run(batch.q, k, v)
    oracle.check_all(batch, Formula(), out)
    bits = ragged.wrapper.run(batch.q, k.view(np.uint8), v.view(np.uint8))
    assert bits.tobytes() == out.tobytes()
    other = replace(batch, kv_dtype="float8_e5m2")
    other.plan(ragged)
    message = "k is float8_e4m3fn, expected kv_data_type = float8_e5m2"
    check_error(TypeError, message, ragged.wrapper.run, batch.q, k, v)
