"""The CUDA backend against the plain formula, on a GPU."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import batches
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import given, settings
from oracle import Formula

import cupaged
from cupaged import heuristics, kernels

pytestmark = pytest.mark.gpu

Wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper
Results = tuple[np.ndarray, np.ndarray]


def to_gpu(x: np.ndarray) -> Any:
    """Move the bits, which takes no kernel of CuPy's."""
    import cupy

    return cupy.asarray(x.view(f"u{x.itemsize}")).view(x.dtype)


def to_host(x: Any) -> np.ndarray:
    return x.view(f"u{x.itemsize}").get().view(x.dtype)


def schedule_of(wrapper: Wrapper) -> Any:
    return wrapper._plan.schedule


def planned(batch: batches.Batch, formula: Formula, **options: Any) -> Wrapper:
    """Plan a batch with its index arrays on the host."""
    workspace = options.pop("workspace", None)
    wrapper = Wrapper(workspace, kv_layout=batch.kv_layout, backend="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cupaged.CupagedWarning)
        batch.plan(wrapper, **formula.plan_options, **options)
    return wrapper


def run(wrapper: Wrapper, batch: batches.Batch, formula: Formula) -> Results:
    """Run on the GPU into poisoned arrays; out and LSE on the host."""
    on_gpu = batch.on(to_gpu)
    out = to_gpu(batch.poisoned_out().storage)
    lse = to_gpu(batch.poisoned_lse().storage)
    wrapper.run(on_gpu.q, on_gpu.cache, out=out, lse=lse, **formula.run_options)
    return to_host(out), to_host(lse)


def attention(batch: batches.Batch, formula: Formula, **options: Any) -> Results:
    return run(planned(batch, formula, **options), batch, formula)


def check(batch: batches.Batch, formula: Formula, **options: Any) -> None:
    oracle.check_all(batch, formula, *attention(batch, formula, **options))


def same_bits(one: Results, other: Results) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


@contextmanager
def told(what: object) -> Iterator[None]:
    """Put the case in front of what an assertion says."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


# What is served


def mixed_lengths(rng: np.random.Generator, group: int) -> tuple[list[int], list[int]]:
    """Requests of both tile shapes, more keys than queries and fewer."""
    most_short = max(heuristics.SHORT_MAX_ROWS // group, 1)
    qo_len = [
        int(rng.integers(heuristics.SHORT_MAX_ROWS + 1, 60)),
        1,
        int(rng.integers(1, most_short + 1)),
        0,
        int(rng.integers(heuristics.SHORT_MAX_ROWS + 1, 150 // group + 40)),
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
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_everything_that_is_served(
    cp: Any, rng: np.random.Generator, head_dim: int, dtype: str, page_size: int, group: int
) -> None:
    """Causal and full, every layout of the cache, with and without splits."""
    case = 0
    for causal in (False, True):
        for kv_layout in ("NHD", "HND"):
            for cache_form in ("tuple", "stacked"):
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
                with told(f"causal={causal}, {kv_layout}, {cache_form}, {options}"):
                    wrapper = planned(batch, formula, **options)
                    assert len(schedule_of(wrapper).launches) == 2
                    oracle.check_all(batch, formula, *run(wrapper, batch, formula))


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_prefill_among_decodes(cp: Any, rng: np.random.Generator, dtype: str) -> None:
    kv_len = [900, *rng.integers(1, 2000, 40).tolist()]
    batch = batches.build(
        rng, [250] + [1] * 40, kv_len, num_kv_heads=2, group=4, head_dim=128, dtype=dtype
    )
    formula = Formula(causal=True)
    wrapper = planned(batch, formula)
    assert len(schedule_of(wrapper).launches) == 2
    oracle.check_all(batch, formula, *run(wrapper, batch, formula))


def test_speculative_decoding_and_short_appends(cp: Any, rng: np.random.Generator) -> None:
    qo_len = rng.integers(1, 9, 30).tolist()
    kv_len = [n + int(rng.integers(0, 500)) for n in qo_len]
    batch = batches.build(rng, qo_len, kv_len, num_kv_heads=2, group=4, page_size=32)
    check(batch, Formula(causal=True))


# Splits


@pytest.mark.parametrize(
    ("qo_len", "kv_len"),
    [([1], [30_000]), ([7], [9_000]), ([150], [3_000]), ([1, 40], [20_000, 5_000])],
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_requests_are_split_and_merged(
    cp: Any, rng: np.random.Generator, qo_len: list[int], kv_len: list[int], head_dim: int
) -> None:
    batch = batches.build(rng, qo_len, kv_len, num_kv_heads=2, group=2, head_dim=head_dim)
    formula = Formula(causal=True)
    wrapper = planned(batch, formula)
    assert any(launch.num_merges for launch in schedule_of(wrapper).launches)
    oracle.check_all(batch, formula, *run(wrapper, batch, formula))


@pytest.mark.parametrize("pages", [1, 2, 7, 1000])
@pytest.mark.parametrize("page_size", [3, 16])
def test_fixed_splits(cp: Any, rng: np.random.Generator, pages: int, page_size: int) -> None:
    batch = batches.build(
        rng, [100, 1, 5, 0], [150, 333, 4, 9], group=3, page_size=page_size, dtype="bfloat16"
    )
    check(batch, Formula(causal=True), fixed_split_size=pages)


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


# The empty cases


def test_rows_without_keys_are_zero(cp: Any, rng: np.random.Generator) -> None:
    batch = batches.build(rng, [3, 150, 2, 0, 4], [0, 140, 20, 50, 0], group=3)
    for options in ({}, {"fixed_split_size": 1}, {"disable_split_kv": True}):
        out, lse = attention(batch, Formula(causal=True), **options)
        unseen = [*range(13), *range(155, 159)]
        assert (out[unseen] == 0).all()
        assert np.isneginf(lse[unseen]).all()
        assert np.isfinite(lse[13:155]).all()
        oracle.check_all(batch, Formula(causal=True), out, lse)


@pytest.mark.parametrize("lengths", [([], []), ([0, 0], [30, 0])])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_rows_at_all_is_an_empty_result(
    cp: Any, rng: np.random.Generator, lengths: tuple[list[int], list[int]], dtype: str
) -> None:
    batch = batches.build(rng, *lengths, dtype=dtype)
    wrapper = planned(batch, Formula())
    on_gpu = batch.on(to_gpu)
    out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
    assert isinstance(out, cp.ndarray)
    assert out.shape == (0, 2, 64)
    assert out.dtype == batches.DTYPES[dtype]
    assert lse.shape == (0, 2)
    assert lse.dtype == np.float32


def test_a_cache_without_pages(cp: Any, rng: np.random.Generator) -> None:
    batch = batches.build(rng, [2, 40], [0, 0], spare_pages=0)
    out, lse = attention(batch, Formula())
    assert (out == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("page_size", [5, 16])
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 3}])
def test_what_is_in_unseen_slots_changes_nothing(
    cp: Any, rng: np.random.Generator, poison: float, page_size: int, options: dict[str, Any]
) -> None:
    batch = batches.build(rng, [140, 1, 7], [201, 60, 3], group=2, page_size=page_size)
    formula = Formula(causal=True)
    for pages in batch.keys_and_values():
        pages[np.isnan(pages)] = 0
    clean = attention(batch, formula, **options)
    unused = [np.ones(pages.shape, np.bool_) for pages in batch.keys_and_values()]
    for r, kv_len in enumerate(batch.kv_len):
        for key in range(kv_len):
            for mask in unused:
                mask[batch.slot(r, key)] = False
    for pages, mask in zip(batch.keys_and_values(), unused, strict=True):
        pages[mask] = poison
    assert same_bits(attention(batch, formula, **options), clean)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", [0, 70, 127])
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 3}])
def test_a_visible_key_goes_through_as_ieee_has_it(
    cp: Any, rng: np.random.Generator, value: float, key: int, options: dict[str, Any]
) -> None:
    batch = batches.build(rng, [100, 3], [128, 100], group=2)
    for r in range(2):
        k, _ = batch.keys_and_values()
        k[batch.slot(r, min(key, batch.kv_len[r] - 1))][1, 5] = value
    formula = Formula(causal=True)
    out, lse = attention(batch, formula, **options)
    assert np.isfinite(out[:, :2].astype(np.float32)).all()
    oracle.check_all(batch, formula, out, lse)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_visible_value_goes_through_as_ieee_has_it(
    cp: Any, rng: np.random.Generator, value: float
) -> None:
    batch = batches.build(rng, [40, 3], [128, 100], group=2, magnitude=0.5)
    for r in range(2):
        _, v = batch.keys_and_values()
        v[batch.slot(r, 77)][1, 5] = value
    out, lse = attention(batch, Formula())
    np.testing.assert_array_equal(out[:, 2:, 5].astype(np.float32), np.float32(value))
    oracle.check_all(batch, Formula(), out, lse)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_query_goes_through_as_ieee_has_it(
    cp: Any, rng: np.random.Generator, value: float
) -> None:
    batch = batches.build(rng, [40, 3], [128, 100], group=2)
    batch.q[17, 3, 9] = batch.q[41, 0, 0] = value
    out, lse = attention(batch, Formula())
    broken = np.isnan(out.astype(np.float32)).all(axis=2)
    assert np.argwhere(broken).tolist() == [[17, 3], [41, 0]]
    oracle.check_all(batch, Formula(), out, lse)


# Factors and outputs


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


@pytest.mark.parametrize("form", batches.Q_FORMS)
@pytest.mark.parametrize("which", ["q", "out"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_unaligned_and_strided_q_and_out(
    cp: Any, rng: np.random.Generator, form: str, which: str, dtype: str
) -> None:
    q_form = form if which == "q" else "contiguous"
    batch = batches.build(rng, [40, 1, 5], [50, 60, 5], group=3, dtype=dtype, q_form=q_form)
    wrapper = planned(batch, Formula())
    on_gpu = batch.on(to_gpu)
    view = batch.poisoned_out(form if which == "out" else "contiguous").on(to_gpu)
    lse = batch.poisoned_lse(strided=True).on(to_gpu)
    out = view.array
    assert wrapper.run(on_gpu.q, on_gpu.cache, out=out, lse=lse.array) is out
    on_host, lse_on_host = view.on(to_host), lse.on(to_host)
    oracle.check_all(batch, Formula(), on_host.array, lse_on_host.array)
    assert np.isnan(on_host.outside()).all()
    assert np.isnan(lse_on_host.outside()).all()


def test_results_are_new_cupy_arrays(cp: Any, rng: np.random.Generator) -> None:
    batch = batches.build(rng, [40, 1], [50, 60])
    wrapper = planned(batch, Formula())
    on_gpu = batch.on(to_gpu)
    out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
    assert isinstance(out, cp.ndarray)
    assert isinstance(lse, cp.ndarray)
    alone = wrapper.run(on_gpu.q, on_gpu.cache)
    assert not cp.shares_memory(alone, out)
    oracle.check_all(batch, Formula(), to_host(out), to_host(lse))
    assert to_host(alone).tobytes() == to_host(out).tobytes()


@pytest.mark.parametrize("name", ["k cache", "v cache"])
@pytest.mark.parametrize("form", ["odd", "offset"])
def test_an_unaligned_cache_is_refused(
    cp: Any, rng: np.random.Generator, name: str, form: str
) -> None:
    batch = batches.build(rng, [4], [20])
    wrapper = planned(batch, Formula())
    storage = np.zeros((5, 16, 2, 64 + (1 if form == "odd" else 8)), np.float16)
    begin = 0 if form == "odd" else 3
    unaligned = to_gpu(storage)[..., begin : begin + 64]
    fine = to_gpu(np.zeros((5, 16, 2, 64), np.float16))
    cache = (unaligned, fine) if name == "k cache" else (fine, unaligned)
    out = to_gpu(batch.poisoned_out().storage)
    with pytest.raises(ValueError) as raised:
        wrapper.run(to_gpu(np.ascontiguousarray(batch.q)), cache, out=out)
    assert str(raised.value) == (
        f"{name} begins at address {unaligned.data.ptr:#x} with strides {unaligned.strides} in "
        "bytes, expected multiples of 16"
    )
    assert np.isnan(to_host(out)).all()


@pytest.mark.parametrize("stacked", [False, True])
def test_a_cache_of_more_than_2_31_elements(
    cp: Any, rng: np.random.Generator, stacked: bool
) -> None:
    """Pages near both ends of it: their offsets do not fit 32 bits, in elements or in bytes."""
    page_size, heads, head_dim = 16, 8, 128
    page_elements = page_size * heads * head_dim * (2 if stacked else 1)
    num_pages = (2**31 + 2**27) // page_elements
    free, _ = cp.cuda.runtime.memGetInfo()
    needed = num_pages * page_elements * 2 * (1 if stacked else 2)
    if free < needed + (2 << 30):
        pytest.skip(f"{free >> 20} MiB of GPU memory are free, the cache takes {needed >> 20}")
    small = batches.build(
        rng,
        [40, 1],
        [300, 200],
        page_size=page_size,
        num_kv_heads=heads,
        group=2,
        head_dim=head_dim,
        cache_form="stacked" if stacked else "tuple",
    )
    spread = np.concatenate([np.arange(20), num_pages - 1 - np.arange(20)])
    place = rng.permutation(spread)[: sum(map(len, small.pages)) + 3]
    huge = []
    for view in small.cache_views:
        pages = cp.empty((num_pages, *view.storage.shape[1:]), np.float16)
        cp.cuda.runtime.memset(pages.data.ptr, 0xFF, pages.nbytes)  # NaN
        for number, at in enumerate(place):
            pages[int(at)].set(view.storage[number])
        huge.append(pages)
    formula = Formula(causal=True)
    wrapper = Wrapper(backend="cuda")
    indices = place[small.paged_kv_indices].astype(np.int32)
    assert int(indices.max()) * page_elements > 2**31
    qo_indptr, kv_indptr, _, last_page_len = small.index_arrays
    wrapper.plan(qo_indptr, kv_indptr, indices, last_page_len, *small.geometry, causal=True)
    out, lse = wrapper.run(
        to_gpu(small.q_view.storage), huge[0] if stacked else tuple(huge), return_lse=True
    )
    oracle.check_all(small, formula, to_host(out), to_host(lse))
    del huge, pages
    cp.get_default_memory_pool().free_all_blocks()


# Streams, threads, memory


SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
    long long begin = clock64();
    while (clock64() - begin < cycles) {}
}
"""


@pytest.fixture(scope="module")
def spin(cp: Any) -> Callable[[], None]:
    """Keep the current stream busy for some 10 ms."""
    kernel = cp.RawKernel(SPIN, "spin")
    kernel((1,), (1,), (np.int64(1),))  # compiled before it is needed
    cp.cuda.Device().synchronize()
    return lambda: kernel((1,), (1,), (np.int64(15_000_000),))


def random_batch(rng: np.random.Generator) -> batches.Batch:
    count = int(rng.integers(1, 12))
    qo_len = rng.integers(0, 60, count).tolist()
    kv_len = rng.integers(0, 400, count).tolist()
    return batches.build(rng, qo_len, kv_len, num_kv_heads=2, group=2, head_dim=128)


@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 2}])
@pytest.mark.parametrize("with_workspace", [False, True])
def test_planning_anew_while_work_is_in_flight(
    cp: Any,
    rng: np.random.Generator,
    spin: Callable[[], None],
    options: dict[str, Any],
    with_workspace: bool,
) -> None:
    """The plan that is dropped has not been run yet when the next one is made."""
    work = [random_batch(rng) for _ in range(20)]
    on_gpu = [batch.on(to_gpu) for batch in work]
    workspace = cp.empty(64 << 20, np.uint8) if with_workspace else None
    formula = Formula(causal=True)
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        wrapper = Wrapper(workspace, backend="cuda")
        results = []
        spin()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cupaged.CupagedWarning)
            for batch in on_gpu:
                batch.plan(wrapper, causal=True, **options)
                results.append(wrapper.run(batch.q, batch.cache, return_lse=True))
        stream.synchronize()
    for i, (batch, (out, lse)) in enumerate(zip(work, results, strict=True)):
        with told(f"plan {i}"):
            oracle.check_all(batch, formula, to_host(out), to_host(lse))


