"""What a call costs the host through each framework's door.

    python bench/bench_doors.py

A small decode batch (64 requests of 1,024 keys, 32 query heads over 8, head_dim 128, float16, pages
of 16), called again and again without waiting; medians of rounds of 100 calls, in microseconds. A
door that is not installed is left out; 2 without a GPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cupaged

BATCH, KEYS, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 64, 1024, 32, 8, 128, 16
CALLS, ROUNDS = 100, 21


def median_us(call: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Of rounds of calls that nobody waits for, each round's share of a call."""
    for _ in range(10):
        call()
    wait()
    took = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        took.append((time.perf_counter() - begin) / CALLS * 1e6)
        wait()
    return statistics.median(took)


def planned() -> Any:
    """A wrapper with its plan."""
    pages = KEYS // PAGE_SIZE
    wrapper = cupaged.BatchDecodeWithPagedKVCacheWrapper(backend="cuda")
    indices = np.random.default_rng(0).permutation(BATCH * pages)
    wrapper.plan(
        np.arange(BATCH + 1) * pages, indices, np.full(BATCH, PAGE_SIZE), HEADS, KV_HEADS,
        HEAD_DIM, PAGE_SIZE,
    )  # fmt: skip
    return wrapper


def main() -> int:
    """Measure every door there is."""
    try:
        import cupy

        cupy.cuda.runtime.getDevice()
    except Exception as error:
        print(f"needs CuPy and a GPU: {error}")
        return 2
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"host cost of a call on {name}, CuPy {cupy.__version__}")
    rng = np.random.default_rng(1)
    q = rng.standard_normal((BATCH, HEADS, HEAD_DIM)).astype(np.float16)
    shape = (BATCH * KEYS // PAGE_SIZE, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    k, v = (rng.standard_normal(shape, np.float32).astype(np.float16) for _ in range(2))

    def show(door: str, call: Callable[[], Any], wait: Callable[[], Any]) -> None:
        print(f"{door:40s} {median_us(call, wait):8.1f} us", flush=True)

    try:
        import torch  # before the plan, which makes the operator for torch.compile
    except ImportError:
        torch = None
        print("PyTorch is not installed")
    wrapper, device = planned(), cupy.cuda.Device()
    arrays = [cupy.asarray(x) for x in (q, k, v)]
    out = cupy.empty_like(arrays[0])
    show("CuPy, run() into a given output", lambda: wrapper.run(arrays[0], arrays[1:], out=out),
         device.synchronize)  # fmt: skip
    show("CuPy, run()", lambda: wrapper.run(arrays[0], arrays[1:]), device.synchronize)
    if torch is not None:
        tensors = [torch.from_numpy(x).cuda() for x in (q, k, v)]
        target = torch.empty_like(tensors[0])
        wait = torch.cuda.synchronize
        show("PyTorch, run() into a given output",
             lambda: wrapper.run(tensors[0], tensors[1:], out=target), wait)  # fmt: skip
        show("PyTorch, run()", lambda: wrapper.run(tensors[0], tensors[1:]), wait)
        compiled = torch.compile(
            lambda q, k, v: wrapper.run(q, (k, v)), backend="aot_eager", fullgraph=True
        )
        show("PyTorch, torch.compile (aot_eager)", lambda: compiled(*tensors), wait)
    try:
        import jax

        from cupaged.jax import paged_attention
    except ImportError:
        print("JAX is not installed")
    else:
        put = [jax.device_put(x) for x in (q, k, v)]
        show("JAX, run(), which waits", lambda: wrapper.run(put[0], put[1:]), device.synchronize)
        jitted = jax.jit(lambda q, k, v: paged_attention(q, k, v, wrapper))
        show("JAX, paged_attention() under jit", lambda: jitted(*put),
             lambda: jitted(*put).block_until_ready())  # fmt: skip
        plus = jax.jit(lambda q: q + 1)
        show("JAX, a jitted addition, to compare", lambda: plus(put[0]),
             lambda: plus(put[0]).block_until_ready())  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
