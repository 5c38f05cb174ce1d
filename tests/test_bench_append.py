"""The append benchmark: what it measures, what it calls wrong, what a run writes and says."""

from __future__ import annotations

import itertools
import json
import types
from pathlib import Path
from typing import Any

import append_contenders
import append_problem
import bench_append
import bench_problems
import contender
import numpy as np
import problem as problems
import pytest
import timing
import workloads
from append_bars import SUITE
from processes import run_python

ROOT = Path(__file__).resolve().parent.parent
APPENDING = bench_append.Appending()
ALL = append_problem.append_workloads()


def run_script(*arguments: str) -> Any:
    return run_python(str(ROOT / "bench" / "bench_append.py"), *arguments)


def small_problem(
    rng: np.random.Generator, dtype: str = "float16", layers: int = 1
) -> append_problem.Append:
    """Tokens that begin, cross and end pages, one request without any, two heads of 8."""
    workload = workloads.Workload("w", (3, 0, 6, 1), (5, 4, 12, 9), 2, 2, True, 4, head_dim=8)
    device = timing.HostDevice()
    moved = 2 * 2 * 10 * 2 * 8 * 2  # K and V, read and written, of ten tokens
    device.l2_bytes = layers * moved // problems.COLD_L2S
    problem = append_problem.make_append(workload, dtype, device, rng)
    assert len(problem.layers) == layers
    assert problem.describe()["bytes"] == moved
    return problem


def append_all(problem: append_problem.Append) -> None:
    """Append every layer's tokens, one by one."""
    table = problem.table
    for layer in problem.layers:
        bench_problems.append_row_by_row(
            layer.key,
            layer.value,
            problem.batch_indices,
            problem.positions,
            (layer.k_cache, layer.v_cache),
            table.kv_indices,
            table.kv_indptr,
            table.last_page_len,
        )


# The problem


def test_the_table_holds_the_work_of_the_issue() -> None:
    shapes = [(w.name, w.batch, sum(w.qo_lens), w.num_kv_heads, w.head_dim) for w in ALL]
    assert shapes == [
        ("8x625", 8, 5000, 8, 128),
        ("1x5000", 1, 5000, 8, 128),
        ("64x1", 64, 64, 8, 128),
    ]
    for w in ALL:
        assert w.page_size == 16
        # Over a prefix, and not all of them end where a page does.
        prefixes = [kv - n for kv, n in zip(w.kv_lens, w.qo_lens, strict=True)]
        assert min(prefixes) > 0
        assert any(prefix % 16 for prefix in prefixes)


