"""The benchmark's parts: what it counts, what it draws, how it takes times."""

from __future__ import annotations

from typing import Any

import contender
import measure
import numpy as np
import peers
import problem as problems
import pytest
import timing
import workloads
from bench_problems import ALL, TABLE, count_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

METHOD = measure.Method(time="us", sweeps_in_graphs=False, plans=True)

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
    for head_dim in (64, 256):
        other = by_name[f"4x4096-hd{head_dim}"]
        assert other.flops() * 128 == by_name["4x4096"].flops() * head_dim
    sweep = [w.page_size for w in workloads.page_sweep()]
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256} < set(sweep)
    assert any(size & (size - 1) for size in sweep)


def test_the_length_sweep_has_as_many_tokens_at_each_length() -> None:
    sweep = {w.kv_lens[0]: w for w in workloads.length_sweep(8)}
    assert list(sweep) == [512, 1024, 2048, 4096, 8192, 16384, 32768]
    for length, w in sweep.items():
        assert w.qo_lens == w.kv_lens == (length,) * w.batch
        assert sum(w.qo_lens) == max(16384, length)
        assert (w.num_qo_heads, w.num_kv_heads, w.causal, w.page_size) == (32, 8, True, 8)
        assert not w.paged_only


def test_no_two_workloads_have_one_name() -> None:
    assert len({w.name for w in ALL}) == len(ALL)


def test_lengths_are_the_same_in_every_run() -> None:
    assert workloads.prefill_workloads(16) == workloads.prefill_workloads(16)


@pytest.mark.parametrize("workload", ALL, ids=lambda w: w.name)
def test_shrunk_workloads_keep_their_shape(workload: workloads.Workload) -> None:
    small = workloads.shrink(workload)
    assert small.batch == workload.batch
    assert small.num_qo_heads * workload.num_kv_heads == workload.num_qo_heads * small.num_kv_heads
    assert small.flops() < 2e9
    assert all(kv >= qo > 0 for qo, kv in zip(small.qo_lens, small.kv_lens, strict=True))


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
    times = {
        ("a", "cupaged"): [1.0, 2.0],
        ("a", "peer"): [3.0, 6.0],
        ("b", "cupaged"): [8.0, 8.0],
        ("b", "peer"): [4.0, 4.0],
        ("c", "peer"): [1.0, 1.0],
    }
    rows: dict[Any, Any] = {key: {"speedup": None} for key in times}
    measure.compare(rows, times, "speedup")
    assert {key: row["speedup"] for key, row in rows.items()} == {
        ("a", "cupaged"): None,
        ("a", "peer"): 3.0,
        ("b", "cupaged"): None,
        ("b", "peer"): 0.5,
        ("c", "peer"): None,
    }


def test_page_sizes_are_compared_with_16_round_by_round() -> None:
    def row(contender_name: str, page_size: int, sweep: str = workloads.PAGE_SWEEP) -> Any:
        return {
            "contender": contender_name,
            "page_size": page_size,
            "sweep": sweep,
            "over_page16": None,
        }

    rows = {
        ("p1", "cupaged"): row("cupaged", 1),
        ("p16", "cupaged"): row("cupaged", 16),
        ("p1", "peer"): row("peer", 1),
        ("4x4096", "cupaged"): row("cupaged", 16, ""),
    }
    times = {
        # Page size 1 takes 1.25 times as long in two of three rounds, while the clock halves.
        ("p1", "cupaged"): [5.0, 10.0, 9.0],
        ("p16", "cupaged"): [4.0, 8.0, 9.0],
        ("p1", "peer"): [1.0, 1.0, 1.0],
        ("4x4096", "cupaged"): [1.0, 1.0, 1.0],
    }
    measure.compare_pages(rows, times)
    assert [row["over_page16"] for row in rows.values()] == [0.8, 1.0, None, None]


def test_workloads_that_are_compared_take_turns(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    right = contender.CupagedRunner.sample

    def sample(self: Any) -> Any:
        order.append(self.problem.workload.page_size)
        return right(self)

    monkeypatch.setattr(contender.CupagedRunner, "sample", sample)
    device = timing.HostDevice()
    pages = [workloads.shrink(w) for w in workloads.page_sweep() if w.page_size in (1, 16, 64)]
    swept = [problems.make_problem(page, "float16", device, rng) for page in pages]
    rows = measure.measure(swept, [contender.Cupaged(device)], device, 4, rng, METHOD)
    assert order[-12:] == [1, 16, 64] * 4
    assert [row["page_size"] for row in rows] == [1, 16, 64]
    # None of them is tried in a graph, which the reference backend would have a note on.
    assert [row["notes"] for row in rows] == [[], [], []]


def test_a_graph_s_time_is_that_of_one_of_its_calls(rng: np.random.Generator) -> None:
    class Recording(timing.HostDevice):
        """A call takes 100 µs, and a graph 80 for each of its calls."""

        def __init__(self) -> None:
            self.recorded: dict[int, int] = {}

        def capture(self, call: timing.Call, calls: int) -> timing.Call:
            def replay() -> None:
                call()

            self.recorded[id(replay)] = calls
            return replay

        def sample(self, call: timing.Call) -> timing.Pending:
            calls = self.recorded.get(id(call))
            return lambda: 100.0 if calls is None else 80.0 * calls

    class Peer(contender.Cupaged):
        name = "peer"

        def prepare(self, problem: problems.Attention) -> contender.Runner:
            runner = super().prepare(problem)
            # Twice the time of a single call, though in a graph the same.
            runner.sample = lambda: lambda: 200.0
            return runner

    device = Recording()
    w = workloads.Workload("w", (3, 1), (9, 5), 2, 1, True, 4, head_dim=64)
    contenders = [contender.Cupaged(device), Peer(device)]
    problem = problems.make_problem(w, "float16", device, rng)
    rows = measure.measure([problem], contenders, device, 3, rng, METHOD)
    assert [row["us"] for row in rows] == [100.0, 200.0]
    assert [row["speedup"] for row in rows] == [None, 2.0]
    for row in rows:
        assert row["plan_us"] > 0
        assert row["status"] == "ok", row["notes"]
        # Of the faster single calls there are so many in a graph; of all, in any case.
        assert row["graph_calls"] == 10
        assert row["graph_us_all"] == [80.0] * 3
        assert row["graph_us"] == 80.0
    assert [row["graph_speedup"] for row in rows] == [None, 1.0]


# Peers


def test_scaled_dot_product_attention_gets_only_what_it_computes() -> None:
    fits = [w.name for w in TABLE if peers.sdpa_unfit(w) is None]
    assert fits == [
        "1x16384-full",
        "1x16384-causal",
        "4x4096",
        "4x4096-hd64",
        "4x4096-hd256",
        "16x1024",
    ]
    assert all(peers.sdpa_unfit(w) is None for w in workloads.length_sweep(16))
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

    present, missing = contender.gather_peers(
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
