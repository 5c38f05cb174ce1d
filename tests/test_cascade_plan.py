"""What a cascade's plan warns of, and what CUDA graphs need of it, without a GPU."""

from __future__ import annotations

import ctypes
import tracemalloc
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_call import INT_MAX, check_error, ints
from small_cascade import Wrapper, of_level_1, plan_arguments, run_arguments

import cupaged
from cupaged import cascade as cascade_room
from cupaged import cascade_scratch
from cupaged.spec import AttentionSpec

# Mistakes

ALREADY_ABOVE = (
    "level 1: request 1 has page 1, which level 0 has for the same rows: its keys will be attended "
    "to twice. Does it repeat the shared prefix?"
)
WARNINGS: list[tuple[dict[str, Any], list[str]]] = [
    (of_level_1("paged_kv_indices_arr", ints(2, 1, 4)), [ALREADY_ABOVE]),
    (
        of_level_1("paged_kv_indices_arr", ints(0, 1, 4)),
        [
            ALREADY_ABOVE.replace("request 1 has page 1,", "request 0 has page 0,").replace(
                "same rows:", "same rows (and 1 more requests like it):"
            )
        ],
    ),
    (
        {"paged_kv_indices_arr": [ints(1, 1), ints(2, 3, 4)]},
        [
            "level 0: request 0 has page 1 twice: its keys will be attended to twice. "
            "Was another page meant in paged_kv_indices?"
        ],
    ),
    (
        {"causal": True, **of_level_1("paged_kv_last_page_len", ints(1, 2, 1))},
        [
            "level 1: request 0 has 3 queries and 1 keys (and 1 more requests like it): with "
            "causal=True its first 2 rows see none of them, and all keys of the other levels. Are "
            "the queries' own keys in the last level, and counted in its paged_kv_indptr and "
            "paged_kv_last_page_len?"
        ],
    ),
    # Nothing to warn of: a page that another group has, requests that share one, fewer keys in a
    # level that is not causal or not the last
    (of_level_1("paged_kv_indices_arr", ints(2, 3, 0)), []),
    (of_level_1("paged_kv_indices_arr", ints(2, 2, 2)), []),
    (of_level_1("paged_kv_last_page_len", ints(1, 2, 1)), []),
    ({"causal": True, "paged_kv_last_page_len": [ints(1, 0), ints(3, 5, 1)]}, []),
    # ... a request without rows
    (
        {
            "qo_indptr_arr": [ints(0, 8, 9), ints(0, 0, 8, 9)],
            "paged_kv_indices_arr": [ints(0, 1), ints(1, 3, 4)],
        },
        [],
    ),
]


def test_high_page_numbers_take_no_more_memory() -> None:
    wrapper = Wrapper(2, backend="reference")
    wrapper.plan(**plan_arguments())  # whatever is loaded or kept at the first call
    tracemalloc.start()
    try:
        with pytest.warns(cupaged.CupagedWarning, match=f"^level 1: request 1 has page {INT_MAX},"):
            wrapper.plan(
                **plan_arguments(paged_kv_indices_arr=[ints(0, INT_MAX), ints(2, INT_MAX, 4)])
            )
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("changes", "messages"), WARNINGS)
def test_warnings(changes: dict[str, Any], messages: list[str]) -> None:
    """Once a plan, at the caller's line, and none of a level's own beside them."""
    wrapper = Wrapper(2, backend="reference")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        wrapper.plan(**plan_arguments(**changes))
        wrapper.run(**run_arguments())
    assert [str(warning.message) for warning in found] == messages
    for warning in found:
        assert warning.category is cupaged.CupagedWarning
        assert warning.filename == __file__
    if messages:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(cupaged.CupagedWarning):
                wrapper.plan(**plan_arguments(**changes))


# CUDA graphs: the wrappers of the levels, as far as that goes without a GPU


class LevelStandIn:
    """A level's wrapper, which remembers what it was given."""

    is_cuda_graph_enabled = True
    kv_layout = "NHD"

    def __init__(self, workspace: Any, **options: Any) -> None:
        self.workspace, self.options = workspace, options
        self.plans: list[tuple[Any, ...]] = []
        self.fails = False

    def planning_place(self, index_arrays: tuple[Any, ...]) -> tuple[None, int]:
        return None, 0

    def plan(self, *arguments: Any, **options: Any) -> None:
        if self.fails:
            raise ValueError("no room")
        self.plans.append((*arguments[:4], options["causal"]))

    def reset_workspace_buffer(self, workspace: Any) -> None:
        self.workspace = workspace


class ScratchStandIn:
    """Remembers how many rows were planned."""

    def __init__(self, num_levels: int) -> None:
        self.num_levels, self.rows = num_levels, []  # type: ignore[var-annotated]

    def plan(self, num_rows: int, spec: AttentionSpec, device: Any, stream: int) -> None:
        self.rows.append(num_rows)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade_room, "BatchPrefillWithPagedKVCacheWrapper", LevelStandIn)
    monkeypatch.setattr(cascade_room, "GraphScratch", ScratchStandIn)
    monkeypatch.setattr(cascade_room.arrays, "on", lambda device, stream: warnings.catch_warnings())
    place = lambda self, index_arrays: (0, 7)  # noqa: E731
    monkeypatch.setattr(LevelStandIn, "planning_place", place)
    monkeypatch.setattr(cascade_room.merge_cuda, "load", lambda *arguments: 1)


BUFFERS = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")


