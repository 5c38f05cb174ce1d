"""The benchmark of variants: what it measures, and what it calls wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import bench_variants
import ml_dtypes
import numpy as np
import oracle
import pytest
import timing
import variant_problem
from formula import Formula, visible
from hypothesis import given
from hypothesis import strategies as st
from variant_workloads import (
    DECODE,
    PREFILL,
    RAGGED,
    VariantWorkload,
    shrink_variant,
    variant_workloads,
)

ALL = variant_workloads()
BY_NAME = {w.name: w for w in ALL}
#: Those whose output would be another without what they are about.
VARIANTS = [
    w for w in ALL if w.window_left >= 0 or w.logits_soft_cap or w.sinks or w.custom_mask
    or w.pos_encoding_mode != "NONE"
]  # fmt: skip


def small(**fields: Any) -> VariantWorkload:
    """Two requests over prefixes, four heads that share two, pages of 4."""
    lens = (5, 9), (11, 9)
    return VariantWorkload(
        *("w", *lens, 4, 2, True, 4), **{"head_dim": 64, "dtype": "float16", "beside": "w"} | fields
    )


def prepared(workload: VariantWorkload, rng: np.random.Generator) -> Any:
    device = timing.HostDevice()
    problem = variant_problem.make_variant(workload, device, rng)
    return bench_variants.CupagedVariants(device).prepare(problem)


# The workloads


def test_the_table_holds_the_work_of_the_issue() -> None:
    assert {w.page_size for w in ALL} == {16}
    assert len(BY_NAME) == len(ALL)
    for w in ALL:
        dtype = "float16" if "-float16" in w.name else "bfloat16"
        assert (w.dtype, w.causal, w.kv_layout) == (dtype, True, "NHD")
        length = int(w.name.split("x")[1].split("-")[0])
        assert w.kv_lens == (length,) * int(w.name.split("x")[0])
        assert w.qo_lens == ((1,) * w.batch if w.wrapper == DECODE else w.kv_lens)
        assert w.wrapper == {"4": PREFILL, "1": PREFILL, "6": DECODE}[w.name[0]] or (
            w.name == "4x4096-ragged" and w.wrapper == RAGGED
        )
    prefills = [w for w in ALL if w.beside == "4x4096"]
    features = {w.name[7:]: w.features() for w in prefills}
    mask = features["mask"].pop("packed_custom_mask")
    causal = {"causal": True}
    assert features == {
        "": causal,
        "window": {**causal, "window_left": 1024},
        "softcap": {**causal, "logits_soft_cap": 30.0},
        "window-softcap": {**causal, "window_left": 1024, "logits_soft_cap": 30.0},
        "alibi": {**causal, "pos_encoding_mode": "ALIBI"},
        "rope": {**causal, "pos_encoding_mode": "ROPE_LLAMA"},
        "sinks": causal,
        "mask": {},
        "ragged": causal,
        "hd96": causal,
        "hd192-128": {**causal, "head_dim_vo": 128},
        "e4m3": {**causal, "kv_data_type": "float8_e4m3fn"},
        "e4m3-rope": {
            **causal,
            "kv_data_type": "float8_e4m3fn",
            "pos_encoding_mode": "ROPE_LLAMA",
        },
    }
    one = np.tri(4096, dtype=np.uint8).reshape(-1)
    bits = np.unpackbits(mask, bitorder="little").reshape(4, -1)
    assert all(np.array_equal(bits[r], one) for r in range(4))
    assert [w.name for w in prefills if w.sinks] == ["4x4096-sinks"]
    assert [w.name for w in prefills if w.wrapper == RAGGED] == ["4x4096-ragged"]
    shapes = {w.name[7:]: (w.num_qo_heads, w.num_kv_heads, *w.head_dims) for w in prefills}
    others = {"hd96": (32, 8, 96, 96), "hd192-128": (32, 32, 192, 128)}
    assert shapes == dict.fromkeys(shapes, (32, 8, 128, 128)) | others
    for heads in ((16, 16), (32, 8)):
        name = f"1x16384-heads{heads[0]}-{heads[1]}"
        for w, features in (
            (BY_NAME[name], causal),
            (BY_NAME[name + "-window"], {**causal, "window_left": 1024}),
        ):
            assert (w.num_qo_heads, w.num_kv_heads, w.head_dim) == (*heads, 128)
            assert w.features() == features
    decodes = [w for w in ALL if w.wrapper == DECODE]
    plain_ones = [w for w in decodes if w.pos_encoding_mode == "NONE"]
    rope, rope_e4m3 = (w for w in decodes if w not in plain_ones)
    assert [(w.dtype, w.features()) for w in plain_ones] == [
        (dtype, {"kv_data_type": kv_dtype} if kv_dtype else {})
        for dtype in ("float16", "bfloat16")
        for kv_dtype in (None, "float8_e4m3fn", "float8_e5m2")
    ]
    rotations = {"pos_encoding_mode": "ROPE_LLAMA"}
    assert (rope.dtype, rope.features()) == ("float16", rotations)
    assert rope_e4m3.features() == {"kv_data_type": "float8_e4m3fn", **rotations}
    assert {(w.num_qo_heads, w.num_kv_heads, *w.head_dims) for w in decodes} == {(32, 8, 128, 128)}


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 20)), min_size=1, max_size=3),
    st.integers(-1, 25),
    st.booleans(),
    st.sampled_from([0, 48]),
)
def test_work_is_counted_pair_by_pair(
    lens: list[tuple[int, int]], window_left: int, causal: bool, head_dim_vo: int
) -> None:
    queries, keys = zip(*lens, strict=True)
    w = replace(
        small(), qo_lens=queries, kv_lens=keys, window_left=window_left, causal=causal,
        head_dim_vo=head_dim_vo,
    )  # fmt: skip
    masks = [visible(*one, causal, window_left) for one in lens]
    assert w.flops() == 2 * (64 + (head_dim_vo or 64)) * 4 * sum(int(m.sum()) for m in masks)
    for (qo_len, kv_len), mask in zip(lens, masks, strict=True):
        own, first, stop = w.seen(np.arange(qo_len), qo_len, kv_len)
        assert own.tolist() == [kv_len - qo_len + i for i in range(qo_len)]
        key = np.arange(kv_len)
        seen = (key >= first[:, None]) & (key < stop[:, None])
        np.testing.assert_array_equal(seen, mask)


def test_bytes_are_those_of_the_dtypes() -> None:
    tokens, rows = 64 * 8192, 64
    for name, size in (("64x8192-float16", 2), ("64x8192-float16-e4m3", 1)):
        w = BY_NAME[name]
        assert w.kv_bytes() == tokens * 8 * 2 * 128 * size
        assert w.bytes() == w.kv_bytes() + 2 * rows * 32 * 128 * 2
    wide = BY_NAME["4x4096-hd192-128"]
    assert wide.kv_bytes() == 16384 * 32 * (192 + 128) * 2
    assert wide.bytes() == 2 * wide.kv_bytes()


@pytest.mark.parametrize("workload", ALL, ids=lambda w: w.name)
def test_shrunk_workloads_keep_their_shape(workload: VariantWorkload) -> None:
    less = shrink_variant(workload)
    assert less.kv_bytes() < 1 << 24
    assert less.num_qo_heads * workload.num_kv_heads == workload.num_qo_heads * less.num_kv_heads
    # A window hides as large a part.
    if workload.window_left >= 0:
        assert less.window_left * workload.kv_lens[0] == workload.window_left * less.kv_lens[0]
    lens = {"qo_lens": (), "kv_lens": (), "num_qo_heads": 0, "num_kv_heads": 0, "window_left": 0}
    assert replace(less, **lens) == replace(workload, **lens)


# The numbers


@pytest.mark.parametrize(
    ("kv_dtype", "bits", "least"), [("float8_e4m3fn", 3, 2.0**-6), ("float8_e5m2", 2, 2.0**-14)]
)
def test_float8_is_float16_cut_off(kv_dtype: str, bits: int, least: float) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    values = every.view(np.float16).astype(np.float64)
    below = np.abs(values) < 256  # neither NaN
    every, values = every[below], values[below]
    got = variant_problem.float8_bits(np, every, kv_dtype)
    assert got.dtype == np.uint8
    cut = got.view(getattr(ml_dtypes, kv_dtype)).astype(np.float64)
    normal = np.abs(values) >= least
    step = 2.0 ** (np.floor(np.log2(np.abs(values[normal]))) - bits)
    expected = np.trunc(values[normal] / step) * step
    np.testing.assert_array_equal(cut[normal], expected)
    assert np.all(np.abs(cut[~normal]) <= np.abs(values[~normal]))
    np.testing.assert_array_equal(np.signbit(cut), np.signbit(values))


@pytest.mark.parametrize("head_dim_vo", [0, 32])
@pytest.mark.parametrize("kv_dtype", ["", "float8_e4m3fn", "float8_e5m2"])
def test_only_the_slots_of_keys_hold_numbers(
    rng: np.random.Generator, kv_dtype: str, head_dim_vo: int
) -> None:
    workload = small(kv_dtype=kv_dtype, head_dim_vo=head_dim_vo)
    problem = variant_problem.make_variant(workload, timing.HostDevice(), rng)
    table = problem.table
    for cache, head_dim in zip(problem.layers[0], (64, head_dim_vo or 64), strict=True):
        assert cache.shape == (table.num_pages, 4, 2, head_dim)
        if kv_dtype:
            assert cache.dtype == np.uint8
            cache = cache.view(getattr(ml_dtypes, kv_dtype))
        tokens = cache.astype(np.float64).reshape(-1, 2, head_dim)
        assert np.isfinite(tokens[table.all_slots()]).all()
        assert np.isnan(tokens[table.unused_slots()]).all()
        assert 0.7 < tokens[table.all_slots()].std() < 1.2


# What is right


def in_order(problem: variant_problem.VariantProblem, request: int) -> list[np.ndarray]:
    """A request's K and V as float64, key after key."""
    w, table = problem.workload, problem.table
    begin = sum(w.kv_lens[:request])
    found = []
    for cache in problem.layers[0]:
        if w.kv_dtype:
            cache = cache.view(getattr(ml_dtypes, w.kv_dtype))
        pages = table.kv_indices[table.kv_indptr[request] : table.kv_indptr[request + 1]]
        keys = range(w.kv_lens[request])
        rows = [
            cache[begin + j] if w.wrapper == RAGGED else cache[pages[j // 4], j % 4] for j in keys
        ]
        found.append(np.array(rows).astype(np.float64))
    return found


FEATURES: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_left": 3},
    "soft cap": {"logits_soft_cap": 0.7},
    "alibi": {"pos_encoding_mode": "ALIBI"},
    "rope": {"pos_encoding_mode": "ROPE_LLAMA"},
    "sinks": {"sinks": True},
    "mask": {"custom_mask": True},
    "ragged": {"wrapper": RAGGED, "window_left": 2},
    "two head dims": {"head_dim": 192, "head_dim_vo": 128},
    "e4m3": {"kv_dtype": "float8_e4m3fn"},
    "e5m2": {"kv_dtype": "float8_e5m2", "dtype": "bfloat16"},
    "rope of e4m3": {"kv_dtype": "float8_e4m3fn", "pos_encoding_mode": "ROPE_LLAMA"},
    "many": {
        "window_left": 4,
        "logits_soft_cap": 0.5,
        "pos_encoding_mode": "ALIBI",
        "sinks": True,
        "dtype": "bfloat16",
    },
}


@pytest.mark.parametrize("name", FEATURES)
def test_the_formula_is_the_oracle_s(rng: np.random.Generator, name: str) -> None:
    workload = small(**FEATURES[name])
    problem = variant_problem.make_variant(workload, timing.HostDevice(), rng)
    formula = Formula(
        True,
        window_left=workload.window_left,
        logits_soft_cap=workload.logits_soft_cap,
        pos_encoding_mode=workload.pos_encoding_mode,
        sinks=problem.sinks,
    )
    q = problem.q.astype(np.float64)
    expected = np.concatenate(
        [
            oracle.attend(rows, *in_order(problem, r), formula)[0]
            for r, rows in enumerate(np.split(q, [5]))
        ]
    )
    known = problem.answers(0, rng)
    assert known.places.tolist() == list(range(14))  # so few are all looked at
    assert known.requests.tolist() == [0] * 5 + [1] * 9
    assert known.rows.tolist() == [*range(5), *range(9)]
    np.testing.assert_allclose(known.expected, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FEATURES)
def test_cupaged_is_called_as_the_workload_says(rng: np.random.Generator, name: str) -> None:
    runner = prepared(small(**FEATURES[name]), rng)
    runner.poison()
    assert not runner.verdict(rng).ok
    runner.call()
    assert runner.verdict(rng).ok


@pytest.mark.parametrize("workload", VARIANTS, ids=lambda w: w.name)
def test_a_variant_that_was_left_out_is_wrong(
    rng: np.random.Generator, workload: VariantWorkload
) -> None:
    workload = shrink_variant(workload)
    if workload.logits_soft_cap:
        # Logits of such numbers hardly reach the cap.
        workload = replace(workload, logits_soft_cap=2.0)
    runner = prepared(workload, rng)
    off = {"window_left": -1, "logits_soft_cap": 0.0, "pos_encoding_mode": "NONE", "sinks": False}
    if workload.custom_mask:
        off = {"custom_mask": False, "causal": False}
    problem = replace(runner.problem, workload=replace(workload, **off), sinks=None)
    without = bench_variants.CupagedVariants(timing.HostDevice()).prepare(problem)
    without.call()
    out = without.out.view(np.uint16)
    assert not runner.problem.verify(out, rng, 0).ok
    runner.call()
    assert runner.verdict(rng).ok
