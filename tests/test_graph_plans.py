"""Plans for CUDA graphs: what they write, where it stays, and which ones a recorded run refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import test_launch
from decode_calls import Decode, plan_arguments
from hypothesis import given
from hypothesis import strategies as st
from machine import Machine, Stream, install, ndarray
from small_call import Wrapper, check_error, ints
from small_call import plan_arguments as prefill_arguments
from test_graph_buffers import OWN, both_kinds, buffers_of

from cupaged import cuda
from cupaged.kernel_spec import ITEM_DTYPE, PARAMS_DTYPE

FIELDS = PARAMS_DTYPE.names
#: What a plan decides of a launch's parameters.
PLAN_FIELDS = FIELDS[FIELDS.index("items") : FIELDS.index("sinks")]
Lengths = list[tuple[int, int]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return install(monkeypatch)


def graphed(kind: type, buffers: dict[str, Any] | None = None, **options: Any) -> Any:
    return kind(use_cuda_graph=True, **(OWN if buffers is None else buffers), **options)


def record(machine: Machine, wrapper: Any, rows: int, pages: int = 5) -> None:
    """As `run()` does once its launches are recorded, of so many rows of q and pages."""
    assert wrapper._plan.on_device(0).recordable
    wrapper._graph.note_recorded(rows, pages)


def launches_of(wrapper: Any) -> list[tuple[Any, ...]]:
    """What a recorded run holds of its launches: all but the arrays of the call."""
    return [
        (launch.function, launch.config, launch.grid, launch.parameters)
        for launch in wrapper._plan.on_device(0).launches
    ]


def check_written(machine: Machine, wrapper: Any, buffers: dict[str, Any] | None) -> None:
    """What the kernels will read is what was planned; what they write is in its own memory."""
    plan = wrapper._plan
    planned, spec = plan.schedule, plan.schedule.spec
    built = {launch.config: launch for launch in planned.launches}
    taken: list[tuple[int, int]] = []
    for ready in plan.on_device(0).launches:
        params = dict(zip(PLAN_FIELDS, ready.parameters, strict=True))
        assert params["num_items"] == -1
        claimed, left, num_items, _ = machine.read(params["work_counters"], np.int32, 4)
        assert (claimed, left) == (0, 0)
        launch = built.pop(ready.config, None)
        assert num_items == (0 if launch is None else len(launch.items))
        if buffers is None:
            pages = machine.read(params["page_indices"], np.int32, len(plan.page_indices))
            np.testing.assert_array_equal(pages, plan.page_indices)
        if launch is None:
            continue
        assert params["items"] % 16 == 0
        items = machine.read(params["items"], ITEM_DTYPE, num_items)
        np.testing.assert_array_equal(items, launch.items)
        rows = launch.num_partial_rows(spec)
        machine.read(params["partial_lse"], np.float32, rows)
        assert params["partial_lse"] - params["partial_out"] >= rows * spec.head_dim_vo * 4
        merges = launch.num_merges * spec.num_kv_heads * launch.config.splits_merged_by
        assert not machine.read(params["merge_counters"], np.int32, merges).any()
        taken.append((params["merge_counters"], merges * 4))
        taken.append((params["items"], items.nbytes))
    assert not built, "a launch that is not recorded"
    for (begin, size), (following, _) in zip(sorted(taken), sorted(taken)[1:], strict=False):
        assert begin + size <= following
    if buffers is not None:
        check_buffers(plan, list(buffers.values()))


def check_buffers(plan: Any, buffers: list[ndarray]) -> None:
    """The caller's buffers begin with the planned arrays; nothing else of them is written."""
    *qo_indptr, _, indices, _ = buffers
    lengths, page_size = plan.schedule.lengths, plan.schedule.spec.page_size
    kv_len = lengths.kv_len
    expected = [lengths.paged_kv_indptr, plan.page_indices, (kv_len - 1) % page_size + 1]
    expected[2][kv_len == 0] = 0
    if qo_indptr:
        expected.insert(0, lengths.qo_indptr)
    for buffer, values in zip(buffers, expected, strict=True):
        np.testing.assert_array_equal(buffer.get()[: len(values)], values)
    for launch in plan.on_device(0).launches:
        params = dict(zip(PLAN_FIELDS, launch.parameters, strict=True))
        assert params["page_indices"] == indices.data.ptr


