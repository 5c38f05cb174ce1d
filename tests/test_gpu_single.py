"""Single requests on a GPU: calls in flight on streams and threads, and the plans they find."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from graph_calls import with_cupy
from single_calls import DECODING, Case, Layer, count_plans

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The schedules of all plans that are made; nothing is kept before."""
    return count_plans(monkeypatch)


def test_calls_on_two_streams_share_no_plan(
    cp: Any, rng: np.random.Generator, late_write: Any, plans: list[Any]
) -> None:
    """In flight at once, each with its own counters and partial states."""
    of = with_cupy(cp)
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
    pairs = [[Layer(of, DECODING) for _ in streams] for _ in range(10)]
    layers = [layer for pair in pairs for layer in pair]
    idle = [cp.empty(1, cp.float32) for _ in streams]
    for _ in range(2):
        for layer in layers:
            layer.put(rng)
        cp.cuda.Device().synchronize()
        for stream, word in zip(streams, idle, strict=True):
            with stream:
                late_write(word, 0)
        for pair in pairs:
            for stream, layer in zip(streams, pair, strict=True):
                with stream:
                    layer.call()
        cp.cuda.Device().synchronize()
        for layer in layers:
            layer.check()
    assert len(plans) == 2


def test_threads_with_streams_of_their_own(cp: Any, rng: np.random.Generator) -> None:
    of, failures, done = with_cupy(cp), [], []

    def work(seed: int) -> None:
        own = np.random.default_rng(seed)
        with cp.cuda.Device(0), cp.cuda.Stream(non_blocking=True) as stream:
            layer = Layer(of, DECODING)
            for _ in range(8):
                layer.put(own)
                layer.call()
                stream.synchronize()
                try:
                    layer.check()
                except AssertionError as error:
                    failures.append(f"seed {seed}: {error}")
        done.append(seed)

    seeds = rng.integers(0, 2**32, 4).tolist()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(done) == sorted(seeds)


def test_plans_that_are_dropped_while_work_is_in_flight(
    cp: Any, rng: np.random.Generator, late_write: Any
) -> None:
    """More shapes than plans are kept: the memory of the dropped ones is another's."""
    of = with_cupy(cp)
    layers = [Layer(of, Case(1, 2000 + i, decodes=True)) for i in range(40)]
    for layer in layers:
        layer.put(rng)
        layer.call()  # kernels are loaded
    idle = cp.empty(1, cp.float32)
    for layer in layers:
        layer.put(rng)
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True):
        late_write(idle, 0)
        for layer in layers:
            layer.call()
    cp.cuda.Device().synchronize()
    for layer in layers:
        layer.check()
