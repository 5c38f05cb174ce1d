"""The benchmark of variants: what it measures, what it calls wrong, what a run writes and says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_variants
import measure
import ml_dtypes
import numpy as np
import oracle
import pytest
import report
import timing
import variant_problem
from formula import Formula, visible
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python
from variant_bars import SUITE
from variant_workloads import (
    DECODE,
    PREFILL,
    RAGGED,
    VariantWorkload,
    shrink_variant,
    variant_workloads,
)

ROOT = Path(__file__).resolve().parent.parent
ALL = variant_workloads()
BY_NAME = {w.name: w for w in ALL}
#: Those whose output would be another without what they are about.
VARIANTS = [
    w for w in ALL if w.window_left >= 0 or w.logits_soft_cap or w.sinks or w.custom_mask
    or w.pos_encoding_mode != "NONE"
]  # fmt: skip
TURNS = {
    "4x4096": 11,
    "1x16384-heads16-16": 2,
    "1x16384-heads32-8": 2,
    "64x8192-float16": 3,
    "64x8192-bfloat16": 3,
}


def run_script(*arguments: str) -> Any:
    return run_python(str(ROOT / "bench" / "bench_variants.py"), *arguments)


def small(**fields: Any) -> VariantWorkload:
    """Two requests over prefixes, four heads that share two, pages of 4."""
    lens = (5, 9), (11, 9)
    return VariantWorkload(
        *("w", *lens, 4, 2, True, 4), **{"head_dim": 64, "dtype": "float16", "beside": "w"} | fields
    )


def prepared(workload: VariantWorkload, rng: np.random.Generator) -> Any:
    device = timing.HostDevice()
    problem = variant_problem.make_variant(workload, device, rng)
    return bench_variants.CupagedVariants(device).prepare(problem)


# The workloads


def test_the_table_holds_the_work_of_the_issue() -> None:
    assert {w.page_size for w in ALL} == {16}
    assert len(BY_NAME) == len(ALL)
    for w in ALL:
        dtype = "float16" if "-float16" in w.name else "bfloat16"
        assert (w.dtype, w.causal, w.kv_layout) == (dtype, True, "NHD")
        length = int(w.name.split("x")[1].split("-")[0])
        assert w.kv_lens == (length,) * int(w.name.split("x")[0])
        assert w.qo_lens == ((1,) * w.batch if w.wrapper == DECODE else w.kv_lens)
        assert w.wrapper == {"4": PREFILL, "1": PREFILL, "6": DECODE}[w.name[0]] or (
            w.name == "4x4096-ragged" and w.wrapper == RAGGED
        )
    prefills = [w for w in ALL if w.beside == "4x4096"]
    features = {w.name[7:]: w.features() for w in prefills}
    mask = features["mask"].pop("packed_custom_mask")
    causal = {"causal": True}
    assert features == {
        "": causal,
        "window": {**causal, "window_left": 1024},
        "softcap": {**causal, "logits_soft_cap": 30.0},
        "window-softcap": {**causal, "window_left": 1024, "logits_soft_cap": 30.0},
        "alibi": {**causal, "pos_encoding_mode": "ALIBI"},
        "rope": {**causal, "pos_encoding_mode": "ROPE_LLAMA"},
        "sinks": causal,
        "mask": {},
        "ragged": causal,
        "hd96": causal,
        "hd192-128": {**causal, "head_dim_vo": 128},
    }
    one = np.tri(4096, dtype=np.uint8).reshape(-1)
    bits = np.unpackbits(mask, bitorder="little").reshape(4, -1)
    assert all(np.array_equal(bits[r], one) for r in range(4))
    assert [w.name for w in prefills if w.sinks] == ["4x4096-sinks"]
    assert [w.name for w in prefills if w.wrapper == RAGGED] == ["4x4096-ragged"]
    shapes = {w.name[7:]: (w.num_qo_heads, w.num_kv_heads, *w.head_dims) for w in prefills}
    others = {"hd96": (32, 8, 96, 96), "hd192-128": (32, 32, 192, 128)}
    assert shapes == dict.fromkeys(shapes, (32, 8, 128, 128)) | others
    for heads in ((16, 16), (32, 8)):
        name = f"1x16384-heads{heads[0]}-{heads[1]}"
        for w, features in (
            (BY_NAME[name], causal),
            (BY_NAME[name + "-window"], {**causal, "window_left": 1024}),
        ):
            assert (w.num_qo_heads, w.num_kv_heads, w.head_dim) == (*heads, 128)
            assert w.features() == features
    decodes = [w for w in ALL if w.wrapper == DECODE]
    assert [(w.dtype, w.features().get("kv_data_type")) for w in decodes] == [
        (dtype, kv_dtype)
        for dtype in ("float16", "bfloat16")
        for kv_dtype in (None, "float8_e4m3fn", "float8_e5m2")
    ]
    assert {(w.num_qo_heads, w.num_kv_heads, *w.head_dims) for w in decodes} == {(32, 8, 128, 128)}


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 20)), min_size=1, max_size=3),
    st.integers(-1, 25),
    st.booleans(),
    st.sampled_from([0, 48]),
)
def test_work_is_counted_pair_by_pair(
    lens: list[tuple[int, int]], window_left: int, causal: bool, head_dim_vo: int
) -> None:
    queries, keys = zip(*lens, strict=True)
    w = replace(
        small(), qo_lens=queries, kv_lens=keys, window_left=window_left, causal=causal,
        head_dim_vo=head_dim_vo,
    )  # fmt: skip
    masks = [visible(*one, causal, window_left) for one in lens]
    assert w.flops() == 2 * (64 + (head_dim_vo or 64)) * 4 * sum(int(m.sum()) for m in masks)
    for (qo_len, kv_len), mask in zip(lens, masks, strict=True):
        own, first, stop = w.seen(np.arange(qo_len), qo_len, kv_len)
        assert own.tolist() == [kv_len - qo_len + i for i in range(qo_len)]
        key = np.arange(kv_len)
        seen = (key >= first[:, None]) & (key < stop[:, None])
        np.testing.assert_array_equal(seen, mask)


def test_bytes_are_those_of_the_dtypes() -> None:
    tokens, rows = 64 * 8192, 64
    for name, size in (("64x8192-float16", 2), ("64x8192-float16-e4m3", 1)):
        w = BY_NAME[name]
        assert w.kv_bytes() == tokens * 8 * 2 * 128 * size
        assert w.bytes() == w.kv_bytes() + 2 * rows * 32 * 128 * 2
    wide = BY_NAME["4x4096-hd192-128"]
    assert wide.kv_bytes() == 16384 * 32 * (192 + 128) * 2
    assert wide.bytes() == 2 * wide.kv_bytes()


@pytest.mark.parametrize("workload", ALL, ids=lambda w: w.name)
def test_shrunk_workloads_keep_their_shape(workload: VariantWorkload) -> None:
    less = shrink_variant(workload)
    assert less.kv_bytes() < 1 << 24
    assert less.num_qo_heads * workload.num_kv_heads == workload.num_qo_heads * less.num_kv_heads
    # A window hides as large a part.
    if workload.window_left >= 0:
        assert less.window_left * workload.kv_lens[0] == workload.window_left * less.kv_lens[0]
    lens = {"qo_lens": (), "kv_lens": (), "num_qo_heads": 0, "num_kv_heads": 0, "window_left": 0}
    assert replace(less, **lens) == replace(workload, **lens)


# The numbers


@pytest.mark.parametrize(
    ("kv_dtype", "bits", "least"), [("float8_e4m3fn", 3, 2.0**-6), ("float8_e5m2", 2, 2.0**-14)]
)
def test_float8_is_float16_cut_off(kv_dtype: str, bits: int, least: float) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    values = every.view(np.float16).astype(np.float64)
    below = np.abs(values) < 256  # neither NaN
    every, values = every[below], values[below]
    got = variant_problem.float8_bits(np, every, kv_dtype)
    assert got.dtype == np.uint8
    cut = got.view(getattr(ml_dtypes, kv_dtype)).astype(np.float64)
    normal = np.abs(values) >= least
    step = 2.0 ** (np.floor(np.log2(np.abs(values[normal]))) - bits)
    expected = np.trunc(values[normal] / step) * step
    np.testing.assert_array_equal(cut[normal], expected)
    assert np.all(np.abs(cut[~normal]) <= np.abs(values[~normal]))
    np.testing.assert_array_equal(np.signbit(cut), np.signbit(values))


@pytest.mark.parametrize("head_dim_vo", [0, 32])
@pytest.mark.parametrize("kv_dtype", ["", "float8_e4m3fn", "float8_e5m2"])
def test_only_the_slots_of_keys_hold_numbers(
    rng: np.random.Generator, kv_dtype: str, head_dim_vo: int
) -> None:
    workload = small(kv_dtype=kv_dtype, head_dim_vo=head_dim_vo)
    problem = variant_problem.make_variant(workload, timing.HostDevice(), rng)
    table = problem.table
    for cache, head_dim in zip(problem.layers[0], (64, head_dim_vo or 64), strict=True):
        assert cache.shape == (table.num_pages, 4, 2, head_dim)
        if kv_dtype:
            assert cache.dtype == np.uint8
            cache = cache.view(getattr(ml_dtypes, kv_dtype))
        tokens = cache.astype(np.float64).reshape(-1, 2, head_dim)
        assert np.isfinite(tokens[table.all_slots()]).all()
        assert np.isnan(tokens[table.unused_slots()]).all()
        assert 0.7 < tokens[table.all_slots()].std() < 1.2


# What is right


def in_order(problem: variant_problem.VariantProblem, request: int) -> list[np.ndarray]:
    """A request's K and V as float64, key after key."""
    w, table = problem.workload, problem.table
    begin = sum(w.kv_lens[:request])
    found = []
    for cache in problem.layers[0]:
        if w.kv_dtype:
            cache = cache.view(getattr(ml_dtypes, w.kv_dtype))
        pages = table.kv_indices[table.kv_indptr[request] : table.kv_indptr[request + 1]]
        keys = range(w.kv_lens[request])
        rows = [
            cache[begin + j] if w.wrapper == RAGGED else cache[pages[j // 4], j % 4] for j in keys
        ]
        found.append(np.array(rows).astype(np.float64))
    return found


FEATURES: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_left": 3},
    "soft cap": {"logits_soft_cap": 0.7},
    "alibi": {"pos_encoding_mode": "ALIBI"},
    "rope": {"pos_encoding_mode": "ROPE_LLAMA"},
    "sinks": {"sinks": True},
    "mask": {"custom_mask": True},
    "ragged": {"wrapper": RAGGED, "window_left": 2},
    "two head dims": {"head_dim": 192, "head_dim_vo": 128},
    "e4m3": {"kv_dtype": "float8_e4m3fn"},
    "e5m2": {"kv_dtype": "float8_e5m2", "dtype": "bfloat16"},
    "many": {
        "window_left": 4,
        "logits_soft_cap": 0.5,
        "pos_encoding_mode": "ALIBI",
        "sinks": True,
        "dtype": "bfloat16",
    },
}


@pytest.mark.parametrize("name", FEATURES)
def test_the_formula_is_the_oracle_s(rng: np.random.Generator, name: str) -> None:
    workload = small(**FEATURES[name])
    problem = variant_problem.make_variant(workload, timing.HostDevice(), rng)
    formula = Formula(
        True,
        window_left=workload.window_left,
        logits_soft_cap=workload.logits_soft_cap,
        pos_encoding_mode=workload.pos_encoding_mode,
        sinks=problem.sinks,
    )
    q = problem.q.astype(np.float64)
    expected = np.concatenate(
        [
            oracle.attend(rows, *in_order(problem, r), formula)[0]
            for r, rows in enumerate(np.split(q, [5]))
        ]
    )
    known = problem.answers(0, rng)
    assert known.places.tolist() == list(range(14))  # so few are all looked at
    assert known.requests.tolist() == [0] * 5 + [1] * 9
    assert known.rows.tolist() == [*range(5), *range(9)]
    np.testing.assert_allclose(known.expected, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FEATURES)
def test_cupaged_is_called_as_the_workload_says(rng: np.random.Generator, name: str) -> None:
    runner = prepared(small(**FEATURES[name]), rng)
    runner.poison()
    assert not runner.verdict(rng).ok
    runner.call()
    assert runner.verdict(rng).ok


@pytest.mark.parametrize("workload", VARIANTS, ids=lambda w: w.name)
def test_a_variant_that_was_left_out_is_wrong(
    rng: np.random.Generator, workload: VariantWorkload
) -> None:
    workload = shrink_variant(workload)
    if workload.logits_soft_cap:
        # Logits of such numbers hardly reach the cap.
        workload = replace(workload, logits_soft_cap=2.0)
    runner = prepared(workload, rng)
    off = {"window_left": -1, "logits_soft_cap": 0.0, "pos_encoding_mode": "NONE", "sinks": False}
    if workload.custom_mask:
        off = {"custom_mask": False, "causal": False}
    problem = replace(runner.problem, workload=replace(workload, **off), sinks=None)
    without = bench_variants.CupagedVariants(timing.HostDevice()).prepare(problem)
    without.call()
    out = without.out.view(np.uint16)
    assert not runner.problem.verify(out, rng, 0).ok
    runner.call()
    assert runner.verdict(rng).ok


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
        ("4x4096", [w.name for w in ALL[:11]]),
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
