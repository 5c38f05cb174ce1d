"""What is off by default, on the reference backend: alone, at its edges, and all at once."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import batches
import decode_calls
import numpy as np
import oracle
import pytest
import strategies
from decode_calls import Decoder
from formula import alibi_slope
from hypothesis import given
from hypothesis import strategies as st
from oracle import Formula
from test_reference import attention, wrapper_for
from variant_calls import (
    HIDING,
    LN_2,
    check,
    hidden_forms,
    hiding,
    mixed,
    same_bits,
    with_and_without_splits,
)

import cupaged

# All at once


@given(strategies.calls(variants=True))
def test_random_calls_equal_the_formula(call: strategies.Call) -> None:
    kv_layout = call.build_options["kv_layout"]
    wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper(kv_layout=kv_layout, backend="reference")
    strategies.check_call(call, wrapper)


@given(decode_calls.calls(variants=True))
def test_random_calls_of_decoding_equal_the_formula(drawn: tuple[strategies.Call, int]) -> None:
    call, q_len = drawn
    kv_layout = call.build_options["kv_layout"]
    strategies.check_call(call, Decoder(q_len, kv_layout=kv_layout, backend="reference"))


@given(strategies.calls(variants=True, max_kv=700, max_qo=20), st.data())
def test_bits_of_a_request_do_not_depend_on_its_batch(
    call: strategies.Call, data: st.DataObject
) -> None:
    batch, formula = call.batch(), call.whole_formula()
    if not batch.qo_len:
        return
    options = call.plan_options
    if options["fixed_split_size"] is None:
        options = {"disable_split_kv": True}
    out, lse = attention(batch, formula, **options)
    r = data.draw(st.integers(0, len(batch.qo_len) - 1))
    rows = slice(sum(batch.qo_len[:r]), sum(batch.qo_len[: r + 1]))
    out_alone, lse_alone = attention(batch.alone(r), formula.of(r), **options)
    assert out[rows].tobytes() == out_alone.tobytes()
    assert lse[rows].tobytes() == lse_alone.tobytes()


# Windows


@with_and_without_splits
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_left", [0, 1, 7, 63, 64, 65, 127, 150, 10**6])
def test_windows(
    rng: np.random.Generator, window_left: int, causal: bool, splits: dict[str, Any]
) -> None:
    check(mixed(rng), Formula(causal, window_left=window_left), **splits)


@pytest.mark.parametrize("kv_len", [150, 100])
def test_a_window_of_zero_shows_a_row_its_own_key(rng: np.random.Generator, kv_len: int) -> None:
    batch = batches.build(rng, [120], [kv_len], num_kv_heads=2)
    out, lse = attention(batch, Formula(causal=True, window_left=0))
    q, k, v = batch.gathered(0)
    before = max(120 - kv_len, 0)  # rows before the first key
    own = slice(max(kv_len - 120, 0), None)
    np.testing.assert_array_equal(out[before:], v[own])
    logits = (q[before:].astype(np.float64) * k[own].astype(np.float64)).sum(axis=-1) / 8
    np.testing.assert_allclose(lse[before:], logits / LN_2, atol=1e-4)
    assert (out[:before] == 0).all()
    assert np.isneginf(lse[:before]).all()


def test_a_window_that_reaches_the_first_key_changes_no_bit(rng: np.random.Generator) -> None:
    batch = mixed(rng)
    plain = Formula(causal=True)
    assert same_bits(batch, plain, *(replace(plain, window_left=n) for n in (299, 2**30)))
    assert not same_bits(batch, plain, replace(plain, window_left=298))


@with_and_without_splits
def test_a_window_and_a_mask_that_leave_nothing(
    rng: np.random.Generator, splits: dict[str, Any]
) -> None:
    """The mask shows the first ten keys, which the window has left behind for most rows."""
    batch = batches.build(rng, [90, 1], [100, 300], group=2)
    masks = tuple(np.broadcast_to(np.arange(n) < 10, (m, n)) for m, n in ((90, 100), (1, 300)))
    formula = Formula(window_left=5, custom_mask=masks)
    out, lse = attention(batch, formula, **splits)
    assert np.isfinite(lse[:5]).all()
    assert (out[5:] == 0).all()
    assert np.isneginf(lse[5:]).all()
    oracle.check_all(batch, formula, out, lse)


# Soft caps


@with_and_without_splits
@pytest.mark.parametrize("cap", [0.01, 1.0, 30.0, 1e6])
def test_soft_caps(rng: np.random.Generator, cap: float, splits: dict[str, Any]) -> None:
    batch = mixed(rng, magnitude=4.0)
    for sm_scale in (None, -0.3):
        check(batch, Formula(True, sm_scale, k_scale=1.5, logits_soft_cap=cap), **splits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sm_scale", [1e6, -1e30, 1e37])
def test_huge_logits_are_capped(rng: np.random.Generator, sm_scale: float, dtype: str) -> None:
    batch = mixed(rng, magnitude=100.0, dtype=dtype)
    formula = Formula(sm_scale=sm_scale, logits_soft_cap=20.0, lse_base="ln")
    out, lse = attention(batch, formula)
    assert lse.max() <= 20 + np.log(300)
    oracle.check_all(batch, formula, out, lse)


@pytest.mark.parametrize("off", [None, 0, 0.0, -1.0])
def test_soft_caps_that_are_off(rng: np.random.Generator, off: float | None) -> None:
    assert same_bits(mixed(rng), Formula(True), Formula(True, logits_soft_cap=off))


# Masks


def random_masks(rng: np.random.Generator, kind: str, batch: batches.Batch) -> Any:
    pairs = zip(batch.qo_len, batch.kv_len, strict=True)
    return tuple(strategies.random_mask(rng, kind, *pair) for pair in pairs)


@with_and_without_splits
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", strategies.MASKS)
def test_masks(rng: np.random.Generator, kind: str, causal: bool, splits: dict[str, Any]) -> None:
    batch = mixed(rng)
    check(batch, Formula(causal, custom_mask=random_masks(rng, kind, batch)), **splits)


def test_a_row_whose_mask_hides_all_is_zero(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [20, 3, 1], [90, 50, 9], group=4)
    masks = random_masks(rng, "even", batch)
    masks[0][7] = False
    masks[2][0] = False
    out, lse = attention(batch, Formula(custom_mask=masks))
    hidden = [7, 23]
    assert (out[hidden] == 0).all()
    assert np.isneginf(lse[hidden]).all()
    assert np.isfinite(np.delete(lse, hidden, axis=0)).all()
    oracle.check_all(batch, Formula(custom_mask=masks), out, lse)


def test_a_mask_that_says_causal(rng: np.random.Generator) -> None:
    batch = mixed(rng)
    pairs = zip(batch.qo_len, batch.kv_len, strict=True)
    masks = tuple(np.tri(qo, kv, kv - qo, dtype=np.bool_) for qo, kv in pairs)
    oracle.check_all(batch, Formula(causal=True), *attention(batch, Formula(custom_mask=masks)))


def test_packed_and_flat_masks_give_the_same_bits(rng: np.random.Generator) -> None:
    """Of requests whose bits don't fill their last bytes."""
    batch = batches.build(rng, [3, 1, 0, 5], [7, 30, 11, 13], group=2)
    formula = Formula(custom_mask=random_masks(rng, "even", batch))
    flat = attention(batch, formula)
    wrapper = wrapper_for(batch)
    batch.plan(wrapper, packed_custom_mask=formula.packed_mask)
    out, lse = wrapper.run(batch.q, batch.cache, return_lse=True)
    assert out.tobytes() == flat[0].tobytes()
    assert lse.tobytes() == flat[1].tobytes()


