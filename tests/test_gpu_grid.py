"""Everything that is served, on a GPU, against the plain formula; splits and their bits."""

from __future__ import annotations

from typing import Any

import batches
import numpy as np
import oracle
import pytest
import strategies
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
    told,
)
from hypothesis import given, settings
from oracle import Formula

from cupaged import shape_choice

pytestmark = pytest.mark.gpu
both_families = pytest.mark.usefixtures("family")

# What is served


def mixed_lengths(rng: np.random.Generator, group: int) -> tuple[list[int], list[int]]:
    """Requests of both tile shapes, more keys than queries and fewer."""
    most_short = max(shape_choice.SHORT_MAX_ROWS // group, 1)
    qo_len = [
        int(rng.integers(shape_choice.SHORT_MAX_ROWS + 1, 60)),
        1,
        int(rng.integers(1, most_short + 1)),
        0,
        int(rng.integers(shape_choice.SHORT_MAX_ROWS + 1, 150 // group + 40)),
    ]
    kv_len = [
        int(rng.integers(60, 200)),
        int(rng.integers(1, 300)),
        int(rng.integers(0, 150)),
        int(rng.integers(0, 40)),
        int(rng.integers(0, 40)),
    ]
    return qo_len, kv_len


@pytest.mark.parametrize("group", strategies.GROUPS)
@pytest.mark.parametrize("page_size", [1, 2, 5, 16, 24, 32, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", batches.HEAD_DIMS)
def test_everything_that_is_served(
    cp: Any, rng: np.random.Generator, head_dim: int, dtype: str, page_size: int, group: int
) -> None:
    """Causal and full, every layout of the cache, with and without splits, every family."""
    case = 0
    for causal in (False, True):
        for kv_layout in ("NHD", "HND"):
            for cache_form in ("tuple", "strided" if head_dim == 192 else "stacked"):
                qo_len, kv_len = mixed_lengths(rng, group)
                options: dict[str, Any] = (
                    {"disable_split_kv": True},
                    {"fixed_split_size": max(int(rng.integers(20, 150)) // page_size, 1)},
                )[case % 2]
                case += 1
                batch = batches.build(
                    rng,
                    qo_len,
                    kv_len,
                    page_size=page_size,
                    num_kv_heads=2 if group < 7 else 1,
                    group=group,
                    head_dim=head_dim,
                    dtype=dtype,
                    kv_layout=kv_layout,
                    cache_form=cache_form,
                )
                formula = Formula(causal=causal)
                expected = oracle.expect(batch, formula)
                for family in families():
                    with (
                        served_by(family),
                        told(f"{family}, causal={causal}, {kv_layout}, {cache_form}, {options}"),
                    ):
                        wrapper = planned(batch, formula, **options)
                        launches = schedule_of(wrapper).launches
                        assert [launch.config.family for launch in launches] == [
                            family,
                            "prefill_sm80",
                        ]
                        oracle.check_expected(expected, *run(wrapper, batch, formula))


@both_families
@given(strategies.calls(max_batch=6, max_qo=150, max_kv=400, max_page=130))
@settings(max_examples=120)
def test_random_calls_equal_the_formula(cp: Any, call: strategies.Call) -> None:
    kv_layout = call.build_options["kv_layout"]
    strategies.check_call(call, Wrapper(kv_layout=kv_layout, backend="cuda"), to_gpu, to_host)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
def test_decoding(cp: Any, rng: np.random.Generator, causal: bool, page_size: int) -> None:
    kv_len = np.minimum(rng.lognormal(5, 1.2, 64).astype(int), 1500).tolist()
    batch = batches.build(
        rng, [1] * 64, kv_len, page_size=page_size, num_kv_heads=4, group=4, head_dim=128
    )
    check(batch, Formula(causal=causal))


@both_families
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_prefill_among_decodes(cp: Any, rng: np.random.Generator, dtype: str) -> None:
    kv_len = [900, *rng.integers(1, 2000, 40).tolist()]
    batch = batches.build(
        rng, [250] + [1] * 40, kv_len, num_kv_heads=2, group=4, head_dim=128, dtype=dtype
    )
    formula = Formula(causal=True)
    expected = oracle.expect(batch, formula)
    # Where the planner is free, the decodes may ride along in the prefill's launch.
    oracle.check_expected(expected, *attention(batch, formula))
    wrapper = planned(batch, formula, disable_split_kv=True)
    assert len(schedule_of(wrapper).launches) == 2
    oracle.check_expected(expected, *run(wrapper, batch, formula))


def test_speculative_decoding_and_short_appends(cp: Any, rng: np.random.Generator) -> None:
    qo_len = rng.integers(1, 9, 30).tolist()
    kv_len = [n + int(rng.integers(0, 500)) for n in qo_len]
    batch = batches.build(rng, qo_len, kv_len, num_kv_heads=2, group=4, page_size=32)
    check(batch, Formula(causal=True))


@both_families
@pytest.mark.parametrize("sm_scale", [-0.2, -1e-3, 0.0, 1e-30, 2.0])
@pytest.mark.parametrize("lse_base", ["log2", "ln"])
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 2}])
def test_scales(
    cp: Any, rng: np.random.Generator, sm_scale: float, lse_base: str, options: dict[str, Any]
) -> None:
    batch = batches.build(rng, [50, 2, 3], [70, 90, 0], group=3, magnitude=2.0)
    formula = Formula(
        causal=True, sm_scale=sm_scale, q_scale=0.5, k_scale=1.5, v_scale=-3.0, lse_base=lse_base
    )
    check(batch, formula, **options)


# Splits


@both_families
@pytest.mark.parametrize(
    ("qo_len", "kv_len"),
    [([1], [30_000]), ([7], [9_000]), ([150], [3_000]), ([1, 40], [20_000, 5_000])],
)
@pytest.mark.parametrize("head_dim", batches.HEAD_DIMS)
def test_long_requests_are_split_and_merged(
    cp: Any, rng: np.random.Generator, qo_len: list[int], kv_len: list[int], head_dim: int
) -> None:
    batch = batches.build(rng, qo_len, kv_len, num_kv_heads=2, group=2, head_dim=head_dim)
    formula = Formula(causal=True)
    wrapper = planned(batch, formula)
    assert any(launch.num_merges for launch in schedule_of(wrapper).launches)
    oracle.check_all(batch, formula, *run(wrapper, batch, formula))


@both_families
@pytest.mark.parametrize("pages", [1, 2, 7, 1000])
@pytest.mark.parametrize("page_size", [3, 16])
def test_fixed_splits(cp: Any, rng: np.random.Generator, pages: int, page_size: int) -> None:
    batch = batches.build(
        rng, [100, 1, 5, 0], [150, 333, 4, 9], group=3, page_size=page_size, dtype="bfloat16"
    )
    check(batch, Formula(causal=True), fixed_split_size=pages)


@both_families
@pytest.mark.parametrize("options", [{"fixed_split_size": 3}, {"disable_split_kv": True}])
def test_bits_of_a_request_do_not_depend_on_its_batch(
    cp: Any, rng: np.random.Generator, options: dict[str, Any]
) -> None:
    qo_len = [1, 70, 3, *rng.integers(1, 100, 20).tolist()]
    kv_len = [2000, 300, 40, *rng.integers(1, 600, 20).tolist()]
    batch = batches.build(rng, qo_len, kv_len, group=4, head_dim=128)
    formula = Formula(causal=True)
    out, lse = attention(batch, formula, **options)
    for r in range(len(qo_len)):
        rows = slice(sum(qo_len[:r]), sum(qo_len[: r + 1]))
        alone = attention(batch.alone(r), formula, **options)
        assert same_bits((out[rows], lse[rows]), alone), f"request {r}"


@both_families
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 1}, {"disable_split_kv": True}])
def test_the_same_call_gives_the_same_bits(
    cp: Any, rng: np.random.Generator, options: dict[str, Any]
) -> None:
    """Whatever order the thread blocks of a split end in: one plan run often, and planned anew."""
    batch = batches.build(rng, [1, 120, 2, 33], [9000, 1500, 3000, 700], group=4, head_dim=128)
    formula = Formula(causal=True)
    wrapper = planned(batch, formula, **options)
    first = run(wrapper, batch, formula)
    oracle.check_all(batch, formula, *first)
    for _ in range(20):
        assert same_bits(run(wrapper, batch, formula), first)
    for _ in range(5):
        assert same_bits(attention(batch, formula, **options), first)
