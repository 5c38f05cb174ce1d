"""Every attention kernel once, small: for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m pytest -m gpu -k "sanitizer or every_kernel" tests
    compute-sanitizer --tool racecheck python -m pytest -m gpu -k "sanitizer or every_kernel" tests

`every_kernel` adds the tests of appending and merging that are for it too. Caches and outputs are
allocated to the byte, so that a read or a store past them is one outside of an allocation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import batches
import graph_calls
import numpy as np
import oracle
import pytest
import strategies
from decode_calls import DECODING
from gpu_calls import check, planned, schedule_of, to_gpu, to_host
from oracle import Formula
from variant_calls import hiding

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("family", "exact_allocations")]

#: (queries, keys): a decode, a short append, and two of the long shape's tiles with a ragged end.
LENGTHS = {"short": ([1, 3], [70, 130]), "long": ([70], [150])}


@pytest.mark.parametrize("shape", LENGTHS)
@pytest.mark.parametrize("page_size", [16, 24, 5])
@pytest.mark.parametrize("head_dim", batches.HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_kernel_with_and_without_splits(
    cp: Any,
    rng: np.random.Generator,
    family: str,
    dtype: str,
    head_dim: int,
    page_size: int,
    shape: str,
) -> None:
    qo_len, kv_len = LENGTHS[shape]
    for case, options in enumerate(
        ({"disable_split_kv": True}, {"fixed_split_size": 48 // page_size})
    ):
        batch = batches.build(
            rng,
            qo_len,
            kv_len,
            page_size=page_size,
            num_kv_heads=2,
            group=3,
            head_dim=head_dim,
            dtype=dtype,
            kv_layout=("NHD", "HND")[case],
            cache_form=("tuple", "strided" if head_dim == 192 else "stacked")[case],
            spare_pages=0,
        )
        formula = Formula(causal=True, sm_scale=(None, -0.1)[case])
        wrapper = planned(batch, formula, **options)
        (launch,) = schedule_of(wrapper).launches
        assert launch.config.page_aligned == (page_size % launch.config.page_unit == 0)
        assert (launch.config.cta_tile_q == 16) == (shape == "short")
        assert launch.config.family == (family if shape == "long" else "prefill_sm80")
        assert shape == "short" or len(launch.items) > 1
        assert bool(launch.num_merges) == bool(case)
        on_gpu = batch.on(to_gpu)
        out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True, **formula.run_options)
        oracle.check_all(batch, formula, to_host(out), to_host(lse))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        *(("float16", None), ("bfloat16", None)),
        *(("float16", "float8_e4m3fn"), ("bfloat16", "float8_e5m2")),
    ],
)
@pytest.mark.parametrize("shape", LENGTHS)
def test_variants_together(
    cp: Any, rng: np.random.Generator, family: str, shape: str, dtype: str, kv_dtype: str | None
) -> None:
    qo_len, kv_len = LENGTHS[shape]
    batch = batches.build(
        *(rng, qo_len, kv_len),
        group=3,
        num_kv_heads=2,
        head_dim=128,
        dtype=dtype,
        kv_dtype=kv_dtype,
        spare_pages=0,
    )
    masks = tuple(rng.random(lengths) < 0.7 for lengths in zip(qo_len, kv_len, strict=True))
    sinks = rng.standard_normal(6).astype(np.float32)
    capped = Formula(causal=True, window_left=50, logits_soft_cap=5.0, sinks=sinks)
    all_on = replace(capped, custom_mask=masks, pos_encoding_mode="ALIBI")
    rotated = replace(capped, logits_soft_cap=None, pos_encoding_mode="ROPE_LLAMA")
    biased = replace(rotated, pos_encoding_mode="ALIBI")
    for formula in (capped, all_on, rotated, biased):
        for options in ({"disable_split_kv": True}, {"fixed_split_size": 3}):
            wrapper = planned(batch, formula, **options)
            on_gpu = batch.on(to_gpu)
            out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True, sinks=to_gpu(sinks))
            oracle.check_all(batch, formula, to_host(out), to_host(lse))


@pytest.mark.parametrize("name", ["causal window", "window and soft cap", "mask and window"])
@pytest.mark.parametrize("page_size", [16, 24, 5])
@pytest.mark.parametrize("shape", LENGTHS)
def test_keys_that_no_row_sees(
    cp: Any, rng: np.random.Generator, family: str, shape: str, page_size: int, name: str
) -> None:
    batch = batches.build(
        rng, *LENGTHS[shape], page_size=page_size, num_kv_heads=1, group=3, head_dim=128,
        spare_pages=0,
    )  # fmt: skip
    formula = hiding(rng, name, batch)
    for options in ({"disable_split_kv": True}, {"fixed_split_size": 48 // page_size}):
        check(batch, formula, **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_narrow_windows_of_heads_that_share_none(
    cp: Any, rng: np.random.Generator, family: str, dtype: str, cap: float | None
) -> None:
    batch = batches.build(
        *(rng, [450, 200], [600, 900]),
        group=1,
        num_kv_heads=2,
        head_dim=128,
        dtype=dtype,
        spare_pages=0,
    )
    formula = Formula(causal=True, window_left=100, logits_soft_cap=cap)
    wrapper = planned(batch, formula)
    (launch,) = schedule_of(wrapper).launches
    assert launch.config.turns == (family != "prefill_sm90")
    on_gpu = batch.on(to_gpu)
    out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
    oracle.check_all(batch, formula, to_host(out), to_host(lse))


@pytest.mark.parametrize("page_size", [16, 5])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_few_keys(
    cp: Any, rng: np.random.Generator, family: str, dtype: str, page_size: int
) -> None:
    batch = batches.build(
        rng, [40, 70, 20], [50, 150, 0], page_size=page_size, group=3, head_dim=128, dtype=dtype,
        spare_pages=0,
    )  # fmt: skip
    wrapper = planned(batch, Formula(causal=True))
    (launch,) = schedule_of(wrapper).launches
    assert (launch.config.cta_tile_q, launch.config.cta_tile_kv) == (
        (128, 64) if family == "prefill_sm90" else (128, 32)
    )
    on_gpu = batch.on(to_gpu)
    out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
    oracle.check_all(batch, Formula(causal=True), to_host(out), to_host(lse))


def test_both_shapes_and_empty_rows_in_one_call(cp: Any, rng: np.random.Generator) -> None:
    batch = batches.build(rng, [40, 1, 0, 20], [30, 90, 10, 0], page_size=2, group=2, spare_pages=0)
    formula = Formula(causal=True)
    wrapper = planned(batch, formula, fixed_split_size=16)
    assert len(schedule_of(wrapper).launches) == 2
    on_gpu = batch.on(to_gpu)
    for _ in range(2):  # the second run finds the counters that the first has set back
        out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
        oracle.check_all(batch, formula, to_host(out), to_host(lse))


@pytest.mark.parametrize("form", batches.Q_FORMS)
def test_strided_and_unaligned_rows(cp: Any, rng: np.random.Generator, form: str) -> None:
    batch = batches.build(
        rng, [9, 20], [30, 33], group=3, q_form=form, cache_form="strided", spare_pages=0
    )
    wrapper = planned(batch, Formula())
    on_gpu = batch.on(to_gpu)
    out = batch.poisoned_out(form).on(to_gpu)
    lse = batch.poisoned_lse(strided=True).on(to_gpu)
    wrapper.run(on_gpu.q, on_gpu.cache, out=out.array, lse=lse.array)
    oracle.check_all(batch, Formula(), out.on(to_host).array, lse.on(to_host).array)


@pytest.mark.parametrize("group", strategies.GROUPS)
def test_groups(cp: Any, rng: np.random.Generator, group: int) -> None:
    batch = batches.build(
        rng, [33, 2], [40, 50], group=group, num_kv_heads=1, page_size=7, spare_pages=0
    )
    wrapper = planned(batch, Formula(causal=True), disable_split_kv=True)
    on_gpu = batch.on(to_gpu)
    out = wrapper.run(on_gpu.q, on_gpu.cache)
    oracle.check_all(batch, Formula(causal=True), to_host(out))


@pytest.mark.parametrize("options", [{"fixed_split_size": 2}, {"disable_split_kv": True}])
def test_decoding_in_a_graph(cp: Any, rng: np.random.Generator, options: dict[str, Any]) -> None:
    """One plan after another at the same addresses."""
    steps = [
        graph_calls.build(rng, [(1, kv_len) for kv_len in step], group=4, head_dim=128)
        for step in ([250, 17, 0, 40], [3], [1400, 33])
    ]
    wrapper = graph_calls.graphed("decode")
    graph_calls.check_steps(graph_calls.with_cupy(cp), wrapper, steps, DECODING, **options)
