"""Appending to a paged cache on a GPU: every way there, and errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import page_problems
import pytest
from gpu_appends import PLACES, check, fill, found
from gpu_calls import to_gpu, to_host
from hypothesis import given
from page_problems import Problem, View, build, same_bits
from small_call import check_error

from cupaged.append_cuda import LAUNCH_ROWS
from cupaged.page import append_paged_kv_cache
from cupaged.spec import DTYPES

pytestmark = pytest.mark.gpu

# Every way


@pytest.mark.parametrize("place", PLACES)
@given(problem=page_problems.problems())
def test_random_appends_equal_a_loop(cp: Any, place: str, problem: Problem) -> None:
    check(problem, PLACES[place])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("cache_form", page_problems.CACHE_FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_request(
    cp: Any, rng: np.random.Generator, dtype: str, cache_form: str, kv_layout: str, place: str
) -> None:
    problem = build(
        *(rng, [300, 1, 0, 90], [250, 1, 0, 40]),
        padding=5,
        num_kv_heads=8,
        head_dim=128,
        dtype=dtype,
        cache_form=cache_form,
        kv_layout=kv_layout,
        shuffled=True,
    )
    check(problem, PLACES[place])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("head_dim", [1, 3, 4, 6, 12, 64, 72, 256])
@pytest.mark.parametrize("row_form", page_problems.ROW_FORMS)
def test_units_of_every_size(
    cp: Any, rng: np.random.Generator, row_form: str, head_dim: int, place: str
) -> None:
    for dtype in ("float8_e4m3fn", "bfloat16"):
        problem = build(
            *(rng, [70, 9], [60, 9]),
            num_kv_heads=3,
            page_size=7,
            head_dim=head_dim,
            dtype=dtype,
            row_form=row_form,
        )
        check(problem, PLACES[place])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_kv_heads", [1, 8, 40])
@pytest.mark.parametrize("rows", [1, LAUNCH_ROWS, LAUNCH_ROWS + 1, 5000])
def test_few_and_many_rows(
    cp: Any, rng: np.random.Generator, rows: int, num_kv_heads: int, place: str
) -> None:
    """Slots that come with the launch, and uploaded ones; rows in parts; more blocks than fit."""
    appended = [rows // 3, rows - rows // 3]
    problem = build(
        *(rng, [n + 20 for n in appended], appended),
        num_kv_heads=num_kv_heads,
        head_dim=128,
        shuffled=True,
    )
    check(problem, PLACES[place])


@pytest.mark.parametrize("place", PLACES)
def test_nothing_to_append(cp: Any, rng: np.random.Generator, place: str) -> None:
    for kv_len, padding in (([], 0), ([], 3), ([20, 0], 0), ([20, 0], 600)):
        problem = build(rng, kv_len, [0] * len(kv_len), padding=padding)
        check(problem, PLACES[place])


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_index_arrays_here_and_there(cp: Any, rng: np.random.Generator, index_dtype: type) -> None:
    """Some on the host, some on the device, and there with strides."""
    for count in (20, LAUNCH_ROWS + 20):
        problem = build(rng, [count, 9], [count, 2], padding=1, index_dtype=index_dtype)
        on_gpu = problem.on(to_gpu)
        strided = {
            name: to_gpu(np.repeat(array, 3))[::3] for name, array in problem.indices.items()
        }
        for there in (
            strided,
            {n: a for n, a in strided.items() if n in ("positions", "kv_indptr")},
        ):
            replace(on_gpu, **there).append(append_paged_kv_cache)
            assert same_bits(found(on_gpu), problem.solved())
            fill(on_gpu, problem)


def test_int32_and_int64_together(cp: Any, rng: np.random.Generator) -> None:
    problem = build(rng, [40, 9], [7, 2], padding=1)
    for wide in problem.indices:
        mixed = replace(problem, **{wide: problem.indices[wide].astype(np.int64)})
        check(mixed, to_gpu)


@pytest.mark.parametrize("place", PLACES)
def test_offsets_of_more_than_2_31_elements(cp: Any, rng: np.random.Generator, place: str) -> None:
    """Pages at both ends of a cache whose offsets do not fit 32 bits, in elements or in bytes."""
    shape = (16, 8, 128)
    page_bytes = int(np.prod(shape)) * 2
    num_pages = (2**32 + 2**28) // page_bytes
    free, _ = cp.cuda.runtime.memGetInfo()
    if free < 2 * num_pages * page_bytes + (2 << 30):
        pytest.skip(f"{free >> 20} MiB of GPU memory are free")
    small = build(rng, [100, 33], [80, 33], num_kv_heads=8, head_dim=128)
    before = small.storages[0].shape[0]
    spread = np.concatenate([np.arange(6), num_pages - 1 - np.arange(before - 6)])
    huge = []
    for storage in small.storages:
        pages = cp.empty((num_pages, *shape), np.float16)
        cp.cuda.runtime.memset(pages.data.ptr, 0xFF, pages.nbytes)
        for number, at in enumerate(spread):
            pages[int(at)].set(storage[number])
        huge.append(pages)
    indices = spread[small.kv_indices[:-2]].astype(np.int32)
    assert int(indices.max()) * page_bytes > 2**32
    on_gpu = replace(
        small.on(to_gpu, PLACES[place]),
        cache_views=tuple(map(View, huge)),
        kv_indices=PLACES[place](indices),
    )
    on_gpu.append(append_paged_kv_cache)
    for pages, expected in zip(huge, small.solved(), strict=True):
        assert same_bits([to_host(pages[int(at)]) for at in spread], list(expected))
        # Where 32 bits would have had them.
        for at in (num_pages - 1 - np.arange(before)) % (2**31 // page_bytes):
            if at not in spread:
                assert (to_host(pages[int(at)]).view(np.uint8) == 0xFF).all()
    del huge, pages, on_gpu
    cp.get_default_memory_pool().free_all_blocks()


@pytest.mark.usefixtures("exact_allocations")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("head_dim", [8, 4, 2, 1])
@pytest.mark.parametrize("rows", [30, LAUNCH_ROWS + 30])
def test_every_kernel_in_memory_of_the_exact_size(
    cp: Any, rng: np.random.Generator, rows: int, head_dim: int, place: str
) -> None:
    for dtype in ("float16", "float8_e5m2"):
        problem = build(
            *(rng, [rows, 9], [rows - 2, 2]), head_dim=head_dim, dtype=dtype, spare_pages=0
        )
        indices = problem.kv_indices[:-2]
        check(replace(problem, kv_indices=indices), PLACES[place])


# Errors


@pytest.mark.parametrize("place", PLACES)
def test_errors_come_before_anything_is_written(
    cp: Any, rng: np.random.Generator, place: str
) -> None:
    problem = build(rng, [20, 5], [3, 2], page_size=8, spare_pages=1)
    indices = problem.kv_indices.copy()
    indices[3] = 5
    counted = "Were the appended tokens counted in kv_indptr and kv_last_page_len?"
    for change, message in (
        (
            {"positions": np.array([17, 20, 19, 3, 4])},
            f"positions[1] = 20, expected 0..19: request 0 has 20 tokens. {counted}",
        ),
        (
            {"batch_indices": np.array([0, 0, 0, 1, 2])},
            "batch_indices[4] = 2, expected 0..1, or -1 for padding: kv_indptr has 3 entries",
        ),
        (
            {"kv_indices": indices},
            "kv_indices[3] = 5 (request 1, its page 0), expected 0..4: the cache holds 5 pages",
        ),
        (
            {"positions": np.array([17, 18, 18, 3, 4])},
            f"rows 1 and 2 go to the same slot, 2 of page {problem.kv_indices[2]} (position 18 of "
            "request 0, position 18 of request 0), expected one row a slot; padding has "
            "batch_indices -1",
        ),
        (
            {"kv_last_page_len": np.array([9, 5])},
            "kv_last_page_len[0] = 9, expected 1..8 (page_size=8)",
        ),
    ):
        on_gpu = replace(problem, **change).on(to_gpu, PLACES[place])
        check_error(ValueError, message, on_gpu.append, append_paged_kv_cache)
        assert same_bits(found(on_gpu), problem.storages)


def test_arrays_in_the_wrong_place(cp: Any, rng: np.random.Generator) -> None:
    problem = build(rng, [20, 5], [3, 2])
    on_gpu = problem.on(to_gpu)
    k, v = problem.cache_views
    for wrong, message in (
        (
            replace(on_gpu, key_view=problem.key_view),
            "append_key is on the host, expected cuda:0 as the cache is",
        ),
        (
            replace(problem, value_view=on_gpu.value_view),
            "append_value is on cuda:0, expected the host as the cache is",
        ),
        (
            replace(problem, cache_views=(k, v.on(to_gpu))),
            "v cache is on cuda:0, expected the host as the cache is",
        ),
    ):
        check_error(ValueError, message, wrong.append, append_paged_kv_cache)
    index = to_gpu(np.zeros(5, np.float32))
    check_error(
        TypeError,
        "positions has dtype float32, expected int32 or int64",
        replace(on_gpu, positions=index).append,
        append_paged_kv_cache,
    )
    assert same_bits(found(on_gpu), problem.storages)


def test_a_cache_on_the_host_and_indices_on_the_device(cp: Any, rng: np.random.Generator) -> None:
    problem = build(rng, [20, 5], [3, 2], padding=1)
    expected = problem.solved()
    problem.on(np.asarray, to_gpu).append(append_paged_kv_cache)
    assert same_bits(problem.storages, expected)
