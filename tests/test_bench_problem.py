"""The benchmark's problems: their pages, their numbers, their layers."""

from __future__ import annotations

import contender
import numpy as np
import problem as problems
import pytest
import timing
import workloads
from bench_problems import DTYPES, TABLE, ragged_problem
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(0, 2**32),
)
def test_a_page_table_gives_every_key_a_slot_of_its_own(
    lens: list[tuple[int, int]], page_size: int, seed: int
) -> None:
    queries, keys = zip(*lens, strict=True)
    w = workloads.Workload("w", queries, keys, 2, 1, False, page_size)
    table = workloads.make_page_table(w, np.random.default_rng(seed))
    assert [table.kv_len(r) for r in range(w.batch)] == list(keys)
    assert [len(table.slots(r)) for r in range(w.batch)] == list(keys)
    slots = table.all_slots()
    assert len(set(slots.tolist())) == sum(keys)
    assert np.all((slots >= 0) & (slots < table.num_pages * page_size))
    assert table.qo_indptr.tolist() == [sum(queries[:r]) for r in range(w.batch + 1)]
    pages = np.diff(table.kv_indptr)
    used = pages > 0
    assert np.all((table.last_page_len[used] >= 1) & (table.last_page_len[used] <= page_size))
    assert not table.last_page_len[~used].any()


def test_pages_are_in_random_order(rng: np.random.Generator) -> None:
    indices = workloads.make_page_table(TABLE[0], rng).kv_indices
    assert not np.array_equal(indices, np.sort(indices))


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_slots_of_keys_hold_numbers(
    rng: np.random.Generator, dtype: str, kv_layout: str
) -> None:
    w = workloads.Workload("w", (1, 1), (5, 9), 4, 2, False, 4, head_dim=8, kv_layout=kv_layout)
    table = workloads.make_page_table(w, rng)
    used = np.zeros(table.num_pages * 4, bool)
    used[table.all_slots()] = True
    assert sorted(table.unused_slots()) == np.flatnonzero(~used).tolist()
    cache = problems.draw_cache(w, table, timing.HostDevice(), dtype, rng)
    assert cache.dtype == DTYPES[dtype]
    if kv_layout == "HND":
        assert cache.shape == (table.num_pages, 2, 4, 8)
        cache = cache.swapaxes(1, 2)
    tokens = cache.astype(np.float32).reshape(-1, 2, 8)
    assert np.isfinite(tokens[used]).all()
    assert np.isnan(tokens[~used]).all()


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_unpaged_keys_and_values_are_those_of_the_pages(
    rng: np.random.Generator, kv_layout: str
) -> None:
    problem = ragged_problem(rng, "bfloat16", kv_layout)
    table = problem.table
    for cache, unpaged in zip(problem.layers[0], problem.unpaged(), strict=True):
        if kv_layout == "HND":
            cache = cache.swapaxes(1, 2)
        tokens = [
            cache[table.kv_indices[table.kv_indptr[r] + j // 3], j % 3]
            for r, kv_len in enumerate(problem.workload.kv_lens)
            for j in range(kv_len)
        ]
        np.testing.assert_array_equal(unpaged.view(np.uint16), np.array(tokens).view(np.uint16))


@pytest.mark.parametrize(
    ("l2_bytes", "expected"), [(0, 1), (100, 1), (256, 1), (257, 2), (700, 3), (1 << 30, 8)]
)
def test_layers_are_four_times_the_l2_cache(l2_bytes: int, expected: int) -> None:
    device = timing.HostDevice()
    device.l2_bytes = l2_bytes
    assert problems.cold_layers(device, 1024) == expected


def test_calls_take_turns_on_layers_and_each_is_held_against_its_own(
    rng: np.random.Generator,
) -> None:
    w = workloads.Workload("w", (1, 1), (5, 9), 4, 2, True, 4, head_dim=64)
    device = timing.HostDevice()
    device.l2_bytes = 3 * w.kv_bytes() // problems.COLD_L2S
    problem = problems.make_problem(w, "float16", device, rng, cold=True)
    assert len(problem.layers) == 3
    assert problem.describe()["layers"] == 3
    assert not problem.describe()["fits_l2"]
    assert problems.make_problem(w, "float16", device, rng).describe()["layers"] == 1
    runner = contender.Cupaged(device).prepare(problem)
    seen = []
    for _ in range(4):
        runner.poison()
        runner.call()
        assert runner.verdict(rng).ok
        seen.append(runner.layer)
        out = runner.out_bits()
        assert [problem.verify(out, rng, n).ok for n in range(3)] == [
            n == runner.layer for n in range(3)
        ]
    assert seen == [1, 2, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_drawn_in_pieces_are_normal(
    rng: np.random.Generator, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "DRAW_CHUNK", 1 << 12)
    drawn = workloads.standard_normal(rng, (5, 9001), dtype).astype(np.float64)
    assert drawn.shape == (5, 9001)
    assert abs(drawn.mean()) < 0.04
    assert abs(drawn.std() - 1) < 0.04
    # No two pieces come from the same seed.
    pieces = drawn.reshape(-1)[: 10 << 12].reshape(10, -1)
    assert len({piece[:8].tobytes() for piece in pieces}) == 10
