"""Plans of single requests: kept for calls like the one before, and for CUDA graphs.

A plan has memory that its kernels work in, so no two streams may run one at once:

- A call finds the plans of its own thread and stream alone. Threads are told apart because the
  default stream of each may go by the same number.
- A plan that a graph holds is no call's any longer: nobody knows where the graph is replayed. It
  stays as it is until the process ends, since nobody says either when the last replay was.
- A recording takes a plan that its own thread has called, by preference on the same stream, and
  finds it again for the graph's other layers. Where there is none, it shares that of the graph
  recorded before on the same stream: PyTorch's compiler calls once, and then records often.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from threading import Lock, local
from typing import Any, NamedTuple

from cupaged import arrays
from cupaged.devices import cupy, is_recorded
from cupaged.kept_plans import KeptPlans
from cupaged.ragged import BatchPrefillWithRaggedKVCacheWrapper
from cupaged.spec import AttentionSpec

#: More than layers of a model differ in. Each holds memory on its device.
_MOST_PLANS = 16


class SingleRequestWrapper(BatchPrefillWithRaggedKVCacheWrapper):
    """A wrapper whose plan is kept, with no more memory than its request takes."""

    _devices_build = False


class Call(NamedTuple):
    """All that the plan of a single request depends on.

    Attributes
    ----------
    spec : AttentionSpec
        Without a custom mask, whose bits a plan depends on.
    qo_len, kv_len : int
    kv_layout, backend : str
        The wrapper's.
    """

    spec: AttentionSpec
    qo_len: int
    kv_len: int
    kv_layout: str
    backend: str


class Place(NamedTuple):
    """Where a call works.

    Attributes
    ----------
    device : int or None
        CUDA device, None for the host.
    stream : int
    thread : object
        Who calls. On the host there is no memory to share: None, and any thread may run a plan.
    """

    device: int | None
    stream: int
    thread: object


class _Recorded(NamedTuple):
    """A plan that graphs hold, and the last of them."""

    graph: int
    wrapper: SingleRequestWrapper


class _Thread(local):
    """An object for each thread. Unlike a thread's number no later one has it."""

    def __init__(self) -> None:
        self.token = object()


_thread = _Thread()
_kept: KeptPlans[tuple[Call, Place], SingleRequestWrapper] = KeptPlans(_MOST_PLANS)
# The last one of each list serves the next recording; the others are held by graphs alone.
_recorded: dict[tuple[Call, Place], list[_Recorded]] = {}
_recorded_lock = Lock()


def place_of(q: Any) -> Place:
    """Where a call with these queries works."""
    device = arrays.device_id(arrays.import_tensor(q, "q"))
    if device is None:
        return Place(None, 0, None)
    return Place(device, arrays.caller_stream(q, device), _thread.token)


def find(call: Call, place: Place, function: str) -> SingleRequestWrapper | None:
    """The wrapper with the plan of a call; None where it has to be made.

    Parameters
    ----------
    call : Call
    place : Place
    function : str
        The public function's name.

    Raises
    ------
    RuntimeError
        There is none, and a CUDA graph is being recorded, in which it can't be made.
    """
    if not _is_recorded(place):
        return _kept.get((call, place))
    graph = _graph_of(place.stream)
    with _recorded_lock:
        before = _recorded.get((call, place), [])
        if before and before[-1].graph == graph:
            return before[-1].wrapper
        wrapper = _kept.take((call, place), lambda key: _serves(key, call, place))
        if wrapper is not None:
            _give_to(wrapper, place)
            _recorded[call, place] = [*before, _Recorded(graph, wrapper)]
            return wrapper
        if before:
            before[-1] = before[-1]._replace(graph=graph)
            return before[-1].wrapper
    raise RuntimeError(
        f"{function}() is being recorded in a CUDA graph, and no plan is kept for it: call it once "
        "before, in the same thread, with the same shapes, dtypes and options"
    )


def keep(call: Call, place: Place, wrapper: SingleRequestWrapper) -> None:
    """Keep the plan of a call that has been run: its kernels are loaded then."""
    _kept.put((call, place), wrapper)


def refuse_recorded_mask(place: Place, function: str) -> None:
    """Refuse to record a call whose plan depends on a mask's bits.

    Raises
    ------
    RuntimeError
    """
    if _is_recorded(place):
        raise RuntimeError(
            f"{function}() is being recorded in a CUDA graph with a custom mask, which is read on "
            "the host: record run() of a BatchPrefillWithRaggedKVCacheWrapper made with "
            "use_cuda_graph=True"
        )


def _is_recorded(place: Place) -> bool:
    return place.device is not None and is_recorded(place.stream)


def _serves(key: tuple[Call, Place], call: Call, place: Place) -> bool:
    """Whether a recording may take a plan of another stream.

    What another thread has called may still be running when the graph is replayed.
    """
    own, there = key
    return own == call and (there.device, there.thread) == (place.device, place.thread)


def _give_to(wrapper: SingleRequestWrapper, place: Place) -> None:
    """Let a stream be its plan's own, on which alone a plan may be recorded.

    Nobody else runs the plan from now on, and its memory, freed in the order of that stream, is
    not freed.
    """
    plan = wrapper._plan
    assert plan is not None
    assert place.device is not None
    with arrays.on(place.device, place.stream):
        plan.on_device(place.device).stream = cupy().cuda.get_current_stream()


@cache
def _driver_capture_info() -> Any:
    """The driver's `cuStreamGetCaptureInfo`, which CuPy doesn't wrap."""
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    function = driver.cuStreamGetCaptureInfo_v2
    function.argtypes = [ctypes.c_void_p] * 6
    return function


def _graph_of(stream: int) -> int:
    """The number of the recording that a stream takes part in; another one's differs."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = _driver_capture_info()(
        *(stream, ctypes.addressof(status), ctypes.addressof(number), None, None, None)
    )
    if error:
        raise RuntimeError(f"the CUDA driver can't tell what is being recorded: error {error}")
    return number.value
