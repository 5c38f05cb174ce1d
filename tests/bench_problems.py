"""Problems for the benchmark's tests, counted and computed one by one, and stand-ins for peers."""

from __future__ import annotations

import math
import types
from typing import Any

import ml_dtypes
import numpy as np
import problem as problems
import pytest
import timing
import workloads

import cupaged

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TABLE = workloads.prefill_workloads(16)
ALL = [*TABLE, *workloads.length_sweep(16), *workloads.page_sweep()]


def count_pairs(qo_len: int, kv_len: int, causal: bool) -> int:
    """Visible pairs of one request, counted one by one."""
    return sum(not causal or j <= kv_len - qo_len + i for i in range(qo_len) for j in range(kv_len))


def formula(problem: problems.Attention, layer: int = 0) -> np.ndarray:
    """Attention as semantics.md words it, row by row and head by head, in float64."""
    w, table = problem.workload, problem.table
    k, v = problem.layers[layer]
    if w.kv_layout == "HND":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
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
                        keys.append(k[place].astype(np.float64))
                        values.append(v[place].astype(np.float64))
                if keys:
                    logits = np.array(keys) @ problem.q[row, h].astype(np.float64)
                    weights = np.exp((logits - logits.max()) / math.sqrt(w.head_dim))
                    out[row, h] = weights @ np.array(values) / weights.sum()
    return out


def ragged_problem(
    rng: np.random.Generator, dtype: str = "float16", kv_layout: str = "NHD"
) -> problems.Attention:
    """Small, with a request without queries, one without keys, and rows that see none."""
    workload = workloads.Workload(
        *("small", (5, 0, 3, 9, 1), (11, 6, 0, 4, 13), 4, 2, True, 3, 16), kv_layout=kv_layout
    )
    return problems.make_problem(workload, dtype, timing.HostDevice(), rng)


def bits(out: np.ndarray, dtype: str) -> np.ndarray:
    return out.astype(DTYPES[dtype]).view(np.uint16)


class Tensor(np.ndarray):
    """An array with what the benchmark asks of a tensor."""

    def fill_(self, value: float) -> None:
        self.fill(value)


class NoGraphs:
    """`torch.cuda`, which refuses to record."""

    CUDAGraph = object

    @staticmethod
    def current_stream() -> None: ...

    @staticmethod
    def graph(graph: object, *, stream: None, capture_error_mode: str) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def fake_torch() -> types.SimpleNamespace:
    """As much of PyTorch as FlashInfer's contenders use, over NumPy."""
    return types.SimpleNamespace(
        cuda=NoGraphs,
        uint8=np.uint8,
        int16=np.int16,
        zeros=lambda count, dtype, device: np.zeros(count, dtype).view(Tensor),
        empty_like=lambda array: np.empty_like(array).view(Tensor),
        from_numpy=lambda array: array.view(Tensor),
        from_dlpack=lambda array: array.view(Tensor),
    )


class FakeDecodeWrapper:
    """FlashInfer's decode wrapper, as it wants to be called; computed by the reference backend."""

    def __init__(self, workspace: Any, kv_layout: str, *, use_tensor_cores: bool = False) -> None:
        assert isinstance(workspace, Tensor)
        self.tensor_cores = use_tensor_cores
        self.wrapper = cupaged.BatchDecodeWithPagedKVCacheWrapper(
            kv_layout=kv_layout, backend="reference"
        )

    def plan(self, *arguments: Any, q_data_type: str, **more: int) -> None:
        tables, numbers = arguments[:3], arguments[3:]
        assert all(isinstance(table, Tensor) for table in tables)
        if more and not self.tensor_cores:
            raise ValueError("q_len_per_req > 1 requires tensor-core decode")
        arrays = (np.asarray(table) for table in tables)
        self.wrapper.plan(*arrays, *numbers, q_data_type=q_data_type, **more)

    def run(self, q: Any, paged_kv_cache: Any, *, out: Any) -> None:
        assert all(isinstance(x, Tensor) for x in (q, *paged_kv_cache, out))
        kv = tuple(np.asarray(cache) for cache in paged_kv_cache)
        self.wrapper.run(np.asarray(q), kv, out=out.view(np.ndarray))


class FakePrefillWrapper:
    """FlashInfer's prefill wrapper, as it wants to be called; computed by the reference backend."""

    def __init__(self, workspace: Any, kv_layout: str, *, backend: str) -> None:
        assert backend in ("fa2", "fa3")
        self.wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper(
            kv_layout=kv_layout, backend="reference"
        )

    def plan(self, *arguments: Any, causal: bool, q_data_type: str) -> None:
        assert all(isinstance(x, Tensor) for x in arguments[:4])
        arrays = (np.asarray(x) for x in arguments[:4])
        self.wrapper.plan(*arrays, *arguments[4:], causal=causal, q_data_type=q_data_type)

    run = FakeDecodeWrapper.run


def append_row_by_row(
    append_key: Any,
    append_value: Any,
    batch_indices: Any,
    positions: Any,
    paged_kv_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
    kv_layout: str = "NHD",
) -> None:
    """What `append_paged_kv_cache` does, in NumPy."""
    assert kv_layout == "NHD"
    page_size = paged_kv_cache[0].shape[1]
    for row, (request, position) in enumerate(zip(batch_indices, positions, strict=True)):
        pages = kv_indices[kv_indptr[request] : kv_indptr[request + 1]]
        assert position < (len(pages) - 1) * page_size + kv_last_page_len[request]
        page, token = pages[position // page_size], position % page_size
        for cache, rows in zip(paged_kv_cache, (append_key, append_value), strict=True):
            cache.view(np.uint16)[page, token] = rows.view(np.uint16)[row]


def fake_flashinfer() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        __version__="9.9",
        BatchDecodeWithPagedKVCacheWrapper=FakeDecodeWrapper,
        BatchPrefillWithPagedKVCacheWrapper=FakePrefillWrapper,
        append_paged_kv_cache=append_row_by_row,
        page=types.SimpleNamespace(get_page_module=lambda: None),
    )


def stand_in_for_flashinfer(
    patch: pytest.MonkeyPatch, module: types.ModuleType, **other: Any
) -> None:
    """Have a module of the benchmark find this PyTorch, and this FlashInfer or one like it."""
    flashinfer = types.SimpleNamespace(**(vars(fake_flashinfer()) | other))
    patch.setattr(module, "torch_on", lambda device: fake_torch())
    patch.setattr(module, "import_flashinfer", lambda: flashinfer)