def test_buffers_go_to_their_levels(stand_ins: None) -> None:
    arrays = {f"{name}_buf_arr": [f"{name} {i}" for i in range(3)] for name in BUFFERS}
    wrapper: Any = Wrapper(3, "workspace", "HND", True, backend="cuda", **arrays)
    shared = {"kv_layout": "HND", "use_cuda_graph": True, "backend": "cuda"}
    for i, level in enumerate(wrapper._wrappers):
        assert level.workspace == "workspace"
        assert level.options == shared | {f"{name}_buf": f"{name} {i}" for name in BUFFERS}
    wrapper = Wrapper(2, use_cuda_graph=True, max_batch_size_arr=[1, 5], max_num_pages_arr=(7, 8))
    assert [level.options["max_batch_size"] for level in wrapper._wrappers] == [1, 5]
    assert [level.options["max_num_pages"] for level in wrapper._wrappers] == [7, 8]
    wrapper.reset_workspace_buffer("another")
    assert [level.workspace for level in wrapper._wrappers] == ["another"] * 2
    check_error(
        ValueError,
        "max_batch_size_arr has 1 entry, expected 2: one for each level",
        Wrapper,
        2,
        use_cuda_graph=True,
        max_batch_size_arr=[1],
    )


def test_with_graphs_the_same_wrappers_are_planned_again(stand_ins: None) -> None:
    wrapper: Any = Wrapper(2, use_cuda_graph=True)
    levels = wrapper._wrappers
    for _ in range(3):
        wrapper.plan(**plan_arguments(causal=True))
    assert wrapper._planned.wrappers is levels
    for level in levels:
        assert len(level.plans) == 3
    assert [level.plans[0][-1] for level in levels] == [False, True]
    np.testing.assert_array_equal(levels[1].plans[0][0], [0, 3, 8, 9])
    assert wrapper._graph.rows == [9, 9, 9]


def test_with_graphs_a_plan_that_fails_halfway_is_told(stand_ins: None) -> None:
    """What is in the levels' buffers then is of two plans."""
    wrapper: Any = Wrapper(2, use_cuda_graph=True)
    wrapper.plan(**plan_arguments())
    first, last = wrapper._wrappers
    before = wrapper._planned
    first.fails = True
    check_error(ValueError, "level 0: no room", wrapper.plan, **plan_arguments())
    assert wrapper._planned is before
    first.fails, last.fails = False, True
    check_error(ValueError, "level 1: no room", wrapper.plan, **plan_arguments())
    check_error(
        RuntimeError,
        "run() after plan() failed with some levels planned and others not: plan again",
        wrapper.run,
        **run_arguments(),
    )
    last.fails = False
    wrapper.plan(**plan_arguments())
    assert wrapper._planned is not None


@pytest.mark.parametrize("number", [0, 1])
def test_buffers_without_graphs_are_refused(number: int) -> None:
    arrays = {f"{BUFFERS[0]}_buf_arr": [None, None]}
    arrays[f"{BUFFERS[0]}_buf_arr"][number] = ints(0)
    check_error(
        ValueError,
        f"level {number}: qo_indptr_buf is given, which takes effect with use_cuda_graph=True",
        Wrapper,
        2,
        **arrays,
    )


class DeviceMemory(np.ndarray):
    """Host memory that says that it is a device's."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data, device_id=3)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A device for the memory of cascades, and whether a CUDA graph is being captured there."""
    state = [False]

    def empty(shape: Any, dtype: Any) -> Any:
        return np.full(shape, 77, dtype).view(DeviceMemory)

    def memset(pointer: int, value: int, size: int, stream: int) -> None:
        assert stream == 7
        ctypes.memset(pointer, value, size)

    module = SimpleNamespace(
        empty=empty, cuda=SimpleNamespace(runtime=SimpleNamespace(memsetAsync=memset))
    )
    monkeypatch.setattr(cascade_scratch, "cupy", lambda: module)
    monkeypatch.setattr(cascade_scratch, "is_recorded", lambda stream: state[0])
    monkeypatch.setattr(cascade_scratch.arrays, "device_id", lambda array: array.data.device_id)
    return state


def test_memory_for_graphs_stays_where_it_is(capturing: list[bool]) -> None:
    spec = AttentionSpec(4, 2, 64, 16, False, 0.125, "float16", "NHD")
    memory = cascade_scratch.GraphScratch(3)
    memory.plan(5, spec, 3, 7)
    first = memory.run(5, spec, 3, 7)
    assert first.v.shape == (2, 5, 4, 64)
    assert first.s.shape == (3, 5, 4)
    assert first.mask.tolist() == [1] * 5
    memory.plan(2, spec, 3, 7)
    capturing[0] = True
    assert memory.run(2, spec, 3, 7) is memory.run(5, spec, 3, 7) is first
    assert first.mask.tolist() == [1, 1, 0, 0, 0]
    check_error(
        RuntimeError,
        "run() in the capture of a CUDA graph with 6 rows of q, for which no memory is kept: call "
        "it once before, or plan() with as many rows",
        memory.run,
        *(6, spec, 3, 7),
    )
    capturing[0] = False
    larger = memory.run(6, spec, 3, 7)
    assert larger.mask.tolist() == [1, 1, 0, 0, 0, 0]
    memory.plan(4, spec, 3, 7)
    # A graph may hold either.
    assert first.mask.tolist() == [1] * 4 + [0]
    assert larger.mask.tolist() == [1] * 4 + [0] * 2
    other = AttentionSpec(4, 2, 128, 16, False, 0.125, "bfloat16", "NHD")
    memory.plan(4, other, 3, 7)
    assert memory.run(4, other, 3, 7).v.shape == (2, 4, 4, 128)
    assert memory.run(4, spec, 3, 7) is first


def test_a_capture_without_graphs_is_refused(capturing: list[bool]) -> None:
    cascade_scratch.refuse_capture(7)
    capturing[0] = True
    check_error(
        RuntimeError,
        "run() is being recorded in a CUDA graph: construct the wrapper with use_cuda_graph=True",
        cascade_scratch.refuse_capture,
        7,
    )
