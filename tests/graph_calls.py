"""Runs recorded in CUDA graphs, by CuPy or PyTorch: arrays that stay, and batches that come by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import batches
import numpy as np
import oracle
from decode_calls import DECODING, Decode, Decoder
from gpu_calls import Results, Wrapper, to_gpu, to_host, told
from oracle import Formula
from test_graph_buffers import NAMES

from cupaged import arrays

#: Of every cache here.
PAGES, PAGE_SIZE = 200, 16
#: Requests of a plan, and rows of the recorded q.
MOST, ROWS = 6, 150

OPTIONS: list[dict[str, Any]] = [{}, {"fixed_split_size": 3}, {"disable_split_kv": True}]
Lengths = Sequence[tuple[int, int]]

#: Query rows and keys of the requests of one plan after another; the first one is recorded.
PREFILL_STEPS: list[Lengths] = [
    [(40, 300), (1, 20), (0, 9), (100, 100)],
    [(1, 500), (7, 3)],
    [],
    [(0, 30), (0, 0)],
    [(3, 0), (2, 0)],
    [(141, 1300)],
    [(1, 1)] * MOST,
    [(35, 700), (1, 900), (0, 4), (90, 10)],
]
DECODE_STEPS = [[300, 20, 1, 45, 100, 7], [500, 3], [], [0, 0, 0], [2900], [1] * MOST, [0, 700, 0]]


def put(array: Any, values: np.ndarray) -> None:
    """Write the bits of an array of any framework."""
    bits = np.ascontiguousarray(values).view(f"u{values.itemsize}")
    arrays.import_tensor(array, "array").view(bits.dtype).set(bits)


def take(array: Any) -> np.ndarray:
    """The bits of an array of any framework."""
    return to_host(arrays.import_tensor(array, "array"))


@dataclass(frozen=True)
class Framework:
    """Whose arrays are used, and who records.

    Attributes
    ----------
    empty : callable
        (shape, dtype's name) → array on device 0.
    record : callable
        What shall be recorded → what replays it, on the stream that is current then.
    """

    empty: Callable[[tuple[int, ...], str], Any]
    record: Callable[[Callable[[], Any]], Callable[[], None]]


def with_cupy(cp: Any) -> Framework:
    def record(call: Callable[[], Any]) -> Callable[[], None]:
        cp.cuda.Device().synchronize()
        with cp.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            try:
                call()
            finally:
                graph = stream.end_capture()
        launch: Callable[[], None] = graph.launch
        return launch

    return Framework(lambda shape, dtype: to_gpu(np.zeros(shape, element(dtype))), record)


def with_torch(torch: Any) -> Framework:
    def record(call: Callable[[], Any]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        replay: Callable[[], None] = graph.replay
        return replay

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda")

    return Framework(empty, record)


def element(dtype: str) -> np.dtype[Any]:
    return batches.DTYPES[dtype] if dtype in batches.DTYPES else np.dtype(dtype)


def build(rng: np.random.Generator, lengths: Lengths, **options: Any) -> batches.Batch:
    """A batch whose cache has `PAGES` pages."""
    needed = sum(-(-kv_len // PAGE_SIZE) for _, kv_len in lengths)
    return batches.build(
        rng,
        [qo_len for qo_len, _ in lengths],
        [kv_len for _, kv_len in lengths],
        page_size=PAGE_SIZE,
        spare_pages=PAGES - needed,
        **options,
    )


def steps_of(kind: str, q_len: int = 1) -> list[Lengths]:
    if kind == "prefill":
        return PREFILL_STEPS
    return [[(q_len, kv_len) for kv_len in step] for step in DECODE_STEPS]


def buffers_of(of: Framework, kind: str) -> dict[str, Any]:
    """A constructor's buffers, all -7."""
    *indptrs, indices, last_page_len = NAMES[Decode if kind == "decode" else Wrapper]
    sizes = dict.fromkeys(indptrs, MOST + 1) | {indices: PAGES, last_page_len: MOST}
    buffers = {name: of.empty((size,), "int32") for name, size in sizes.items()}
    for name, buffer in buffers.items():
        put(buffer, np.full(sizes[name], -7, np.int32))
    return buffers


def graphed(
    kind: str, q_len: int = 1, buffers: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A wrapper for CUDA graphs, with buffers of its own where none are given."""
    sizes = {"max_batch_size": MOST, "max_num_pages": PAGES} if buffers is None else buffers
    arguments = {"use_cuda_graph": True, **sizes, **options}
    return Decoder(q_len, **arguments) if kind == "decode" else Wrapper(**arguments)


class Layer:
    """The arrays of a run, which a graph reads and writes at every replay."""

    def __init__(self, of: Framework, batch: batches.Batch, rows: int = ROWS) -> None:
        heads, head_dim = batch.q.shape[1:]
        self.q, self.out = (of.empty((rows, heads, head_dim), batch.dtype) for _ in range(2))
        self.lse = of.empty((rows, heads), "float32")
        self.storages = [of.empty(view.storage.shape, batch.dtype) for view in batch.cache_views]
        cache = tuple(
            storage[view.index]
            for storage, view in zip(self.storages, batch.cache_views, strict=True)
        )
        self.cache = cache[0] if batch.stacked else cache

    def put(self, batch: batches.Batch) -> None:
        """Bring a batch; what is no query is NaN, and so is the result."""
        for array in (self.q, self.out, self.lse):
            values = take(array)
            values[...] = np.nan
            if array is self.q:
                values[: batch.nnz_qo] = batch.q
            put(array, values)
        for storage, view in zip(self.storages, batch.cache_views, strict=True):
            put(storage, view.storage)

    def run(self, wrapper: Any, formula: Formula = DECODING) -> None:
        wrapper.run(self.q, self.cache, out=self.out, lse=self.lse, **formula.run_options)

    def record(
        self, of: Framework, wrapper: Any, formula: Formula = DECODING
    ) -> Callable[[], None]:
        """Record a run; returns what replays it."""
        return of.record(lambda: self.run(wrapper, formula))

    def result(self) -> Results:
        return take(self.out), take(self.lse)

    def check(self, batch: batches.Batch, formula: Formula = DECODING) -> None:
        """The batch's rows are right, and rows beyond them as they were."""
        out, lse = self.result()
        rows = batch.nnz_qo
        oracle.check_all(batch, formula, out[:rows], lse[:rows])
        assert np.isnan(out[rows:]).all()
        assert np.isnan(lse[rows:]).all()


def check_steps(
    of: Framework,
    wrapper: Any,
    steps: Sequence[batches.Batch],
    formula: Formula,
    after_plan: Callable[[batches.Batch], None] = lambda batch: None,
    **options: Any,
) -> None:
    """Plan and record the first batch, then plan and replay each."""
    layer = Layer(of, steps[0])
    steps[0].plan(wrapper, **formula.plan_options, **options)
    replay = layer.record(of, wrapper, formula)
    for i, batch in enumerate(steps):
        with told(f"step {i}: {batch.qo_len}, {batch.kv_len}"):
            batch.plan(wrapper, **formula.plan_options, **options)
            after_plan(batch)
            layer.put(batch)
            replay()
            layer.check(batch, formula)
