"""The benchmark script: what it counts, what it calls wrong, and what it writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import bench_prefill  # noqa: E402
import check  # noqa: E402
import contender  # noqa: E402
import host_costs  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
import workloads  # noqa: E402

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TABLE = workloads.prefill_workloads(16)
NAMES = [workload.name for workload in TABLE]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def count_pairs(qo_len: int, kv_len: int, causal: bool) -> int:
    """Visible pairs of one request, counted one by one."""
    return sum(not causal or j <= kv_len - qo_len + i for i in range(qo_len) for j in range(kv_len))


def formula(problem: contender.Problem) -> np.ndarray:
    """Attention as semantics.md words it, row by row and head by head, in float64."""
    w, table = problem.workload, problem.table
    out = np.zeros(problem.q.shape)
    group = w.num_qo_heads // w.num_kv_heads
    for r, (qo_len, kv_len) in enumerate(zip(w.qo_lens, w.kv_lens, strict=True)):
        for i in range(qo_len):
            row = table.qo_indptr[r] + i
            for h in range(w.num_qo_heads):
                keys, values = [], []
                for j in range(kv_len):
                    if not w.causal or j <= kv_len - qo_len + i:
                        page = table.kv_indices[table.kv_indptr[r] + j // w.page_size]
                        place = page, j % w.page_size, h // group
                        keys.append(problem.k[place].astype(np.float64))
                        values.append(problem.v[place].astype(np.float64))
                if keys:
                    logits = np.array(keys) @ problem.q[row, h].astype(np.float64)
                    weights = np.exp((logits - logits.max()) / math.sqrt(w.head_dim))
                    out[row, h] = weights @ np.array(values) / weights.sum()
    return out


def ragged_problem(rng: np.random.Generator, dtype: str = "float16") -> contender.Problem:
    """Small, with a request without queries, one without keys, and rows that see none."""
    workload = workloads.Workload("small", (5, 0, 3, 9, 1), (11, 6, 0, 4, 13), 4, 2, True, 3, 16)
    return contender.make_problem(workload, dtype, timing.HostDevice(), rng)


def bits(out: np.ndarray, dtype: str) -> np.ndarray:
    return out.astype(DTYPES[dtype]).view(np.uint16)


# --- what is counted ---


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


# --- the arrays ---


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


# --- what is called wrong ---


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


# --- times ---


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


# --- peers ---


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


# --- the script ---


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "bench_prefill.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


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

    attention = [row for row in result["rows"] if row["kind"] == "attention"]
    expected = [w.name for w in (*TABLE, *workloads.page_sweep())]
    assert [row["workload"] for row in attention] == expected
    for row in attention:
        assert row["status"] == "ok", row["notes"]
        assert 0 < row["max_rel_err"] <= 4 * 2.0**-8
        pairs = sum(
            count_pairs(qo, kv, row["causal"])
            for qo, kv in zip(row["qo_lens"], row["kv_lens"], strict=True)
        )
        flops = 4 * row["head_dim"] * row["num_qo_heads"] * pairs
        assert row["flops"] == flops
        assert len(row["us_all"]) == 3
        assert row["us"] == np.median(row["us_all"]) > 0
        assert row["tflops"] == pytest.approx(flops / (row["us"] * 1e-6) / 1e12)
        assert row["gbs"] == pytest.approx(row["bytes"] / (row["us"] * 1e-6) / 1e9)
        assert row["plan_us"] > 0

    host = {row["workload"]: row for row in result["rows"] if row["kind"] == "host"}
    plans = {name for name, _, _ in host_costs.PLANS}
    assert host.keys() == plans | {"run-host", "import"}
    assert all(row["value"] > 0 for row in host.values())
    assert host["import"]["note"] == "free of cupy, torch, jax"

    lines = done.stdout.splitlines()
    assert max(map(len, lines)) < 130
    for name in (*expected, *host):
        assert any(line.startswith(name) for line in lines), name
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
    assert bench_prefill.exit_status(rows) == expected


def test_a_host_cost_that_fails_is_a_row_and_the_others_still_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(repeat: int) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(host_costs, "import_row", failing)
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

    monkeypatch.setattr(bench_prefill, "CudaDevice", Absent)
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
        bench_prefill.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_of_any_content_fit_the_line() -> None:
    problem = contender.make_problem(
        TABLE[-1], "float16", timing.HostDevice(), np.random.default_rng()
    )
    row = bench_prefill.new_row(problem, "flashinfer-fa3") | {
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
    host = host_costs.host_row("plan-1024-append", "flashinfer-fa3", 1234567.0, "us", "y" * 200)
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
    lines = list(report.table(head, [row, host]))
    assert max(map(len, lines)) < 130
    assert "prefill-among-decodes*" in "\n".join(lines)
    assert "flashinfer-fa3!" in "\n".join(lines)


def test_the_plot_shows_bars_and_the_sweep(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    status = bench_prefill.main(
        ["--quick", "--workloads", "issue192,page-sweep", "--plot", str(path)]
    )
    assert status == 0
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.gpu
def test_a_run_on_the_gpu(tmp_path: Path) -> None:
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    path = tmp_path / "result.json"
    done = run_script(
        "--workloads", "16x1024,issue192,host", "--peers", "", "--repeat", "3", "--json", str(path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert result["header"]["gpu"]
    assert result["header"]["ceilings"]["matmul_tflops"] > 1
    assert result["header"]["ceilings"]["copy_gbs"] > 1
    attention = [row for row in result["rows"] if row["kind"] == "attention"]
    assert [row["workload"] for row in attention] == ["16x1024", "issue192"]
    for row in attention:
        assert row["graph_us"] > 0
        assert row["us"] > 0
        assert 0 < row["share_of_matmul"] < 1
    host = {row["workload"] for row in result["rows"] if row["kind"] == "host"}
    assert {"run-host", "import", "kernel-compile", "kernel-load"} < host