def test_tokens_belong_behind_the_prefixes(rng: np.random.Generator) -> None:
    problem = small_problem(rng)
    assert problem.batch_indices.tolist() == [0] * 3 + [2] * 6 + [3]
    assert problem.positions.tolist() == [2, 3, 4, 6, 7, 8, 9, 10, 11, 8]
    table = problem.table
    for slot, request, position in zip(
        problem.slots, problem.batch_indices, problem.positions, strict=True
    ):
        page = table.kv_indices[table.kv_indptr[request] + position // 4]
        assert slot == page * 4 + position % 4
    # Before, there are numbers where a token of a prefix is, and NaN everywhere else.
    before = problem.before.astype(np.float32).reshape(-1, 16)
    prefix = np.setdiff1d(table.all_slots(), problem.slots)
    assert np.isfinite(before[prefix]).all()
    assert np.isnan(np.delete(before, prefix, axis=0)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_byte_is_looked_at(rng: np.random.Generator, dtype: str) -> None:
    problem = small_problem(rng, dtype, layers=3)
    assert not problem.verify(1).ok
    append_all(problem)
    assert [problem.verify(layer).ok for layer in range(3)] == [True] * 3
    this = problem.layers[1]
    token = 4  # of request 2, at position 7
    problem.rows(this.v_cache)[problem.slots[token], 3] ^= 1
    verdict = problem.verify(1)
    assert not verdict.ok
    assert verdict.detail == "1 slots of V are wrong, the first: request 2, position 7"
    assert problem.verify(0).ok
    problem.reset()
    append_all(problem)
    (unused,) = problem.table.unused_slots()[:1]
    problem.rows(this.k_cache)[unused, 0] = 0
    verdict = problem.verify(1)
    assert verdict.detail == (
        f"1 slots of K are wrong, the first: page {unused // 4}, row {unused % 4}, where no token "
        "belongs"
    )


def test_keys_in_place_of_values_are_wrong(rng: np.random.Generator) -> None:
    problem = small_problem(rng)
    append_all(problem)
    (this,) = problem.layers
    this.v_cache.view(np.uint16)[...] = this.k_cache.view(np.uint16)
    assert problem.verify(0).detail.startswith("10 slots of V are wrong, the first: request ")


# Who takes part


def prepared(who: str, problem: append_problem.Append, patch: pytest.MonkeyPatch) -> Any:
    device = problem.device
    if who == "flashinfer":
        bench_problems.stand_in_for_flashinfer(patch, append_contenders)
        return append_contenders.FlashInferAppend(device, "float16").prepare(problem)
    if who in append_contenders.COPIES:
        return append_contenders.Copy(device, who).prepare(problem)
    return append_contenders.CupagedAppend(device, who == "cupaged-host").prepare(problem)


@pytest.mark.parametrize(
    "who", ["cupaged", "cupaged-host", "flashinfer", *append_contenders.COPIES]
)
def test_calls_take_turns_on_the_layers(
    rng: np.random.Generator, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = small_problem(rng, layers=3)
    runner = prepared(who, problem, monkeypatch)
    for layer in (1, 2, 0):
        runner.poison()
        assert not runner.verdict(rng).ok
        runner.call()
        assert runner.layer == layer
        assert runner.verdict(rng).ok
        if who not in append_contenders.COPIES:
            assert [problem.verify(n).ok for n in range(3)] == [n == layer for n in range(3)]


def test_a_module_that_is_not_built_ahead_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("JIT compilation is disabled\nby FLASHINFER_DISABLE_JIT")

    page = types.SimpleNamespace(get_page_module=missing)
    bench_problems.stand_in_for_flashinfer(monkeypatch, append_contenders, page=page)
    present, absent = contender.gather_peers(
        ["flashinfer"], timing.HostDevice(), "float16", append_contenders.APPEND_PEERS
    )
    assert present == []
    assert absent == {"flashinfer": "RuntimeError: JIT compilation is disabled"}


# The bars


def row(who: str, graph_us: float | None, **fields: Any) -> dict[str, Any]:
    times = {"us": 30.0, "graph_us": graph_us, "graph_speedup": None, "speedup": None}
    return {"workload": "8x625", "contender": who, "status": "ok", **times, **fields}


@pytest.mark.parametrize(
    ("ours", "copies", "measured", "verdict"),
    [
        # 9.5 µs of copying allow 11.18.
        (11.0, [("memcpy", 9.5)], 9.5 / 0.85 / 11.0, "met"),
        (11.5, [("memcpy", 9.5)], 9.5 / 0.85 / 11.5, "missed"),
        # The faster copy counts.
        (11.0, [("memcpy", 12.0), ("copy-kernel", 9.0)], 9.0 / 0.85 / 11.0, "missed"),
        (11.0, [("memcpy", 9.6), ("copy-kernel", 14.0)], 9.6 / 0.85 / 11.0, "met"),
        # A call of 8 µs is short enough, whatever the copy takes.
        (8.0, [("memcpy", 2.0)], 1.0, "met"),
        (8.1, [("memcpy", 2.0)], 8.0 / 8.1, "missed"),
        (8.1, [], None, "not measured"),
    ],
)
def test_a_bar_is_a_share_of_the_copy_or_a_short_call(
    ours: float, copies: list[tuple[str, float]], measured: float | None, verdict: str
) -> None:
    rows = [row("cupaged", ours)]
    rows += [row(name, us, graph_speedup=us / ours) for name, us in copies]
    rows.append(row("flashinfer", 12.5, graph_speedup=12.5 / ours))
    (one,) = SUITE.verdicts(rows)
    assert one["measured"] == (None if measured is None else pytest.approx(measured))
    assert one["verdict"] == verdict
    assert (one["us"], one["flashinfer_us"]) == (ours, 12.5)
    assert one["copy_us"] == min((us for _, us in copies), default=None)
    json.dumps(one, allow_nan=False)
    assert max(map(len, SUITE.table([one], "title"))) < 130


def test_without_a_graph_single_calls_are_compared() -> None:
    rows = [row("cupaged", None), row("memcpy", 9.0, speedup=0.9)]
    (one,) = SUITE.verdicts(rows)
    assert one["measured"] == pytest.approx(0.9 / 0.85)
    assert one["us"] == 30.0


def test_a_wrong_copy_is_no_measure() -> None:
    rows = [row("cupaged", 11.0), row("memcpy", 1.0, graph_speedup=0.1, status="wrong")]
    assert SUITE.verdicts(rows)[0]["verdict"] == "not measured"


# The run


def test_quick_runs_everything_on_the_reference_backend(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run_script("--quick", "--dtype", "bfloat16", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    head = result["header"]
    assert (head["backend"], head["dtype"], head["quick"]) == ("reference", "bfloat16", True)
    assert {"gpu", "driver", "git_commit", "git_dirty", "date", "product_sha256"} <= head.keys()
    assert result["bars"] == []
    timed = [row for row in result["rows"] if row["kind"] == "append"]
    who = ["cupaged", "cupaged-host", *append_contenders.COPIES]
    assert [(row["workload"], row["contender"]) for row in timed] == [
        (w.name, name) for w in ALL for name in who
    ]
    for row in timed:
        assert row["status"] == "ok", row["notes"]
        assert row["bytes"] == 2 * 2 * row["tokens"] * 8 * 128 * 2
        assert row["gbs"] == pytest.approx(row["bytes"] / (row["us"] * 1e-6) / 1e9)
        assert len(row["us_all"]) == 3
    host = [row for row in result["rows"] if row["kind"] == "host"]
    assert [(row["workload"], row["contender"]) for row in host] == [
        (name, one)
        for name in ("append-host", "append-host-step", "places-host")
        for one in ("cupaged", "cupaged-host")
    ]
    assert all(row["value"] > 0 for row in host)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) < 130
    assert all(any(line.startswith(w.name) for line in lines) for w in ALL)


def test_wrong_bytes_make_the_script_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = append_contenders.AppendRunner.call

    def wrong(self: Any) -> None:
        right(self)
        slot = self.problem.slots[7]
        self.problem.rows(self.problem.layers[self.layer].k_cache)[slot, 9] ^= 1

    monkeypatch.setattr(append_contenders.AppendRunner, "call", wrong)
    assert bench_append.main(["--quick", "--workloads", "64x1"]) == 1
    out = capsys.readouterr().out
    # One token each: the eighth is the eighth request's, behind its prefix.
    assert "cupaged, 64x1: wrong: 1 slots of K are wrong, the first: request 7, position 300" in out


def test_the_steps_have_indices_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables: list[bytes] = []
    right = append_contenders.AppendRunner.call

    def call(self: Any) -> None:
        right(self)
        tables.append(self.problem.table.kv_indices.tobytes())

    monkeypatch.setattr(append_contenders.AppendRunner, "call", call)
    assert bench_append.main(["--quick", "--workloads", "append-host-step"]) == 0
    assert len(tables) > 20
    assert len(set(tables)) == 2
    # No call has those of the one before, also where one contender follows another.
    assert all(a != b for a, b in itertools.pairwise(tables))
    assert "append-host-step" in capsys.readouterr().out


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert bench_append.main(["--quick", "--workloads", "64x1", "--plot", str(path)]) == 0
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.gpu
def test_a_run_on_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run_script("--peers", "", "--repeat", "3", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert result["header"]["ceilings"]["copy_gbs"] > 1
    timed = [row for row in result["rows"] if row["kind"] == "append"]
    assert len(timed) == len(ALL) * 4
    for row in timed:
        assert row["status"] == "ok", row["notes"]
        # Index arrays on the host can't be part of a graph.
        in_graph = row["contender"] != "cupaged-host"
        assert (row["graph_us"] is not None) == in_graph, row["notes"]
        assert row["layers"] > 1
    assert len(result["bars"]) == 3
    assert all(one["measured"] is not None for one in result["bars"])
