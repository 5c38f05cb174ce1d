"""Streams, threads and processes on a GPU: nothing is read too early or overwritten."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batches
import numpy as np
import oracle
import pytest
from gpu_calls import (
    Wrapper,
    planned,
    spinner,
    to_gpu,
    to_host,
    told,
)
from oracle import Formula
from processes import race

import cupaged

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def spin(cp: Any) -> Callable[[], None]:
    """Keep the current stream busy for some 10 ms."""
    return spinner(cp)


def random_batch(rng: np.random.Generator) -> batches.Batch:
    count = int(rng.integers(1, 12))
    qo_len = rng.integers(0, 60, count).tolist()
    kv_len = rng.integers(0, 400, count).tolist()
    return batches.build(rng, qo_len, kv_len, num_kv_heads=2, group=2, head_dim=128)


# Streams and threads


@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 2}])
@pytest.mark.parametrize("with_workspace", [False, True])
def test_planning_anew_while_work_is_in_flight(
    cp: Any,
    rng: np.random.Generator,
    spin: Callable[[], None],
    options: dict[str, Any],
    with_workspace: bool,
) -> None:
    """The plan that is dropped has not been run yet when the next one is made."""
    work = [random_batch(rng) for _ in range(20)]
    on_gpu = [batch.on(to_gpu) for batch in work]
    workspace = cp.empty(64 << 20, np.uint8) if with_workspace else None
    formula = Formula(causal=True)
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        wrapper = Wrapper(workspace, backend="cuda")
        results = []
        spin()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cupaged.CupagedWarning)
            for batch in on_gpu:
                batch.plan(wrapper, causal=True, **options)
                results.append(wrapper.run(batch.q, batch.cache, return_lse=True))
        stream.synchronize()
    for i, (batch, (out, lse)) in enumerate(zip(work, results, strict=True)):
        with told(f"plan {i}"):
            oracle.check_all(batch, formula, to_host(out), to_host(lse))


def test_planned_on_one_stream_and_run_on_another(
    cp: Any, rng: np.random.Generator, spin: Callable[[], None]
) -> None:
    """The upload waits behind a busy stream; the run waits for the upload and not for the host."""
    work = [random_batch(rng) for _ in range(8)]
    planning, running = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    formula = Formula(causal=True)
    wrapper = Wrapper(backend="cuda")
    results = []
    on_gpu = [batch.on(to_gpu) for batch in work]
    cp.cuda.Device().synchronize()
    for batch in on_gpu:
        with warnings.catch_warnings(), planning:
            warnings.simplefilter("ignore", cupaged.CupagedWarning)
            spin()
            batch.plan(wrapper, causal=True, fixed_split_size=3)
        with running:
            results.append(wrapper.run(batch.q, batch.cache, return_lse=True))
    running.synchronize()
    for i, (batch, (out, lse)) in enumerate(zip(work, results, strict=True)):
        with told(f"plan {i}"):
            oracle.check_all(batch, formula, to_host(out), to_host(lse))
    planning.synchronize()


def test_run_follows_what_is_pending_on_its_stream(
    cp: Any, rng: np.random.Generator, spin: Callable[[], None]
) -> None:
    """Queries that arrive late on the caller's stream are read only then."""
    batch = batches.build(rng, [30, 1], [80, 300], group=2)
    on_gpu = batch.on(to_gpu)
    late = cp.empty(on_gpu.q.shape, np.uint16)
    cp.cuda.runtime.memset(late.data.ptr, 0xFF, late.nbytes)
    wrapper = planned(batch, Formula())
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        spin()
        late.data.copy_from_device_async(on_gpu.q_view.storage.data, late.nbytes, stream)
        out = wrapper.run(late.view(np.float16), on_gpu.cache)
        stream.synchronize()
    oracle.check_all(batch, Formula(), to_host(out))


def test_threads_each_with_a_wrapper(cp: Any, rng: np.random.Generator) -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        own = np.random.default_rng(seed)
        with cp.cuda.Device(0), cp.cuda.Stream(non_blocking=True) as stream:
            wrapper = Wrapper(backend="cuda")
            for _ in range(6):
                batch = random_batch(own)
                on_gpu = batch.on(to_gpu)
                batch.plan(wrapper, fixed_split_size=3)
                out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
                stream.synchronize()
                try:
                    oracle.check_all(batch, Formula(), to_host(out), to_host(lse))
                except AssertionError as error:
                    failures.append(f"seed {seed}: {error}")
        done.append(seed)

    done: list[int] = []
    seeds = rng.integers(0, 2**32, 4).tolist()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(done) == sorted(seeds)


# The cache of compiled kernels, in processes of their own

RACE_IMPORTS = """
import hashlib
import numpy as np, cupy
from cupaged import BatchPrefillWithPagedKVCacheWrapper
"""
RACE = """
rng = np.random.default_rng(5)
def draw(*shape):
    bits = rng.standard_normal(shape).astype(np.float16).view(np.uint16)
    return cupy.asarray(bits).view(np.float16)
q, k = draw(3, 4, 64), draw(4, 16, 2, 64)
wrapper = BatchPrefillWithPagedKVCacheWrapper(backend="cuda")
wrapper.plan([0, 3], [0, 4], [2, 0, 3, 1], [7], 4, 2, 64, 16)
out = wrapper.run(q, (k, k))
print(hashlib.sha256(out.view(np.uint16).get().tobytes()).hexdigest(), flush=True)
"""


def test_processes_race_for_a_kernel_and_a_damaged_one_is_made_anew(
    cp: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    place = {"CUPAGED_CACHE_DIR": str(folder)}
    first, second = race(RACE_IMPORTS, RACE, 2, **place)
    assert first == second
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    assert race(RACE_IMPORTS, RACE, 1, **place) == [first]
    assert entry.read_bytes() == whole
    assert list(folder.iterdir()) == [entry]
