"""A run of the decode benchmark: its bars, what it writes and says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_decode
import bench_problems
import contender
import decode_contender
import decode_workloads
import flashinfer_peers
import looks
import measure
import numpy as np
import problem as problems
import pytest
import report
import script
import timing
from decode_bars import SUITE
from processes import run_python

ROOT = Path(__file__).resolve().parent.parent
DECODE = bench_decode.Decode()
ALL = DECODE.workloads(None)


def run_script(*arguments: str) -> Any:
    return run_python(str(ROOT / "bench" / "bench_decode.py"), *arguments)


# The bars


def row(name: str, who: str, **fields: Any) -> dict[str, Any]:
    times = {"graph_us": 100.0, "us": 120.0, "graph_speedup": None, "speedup": None, "gbs": 4000.0}
    return {"workload": name, "contender": who, "status": "ok", **times, **fields}


@pytest.mark.parametrize(
    ("peers", "measured", "verdict", "beside"),
    [
        # FlashInfer's faster one counts.
        (
            [
                row("64x8192", "flashinfer-tc", graph_speedup=1.01, gbs=3960.0),
                row("64x8192", "flashinfer-cc", graph_speedup=1.4, gbs=2900.0),
            ],
            1.01,
            "aim met",
            3960.0,
        ),
        (
            [
                row("64x8192", "flashinfer-tc", graph_speedup=1.3, gbs=3100.0),
                row("64x8192", "flashinfer-cc", graph_speedup=0.97, gbs=4100.0),
            ],
            0.97,
            "missed",
            4100.0,
        ),
        ([row("64x8192", "flashinfer-tc", graph_speedup=0.98)], 0.98, "met", 4000.0),
        # One that was wrong does not.
        (
            [
                row("64x8192", "flashinfer-tc", graph_speedup=0.5, status="wrong"),
                row("64x8192", "flashinfer-cc", graph_speedup=1.2, gbs=3300.0),
            ],
            1.2,
            "aim met",
            3300.0,
        ),
        # Where there is no graph, single calls are compared.
        ([row("64x8192", "flashinfer-cc", graph_us=None, speedup=0.99)], 0.99, "met", 4000.0),
        ([row("64x8192", "another", graph_speedup=1.0)], None, "no FlashInfer", None),
        ([], None, "no FlashInfer", None),
    ],
)
def test_a_bar_says_how_it_stands_beside_flashinfer(
    peers: list[Any], measured: float | None, verdict: str, beside: float | None
) -> None:
    (one,) = SUITE.verdicts([row("64x8192", "cupaged"), *peers])
    assert (one["measured"], one["verdict"]) == (measured, verdict)
    assert (one["gbs"], one["flashinfer_gbs"]) == (4000.0, beside)
    json.dumps(one, allow_nan=False)
    lines = list(SUITE.table([one], "title"))
    assert len(lines) == 3
    assert max(map(len, lines)) < 130
    assert lines[-1].startswith("64 × 8,192 ")
    assert lines[-1].endswith(verdict)


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("plan-64", 80.0, "met"),
        ("plan-64", 80.1, "missed"),
        ("plan-1024", 250.0, "met"),
        ("plan-1024", 251.0, "missed"),
    ],
)
def test_a_bar_of_plan_shows_flashinfer_s_fastest(name: str, value: float, verdict: str) -> None:
    def host(who: str, value: float) -> dict[str, Any]:
        return {"workload": name, "contender": who, "status": "ok", "value": value}

    rows = [host("cupaged", value), host("flashinfer-tc", 99.0), host("flashinfer-cc", 97.0)]
    (one,) = SUITE.verdicts(rows)
    assert (one["measured"], one["verdict"], one["flashinfer_us"]) == (value, verdict, 97.0)
    assert " 97.0 " in list(SUITE.table([one], "title"))[-1]


def test_the_issue_s_bars() -> None:
    assert [(bar.must, bar.aim) for bar in SUITE.bars] == [
        (0.98, 1.0),
        (1.0, 1.06),
        (1.0, 1.05),
        (0.98, 1.0),
        (1.0, 1.1),
        (1.2, 1.3),
        (0.98, 1.0),
        (80.0, None),
        (250.0, None),
    ]


# The run


def test_rates_are_of_the_time_in_a_graph_where_there_is_one() -> None:
    limits = {"copy_gbs": 4000.0, "read_gbs": 5000.0}
    both = {"us": 200.0, "graph_us": 100.0, "flops": 10**6, "bytes": 4 * 10**8}
    in_graph = report.rates(both, limits, "graph_us")
    assert in_graph["gbs"] == pytest.approx(4000.0)
    assert (in_graph["share_of_copy"], in_graph["share_of_read"]) == pytest.approx((1.0, 0.8))
    assert in_graph["tflops"] == pytest.approx(0.01)
    assert in_graph["share_of_matmul"] is None
    assert report.rates(both, limits, "us")["gbs"] == pytest.approx(2000.0)
    assert report.rates(both | {"graph_us": None}, limits, "graph_us")["gbs"] == pytest.approx(2000)


def test_quick_runs_everything_on_the_reference_backend(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run_script("--quick", "--repeat", "1", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    head = result["header"]
    assert (head["backend"], head["dtype"], head["quick"]) == ("reference", "float16", True)
    assert head["product_sha256"] == report.product_hash(ROOT)
    assert head["ceilings"] == {"copy_gbs": None, "read_gbs": None}
    assert {"gpu", "driver", "git_commit", "git_dirty", "date", "command"} <= head.keys()
    assert result["bars"] == []
    timed = [row for row in result["rows"] if row["kind"] == "attention"]
    assert [row["workload"] for row in timed] == [w.name for w in ALL]
    for w, row in zip(ALL, timed, strict=True):
        assert row["status"] == "ok", row["notes"]
        dtype = w.dtype or "float16"
        assert row["dtype"] == dtype
        assert 0 <= row["max_rel_err"] <= 4 * {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        assert row["plan_us"] is None
        small = decode_workloads.shrink_decode(w)
        # K and V read once, Q read and the output written once, two bytes each.
        elements = 2 * sum(small.kv_lens) * small.num_kv_heads
        elements += 2 * sum(small.qo_lens) * small.num_qo_heads
        assert row["bytes"] == 2 * elements * small.head_dim
        assert row["gbs"] == pytest.approx(row["bytes"] / (row["us"] * 1e-6) / 1e9)
    host = {row["workload"]: row for row in result["rows"] if row["kind"] == "host"}
    assert host.keys() == {"plan-64", "plan-1024", "run-host"}
    assert all(row["value"] > 0 for row in host.values())
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) < 130
    (lengths,) = (line for line in lines if line.startswith("GB/s by length"))
    assert lengths.split()[3:] == [str(1 << i) for i in range(8)]
    (pages,) = (line for line in lines if line.startswith("GB/s by page size"))
    assert pages.split()[4:] == ["1", "16", "64", "128"]


def test_a_wrong_result_makes_the_script_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = contender.CupagedRunner.call

    def wrong(self: Any) -> None:
        right(self)
        self.out[5, 1] = self.out[5, 0]

    monkeypatch.setattr(contender.CupagedRunner, "call", wrong)
    assert bench_decode.main(["--quick", "--workloads", "64x8192-hd64"]) == 1
    assert "64x8192-hd64: wrong: request 5, row 0, head 1: off by " in capsys.readouterr().out


def test_sweeps_are_recorded_in_graphs_too(rng: np.random.Generator) -> None:
    class Recording(timing.HostDevice):
        def capture(self, call: timing.Call, calls: int) -> timing.Call:
            return call

    device = Recording()
    pages = [decode_workloads.shrink_decode(w) for w in decode_workloads.page_sweep()[:2]]
    swept = [problems.make_problem(page, "float16", device, rng) for page in pages]
    us = [decode_contender.CupagedDecode(device)]
    rows = measure.measure(swept, us, device, 2, rng, DECODE.method)
    for row in rows:
        assert len(row["graph_us_all"]) == 2
    ratios = np.array(rows[1]["graph_us_all"]) / np.array(rows[0]["graph_us_all"])
    # Of the page sizes, those times are compared: the first is page size 1, and 16 is the usual.
    assert rows[0]["over_page16"] == pytest.approx(np.median(ratios))


def test_the_plot_has_the_card_s_read_and_copy() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    import plotting

    rows = [
        {
            "contender": name,
            "workload": w.name,
            "sweep": w.sweep,
            "kv_lens": list(w.kv_lens),
            "page_size": 16,
            "num_qo_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "gbs": rate,
        }
        for w in decode_workloads.length_sweep()
        for name, rate in (("cupaged", 4300.0), ("flashinfer-tc", 4100.0))
    ]
    head = {"ceilings": {"read_gbs": 4390.0, "copy_gbs": 4300.5}}
    for draw in (plotting.draw_lengths, plotting.draw_workloads):
        panel = figures.Figure().subplots()
        draw(panel, head, rows, looks.DECODE)
        levels = [list(line.get_ydata()) for line in panel.get_lines()]
        assert [4390.0] * 2 in levels
        assert [4300.5] * 2 in levels
        (said,) = (text.get_text() for text in panel.texts)
        assert said == "the card's plain read, 4390 GB/s; its copy, 4300 GB/s"
    panel = figures.Figure().subplots()
    plotting.draw_lengths(panel, head, rows, looks.DECODE)
    assert "64 requests, 32/8 heads" in panel.get_title(loc="left")
    drawn = {line.get_label(): line for line in panel.get_lines()}
    assert list(drawn["cupaged"].get_xdata()) == [256 << i for i in range(8)]


def test_a_run_beside_flashinfer_ends_with_the_verdicts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The whole way of a run on a GPU, with what stands in for one and small sizes."""

    class Standing(timing.HostDevice):
        """A CUDA device, as far as the script asks."""

        def capture(self, call: timing.Call, calls: int) -> timing.Call:
            return lambda: [call() for _ in range(calls)]

        def describe(self) -> dict[str, Any]:
            return {"gpu": "stand-in"}

    bench_problems.stand_in_for_flashinfer(monkeypatch, flashinfer_peers)
    small = [decode_workloads.shrink_decode(w) for w in ALL]
    monkeypatch.setattr(script, "CudaDevice", Standing)
    monkeypatch.setattr(bench_decode.Decode, "workloads", lambda self, options: small)
    monkeypatch.setattr(timing, "MAX_GRAPH_CALLS", 2)
    path = tmp_path / "result.json"
    arguments = ["--workloads", "bars", "--repeat", "2", "--json", str(path)]
    assert bench_decode.main(arguments) == 0
    result = json.loads(path.read_text())
    assert result["header"]["missing_peers"] == {}
    assert list(result["header"]["contenders"]) == ["cupaged", *flashinfer_peers.DECODE_PEERS]
    who: dict[str, list[str]] = {}
    for row in result["rows"]:
        assert row["status"] == "ok", row
        if row["kind"] == "attention":
            assert (row["graph_us"] is not None) == (row["contender"] == "cupaged")
        who.setdefault(row["workload"], []).append(row["contender"])
    one = ["cupaged", "flashinfer-tc", "flashinfer-cc"]
    several = ["cupaged", "flashinfer-tc", "flashinfer-fa2", "flashinfer-fa3"]
    assert who == dict.fromkeys(SUITE.needed, one) | {"64x8192-4queries": several}
    assert [bar["work"] for bar in result["bars"]] == [bar.work for bar in SUITE.bars]
    for bar in result["bars"]:
        assert bar["measured"] > 0
        of_plans = bar["quantity"] == "plan µs"
        assert bar["flashinfer_us" if of_plans else "flashinfer_gbs"] > 0
        assert bar["verdict"] in ("met", "aim met", "missed")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-11].startswith("bars for an H200, float16, × over the fastest of FlashInfer's ")
    assert [line[:34].strip() for line in lines[-9:]] == [bar.work for bar in SUITE.bars]


