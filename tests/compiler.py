"""What the compiler says of kernels: compiled side by side, and its report read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import pytest

from cupaged import kernels

#: What a compiled case gives: the cubin, and what the compiler said.
Logs: TypeAlias = "dict[tuple[int, kernels.Kernel], Future[tuple[bytes, str]]]"

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


def name(value: object) -> str:
    """Of a test, after what it compiles."""
    assert isinstance(value, tuple)
    arch, kernel = value
    return f"{kernels.target(arch)}-{kernel.name}"


def compiling(request: pytest.FixtureRequest, *tests: Callable[..., None]) -> Iterator[Logs]:
    """Compile each kernel that a selected one of these tests asks for as its `case`.

    As many threads as there are cores do, while the tests wait for theirs.
    """
    names = [test.__name__ for test in tests]
    wanted = [
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname in names
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            case: pool.submit(kernels.compile_cubin, case[1], case[0], REPORT)
            for case in dict.fromkeys(wanted)
        }
        pool.shutdown(cancel_futures=True)


def read(case: tuple[int, kernels.Kernel], logs: Logs) -> tuple[bytes, re.Match[str]]:
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
