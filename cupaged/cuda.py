"""Runs a schedule on a CUDA device: its data uploaded once, its kernels launched."""

from __future__ import annotations

import functools
import operator
import struct
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged import kernels
from cupaged.errors import BackendUnavailableError
from cupaged.schedule import IntArray, Launch, Schedule
from cupaged.spec import PARAMS_DTYPE, AttentionSpec, DeviceModel, field_offset

#: Compute capability of the first GPUs with `cp.async` and `mma.sync` for bfloat16.
MIN_ARCH = 80

#: What a kernel loads and stores at a time, in bytes; every row must begin at a multiple of it.
_ROW_ALIGNMENT = 16

#: Where the parameters begin behind the pointer to them.
_PARAMS_BEGIN = 16
_POINTER = struct.Struct("Q")
# PARAMS_DTYPE's fields in its order: five pointers and twelve strides of a call; seven pointers
# and nine numbers of a plan; a flag and three factors of a call.
_TENSORS = struct.Struct("5Q12q")
_PLAN = struct.Struct("7Q5i4I")
_FACTORS = struct.Struct("i3f")
_PLAN_BEGIN = _PARAMS_BEGIN + field_offset(PARAMS_DTYPE, "requests")
_FACTORS_BEGIN = _PARAMS_BEGIN + field_offset(PARAMS_DTYPE, "negate_logits")

#: The smallest float32 that isn't subnormal. A scale of 0 becomes this: products vanish beside
#: 1 all the same, and -inf stays -inf.
_SMALLEST_SCALE = 2.0**-126

#: Parts of the uploaded block begin at multiples of this many int32.
_ALIGNMENT = 32

# Pinned blocks to copy from, by device. One is taken again once the copy from it has ended: written
# earlier, it would be overwritten under the copy.
_staging: defaultdict[int, list[_Staging]] = defaultdict(list)
_staging_lock = threading.Lock()
#: The smallest block, in int32; larger ones are powers of two.
_STAGING_SIZE = 1 << 15


@functools.lru_cache(maxsize=1)
def cupy() -> Any:
    """CuPy, with a GPU that it can use.

    Raises
    ------
    BackendUnavailableError
        CuPy, NVRTC, a driver or a GPU is missing.
    """
    kernels.nvrtc()
    import cupy as module

    try:
        count = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailableError(
            f"the CUDA backend finds no usable GPU ({error}): install an NVIDIA driver, or pass "
            "host arrays to use the reference backend"
        ) from error
    if count == 0:
        raise BackendUnavailableError(
            "the CUDA backend finds no GPU: pass host arrays to use the reference backend"
        )
    return module


@functools.cache
def device_model(device: int) -> DeviceModel:
    """What the planner needs to know of CUDA device `device`.

    Raises
    ------
    BackendUnavailableError
        Its compute capability is below 8.0.
    """
    properties = cupy().cuda.runtime.getDeviceProperties(device)
    arch = properties["major"] * 10 + properties["minor"]
    if arch < MIN_ARCH:
        name = properties["name"].decode()
        raise BackendUnavailableError(
            f"cuda:{device} ({name}) has compute capability {arch // 10}.{arch % 10}, expected at "
            "least 8.0: pass host arrays to use the reference backend"
        )
    return DeviceModel(num_sms=properties["multiProcessorCount"], arch=arch)