@pytest.mark.gpu
def test_a_run_on_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    chosen = "256x1024,64x8192-heads8-1,64x8192-4queries,64x8192-HND,length-256,host"
    done = run_script("--workloads", chosen, "--peers", "", "--repeat", "3", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert all(rate > 1 for rate in result["header"]["ceilings"].values())
    timed = [row for row in result["rows"] if row["kind"] == "attention"]
    assert [row["workload"] for row in timed] == [
        "256x1024",
        "64x8192-heads8-1",
        "64x8192-4queries",
        "64x8192-HND",
        "length-256",
    ]
    for row in timed:
        assert row["status"] == "ok", row["notes"]
        assert row["graph_us"] > 0, row["notes"]
        ceiling = result["header"]["ceilings"]["read_gbs"]
        assert row["share_of_read"] == pytest.approx(row["gbs"] / ceiling)
    assert timed[-1]["layers"] > 1
    assert [one["verdict"] for one in result["bars"][:3]] == ["no FlashInfer"] * 3
    assert "bars for an H200" in done.stdout


def test_the_tables_fit_the_line() -> None:
    long = {
        "workload": "16x4096-heads32-32",
        "contender": "flashinfer-fa3",
        "sweep": "",
        "kind": "attention",
        "graph_us": 123456.7,
        "us": 123456.7,
        "gbs": 12345.0,
        "share_of_read": 1.0,
        "graph_speedup": 123.456,
        "speedup": 123.456,
        "max_rel_err": 1e-4,
        "fits_l2": True,
        "status": "wrong",
        "notes": ["x" * 200],
    }
    head = {
        "gpu": "NVIDIA H200",
        "backend": "cuda",
        "dtype": "float16",
        "date": "2026-11-22T00:00:00+00:00",
        "git_commit": "0" * 40,
        "git_dirty": True,
        "product_sha256": "0" * 64,
        "contenders": {},
        "missing_peers": {"flashinfer-tc": "z" * 200},
        "ceilings": {"copy_gbs": 4300.0, "read_gbs": 4390.0},
    }
    lines = list(report.table(head, [long], looks.DECODE))
    assert max(map(len, lines)) < 130
    assert "ceilings: copy 4300 GB/s, read 4390 GB/s" in lines
    assert any(line.startswith("16x4096-heads32-32*") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "64x8193"], "'64x8193' is unknown, expected some of 64x8192, 1x131072, "),
        (["--peers", "fa3"], "'fa3' is unknown, expected some of flashinfer-tc, flashinfer-cc, "),
        (["--page-size", "16"], "unrecognized arguments: --page-size 16"),
    ],
)
def test_a_wrong_option_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.parse(DECODE, arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
