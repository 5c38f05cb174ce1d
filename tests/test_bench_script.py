"""The benchmark as a script: what it runs, writes and returns."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import bench_prefill
import contender
import host_costs
import host_rows
import looks
import measure
import numpy as np
import plotting
import problem as problems
import pytest
import report
import script
import timing
import workloads
from bench_problems import ALL, TABLE, count_pairs
from processes import run_python

ROOT = Path(__file__).resolve().parent.parent
PREFILL = bench_prefill.Prefill()


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / "bench" / "bench_prefill.py"), *arguments)


def test_quick_runs_everything_on_the_reference_backend(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run_script("--quick", "--dtype", "bfloat16", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    head = result["header"]
    assert head["backend"] == "reference"
    assert head["dtype"] == "bfloat16"
    assert head["quick"] is True
    assert head["contenders"].keys() == {"cupaged"}
    assert head["product_sha256"] == report.product_hash(ROOT)
    assert head["command"].endswith(str(path))
    assert {"gpu", "driver", "git_commit", "git_dirty", "date", "ceilings"} <= head.keys()
    assert {"start", "4x4096", "page-sweep", "host"} <= head["seconds"].keys()
    # The reference backend's figures are no matter for the bars.
    assert result["bars"] == []

    attention = [row for row in result["rows"] if row["kind"] == "attention"]
    assert [row["workload"] for row in attention] == [w.name for w in ALL]
    usual = next(row for row in attention if row["workload"] == "4x4096-page16")
    for row in attention:
        assert row["status"] == "ok", row["notes"]
        assert 0 < row["max_rel_err"] <= 4 * 2.0**-8
        pairs = sum(
            count_pairs(qo, kv, row["causal"])
            for qo, kv in zip(row["qo_lens"], row["kv_lens"], strict=True)
        )
        flops = 4 * row["head_dim"] * row["num_qo_heads"] * pairs
        assert row["flops"] == flops
        assert len(row["us_all"]) == (2 if row["sweep"] == workloads.LENGTH_SWEEP else 3)
        if row["sweep"] == workloads.PAGE_SWEEP:
            ratios = [a / b for a, b in zip(usual["us_all"], row["us_all"], strict=True)]
            assert row["over_page16"] == np.median(ratios)
        else:
            assert row["over_page16"] is None
        assert row["us"] == np.median(row["us_all"]) > 0
        assert row["tflops"] == pytest.approx(flops / (row["us"] * 1e-6) / 1e12)
        assert row["gbs"] == pytest.approx(row["bytes"] / (row["us"] * 1e-6) / 1e9)
        assert row["plan_us"] > 0

    host = {row["workload"]: row for row in result["rows"] if row["kind"] == "host"}
    plans = {name for name, _, _ in host_costs.PLANS}
    assert host.keys() == plans | {"run-host", "import", "import-wrapper"}
    assert all(row["value"] > 0 for row in host.values())
    assert host["import"]["note"] == "free of cupy, torch, jax"

    lines = done.stdout.splitlines()
    assert max(map(len, lines)) < 130
    for name in (*(w.name for w in TABLE), *host):
        assert any(line.startswith(name) for line in lines), name
    (sizes,) = (line for line in lines if line.startswith("TFLOP/s by page size"))
    assert sizes.split()[4:] == [str(size) for size in workloads.SWEEP_PAGE_SIZES]
    (ratios_line,) = (line for line in lines if line.startswith("  over its page 16"))
    assert ratios_line.split()[4:][sizes.split()[4:].index("16")] == "1.000"
    assert any(line.startswith("TFLOP/s by length") for line in lines)
    assert lines[-1].startswith("import")


def test_a_wrong_result_makes_the_script_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = contender.CupagedRunner.call

    def wrong(self: Any) -> None:
        right(self)
        self.out[0, 1] = self.out[0, 0]

    monkeypatch.setattr(contender.CupagedRunner, "call", wrong)
    path = tmp_path / "result.json"
    assert bench_prefill.main(["--quick", "--workloads", "issue192", "--json", str(path)]) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert row["status"] == "wrong"
    assert row["notes"][0].startswith("wrong: request 0, row 0, head 1: off by ")
    out = capsys.readouterr().out
    assert "cupaged!" in out
    assert "cupaged, issue192: wrong: request 0, row 0, head 1: off by " in out


def test_an_error_is_a_result_and_the_other_workloads_still_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = contender.CupagedRunner.call

    def failing(self: Any) -> None:
        if self.problem.workload.name == "4x4096":
            raise RuntimeError("no such luck\nat all")
        right(self)

    monkeypatch.setattr(contender.CupagedRunner, "call", failing)
    path = tmp_path / "result.json"
    assert (
        bench_prefill.main(["--quick", "--workloads", "4x4096,issue192", "--json", str(path)]) == 1
    )
    failed, fine = json.loads(path.read_text())["rows"]
    assert (failed["status"], failed["us"], failed["notes"]) == (
        "failed",
        None,
        ["RuntimeError: no such luck"],
    )
    assert fine["status"] == "ok"
    assert fine["us"] > 0


@pytest.mark.parametrize(
    ("contender_name", "status", "expected"),
    [
        ("cupaged", "ok", 0),
        ("cupaged", "wrong", 1),
        ("cupaged", "failed", 1),
        ("cupaged-host", "failed", 1),
        ("fa3", "wrong", 1),
        ("fa3", "failed", 0),
    ],
)
def test_the_exit_status_is_about_wrong_results_and_cupaged(
    contender_name: str, status: str, expected: int
) -> None:
    rows = [
        {"contender": "cupaged", "status": "ok"},
        {"contender": contender_name, "status": status},
    ]
    assert script.exit_status(rows) == expected


def test_a_host_cost_that_fails_is_a_row_and_the_others_still_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(repeat: int) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(host_costs, "import_rows", failing)
    assert bench_prefill.main(["--quick", "--workloads", "host"]) == 1
    out = capsys.readouterr().out
    assert "run-host" in out
    assert "RuntimeError: no such luck" in out


def test_without_a_gpu_it_says_what_works_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Absent(timing.HostDevice):
        def __init__(self) -> None:
            raise timing.NoDeviceError("no CUDA device: none")

    monkeypatch.setattr(script, "CudaDevice", Absent)
    assert bench_prefill.main([]) == 2
    assert capsys.readouterr().err == "no CUDA device: none; --quick needs no GPU\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "4x4097"], "'4x4097' is unknown, expected some of 1x16384-full, "),
        (["--peers", "fa9"], "'fa9' is unknown, expected some of sdpa-flash, "),
        (["--repeat", "0"], "'0', expected a positive whole number"),
        (["--quick", "--peers", "fa3"], "--peers need a GPU, --quick uses none"),
    ],
)
def test_a_wrong_option_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.parse(PREFILL, arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_of_any_content_fit_the_line() -> None:
    problem = problems.make_problem(
        TABLE[-1], "float16", timing.HostDevice(), np.random.default_rng()
    )
    row = measure.new_row(problem, "flashinfer-fa3") | {
        "workload": "prefill-among-decodes",
        "us": 123456.7,
        "graph_us": 123456.7,
        "tflops": 1234.5,
        "gbs": 123456.0,
        "share_of_matmul": 1.0,
        "share_of_copy": 1.0,
        "speedup": 123.45,
        "graph_speedup": 123.45,
        "plan_us": 12345.0,
        "max_rel_err": math.inf,
        "fits_l2": True,
        "status": "wrong",
        "notes": ["x" * 200],
    }
    host = host_rows.host_row("plan-1024-append", "flashinfer-fa3", 1234567.0, "us", "y" * 200)
    head = {
        "gpu": "NVIDIA H200",
        "backend": "cuda",
        "dtype": "bfloat16",
        "date": "2026-11-22T00:00:00+00:00",
        "git_commit": "0" * 40,
        "git_dirty": True,
        "product_sha256": "0" * 64,
        "contenders": {"sdpa-cudnn": "torch 2.11.0+cu130, cuDNN 91900"},
        "missing_peers": {"fa3": "z" * 200},
        "ceilings": {"matmul_tflops": 790.0, "copy_gbs": 4300.0},
    }
    swept = [
        row | {"sweep": sweep, "page_size": n, "kv_lens": [n], "over_page16": 0.123}
        for sweep in looks.PREFILL.sweeps
        for n in range(1, 11)
    ]
    lines = list(report.table(head, [row, *swept, host], looks.PREFILL))
    assert max(map(len, lines)) < 130
    assert "\n".join(lines).count(" 1234.5!") == 20
    assert "prefill-among-decodes*" in "\n".join(lines)
    assert "flashinfer-fa3!" in "\n".join(lines)


@pytest.mark.parametrize(
    "chosen",
    ["issue192,page-sweep", "length-512,length-1024", "4x4096-page1", "issue192", "run-host"],
)
def test_the_plot_shows_what_there_is(tmp_path: Path, chosen: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert bench_prefill.main(["--quick", "--workloads", chosen, "--plot", str(path)]) == 0
    if chosen == "run-host":
        assert not path.exists()
    else:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_plot_over_the_length_has_every_contender_and_the_ceiling() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    table = workloads.length_sweep(16)
    rates = {"cupaged": 600.0, "sdpa-cudnn": 500.0, "another": 400.0}
    rows = [
        {
            "contender": name,
            "sweep": workloads.LENGTH_SWEEP,
            "kv_lens": list(w.kv_lens),
            "page_size": 16,
            "num_qo_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "causal": True,
            "tflops": rate + i,
        }
        # Backwards: a line goes from the shortest to the longest whatever the order of the rows.
        for i, w in reversed(list(enumerate(table)))
        for name, rate in rates.items()
    ]
    panel = figures.Figure().subplots()
    head = {"ceilings": {"matmul_tflops": 777.0}}
    plotting.draw_lengths(panel, head, rows, looks.PREFILL)
    drawn = {line.get_label(): line for line in panel.get_lines()}
    lengths = list(workloads.SWEEP_LENGTHS)
    for label, rate in (
        ("cupaged, pages of 16 permuted at random", 600.0),
        ("sdpa-cudnn, contiguous", 500.0),
        ("another, contiguous", 400.0),
    ):
        assert list(drawn[label].get_xdata()) == lengths
        assert list(drawn[label].get_ydata()) == [rate + i for i in range(len(table))]
    assert [777.0, 777.0] in [list(line.get_ydata()) for line in drawn.values()]
    assert panel.get_xticklabels()[0].get_text() == "512\n32 ×"


def test_a_group_and_rows_of_it_may_be_chosen() -> None:
    chosen = script.parse(PREFILL, ["--workloads", "4x4096-page24,page-sweep,import"])
    turns = script.turns(PREFILL, chosen)
    assert [(name, [w.page_size for w in ws]) for name, ws in turns] == [
        ("page-sweep", list(workloads.SWEEP_PAGE_SIZES))
    ]
    assert "import" in chosen.workloads
    assert "run-host" not in chosen.workloads


@pytest.mark.gpu
def test_a_run_on_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run_script(
        "--workloads",
        "16x1024,issue192,4x4096-page1,4x4096-page16,host",
        "--peers",
        "",
        "--repeat",
        "3",
        "--json",
        str(path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert result["header"]["gpu"]
    assert result["header"]["ceilings"]["matmul_tflops"] > 1
    assert result["header"]["ceilings"]["copy_gbs"] > 1
    attention = [row for row in result["rows"] if row["kind"] == "attention"]
    *fixed, page1, page16 = attention
    assert [row["workload"] for row in fixed] == ["16x1024", "issue192"]
    assert all(row["graph_us"] > 0 for row in fixed)
    assert [row["workload"] for row in (page1, page16)] == ["4x4096-page1", "4x4096-page16"]
    assert page1["over_page16"] > 0
    judged = {one["work"]: one["measured"] for one in result["bars"]}
    assert judged["page size 1"] == page1["over_page16"]
    assert judged["ten short requests, in a graph"] == fixed[1]["graph_us"]
    assert "bars for an H200" in done.stdout
    for row in attention:
        assert row["us"] > 0
        ceiling = result["header"]["ceilings"]["matmul_tflops"]
        assert row["share_of_matmul"] == pytest.approx(row["tflops"] / ceiling)
    host = {row["workload"] for row in result["rows"] if row["kind"] == "host"}
    assert {"run-host", "import", "import-wrapper", "kernel-compile", "kernel-load"} < host
