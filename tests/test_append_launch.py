"""How an append is launched, without a GPU.

A stand-in for the driver reads each launch, and does in plain Python what the kernel does with its
parameters.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import page_problems
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_problems import Problem, build, same_bits

from cupaged import append, append_cuda, devices, kernels
from cupaged.append import Indices
from cupaged.append_cuda import (
    APPEND_DTYPE,
    CTAS_PER_SM,
    LAUNCH_ROWS,
    NUM_THREADS,
    ROWS_PER_THREAD,
    SLOTS_DTYPES,
    AppendKernel,
    launch_shape,
)
from cupaged.launch_arguments import Arguments
from cupaged.spec import DeviceModel

# How a launch divides the rows


@given(
    st.integers(1, 20_000),
    st.one_of(st.integers(1, 600), st.sampled_from([128, 1024, 8192])),
    st.integers(1, 200),
)
def test_blocks_cover_every_unit_of_every_row_once(nnz: int, row_units: int, num_sms: int) -> None:
    shape = launch_shape(nnz, row_units, 1, num_sms)
    lanes = 1 << shape.numbers[-1]
    assert 1 <= lanes <= NUM_THREADS
    # A thread's unit, of the parts and lanes that there are, and its rows.
    assert row_units <= shape.parts * lanes <= max(row_units * 1.25, 1)
    rows_at_once = NUM_THREADS // lanes
    step = shape.blocks * rows_at_once
    assert step * ROWS_PER_THREAD >= nnz
    # No block without a row, and no more blocks than the GPU holds at once unless they are full.
    assert (shape.blocks - 1) * rows_at_once < nnz
    fewest = -(-nnz // (rows_at_once * ROWS_PER_THREAD))
    assert shape.blocks == fewest or shape.blocks * shape.parts <= num_sms * CTAS_PER_SM


def test_the_launch_of_the_measured_appends() -> None:
    """8 KV heads of 128 in float16 on an H200: whole warps share a row, and all fits at once."""
    assert launch_shape(5000, 128, 16, 132)[:2] == (132 * CTAS_PER_SM, 1)
    assert launch_shape(64, 128, 16, 132)[:2] == (64, 1)
    assert launch_shape(5000, 128, 16, 132).numbers[-1] == 7


# What the kernel is given


class OnDevice:
    """An array in the host's memory that passes for one on a device."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host
        self.data = SimpleNamespace(ptr=host.ctypes.data)
        for attribute in ("shape", "strides", "itemsize", "ndim", "dtype"):
            setattr(self, attribute, getattr(host, attribute))

    def __len__(self) -> int:
        return len(self.host)


