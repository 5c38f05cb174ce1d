"""A run of the benchmark of variants: its bars, what it writes and says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_variants
import measure
import numpy as np
import oracle
import pytest
import report
import timing
from processes import run_python
from variant_bars import SUITE
from variant_workloads import shrink_variant, variant_workloads

ROOT = Path(__file__).resolve().parent.parent
ALL = variant_workloads()
BY_NAME = {w.name: w for w in ALL}
TURNS = {
    "4x4096": 13,
    "1x16384-heads16-16": 2,
    "1x16384-heads32-8": 2,
    "64x8192-float16": 5,
    "64x8192-bfloat16": 3,
}


def run_script(*arguments: str) -> Any:
    return run_python(str(ROOT / "bench" / "bench_variants.py"), *arguments)


# The bars


def row(name: str, us: float, graph_us: float | None, **fields: Any) -> dict[str, Any]:
    return {
        "workload": name,
        "contender": "cupaged",
        "beside": BY_NAME[name].beside,
        "qo_lens": [100, 60],
        "flops": 10**9,
        "us": us,
        "us_all": [us, us, us],
        "graph_us": graph_us,
        "graph_us_all": [] if graph_us is None else [graph_us] * 3,
        "status": "ok",
        **fields,
    }


def test_a_variant_stands_beside_the_plain_one_of_its_turn() -> None:
    plain = row("4x4096", 90.0, 80.0, graph_us_all=[80.0, 82.0, 100.0])
    window = row("4x4096-window", 50.0, 41.0, graph_us_all=[40.0, 41.0, 51.0], flops=4 * 10**8)
    bench_variants.put_beside([plain, window])
    assert (plain["faster"], plain["rate_ratio"]) == (1.0, 1.0)
    assert plain["tokens_per_s"] == pytest.approx(160 / 80e-6)
    # Round by round: 2, 2 and 1.96 times as fast, for 0.4 of the work.
    assert window["faster"] == pytest.approx(2.0)
    assert window["rate_ratio"] == pytest.approx(0.8)
    assert window["tokens_per_s"] == pytest.approx(160 / 41e-6)


def test_without_a_graph_single_calls_are_compared() -> None:
    plain, window = row("4x4096", 90.0, 80.0), row("4x4096-window", 45.0, None)
    bench_variants.put_beside([plain, window])
    assert (window["faster"], window["tokens_per_s"]) == (2.0, pytest.approx(160 / 45e-6))


def test_where_the_plain_one_failed_there_is_no_ratio() -> None:
    plain = row("4x4096", 0.0, None) | {"us": None, "us_all": [], "status": "failed"}
    window = row("4x4096-window", 45.0, 40.0)
    bench_variants.put_beside([plain, window])
    assert plain["tokens_per_s"] is None
    assert (window["faster"], window["rate_ratio"]) == (None, None)
    (one,) = SUITE.verdicts([plain, window])
    assert (one["measured"], one["verdict"]) == (None, "failed")


@pytest.mark.parametrize(
    ("name", "ratio", "must"),
    [
        ("4x4096-window", "rate_ratio", 0.85),
        ("4x4096-softcap", "rate_ratio", 0.85),
        ("1x16384-heads16-16-window", "faster", 6.0),
        ("1x16384-heads32-8-window", "faster", 6.0),
        ("64x8192-float16-e4m3", "faster", 1.7),
        ("64x8192-float16-e5m2", "faster", 1.7),
    ],
)
def test_the_issue_s_bars(name: str, ratio: str, must: float) -> None:
    plain = row(BY_NAME[name].beside, 90.0, 80.0)
    for measured, verdict in ((must, "met"), (0.99 * must, "missed")):
        ratios = {"rate_ratio": 0.1, "faster": 0.1} | {ratio: measured}
        (one,) = SUITE.verdicts([plain, row(name, 50.0, None, **ratios)])
        assert (one["must"], one["measured"], one["verdict"]) == (must, measured, verdict)
        assert (one["us"], one["plain_us"]) == (50.0, 80.0)
        assert max(map(len, SUITE.table([one], "title"))) < 130
    assert len(SUITE.bars) == 6


# The run


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ("4x4096", [w.name for w in ALL[:13]]),
        ("4x4096-mask", ["4x4096", "4x4096-mask"]),
        (
            "64x8192-float16-e5m2,4x4096-hd96",
            ["4x4096", "4x4096-hd96", "64x8192-float16", "64x8192-float16-e5m2"],
        ),
    ],
)
def test_a_variant_brings_its_plain_one_along(chosen: str, found: list[str]) -> None:
    turns = bench_variants.turns(bench_variants.parse(["--workloads", chosen]).workloads)
    assert [w.name for workloads in turns.values() for w in workloads] == found
    for name, workloads in turns.items():
        assert {w.beside for w in workloads} == {name}
        assert workloads[0].name == name


def test_all_of_a_turn_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    together = []

    def noted(problems: Any, *more: Any) -> Any:
        together.append([problem.workload.name for problem in problems])
        return measure.measure(problems[:0], *more)

    monkeypatch.setattr(bench_variants, "measure", noted)
    assert bench_variants.main(["--quick"]) == 0
    assert {names[0]: len(names) for names in together} == TURNS
    assert [name for names in together for name in names] == [w.name for w in ALL]


def test_quick_runs_everything_on_the_reference_backend(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run_script("--quick", "--repeat", "1", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    head = result["header"]
    assert (head["backend"], head["dtype"], head["quick"]) == ("reference", "bfloat16", True)
    assert head["product_sha256"] == report.product_hash(ROOT)
    assert head["ceilings"] == {"matmul_tflops": None, "read_gbs": None}
    assert head["seconds"].keys() == {"start", *TURNS}
    assert {"gpu", "driver", "versions", "git_commit", "git_dirty", "date"} <= head.keys()
    assert result["bars"] == []
    assert [one["workload"] for one in result["rows"]] == list(BY_NAME)
    for one in result["rows"]:
        assert one["status"] == "ok", one["notes"]
        assert 0 < one["max_rel_err"] <= 4 * oracle.UNIT_ROUNDOFF[one["dtype"]]
        assert one["tflops"] == pytest.approx(one["flops"] / (one["us"] * 1e-6) / 1e12)
        assert one["tokens_per_s"] == pytest.approx(sum(one["qo_lens"]) / (one["us"] * 1e-6))
        assert one["rate_ratio"] > 0
        assert (one["faster"] == 1.0) == (one["workload"] == one["beside"])
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) < 130
    assert [line.split()[0] for line in lines[-len(ALL) :]] == list(BY_NAME)


def test_with_graphs_the_ratios_are_of_their_times(rng: np.random.Generator) -> None:
    class Recording(timing.HostDevice):
        def capture(self, call: timing.Call, calls: int) -> timing.Call:
            return call

    device = Recording()
    (turn,) = bench_variants.turns(["64x8192-float16-e4m3"]).values()
    shrunk = [replace(shrink_variant(w), qo_lens=(1,) * 2, kv_lens=(20, 9)) for w in turn]
    who = bench_variants.CupagedVariants(device)
    rows = bench_variants.measured(shrunk, who, device, 3, rng, {"read_gbs": 1000.0})
    assert [one["status"] for one in rows] == ["ok", "ok"]
    ours, theirs = rows[1]["graph_us_all"], rows[0]["graph_us_all"]
    assert len(ours) == len(theirs) == 3
    assert rows[1]["faster"] == timing.paired_ratio(theirs, ours)
    for one in rows:
        assert one["gbs"] == pytest.approx(one["bytes"] / one["graph_us"] / 1e3)
        assert one["share_of_read"] == pytest.approx(one["gbs"] / 1000.0)


def test_a_wrong_result_makes_the_script_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench_variants.VariantRunner.call

    def wrong(self: Any) -> None:
        right(self)
        if self.problem.workload.kv_dtype:
            self.out[5, 1] = self.out[5, 0]

    monkeypatch.setattr(bench_variants.VariantRunner, "call", wrong)
    assert bench_variants.main(["--quick", "--workloads", "64x8192-bfloat16-e5m2"]) == 1
    out = capsys.readouterr().out
    assert "64x8192-bfloat16-e5m2: wrong: request 5, row 0, head 1: off by " in out
    assert [line.split()[-1] for line in out.splitlines()[-2:]] == ["ok", "wrong"]


def test_what_no_kernel_serves_is_a_row_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench_variants.plan_call

    def refused(wrapper: Any, problem: Any) -> timing.Call:
        if problem.workload.custom_mask:
            raise NotImplementedError("custom_mask is not served")
        return right(wrapper, problem)

    monkeypatch.setattr(bench_variants, "plan_call", refused)
    assert bench_variants.main(["--quick", "--workloads", "4x4096-mask"]) == 1
    out = capsys.readouterr().out
    assert "4x4096-mask: NotImplementedError: custom_mask is not served" in out
    assert [line.split()[-1] for line in out.splitlines()[-2:]] == ["ok", "failed"]


def test_the_table_fits_the_line() -> None:
    long = {
        **row("1x16384-heads16-16-window", 12345.6, 12345.6),
        "sweep": "",
        "kind": "variant",
        "kv_dtype": "float8_e4m3fn",
        "tflops": 1234.5,
        "gbs": 12345.0,
        "share_of_matmul": 1.0,
        "share_of_read": 1.0,
        "tokens_per_s": 12345678.0,
        "rate_ratio": 123.456,
        "faster": 123.456,
        "max_rel_err": 1e-4,
        "fits_l2": True,
        "status": "failed",
        "notes": ["x" * 200],
    }
    head = {
        "gpu": "NVIDIA H200",
        "backend": "cuda",
        "dtype": "bfloat16",
        "date": "2026-11-22T00:00:00+00:00",
        "git_commit": "0" * 40,
        "git_dirty": True,
        "product_sha256": "0" * 64,
        "contenders": {"cupaged": "0.1.0"},
        "missing_peers": {},
        "ceilings": {"matmul_tflops": 700.0, "read_gbs": 4390.0},
    }
    lines = list(report.table(head, [long], bench_variants.LOOK))
    assert max(map(len, lines)) < 130
    # No cell has run into its neighbour: headings end where cells do.
    assert lines[-1].startswith("1x16384-heads16-16-window* float8_e4m3fn ")
    assert lines[-2].index("status") == lines[-1].index("failed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "4x4097"], "'4x4097' is unknown, expected some of 4x4096, 4x4096-window,"),
        (["--repeat", "0"], "'0', expected a positive whole number"),
        (["--dtype", "float16"], "unrecognized arguments: --dtype float16"),
    ],
)
def test_a_wrong_option_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_variants.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> None:
        raise timing.NoDeviceError("no CUDA device")

    monkeypatch.setattr(bench_variants, "CudaDevice", none)
    assert bench_variants.main([]) == 2
    assert capsys.readouterr().err == "no CUDA device; --quick needs no GPU\n"


@pytest.mark.gpu
def test_a_run_on_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run_script("--repeat", "2", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert all(rate > 1 for rate in result["header"]["ceilings"].values())
    assert [one["workload"] for one in result["rows"]] == list(BY_NAME)
    for one in result["rows"]:
        assert one["status"] == "ok", one["notes"]
        assert one["graph_us"] > 0, one["notes"]
        assert 0 < one["share_of_read"] < 1.1
    assert [one["work"] for one in result["bars"]] == [bar.work for bar in SUITE.bars]
    assert all(one["measured"] > 0 for one in result["bars"])
