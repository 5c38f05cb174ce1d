"""CUDA graphs at their edges: streams, workspaces, runs that are not recorded, what is refused."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import replace
from typing import Any

import batches
import numpy as np
import oracle
import pytest
from decode_calls import DECODING, Decode, Decoder, plan_arguments
from gpu_calls import Wrapper, to_gpu, told
from graph_calls import (
    MOST,
    OPTIONS,
    PAGE_SIZE,
    Layer,
    build,
    check_steps,
    graphed,
    steps_of,
    with_cupy,
)
from oracle import Formula
from small_call import check_error
from small_call import plan_arguments as prefill_arguments
from test_graph_plans import OWN, PREFILL_REFUSED, REFUSED

import cupaged
from cupaged import staging
from cupaged.frames import bytes_of_a_partial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning"),
]
both_families = pytest.mark.usefixtures("family")


# Streams


def shortened(batch: batches.Batch, rng: np.random.Generator) -> batches.Batch:
    """The same tensors with fewer keys in each request."""
    kv_len = tuple(int(rng.integers(0, n + 1)) for n in batch.kv_len)
    pages = tuple(
        of_request[: -(-n // PAGE_SIZE)] for of_request, n in zip(batch.pages, kv_len, strict=True)
    )
    return replace(batch, kv_len=kv_len, pages=pages)


def test_planned_and_replayed_again_and_again_while_work_is_in_flight(
    cp: Any, rng: np.random.Generator, late_write: Any
) -> None:
    """On one stream: nobody waits for the plan before, whose arrays the next one changes."""
    of = with_cupy(cp)
    batch = build(rng, [(1, 500)] * MOST, group=4)
    layer = Layer(of, batch, rows=MOST)
    wrapper, idle = graphed("decode"), cp.empty(1, cp.float32)
    with cp.cuda.Stream(non_blocking=True) as stream:
        batch.plan(wrapper)
        replay = layer.record(of, wrapper)
        layer.put(batch)
        stream.synchronize()
        late_write(idle, 0)
        steps, results = [shortened(batch, rng) for _ in range(20)], []
        for step in steps:
            step.plan(wrapper)
            replay()
            results.append([x.view(f"u{x.itemsize}").copy() for x in (layer.out, layer.lse)])
        stream.synchronize()
    for i, (step, (out, lse)) in enumerate(zip(steps, results, strict=True)):
        with told(f"plan {i}"):
            oracle.check_all(
                step, DECODING, out.get().view(layer.out.dtype), lse.get().view(np.float32)
            )


def test_eager_runs_on_other_streams_than_their_plans(
    cp: Any, rng: np.random.Generator, late_write: Any
) -> None:
    """A run waits for its plan, and the next plan for the run, whatever streams they are on."""
    of = with_cupy(cp)
    batch = build(rng, [(1, 500)] * MOST, group=4)
    wrapper, idle = graphed("decode"), cp.empty(1, cp.float32)
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(3)]
    steps = [shortened(batch, rng) for _ in range(9)]
    layers = [Layer(of, batch, rows=MOST) for _ in steps]
    batch.plan(wrapper)
    for layer in layers:
        layer.put(batch)
    cp.cuda.Device().synchronize()
    for i, (step, layer) in enumerate(zip(steps, layers, strict=True)):
        with streams[i % 2]:
            late_write(idle, 0)
            step.plan(wrapper)
        with streams[i % 3]:
            late_write(idle, 0)
            layer.run(wrapper)
    cp.cuda.Device().synchronize()
    for i, (step, layer) in enumerate(zip(steps, layers, strict=True)):
        with told(f"plan {i}"):
            layer.check(step)


# Without a recording


@both_families
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_eager_runs_of_a_wrapper_for_graphs(cp: Any, rng: np.random.Generator, kind: str) -> None:
    """Before anything is recorded all may change; q may have more rows than the batch."""
    of = with_cupy(cp)
    wrapper = graphed(kind, 3)
    for i, step in enumerate(steps_of(kind, 3)):
        batch = build(rng, step, group=1 + i % 4, head_dim=64 * (1 + i % 2))
        batch.plan(wrapper, causal=True, **OPTIONS[i % 3])
        layer = Layer(of, batch, rows=max(batch.nnz_qo + i % 2, 1))
        layer.put(batch)
        layer.run(wrapper)
        layer.check(batch)


# Workspaces


def test_splits_stay_within_the_workspace(cp: Any, rng: np.random.Generator) -> None:
    """Ten partial states: fixed splits that need more are refused, others are not made."""
    of = with_cupy(cp)
    fits = build(rng, [(1, 5 * 48), (1, 5 * 48)], group=4, head_dim=128)
    large = build(rng, [(1, 5 * 48), (1, 5 * 48), (1, 49)], group=4, head_dim=128)
    longer = build(rng, [(1, 2900)], group=4, head_dim=128)
    probe = Decoder(backend="cuda")
    fits.plan(probe, fixed_split_size=3)
    size = bytes_of_a_partial(probe.schedule.spec, probe.schedule.launches[0].config)
    guard, needed = 4096, 10 * size
    assert probe.schedule.workspace_bytes == needed
    memory = cp.empty(needed + 2 * guard, np.uint8)
    cp.cuda.runtime.memset(memory.data.ptr, 0xFF, memory.nbytes)
    workspace = memory[guard : guard + needed]
    for options in ({"fixed_split_size": 3}, {}):
        wrapper = graphed("decode", float_workspace_buffer=workspace)
        layer = Layer(of, fits)
        fits.plan(wrapper, **options)
        replay = layer.record(of, wrapper)
        layer.put(fits)
        replay()
        layer.check(fits)
        if options:
            check_error(
                ValueError,
                f"fixed_split_size = 3 takes {12 * size} bytes of partial states, expected at most "
                f"{needed}: give a float_workspace_buffer of as many bytes before run() is "
                "recorded in a CUDA graph",
                *(large.plan, wrapper),
                **options,
            )
        for batch in (fits,) if options else (longer, fits):
            batch.plan(wrapper, **options)
            layer.put(batch)
            replay()
            layer.check(batch)
    after = memory.get()
    assert (after[:guard] == 0xFF).all()
    assert (after[-guard:] == 0xFF).all()
    assert not (after[guard:-guard] == 0xFF).all()


# What is refused


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_what_a_recorded_run_refuses_leaves_the_plan_before(
    cp: Any, rng: np.random.Generator, kind: str
) -> None:
    of = with_cupy(cp)
    decode = kind == "decode"
    arguments, refused = (
        (plan_arguments, REFUSED) if decode else (prefill_arguments, PREFILL_REFUSED)
    )
    wrapper = (Decode if decode else Wrapper)(use_cuda_graph=True, **OWN)
    wrapper.plan(**arguments())
    batch = batches.build(
        rng, [1] * 3 if decode else [3, 5, 1], [20, 16, 0], num_kv_heads=2, group=2, spare_pages=2
    )
    assert batch.cache_views[0].storage.shape[0] == 5
    batch = replace(batch, pages=((4, 1), (0,), ()))
    for view in batch.cache_views:
        view.storage[...] = rng.standard_normal(view.storage.shape)
    layer = Layer(of, batch, rows=batch.nnz_qo)
    replay = layer.record(of, wrapper)
    layer.put(batch)
    for changes, message in refused:
        check_error(ValueError, message, wrapper.plan, **arguments(**changes))
    message = (
        "reset_workspace_buffer() after run() was recorded in a CUDA graph, which holds the "
        "present workspace: use another wrapper"
    )
    check_error(RuntimeError, message, wrapper.reset_workspace_buffer, None)
    replay()
    layer.check(batch, Formula(causal=False))


def test_run_before_plan_is_refused_while_recording_too(cp: Any, rng: np.random.Generator) -> None:
    of = with_cupy(cp)
    batch = build(rng, [(1, 300), (1, 9)])
    wrapper, layer = graphed("decode"), Layer(with_cupy(cp), batch)
    of.record(lambda: check_error(RuntimeError, "run() before plan()", layer.run, wrapper))
    check_steps(of, wrapper, [batch, build(rng, [(1, 20)])], DECODING)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_wrapper_without_graphs_is_not_recorded_on_another_stream(
    cp: Any, rng: np.random.Generator, kind: str
) -> None:
    of = with_cupy(cp)
    batch = build(rng, steps_of(kind)[0])
    wrapper: Any = Decoder() if kind == "decode" else Wrapper()
    batch.plan(wrapper, causal=True)
    layer = Layer(of, batch, rows=batch.nnz_qo)
    layer.put(batch)
    message = (
        "run() is being recorded in a CUDA graph on another stream than plan()'s: construct the "
        "wrapper with use_cuda_graph=True"
    )
    of.record(lambda: check_error(RuntimeError, message, layer.run, wrapper))
    assert np.isnan(layer.result()[0]).all()
    layer.run(wrapper)
    layer.check(batch)


@pytest.mark.parametrize("which", ["q", "out"])
def test_what_goes_by_way_of_a_copy_is_not_recorded(
    cp: Any, rng: np.random.Generator, which: str
) -> None:
    """The copy's memory is someone else's by the time of the replay."""
    of = with_cupy(cp)
    batch = build(rng, [(1, 300), (1, 9)])
    wrapper, layer = graphed("decode"), Layer(of, batch, rows=2)
    batch.plan(wrapper)
    setattr(layer, which, to_gpu(np.zeros((2, 2, 65), np.float16))[..., 1:])

    def refused() -> None:
        with pytest.raises(ValueError, match=rf"^{which} .* 16"):
            layer.run(wrapper)

    of.record(refused)


def test_a_plan_is_not_recorded(
    cp: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether for graphs or not; and no later plan suffers from the attempt."""
    monkeypatch.setattr(staging, "_staging", defaultdict(list))  # its events are queried later
    of = with_cupy(cp)
    batch = build(rng, [(1, 300), (1, 9)])

    def refused(wrapper: Any) -> None:
        with pytest.raises(RuntimeError, match=r"^plan\(\) .*CUDA graph"):
            batch.plan(wrapper)

    for wrapper in (graphed("decode"), Decoder(backend="cuda")):
        of.record(lambda wrapper=wrapper: refused(wrapper))
        batch.plan(wrapper)
        layer = Layer(of, batch, rows=2)
        layer.put(batch)
        layer.run(wrapper)
        layer.check(batch)


@pytest.mark.usefixtures("two_gpus")
def test_a_plan_for_graphs_is_for_one_device(cp: Any, rng: np.random.Generator) -> None:
    batch = build(rng, [(1, 300), (1, 9)])
    wrapper = graphed("decode")
    batch.plan(wrapper)
    with cp.cuda.Device(1):
        there = batch.on(to_gpu)
    message = "q is on cuda:1, expected cuda:0: with use_cuda_graph=True a plan is for one device"
    check_error(ValueError, message, wrapper.run, there.q, there.cache)
    layer = Layer(with_cupy(cp), batch)
    layer.put(batch)
    layer.run(wrapper)
    layer.check(batch)


def test_warnings_stay_with_the_plan(rng: np.random.Generator, cp: Any) -> None:
    wrapper = graphed("decode", 5)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        build(rng, [(5, 3)]).plan(wrapper)
    assert [warning.category for warning in found] == [cupaged.CupagedWarning]
