"""Runs a schedule on a CUDA device: its data uploaded once, its kernels launched."""

from __future__ import annotations

import struct
import threading
from collections import deque
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cupaged import kernels
from cupaged.errors import BackendUnavailableError
from cupaged.schedule import Launch, Schedule
from cupaged.spec import PARAMS_DTYPE, DeviceModel, field_offset

#: Compute capability of the first GPUs with `cp.async` and `mma.sync` for bfloat16.
MIN_ARCH = 80

#: What a kernel loads and stores at a time, in bytes; every row must begin at a multiple of it.
_ROW_ALIGNMENT = 16

#: Where the parameters begin behind the pointer to them.
_PARAMS_BEGIN = 16
_POINTER = struct.Struct("Q")
# The fields of a call, as PARAMS_DTYPE orders them: five pointers and twelve strides come first,
# three factors last.
_TENSORS = struct.Struct("5Q12q")
_FACTORS = struct.Struct("3f")
_FACTORS_BEGIN = _PARAMS_BEGIN + field_offset(PARAMS_DTYPE, "logit_scale")

#: Parts of the uploaded block begin at multiples of this many bytes.
_ALIGNMENT = 256

# Pinned blocks whose copy may still be under way: freed before it has run, a block could be
# handed out again and overwritten under the copy.
_uploads: deque[tuple[Any, Any]] = deque()
_uploads_lock = threading.Lock()


@lru_cache(maxsize=1)
def cupy() -> ModuleType:
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


@lru_cache(maxsize=None)
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


def on(device: int, stream: int) -> AbstractContextManager[Any]:
    """Make a device and a raw stream of it CuPy's current ones."""
    module = cupy()
    if module.cuda.runtime.getDevice() == device:
        if module.cuda.get_current_stream().ptr == stream:
            return nullcontext()
        return cast(AbstractContextManager[Any], module.cuda.ExternalStream(stream, device))
    stack = ExitStack()
    stack.enter_context(module.cuda.Device(device))
    stack.enter_context(module.cuda.ExternalStream(stream, device))
    return stack


def _aligned(array: Any) -> bool:
    """Whether every row begins at a multiple of `_ROW_ALIGNMENT` bytes."""
    bits = array.data.ptr
    for stride in array.strides[:-1]:
        bits |= stride
    return bits % _ROW_ALIGNMENT == 0


def workspace_bytes(schedule: Schedule) -> int:
    """Bytes of partial states that the schedule's splits write."""
    return max((_partial_bytes(schedule, launch) for launch in schedule.launches), default=0)


def _partial_bytes(schedule: Schedule, launch: Launch) -> int:
    states = launch.num_partials * schedule.spec.num_kv_heads * launch.config.cta_tile_q
    return states * (schedule.spec.head_dim + 1) * 4


@dataclass(frozen=True, slots=True)
class _Ready:
    """A launch with everything but the arrays of a call.

    `argument` is what `cuLaunchKernel` takes: a pointer to the parameters, padded to 16 bytes, and
    then the parameters, the call's own fields still empty.
    """

    function: int
    grid: int
    num_threads: int
    shared_bytes: int
    argument: npt.NDArray[np.uint8]


class DevicePlan:
    """A schedule on one CUDA device, ready to be launched again and again.

    Parameters
    ----------
    schedule : Schedule
    page_indices : int32 [paged_kv_indptr[-1]], on the host
    device : int
        CUDA device, the current one; the upload goes to its current stream.
    workspace : cupy.ndarray, optional
        Bytes for partial states, at least `workspace_bytes(schedule)`; allocated where not given.
    """

    def __init__(
        self,
        schedule: Schedule,
        page_indices: npt.NDArray[np.int32],
        device: int,
        workspace: Any | None,
    ) -> None:
        arch = device_model(device).arch
        # Compiled first: should that fail, nothing has been allocated or copied.
        loaded = [kernels.load(launch.config, arch, device) for launch in schedule.launches]
        memory = cupy().cuda.alloc
        needed = workspace_bytes(schedule)
        self._partials = None
        if needed:
            self._partials = memory(needed) if workspace is None else workspace.data
        self.stream = cupy().cuda.get_current_stream()
        parts = _Parts(schedule, page_indices)
        self._block = memory(parts.size)
        self.uploaded = parts.upload(self._block, self.stream)
        partials = 0 if self._partials is None else self._partials.ptr
        self.launches = tuple(
            _Ready(
                function=kernel.kernel.ptr,
                grid=launch.grid,
                num_threads=launch.config.num_threads,
                shared_bytes=launch.config.shared_bytes,
                argument=_argument(schedule, launch, parts.pointers(i, self._block.ptr, partials)),
            )
            for i, (launch, kernel) in enumerate(zip(schedule.launches, loaded, strict=True))
        )


    def wait(self) -> None:
        """Wait until the plan has arrived on the device."""
        self.uploaded.synchronize()


