"""The edges of a call on a GPU: empty cases, NaN and Inf, devices and kinds of array."""

from __future__ import annotations

from typing import Any

import batches
import numpy as np
import oracle
import pytest
from gpu_calls import (
    Wrapper,
    attention,
    planned,
    run,
    same_bits,
    to_gpu,
    to_host,
)
from oracle import Formula

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("family")]

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


# NaN and Inf


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


# Where arrays are


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
