"""The kernels that merge states: compiled for every architecture, launched as they will read it.

NVRTC compiles without a GPU; the launches are read by a stand-in for the driver, which merges what
the parameters point to.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sass
import states
from compiler import REGISTERS, SM_LIMITS, Logs, name, read, registers_of_blocks
from hypothesis import given
from hypothesis import strategies as st
from states import DTYPES, bits

from cupaged import devices, kernels, merge_cuda
from cupaged.launch_arguments import Arguments
from cupaged.merge import States
from cupaged.merge_cuda import KERNELS, MERGE_DTYPE, NUM_THREADS, MergeKernel, launch_shape
from cupaged.spec import DeviceModel

Case = tuple[int, MergeKernel]
CASES: list[Case] = [(arch, kernel) for arch in SM_LIMITS for kernel in KERNELS.values()]
VECTOR_BYTES = 16

# Compiled


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_merge_kernel_fits(case: Case, logs: Logs) -> None:
    """It compiles without a warning, spills nothing, and an SM holds the blocks it is meant to."""
    arch, kernel = case
    cubin, said = read(case, logs)
    assert not sass.instructions(cubin).keys() & {"LDL", "STL"}

    _, sm_threads = SM_LIMITS[arch]
    assert kernel.shared_bytes == int(said["shared"] or 0) == 0
    assert sm_threads >= kernel.ctas_per_sm * NUM_THREADS
    assert registers_of_blocks(said, kernel.ctas_per_sm, NUM_THREADS) <= REGISTERS


def test_names_and_kernels_are_unique() -> None:
    assert len({kernel.name for kernel in KERNELS.values()}) == len(set(KERNELS.values())) == 12


@pytest.mark.parametrize("change", ["two fields swapped", "a field more"])
def test_a_changed_layout_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, compiler: None, change: str
) -> None:
    """A NumPy mirror that lies otherwise than its device struct is found before anything runs."""
    kernel = MergeKernel("float16", True, 2)
    assert MERGE_DTYPE.names is not None
    fields = [(field, MERGE_DTYPE[field]) for field in MERGE_DTYPE.names]
    if change == "two fields swapped":
        fields[:2] = fields[1::-1]
    else:
        fields.append(("one_more", MERGE_DTYPE[0]))
    monkeypatch.setattr(MergeKernel, "structs", {"Merge": np.dtype(fields, align=True)})
    with pytest.raises(RuntimeError, match=f"^NVRTC refused {kernel.name} for sm_80:") as raised:
        kernels.compile_cubin(kernel, 80)
    assert re.search(r"error: static assertion failed", str(raised.value))


# How a launch divides rows and heads


@given(st.integers(1, 3000), st.integers(1, 200), st.integers(1, 3000))
def test_blocks_cover_every_place_once(num_rows: int, num_heads: int, num_vectors: int) -> None:
    shape = launch_shape(num_rows, num_heads, num_vectors)
    vectors, places, heads, magic, shift, lanes_log2 = shape.numbers
    assert (vectors, places, heads) == (num_vectors, num_rows * num_heads, num_heads)
    lanes = 1 << lanes_log2
    assert 1 <= lanes <= 32  # of one warp
    # Each has something to do, and twice as many would not.
    assert lanes == 32 or 2 * lanes >= num_vectors
    assert lanes == 1 or lanes < num_vectors
    at_once = NUM_THREADS // lanes
    assert (shape.blocks - 1) * at_once < places <= shape.blocks * at_once
    for place in (0, 1, num_heads - 1, num_heads, places - 1, shape.blocks * at_once - 1):
        row = (place * magic >> 32) >> shift if magic else place
        assert row == place // num_heads


# What the kernel is given


class OnDevice:
    """An array in the host's memory that passes for one on a device."""

    def __init__(self, host: np.ndarray) -> None:
        self.data = SimpleNamespace(ptr=host.ctypes.data)
        self.shape, self.strides, self.dtype = host.shape, host.strides, host.dtype
        self.host = host

    def __len__(self) -> int:
        return len(self.host)


