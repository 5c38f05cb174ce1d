"""Which plans of single requests recordings may have, with numbers for streams and graphs."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from single_calls import NO_PLAN, WITH_MASK, count_plans, drawn
from small_call import check_error

import cupaged
from cupaged import single_plans
from cupaged.single_plans import Call, Place
from cupaged.spec import RAGGED, AttentionSpec

prefill, decode = cupaged.single_prefill_with_kv_cache, cupaged.single_decode_with_kv_cache


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The schedules of all plans that are made; nothing is kept before."""
    return count_plans(monkeypatch)


class Wrapper:
    """What stands in for a wrapper with a plan."""


class Graphs:
    """What is being recorded: the number of a graph for each stream."""

    def __init__(self) -> None:
        self.streams: dict[int, int] = {}
        self.given: list[tuple[Any, Place]] = []


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    found = Graphs()
    monkeypatch.setattr(single_plans, "is_recorded", found.streams.__contains__)
    monkeypatch.setattr(single_plans, "_graph_of", found.streams.__getitem__)
    monkeypatch.setattr(
        single_plans, "_give_to", lambda wrapper, place: found.given.append((wrapper, place))
    )
    return found


SPEC = AttentionSpec(4, 2, 64, RAGGED, False, 0.125, "float16", "NHD")


def call_of(kv_len: int = 40) -> Call:
    return Call(SPEC, 1, kv_len, "NHD", "auto")


ME, OTHER = object(), object()
CALL = call_of()


def find(place: Place, call: Call = CALL) -> Any:
    return single_plans.find(call, place, "single_decode_with_kv_cache")


def keep(place: Place, call: Call = CALL) -> Any:
    wrapper: Any = Wrapper()
    single_plans.keep(call, place, wrapper)
    return wrapper


def check_no_plan(place: Place, call: Call = CALL) -> None:
    check_error(RuntimeError, NO_PLAN.format("single_decode_with_kv_cache"), find, place, call)


def test_a_plan_is_of_its_own_thread_stream_and_device(graphs: Graphs) -> None:
    place = Place(0, 7, ME)
    wrapper = keep(place)
    assert find(place) is wrapper
    for other in (Place(1, 7, ME), Place(0, 8, ME), Place(0, 7, OTHER), Place(None, 0, None)):
        assert find(other) is None
    assert find(place, call_of(41)) is None


def test_a_recording_takes_the_plan_of_a_call_on_another_stream(graphs: Graphs) -> None:
    """No call finds it afterwards; the graph's other layers do."""
    before, recorded = Place(0, 7, ME), Place(0, 9, ME)
    wrapper = keep(before)
    graphs.streams[9] = 1
    assert find(recorded) is wrapper
    assert find(recorded) is wrapper
    assert graphs.given == [(wrapper, recorded)]
    assert find(before) is None
    check_no_plan(recorded, call_of(41))
    graphs.streams.clear()
    assert find(recorded) is None
    eager = keep(before)
    assert find(before) is eager


def test_a_recording_takes_the_plan_of_its_own_stream_first(graphs: Graphs) -> None:
    places = [Place(0, stream, ME) for stream in (7, 9, 8)]
    kept = [keep(place) for place in places]
    graphs.streams |= {9: 1, 5: 1}
    assert find(places[1]) is kept[1]
    # Another stream of the same recording; 8 was used last.
    assert find(Place(0, 5, ME)) is kept[2]
    assert find(places[0]) is kept[0]


def test_a_recording_takes_no_plan_of_another_thread_or_device(graphs: Graphs) -> None:
    """Its kernels may be running when the graph is replayed."""
    keep(Place(0, 9, OTHER))
    keep(Place(1, 9, ME))
    graphs.streams[9] = 1
    check_no_plan(Place(0, 9, ME))


def test_graphs_have_plans_of_their_own_or_share_on_a_stream(graphs: Graphs) -> None:
    place, other = Place(0, 9, ME), Place(0, 10, ME)
    first = keep(place)
    graphs.streams |= {9: 1, 10: 2}
    assert find(place) is first
    check_no_plan(other)
    # Another graph on the same stream, without a call before: they share.
    graphs.streams[9] = 3
    assert find(place) is first
    # With one, they don't.
    second = keep(Place(0, 7, ME))
    assert find(place) is first
    graphs.streams[9] = 4
    assert find(place) is second
    assert find(place) is second
    graphs.streams[9] = 5
    assert find(place) is second
    assert graphs.given == [(first, place), (second, place)]


