"""The benchmark's parts: what it counts, what it draws, what it calls wrong."""

from __future__ import annotations

from typing import Any

import bench_prefill
import check
import contender
import numpy as np
import peers
import pytest
import timing
import workloads
from bench_problems import DTYPES, TABLE, bits, count_pairs, formula, ragged_problem
from hypothesis import given, settings
from hypothesis import strategies as st

# What is counted


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_visible_pairs_are_those_counted_one_by_one(qo_len: int, kv_len: int, causal: bool) -> None:
    assert workloads.visible_pairs(qo_len, kv_len, causal) == count_pairs(qo_len, kv_len, causal)


def test_flops_and_bytes_of_a_batch() -> None:
    w = workloads.Workload("w", (3, 0, 2), (5, 7, 1), 4, 2, True, 16, head_dim=64)
    # 3 + 4 + 5 pairs, none, and 0 + 1; K and V of 5 + 1 tokens; 5 rows of Q and of the output.
    assert w.flops() == 4 * 64 * 4 * (12 + 0 + 1)
    assert w.kv_bytes() == 2 * 6 * 2 * 64 * 2
    assert w.bytes() == w.kv_bytes() + 2 * 5 * 4 * 64 * 2


def test_the_table_holds_the_work_of_performance_md() -> None:
    by_name = {w.name: w for w in TABLE}
    # A full row of 16,384 keys for each of 16,384 queries under 16 heads.
    assert by_name["1x16384-full"].flops() == 4 * 128 * 16 * 16384**2
    assert by_name["4x4096"].flops() == 4 * 128 * 32 * 4 * (4096 * 4097 // 2)
    among = by_name["prefill-among-decodes"]
    assert sorted(among.qo_lens) == [1] * 63 + [2048]
    assert among.kv_lens[among.qo_lens.index(2048)] == 32768
    issue = by_name["issue192"]
    assert (issue.batch, issue.num_qo_heads, issue.page_size, issue.min_pages) == (10, 8, 32, 640)
    prefixes = [kv - qo for qo, kv in zip(issue.qo_lens, issue.kv_lens, strict=True)]
    assert all(16 <= n <= 128 for n in (*issue.qo_lens, *prefixes))
    sweep = [w.page_size for w in workloads.page_sweep()]
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256} < set(sweep)
    assert any(size & (size - 1) for size in sweep)


def test_lengths_are_the_same_in_every_run() -> None:
    assert workloads.prefill_workloads(16) == workloads.prefill_workloads(16)


@pytest.mark.parametrize("workload", [*TABLE, *workloads.page_sweep()], ids=lambda w: w.name)
def test_shrunk_workloads_keep_their_shape(workload: workloads.Workload) -> None:
    small = workloads.shrink(workload)
    assert small.batch == workload.batch
    assert small.num_qo_heads * workload.num_kv_heads == workload.num_qo_heads * small.num_kv_heads
    assert small.flops() < 2e9
    assert all(kv >= qo > 0 for qo, kv in zip(small.qo_lens, small.kv_lens, strict=True))


# The arrays


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_slots_of_keys_hold_numbers(rng: np.random.Generator, dtype: str) -> None:
    w = workloads.Workload("w", (1, 1), (5, 9), 2, 1, False, 4, head_dim=8)
    table = workloads.make_page_table(w, rng)
    used = np.zeros(table.num_pages * 4, bool)
    used[table.all_slots()] = True
    for cache in workloads.draw_cache(w, table, rng, dtype):
        assert cache.dtype == DTYPES[dtype]
        rows = cache.reshape(-1, 8).astype(np.float32)
        assert np.isfinite(rows[used]).all()
        assert np.isnan(rows[~used]).all()


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