class Driver:
    """Merges what a launch's parameters point to, by the formula."""

    def __init__(self) -> None:
        self.kernels: list[MergeKernel] = []
        self.launched: list[tuple[MergeKernel, int]] = []
        self.capturing = False
        self.during: Any = None
        self.cuda = SimpleNamespace(
            driver=SimpleNamespace(launchKernel=self.launch),
            runtime=SimpleNamespace(streamIsCapturing=lambda stream: self.capturing),
        )

    def load(self, kernel: MergeKernel, arch: int, device: int) -> int:
        assert (arch, device) == (90, 3)
        self.kernels.append(kernel)
        return 99 + len(self.kernels)

    def launch(self, function: int, *sizes: int) -> None:
        blocks, *ones, threads, one, other, shared, stream, arguments, extra = sizes
        assert (ones, threads, one, other, shared, extra) == ([1, 1], NUM_THREADS, 1, 1, 0, 0)
        if self.during is not None:
            call, self.during = self.during, None
            call()
        kernel = self.kernels[function - 100]
        pointer = ctypes.c_uint64.from_address(arguments).value
        params = ctypes.string_at(pointer, MERGE_DTYPE.itemsize)
        p = {
            field: int(np.frombuffer(params, MERGE_DTYPE)[0][field]) for field in MERGE_DTYPE.names
        }
        self.launched.append((kernel, stream))
        at_once = NUM_THREADS >> p["lanes_log2"]
        assert (blocks - 1) * at_once < p["num_places"] <= blocks * at_once
        assert kernel.num_states in (0, p["num_states"])
        for place in range(p["num_places"]):
            magic, shift = p["heads_magic"], p["heads_shift"]
            row = (place * magic >> 32) >> shift if magic else place
            self.merge(kernel, p, row, place - row * p["num_heads"])

    def merge(self, kernel: MergeKernel, p: dict[str, int], row: int, head: int) -> None:
        """One row and head."""
        if p["mask"] and not ctypes.c_uint8.from_address(p["mask"] + row * p["mask_stride"]).value:
            return
        dtype = DTYPES[kernel.dtype]
        row_bytes = p["num_vectors"] * (VECTOR_BYTES if kernel.aligned else dtype.itemsize)

        def address(tensor: str, state: int = 0) -> int:
            at = p[tensor] + row * p[f"{tensor}_stride_row"] + head * p[f"{tensor}_stride_head"]
            at += state * p.get(f"{tensor}_stride_state", 0)
            assert not kernel.aligned or tensor[0] == "s" or at % VECTOR_BYTES == 0
            return at

        count = p["num_states"]
        places = [("", 0), *(("_rest", i) for i in range(count - 1))][:count]
        v = [ctypes.string_at(address(f"v{rest}", i), row_bytes) for rest, i in places]
        s = [ctypes.c_float.from_address(address(f"s{rest}", i)).value for rest, i in places]
        lse = np.array(s, np.float32)[None, :, None]
        outputs = np.frombuffer(b"".join(v), dtype).reshape(
            1, count, 1, row_bytes // dtype.itemsize
        )
        out, out_lse = states.merged(outputs, lse)
        merged = out.astype(dtype).tobytes()
        merged_lse = float(out_lse[0, 0])
        live = [i for i in range(count) if s[i] > -np.inf]
        if len(live) == 1:
            merged, merged_lse = v[live[0]], s[live[0]]
        ctypes.memmove(address("v_out"), merged, row_bytes)
        ctypes.c_float.from_address(address("s_out")).value = merged_lse


@contextmanager
def standing_in() -> Iterator[Driver]:
    """A driver in the place of CUDA's."""
    driver = Driver()
    with pytest.MonkeyPatch.context() as patch:
        for module in (merge_cuda, devices):
            patch.setattr(module, "cupy", lambda: driver)
        patch.setattr(merge_cuda, "device_model", lambda device: DeviceModel(132, 90))
        patch.setattr(merge_cuda, "_functions", {})
        patch.setattr(merge_cuda, "_arguments", Arguments(merge_cuda.LAYOUT))
        patch.setattr(kernels, "load", driver.load)
        yield driver


@pytest.fixture
def driver() -> Iterator[Driver]:
    with standing_in() as found:
        yield found


def launch(
    found: states.States, out: np.ndarray, lse: np.ndarray, mask: Any = None, stream: int = 7
) -> None:
    """Merge all states, by state as the public functions hand them over."""
    v, s = found.v.swapaxes(0, 1), found.s.swapaxes(0, 1)
    given = States()
    if len(v):
        given = States(*map(OnDevice, (v[0], s[0], v[1:], s[1:])))
    mask = None if mask is None else OnDevice(mask)
    merge_cuda.run(3, stream, given, OnDevice(out), OnDevice(lse), mask)


@given(
    states.draws(st.one_of(st.just(2), st.integers(0, 5))),
    st.sampled_from(states.FORMS),
    st.booleans(),
)
def test_the_kernel_finds_every_parameter(
    found: states.States, out_form: str, strided: bool
) -> None:
    seq_len, num_states, *rest = found.v.shape
    out = states.view(out_form, (seq_len, *rest), found.v.dtype)
    lse = states.lse_view(strided, (seq_len, rest[0]))
    with standing_in() as driver:
        launch(found, out.array, lse.array)
    if seq_len * rest[0] == 0:
        assert driver.launched == []
        return
    states.check(found.v, found.s, out.array, lse.array)
    assert np.isnan(out.outside()).all()
    assert np.isnan(lse.outside()).all()
    ((kernel, stream),) = driver.launched
    assert (kernel.dtype, stream) == (found.v.dtype.name, 7)
    assert kernel.num_states == (2 if num_states == 2 else 0)


