"""Single requests that CUDA graphs hold, recorded by CuPy, PyTorch and PyTorch's compiler."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpu_calls import to_gpu, told
from graph_calls import Framework, put, take, with_cupy, with_torch
from oracle import Formula
from processes import run_python
from single_calls import DECODING, NO_PLAN, WITH_MASK, Case, Layer, check, count_plans
from small_call import check_error

import cupaged
from cupaged import single_plans

pytestmark = pytest.mark.gpu

CASES = {
    "prefill": Case(130, 300, {"causal": True}),
    "few queries": Case(3, 5000, {"causal": True, "window_left": 4000}, dtype="bfloat16"),
    "decoding": DECODING,
    "short decoding": Case(1, 20, {"logits_soft_cap": 3.0, "v_scale": -2.0}, True, "bfloat16"),
}


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The schedules of all plans that are made; nothing is kept before."""
    gc.collect()  # a graph of an earlier test that goes while another is recorded ends that
    return count_plans(monkeypatch)


@pytest.fixture(params=["cupy", "torch"])
def of(cp: Any, request: pytest.FixtureRequest) -> Framework:
    """Each framework, one after the other."""
    if request.param == "cupy":
        return with_cupy(cp)
    return with_torch(request.getfixturevalue("torch"))


@pytest.fixture
def beside(cp: Any, of: Framework) -> Callable[[Callable[[], Any]], None]:
    """Calls something on another stream than the current one, and waits for it."""

    def call(function: Callable[[], Any]) -> None:
        cp.cuda.Device().synchronize()
        if _is_torch(of):
            import torch

            with torch.cuda.stream(torch.cuda.Stream()):
                function()
        else:
            with cp.cuda.Stream(non_blocking=True):
                function()
        cp.cuda.Device().synchronize()

    return call


def _is_torch(of: Framework) -> bool:
    return type(of.empty((1,), "float16")).__module__.startswith("torch")


def synchronize() -> None:
    import cupy

    cupy.cuda.Device().synchronize()


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_call_reads_what_is_there_at_the_replay(
    of: Framework,
    rng: np.random.Generator,
    beside: Callable[[Callable[[], Any]], None],
    plans: list[Any],
    name: str,
) -> None:
    """After calls on another stream, and with calls between the replays."""
    layer, eager = Layer(of, CASES[name]), Layer(of, CASES[name])
    layer.put(rng)
    beside(lambda: [layer.call() for _ in range(3)])
    layer.check()
    assert len(plans) == 1
    replay = of.record(layer.call)
    assert len(plans) == 1
    for step in range(4):
        layer.put(rng)
        eager.put(rng)
        synchronize()
        replay()
        eager.call()
        synchronize()
        with told(f"step {step}"):
            layer.check()
            eager.check()
    # The graph's plan is its own.
    assert len(plans) == 2


def test_a_recorded_call_writes_nothing_but_its_result(cp: Any, rng: np.random.Generator) -> None:
    """Not even an LSE that nobody asked for: what the pool has is another's at the replay."""
    of = with_cupy(cp)
    layer = Layer(of, DECODING)
    layer.put(rng)
    synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        cupaged.single_decode_with_kv_cache(layer.q, layer.k, layer.v)
        stream.begin_capture()
        try:
            out = cupaged.single_decode_with_kv_cache(layer.q, layer.k, layer.v)
        finally:
            graph = stream.end_capture()
        later = [to_gpu(np.full(n, 7, np.float32)) for n in (1, 64, 256, 4096) for _ in range(8)]
        layer.put(rng)
        graph.launch()
        stream.synchronize()
        assert all((take(x) == 7).all() for x in later)
        check(layer.host, Formula(), take(out)[None])


def test_layers_in_one_graph_have_one_plan(
    of: Framework,
    rng: np.random.Generator,
    beside: Callable[[Callable[[], Any]], None],
    plans: list[Any],
) -> None:
    layers = [Layer(of, CASES[name]) for name in ("decoding", "prefill") * 3]
    for layer in layers:
        layer.put(rng)
    beside(lambda: [layer.call() for layer in layers])
    replay = of.record(lambda: [layer.call() for layer in layers])
    for _ in range(2):
        for layer in layers:
            layer.put(rng)
        synchronize()
        replay()
        synchronize()
        for layer in layers:
            layer.check()
    assert len(plans) == 2


def test_graphs_that_are_replayed_at_once(
    cp: Any,
    of: Framework,
    rng: np.random.Generator,
    beside: Callable[[Callable[[], Any]], None],
    late_write: Any,
    plans: list[Any],
) -> None:
    """Each after a call of its own, so that each has a plan of its own."""
    layers, replays = [Layer(of, DECODING) for _ in range(2)], []
    for layer in layers:
        layer.put(rng)
        beside(layer.call)
        replays.append(of.record(layer.call))
    assert len(plans) == 2
    streams = [cp.cuda.Stream(non_blocking=True) for _ in layers]
    idle = [cp.empty(1, cp.float32) for _ in layers]
    for _ in range(3):
        for layer in layers:
            layer.put(rng)
        synchronize()
        for stream, replay, word in zip(streams, replays, idle, strict=True):
            _replay_on(of, stream, replay, lambda word=word: late_write(word, 0))
        synchronize()
        for layer in layers:
            layer.check()


