"""Problems for the benchmark's tests, counted and computed one by one."""

from __future__ import annotations

import math

import contender
import ml_dtypes
import numpy as np
import timing
import workloads

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TABLE = workloads.prefill_workloads(16)
ALL = [*TABLE, *workloads.length_sweep(16), *workloads.page_sweep()]


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