# Keys that no row of their request sees, whose K and V are NaN in `check()`, too


@with_and_without_splits
@pytest.mark.parametrize("page_size", [1, 8, 16, 24, 64])
@pytest.mark.parametrize("name", HIDING)
def test_what_hidden_keys_hold_changes_no_bit(
    rng: np.random.Generator, name: str, page_size: int, splits: dict[str, Any]
) -> None:
    batch = mixed(
        rng,
        page_size=page_size,
        kv_layout=str(rng.choice(["NHD", "HND"])),
        cache_form=str(rng.choice(batches.CACHE_FORMS)),
        dtype=str(rng.choice(["float16", "bfloat16"])),
    )
    formula = hiding(rng, name, batch)
    first, *others = (attention(one, formula, **splits) for one in hidden_forms(batch, formula))
    oracle.check_all(batch, formula, *first)
    for other in others:
        assert [x.tobytes() for x in other] == [x.tobytes() for x in first]


# Positions


@with_and_without_splits
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 5, 12])
def test_alibi(rng: np.random.Generator, group: int, causal: bool, splits: dict[str, Any]) -> None:
    """Heads that are a power of two and others; fewer keys than queries; far keys."""
    batch = mixed(rng, group=group)
    check(batch, Formula(causal, pos_encoding_mode="ALIBI"), **splits)
    far = batches.build(rng, [1, 30], [3000, 1100], group=group, num_kv_heads=1)
    check(far, Formula(causal, pos_encoding_mode="ALIBI"), **splits)


def test_alibi_alone(rng: np.random.Generator) -> None:
    """Queries of 0: what is left of a logit is slope times distance, below the diagonal and on."""
    batch = batches.build(rng, [6], [9], group=12, num_kv_heads=1)
    batch.q[...] = 0
    _, lse = attention(batch, Formula(pos_encoding_mode="ALIBI", lse_base="ln"))
    for row in range(6):
        distance = np.arange(9) - (3 + row)
        for head in range(12):
            bias = alibi_slope(head, 12) * distance
            assert lse[row, head] == pytest.approx(np.log(np.exp(bias).sum()), abs=1e-5)