def test_planned_on_one_stream_and_run_on_another(
    cp: Any, rng: np.random.Generator, spin: Callable[[], None]
) -> None:
    """The upload waits behind a busy stream; the run waits for the upload and not for the host."""
    work = [random_batch(rng) for _ in range(8)]
    planning, running = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    formula = Formula(causal=True)
    wrapper = Wrapper(backend="cuda")
    results = []
    on_gpu = [batch.on(to_gpu) for batch in work]
    cp.cuda.Device().synchronize()
    for batch in on_gpu:
        with warnings.catch_warnings(), planning:
            warnings.simplefilter("ignore", cupaged.CupagedWarning)
            spin()
            batch.plan(wrapper, causal=True, fixed_split_size=3)
        with running:
            results.append(wrapper.run(batch.q, batch.cache, return_lse=True))
    running.synchronize()
    for i, (batch, (out, lse)) in enumerate(zip(work, results, strict=True)):
        with told(f"plan {i}"):
            oracle.check_all(batch, formula, to_host(out), to_host(lse))
    planning.synchronize()


def test_run_follows_what_is_pending_on_its_stream(
    cp: Any, rng: np.random.Generator, spin: Callable[[], None]
) -> None:
    """Queries that arrive late on the caller's stream are read only then."""
    batch = batches.build(rng, [30, 1], [80, 300], group=2)
    on_gpu = batch.on(to_gpu)
    late = cp.empty(on_gpu.q.shape, np.uint16)
    cp.cuda.runtime.memset(late.data.ptr, 0xFF, late.nbytes)
    wrapper = planned(batch, Formula())
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        spin()
        late.data.copy_from_device_async(on_gpu.q_view.storage.data, late.nbytes, stream)
        out = wrapper.run(late.view(np.float16), on_gpu.cache)
        stream.synchronize()
    oracle.check_all(batch, Formula(), to_host(out))


