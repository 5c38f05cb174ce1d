"""What is off by default, on a GPU: alone on each family of kernels, at its edges, by chance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import batches
import decode_calls
import numpy as np
import oracle
import pytest
import strategies
from decode_calls import Decoder
from gpu_calls import (
    Wrapper,
    attention,
    check,
    families,
    planned,
    run,
    same_bits,
    schedule_of,
    served_by,
    to_gpu,
    to_host,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Formula
from variant_calls import HIDING, hidden_forms, hiding, masks_of, mixed

import cupaged
from cupaged import kernels, source
from cupaged.spec import FLOAT8_DTYPES, SERVED_HEAD_DIMS

pytestmark = pytest.mark.gpu

#: Every kernel of a random call is compiled when it is asked for, which takes a second.
_EXAMPLES = 25

SPLITS = ({}, {"fixed_split_size": 3}, {"disable_split_kv": True})
DTYPES = ("float16", "bfloat16")


@settings(max_examples=_EXAMPLES)
@given(
    strategies.calls(variants=True, max_batch=6, max_qo=150, max_kv=400, max_page=130),
    st.sampled_from(["prefill_sm90", "prefill_sm80"]),
)
def test_random_calls(cp: Any, call: strategies.Call, family: str) -> None:
    kv_layout = call.build_options["kv_layout"]
    with served_by(family if family in families() else "prefill_sm80"):
        wrapper = Wrapper(kv_layout=kv_layout, backend="cuda")
        strategies.check_call(call, wrapper, to_gpu, to_host)


@settings(max_examples=_EXAMPLES)
@given(decode_calls.calls(variants=True, max_batch=8, max_kv=500, max_page=130))
def test_random_calls_of_decoding(cp: Any, drawn: tuple[strategies.Call, int]) -> None:
    call, q_len = drawn
    decoder = Decoder(q_len, kv_layout=call.build_options["kv_layout"], backend="cuda")
    strategies.check_call(call, decoder, to_gpu, to_host)


FORMULAS = {
    "window": Formula(window_left=70),
    "window of one key": Formula(window_left=0),
    "soft cap": Formula(logits_soft_cap=30.0),
    "tight soft cap": Formula(logits_soft_cap=0.5, sm_scale=-0.2),
    "window and soft cap": Formula(window_left=100, logits_soft_cap=5.0),
    "alibi": Formula(pos_encoding_mode="ALIBI"),
    "alibi and window": Formula(pos_encoding_mode="ALIBI", window_left=70),
    "alibi and soft cap": Formula(pos_encoding_mode="ALIBI", logits_soft_cap=5.0),
    "rope": Formula(pos_encoding_mode="ROPE_LLAMA"),
    "scaled rope": Formula(pos_encoding_mode="ROPE_LLAMA", rope_scale=2.0, rope_theta=5e5),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_variant(
    rng: np.random.Generator, family: str, name: str, dtype: str, causal: bool
) -> None:
    batch = mixed(rng, head_dim=128, dtype=dtype, page_size=16)
    formula = replace(FORMULAS[name], causal=causal)
    for options in SPLITS:
        check(batch, formula, **options)


@pytest.mark.parametrize("window_left", [0, 63, 300, 2048, 2049])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_windows_of_heads_that_share_none(
    rng: np.random.Generator,
    family: str,
    causal: bool,
    dtype: str,
    cap: float | None,
    window_left: int,
) -> None:
    """Where the Hopper kernels' warpgroups don't wait for each other."""
    batch = batches.build(
        rng, [1000, 300, 190, 1], [2500, 300, 1000, 700], group=1, head_dim=128, dtype=dtype
    )
    formula = Formula(causal=causal, window_left=window_left, logits_soft_cap=cap)
    for options in SPLITS:
        check(batch, formula, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_masks(rng: np.random.Generator, dtype: str, causal: bool) -> None:
    batch = mixed(rng, head_dim=128, dtype=dtype, page_size=16)
    masks = masks_of(rng, batch)
    sinks = rng.standard_normal(batch.q.shape[1]).astype(np.float32)
    for formula in (
        Formula(causal, custom_mask=masks),
        Formula(causal, custom_mask=masks, window_left=60, sinks=sinks),
        Formula(
            causal, custom_mask=masks, window_left=150, logits_soft_cap=9.0,
            pos_encoding_mode="ALIBI", sinks=sinks,
        ),
    ):  # fmt: skip
        for options in SPLITS:
            check(batch, formula, **options)


@pytest.mark.parametrize("magnitude", [0.05, 1.0, 6.0, 60.0])
@pytest.mark.parametrize("cap", [0.1, 2.0, 30.0, 50.0, 50.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_caps_near_and_far_from_their_bound(
    rng: np.random.Generator, family: str, dtype: str, cap: float, magnitude: float
) -> None:
    """The Hopper kernels cap small products by a polynomial, and large ones otherwise."""
    batch = batches.build(
        *(rng, [200, 130], [700, 500]),
        group=2,
        num_kv_heads=1,
        head_dim=128,
        dtype=dtype,
        magnitude=magnitude,
    )
    check(batch, Formula(causal=True, logits_soft_cap=cap))


@pytest.mark.parametrize("cap", [30.0, 50.0, 50.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", batches.HEAD_DIMS)
def test_all_logits_at_the_bound(
    rng: np.random.Generator, family: str, head_dim: int, dtype: str, cap: float
) -> None:
    """All of a request's at the upper one, all at the lower one, and both in one row."""
    batch = batches.build(
        rng, [70, 200, 90], [700, 500, 300], num_kv_heads=1, head_dim=head_dim, dtype=dtype
    )
    keys, values = batch.keys_and_values()
    batch.q[...] = 4.0
    for r, kv_len in enumerate(batch.kv_len):
        for key in range(kv_len):
            keys[batch.slot(r, key)] = -4.0 if r == 1 or (r == 2 and key % 3) else 4.0
            values[batch.slot(r, key)] *= 1000.0
    for options in SPLITS:
        check(batch, Formula(causal=True, sm_scale=1.0, logits_soft_cap=cap), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_large_product_among_small_ones(
    rng: np.random.Generator, family: str, dtype: str
) -> None:
    batch = batches.build(
        rng, [200], [700], num_kv_heads=1, head_dim=128, dtype=dtype, magnitude=0.1
    )
    # The row's product with one key reaches the cap, above and below.
    keys, _ = batch.keys_and_values()
    for key, sign in ((333, 40.0), (620, -40.0)):
        keys[batch.slot(0, key)] = sign * batch.q[150]
    check(batch, Formula(causal=True, sm_scale=1.0, logits_soft_cap=30.0))


@pytest.mark.parametrize("kv_dtype", FLOAT8_DTYPES)
@pytest.mark.parametrize("head_dims", SERVED_HEAD_DIMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8(
    cp: Any, rng: np.random.Generator, dtype: str, head_dims: tuple[int, int], kv_dtype: str
) -> None:
    head_dim, head_dim_vo = head_dims
    batch = mixed(
        rng, head_dim=head_dim, head_dim_vo=head_dim_vo, dtype=dtype, kv_dtype=kv_dtype,
        page_size=16, cache_form="tuple",
    )  # fmt: skip
    formula = Formula(causal=True, k_scale=0.7, v_scale=1.3)
    for options in SPLITS:
        check(batch, formula, **options)


@pytest.mark.parametrize("kv_dtype", FLOAT8_DTYPES)
@pytest.mark.parametrize("head_dims", SERVED_HEAD_DIMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_float8(
    cp: Any, rng: np.random.Generator, dtype: str, head_dims: tuple[int, int], kv_dtype: str
) -> None:
    head_dim, head_dim_vo = head_dims
    batch = mixed(
        rng, head_dim=head_dim, head_dim_vo=head_dim_vo, dtype=dtype, kv_dtype=kv_dtype,
        page_size=int(rng.choice([16, 5])), cache_form="tuple",
    )  # fmt: skip
    formula = Formula(
        causal=True, pos_encoding_mode="ROPE_LLAMA", rope_scale=2.0, k_scale=0.7, v_scale=1.3
    )
    for options in SPLITS:
        check(batch, formula, **options)
    masked = replace(
        formula, custom_mask=masks_of(rng, batch), window_left=150, logits_soft_cap=9.0
    )
    check(batch, masked)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_widened_by_arithmetic(
    cp: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """As compute capability 8.0 and 8.6 do it, which lack the instruction: every value there is."""
    rendered = source._inlined
    monkeypatch.setattr(
        source,
        "_inlined",
        lambda family: rendered(family).replace("__CUDA_ARCH__ >= 890", "__CUDA_ARCH__ >= 9000"),
    )
    monkeypatch.setattr(kernels, "_loaded", {})
    batch = batches.build(
        rng, [2, 50], [300, 200], head_dim=128, dtype=dtype, kv_dtype="float8_e4m3fn", spare_pages=0
    )
    for pages in batch.keys_and_values():
        bits = pages.view(np.uint8)
        bits[...] = rng.integers(0, 256, bits.shape, dtype=np.uint8)
        bits[(bits & 0x7F) == 0x7F] = 0  # NaN, below
    check(batch, Formula(causal=True, sm_scale=1e-4))
    _, values = batch.keys_and_values()
    values.view(np.uint8)[batch.slot(0, 7)][0, 5] = 0x7F
    check(batch, Formula(causal=True, sm_scale=1e-4))


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("head_dim", [64, 96, 192, 256])
@pytest.mark.parametrize("page_size", [16, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_variants_of_other_head_dims(
    rng: np.random.Generator,
    family: str,
    dtype: str,
    page_size: int,
    head_dim: int,
    kv_layout: str,
) -> None:
    batch = mixed(
        rng,
        head_dim=head_dim,
        dtype=dtype,
        page_size=page_size,
        kv_layout=kv_layout,
        num_kv_heads=2,
    )
    sinks = rng.standard_normal(batch.q.shape[1]).astype(np.float32)
    for formula in (
        Formula(causal=True),
        Formula(causal=True, window_left=70, sinks=sinks),
        Formula(causal=True, logits_soft_cap=30.0),
        Formula(window_left=100, logits_soft_cap=5.0),
        Formula(causal=True, pos_encoding_mode="ALIBI"),
        Formula(window_left=100, pos_encoding_mode="ALIBI", sinks=sinks),
    ):
        launches = schedule_of(planned(batch, formula)).launches
        assert launches[0].config.family == family
        for options in SPLITS:
            check(batch, formula, **options)


@pytest.mark.parametrize("mean", [-8.0, 0.0, 8.0])
def test_sinks(rng: np.random.Generator, family: str, mean: float) -> None:
    batch = mixed(rng, head_dim=128)
    sinks = rng.normal(mean, 2.0, batch.q.shape[1]).astype(np.float32)
    for options in SPLITS:
        check(batch, Formula(causal=True, sinks=sinks), **options)


def test_rotations_far_along(cp: Any, rng: np.random.Generator) -> None:
    batch = batches.build(rng, [3, 40], [9000, 6000], num_kv_heads=1, head_dim=64)
    check(batch, Formula(causal=True, pos_encoding_mode="ROPE_LLAMA"))


def test_a_window_that_reaches_the_first_key_changes_no_bit(
    rng: np.random.Generator, family: str
) -> None:
    batch = mixed(rng, head_dim=128)
    plain, wide = (
        attention(batch, Formula(causal=True, window_left=n), disable_split_kv=True)
        for n in (-1, 2**30)
    )
    assert same_bits(plain, wide)


def test_the_same_call_gives_the_same_bits(rng: np.random.Generator, family: str) -> None:
    batch = batches.build(rng, [300, 7, 90], [900, 3000, 90], group=4, head_dim=128)
    formula = Formula(causal=True, window_left=500, logits_soft_cap=20.0)
    wrapper = planned(batch, formula)
    assert schedule_of(wrapper).launches
    on_gpu = batch.on(to_gpu)
    first, *others = (to_host(wrapper.run(on_gpu.q, on_gpu.cache)).tobytes() for _ in range(5))
    assert all(other == first for other in others)


# Keys that no row of their request sees, whose K and V are NaN in `check()`, too


@pytest.mark.parametrize("page_size", [1, 8, 16, 24, 64])
@pytest.mark.parametrize("name", HIDING)
def test_what_hidden_keys_hold_changes_no_bit(
    rng: np.random.Generator, family: str, name: str, page_size: int
) -> None:
    batch = mixed(
        rng,
        head_dim=int(rng.choice([64, 128, 256])),
        page_size=page_size,
        kv_layout=str(rng.choice(["NHD", "HND"])),
        cache_form=str(rng.choice(batches.CACHE_FORMS)),
        dtype=str(rng.choice(DTYPES)),
    )
    formula = hiding(rng, name, batch)
    for options in SPLITS:
        wrapper = planned(batch, formula, **options)
        first, *others = (run(wrapper, one, formula) for one in hidden_forms(batch, formula))
        oracle.check_all(batch, formula, *first)
        assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("page_size", [8, 16, 24, 64, 5])
@pytest.mark.parametrize("cap", [None, 4.0])
def test_windows_that_begin_and_end_anywhere(
    rng: np.random.Generator, family: str, cap: float | None, page_size: int
) -> None:
    """In one box of the Hopper kernels' copies, in two, and in boxes of either of their warps."""
    kv_len = rng.integers(1, 200, 40)
    qo_len = rng.integers(1, kv_len, endpoint=True)
    batch = batches.build(
        rng, qo_len.tolist(), kv_len.tolist(), group=4, num_kv_heads=1, head_dim=128,
        page_size=page_size,
    )  # fmt: skip
    for window_left in (0, 3, 10, 40):
        formula = Formula(bool(rng.random() < 0.5), window_left=window_left, logits_soft_cap=cap)
        check(batch, formula)
        check(batch, formula, fixed_split_size=-(-48 // page_size))


def test_a_plan_is_refused_before_anything_is_launched(cp: Any) -> None:
    wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend="cuda")
    with pytest.raises(NotImplementedError, match="head_dim_qk = 80"):
        wrapper.plan([0, 1], [0, 1], [0], [3], 1, 1, 80, 16)