def index_arrays(kind: type, batch: Lengths, page_size: int, seed: int) -> list[np.ndarray]:
    """As `plan()` takes them; no page twice."""
    pages = [-(-kv_len // page_size) for _, kv_len in batch]
    last = [(kv_len - 1) % page_size + 1 if kv_len else 0 for _, kv_len in batch]
    indices = np.random.default_rng(seed).permutation(1000)[: sum(pages)]
    arrays = [np.cumsum([0, *pages]), indices, np.array(last, np.int64)]
    return arrays if kind is Decode else [np.cumsum([0, *(qo for qo, _ in batch)]), *arrays]


lengths = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 900)), max_size=4)


@both_kinds
@pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning")
@given(
    st.lists(lengths, min_size=2, max_size=5),
    st.tuples(st.sampled_from([1, 4]), st.integers(1, 3), st.sampled_from([64, 128])),
    st.sampled_from([{}, {"disable_split_kv": True}, {"fixed_split_size": 2}]),
    st.tuples(st.integers(1, 9), st.booleans(), st.booleans()),
    st.integers(0, 2**32 - 1),
)
def test_plans_one_after_the_other_in_one_place(
    machine: Machine,
    kind: type,
    steps: list[Lengths],
    heads: tuple[int, int, int],
    options: dict[str, Any],
    ways: tuple[int, bool, bool],
    seed: int,
) -> None:
    """Once a run is recorded, addresses stay, and a plan fits what lies there or is refused."""
    q_len, given_buffers, more_rows = ways
    group, num_kv_heads, head_dim = heads
    page_size = 16
    if kind is Decode:
        options = options | {"q_len_per_req": q_len}
        steps = [[(q_len, kv_len) for _, kv_len in step] for step in steps]
    rows = [sum(qo_len for qo_len, _ in step) for step in steps]
    machine.blocks.clear()
    buffers = buffers_of(kind, 4, 4 * 57) if given_buffers else None
    wrapper = graphed(kind, buffers or {"max_batch_size": 4, "max_num_pages": 4 * 57})
    geometry = (group * num_kv_heads, num_kv_heads, head_dim, page_size)

    def plan(step: int) -> None:
        wrapper.plan(*index_arrays(kind, steps[step], page_size, seed + step), *geometry, **options)
        check_written(machine, wrapper, buffers)

    plan(0)
    most_rows = max(rows) if more_rows else rows[0]
    record(machine, wrapper, most_rows, 1000)
    held = launches_of(wrapper)
    for step in range(1, len(steps)):
        if rows[step] > (most_rows if kind is Decode else rows[0]):
            with pytest.raises(ValueError, match=rf"^the batch has {rows[step]} rows of q, "):
                plan(step)
        else:
            plan(step)
        assert launches_of(wrapper) == held


@both_kinds
def test_before_a_run_is_recorded_arrays_grow(machine: Machine, kind: type) -> None:
    wrapper = graphed(kind, {"max_batch_size": 4, "max_num_pages": 99})
    for heads, batch in ((2, [(1, 5)]), (2, [(1, 900), (1, 300)]), (4, [(1, 20)]), (4, [])):
        arrays = index_arrays(kind, batch, 16, 1)
        wrapper.plan(*arrays, heads, 2, 64, 16)
        check_written(machine, wrapper, None)


# What a recorded run refuses