class Driver:
    """Runs launches on the host's memory, by the parameters alone."""

    def __init__(self) -> None:
        self.kernels: dict[int, AppendKernel] = {}
        self.launched: list[tuple[AppendKernel, int]] = []
        self.uploads = 0
        self.waits = 0
        self.capturing = False
        self.during: Any = None
        self.blocks: list[np.ndarray] = []
        stream = SimpleNamespace(record=object, wait_event=self.wait)
        self.cuda = SimpleNamespace(
            driver=SimpleNamespace(launchKernel=self.launch),
            runtime=SimpleNamespace(streamIsCapturing=lambda stream: self.capturing),
            get_current_stream=lambda: stream,
            alloc=self.alloc,
        )

    def wait(self, event: object) -> None:
        self.waits += 1

    def alloc(self, size: int) -> Any:
        self.blocks.append(np.full(size // 4, -7, np.int32))
        return SimpleNamespace(ptr=self.blocks[-1].ctypes.data)

    def upload(self, uploads: Any, device: int, stream: Any) -> None:
        ((block, size, ((begin, values),)),) = uploads
        assert (begin, size) == (0, len(values))
        ctypes.memmove(block.ptr, values.ctypes.data, values.nbytes)
        self.uploads += 1

    def load(self, kernel: AppendKernel, arch: int, device: int) -> int:
        assert (arch, device) == (90, 0)
        function = 100 + len(self.kernels)
        self.kernels[function] = kernel
        return function

    def launch(self, function: int, *sizes: int) -> None:
        blocks, parts, one, *block, shared, stream, arguments, extra = sizes
        assert (one, block, shared, extra) == (1, [NUM_THREADS, 1, 1], 0, 0)
        if self.during is not None:
            call, self.during = self.during, None
            call()
        kernel = self.kernels[function]
        pointers = (ctypes.c_uint64 * 2).from_address(arguments)
        p, slots = (
            np.frombuffer(ctypes.string_at(pointer, kernel.structs[struct].itemsize), dtype)[0]
            for pointer, (struct, dtype) in zip(
                pointers,
                (("Append", APPEND_DTYPE), ("Slots", SLOTS_DTYPES[kernel.way])),
                strict=True,
            )
        )
        self.launched.append((kernel, stream))
        lanes_shift, head_units = int(p["lanes_shift"]), int(p["head_units"])
        lanes, num_rows = 1 << lanes_shift, int(p["num_rows"])
        assert parts * lanes >= p["row_units"]
        assert blocks * (NUM_THREADS >> lanes_shift) * ROWS_PER_THREAD >= num_rows
        assert p["row_units"] % head_units == 0
        head_bytes = head_units * kernel.unit_bytes
        addresses = [int(p[field]) for field in ("append_key", "append_value", "k", "v")]
        for row in range(num_rows):
            page, in_page = self.slot(kernel.way, slots, row)
            if page < 0:
                continue
            for head in range(int(p["row_units"]) // head_units):
                for source, target, (rows, pages) in zip(
                    addresses[:2], addresses[2:], (("key", "k"), ("value", "v")), strict=True
                ):
                    source += row * int(p[f"{rows}_stride_row"])
                    source += head * int(p[f"{rows}_stride_head"])
                    target += page * int(p[f"{pages}_stride_page"])
                    target += in_page * int(p[f"{pages}_stride_token"])
                    target += head * int(p[f"{pages}_stride_head"])
                    assert source % kernel.unit_bytes == target % kernel.unit_bytes == 0
                    ctypes.memmove(target, source, head_bytes)

    def slot(self, way: str, slots: Any, row: int) -> tuple[int, int]:
        if way == "launch":
            page, in_page = slots["of_row"][row].tolist()
            return page, in_page
        if way == "memory":
            page, in_page = (ctypes.c_int32 * 2).from_address(int(slots["of_row"]) + 8 * row)
            return page, in_page

        def look(array: str, i: int) -> int:
            at = slots[array]
            kind = ctypes.c_int64 if at["wide"] else ctypes.c_int32
            return kind.from_address(int(at["data"]) + i * int(at["stride"])).value

        request, position = look("batch_indices", row), look("positions", row)
        if request < 0:
            return -1, 0
        assert request < slots["batch"]
        begin, end = look("kv_indptr", request), look("kv_indptr", request + 1)
        page_size = int(slots["page_size"])
        assert position < (end - begin - 1) * page_size + look("kv_last_page_len", request)
        magic, shift = int(slots["page_magic"]), int(slots["page_shift"])
        index = (position * magic >> 32) >> shift if magic else position
        assert begin + index < end <= slots["num_indices"]
        page = look("kv_indices", begin + index)
        assert page < slots["num_pages"]
        return page, position - index * page_size


@contextmanager
def standing_in() -> Iterator[Driver]:
    """A driver in the place of CUDA's."""
    driver = Driver()
    with pytest.MonkeyPatch.context() as patch:
        for module in (append_cuda, devices):
            patch.setattr(module, "cupy", lambda: driver)
        patch.setattr(append_cuda, "upload", driver.upload)
        patch.setattr(append_cuda, "device_model", lambda device: DeviceModel(132, 90))
        patch.setattr(append_cuda, "_functions", {})
        patch.setattr(append_cuda, "_arguments", Arguments(append_cuda.LAYOUT))
        patch.setattr(append, "_last", None)  # it may be on another driver's device
        patch.setattr(kernels, "load", driver.load)
        yield driver


@pytest.fixture
def driver() -> Iterator[Driver]:
    with standing_in() as found:
        yield found


def slots_of(problem: Problem) -> append.Slots:
    k = problem.cache[:, 0] if problem.stacked else problem.cache[0]
    return append.find_slots(Indices(**problem.indices), problem.page_size, len(k))


def launch(problem: Problem, where: append.Slots | None, stream: int = 7) -> None:
    """As `append_paged_kv_cache()` does it: with slots, or with index arrays."""
    k, v = (problem.cache[:, 0], problem.cache[:, 1]) if problem.stacked else problem.cache
    tensors = (problem.key_view.array, problem.value_view.array, k, v)
    if where is None:
        on_device = {name: OnDevice(array) for name, array in problem.indices.items()}
    append_cuda.run(
        *(0, stream, *map(OnDevice, tensors), problem.kv_layout),
        Indices(**on_device) if where is None else where,
    )


@pytest.mark.parametrize("way", SLOTS_DTYPES)
@given(problem=page_problems.problems(max_len=30))
def test_the_kernel_finds_every_parameter(way: str, problem: Problem) -> None:
    if not problem.key_view.array.size:
        return
    expected = problem.solved()
    with standing_in() as driver:
        slots = slots_of(problem)
        if way == "memory":  # which is for more rows than that
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(append_cuda, "LAUNCH_ROWS", 0)
                launch(problem, slots)
        else:
            launch(problem, slots if way == "launch" else None)
        ((kernel, stream),) = driver.launched
    assert (kernel.way, stream) == (way, 7)
    assert same_bits(problem.storages, expected)


def test_many_rows(rng: np.random.Generator, driver: Driver) -> None:
    """As many as come with a launch, and one more."""
    for rows, way in ((LAUNCH_ROWS, "launch"), (LAUNCH_ROWS + 1, "memory")):
        problem = build(rng, [rows + 20, 9], [rows - 3, 2], padding=1, shuffled=True)
        expected = problem.solved()
        launch(problem, slots_of(problem))
        assert driver.launched[-1][0].way == way
        assert same_bits(problem.storages, expected)


# (dtype, head_dim, form of the rows, form of the cache) → bytes of a unit
UNITS = [
    ("float16", 128, "contiguous", "tuple", 16),
    ("float16", 128, "heads first", "stacked", 16),
    ("float16", 64, "backwards", "backwards", 16),
    ("float16", 64, "fused", "strided", 16),
    ("float16", 64, "odd", "tuple", 2),
    ("float16", 64, "contiguous", "odd", 2),
    ("float32", 64, "odd", "layer", 4),
    ("bfloat16", 64, "offset", "tuple", 2),
    ("float8_e4m3fn", 64, "contiguous", "tuple", 16),
    ("float8_e4m3fn", 64, "contiguous", "odd", 1),
    ("float8_e5m2", 72, "contiguous", "tuple", 8),
    ("float16", 6, "contiguous", "tuple", 4),
    ("float16", 5, "contiguous", "tuple", 2),
]


@pytest.mark.parametrize(("dtype", "head_dim", "row_form", "cache_form", "unit_bytes"), UNITS)
def test_the_largest_unit_is_taken(
    rng: np.random.Generator,
    driver: Driver,
    dtype: str,
    head_dim: int,
    row_form: str,
    cache_form: str,
    unit_bytes: int,
) -> None:
    problem = build(
        *(rng, [20, 5], [3, 2]),
        head_dim=head_dim,
        dtype=dtype,
        row_form=row_form,
        cache_form=cache_form,
    )
    # NumPy's own memory begins at multiples of 16 bytes.
    assert all(storage.ctypes.data % 16 == 0 for storage in problem.storages)
    expected = problem.solved()
    launch(problem, slots_of(problem))
    assert driver.launched[0][0].unit_bytes == unit_bytes
    assert same_bits(problem.storages, expected)


def test_strides_of_an_axis_of_length_1_do_not_matter(
    rng: np.random.Generator, driver: Driver
) -> None:
    """Nothing lies a stride along it: frameworks put any number there."""
    problem = build(rng, [1], [1], num_kv_heads=1, page_size=1, spare_pages=0)
    expected = problem.solved()

    def idle(view: page_problems.View) -> page_problems.View:
        array = view.array
        strides = (*(3 for _ in array.shape[:-1]), array.itemsize)
        return page_problems.View(
            np.lib.stride_tricks.as_strided(array, array.shape, strides), view.index
        )

    odd = page_problems.replace(
        problem,
        key_view=idle(problem.key_view),
        value_view=idle(problem.value_view),
        cache_views=tuple(map(idle, problem.cache_views)),
    )
    launch(odd, slots_of(odd))
    assert driver.launched[0][0].unit_bytes == 16
    assert same_bits(problem.storages, expected)


def test_slots_are_uploaded_once_for_all_layers(rng: np.random.Generator, driver: Driver) -> None:
    rows = LAUNCH_ROWS + 1
    problem = build(rng, [rows], [rows])
    for uploads in (1, 1):
        launch(problem, slots_of(problem))
        assert driver.uploads == uploads
    assert driver.waits == 1
    launch(problem, slots_of(problem), stream=8)  # which nobody has ordered behind the upload
    assert driver.uploads == 2
    problem.positions[:] = problem.positions[::-1].copy()
    expected = problem.solved()
    launch(problem, slots_of(problem), stream=8)
    assert driver.uploads == 3
    assert same_bits(problem.storages, expected)


def test_a_kernel_is_not_loaded_while_a_graph_is_captured(
    rng: np.random.Generator, driver: Driver
) -> None:
    problem = build(rng, [20], [3])
    before = [storage.copy() for storage in problem.storages]
    driver.capturing = True
    with pytest.raises(RuntimeError) as raised:
        launch(problem, None)
    assert str(raised.value) == (
        "append_paged_kv_cache() in the capture of a CUDA graph, where its kernel can't be "
        "loaded: call it once before, with the same arrays"
    )
    assert same_bits(problem.storages, before)
    driver.capturing = False
    launch(problem, None)
    driver.capturing = True
    launch(problem, None)
    assert len(driver.launched) == 2
    assert len(driver.kernels) == 1


def test_calls_at_once_have_parameters_of_their_own(
    rng: np.random.Generator, driver: Driver
) -> None:
    """The driver lets other threads run: what it reads must stay as it is."""
    one, other = (build(rng, [30], [n]) for n in (3, 5))
    expected = one.solved() + other.solved()
    # The slots are found one after the other, as they are in `append_paged_kv_cache()`.
    first, second = slots_of(one), slots_of(other)
    driver.during = lambda: launch(other, second)
    launch(one, first)
    assert same_bits(one.storages + other.storages, expected)
    assert len(append_cuda._arguments) == 2
    launch(one, first)
    assert len(append_cuda._arguments) == 2
