"""The highest rates of the card itself, measured in the run that they are held against."""

from __future__ import annotations

import statistics

import numpy as np
from timing import Call, CudaDevice, HostDevice, interleave, torch_on
from workloads import DTYPES

MATRIX_SIZE = 8192
MEMORY_BYTES = 2 << 30

#: Their names in a header; of the reference backend they are None.
MATMUL, COPY, READ = "matmul_tflops", "copy_gbs", "read_gbs"


def ceilings(device: HostDevice, dtype: str, names: tuple[str, ...]) -> dict[str, float | None]:
    """Rates of the device; None where it is none to be measured.

    Parameters
    ----------
    device : HostDevice
        What is measured.
    dtype : str
        Of the matrix product.
    names : tuple of str
        Some of `MATMUL` (TFLOP/s of an 8192³ product), `COPY` (GB/s of a large copy, bytes read
        and written) and `READ` (GB/s of plain reading).
    """
    if not isinstance(device, CudaDevice):
        return dict.fromkeys(names)
    rates: dict[str, float | None] = {}
    if MATMUL in names:
        product = median_us(device, matrix_product(device, dtype))
        rates[MATMUL] = 2 * MATRIX_SIZE**3 / product / 1e6
        device.free()
    source = device.normal(np.random.default_rng(), (MEMORY_BYTES // 2,), "float16")
    if COPY in names:
        target = device.empty(source.shape, source.dtype)
        copied = median_us(device, lambda: device.copy(target, source))
        rates[COPY] = 2 * MEMORY_BYTES / copied / 1e3
    if READ in names:
        out = device.empty((1,), np.dtype(np.uint32))
        taken = median_us(device, lambda: device.read(source, out))
        rates[READ] = MEMORY_BYTES / taken / 1e3
    return rates


def matrix_product(device: CudaDevice, dtype: str) -> Call:
    """A large product: PyTorch's where it is installed, CuPy's otherwise."""
    shape = (MATRIX_SIZE, MATRIX_SIZE)
    try:
        torch = torch_on(device)
    except ImportError:
        rng = np.random.default_rng()
        a, b = (device.normal(rng, shape, dtype) for _ in range(2))
        out = device.empty(shape, DTYPES[dtype])
        return lambda: device.xp.matmul(a, b, out=out)
    kind = getattr(torch, dtype)
    a, b = (torch.randn(shape, device="cuda", dtype=kind) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def median_us(device: HostDevice, call: Call) -> float:
    """µs of a call, the median of ten."""
    return statistics.median(interleave({"": lambda: device.sample(call)}, 3, 10, device)[""])
