"""What the benchmark calls a wrong result."""

from __future__ import annotations

import check
import numpy as np
import problem as problems
import pytest
import timing
import workloads
from bench_problems import DTYPES, bits, formula, ragged_problem


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formula_rounded_once_is_right(
    rng: np.random.Generator, dtype: str, kv_layout: str
) -> None:
    problem = ragged_problem(rng, dtype, kv_layout)
    verdict = problem.verify(bits(formula(problem), dtype), rng)
    assert verdict.ok
    assert verdict.detail == ""
    assert verdict.max_rel_err <= check.UNIT_ROUNDOFF[dtype]
    assert 0 < verdict.max_abs_err < 8 * check.UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_rows_is_the_formula(rng: np.random.Generator, causal: bool) -> None:
    w = workloads.Workload("w", (7,), (5,), 6, 2, causal, 2, head_dim=8)
    problem = problems.make_problem(w, "float16", timing.HostDevice(), rng)
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
    problem = problems.make_problem(w, dtype, timing.HostDevice(), rng)
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