@with_and_without_splits
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(
    "rope",
    [{}, {"rope_scale": 8.0}, {"rope_theta": 5e5}, {"rope_scale": 0.25, "rope_theta": 100.0}],
    ids=str,
)
def test_rope(
    rng: np.random.Generator, rope: dict[str, float], head_dim: int, splits: dict[str, Any]
) -> None:
    batch = mixed(rng, head_dim=head_dim, dtype=str(rng.choice(["float16", "bfloat16"])))
    for causal in (False, True):
        check(batch, Formula(causal, pos_encoding_mode="ROPE_LLAMA", **rope), **splits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", batches.FLOAT8_DTYPES)
def test_rope_of_float8_keys(rng: np.random.Generator, kv_dtype: str, dtype: str) -> None:
    """Once rotated, they have q's dtype."""
    batch = mixed(rng, dtype=dtype, kv_dtype=kv_dtype)
    formula = Formula(True, pos_encoding_mode="ROPE_LLAMA", k_scale=0.5)
    check(batch, formula)
    check(batch, formula, fixed_split_size=2)


def test_rope_takes_heads_of_keys_wider_than_those_of_values(rng: np.random.Generator) -> None:
    batch = mixed(rng, head_dim=192, head_dim_vo=128)
    check(batch, Formula(pos_encoding_mode="ROPE_LLAMA"))


@pytest.mark.parametrize("kv_len", [2**20 + 5, 2**29 + 11])
def test_rope_at_long_positions(rng: np.random.Generator, kv_len: int) -> None:
    """Logits follow from distances alone, so keys far down must give what the first ones give.

    All pages but the last one are the same, and behind the window.
    """
    formula = Formula(causal=True, pos_encoding_mode="ROPE_LLAMA", window_left=99)
    last = batches.build(rng, [20], [119], group=4, page_size=2**12)
    pages = -(-kv_len // 2**12)
    # The 119 keys end where the request ends, in what may be its last two pages.
    keys_and_values = last.gathered(0)[1:]
    shape = (3, 2**12, last.num_kv_heads, last.head_dim)
    cache = tuple(np.zeros(shape, np.float16) for _ in range(2))
    for x, tokens in zip(cache, keys_and_values, strict=True):
        flat = x[1:].reshape(-1, *shape[2:])
        end = kv_len - (pages - 2) * 2**12
        flat[end - 119 : end] = tokens
    wrapper = wrapper_for(last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cupaged.CupagedWarning)
        wrapper.plan(
            [0, 20],
            [0, pages],
            np.array([0] * (pages - 2) + [1, 2], np.int32),
            [kv_len - (pages - 1) * 2**12],
            *last.geometry,
            **formula.plan_options,
        )
    oracle.check_all(last, formula, *wrapper.run(last.q, cache, return_lse=True))


# Sinks


@with_and_without_splits
@pytest.mark.parametrize("lse_base", ["log2", "ln"])
@pytest.mark.parametrize("mean", [-1000.0, -2.0, 5.0, 80.0])
def test_sinks(
    rng: np.random.Generator, mean: float, lse_base: str, splits: dict[str, Any]
) -> None:
    """Those of rows that see keys count once, however many the splits; others stay 0 and -inf."""
    batch = mixed(rng, group=4)
    sinks = rng.normal(mean, 2.0, 4).astype(np.float32)
    formula = Formula(causal=True, v_scale=-1.5, sinks=sinks, lse_base=lse_base)
    out, lse = attention(batch, formula, **splits)
    assert np.isneginf(lse[-2:]).all()
    assert (out[-2:] == 0).all()
    oracle.check_all(batch, formula, out, lse)


def test_a_sink_of_minus_infinity_is_none(rng: np.random.Generator) -> None:
    sinks = np.full(6, -np.inf, np.float32)
    batch = mixed(rng, num_kv_heads=2)
    plain = Formula(causal=True)
    assert same_bits(batch, plain, replace(plain, sinks=sinks))
    sinks[4] = 0.0
    assert not same_bits(batch, plain, replace(plain, sinks=sinks))


def test_a_plan_serves_runs_with_and_without_sinks(rng: np.random.Generator) -> None:
    batch = mixed(rng)
    wrapper = wrapper_for(batch)
    batch.plan(wrapper)
    for sinks in (None, np.array([1, 2, 3], np.float32), np.zeros(3, np.float32), None):
        formula = Formula(sinks=sinks)
        out = wrapper.run(batch.q, batch.cache, **formula.run_options)
        oracle.check_all(batch, formula, out)