def magic(divisor: int) -> tuple[int, int]:
    """Multiplier and shift for division by `divisor`, as `params.cuh` describes them.

    Exact for dividends below 2^31; a multiplier of 0 stands for the divisor 1.
    """
    if divisor == 1:
        return 0, 0
    bits = (divisor - 1).bit_length()
    return -(-(1 << (31 + bits)) // divisor), bits - 1


def current_place() -> tuple[int, int]:
    """CuPy's current device and its current stream."""
    module = cupy()
    return module.cuda.runtime.getDevice(), module.cuda.get_current_stream().ptr


class _Ready(NamedTuple):
    """A launch with everything but the arrays of a call.

    `function` is the kernel's `CUfunction`; `argument` what `cuLaunchKernel` takes: a pointer to
    the parameters, padded to 16 bytes, and then the parameters, the call's own still empty.
    """

    function: int
    grid: int
    num_threads: int
    shared_bytes: int
    argument: Any


class DevicePlan:
    """A schedule on one CUDA device, ready to be launched again and again.

    Parameters
    ----------
    schedule : Schedule
    page_indices : int32 [paged_kv_indptr[-1]], on the host
    device : int
        CUDA device, the current one; the upload goes to its current stream.
    workspace : cupy.ndarray, optional
        Bytes for partial states, at least `schedule.workspace_bytes`; allocated where not given.
    """

    def __init__(
        self,
        schedule: Schedule,
        page_indices: IntArray,
        device: int,
        workspace: Any | None,
    ) -> None:
        arch = device_model(device).arch
        # Compiled first: should that fail, nothing has been allocated or copied.
        loaded = [kernels.load(launch.config, arch, device) for launch in schedule.launches]
        memory = cupy().cuda.alloc
        needed = schedule.workspace_bytes
        self._partials = None
        if needed:
            self._partials = memory(needed) if workspace is None else workspace.data
        self.stream = cupy().cuda.get_current_stream()
        parts = _parts(schedule, page_indices)
        offsets, size = _offsets(parts)
        self._block = memory(size * 4)
        self.uploaded = _upload(parts, offsets, size, self._block, device, self.stream)
        requests, pages, *rest = (self._block.ptr + offset * 4 for offset in offsets)
        partials = 0 if self._partials is None else self._partials.ptr
        self.launches = tuple(
            _Ready(
                function=kernel,
                grid=launch.grid,
                num_threads=launch.config.num_threads,
                shared_bytes=launch.config.shared_bytes,
                argument=_argument(
                    schedule.spec, launch, (requests, items, pages), partials, counters
                ),
            )
            for launch, kernel, items, counters in zip(
                schedule.launches, loaded, rest[::2], rest[1::2], strict=True
            )
        )

    def wait(self) -> None:
        """Wait until the plan has arrived on the device, and maybe a later one."""
        self.uploaded.synchronize()


@dataclass(slots=True)
class _Staging:
    """A pinned block, and the event after the last copy from it."""

    memory: Any
    words: npt.NDArray[np.int32]
    event: Any


def _parts(schedule: Schedule, page_indices: IntArray) -> list[IntArray]:
    """What a plan uploads: requests, pages, and each launch's items and counters."""
    parts = [schedule.requests.view(np.int32), page_indices]
    for launch in schedule.launches:
        parts.append(launch.items.view(np.int32))
        # Two work counters, then one for each split tile and KV head: all zero.
        parts.append(np.zeros(2 + launch.num_merges * schedule.spec.num_kv_heads, np.int32))
    return parts


def _offsets(parts: list[IntArray]) -> tuple[list[int], int]:
    """Where the parts begin in one block, and its size, in int32."""
    offsets, size = [], 0
    for part in parts:
        offsets.append(size)
        size += (len(part) + _ALIGNMENT) // _ALIGNMENT * _ALIGNMENT
    return offsets, size


def _upload(
    parts: list[IntArray], offsets: list[int], size: int, block: Any, device: int, stream: Any
) -> Any:
    """Start the one asynchronous copy; returns the event that follows it."""
    with _staging_lock:
        blocks = _staging[device]
        for staging in blocks:
            if len(staging.words) >= size and staging.event.done:
                break
        else:
            length = max(_STAGING_SIZE, 1 << (size - 1).bit_length())
            memory = cupy().cuda.alloc_pinned_memory(length * 4)
            words = np.frombuffer(memory, np.int32, length)
            staging = _Staging(memory, words, cupy().cuda.Event(disable_timing=True))
            blocks.append(staging)
        words = staging.words
        for offset, part in zip(offsets, parts, strict=True):
            words[offset : offset + len(part)] = part
        block.copy_from_host_async(staging.memory.ptr, size * 4, stream)
        staging.event.record(stream)
    return staging.event


@functools.lru_cache(maxsize=64)
def _numbers(spec: AttentionSpec) -> tuple[int, ...]:
    """The parameters that a spec alone decides."""
    return (
        spec.num_kv_heads,
        spec.gqa_group_size,
        spec.page_size,
        int(spec.causal),
        *magic(spec.gqa_group_size),
        *magic(spec.page_size),
    )


def _argument(
    spec: AttentionSpec,
    launch: Launch,
    tables: tuple[int, int, int],
    partials: int,
    counters: int,
) -> Any:
    """A launch's parameters, but for the arrays and factors of a call.

    All but the spec and the launch are addresses; `tables` are requests, items and pages.
    """
    argument: Any = np.zeros(_PARAMS_BEGIN + PARAMS_DTYPE.itemsize, np.uint8)
    _PLAN.pack_into(
        argument,
        _PLAN_BEGIN,
        *tables,
        partials,
        partials + launch.num_partial_rows(spec) * spec.head_dim * 4,
        counters + 2 * 4,
        counters,
        len(launch.items),
        *_numbers(spec),
    )
    return argument


def run(
    plan: DevicePlan,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any | None,
    factors: tuple[float, float, float],
) -> None:
    """Launch a plan's kernels on the current stream.

    Parameters
    ----------
    plan : DevicePlan
    q, k, v, out, lse : cupy.ndarray
        As `reference.run` takes them, on the plan's device. Rows of q and out that don't begin at
        multiples of 16 bytes go by way of a copy.
    factors : tuple of float
        What multiplies `q·k` in base 2, the output, and the base-2 LSE.

    Raises
    ------
    ValueError
        K's or V's rows don't begin at multiples of 16 bytes.
    """
    lse_pointer, lse_strides = (0, (0, 0)) if lse is None else (lse.data.ptr, lse.strides)
    pointers = (q.data.ptr, k.data.ptr, v.data.ptr, out.data.ptr)
    strides = (*q.strides[:2], *k.strides[:3], *v.strides[:3], *out.strides[:2])
    if functools.reduce(operator.or_, pointers + strides) % _ROW_ALIGNMENT:
        _run_unaligned(plan, q, k, v, out, lse, factors)
        return
    cuda = cupy().cuda
    stream = cuda.get_current_stream()
    same_stream = stream.ptr == plan.stream.ptr
    if not same_stream:
        stream.wait_event(plan.uploaded)
    size = q.itemsize
    tensors = (
        *pointers,
        lse_pointer,
        *[stride // size for stride in strides],
        *(lse_strides[0] // 4, lse_strides[1] // 4),
    )
    logit_scale, v_scale, lse_scale = factors
    negate = logit_scale < 0
    logit_scale = max(abs(logit_scale), _SMALLEST_SCALE)
    for ready in plan.launches:
        argument = ready.argument.copy()
        address = argument.__array_interface__["data"][0]
        _POINTER.pack_into(argument, 0, address + _PARAMS_BEGIN)
        _TENSORS.pack_into(argument, _PARAMS_BEGIN, *tensors)
        _FACTORS.pack_into(argument, _FACTORS_BEGIN, negate, logit_scale, v_scale, lse_scale)
        grid, threads = ready.grid, ready.num_threads
        cuda.driver.launchKernel(
            *(ready.function, grid, 1, 1, threads, 1, 1, ready.shared_bytes),
            *(stream.ptr, address, 0),
        )
    if not same_stream:
        # The plan's memory is freed in the order of the stream it was made on.
        plan.stream.wait_event(stream.record())


def _run_unaligned(
    plan: DevicePlan,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any | None,
    factors: tuple[float, float, float],
) -> None:
    """Run by way of aligned copies of q and out; K and V are too large to be copied unasked.

    Bits are copied: CuPy's own kernels for 16-bit floats need CUDA's headers, which need not be
    installed.
    """
    q, k, v, target = map(_without_idle_strides, (q, k, v, out))
    for name, pages in (("k cache", k), ("v cache", v)):
        if not _aligned(pages):
            raise ValueError(
                f"{name} begins at address {pages.data.ptr:#x} with strides {pages.strides} in "
                f"bytes, expected multiples of {_ROW_ALIGNMENT}"
            )
    if not _aligned(q):
        q = q.view(np.uint16).copy(order="C").view(q.dtype)
    if _aligned(target):
        run(plan, q, k, v, target, lse, factors)
    else:
        result = cupy().empty(out.shape, out.dtype)
        run(plan, q, k, v, result, lse, factors)
        out.view(np.uint16)[...] = result.view(np.uint16)


def _without_idle_strides(array: Any) -> Any:
    """A view whose axes of length 1 have a stride of 0: whatever it was, nothing is at it."""
    strides = [
        0 if length == 1 else stride
        for length, stride in zip(array.shape[:-1], array.strides, strict=False)
    ]
    return cupy().ndarray(array.shape, array.dtype, array.data, (*strides, array.itemsize))


def _aligned(array: Any) -> bool:
    """Whether every row begins at a multiple of `_ROW_ALIGNMENT` bytes."""
    bits = functools.reduce(operator.or_, array.strides[:-1], array.data.ptr)
    return bool(bits % _ROW_ALIGNMENT == 0)