# What is called wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formula_rounded_once_is_right(rng: np.random.Generator, dtype: str) -> None:
    problem = ragged_problem(rng, dtype)
    verdict = problem.verify(bits(formula(problem), dtype), rng)
    assert verdict.ok
    assert verdict.detail == ""
    assert verdict.max_rel_err <= check.UNIT_ROUNDOFF[dtype]
    assert 0 < verdict.max_abs_err < 8 * check.UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_rows_is_the_formula(rng: np.random.Generator, causal: bool) -> None:
    w = workloads.Workload("w", (7,), (5,), 6, 2, causal, 2, head_dim=8)
    problem = contender.make_problem(w, "float16", timing.HostDevice(), rng)
    slots = problem.table.slots(0)
    k, v = (a.reshape(-1, 2, 8)[slots].astype(np.float64) for a in (problem.k, problem.v))
    visible = check.visible_keys(np.arange(7), 7, 5, causal)
    out = check.attention_rows(np, problem.q.astype(np.float64), k, v, visible, 8**-0.5)
    np.testing.assert_allclose(out, formula(problem), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_that_was_not_written_is_wrong(rng: np.random.Generator, dtype: str) -> None:
    problem = ragged_problem(rng, dtype)
    out = bits(formula(problem), dtype)
    out[6, 2, 3] = check.POISON_BITS
    verdict = problem.verify(out, rng)
    assert not verdict.ok
    assert verdict.detail == "1 values are not finite, the first in row 6, head 2"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_another_head_is_wrong(rng: np.random.Generator, dtype: str) -> None:
    problem = ragged_problem(rng, dtype)
    out = bits(formula(problem), dtype)
    out[4, 0] = out[4, 3]
    verdict = problem.verify(out, rng)
    assert not verdict.ok
    assert verdict.detail.startswith("request 0, row 4, head 0: off by ")
    assert verdict.max_rel_err > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_keys_must_be_exactly_zero(rng: np.random.Generator, dtype: str) -> None:
    problem = ragged_problem(rng, dtype)
    out = bits(formula(problem), dtype)
    row = int(problem.table.qo_indptr[2])
    assert not out[row].any()
    out[row, 1, 0] = 1  # the smallest number there is
    verdict = problem.verify(out, rng)
    assert not verdict.ok
    assert verdict.detail.startswith("request 2, row 0, head 1: off by ")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_missing_key_is_wrong(rng: np.random.Generator, dtype: str) -> None:
    w = workloads.Workload("w", (4,), (64,), 2, 1, False, 16, head_dim=64)
    problem = contender.make_problem(w, dtype, timing.HostDevice(), rng)
    slots = problem.table.slots(0)[:-1]
    k, v = (a.reshape(-1, 1, 64)[slots].astype(np.float64) for a in (problem.k, problem.v))
    q = problem.q.astype(np.float64)
    out = check.attention_rows(np, q, k, v, np.full(4, 63), 64**-0.5)
    assert not problem.verify(bits(out, dtype), rng).ok


def test_an_output_of_another_shape_is_wrong(rng: np.random.Generator) -> None:
    problem = ragged_problem(rng)
    verdict = problem.verify(bits(formula(problem), "float16")[1:], rng)
    assert not verdict.ok
    assert verdict.detail == "shape (17, 4, 16), expected (18, 4, 16)"


@pytest.mark.parametrize("batch", [1, 10, 64])
@pytest.mark.parametrize("qo_len", [1, 3, 64, 4096])
def test_sampled_rows_hold_the_first_and_the_last(
    rng: np.random.Generator, qo_len: int, batch: int
) -> None:
    rows = check.sample_rows(qo_len, batch, rng)
    assert rows[0] == 0
    assert rows[-1] == qo_len - 1
    assert len(set(rows.tolist())) == len(rows) >= min(qo_len, 3)


# Times


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def sampler(name: str) -> Any:
        def sample() -> Any:
            order.append(name)
            mine = float(len(order))
            return lambda: mine

        return sample

    times = timing.interleave(
        {"a": sampler("a"), "b": sampler("b")}, warmup=2, repeat=3, device=timing.HostDevice()
    )
    assert "".join(order) == "aabb" + "ab" * 3
    assert times == {"a": [5.0, 7.0, 9.0], "b": [6.0, 8.0, 10.0]}


def test_host_time_is_of_one_call() -> None:
    calls = []
    times = timing.host_us(lambda: calls.append(1), 4, timing.HostDevice(), calls=5)
    assert len(times) == 4
    assert len(calls) == 20
    assert all(t > 0 for t in times)


def test_a_graph_holds_many_short_calls_and_one_long_call() -> None:
    assert timing.calls_in_graph(10.0) == 50
    assert timing.calls_in_graph(100.0) == 10
    assert timing.calls_in_graph(5e4) == 1
    assert timing.calls_in_graph(0.0) == 50


def test_a_chain_is_longer_for_shorter_calls() -> None:
    assert peers.chain_length(10**6) == 64
    assert peers.chain_length(10**11) == 12
    assert peers.chain_length(10**13) == 8


def test_the_ratio_is_of_paired_rounds() -> None:
    # The clock halves after the first round; every pair still says 2.
    assert timing.paired_ratio([4.0, 8.0, 8.0], [2.0, 4.0, 4.0]) == 2.0


def test_speedup_is_above_one_where_cupaged_is_faster() -> None:
    rows: dict[str, Any] = {"cupaged": {"speedup": None}, "peer": {"speedup": None}}
    bench_prefill.compare(rows, {"cupaged": [1.0, 2.0], "peer": [3.0, 6.0]}, "speedup")
    assert rows == {"cupaged": {"speedup": None}, "peer": {"speedup": 3.0}}


# Peers


def test_scaled_dot_product_attention_gets_only_what_it_computes() -> None:
    fits = [w.name for w in TABLE if peers.sdpa_unfit(w) is None]
    assert fits == ["1x16384-full", "1x16384-causal", "4x4096", "16x1024"]
    by_name = {w.name: w for w in TABLE}
    assert peers.sdpa_unfit(by_name["8x512-over-8192"]) == (
        "its causal mask is aligned to the top left"
    )
    assert peers.sdpa_unfit(by_name["ragged-64"]) == "dense: requests of equal length only"
    assert all(peers.sdpa_unfit(w) == "unpaged" for w in workloads.page_sweep())


def test_missing_peers_say_why_in_one_line() -> None:
    def absent(device: Any, dtype: str) -> Any:
        raise ModuleNotFoundError("No module named 'torch'")

    def broken(device: Any, dtype: str) -> Any:
        raise OSError("libx.so: cannot open\nand much more")

    def unfit(device: Any, dtype: str) -> Any:
        raise contender.UnavailableError("its prebuilt modules are float16")

    present, missing = peers.gather_peers(
        ["a", "b", "c", "d"],
        timing.HostDevice(),
        "bfloat16",
        {"a": absent, "b": broken, "c": unfit, "d": lambda device, dtype: "here"},
    )
    assert present == ["here"]
    assert missing == {
        "a": "ModuleNotFoundError: No module named 'torch'",
        "b": "OSError: libx.so: cannot open",
        "c": "its prebuilt modules are float16",
    }
