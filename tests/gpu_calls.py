"""Calls on a GPU: batches there, planned, run into poisoned arrays, and brought back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import batches
import numpy as np
import oracle
import pytest
from oracle import Formula

import cupaged
from cupaged import device_schedule, devices, kernels, tiles
from cupaged.kernel_spec import KernelConfig

FAMILIES = ("prefill_sm90", "prefill_sm80")
Wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper
Results = tuple[np.ndarray, np.ndarray]


def families() -> tuple[str, ...]:
    """The families of kernels for the long shape that device 0 can run."""
    return FAMILIES if devices.device_model(0).arch == 90 else FAMILIES[1:]


@contextmanager
def served_by(family: str) -> Iterator[None]:
    """Plan with one family of kernels for the long shape, also where there is a better one."""
    tile_class = tiles.tile_class

    def without_sm90(arch: int) -> str:
        found = tile_class(arch)
        return "large" if found == "sm90" else found

    with pytest.MonkeyPatch.context() as patch:
        if family == "prefill_sm80":
            patch.setattr(tiles, "tile_class", without_sm90)
        chosen = (tiles.kernel_config, device_schedule._recipe)
        for cached in chosen:
            cached.cache_clear()
        try:
            yield
        finally:
            for cached in chosen:
                cached.cache_clear()


def every_configuration() -> set[KernelConfig]:
    """All kernels of device 0, of every family."""
    found: set[KernelConfig] = set()
    for family in families():
        with served_by(family):
            found.update(kernels.configurations(devices.device_model(0).arch))
    return found


def to_gpu(x: np.ndarray) -> Any:
    """Move the bits, which takes no kernel of CuPy's; they are there for every stream."""
    import cupy

    moved = cupy.asarray(x.view(f"u{x.itemsize}")).view(x.dtype)
    # The copy is asynchronous, and streams that don't block would not wait for it.
    cupy.cuda.get_current_stream().synchronize()
    return moved


def to_host(x: Any) -> np.ndarray:
    return x.view(f"u{x.itemsize}").get().view(x.dtype)


def schedule_of(wrapper: Wrapper) -> Any:
    return wrapper._plan.schedule


def planned(batch: batches.Batch, formula: Formula, **options: Any) -> Wrapper:
    """Plan a batch with its index arrays on the host."""
    workspace = options.pop("workspace", None)
    wrapper = Wrapper(workspace, kv_layout=batch.kv_layout, backend="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cupaged.CupagedWarning)
        batch.plan(wrapper, **formula.plan_options, **options)
    return wrapper


def run(wrapper: Wrapper, batch: batches.Batch, formula: Formula) -> Results:
    """Run on the GPU into poisoned arrays; out and LSE on the host."""
    on_gpu = batch.on(to_gpu)
    out = to_gpu(batch.poisoned_out().storage)
    lse = to_gpu(batch.poisoned_lse().storage)
    options = formula.run_options
    if formula.sinks is not None:
        options["sinks"] = to_gpu(formula.sinks)
    wrapper.run(on_gpu.q, on_gpu.cache, out=out, lse=lse, **options)
    return to_host(out), to_host(lse)


def attention(batch: batches.Batch, formula: Formula, **options: Any) -> Results:
    return run(planned(batch, formula, **options), batch, formula)


def check(batch: batches.Batch, formula: Formula, **options: Any) -> None:
    """Against the formula; keys that no row sees are NaN, as are their values."""
    batch = batch.with_hidden_keys(formula)
    oracle.check_all(batch, formula, *attention(batch, formula, **options))


def same_bits(one: Results, other: Results) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def spinner(cp: Any) -> Callable[[], None]:
    """What keeps the current stream busy for some 10 ms, compiled and run once."""
    source = """
    extern "C" __global__ void spin(long long cycles) {
        const long long begin = clock64();
        while (clock64() - begin < cycles) {}
    }
    """
    kernel = cp.RawKernel(source, "spin")
    kernel((1,), (1,), (np.int64(1),))
    cp.cuda.Device().synchronize()
    return lambda: kernel((1,), (1,), (np.int64(15_000_000),))


@contextmanager
def told(what: object) -> Iterator[None]:
    """Put the case in front of what an assertion says."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None
