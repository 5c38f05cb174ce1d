"""The benchmark's bars: what is measured for each, and when one is met."""

from __future__ import annotations

import json
from typing import Any

import bench_append
import bench_decode
import bench_prefill
import prefill_bars
import pytest
import script
from prefill_bars import SUITE


def ours(name: str, **fields: Any) -> dict[str, Any]:
    """A row of cupaged's."""
    return {"workload": name, "contender": "cupaged", "status": "ok", **fields}


def cudnn(name: str, speedup: float, status: str = "ok") -> dict[str, Any]:
    row = {"workload": name, "contender": "sdpa-cudnn", "status": status}
    return row | {"speedup": speedup, "tflops": 600.0}


def spread(low: float) -> list[dict[str, Any]]:
    """The page sizes that are compared, all but one as fast as 16."""
    ratios = {16: 1.0, 32: 1.0, 64: low, 128: 1.0, 256: 1.0}
    return [ours(f"4x4096-page{n}", over_page16=ratio, tflops=1.0) for n, ratio in ratios.items()]


@pytest.mark.parametrize(
    ("rows", "work", "measured", "verdict"),
    [
        ([ours("4x4096", tflops=1.0), cudnn("4x4096", 1.10)], "4 × 4,096", 1.10, "aim met"),
        ([ours("4x4096", tflops=1.0), cudnn("4x4096", 1.09)], "4 × 4,096", 1.09, "met"),
        ([ours("4x4096", tflops=1.0), cudnn("4x4096", 0.999)], "4 × 4,096", 0.999, "missed"),
        ([ours("4x4096", tflops=1.0)], "4 × 4,096", None, "no cuDNN"),
        (
            [ours("4x4096", tflops=1.0), cudnn("4x4096", 2.0, "wrong")],
            "4 × 4,096",
            None,
            "no cuDNN",
        ),
        (
            [ours("4x4096", tflops=1.0) | {"status": "wrong"}, cudnn("4x4096", 2.0)],
            "4 × 4,096",
            None,
            "wrong",
        ),
        ([ours("ragged-64", tflops=650.0)], "ragged", 650.0, "aim met"),
        ([ours("ragged-64", tflops=559.9)], "ragged", 559.9, "missed"),
        ([ours("issue192", graph_us=9.5)], "ten short", 9.5, "met"),
        ([ours("issue192", graph_us=9.6)], "ten short", 9.6, "missed"),
        ([ours("issue192", graph_us=6.9)], "ten short", 6.9, "aim met"),
        ([ours("issue192", graph_us=None)], "ten short", None, "not measured"),
        (spread(0.98), "page sizes 16 to 256", 1 / 0.98 - 1, "met"),
        (spread(1.04), "page sizes 16 to 256", 0.04, "missed"),
        (
            [ours("4x4096-page1", over_page16=0.84, tflops=1.0), *spread(1.0)],
            "page size 1",
            0.84,
            "missed",
        ),
        (
            [ours("4x4096-page1", over_page16=0.86, tflops=1.0), *spread(1.0)],
            "page size 1",
            0.86,
            "met",
        ),
        ([ours("run-host", value=12.0)], "run()", 12.0, "aim met"),
        ([ours("run-host", value=20.1)], "run()", 20.1, "missed"),
        ([ours("plan-64", value=100.1)], "plan(), 64 ragged", 100.1, "missed"),
        ([ours("plan-1024", value=399.0)], "plan(), 1,024 ragged", 399.0, "met"),
        (
            [
                ours(name, plan_us=90.0 + 20.0 * (name == "ragged-64"), tflops=1.0, graph_us=1.0)
                for name in prefill_bars.PLANNED
            ],
            "plan() of the batches",
            110.0,
            "missed",
        ),
    ],
)
def test_a_bar_says_whether_it_was_reached(
    rows: list[dict[str, Any]], work: str, measured: float | None, verdict: str
) -> None:
    found = SUITE.verdicts(rows)
    (one,) = (one for one in found if one["work"].startswith(work))
    assert one["verdict"] == verdict
    assert one["measured"] == (None if measured is None else pytest.approx(measured))
    json.dumps(found, allow_nan=False)
    lines = list(SUITE.table(found, "title"))
    assert max(map(len, lines)) < 130
    assert len(lines) == len(found) + 2
    met = sum(one["verdict"] in ("met", "aim met") for one in found)
    assert lines[0] == f"title: {met} of {len(found)} met"
    assert any(line.startswith(one["work"]) and line.endswith(verdict) for line in lines)


def test_bars_without_their_rows_are_not_there() -> None:
    assert SUITE.verdicts([ours("4x4096-page1", over_page16=0.9, tflops=1.0)]) == []
    assert list(SUITE.table([], "title")) == []


@pytest.mark.parametrize(
    "benchmark", [bench_prefill.Prefill(), bench_decode.Decode(), bench_append.Appending()]
)
def test_one_name_stands_for_all_that_the_bars_need(benchmark: script.Benchmark) -> None:
    suite = benchmark.suite
    chosen = script.parse(benchmark, ["--workloads", "bars"]).workloads
    assert chosen == list(suite.needed)
    assert set(chosen) <= set(script.parse(benchmark, []).workloads)
    # What is chosen so is all that every bar asks for, and nothing else.
    times = {"us": 1.0, "graph_us": 1.0, "plan_us": 1.0, "value": 1.0}
    rows = [ours(name, tflops=1.0, gbs=1.0, over_page16=1.0, **times) for name in chosen]
    assert len(suite.verdicts(rows)) == len(suite.bars)
    for name in chosen:
        fewer = [row for row in rows if row["workload"] != name]
        assert len(suite.verdicts(fewer)) < len(suite.bars), name