class _Parts:
    """What a plan uploads, in one block: counters, all zero, requests, pages, items."""

    def __init__(self, schedule: Schedule, page_indices: npt.NDArray[np.int32]) -> None:
        self.schedule = schedule
        heads = schedule.spec.num_kv_heads
        self.arrays: list[npt.NDArray[Any]] = [schedule.requests, page_indices]
        for launch in schedule.launches:
            # Two work counters, then one for each split tile and KV head.
            self.arrays.append(np.zeros(2 + launch.num_merges * heads, np.int32))
            self.arrays.append(launch.items)
        self.offsets = []
        self.size = 0
        for array in self.arrays:
            self.offsets.append(self.size)
            self.size += -(-max(array.nbytes, 1) // _ALIGNMENT) * _ALIGNMENT

    def upload(self, block: Any, stream: Any) -> Any:
        """Start the one asynchronous copy; returns the event that follows it."""
        pinned = cupy().cuda.alloc_pinned_memory(self.size)
        host = np.frombuffer(pinned, np.uint8, self.size)
        for offset, array in zip(self.offsets, self.arrays, strict=True):
            host[offset : offset + array.nbytes] = array.view(np.uint8)
        block.copy_from_host_async(pinned.ptr, self.size, stream)
        event = stream.record()
        with _uploads_lock:
            while _uploads and _uploads[0][0].done:
                _uploads.popleft()
            _uploads.append((event, pinned))
        return event

    def pointers(self, launch: int, block: int, partials: int) -> dict[str, int]:
        """Device addresses of a launch's parts."""
        requests, pages, *rest = (block + offset for offset in self.offsets)
        counters, items = rest[2 * launch], rest[2 * launch + 1]
        schedule = self.schedule
        this = schedule.launches[launch]
        states = this.num_partials * schedule.spec.num_kv_heads * this.config.cta_tile_q
        return {
            "requests": requests,
            "page_indices": pages,
            "items": items,
            "work_counters": counters,
            "merge_counters": counters + 2 * 4,
            "partial_out": partials,
            "partial_lse": partials + states * schedule.spec.head_dim * 4,
        }


def _argument(
    schedule: Schedule, launch: Launch, pointers: dict[str, int]
) -> npt.NDArray[np.uint8]:
    spec = schedule.spec
    group_magic, group_shift = magic(spec.gqa_group_size)
    page_magic, page_shift = magic(spec.page_size)
    fixed = pointers | {
        "num_items": len(launch.items),
        "num_kv_heads": spec.num_kv_heads,
        "gqa_group_size": spec.gqa_group_size,
        "page_size": spec.page_size,
        "causal": int(spec.causal),
        "group_magic": group_magic,
        "group_shift": group_shift,
        "page_magic": page_magic,
        "page_shift": page_shift,
    }
    argument = np.zeros(_PARAMS_BEGIN + PARAMS_DTYPE.itemsize, np.uint8)
    params = argument[_PARAMS_BEGIN:].view(PARAMS_DTYPE)
    for field, value in fixed.items():
        params[field] = value
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
    for name, pages in (("k cache", k), ("v cache", v)):
        if not _aligned(pages):
            raise ValueError(
                f"{name} begins at address {pages.data.ptr:#x} with strides {pages.strides} in "
                f"bytes, expected multiples of {_ROW_ALIGNMENT}"
            )
    if not _aligned(q):
        q = q.copy(order="C")
    if not _aligned(out):
        result = cupy().empty(out.shape, out.dtype)
        run(plan, q, k, v, result, lse, factors)
        out[...] = result
        return
    stream = cupy().cuda.get_current_stream()
    if stream.ptr != plan.stream.ptr:
        stream.wait_event(plan.uploaded)
    q_row, q_head, _ = q.strides
    k_page, k_token, k_head, _ = k.strides
    v_page, v_token, v_head, _ = v.strides
    out_row, out_head, _ = out.strides
    size = q.itemsize
    lse_pointer, lse_row, lse_head = 0, 0, 0
    if lse is not None:
        lse_pointer, (lse_row, lse_head) = lse.data.ptr, lse.strides
    logit_scale, v_scale, lse_scale = factors
    # A negative or vanishing scale: the kernel flips signs, and multiplies -inf by it.
    tiny = 1.2e-38
    if abs(logit_scale) < tiny:
        logit_scale = tiny
    for ready in plan.launches:
        argument = ready.argument.copy()
        address = argument.__array_interface__["data"][0]
        _POINTER.pack_into(argument, 0, address + _PARAMS_BEGIN)
        _TENSORS.pack_into(
            argument,
            _PARAMS_BEGIN,
            q.data.ptr,
            k.data.ptr,
            v.data.ptr,
            out.data.ptr,
            lse_pointer,
            q_row // size,
            q_head // size,
            k_page // size,
            k_token // size,
            k_head // size,
            v_page // size,
            v_token // size,
            v_head // size,
            out_row // size,
            out_head // size,
            lse_row // 4,
            lse_head // 4,
        )
        _FACTORS.pack_into(argument, _FACTORS_BEGIN, logit_scale, v_scale, lse_scale)
        cupy().cuda.driver.launchKernel(
            ready.function,
            ready.grid,
            1,
            1,
            ready.num_threads,
            1,
            1,
            ready.shared_bytes,
            stream.ptr,
            address,
            0,
        )
    if stream.ptr != plan.stream.ptr:
        # The plan's memory is freed in the order of the stream it was made on.
        plan.stream.wait_event(stream.record())