def split_batch(rng: np.random.Generator) -> batches.Batch:
    return batches.build(rng, [1, 40], [500, 300], group=2, head_dim=128)


def workspace_bytes(rng: np.random.Generator) -> int:
    """What a wrapper asks for, by its error."""
    with pytest.raises(ValueError) as raised:
        planned(
            split_batch(rng), Formula(), fixed_split_size=4, workspace=to_gpu(np.zeros(4, "u1"))
        )
    found = re.fullmatch(
        r"float_workspace_buffer has 4 bytes, expected at least (\d+): "
        r"the plan's partial states take that much",
        str(raised.value),
    )
    assert found is not None, str(raised.value)
    return int(found[1])


def test_a_workspace_of_the_exact_size_and_no_byte_more(cp: Any, rng: np.random.Generator) -> None:
    needed = workspace_bytes(rng)
    guard = 4096
    memory = cp.empty(needed + 2 * guard, np.uint8)
    cp.cuda.runtime.memset(memory.data.ptr, 0xFF, memory.nbytes)
    workspace = memory[guard : guard + needed]
    batch = split_batch(rng)
    check(batch, Formula(), fixed_split_size=4, workspace=workspace)
    bytes_after = memory.get()
    assert (bytes_after[:guard] == 0xFF).all()
    assert (bytes_after[-guard:] == 0xFF).all()
    assert not (bytes_after[guard:-guard] == 0xFF).all()
    with pytest.raises(ValueError):
        planned(batch, Formula(), fixed_split_size=4, workspace=workspace[:-1])


