"""The benchmark's own kernels, and what it measures of the card."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import ceilings
import device_kernels
import numpy as np
import pytest
import timing
from bench_problems import DTYPES

from cupaged import kernels
from cupaged.errors import BackendUnavailableError


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_the_kernels_compile_and_spill_nothing(arch: int) -> None:
    try:
        binding = kernels.nvrtc()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    program = binding.createProgram(device_kernels.SOURCE, "bench.cu", [], [])
    try:
        options = [f"-arch=sm_{arch}", "--std=c++17", "--ptxas-options=-v"]
        binding.compileProgram(program, options)
        log = binding.getProgramLog(program)
    finally:
        binding.destroyProgram(program)
    assert "warning" not in log
    entries = re.findall(r"entry function '(\w+)'", log)
    assert sorted(entries) == ["copy_all", "fill_normal", "read_all"]
    assert len(re.findall(r" 0 bytes spill stores, 0 bytes spill loads", log)) == 3
    # An SM's 65,536 registers are enough for the blocks that it shall hold.
    threads = device_kernels.THREADS * device_kernels.BLOCKS_PER_SM
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == 3
    assert max(registers) * threads <= 65536


def test_the_host_has_no_ceilings() -> None:
    names = (ceilings.MATMUL, ceilings.COPY, ceilings.READ)
    found = ceilings.ceilings(timing.HostDevice(), "float16", names)
    assert found == dict.fromkeys(names)


@pytest.fixture
def device() -> Iterator[timing.CudaDevice]:
    """The device; after the test, CuPy's and PyTorch's work no longer goes to its stream."""
    import cupy

    yield timing.CudaDevice()
    cupy.cuda.Stream.null.use()
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.cuda.set_stream(torch.cuda.default_stream())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_drawn_on_the_gpu_are_normal(
    rng: np.random.Generator, dtype: str, device: timing.CudaDevice
) -> None:
    shape = 3, 700_001, 2
    drawn, again = (device.normal(rng, shape, dtype) for _ in range(2))
    device.synchronize()
    assert drawn.shape == shape
    assert drawn.dtype == DTYPES[dtype]
    first, second = (
        array.view(np.uint16).get().view(DTYPES[dtype]).astype(np.float64).reshape(-1)
        for array in (drawn, again)
    )
    for numbers in (first, second):
        assert abs(numbers.mean()) < 0.005
        assert abs(numbers.std() - 1) < 0.01
        # A normal variable's fourth moment is 3.
        assert abs((numbers**4).mean() - 3) < 0.1
        assert 4 < np.abs(numbers).max() < 6
    # Neighbours, the two of a pair, and two draws have nothing in common.
    for a, b in ((first[:-1], first[1:]), (first[::2], first[1::2]), (first, second)):
        assert abs((a * b).mean()) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("vectors", [1, 511, 513, 1_000_003])
def test_copies_copy_every_byte_and_no_other(
    rng: np.random.Generator, vectors: int, device: timing.CudaDevice
) -> None:
    count = vectors * device_kernels.VECTOR_BYTES // 2
    host = rng.integers(0, 1 << 16, count, np.uint16)
    source = device.put(host)
    for copy in (device.copy, device.copy_by_kernel):
        target = device.empty((count + 64,), np.dtype(np.uint16))
        target.fill(0x7FFF)
        copy(target[:count], source)
        device.synchronize()
        np.testing.assert_array_equal(target[:count].get(), host)
        assert (target[count:].get() == 0x7FFF).all()


@pytest.mark.gpu
def test_the_card_s_rates_are_what_a_card_s_can_be(device: timing.CudaDevice) -> None:
    names = (ceilings.MATMUL, ceilings.COPY, ceilings.READ)
    found = ceilings.ceilings(device, "float16", names)
    assert set(found) == set(names)
    assert all(100 < rate < 20_000 for name, rate in found.items() if name != ceilings.MATMUL)
    assert 10 < found[ceilings.MATMUL] < 5_000
    # Reading is half of copying: what would be left out of it would show.
    assert 0.7 < found[ceilings.READ] / found[ceilings.COPY] < 1.5
