"""A schedule on a CUDA device: uploaded once, its kernels loaded, their parameters packed."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import replace
from typing import Any, NamedTuple

from cupaged import kernels, tensor_maps
from cupaged.device_pages import DevicePages
from cupaged.devices import cupy, device_model
from cupaged.kernel_spec import PARAMS_DTYPE, KernelConfig, field_offset
from cupaged.launch_arguments import ArgumentLayout, Arguments
from cupaged.schedule import IntArray, Schedule
from cupaged.spec import DTYPES, RAGGED, AttentionSpec
from cupaged.staging import Upload, upload
from cupaged.tensor_maps import TENSOR_MAP_BYTES
from cupaged.transform import Transform
from cupaged.variant_tables import Addresses, mask_tables, spec_tables

_LOG2_E = math.log2(math.e)

#: What a launch is given; the two maps lie one behind the other.
_LAYOUT = ArgumentLayout(PARAMS_DTYPE.itemsize, TENSOR_MAP_BYTES, TENSOR_MAP_BYTES)
PARAMS_BEGIN, MAPS_BEGIN, _ = _LAYOUT.begins
# The fields of PARAMS_DTYPE that a plan decides, in order: eleven pointers and eleven numbers.
_PLAN = struct.Struct("11Q6i4If")
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
    arguments : Arguments
        With those; the call's own part is still empty.
    """

    function: int
    config: KernelConfig
    grid: int
    num_threads: int
    shared_bytes: int
    box_rows: int
    parameters: tuple[float, ...]
    arguments: Arguments


class PlacedPlan:
    """What the launches of a plan on one CUDA device need, however its arrays are kept.

    Attributes
    ----------
    page_shape : tuple of int
        Axes of K and V behind the pages, in the kernels' order: tokens, heads, elements of K and
        of V.
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
        head_dims = (spec.head_dim_qk, spec.head_dim_vo)
        self.page_shape = (spec.page_size, spec.num_kv_heads, *head_dims)
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
    sent_ahead : DevicePages, optional
        The pages, where the current stream has them on the device already.
    """

    def __init__(
        self,
        schedule: Schedule,
        page_indices: IntArray,
        device: int,
        workspace: Any | None,
        sent_ahead: DevicePages | None = None,
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
        self._sent_ahead = sent_ahead
        self.stream = cupy().cuda.get_current_stream()
        layout = _layout(schedule, page_indices if sent_ahead is None else None)
        self._block = memory(layout.size * 4)
        upload_of = Upload(self._block, layout.size, layout.parts)
        self.uploaded = upload([upload_of], device, self.stream)
        begin = self._block.ptr
        pages = begin + layout.pages * 4 if sent_ahead is None else sent_ahead.address
        extras = Addresses(**{name: begin + at * 4 for name, at in layout.tables.items()})
        partials = 0 if self._partials is None else self._partials.ptr
        self.launches = tuple(
            ready(
                spec,
                launch.config,
                launch.grid,
                kernel,
                (begin + items * 4, pages),
                (partials, launch.num_partial_rows(spec)),
                (begin + counter * 4, begin + (counter + 2) * 4),
                len(launch.item_fields),
                extras,
            )
            for launch, kernel, (items, _), counter in zip(
                schedule.launches, loaded, layout.parts, layout.counters, strict=False
            )
        )


class _Layout(NamedTuple):
    """How what a plan uploads lies in one block; all in int32.

    Attributes
    ----------
    parts : list of (int, int32 array)
        Where each launch's items begin, then the tables of variants and the pages.
    tables : dict
        Where each of these begins.
    pages : int
        Where these begin.
    counters : list of int
        Where each launch's counters begin.
    size : int
    """

    parts: list[tuple[int, IntArray]]
    tables: dict[str, int]
    pages: int
    counters: list[int]
    size: int


def _layout(schedule: Schedule, page_indices: IntArray | None) -> _Layout:
    parts: list[tuple[int, IntArray]] = []
    size = 0
    for launch in schedule.launches:
        parts.append((size, launch.item_fields.reshape(-1)))
        size += (launch.item_fields.size + _ALIGNMENT) // _ALIGNMENT * _ALIGNMENT
    tables = {}
    contents = spec_tables(schedule.spec)
    if schedule.mask is not None:
        contents = {**contents, **mask_tables(schedule)}
    for name, table in contents.items():
        tables[name] = size
        parts.append((size, table))
        size += (len(table) + _ALIGNMENT) // _ALIGNMENT * _ALIGNMENT
    pages = size
    if page_indices is not None:
        parts.append((size, page_indices))
        size += (len(page_indices) + _ALIGNMENT) // _ALIGNMENT * _ALIGNMENT
    counters = []
    for launch in schedule.launches:
        counters.append(size)
        # Two work counters, then one for each (part of a) split tile and KV head.
        merges = launch.num_merges * schedule.spec.num_kv_heads
        size += 2 + merges * launch.config.splits_merged_by
    return _Layout(parts, tables, pages, counters, size)


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
    parameters = (
        *(*tables, address, address + rows * spec.head_dim_vo * 4),
        *(merge_counters, work_counters, *extras, num_items, *_numbers(spec)),
    )
    return ReadyLaunch(
        *(kernel, config, grid, *_block_shape(config, spec.page_size), parameters),
        arguments_with(parameters),
    )


def arguments_with(parameters: tuple[float, ...]) -> Arguments:
    """A launch's arguments with what its plan decides in them."""
    return Arguments(_LAYOUT, lambda memory: _PLAN.pack_into(memory, _PLAN_BEGIN, *parameters))


@functools.lru_cache(maxsize=256)
def _block_shape(config: KernelConfig, page_size: int) -> tuple[int, int, int]:
    """`num_threads`, `shared_bytes` and `box_rows` of a launch."""
    rows = 0
    if config.family == "prefill_sm90" and config.page_aligned:
        rows = tensor_maps.box_rows(page_size, config.cta_tile_kv)
    return config.num_threads, config.shared_bytes, rows


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