@given(states.draws(st.just(2)), st.data())
def test_in_place_with_a_mask(found: states.States, data: st.DataObject) -> None:
    v, s = found.v.copy(), found.s.copy()
    rows = np.array(data.draw(st.lists(st.booleans(), min_size=len(v), max_size=len(v))), np.bool_)
    mask = np.zeros((len(v), 3), np.uint8)
    mask[rows, 1] = 1
    with standing_in():
        launch(found, found.v[:, 0], found.s[:, 0], mask[:, 1])
    states.check(v[rows], s[rows], found.v[rows, 0], found.s[rows, 0])
    assert bits(found.v[~rows]) == bits(v[~rows])
    assert bits(found.s[~rows]) == bits(s[~rows])


#: (dtype, head_dim, form) → whether lanes take 16 bytes at a time
ALIGNED = [
    ("float16", 128, "contiguous", True),
    ("bfloat16", 8, "fused", True),
    ("float32", 4, "every other row", True),
    ("float32", 64, "backwards", True),
    ("float16", 12, "contiguous", False),
    ("float32", 6, "contiguous", False),
    ("float16", 64, "odd", False),
    ("float32", 64, "offset", False),
]


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize(("dtype", "head_dim", "form", "aligned"), ALIGNED)
def test_16_bytes_at_a_time_where_all_rows_are_such(
    rng: np.random.Generator,
    driver: Driver,
    dtype: str,
    head_dim: int,
    form: str,
    aligned: bool,
    number: int,
) -> None:
    shape = (3, number, 2, head_dim)
    contiguous = states.build(rng, shape, dtype)
    # NumPy's own memory begins at multiples of 16 bytes.
    assert contiguous.v.ctypes.data % VECTOR_BYTES == 0
    out = states.view("contiguous", (3, 2, head_dim), DTYPES[dtype]).array
    lse = np.empty((3, 2), np.float32)
    launch(states.build(rng, shape, dtype, form=form), out, lse)
    launch(contiguous, states.view(form, out.shape, out.dtype).array, lse)
    assert [kernel.aligned for kernel, _ in driver.launched] == [aligned, aligned]


def test_strides_of_an_axis_of_length_1_do_not_matter(
    rng: np.random.Generator, driver: Driver
) -> None:
    """Nothing lies a stride along it: frameworks put any number there."""
    found = states.build(rng, (1, 2, 1, 64), empty=0)
    out, lse = np.empty((1, 1, 64), np.float16), np.empty((1, 1), np.float32)

    def idle(x: np.ndarray) -> np.ndarray:
        strides = (*(3 for _ in x.shape[:-1]), x.itemsize)
        return np.lib.stride_tricks.as_strided(x, x.shape, strides)

    given = States(*(OnDevice(idle(x)) for x in (found.v[:, 0], found.s[:, 0])),
                   *(OnDevice(idle(x[None])) for x in (found.v[:, 1], found.s[:, 1])))  # fmt: skip
    merge_cuda.run(3, 7, given, OnDevice(idle(out)), OnDevice(lse), None)
    assert driver.launched[0][0].aligned
    states.check(found.v, found.s, out, lse)


def test_a_kernel_is_not_loaded_while_a_graph_is_captured(
    rng: np.random.Generator, driver: Driver
) -> None:
    found = states.build(rng, (3, 2, 2, 64))
    out, lse = np.full((3, 2, 64), 7, np.float16), np.full((3, 2), 7, np.float32)
    driver.capturing = True
    with pytest.raises(RuntimeError) as raised:
        launch(found, out, lse)
    assert str(raised.value) == (
        "attention states are merged in the capture of a CUDA graph, where the kernel can't be "
        "loaded: make the same call once before"
    )
    assert (out == 7).all()
    driver.capturing = False
    launch(found, out, lse)
    driver.capturing = True
    launch(found, out, lse)
    assert len(driver.launched) == 2
    assert len(driver.kernels) == 1


def test_calls_at_once_have_parameters_of_their_own(
    rng: np.random.Generator, driver: Driver
) -> None:
    """The driver lets other threads run: what it reads must stay as it is."""
    one, other = (states.build(rng, (n, 2, 2, 64)) for n in (3, 5))
    results = [(np.empty((n, 2, 64), np.float16), np.empty((n, 2), np.float32)) for n in (3, 5)]
    driver.during = lambda: launch(other, *results[1])
    launch(one, *results[0])
    for found, result in zip((one, other), results, strict=True):
        states.check(found.v, found.s, *result)
    assert len(merge_cuda._arguments) == 2
    launch(one, *results[0])
    assert len(merge_cuda._arguments) == 2
