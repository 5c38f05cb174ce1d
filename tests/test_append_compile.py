"""The append kernels: compiled for every architecture, and launched as they will read it.

NVRTC compiles without a GPU; the launches are read by a stand-in for the driver, which does in
plain Python what the kernel does with the parameters.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from compiler import (
    REGISTERS,
    RESERVED_BYTES,
    SM_LIMITS,
    Logs,
    name,
    read,
    registers_of_blocks,
)

from cupaged import kernels
from cupaged.append_cuda import (
    CTAS_PER_SM,
    KERNELS,
    NUM_THREADS,
    SLOTS_DTYPES,
    UNIT_BYTES,
    AppendKernel,
)

Case = tuple[int, AppendKernel]
CASES: list[Case] = [(arch, kernel) for arch in SM_LIMITS for kernel in KERNELS]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_an_append_kernel_fits(case: Case, logs: Logs) -> None:
    """It compiles without a warning, spills nothing, and an SM holds the blocks it is meant to."""
    arch, kernel = case
    _, said = read(case, logs)

    sm_shared, sm_threads = SM_LIMITS[arch]
    assert kernel.shared_bytes == 0
    assert CTAS_PER_SM * (int(said["shared"]) + RESERVED_BYTES) <= sm_shared
    assert sm_threads >= CTAS_PER_SM * NUM_THREADS
    assert registers_of_blocks(said, CTAS_PER_SM, NUM_THREADS) <= REGISTERS


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_parameters_of_a_launch_fit(kernel: AppendKernel) -> None:
    """4 KiB is what every driver and compiler takes."""
    sizes = [kernel.structs[struct].itemsize for struct in ("Append", "Slots")]
    assert all(size % 8 == 0 for size in sizes[:-1])
    assert sum(sizes) <= 4096


def test_names_and_kernels_are_unique() -> None:
    assert len(KERNELS) == len(UNIT_BYTES) * len(SLOTS_DTYPES)
    assert len({kernel.name for kernel in KERNELS}) == len(set(KERNELS)) == len(KERNELS)


@pytest.mark.parametrize("struct", ["Append", "Slot", "Slots", "IndexArray"])
def test_a_changed_layout_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, compiler: None, struct: str
) -> None:
    """A NumPy mirror that lies otherwise than its device struct is found before anything runs."""
    kernel = AppendKernel(16, "arrays")
    dtype = kernel.structs[struct]
    fields = [(field, dtype[field]) for field in dtype.names]
    fields[:2] = fields[1::-1]
    structs = {**kernel.structs, struct: np.dtype(fields, align=True)}
    monkeypatch.setattr(AppendKernel, "structs", structs)
    with pytest.raises(RuntimeError, match=f"^NVRTC refused {kernel.name} for sm_80:") as raised:
        kernels.compile_cubin(kernel, 80)
    errors = re.findall(r"error: (.*)", str(raised.value))
    assert errors
    assert set(errors) == {"static assertion failed"}
