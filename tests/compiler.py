"""What the compiler says of kernels: compiled beside other tests, and its report read."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeAlias

import pytest

from cupaged import kernels, tiles
from cupaged.kernel_spec import KernelConfig
from cupaged.spec import Needs

#: An architecture and a kernel, which a test has as its `case`.
Case: TypeAlias = "tuple[int, kernels.Kernel]"
#: What a compiled case gives: the cubin, and what the compiler said.
Logs: TypeAlias = "dict[Case, Future[tuple[bytes, str]]]"

KIB = 1024

#: Compute capability → shared memory of an SM in bytes, and the threads that it holds (CUDA C++
#: Programming Guide, "Technical Specifications per Compute Capability").
SM_LIMITS = {
    80: (164 * KIB, 2048),
    86: (100 * KIB, 1536),
    89: (100 * KIB, 1536),
    90: (228 * KIB, 2048),
    100: (228 * KIB, 2048),
    120: (100 * KIB, 1536),
}

#: What the system takes of an SM's shared memory for each thread block (the same guide).
RESERVED_BYTES = 1 * KIB

#: An SM's registers, and how many of them at a time a warp is given.
REGISTERS = 65536
REGISTER_UNIT = 256
MAX_REGISTERS_PER_THREAD = 255
WARPGROUP = 128

REPORT = ("--ptxas-options=-v",)

#: All that the compiler has to say of a kernel with nothing wrong in it, in this order.
LOG = re.compile(
    r"""
    ptxas\ info\ +:\ \d+\ bytes\ gmem(,\ \d+\ bytes\ cmem\[\d+\])*\n
    ptxas\ info\ +:\ Compiling\ entry\ function\ '(?P<kernel>\w+)'\ for\ '(?P<target>\w+)'\n
    ptxas\ info\ +:\ Function\ properties\ for\ (?P=kernel)\n
    ptxas\ +\.\ +(?P<stack>\d+)\ bytes\ stack\ frame,\ (?P<stores>\d+)\ bytes\ spill\ stores,
        \ (?P<loads>\d+)\ bytes\ spill\ loads\n
    ptxas\ info\ +:\ Used\ (?P<registers>\d+)\ registers,\ used\ \d+\ barriers
        (,\ \d+\ bytes\ cumulative\ stack\ size)?
        (,\ (?P<shared>\d+)\ bytes\ smem)?(,\ \d+\ bytes\ cmem\[\d+\])*\n
    (ptxas\ info\ +:\ Compile\ time\ =\ [\d.]+\ ms\n)?
    \0?
    """,
    re.VERBOSE,
)


def plain_kernel(
    arch: int, dtype: str, head_dim: int, page_size: int, shape: tiles.Shape = "long"
) -> KernelConfig:
    """The kernel of attention without variants."""
    needs = Needs(dtype, dtype, head_dim, head_dim, page_size)
    return tiles.kernel_config(arch, needs, shape)


def name(value: object) -> str:
    """Of a test, after what it compiles."""
    assert isinstance(value, tuple)
    arch, kernel = value
    return f"{kernels.target(arch)}-{kernel.name}"


def reads_logs(item: pytest.Item) -> bool:
    """Whether a test reads what the compiler says of its `case`."""
    return isinstance(item, pytest.Function) and "logs" in item.fixturenames


@contextlib.contextmanager
def compiling(items: Sequence[pytest.Item]) -> Iterator[Logs]:
    """Compile each kernel that one of these tests asks for, while others run.

    As many processes as there are cores do, which no test's stand-ins reach.
    """
    cases = [item.callspec.params["case"] for item in items if reads_logs(item)]
    if not cases:
        yield {}
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, _stand_back) as pool:
        yield {case: pool.submit(_compile, *case) for case in dict.fromkeys(cases)}
        pool.shutdown(cancel_futures=True)


def _stand_back() -> None:
    """Leave the cores to the tests that are running."""
    if hasattr(os, "nice"):
        os.nice(10)


def _compile(arch: int, kernel: kernels.Kernel) -> tuple[bytes, str]:
    return kernels.compile_cubin(kernel, arch, REPORT)


def read(case: Case, logs: Logs) -> tuple[bytes, re.Match[str]]:
    """A kernel's cubin and its report, which warns of nothing and spills nothing."""
    arch, kernel = case
    cubin, log = logs[case].result()
    assert cubin.startswith(b"\x7fELF")
    said = LOG.fullmatch(log)
    assert said is not None, f"expected a report of one kernel and no warning, got:\n{log}"
    assert said["kernel"] == kernel.entry
    assert said["target"] == kernels.target(arch)
    assert (said["stores"], said["loads"], said["stack"]) == ("0", "0", "0"), log
    return cubin, said


def registers_of_blocks(said: re.Match[str], blocks: int, num_threads: int) -> int:
    """What so many blocks take of an SM's registers."""
    of_a_warp = -(-int(said["registers"]) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    return blocks * num_threads // 32 * of_a_warp