RECORDED = "run() was recorded in a CUDA graph with it"
FOUR_REQUESTS = {"indptr": ints(0, 1, 2, 3, 3), "last_page_len": ints(4, 16, 3, 0)}
#: Changes of a call of decoding with OWN buffers, recorded with 3 rows and a cache of 5 pages.
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        FOUR_REQUESTS,
        "indptr has 5 entries, expected at most 4: the buffers of use_cuda_graph=True are for "
        "3 requests",
    ),
    (
        {"indptr": ints(0, 2, 6, 6), "indices": ints(4, 1, 0, 2, 3, 5)},
        "indptr[3] = 6, expected at most 5: the buffers of use_cuda_graph=True are for so many "
        "pages",
    ),
    (
        {"indices": ints(4, 5, 0)},
        "indices[1] = 5 (request 0, its page 1), expected 0..4: the cache holds 5 pages",
    ),
    ({"num_qo_heads": 8}, f"num_qo_heads = 8, expected 4: {RECORDED}"),
    ({"num_kv_heads": 4}, f"num_kv_heads = 4, expected 2: {RECORDED}"),
    ({"head_dim": 128}, f"head_dim = 128, expected 64: {RECORDED}"),
    ({"page_size": 32}, f"page_size = 32, expected 16: {RECORDED}"),
    ({"sm_scale": 0.5}, f"sm_scale = 0.5, expected 0.125: {RECORDED}"),
    ({"q_data_type": "bfloat16"}, f"q_data_type = bfloat16, expected float16: {RECORDED}"),
    ({"q_len_per_req": 2}, f"q_len_per_req = 2, expected 1: {RECORDED}"),
    ({"fixed_split_size": 2}, f"fixed_split_size = 2, expected None: {RECORDED}"),
    ({"disable_split_kv": True}, f"disable_split_kv = True, expected False: {RECORDED}"),
]
PREFILL_REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {
            "qo_indptr": ints(0, 1, 2, 3, 4),
            "paged_kv_indptr": ints(0, 1, 2, 3, 3),
            "paged_kv_last_page_len": ints(4, 16, 3, 0),
        },
        "paged_kv_indptr has 5 entries, expected at most 4: the buffers of use_cuda_graph=True are "
        "for 3 requests",
    ),
    (
        {"paged_kv_indices": ints(4, 5, 0)},
        "paged_kv_indices[1] = 5 (request 0, its page 1), expected 0..4: the cache holds 5 pages",
    ),
    (
        {"qo_indptr": ints(0, 3, 8, 10)},
        "the batch has 10 rows of q, expected at most 9: run() was recorded in a CUDA graph with "
        "so many",
    ),
    ({"causal": True}, f"causal = True, expected False: {RECORDED}"),
]


@pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning")
@pytest.mark.parametrize(
    ("kind", "arguments", "rows", "refused"),
    [(Decode, plan_arguments, 3, REFUSED), (Wrapper, prefill_arguments, 9, PREFILL_REFUSED)],
)
def test_a_plan_that_does_not_fit_is_refused_and_nothing_is_written(
    machine: Machine, kind: type, arguments: Any, rows: int, refused: Any
) -> None:
    wrapper = graphed(kind)
    wrapper.plan(**arguments())
    record(machine, wrapper, rows)
    before, plan = [block.bytes.copy() for block in machine.blocks], wrapper._plan
    for changes, message in refused:
        check_error(ValueError, message, wrapper.plan, **arguments(**changes))
        assert wrapper._plan is plan
        for block, held in zip(machine.blocks, before, strict=True):
            np.testing.assert_array_equal(block.bytes, held)
    check_error(
        RuntimeError,
        "reset_workspace_buffer() after run() was recorded in a CUDA graph, which holds the "
        "present workspace: use another wrapper",
        wrapper.reset_workspace_buffer,
        None,
    )


def test_the_fewest_rows_and_pages_of_all_recorded_runs_count(machine: Machine) -> None:
    """Each layer has its own cache, each graph maybe its own number of rows."""
    wrapper = graphed(Decode)
    two = {"indptr": ints(0, 1, 2), "last_page_len": ints(4, 16), "indices": ints(0, 1)}
    wrapper.plan(**plan_arguments(**two))
    for rows, pages in ((3, 5), (2, 9), (3, 4)):
        record(machine, wrapper, rows, pages)
    wrapper.plan(**plan_arguments(**two))
    check_error(
        ValueError,
        "indices[0] = 4 (request 0, its page 0), expected 0..3: the cache holds 4 pages",
        wrapper.plan,
        **plan_arguments(**two | {"indices": ints(4, 1)}),
    )
    check_error(
        ValueError,
        "the batch has 3 rows of q, expected at most 2: run() was recorded in a CUDA graph with so "
        "many",
        wrapper.plan,
        **plan_arguments(indices=ints(3, 1, 0)),
    )


def test_a_run_that_is_not_recorded_holds_nothing(machine: Machine) -> None:
    wrapper = graphed(Decode)
    wrapper.plan(**plan_arguments())
    wrapper.plan(**plan_arguments(num_qo_heads=8))
    wrapper.reset_workspace_buffer(None)


