"""Every kernel, compiled for every architecture: it spills nothing, and fits where it is to run.

NVRTC compiles without a GPU, so these run wherever it is installed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import sass

from cupaged import kernels, tiles
from cupaged.errors import BackendUnavailableError
from cupaged.spec import DEVICE_STRUCTS, KernelConfig

Case = tuple[int, KernelConfig]

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

CASES: list[Case] = [
    (arch, config) for arch in SM_LIMITS for config in kernels.configurations(arch)
]

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
    arch, config = value
    return f"{kernels.target(arch)}-{config.name}"


@pytest.fixture(scope="module")
def compiler() -> None:
    """NVRTC."""
    try:
        kernels.nvrtc()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def logs(
    compiler: None, request: pytest.FixtureRequest
) -> Iterator[dict[Case, Future[tuple[bytes, str]]]]:
    """What the compiler says of each kernel that a selected test asks for.

    All are compiled by as many threads as there are cores, while the tests wait for theirs.
    """
    wanted = [
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.originalname
        in (test_a_kernel_fits.__name__, test_a_kernel_uses_its_units.__name__)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            case: pool.submit(kernels.compile_cubin, case[1], case[0], REPORT)
            for case in dict.fromkeys(wanted)
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_kernel_fits(case: Case, logs: dict[Case, Future[tuple[bytes, str]]]) -> None:
    """It compiles without a warning, spills nothing, and an SM holds the blocks it is meant to."""
    arch, config = case
    cubin, log = logs[case].result()
    assert cubin.startswith(b"\x7fELF")
    said = LOG.fullmatch(log)
    assert said is not None, f"expected a report of one kernel and no warning, got:\n{log}"
    assert said["kernel"] == config.entry
    assert said["target"] == kernels.target(arch)
    assert (said["stores"], said["loads"], said["stack"]) == ("0", "0", "0"), log

    sm_shared, sm_threads = SM_LIMITS[arch]
    shared = config.shared_bytes + int(said["shared"] or 0)
    assert shared <= tiles.SHARED_LIMIT[tiles.tile_class(arch)]
    assert config.ctas_per_sm * (shared + RESERVED_BYTES) <= sm_shared
    assert config.ctas_per_sm * config.num_threads <= sm_threads

    registers = int(said["registers"])
    assert registers <= MAX_REGISTERS_PER_THREAD
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    assert config.ctas_per_sm * config.num_threads // 32 * of_a_warp <= REGISTERS


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == 90], ids=name)
def test_a_kernel_uses_its_units(case: Case, logs: dict[Case, Future[tuple[bytes, str]]]) -> None:
    """The matrix unit and the ways of copying that its family is for, and no others."""
    _, config = case
    cubin, _ = logs[case].result()
    found = sass.instructions(cubin)
    if config.family == "prefill_sm80":
        assert found["HMMA"] >= (config.head_dim + config.cta_tile_kv) // 16
        assert found["LDGSTS"] > 0
        assert not found.keys() & {"HGMMA", "UTMALDG", "USETMAXREG", "LDL", "STL"}
        return
    # Q.K^T and P.V of a tile, 16 elements and 16 keys at a time.
    assert found["HGMMA"] >= (config.head_dim + config.cta_tile_kv) // 16
    assert found["LDGSTS"] > 0  # Q
    assert bool(found["UTMALDG"]) == config.page_aligned
    assert not found.keys() & {"HMMA", "LDL", "STL"}

    producer, consumer = sass.register_counts(cubin)
    consumers = config.warps_q * config.warps_kv * 32 // WARPGROUP
    assert config.num_threads == (consumers + 1) * WARPGROUP
    assert producer % 8 == consumer % 8 == 0
    assert consumer <= MAX_REGISTERS_PER_THREAD
    registers = (producer + consumers * consumer) * WARPGROUP
    # A warpgroup waits for its registers until the others have given up as many.
    assert config.ctas_per_sm * registers <= REGISTERS


def test_a_warning_is_no_report_of_a_kernel() -> None:
    """Above all not that products of warpgroups wait for each other."""
    report = (
        "ptxas info    : 0 bytes gmem, 24 bytes cmem[4]\n"
        "{warning}"
        "ptxas info    : Compiling entry function 'cupaged_prefill' for 'sm_90a'\n"
        "ptxas info    : Function properties for cupaged_prefill\n"
        "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers\n"
    )
    assert LOG.fullmatch(report.format(warning=""))
    for warning in (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources for the wgmma pipeline in the function "
        "'cupaged_prefill'\n",
        "ptxas warning : Value of threads per SM for entry cupaged_prefill is out of range\n",
    ):
        assert not LOG.fullmatch(report.format(warning=warning))
        assert not LOG.fullmatch(report.format(warning="") + warning)


def test_the_limits_of_a_block_are_those_of_its_sm() -> None:
    """A block may have all of an SM's shared memory but what the system takes."""
    for arch, (sm_shared, _) in SM_LIMITS.items():
        limit = tiles.SHARED_LIMIT[tiles.tile_class(arch)]
        assert limit == sm_shared - RESERVED_BYTES, arch


@pytest.mark.parametrize("change", ["two fields swapped", "a field more"])
@pytest.mark.parametrize("struct", DEVICE_STRUCTS)
def test_a_changed_layout_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, compiler: None, struct: str, change: str
) -> None:
    """A NumPy mirror that lies otherwise than its device struct is found before anything runs."""
    dtype = DEVICE_STRUCTS[struct]
    mirror = [(field, dtype[field]) for field in dtype.names]
    if change == "two fields swapped":
        mirror[:2] = mirror[1::-1]
        wrong = ["static assertion failed"] * 2
    else:
        mirror.append(("one_more", dtype[0]))
        wrong = ["static assertion failed", f'class "{struct}" has no member "one_more"']
    monkeypatch.setitem(DEVICE_STRUCTS, struct, np.dtype(mirror, align=True))
    config = tiles.kernel_config(80, "float16", 64, 16, "short")
    with pytest.raises(RuntimeError, match=f"^NVRTC refused {config.name} for sm_80:") as raised:
        kernels.compile_cubin(config, 80)
    assert re.findall(r"error: (.*)", str(raised.value)) == wrong
