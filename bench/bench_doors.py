"""What a call costs the host through each framework's door.

    python bench/bench_doors.py --quick              # no GPU: does the script work?
    python bench/bench_doors.py --json doors.json    # on a GPU: the figures

A decode batch (64 requests of 1,024 keys, 32 query heads over 8, head_dim 128, float16, pages of
16), called again and again without waiting: medians of rounds of 100 calls, in microseconds. A
framework that is not installed is left out. The exit status is 1 where a door fails, 2 where the
run could not start.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from host_rows import CALLS, Job, host_row, rows_of
from looks import Row
from report import ROOT, header, save
from timing import Call, CudaDevice, HostDevice, NoDeviceError, host_us

BATCH, KEYS, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 64, 1024, 32, 8, 128, 16
ROUNDS = 21


class NullStream(CudaDevice):
    """The GPU, and the stream that frameworks share as long as nobody chooses another."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = self.xp.cuda.Stream.null
        self.stream.use()


def planned(keys: int, device: HostDevice) -> Any:
    """A wrapper with its plan, for requests of so many keys."""
    import cupaged

    pages = keys // PAGE_SIZE
    wrapper = cupaged.BatchDecodeWithPagedKVCacheWrapper(backend=device.backend)
    indices = np.random.default_rng().permutation(BATCH * pages)
    wrapper.plan(
        *(np.arange(BATCH + 1) * pages, indices, np.full(BATCH, PAGE_SIZE)),
        *(HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE),
    )
    return wrapper


def doors(
    wrapper: Any, arrays: Sequence[np.ndarray], device: HostDevice, frameworks: Mapping[str, Any]
) -> Iterator[tuple[str, Call]]:
    """Names of ways to call a planned wrapper, and such a call."""
    q, k, v = map(device.put, arrays)
    out, name = device.empty(q.shape, q.dtype), device.xp.__name__
    yield f"{name}, run() into a given output", lambda: wrapper.run(q, (k, v), out=out)
    yield f"{name}, run()", lambda: wrapper.run(q, (k, v))
    if "torch" in frameworks:
        place = "cuda" if isinstance(device, CudaDevice) else "cpu"
        yield from torch_doors(frameworks["torch"], wrapper, arrays, place)
    if "jax" in frameworks:
        yield from jax_doors(frameworks["jax"], wrapper, arrays)


def torch_doors(
    torch: Any, wrapper: Any, arrays: Sequence[np.ndarray], place: str
) -> Iterator[tuple[str, Call]]:
    """PyTorch's."""
    q, k, v = (torch.from_numpy(array).to(place) for array in arrays)
    out = torch.empty_like(q)
    yield "torch, run() into a given output", lambda: wrapper.run(q, (k, v), out=out)
    yield "torch, run()", lambda: wrapper.run(q, (k, v))
    compiled = torch.compile(
        lambda q, k, v: wrapper.run(q, (k, v)), backend="aot_eager", fullgraph=True
    )
    yield "torch, torch.compile (aot_eager)", lambda: compiled(q, k, v)


def jax_doors(jax: Any, wrapper: Any, arrays: Sequence[np.ndarray]) -> Iterator[tuple[str, Call]]:
    """JAX's, and a function of its own to compare."""
    from cupaged.jax import paged_attention

    q, k, v = map(jax.device_put, arrays)
    yield "jax, run(), which waits", lambda: wrapper.run(q, (k, v))
    jitted = jax.jit(lambda q, k, v: paged_attention(q, k, v, wrapper))
    yield "jax, paged_attention() under jit", lambda: jitted(q, k, v)
    plus = jax.jit(lambda q: q + 1)
    yield "jax, a jitted addition", lambda: plus(q)


def installed(names: Sequence[str]) -> dict[str, Any]:
    """Modules by name, of those that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(name)
    return found


def measure(name: str, call: Call, device: HostDevice, quick: bool) -> list[Row]:
    """µs of host time of one call, calls following one another."""

    def call_and_wait() -> None:
        result = call()
        if hasattr(result, "block_until_ready"):  # of streams that only JAX can wait for
            result.block_until_ready()

    calls = 2 if quick else CALLS
    for _ in range(calls):
        call_and_wait()
    times = []
    for _ in range(3 if quick else ROUNDS):
        times += host_us(call, 1, device, calls)
        call_and_wait()
    note = f"{calls} calls in a row, not waited for"
    return [host_row(name, "cupaged", statistics.median(times), "us", note)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every door there is; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    parser.add_argument(
        "--quick", action="store_true", help="few calls on the reference backend, without a GPU"
    )
    options = parser.parse_args(arguments)
    # This checkout's package is what the header's commit speaks of.
    sys.path.insert(0, str(ROOT))
    try:
        device = HostDevice() if options.quick else NullStream()
    except NoDeviceError as error:
        print(f"{error}; --quick needs no GPU", file=sys.stderr)
        return 2
    # Before the plan, which makes the operator for torch.compile.
    frameworks = installed(("torch", "jax"))
    versions = {name: module.__version__ for name, module in frameworks.items()}
    head = header(device, versions, {}, {}, ROOT, {"dtype": "float16", "quick": options.quick})
    keys = PAGE_SIZE if options.quick else KEYS
    rng = np.random.default_rng()
    cache = (BATCH * keys // PAGE_SIZE, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    shapes = ((BATCH, HEADS, HEAD_DIM), cache, cache)
    arrays = [rng.standard_normal(shape, np.float32).astype(np.float16) for shape in shapes]
    print(f"{head['gpu'] or 'host'} · {head['backend']} backend · {head['date']}")
    rows = []
    for name, call in doors(planned(keys, device), arrays, device, frameworks):
        job = Job(name, "cupaged", functools.partial(measure, name, call, device, options.quick))
        for row in rows_of([job]):
            rows.append(row)
            value = "failed" if row["value"] is None else f"{row['value']:.1f} us"
            print(f"{name:40s} {value:>10s}  {row['note']}", flush=True)
    if options.json:
        save(options.json, head, rows, [])
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
