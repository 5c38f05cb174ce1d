"""A schedule on a CUDA device: uploaded once, its kernels loaded, their parameters packed."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from cupaged import kernels, tensor_maps
from cupaged.devices import cupy, device_model
from cupaged.schedule import IntArray, Launch, Schedule
from cupaged.spec import PARAMS_DTYPE, AttentionSpec, KernelConfig, field_offset
from cupaged.tensor_maps import TENSOR_MAP_BYTES

#: What a launch is given: pointers to its three parameters, and then these.
PARAMS_BEGIN = 32
MAPS_BEGIN = PARAMS_BEGIN + PARAMS_DTYPE.itemsize
_ARGUMENT_BYTES = MAPS_BEGIN + 2 * TENSOR_MAP_BYTES
_POINTERS = struct.Struct("3Q")
# The fields of PARAMS_DTYPE that a plan decides, in their order: seven pointers and nine numbers.
_PLAN = struct.Struct("7Q5i4I")
_PLAN_BEGIN = PARAMS_BEGIN + field_offset(PARAMS_DTYPE, "requests")

#: Parts of the uploaded block begin at multiples of this many int32.
_ALIGNMENT = 32

# Pinned blocks to copy from, by device. One is taken again once the copy from it has ended: written
# earlier, it would be overwritten under the copy.
_staging: defaultdict[int, list[_Staging]] = defaultdict(list)
_staging_lock = threading.Lock()
#: The smallest block, in int32; larger ones are powers of two.
_STAGING_SIZE = 1 << 15


def magic(divisor: int) -> tuple[int, int]:
    """Multiplier and shift for division by `divisor`, as `params.cuh` describes them.

    Exact for dividends below 2^31; a multiplier of 0 stands for the divisor 1.
    """
    if divisor == 1:
        return 0, 0
    bits = (divisor - 1).bit_length()
    return -(-(1 << (31 + bits)) // divisor), bits - 1


#: What `cuLaunchKernel` takes, and its address.
Argument: TypeAlias = tuple[bytearray, int]


class ReadyLaunch(NamedTuple):
    """A launch with everything but the arrays of a call.

    Attributes
    ----------
    function : int
        The kernel's `CUfunction`.
    config : KernelConfig
    grid, num_threads, shared_bytes : int
    box_rows : int
        Keys of a box of the tensor maps of K and V; 0 for kernels that take no tensor maps.
    parameters : tuple of int
        What the plan decides.
    spare : list of Argument
        Arguments that no call is using. A call takes one off and puts it back, so that calls of
        other threads meanwhile have others.
    """

    function: int
    config: KernelConfig
    grid: int
    num_threads: int
    shared_bytes: int
    box_rows: int
    parameters: tuple[int, ...]
    spare: list[Argument]

    def new_argument(self) -> Argument:
        """Another argument; the call's own part of it is still empty."""
        memory = bytearray(_ARGUMENT_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        begins = (PARAMS_BEGIN, MAPS_BEGIN, MAPS_BEGIN + TENSOR_MAP_BYTES)
        _POINTERS.pack_into(memory, 0, *(address + begin for begin in begins))
        _PLAN.pack_into(memory, _PLAN_BEGIN, *self.parameters)
        return memory, address


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
        spec = schedule.spec
        #: Axes of K and V behind the pages, in the kernels' order: tokens, heads, elements.
        self.page_shape = (spec.page_size, spec.num_kv_heads, spec.head_dim)
        self.heads_first = spec.kv_layout == "HND"
        self._device = device
        self._arch = arch = device_model(device).arch
        # Compiled first: should that fail, nothing has been allocated or copied.
        loaded = [kernels.load(launch.config, arch, device) for launch in schedule.launches]
        memory = cupy().cuda.alloc
        needed = schedule.workspace_bytes
        self._partials = None
        if needed:
            self._partials = memory(needed) if workspace is None else workspace.data
        self.stream = cupy().cuda.get_current_stream()
        parts = _parts(schedule, page_indices)
        offsets, counters, size = _layout(schedule, parts)
        self._block = memory(size * 4)
        self.uploaded = _upload(parts, offsets, size, self._block, device, self.stream)
        begin = self._block.ptr
        requests, pages, *items = [begin + offset * 4 for offset in offsets]
        partials = 0 if self._partials is None else self._partials.ptr
        self.launches = tuple(
            ReadyLaunch(
                function=kernel,
                config=launch.config,
                grid=launch.grid,
                num_threads=launch.config.num_threads,
                shared_bytes=launch.config.shared_bytes,
                box_rows=_box_rows(launch.config, spec.page_size),
                parameters=_parameters(
                    spec, launch, (requests, item, pages), partials, begin + counter * 4
                ),
                spare=[],
            )
            for launch, kernel, item, counter in zip(
                schedule.launches, loaded, items, counters, strict=True
            )
        )

    def without_maps(self, config: KernelConfig) -> int:
        """The kernel that does the same without tensor maps."""
        return kernels.load(replace(config, page_aligned=False), self._arch, self._device)

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
    """What a plan uploads: requests, pages, and each launch's items."""
    items = [launch.item_fields.reshape(-1) for launch in schedule.launches]
    return [schedule.request_fields.reshape(-1), page_indices, *items]


def _layout(schedule: Schedule, parts: list[IntArray]) -> tuple[list[int], list[int], int]:
    """Where the parts and each launch's counters begin in one block, and its size, in int32."""
    offsets, counters, size = [], [], 0
    for part in parts:
        offsets.append(size)
        size += (len(part) + _ALIGNMENT) // _ALIGNMENT * _ALIGNMENT
    for launch in schedule.launches:
        counters.append(size)
        # Two work counters, then one for each (part of a) split tile and KV head.
        merges = launch.num_merges * schedule.spec.num_kv_heads
        size += 2 + merges * launch.config.splits_merged_by
    return offsets, counters, size


def _upload(
    parts: list[IntArray], offsets: list[int], size: int, block: Any, device: int, stream: Any
) -> Any:
    """Start the one asynchronous copy, with zeros behind the parts; returns the event after it."""
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
        words, end = staging.words, 0
        for offset, part in zip(offsets, parts, strict=True):
            end = offset + len(part)
            words[offset:end] = part
        words[end:size] = 0  # the counters
        block.copy_from_host_async(staging.memory.ptr, size * 4, stream)
        staging.event.record(stream)
    return staging.event


def _box_rows(config: KernelConfig, page_size: int) -> int:
    """Keys that one box of a tensor map brings; 0 where the kernel takes none."""
    if config.family != "prefill_sm90" or not config.page_aligned:
        return 0
    return tensor_maps.box_rows(page_size, config.cta_tile_kv)


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


def _parameters(
    spec: AttentionSpec,
    launch: Launch,
    tables: tuple[int, int, int],
    partials: int,
    counters: int,
) -> tuple[int, ...]:
    """What a plan decides of a launch's parameters.

    All but the spec and the launch are addresses; `tables` are requests, items and pages.
    """
    return (
        *tables,
        partials,
        partials + launch.num_partial_rows(spec) * spec.head_dim * 4,
        counters + 2 * 4,
        counters,
        len(launch.item_fields),
        *_numbers(spec),
    )