def test_fixed_splits_that_no_workspace_holds(machine: Machine) -> None:
    """Two splits of 16 rows for each of 2 KV heads; without a workspace, prefill has 128 MiB."""
    size = 2 * 16 * (64 + 1) * 4
    words = (
        "fixed_split_size = 1 takes {} bytes of partial states, expected at most {}: give a "
        "float_workspace_buffer of as many bytes before run() is recorded in a CUDA graph"
    )
    for kind, arguments in ((Decode, plan_arguments()), (Wrapper, prefill_arguments())):
        short = ndarray(np.zeros(2 * size - 1, np.uint8))
        wrapper = graphed(kind, float_workspace_buffer=short)
        message = words.format(2 * size, 2 * size - 1)
        check_error(ValueError, message, wrapper.plan, **arguments, fixed_split_size=1)
        wrapper.reset_workspace_buffer(ndarray(np.zeros(2 * size, np.uint8)))
        wrapper.plan(**arguments, fixed_split_size=1)
    pages = (128 << 20) // size + 1
    wrapper = graphed(Wrapper, {"max_batch_size": 1, "max_num_pages": pages})
    check_error(
        ValueError,
        words.format(pages * size, (pages - 1) * size),
        wrapper.plan,
        *([0, 1], [0, pages], np.arange(pages), [1], 4, 2, 64, 1),
        fixed_split_size=1,
    )


def test_a_plan_whose_workspace_is_reset_is_not_recorded_and_lost(machine: Machine) -> None:
    """What is recorded between `reset_workspace_buffer()` and `plan()` would not be followed."""
    wrapper = graphed(Decode)
    wrapper.plan(**plan_arguments())
    wrapper.reset_workspace_buffer(None)
    machine.capturing = True
    check_error(
        RuntimeError,
        "run() is being recorded in a CUDA graph after reset_workspace_buffer(): plan() before",
        *(cuda.run, wrapper._plan.on_device(0), machine.stream.ptr),
        *(*test_launch.tensors(), None, (1.0, 1.0, 1.0)),
    )
    machine.capturing = False
    wrapper.plan(**plan_arguments())
    assert wrapper._plan.on_device(0).recordable


@both_kinds
def test_a_plan_on_another_stream_waits_for_runs_of_the_one_before(
    machine: Machine, kind: type
) -> None:
    """It writes into the arrays that they may still be reading."""
    wrapper = graphed(kind)
    arguments = plan_arguments() if kind is Decode else prefill_arguments()
    wrapper.plan(**arguments)
    first, machine.stream = machine.stream, Stream(8)
    wrapper.plan(**arguments)
    assert machine.stream.work[0] is first
    assert "copy" in machine.stream.work


@pytest.mark.parametrize("options", [{"use_cuda_graph": True, **OWN}, {"backend": "cuda"}])
def test_plan_while_its_stream_captures(machine: Machine, options: dict[str, Any]) -> None:
    """Its copies would be recorded, from pinned memory that later plans write to."""
    wrapper = Decode(**options)
    machine.capturing = True
    with pytest.raises(RuntimeError, match=r"^plan\(\) .*CUDA graph"):
        wrapper.plan(**plan_arguments())
    machine.capturing = False
    assert machine.stream.work == []
    check_error(RuntimeError, "run() before plan()", wrapper.run, None, None)


def test_run_before_plan_and_host_arrays(machine: Machine) -> None:
    wrapper = graphed(Decode)
    assert wrapper.is_cuda_graph_enabled
    q, pages = np.zeros((3, 4, 64), np.float16), np.zeros((5, 2, 16, 2, 64), np.float16)
    check_error(RuntimeError, "run() before plan()", wrapper.run, q, pages)
    wrapper.plan(**plan_arguments())
    message = "q is on the host, expected a CUDA device: use_cuda_graph=True"
    check_error(ValueError, message, wrapper.run, q, pages)
    message = "q has 2 rows, expected at least 3 = requests * q_len_per_req"
    check_error(ValueError, message, wrapper.run, q[:2], pages)


def test_an_eager_plan_is_not_recorded_on_another_stream(machine: Machine) -> None:
    machine.capturing = True
    check_error(
        RuntimeError,
        "run() is being recorded in a CUDA graph on another stream than plan()'s: construct the "
        "wrapper with use_cuda_graph=True",
        *(cuda.run, test_launch.plan_of(), 8, *test_launch.tensors(), None, (1.0, 1.0, 1.0)),
    )


def test_a_workspace_away_from_the_device(machine: Machine) -> None:
    host, there = np.zeros(100, np.uint8), ndarray(np.zeros(100, np.uint8), device=1)
    table = [
        (host, OWN, "the host, expected a CUDA device: use_cuda_graph=True"),
        (host, buffers_of(Decode), "the host, expected cuda:0 as the buffers are"),
        (there, buffers_of(Decode), "cuda:1, expected cuda:0 as the buffers are"),
    ]
    for workspace, sizes, words in table:
        wrapper = Decode(workspace, use_cuda_graph=True, **sizes)
        message = f"float_workspace_buffer is on {words}"
        check_error(ValueError, message, wrapper.plan, **plan_arguments())