def test_an_unaligned_workspace_is_refused(cp: Any) -> None:
    """The kernels store 16 bytes at a time."""
    workspace = cp.empty(1 << 16, np.uint8)[1:]
    with pytest.raises(ValueError) as raised:
        Wrapper(workspace)
    assert str(raised.value) == (
        f"float_workspace_buffer begins at address {workspace.data.ptr:#x}, "
        "expected a multiple of 16"
    )


def test_a_workspace_of_any_dtype(cp: Any, rng: np.random.Generator) -> None:
    workspace = cp.empty(-(-workspace_bytes(rng) // 4), np.float32)
    check(split_batch(rng), Formula(), fixed_split_size=4, workspace=workspace)


def test_threads_each_with_a_wrapper(cp: Any, rng: np.random.Generator) -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        own = np.random.default_rng(seed)
        with cp.cuda.Device(0), cp.cuda.Stream(non_blocking=True) as stream:
            wrapper = Wrapper(backend="cuda")
            for _ in range(6):
                batch = random_batch(own)
                on_gpu = batch.on(to_gpu)
                batch.plan(wrapper, fixed_split_size=3)
                out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
                stream.synchronize()
                try:
                    oracle.check_all(batch, Formula(), to_host(out), to_host(lse))
                except AssertionError as error:
                    failures.append(f"seed {seed}: {error}")
        done.append(seed)

    done: list[int] = []
    seeds = rng.integers(0, 2**32, 4).tolist()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(done) == sorted(seeds)


def test_plans_give_their_memory_back(cp: Any, rng: np.random.Generator) -> None:
    batch = split_batch(rng)
    on_gpu = batch.on(to_gpu)
    wrapper = Wrapper(backend="cuda")

    def used() -> int:
        gc.collect()
        return cp.get_default_memory_pool().used_bytes()

    def step() -> None:
        batch.plan(wrapper, fixed_split_size=4)
        wrapper.run(on_gpu.q, on_gpu.cache)

    step()
    cp.cuda.Device().synchronize()
    before = used()
    for _ in range(50):
        step()
    assert used() == before


# Devices


def test_index_arrays_on_the_device(cp: Any, rng: np.random.Generator) -> None:
    for dtype in (np.int32, np.int64):
        batch = batches.build(rng, [40, 1, 3], [50, 60, 0], index_dtype=dtype)
        wrapper = Wrapper()
        wrapper.plan(*map(cp.asarray, batch.index_arrays), *batch.geometry)
        oracle.check_all(batch, Formula(), *run(wrapper, batch, Formula()))


def test_auto_serves_both_kinds_of_array(cp: Any, rng: np.random.Generator) -> None:
    batch = batches.build(rng, [40, 1, 3], [50, 60, 0], group=3)
    wrapper = Wrapper()
    batch.plan(wrapper)
    oracle.check_all(batch, Formula(), *run(wrapper, batch, Formula()))
    out, lse = wrapper.run(batch.q, batch.cache, return_lse=True)
    assert isinstance(out, np.ndarray)
    oracle.check_all(batch, Formula(), out, lse)


def test_arrays_in_the_wrong_place(cp: Any, rng: np.random.Generator) -> None:
    batch = batches.build(rng, [3], [20])
    on_gpu = batch.on(to_gpu)
    out, lse = batch.poisoned_out(), batch.poisoned_lse()
    k, v = on_gpu.cache
    auto, cuda, reference = Wrapper(), Wrapper(backend="cuda"), Wrapper(backend="reference")
    with_workspace = Wrapper(np.zeros(1 << 20, np.uint8))
    for wrapper in (auto, cuda, reference, with_workspace):
        batch.plan(wrapper)
    table: list[tuple[Wrapper, Any, Any, dict[str, Any], str]] = [
        (
            cuda,
            batch.q,
            batch.cache,
            {},
            "q is on the host, expected a CUDA device: backend='cuda'",
        ),
        (
            reference,
            on_gpu.q,
            on_gpu.cache,
            {},
            "q is on cuda:0, expected the host: backend='reference'",
        ),
        (auto, batch.q, on_gpu.cache, {}, "k cache is on cuda:0, expected the host as q is"),
        (
            auto,
            on_gpu.q,
            (k, batch.cache[1]),
            {},
            "v cache is on the host, expected cuda:0 as q is",
        ),
        (
            auto,
            on_gpu.q,
            (k, v),
            {"out": out.array},
            "out is on the host, expected cuda:0 as q is",
        ),
        (
            auto,
            on_gpu.q,
            (k, v),
            {"lse": lse.array},
            "lse is on the host, expected cuda:0 as q is",
        ),
        (
            with_workspace,
            on_gpu.q,
            (k, v),
            {},
            "float_workspace_buffer is on the host, expected cuda:0 as q is",
        ),
    ]
    for wrapper, q, cache, options, message in table:
        with pytest.raises(ValueError) as raised:
            wrapper.run(q, cache, **options)
        assert str(raised.value) == message
    assert np.isnan(out.array).all()


def test_another_device_than_the_current_one(cp: Any, rng: np.random.Generator) -> None:
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU")
    batch = batches.build(rng, [40, 1, 3], [50, 600, 0], group=3)
    with cp.cuda.Device(1):
        on_gpu = batch.on(to_gpu)
        index_arrays = [cp.asarray(x) for x in batch.index_arrays]
    for planned_for in (index_arrays, batch.index_arrays):
        wrapper = Wrapper(backend="cuda")
        wrapper.plan(*planned_for, *batch.geometry, fixed_split_size=2)
        out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
        assert out.device.id == lse.device.id == 1
        assert cp.cuda.runtime.getDevice() == 0
        with cp.cuda.Device(1):
            oracle.check_all(batch, Formula(), to_host(out), to_host(lse))


# The cache of compiled kernels, in processes of their own


CHILD = """
import sys, hashlib
import numpy as np, cupy
import cupaged
rng = np.random.default_rng(5)
def draw(*shape):
    bits = rng.standard_normal(shape).astype(np.float16).view(np.uint16)
    return cupy.asarray(bits).view(np.float16)
q, k = draw(3, 4, 64), draw(4, 16, 2, 64)
if "wait" in sys.argv:
    print("ready", flush=True)
    sys.stdin.readline()
wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend="cuda")
wrapper.plan([0, 3], [0, 4], [2, 0, 3, 1], [7], 4, 2, 64, 16)
out = wrapper.run(q, (k, k))
print(hashlib.sha256(out.view(np.uint16).get().tobytes()).hexdigest(), flush=True)
"""


def child(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(kernels.__file__).parent.parent,
        env=os.environ | {"CUPAGED_CACHE_DIR": str(folder)},
    )


def result(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.strip()


def test_processes_race_for_a_kernel_and_a_damaged_one_is_made_anew(
    cp: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    racers = [child(folder, "wait") for _ in range(2)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    first, second = (result(racer) for racer in racers)
    assert first == second
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    assert result(child(folder)) == first
    assert entry.read_bytes() == whole
    assert list(folder.iterdir()) == [entry]
