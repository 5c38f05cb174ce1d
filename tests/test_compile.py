"""Every kernel, compiled for every architecture: it spills nothing, and fits where it is to run.

NVRTC compiles without a GPU, so these run wherever it is installed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import sass
from compiler import (
    LOG,
    MAX_REGISTERS_PER_THREAD,
    REGISTERS,
    RESERVED_BYTES,
    SM_LIMITS,
    WARPGROUP,
    Logs,
    name,
    plain_kernel,
    read,
    registers_of_blocks,
)

from cupaged import kernels, tiles
from cupaged.kernel_spec import DEVICE_STRUCTS, KernelConfig
from cupaged.spec import SERVED_DTYPES, SERVED_HEAD_DIMS, Needs, Variant

Case = tuple[int, KernelConfig]

#: Every class of tiles and every kind of instructions; of the others, what most will meet.
_WHOLE = (80, 90, 120)


def _is_plain(config: KernelConfig) -> bool:
    return config.kv_dtype == config.dtype and not any(config.variant)


CASES: list[Case] = [
    (arch, config)
    for arch in SM_LIMITS
    for config in kernels.configurations(arch)
    if arch in _WHOLE or _is_plain(config) or config.dtype == "float16"
]


def _seldom_asked_for() -> Iterator[KernelConfig]:
    """Of the sm_90 family, variants that `configurations` leaves out: of heads other than 128."""
    ons = [{"window"}, {"soft_cap"}, {"window", "soft_cap"}, {"alibi"}, {"window", "alibi"}]
    variants = [Variant(**dict.fromkeys(on, True)) for on in ons]
    head_dims = [dims for dims in SERVED_HEAD_DIMS if dims != (128, 128)]
    for dtype, dims, page_size, variant, low_cap in itertools.product(
        SERVED_DTYPES, head_dims, (16, 1), variants, (False, True)
    ):
        needs = Needs(dtype, dtype, *dims, page_size, variant, low_cap and variant.soft_cap)
        config = tiles.kernel_config(90, needs, "long")
        yield from (config, replace(config, page_aligned=False))


CASES += [(90, config) for config in dict.fromkeys(_seldom_asked_for())]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_kernel_fits(case: Case, logs: Logs) -> None:
    """It compiles without a warning, spills nothing, and an SM holds the blocks it is meant to."""
    arch, config = case
    _, said = read(case, logs)

    sm_shared, sm_threads = SM_LIMITS[arch]
    shared = config.shared_bytes + int(said["shared"] or 0)
    assert shared <= tiles.SHARED_LIMIT[tiles.tile_class(arch)]
    assert config.ctas_per_sm * (shared + RESERVED_BYTES) <= sm_shared
    assert config.ctas_per_sm * config.num_threads <= sm_threads

    assert int(said["registers"]) <= MAX_REGISTERS_PER_THREAD
    assert registers_of_blocks(said, config.ctas_per_sm, config.num_threads) <= REGISTERS


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == 90], ids=name)
def test_a_kernel_uses_its_units(case: Case, logs: Logs) -> None:
    """The matrix unit and the ways of copying that its family is for, and no others."""
    _, config = case
    cubin, _ = logs[case].result()
    found = sass.instructions(cubin)
    if config.family == "prefill_sm80":
        assert found["HMMA"] >= (config.head_dim_qk + config.cta_tile_kv) // 16
        assert found["LDGSTS"] > 0
        assert not found.keys() & {"HGMMA", "UTMALDG", "USETMAXREG", "LDL", "STL"}
        return
    # Q.K^T and P.V of a tile, 16 elements and 16 keys at a time.
    assert found["HGMMA"] >= (config.head_dim_qk + config.cta_tile_kv) // 16
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
    config = plain_kernel(80, "float16", 64, 16, "short")
    with pytest.raises(RuntimeError, match=f"^NVRTC refused {config.name} for sm_80:") as raised:
        kernels.compile_cubin(config, 80)
    assert re.findall(r"error: (.*)", str(raised.value)) == wrong