def test_a_recorded_plan_lives_on(graphs: Graphs) -> None:
    place = Place(0, 9, ME)
    alive = []
    for graph in range(3):
        keep(Place(0, 7, ME))
        graphs.streams[9] = graph
        alive.append(weakref.ref(find(place)))
    graphs.streams.clear()
    graphs.given.clear()
    for kv_len in range(single_plans._MOST_PLANS + 1):
        keep(place, call_of(kv_len))
    gc.collect()
    assert None not in [reference() for reference in alive]
    assert len({id(reference()) for reference in alive}) == 3


def test_a_stream_is_made_the_plans_own(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[tuple[int, int]] = []

    def on(device: int, stream: int) -> Any:
        entered.append((device, stream))
        return nullcontext()

    placed = SimpleNamespace(stream="the stream of the call")
    plan = SimpleNamespace(on_device={3: placed}.__getitem__)
    module = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: "the one recorded"))
    monkeypatch.setattr(single_plans.arrays, "on", on)
    monkeypatch.setattr(single_plans, "cupy", lambda: module)
    wrapper: Any = SimpleNamespace(_plan=plan)
    single_plans._give_to(wrapper, Place(3, 9, ME))
    assert placed.stream == "the one recorded"
    assert entered == [(3, 9)]


def test_what_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments in the order of `cuStreamGetCaptureInfo_v2`; those that are not wanted are null."""
    pointer = ctypes.c_void_p
    status = 0

    @ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 6)
    def info(stream: int, state: int, number: int, *rest: Any) -> int:
        assert stream == 77
        assert rest == (None, None, None)
        ctypes.c_int.from_address(state).value = 1
        ctypes.c_uint64.from_address(number).value = 2**40 + 5
        return status

    monkeypatch.setattr(single_plans, "_driver_capture_info", lambda: info)
    assert single_plans._graph_of(77) == 2**40 + 5
    status = 900
    message = "the CUDA driver can't tell what is being recorded: error 900"
    check_error(RuntimeError, message, single_plans._graph_of, 77)


def test_every_thread_has_its_own_token() -> None:
    """Which no later thread has again."""
    tokens = [single_plans._thread.token]

    def note() -> None:
        tokens.extend([single_plans._thread.token] * 2)

    for _ in range(3):
        thread = threading.Thread(target=note)
        thread.start()
        thread.join()
    assert len({id(token) for token in tokens}) == 4
    assert single_plans._thread.token is tokens[0]


def test_where_a_call_works(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    q, *_ = drawn(rng)
    assert single_plans.place_of(q) == (None, 0, None)
    monkeypatch.setattr(single_plans.arrays, "device_id", lambda x: 3)
    monkeypatch.setattr(single_plans.arrays, "caller_stream", lambda x, device: 10 * device)
    assert single_plans.place_of(q) == (3, 30, single_plans._thread.token)


# Recordings, by the public functions


@pytest.fixture
def recorded(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with host arrays pass for calls on a stream that is being recorded."""
    graphs.streams[9] = 1
    monkeypatch.setattr(single_plans, "place_of", lambda q: Place(0, 9, ME))


class Unreadable:
    """A mask that must not be looked at."""


@pytest.mark.parametrize("function", [prefill, decode])
def test_a_recording_without_a_call_before_is_refused(
    rng: np.random.Generator,
    recorded: None,
    plans: list[Any],
    function: Callable[..., Any],
) -> None:
    q, k, v = drawn(rng)
    message = NO_PLAN.format(function.__name__)
    check_error(RuntimeError, message, function, q if function is prefill else q[0], k, v)
    assert plans == []


@pytest.mark.parametrize("name", ["custom_mask", "packed_custom_mask"])
def test_a_mask_is_not_read_while_recording(
    rng: np.random.Generator, recorded: None, plans: list[Any], name: str
) -> None:
    check_error(RuntimeError, WITH_MASK, prefill, *drawn(rng), **{name: Unreadable()})
    assert plans == []


def test_mistakes_are_told_first(rng: np.random.Generator, recorded: None) -> None:
    message = "causal is an int, expected a bool"
    check_error(TypeError, message, prefill, *drawn(rng), causal=1)


def test_a_recorded_call_warns_too(
    rng: np.random.Generator, graphs: Graphs, monkeypatch: Any
) -> None:
    host = drawn(rng, 5, 3)
    monkeypatch.setattr(single_plans, "place_of", lambda q: Place(0, 9, ME))
    for stream in (0, 9):
        if stream:
            graphs.streams[stream] = 1
        with pytest.warns(cupaged.CupagedWarning) as found:
            prefill(*host, causal=True)
        assert [warning.filename for warning in found] == [__file__]
    assert len(graphs.given) == 1
