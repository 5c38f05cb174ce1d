"""A schedule on a CUDA device: uploaded once, its kernels loaded, their parameters packed."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from cupaged import kernels, tensor_maps
from cupaged.devices import cupy, device_model
from cupaged.kernel_spec import PARAMS_DTYPE, KernelConfig, field_offset
from cupaged.schedule import IntArray, Schedule
from cupaged.spec import DTYPES, RAGGED, AttentionSpec
from cupaged.staging import Upload, upload
from cupaged.tensor_maps import TENSOR_MAP_BYTES
from cupaged.transform import Transform
from cupaged.variant_tables import Addresses, mask_tables, spec_tables

_LOG2_E = math.log2(math.e)

#: What a launch is given: pointers to its three parameters, and then these.
PARAMS_BEGIN = 32
MAPS_BEGIN = PARAMS_BEGIN + PARAMS_DTYPE.itemsize
_ARGUMENT_BYTES = MAPS_BEGIN + 2 * TENSOR_MAP_BYTES
_POINTERS = struct.Struct("3Q")
# The fields of PARAMS_DTYPE that a plan decides, in their order: ten pointers and eleven numbers.
_PLAN = struct.Struct("10Q6i4If")
_PLAN_BEGIN = PARAMS_BEGIN + field_offset(PARAMS_DTYPE, "items")

#: Parts of the uploaded block begin at multiples of this many int32.
_ALIGNMENT = 32


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
    parameters: tuple[float, ...]
    spare: list[Argument]

    def new_argument(self) -> Argument:
        """Another argument; the call's own part of it is still empty."""
        memory = bytearray(_ARGUMENT_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        begins = (PARAMS_BEGIN, MAPS_BEGIN, MAPS_BEGIN + TENSOR_MAP_BYTES)
        _POINTERS.pack_into(memory, 0, *(address + begin for begin in begins))
        _PLAN.pack_into(memory, _PLAN_BEGIN, *self.parameters)
        return memory, address


class PlacedPlan:
    """What the launches of a plan on one CUDA device need, however its arrays are kept.

    Attributes
    ----------
    page_shape : tuple of int
        Axes of K and V behind the pages, in the kernels' order: tokens, heads, elements.
    heads_first : bool
        The layout of K and V is HND.
    ragged : bool
        K and V are rows without pages.
    kv_itemsize : int
        Bytes of an element of K and V.
    transform : Transform
        How the factor of the logits is shared out.
    stream : cupy.cuda.Stream
        Where the plan was uploaded.
    uploaded : cupy.cuda.Event
        After the upload.
    launches : tuple of ReadyLaunch
    recordable : bool
        A CUDA graph may hold the launches: they stay while the wrapper stays.
    """

    stream: Any
    uploaded: Any
    launches: tuple[ReadyLaunch, ...]

    def __init__(self, spec: AttentionSpec, device: int) -> None:
        self.page_shape = (spec.page_size, spec.num_kv_heads, spec.head_dim_qk)
        self.heads_first = spec.kv_layout == "HND"
        self.ragged = spec.page_size == RAGGED
        self.kv_itemsize = DTYPES[spec.kv_dtype].itemsize
        self.transform = Transform(spec)
        self.device = device
        self.recordable = True
        self._arch = device_model(device).arch

    def without_maps(self, config: KernelConfig, recorded: bool) -> int:
        """The kernel that does the same without tensor maps.

        Raises
        ------
        RuntimeError
            It would have to be loaded while a CUDA graph is `recorded`, where it can't be.
        """
        other = replace(config, page_aligned=False)
        if recorded and not kernels.is_loaded(other, self.device):
            raise RuntimeError(
                "run() is being recorded in a CUDA graph, and the strides of K or V ask for a "
                "kernel that isn't loaded yet: run() once before"
            )
        return kernels.load(other, self._arch, self.device)

    def wait(self) -> None:
        """Wait until the plan has arrived on the device, and maybe a later one."""
        self.uploaded.synchronize()


class DevicePlan(PlacedPlan):
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
        super().__init__(spec, device)
        # Compiled first: should that fail, nothing has been allocated or copied.
        loaded = [kernels.load(launch.config, self._arch, device) for launch in schedule.launches]
        memory = cupy().cuda.alloc
        needed = schedule.workspace_bytes
        self._partials = None
        if needed:
            self._partials = memory(needed) if workspace is None else workspace.data
        self.stream = cupy().cuda.get_current_stream()
        tables = _tables(schedule)
        parts = _parts(schedule, page_indices, tables)
        offsets, counters, size = _layout(schedule, parts)
        self._block = memory(size * 4)
        placed = list(zip(offsets, parts, strict=True))
        self.uploaded = upload([Upload(self._block, size, placed)], device, self.stream)
        begin = self._block.ptr
        pages, *others = [begin + offset * 4 for offset in offsets]
        items = others[: len(schedule.launches)]
        extras = Addresses(**dict(zip(tables, others[len(items) :], strict=True)))
        partials = 0 if self._partials is None else self._partials.ptr
        self.launches = tuple(
            ready(
                spec,
                launch.config,
                launch.grid,
                kernel,
                (item, pages),
                (partials, launch.num_partial_rows(spec)),
                (begin + counter * 4, begin + (counter + 2) * 4),
                len(launch.item_fields),
                extras,
            )
            for launch, kernel, item, counter in zip(
                schedule.launches, loaded, items, counters, strict=True
            )
        )


def _tables(schedule: Schedule) -> dict[str, IntArray]:
    """What the plan's variants read."""
    tables = spec_tables(schedule.spec)
    return tables if schedule.mask is None else {**tables, **mask_tables(schedule.mask)}


def _parts(
    schedule: Schedule, page_indices: IntArray, tables: dict[str, IntArray]
) -> list[IntArray]:
    """What a plan uploads: pages, each launch's items, and its variants' tables."""
    items = [launch.item_fields.reshape(-1) for launch in schedule.launches]
    return [page_indices, *items, *tables.values()]


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


def ready(
    spec: AttentionSpec,
    config: KernelConfig,
    grid: int,
    kernel: int,
    tables: tuple[int, int],
    partials: tuple[int, int],
    counters: tuple[int, int],
    num_items: int,
    extras: Addresses,
) -> ReadyLaunch:
    """A launch with all that a plan decides.

    Parameters
    ----------
    spec : AttentionSpec
    config : KernelConfig
    grid : int
    kernel : int
        Its `CUfunction`.
    tables : tuple of int
        Addresses of items and pages.
    partials : tuple of int
        Address of the partial states, and the rows that all of them have.
    counters : tuple of int
        Addresses of the work counters and of the merge counters.
    num_items : int
        -1 where the third work counter has it.
    extras : Addresses
        What variants read.
    """
    address, rows = partials
    work_counters, merge_counters = counters
    return ReadyLaunch(
        function=kernel,
        config=config,
        grid=grid,
        num_threads=config.num_threads,
        shared_bytes=config.shared_bytes,
        box_rows=_box_rows(config, spec.page_size),
        parameters=(
            *tables,
            address,
            address + rows * spec.head_dim_vo * 4,
            merge_counters,
            work_counters,
            *extras,
            num_items,
            *_numbers(spec),
        ),
        spare=[],
    )


def _box_rows(config: KernelConfig, page_size: int) -> int:
    """Keys that one box of a tensor map brings; 0 where the kernel takes none."""
    if config.family != "prefill_sm90" or not config.page_aligned:
        return 0
    return tensor_maps.box_rows(page_size, config.cta_tile_kv)


@functools.lru_cache(maxsize=64)
def _numbers(spec: AttentionSpec) -> tuple[float, ...]:
    """The parameters that a spec alone decides."""
    return (
        spec.num_kv_heads,
        spec.gqa_group_size,
        spec.page_size,
        int(spec.causal),
        spec.window_left,
        *magic(spec.gqa_group_size),
        *magic(spec.page_size),
        spec.logits_soft_cap * _LOG2_E,
    )