def _replay_on(
    of: Framework, stream: Any, replay: Callable[[], None], before: Callable[[], None]
) -> None:
    """Ten replays on a stream of CuPy's, behind something slow."""
    if _is_torch(of):
        import torch

        with stream:
            before()
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            for _ in range(10):
                replay()
        return
    with stream:
        before()
        for _ in range(10):
            replay()


def test_graphs_recorded_after_one_call(cp: Any, torch: Any, rng: np.random.Generator) -> None:
    """On one stream, which PyTorch's recordings are by default; replayed after each other."""
    of = with_torch(torch)
    layers = [Layer(of, DECODING) for _ in range(3)]
    for layer in layers:
        layer.put(rng)
    layers[0].call()
    replays = [of.record(layer.call) for layer in layers]
    for i in (0, 1, 2, 1, 0):
        layers[i].put(rng)
        synchronize()
        replays[i]()
        synchronize()
        layers[i].check()


@pytest.mark.parametrize("decodes", [False, True])
def test_recording_without_a_call_before_is_refused(
    of: Framework,
    rng: np.random.Generator,
    beside: Callable[[Callable[[], Any]], None],
    decodes: bool,
) -> None:
    """The recording goes on, and a call makes good what was missing."""
    case = Case(1, 333, decodes=decodes)
    layer, other = Layer(of, case), Layer(of, Case(1, 334, decodes=decodes))
    layer.put(rng)
    other.put(rng)
    beside(other.call)
    message = NO_PLAN.format(case.function.__name__)

    def refused() -> None:
        check_error(RuntimeError, message, layer.call)
        other.call()

    for layers, recorded in (([other], refused), ([layer, other], None)):
        if recorded is None:
            beside(layer.call)
            beside(other.call)
        replay = of.record(recorded or (lambda: [layer.call(), other.call()]))
        for each in layers:
            each.put(rng)
        synchronize()
        replay()
        synchronize()
        for each in layers:
            each.check()


def test_recording_what_another_thread_has_called_is_refused(
    cp: Any, rng: np.random.Generator
) -> None:
    """Its kernels may be running when the graph is replayed."""
    of = with_cupy(cp)
    layer, own = Layer(of, Case(1, 345, decodes=True)), Layer(of, Case(1, 346, decodes=True))
    layer.put(rng)
    own.put(rng)

    def call() -> None:
        with cp.cuda.Device(0):
            layer.call()

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    own.call()
    message = NO_PLAN.format("single_decode_with_kv_cache")

    def recorded() -> None:
        check_error(RuntimeError, message, layer.call)
        own.call()

    of.record(recorded)


def test_recording_with_a_mask_is_refused(
    of: Framework, rng: np.random.Generator, beside: Callable[[Callable[[], Any]], None]
) -> None:
    """And the mask, on the device, is not read, which would end the recording."""
    case = Case(5, 40)
    layer = Layer(of, case)
    layer.put(rng)
    mask = of.empty((5, 40), "uint8")
    put(mask, np.ones((5, 40), np.uint8))

    def masked() -> None:
        case.function(layer.q, layer.k, layer.v, custom_mask=mask)

    beside(lambda: (masked(), layer.call()))

    def recorded() -> None:
        check_error(RuntimeError, WITH_MASK, masked)
        layer.call()

    replay = of.record(recorded)
    layer.put(rng)
    synchronize()
    replay()
    synchronize()
    layer.check()


def test_a_plans_memory_stays_with_the_graph(cp: Any, rng: np.random.Generator) -> None:
    """Others take the plan's place among those that are kept, and the pool is emptied."""
    of = with_cupy(cp)
    layer = Layer(of, DECODING)
    layer.put(rng)
    layer.call()
    replay = of.record(layer.call)
    for i in range(single_plans._MOST_PLANS + 1):
        other = Layer(of, Case(1, 100 + i, decodes=True))
        other.call()
    cp.get_default_memory_pool().free_all_blocks()
    later = [to_gpu(np.full(1 << 18, 0xFF, np.uint8)) for _ in range(16)]
    for _ in range(2):
        layer.put(rng)
        synchronize()
        replay()
        synchronize()
        layer.check()
    assert all((x.get() == 0xFF).all() for x in later)


# PyTorch's compiler, which records by itself

COMPILED = """
import sys
import torch
import cupaged

decodes = sys.argv[1] == "decode"


@torch.library.custom_op("cupaged_test::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if decodes:
        return cupaged.single_decode_with_kv_cache(q, k, v)
    return cupaged.single_prefill_with_kv_cache(q, k, v, causal=True)


@attention.register_fake
def _(q, k, v):
    return torch.empty_like(q)


def call(q, k, v):
    return attention(q, k, v)


compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
for step in range(5):
    shapes = ((8, 128) if decodes else (70, 8, 128)), (256, 4, 128), (256, 4, 128)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.float16) for shape in shapes)
    expected = attention(q, k, v)
    found = compiled(q, k, v)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
print("not recorded:", skipped)
"""


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_what_the_compiler_records(cp: Any, torch: Any, name: str) -> None:
    done = run_python("-c", COMPILED, name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "not recorded: 0"
