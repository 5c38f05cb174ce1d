"""Appends on a GPU in order: streams, threads, CUDA graphs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gpu_appends import PLACES, check, fill, found
from gpu_calls import to_gpu
from page_problems import build, same_bits, torch_tensor
from small_call import check_error

from cupaged import append, append_cuda
from cupaged.append_cuda import LAUNCH_ROWS
from cupaged.page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens

pytestmark = pytest.mark.gpu

# Streams


@pytest.mark.parametrize("rows", [64, LAUNCH_ROWS + 1])
def test_indices_on_the_host_wait_for_nothing(
    cp: Any, rng: np.random.Generator, late_write: Any, rows: int
) -> None:
    problem = build(rng, [rows], [rows])
    check(problem, np.asarray)  # compiled, and loaded
    on_gpu = problem.on(to_gpu)
    append._last = None
    with cp.cuda.Stream(non_blocking=True) as stream:
        late_write(cp.empty(4, cp.int32), 1)
        on_gpu.append(append_paged_kv_cache)
        on_gpu.append(append_paged_kv_cache)
        assert not stream.done
        stream.synchronize()
    assert same_bits(found(on_gpu), problem.solved())


@pytest.mark.parametrize("name", ["positions", "kv_indices", "append_key"])
def test_what_is_pending_comes_first(
    cp: Any, rng: np.random.Generator, late_write: Any, name: str
) -> None:
    problem = build(rng, [6], [1], page_size=4, dtype="float32", spare_pages=2)
    problem.positions[:] = 5
    with cp.cuda.Stream(non_blocking=True) as stream:
        on_gpu = problem.on(to_gpu, to_gpu)
        if name == "append_key":
            late_write(on_gpu.key_view.storage, 2.5)
            problem.key_view.storage[...] = 2.5
        elif name == "positions":
            late_write(on_gpu.positions, 2)
            problem.positions[...] = 2
        else:
            late_write(on_gpu.kv_indices, 3)
            problem.kv_indices[...] = 3
        on_gpu.append(append_paged_kv_cache)
        stream.synchronize()
    assert same_bits(found(on_gpu), problem.solved())


def test_streams_share_what_was_found(cp: Any, rng: np.random.Generator) -> None:
    """Layer after layer on two streams, with slots that were uploaded on either."""
    rows = LAUNCH_ROWS + 100
    problem = build(rng, [rows], [rows])
    expected = problem.solved()
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
    layers = []
    for i in range(20):
        with streams[i // 3 % 2]:
            layers.append(problem.on(to_gpu))
            layers[-1].append(append_paged_kv_cache)
    cp.cuda.Device().synchronize()
    for layer in layers:
        assert same_bits(found(layer), expected)


def test_threads_append_at_once(cp: Any, rng: np.random.Generator) -> None:
    """Each its own problem, with slots in the launch, uploaded, and looked up."""
    problems = [build(rng, [n + 9], [n]) for n in (5, 300, LAUNCH_ROWS + 50, 40)]
    expected = [problem.solved() for problem in problems]
    for problem in problems:
        check(problem, np.asarray)
    check(problems[-1], to_gpu)
    wrong: list[str] = []

    def work(i: int) -> None:
        as_index = to_gpu if i == len(problems) - 1 else np.asarray
        with cp.cuda.Stream(non_blocking=True) as stream:
            for _ in range(20):
                on_gpu = problems[i].on(to_gpu, as_index)
                on_gpu.append(append_paged_kv_cache)
                stream.synchronize()
                if not same_bits(found(on_gpu), expected[i]):
                    wrong.append(f"thread {i}")
                    return

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_appends_give_their_memory_back(cp: Any, rng: np.random.Generator) -> None:
    def used() -> int:
        gc.collect()
        return cp.get_default_memory_pool().used_bytes()

    problems = [build(rng, [LAUNCH_ROWS + 9], [LAUNCH_ROWS + 1]) for _ in range(2)]
    on_gpu = [problem.on(to_gpu, place) for problem in problems for place in PLACES.values()]
    for problem in on_gpu:
        problem.append(append_paged_kv_cache)
    before = used()
    for _ in range(20):
        for problem in on_gpu:
            problem.append(append_paged_kv_cache)
    assert used() == before


# CUDA graphs


@contextmanager
def capture(stream: Any) -> Iterator[list[Any]]:
    """Capture what is launched on a stream of CuPy's; the list then has the graph."""
    graphs: list[Any] = []
    with stream:
        stream.begin_capture()
        try:
            yield graphs
        finally:
            graphs.append(stream.end_capture())


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_a_graph_reads_what_the_index_arrays_hold(
    cp: Any, rng: np.random.Generator, index_dtype: type, kv_layout: str
) -> None:
    """Steps of other lengths and pages, padded to the rows that were captured."""
    steps = [
        build(
            *(rng, [n + 3 for n in appended], appended),
            padding=24 - sum(appended),
            kv_layout=kv_layout,
            index_dtype=index_dtype,
            spare_pages=40 - sum(-(-(n + 3) // 16) for n in appended),
            shuffled=True,
        )
        for appended in ([8, 8, 8], [1, 0, 20], [0, 0, 0], [3, 3, 3])
    ]
    # As a graph's buffers are: as long as any step needs.
    steps = [
        replace(step, kv_indices=np.resize(step.kv_indices[:-2], 40).astype(index_dtype))
        for step in steps
    ]
    buffers = steps[0].on(to_gpu, to_gpu)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        buffers.append(append_paged_kv_cache)  # loads the kernel
    stream.synchronize()
    with capture(stream) as graphs:
        buffers.append(append_paged_kv_cache)
    for step in (*steps[1:], steps[0]):
        with stream:
            fill(buffers, step)
            graphs[0].launch(stream)
        stream.synchronize()
        assert same_bits(found(buffers), step.solved())


def test_a_graph_writes_to_no_slot_that_does_not_exist(cp: Any, rng: np.random.Generator) -> None:
    """Whatever the index arrays hold, rows that are right are written, and nothing else is."""
    problem = build(rng, [20, 5, 0], [3, 2, 0], page_size=8, spare_pages=1)
    buffers = problem.on(to_gpu, to_gpu)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        buffers.append(append_paged_kv_cache)
    stream.synchronize()
    with capture(stream) as graphs:
        buffers.append(append_paged_kv_cache)
    low, high = -(2**31), 2**31 - 1
    # What is changed, at which entry, to what, and which rows then go nowhere.
    cases = [("batch_indices", 1, value, [1]) for value in (low, -2, -1, 2, 3, 4, 10**6, high)]
    cases += [("positions", 1, value, [1]) for value in (low, -1, 20, 24, 10**6, high)]
    cases += [("kv_indices", 2, value, [0, 1, 2]) for value in (low, -1, 5, 10**6, high)]
    # Requests 0 and 1 have rows 0 to 2, and 3 and 4.
    cases += [("kv_indptr", 0, value, [0, 1, 2]) for value in (low, -1, 7, high)]
    cases += [("kv_indptr", 1, value, [0, 1, 2, 3, 4]) for value in (low, -1, 7, high)]
    cases += [("kv_indptr", 2, value, [3, 4]) for value in (low, -1, 0, 3, 7, high)]
    cases += [("kv_last_page_len", 0, value, [0, 1, 2]) for value in (low, -1, 0, 9, high)]
    cases += [("kv_last_page_len", 1, 4, [4]), ("kv_last_page_len", 0, 3, [2])]
    assert problem.kv_indptr.tolist() == [0, 3, 4, 4]
    assert len(problem.kv_indices) == 6  # two of them no page's
    for name, entry, value, lost in cases:
        wrong = {n: array.copy() for n, array in problem.indices.items()}
        wrong[name][entry] = value
        batch_indices = problem.batch_indices.copy()
        batch_indices[lost] = -1
        expected = replace(problem, batch_indices=batch_indices).solved()
        with stream:
            fill(buffers, replace(problem, **wrong))
            graphs[0].launch(stream)
        stream.synchronize()
        assert same_bits(found(buffers), expected), (name, entry, value)


def test_indices_on_the_host_are_refused_in_a_capture(cp: Any, rng: np.random.Generator) -> None:
    problem = build(rng, [20, 5], [3, 2])
    on_gpu = problem.on(to_gpu, to_gpu)
    on_gpu.append(append_paged_kv_cache)
    before = found(on_gpu)
    stream = cp.cuda.Stream(non_blocking=True)
    for name, array in problem.indices.items():
        with capture(stream) as graphs:
            check_error(
                ValueError,
                f"{name} is on the host, expected cuda:0: a CUDA graph is being captured, which "
                "would append to the same slots whenever it is launched",
                replace(on_gpu, **{name: array}).append,
                append_paged_kv_cache,
            )
        graphs[0].launch(stream)  # nothing
    stream.synchronize()
    assert same_bits(found(on_gpu), before)


def test_a_capture_before_the_kernel_is_loaded(
    cp: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = build(rng, [20, 5], [3, 2]).on(to_gpu, to_gpu)
    monkeypatch.setattr(append_cuda, "_functions", {})
    stream = cp.cuda.Stream(non_blocking=True)
    with capture(stream):
        check_error(
            RuntimeError,
            "append_paged_kv_cache() in the capture of a CUDA graph, where its kernel can't be "
            "loaded: call it once before, with the same arrays",
            on_gpu.append,
            append_paged_kv_cache,
        )


def test_a_call_of_padding_alone_loads_the_kernel(
    cp: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As engines warm up before they capture."""
    problem = build(rng, [20, 5], [3, 2])
    buffers = problem.on(to_gpu, to_gpu)
    monkeypatch.setattr(append_cuda, "_functions", {})
    stream = cp.cuda.Stream(non_blocking=True)
    padding = np.full_like(problem.batch_indices, -1)
    with stream:
        buffers.batch_indices.set(padding)
        buffers.append(append_paged_kv_cache)
    with capture(stream) as graphs:
        buffers.append(append_paged_kv_cache)
    with stream:
        fill(buffers, problem)
        graphs[0].launch(stream)
    stream.synchronize()
    assert same_bits(found(buffers), problem.solved())


def test_lengths_and_positions_are_not_captured(cp: Any) -> None:
    indptr, last = to_gpu(np.array([0, 2], np.int32)), to_gpu(np.array([3], np.int32))
    stream = cp.cuda.Stream(non_blocking=True)
    with capture(stream):
        for call, function, arguments in (
            ("get_seq_lens()", get_seq_lens, (indptr, last, 16)),
            ("get_seq_lens()", get_seq_lens, ([0, 2], last, 16)),
            ("get_batch_indices_positions()", get_batch_indices_positions, (indptr, last, 2)),
        ):
            check_error(
                NotImplementedError,
                f"{call} can't be captured in a CUDA graph: call it before, and let the graph "
                "read what it returned",
                function,
                *arguments,
            )
    assert get_seq_lens(indptr, last, 16).get().tolist() == [19]


def test_a_graph_of_torch(cp: Any, torch: Any, rng: np.random.Generator) -> None:
    problem = build(rng, [20, 5], [3, 2], padding=2, dtype="bfloat16")
    tensor = torch_tensor(torch, "cuda")
    buffers = problem.on(tensor, tensor)
    buffers.append(append_paged_kv_cache)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffers.append(append_paged_kv_cache)
    other = build(rng, [9, 30], [4, 1], padding=2, dtype="bfloat16")
    other = replace(
        other,
        kv_indices=np.resize(other.kv_indices, len(problem.kv_indices)),
        cache_views=problem.cache_views,
    )
    assert int(other.kv_indices[: other.kv_indptr[-1]].max()) < len(problem.storages[0])
    for step in (other, problem):
        for name, array in step.indices.items():
            getattr(buffers, name).copy_(tensor(array))
        for view in ("key_view", "value_view"):
            getattr(buffers, view).storage.copy_(tensor(getattr(step, view).storage))
        for target, source in zip(buffers.storages, problem.storages, strict=True):
            target.copy_(tensor(source))
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(
            [x.view(torch.int16).cpu().numpy() for x in buffers.storages], step.solved()
        )
