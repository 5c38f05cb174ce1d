"""The main job, `python -m cupaged`: that it passes, can fail, and what it computes with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
from processes import NO_GPU, run_module

import cupaged
from cupaged import __main__ as command
from cupaged import examples, independent, mainjob

NUM_CASES = 5
TABLE_ROW = re.compile(r"^ +(\d)  +(\d+)  +(\d+)  +(\d+)  +\S+  +\S+  +\S+  (.*)$", re.MULTILINE)


def check_tables(text: str, places: int) -> None:
    """Ten requests in every case, all right, on so many backends."""
    rows = TABLE_ROW.findall(text)
    assert len(rows) == 10 * NUM_CASES * places
    assert [int(row[0]) for row in rows] == list(range(10)) * NUM_CASES * places
    assert all(re.fullmatch(r"ok( \(\d+ rows see no key\))?", row[4]) for row in rows)


def test_the_main_job_without_a_gpu() -> None:
    done = run_module("--seed", "192", **NO_GPU)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""
    check_tables(done.stdout, 1)
    lines = done.stdout.splitlines()
    assert "reference backend on the host" in lines[1]
    assert re.match("not on a GPU: .*(install|host arrays)", lines[2])
    for title in (
        "issue 192:",
        "no prefix:",
        "nothing appended",
        "lengths on a page's edge:",
        "keys not appended",
    ):
        assert sum(line.startswith(title) for line in lines) == 1
    assert lines[-1].startswith("PASSED: 50 requests on: reference backend on the host")
    warned = [line for line in lines if line.startswith("CupagedWarning: ")]
    assert len(warned) == 1
    assert "see no key" in warned[0]


@pytest.mark.gpu
def test_the_main_job_on_the_gpu_and_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    status = command.main([])
    text = capsys.readouterr().out
    assert status == 0, text
    check_tables(text, 2)
    assert "cuda backend on cuda:" in text.splitlines()[-1]
    assert "reference backend on the host" in text.splitlines()[-1]


@pytest.mark.gpu
def test_the_main_job_on_the_gpu_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--backend", "cuda"]) == 0
    text = capsys.readouterr().out
    check_tables(text, 1)
    assert "reference" not in text


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 192's batch alone."""
    every = mainjob.cases
    monkeypatch.setattr(mainjob, "cases", lambda rng: [next(every(rng))])


