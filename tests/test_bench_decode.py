"""The decode benchmark: what it measures, and who takes part."""

from __future__ import annotations

from typing import Any

import bench_decode
import bench_problems
import contender
import decode_contender
import decode_host
import decode_workloads
import flashinfer_peers
import numpy as np
import problem as problems
import pytest
import timing
import torch_runner
import workloads
from bench_problems import formula
from decode_bars import SUITE

ALL = bench_decode.Decode().workloads(None)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for FlashInfer and PyTorch."""
    bench_problems.stand_in_for_flashinfer(monkeypatch, flashinfer_peers)


def peer(name: str, dtype: str = "float16") -> Any:
    return flashinfer_peers.DECODE_PEERS[name](timing.HostDevice(), dtype)


# The workloads


def test_the_table_holds_the_work_of_the_issue() -> None:
    by_name = {w.name: w for w in ALL}

    def shape(name: str) -> tuple[int, int, int, int, int]:
        w = by_name[name]
        (keys,) = set(w.kv_lens)
        return w.batch, keys, w.num_qo_heads, w.num_kv_heads, decode_contender.queries_each(w)

    assert shape("64x8192") == (64, 8192, 32, 8, 1)
    assert shape("1x131072") == (1, 131072, 32, 8, 1)
    assert shape("256x1024") == (256, 1024, 32, 8, 1)
    assert shape("16x4096-heads32-32") == (16, 4096, 32, 32, 1)
    assert shape("64x8192-heads8-1") == (64, 8192, 8, 1, 1)
    assert shape("64x8192-4queries") == (64, 8192, 32, 8, 4)
    ragged = by_name["lognormal-128"]
    assert (ragged.batch, ragged.num_qo_heads, ragged.num_kv_heads) == (128, 32, 8)
    assert np.mean(ragged.kv_lens) == pytest.approx(4096, abs=1)
    # Log-normal with sigma 1: the median is 1 / sqrt(e) of the mean, and some are far longer.
    assert 0.5 < np.median(ragged.kv_lens) / 4096 < 0.75
    assert max(ragged.kv_lens) > 4 * 4096
    assert decode_workloads.decode_workloads() == decode_workloads.decode_workloads()
    for name in SUITE.needed[:7]:
        w = by_name[name]
        assert (w.page_size, w.head_dim, w.dtype, w.kv_layout) == (16, 128, "", "NHD")
    assert by_name["64x8192-bfloat16"].dtype == "bfloat16"
    assert by_name["64x8192-HND"].kv_layout == "HND"
    assert {w.head_dim for w in ALL} == {64, 128, 256}
    assert [w.page_size for w in decode_workloads.page_sweep()] == [1, 16, 64, 128]
    lengths = [w.kv_lens for w in decode_workloads.length_sweep()]
    assert lengths == [(256 << i,) * 64 for i in range(8)]
    assert len({w.name for w in ALL}) == len(ALL)


def test_bars_are_measured_where_the_cache_is_no_help() -> None:
    """On an H200 (60 MiB of L2), so that none needs several layers."""
    h200 = timing.HostDevice()
    h200.l2_bytes = 60 << 20
    layers = {w.name: problems.cold_layers(h200, w.kv_bytes()) for w in ALL}
    assert {name: layers[name] for name in SUITE.needed if name in layers} == dict.fromkeys(
        SUITE.needed[:7], 1
    )
    assert layers["length-256"] == 4


@pytest.mark.parametrize("workload", ALL, ids=lambda w: w.name)
def test_shrunk_workloads_keep_their_shape(workload: workloads.Workload) -> None:
    small = decode_workloads.shrink_decode(workload)
    assert small.qo_lens == workload.qo_lens
    assert small.num_qo_heads * workload.num_kv_heads == workload.num_qo_heads * small.num_kv_heads
    assert small.kv_bytes() < 1 << 25
    assert all(kv >= qo for qo, kv in zip(small.qo_lens, small.kv_lens, strict=True))
    same = ("name", "page_size", "head_dim", "dtype", "kv_layout", "sweep", "causal")
    assert [getattr(small, name) for name in same] == [getattr(workload, name) for name in same]


# Who takes part


@pytest.mark.parametrize("name", ["flashinfer-tc", "flashinfer-cc", "flashinfer-fa2"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.usefixtures("flashinfer")
def test_flashinfer_is_called_as_it_wants_to_be(
    rng: np.random.Generator, name: str, queries: int, kv_layout: str
) -> None:
    w = workloads.Workload(
        "w", (queries,) * 3, (9, 4, 17), 4, 2, True, 4, head_dim=128, kv_layout=kv_layout
    )
    flashinfer = peer(name)
    assert flashinfer.name == name
    assert flashinfer.version == "flashinfer 9.9"
    served = {"flashinfer-tc": (1, 3), "flashinfer-cc": (1,), "flashinfer-fa2": (3,)}[name]
    assert (flashinfer.unfit(w) is None) == (queries in served)
    if queries not in served:
        return
    device = timing.HostDevice()
    device.l2_bytes = 2 * w.kv_bytes() // problems.COLD_L2S
    problem = problems.make_problem(w, "float16", device, rng, cold=True)
    runner = flashinfer.prepare(problem)
    for layer in (1, 0):
        runner.poison()
        if queries == 1:  # there has been no output to be poisoned before the first call
            assert np.isnan(np.asarray(runner.out, np.float32)).all()
        runner.call()
        assert runner.layer == layer
        assert runner.verdict(rng).ok
        expected = formula(problem, layer)
        np.testing.assert_allclose(np.asarray(runner.out, np.float64), expected, atol=2e-3)


@pytest.mark.usefixtures("flashinfer")
def test_flashinfer_says_what_it_has_no_modules_for() -> None:
    by_name = {w.name: w for w in ALL}
    decode = peer("flashinfer-tc")
    assert decode.unfit(by_name["64x8192"]) is None
    assert decode.unfit(by_name["64x8192-4queries"]) is None
    assert decode.unfit(by_name["64x8192-hd64"]) == "its prebuilt modules are head_dim 128"
    assert decode.unfit(by_name["64x8192-bfloat16"]) == "its prebuilt modules are float16"
    on_cuda_cores, prefill = peer("flashinfer-cc"), peer("flashinfer-fa3")
    assert on_cuda_cores.unfit(by_name["64x8192-4queries"]) == (
        "several queries a request are for its tensor cores"
    )
    assert prefill.unfit(by_name["64x8192"]) == "one query a request is for its decode wrapper"
    assert prefill.unfit(by_name["64x8192-4queries"]) is None
    with pytest.raises(contender.UnavailableError, match="its prebuilt modules are float16"):
        peer("flashinfer-tc", "bfloat16")


def test_a_graph_that_pytorch_refuses_is_not_capturable() -> None:
    with pytest.raises(timing.NotCapturableError, match=r"RuntimeError: operation not permitted$"):
        torch_runner.record(bench_problems.fake_torch(), lambda: None, 2)


# plan()


class Planning(contender.Contender):
    """Remembers what it planned for; takes no time."""

    version = "1"

    def __init__(self, name: str, log: list[Any], fails_at: int = -1) -> None:
        self.name, self.log, self.fails_at, self.calls = name, log, fails_at, 0

    def unfit(self, workload: workloads.Workload) -> str | None:
        return None

    def prepare(self, problem: Any) -> Any:
        raise AssertionError("nothing is run here")

    def planner(self, workload: workloads.Workload, dtype: str) -> Any:
        def bind(table: workloads.PageTable) -> Any:
            def plan() -> None:
                self.calls += 1
                if self.calls == self.fails_at:
                    raise RuntimeError("no such luck")
                self.log.append((self.name, table))

            return plan

        return bind


def plan_rows(contenders: list[Any], rng: np.random.Generator, rounds: int = 4) -> list[Any]:
    rows = decode_host.plan_rows(
        "plan-64", 64, 4096, contenders, "float16", timing.HostDevice(), rng, rounds
    )
    return list(rows)


def test_every_plan_is_for_another_batch_than_the_one_before(rng: np.random.Generator) -> None:
    log: list[Any] = []
    rows = plan_rows([Planning(name, log) for name in ("a", "b", "c")], rng)
    batches = decode_host.PLAN_BATCHES
    turns = [log[i : i + batches] for i in range(0, len(log), batches)]
    assert len(turns) == 3 * (4 + decode_host.PLAN_WARMUP)
    # All plan for the same batches, and none is always the first.
    who = ["".join({name: "" for name, _ in turn}) for turn in turns]
    assert who[:9] == [*"abc", *"bca", *"cab"]
    tables = [table for _, table in turns[0]]
    assert all([id(table) for _, table in turn] == list(map(id, tables)) for turn in turns)
    for table in tables:
        lens = [table.kv_len(r) for r in range(64)]
        assert np.mean(lens) == pytest.approx(4096, abs=1)
    assert len({table.kv_indices.tobytes() for table in tables}) == batches
    assert len({table.kv_indptr.tobytes() for table in tables}) == batches
    assert [(row["contender"], row["status"], row["unit"]) for row in rows] == [
        (name, "ok", "us") for name in "abc"
    ]
    pages = np.median([len(table.kv_indices) for table in tables])
    assert rows[0]["note"].startswith(f"{pages:,.0f} pages of 16, ")


def test_a_plan_that_fails_is_a_row_and_the_others_go_on(rng: np.random.Generator) -> None:
    log: list[Any] = []
    rows = plan_rows([Planning("a", log, fails_at=2), Planning("b", log)], rng)
    assert [(row["contender"], row["status"]) for row in rows] == [("a", "failed"), ("b", "ok")]
    assert rows[0]["note"] == "RuntimeError: no such luck"
    calls = (4 + decode_host.PLAN_WARMUP) * decode_host.PLAN_BATCHES
    assert [name for name, _ in log].count("b") == calls