@pytest.fixture
def last_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case of the keys that were not appended, alone."""
    every = mainjob.cases
    monkeypatch.setattr(mainjob, "cases", lambda rng: list(every(rng))[-1:])


def test_a_seed_repeats_the_lengths_and_another_changes_them(
    one_case: None, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("5", "5", "6"):
        assert command.main(["--backend", "reference", "--seed", seed]) == 0
        texts.append(TABLE_ROW.findall(capsys.readouterr().out))
    assert texts[0] == texts[1] != texts[2]


# That it can fail


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    """Let `change` alter what the library computed, or the warnings that it gave."""
    honest = mainjob.run

    def run(case: Any, inputs: Any, backend: Any) -> Any:
        out, lse, warned = honest(case, inputs, backend)
        change(case, out, lse, warned)
        return out, lse, warned

    monkeypatch.setattr(mainjob, "run", run)


def check_failure(capsys: pytest.CaptureFixture[str], faults: dict[int | None, str]) -> None:
    """The job fails, for these requests (None: for the case) and with these words, alone."""
    assert command.main(["--backend", "reference"]) == 1
    text = capsys.readouterr().out
    found = {int(row[0]): row[4] for row in TABLE_ROW.findall(text) if not row[4].startswith("ok")}
    for request, words in faults.items():
        if request is None:
            assert f"\nWRONG: {words}" in text
        else:
            assert found.pop(request).startswith(f"WRONG: {words}")
    assert not found
    assert text.splitlines()[-1].startswith(f"FAILED: {len(faults)} faults in 10 requests on: ")


def add(amount: float, to: str) -> Callable[..., None]:
    def change(case: Any, out: Any, lse: Any, warned: Any) -> None:
        {"out": out[-1, 3], "lse": lse[-1]}[to][..., 5] += amount

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add(0.02, "out"), "output"),
        (add(-0.02, "out"), "output"),
        (add(np.nan, "out"), "output"),
        (add(np.inf, "out"), "output"),
        (add(2e-3, "lse"), "LSE"),
        (add(np.nan, "lse"), "LSE"),
        (add(-np.inf, "lse"), "LSE"),
    ],
)
@pytest.mark.usefixtures("one_case")
def test_a_wrong_value_fails_its_request(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[..., None],
    words: str,
) -> None:
    spoil(monkeypatch, change)
    check_failure(capsys, {9: words})


@pytest.mark.parametrize("value", [np.float16(1e-7), np.float16(np.nan)])
@pytest.mark.usefixtures("last_case")
def test_a_row_without_keys_must_be_exactly_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: np.float16
) -> None:
    def change(case: Any, out: Any, lse: Any, warned: Any) -> None:
        out[-1, 0, 0] = value  # request 9 has no key at all
        out[case.batch.qo_indptr[2], 7, 1] = value

    spoil(monkeypatch, change)
    assert command.main(["--backend", "reference"]) == 1
    rows = TABLE_ROW.findall(capsys.readouterr().out)
    faults = {int(row[0]): row[4] for row in rows if row[4].startswith("WRONG")}
    assert faults.keys() == {2, 9}
    assert all("rows that see no key" in words for words in faults.values())


@pytest.mark.usefixtures("last_case")
def test_a_row_without_keys_must_have_an_lse_of_minus_infinity(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(case: Any, out: Any, lse: Any, warned: Any) -> None:
        lse[0, 2] = -1e30  # request 0 has more queries than keys

    spoil(monkeypatch, change)
    check_failure(capsys, {0: "rows that see no key"})


@pytest.mark.parametrize("left", [[], ["the first rows are odd"], ["rows see no key, will be 0"]])
@pytest.mark.usefixtures("last_case")
def test_missing_keys_must_be_warned_of_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], left: list[str]
) -> None:
    def change(case: Any, out: Any, lse: Any, warned: list[str]) -> None:
        warned[:] = left

    spoil(monkeypatch, change)
    check_failure(capsys, {None: "expected a CupagedWarning that says 'see no key', 'will be 0', "})


@pytest.mark.usefixtures("one_case")
def test_a_warning_without_cause_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, lambda case, out, lse, warned: warned.append("see no key"))
    check_failure(capsys, {None: "unexpected warning: see no key"})


def give_two_requests_each_others_page(arguments: dict[str, Any]) -> None:
    places = arguments["paged_kv_indptr"][[2, 7]]
    arguments["paged_kv_indices"][places] = arguments["paged_kv_indices"][places[::-1]]


@pytest.mark.parametrize(
    ("change", "requests"),
    [
        (lambda arguments: arguments.update(causal=False), range(10)),
        (lambda arguments: arguments.update(sm_scale=0.1), range(10)),
        (give_two_requests_each_others_page, [2, 7]),
    ],
    ids=["not causal", "another scale", "two pages of two requests swapped"],
)
@pytest.mark.usefixtures("one_case")
def test_a_wrong_plan_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], None],
    requests: Any,
) -> None:
    honest = cupaged.BatchPrefillWithPagedKVCacheWrapper.plan

    def plan(self: Any, **arguments: Any) -> None:
        change(arguments)
        honest(self, **arguments)

    monkeypatch.setattr(cupaged.BatchPrefillWithPagedKVCacheWrapper, "plan", plan)
    check_failure(capsys, dict.fromkeys(requests, "output"))


@pytest.mark.usefixtures("one_case")
def test_an_output_that_is_not_written_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        cupaged.BatchPrefillWithPagedKVCacheWrapper, "run", lambda *args, **options: None
    )
    check_failure(capsys, dict.fromkeys(range(10), "output, LSE"))


# What it computes with


def test_the_cases_are_what_they_say(rng: np.random.Generator) -> None:
    for _ in range(20):
        issue, no_prefix, no_append, edge, missing = mainjob.cases(rng)
        assert len(issue.prefix) == 10
        for lengths in (issue.prefix, issue.append):
            assert lengths.min() >= 16
            assert lengths.max() <= 128
        assert not no_prefix.prefix.any()
        assert no_prefix.append.all()
        assert np.flatnonzero(no_append.append == 0).tolist() == [0, 3, 6, 9]
        assert no_append.batch.pages[0] == 0
        assert no_append.batch.pages[1:].all()
        assert set(edge.batch.kv_len % 32) == {31, 0, 1}
        assert edge.prefix.min() > 0
        few = missing.batch.qo_len > missing.batch.kv_len
        assert few.tolist() == [True, False] * 4 + [True, True]
        assert missing.batch.kv_len[9] == 0
        for case in (issue, no_prefix, no_append, edge):
            assert (case.batch.kv_len == case.prefix + case.append).all()
        assert (missing.batch.kv_len == missing.prefix).all()


def test_both_ends_of_the_range_are_drawn(rng: np.random.Generator) -> None:
    assert set(examples.draw_lengths(rng, 2000, (3, 6))) == {3, 4, 5, 6}


@pytest.mark.parametrize("index", range(NUM_CASES))
def test_the_pages_hold_the_keys_and_nothing_else(rng: np.random.Generator, index: int) -> None:
    case = list(mainjob.cases(rng))[index]
    inputs = mainjob.make_inputs(case, rng)
    batch = case.batch
    assert inputs.k_cache.shape == inputs.v_cache.shape == (640, 32, 8, 128)
    assert len(set(inputs.page_indices.tolist())) == batch.pages.sum() == len(inputs.page_indices)
    for cache, contiguous in ((inputs.k_cache, inputs.k), (inputs.v_cache, inputs.v)):
        assert np.count_nonzero(~np.isnan(cache)) == contiguous.size
        begin = 0
        for r, kv_len in enumerate(batch.kv_len.tolist()):
            first = batch.paged_kv_indptr[r]
            for j in range(kv_len):
                page = inputs.page_indices[first + j // 32]
                assert (cache[page, j % 32] == contiguous[begin + j]).all()
            begin += kv_len
        assert begin == len(contiguous)


def test_the_independent_computation_agrees_with_the_oracle(rng: np.random.Generator) -> None:
    qo_len, kv_len = np.array([3, 0, 5, 1, 4, 2, 33]), np.array([7, 4, 2, 1, 0, 2, 40])
    q = rng.standard_normal((qo_len.sum(), 2, 16)).astype(np.float16)
    k, v = (rng.standard_normal((kv_len.sum(), 2, 16)).astype(np.float16) for _ in range(2))
    expected = independent.attention(qo_len, kv_len, q, k, v)
    q_begin = k_begin = 0
    for rows, keys in zip(qo_len.tolist(), kv_len.tolist(), strict=True):
        own, seen = slice(q_begin, q_begin + rows), slice(k_begin, k_begin + keys)
        q_begin, k_begin = q_begin + rows, k_begin + keys
        if rows == 0:
            continue
        formula = oracle.Formula(causal=True)
        out, lse = oracle.attend(q[own], k[seen], v[seen], formula)
        plain = oracle.plain_same_dtype(q[own], k[seen], v[seen], formula)
        np.testing.assert_allclose(expected.out[own], out, rtol=0, atol=1e-12)
        np.testing.assert_allclose(expected.lse[own], lse, rtol=0, atol=1e-12)
        np.testing.assert_allclose(expected.plain[own], plain.astype(np.float64), atol=2e-3)
    assert (q_begin, k_begin) == (len(q), len(k))
