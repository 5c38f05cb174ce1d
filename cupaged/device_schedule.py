"""Schedules that the GPU builds: what takes the host most of a plan, for batches without specials.

The kernel of `build_schedule.cu` makes the items that `schedule.build()` defines, in the same
order. The host then has to know only how much room they may take, which it knows from the number of
requests and rows, as for a CUDA graph.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cupaged import heuristics, schedule
from cupaged.devices import cupy
from cupaged.frames import Room
from cupaged.kernel_spec import ITEM_DTYPE
from cupaged.launch_arguments import ArgumentLayout, Arguments
from cupaged.schedule import Lengths, Schedule
from cupaged.spec import AttentionSpec, DeviceModel
from cupaged.tiles import Shape, kernel_config, slots

_NUM_THREADS = 1024
#: Bits of an item's number in the keys that sort it; the others are for its KV tiles.
_INDEX_BITS = 14
_MAX_ITEMS = 1 << _INDEX_BITS
_MAX_KV_TILES = (1 << (32 - _INDEX_BITS)) - 1
#: A split tile has two partial states at least, and a thread.
_MAX_PARTIALS = 2 * _NUM_THREADS
#: Of fewer requests the host builds the schedule: what it launches then is as small as the batch.
_MIN_BATCH, _MAX_BATCH = 32, 4096

_POINTERS = ("qo_indptr", "kv_len", "kv_indptr", "items", "work_counters", "merge_counters")
_NUMBERS = (
    *("num_merge_counters", "most_partials", "batch", "gqa_group_size", "num_kv_heads", "causal"),
    *("cta_tile_q", "cta_tile_kv", "slots", "fill_last_wave", "light_len"),
)
BUILD_DTYPE = np.dtype(
    {
        "names": [*_POINTERS, *_NUMBERS],
        "formats": [np.uint64] * len(_POINTERS) + [np.int32] * len(_NUMBERS),
        "offsets": [8 * i for i in range(len(_POINTERS))]
        + [8 * len(_POINTERS) + 4 * i for i in range(len(_NUMBERS))],
        "itemsize": 8 * len(_POINTERS) + 4 * len(_NUMBERS) + 4,  # a multiple of 8
    }
)
_PARAMS = struct.Struct(f"{len(_POINTERS)}Q{len(_NUMBERS)}i")
_LAYOUT = ArgumentLayout(BUILD_DTYPE.itemsize)
(_PARAMS_BEGIN,) = _LAYOUT.begins
_arguments = Arguments(_LAYOUT)


@dataclass(frozen=True, slots=True)
class BuildKernel:
    """The kernel of `build_schedule.cu` as it is compiled, a `kernel_spec.Kernel`."""

    family: str = "build_schedule"
    name: str = "build_schedule"
    entry: str = "cupaged_build_schedule"
    shared_bytes: int = 4 * (_MAX_ITEMS + _MAX_BATCH)

    @property
    def flags(self) -> dict[str, int]:
        """Macros of the source."""
        return {}

    @property
    def constants(self) -> dict[str, int]:
        """Constants of the source."""
        shares = heuristics.CANDIDATES
        return {
            "NUM_THREADS": _NUM_THREADS,
            "INDEX_BITS": _INDEX_BITS,
            "ITEM_COST": heuristics.ITEM_COST,
            "SPLIT_COST": heuristics.SPLIT_COST,
            "LIGHT": heuristics.LIGHT,
            "WORTH": heuristics.WORTH,
            "TOO_LATE": heuristics.TOO_LATE,
            "MAX_WAVES": heuristics.MAX_WAVES,
            "NEARLY_EQUAL": heuristics.NEARLY_EQUAL,
            "MIN_TILES_PER_SPLIT": heuristics.MIN_TILES_PER_SPLIT,
            **{f"CANDIDATE_{i}": share for i, share in enumerate(shares)},
        }

    @property
    def structs(self) -> dict[str, np.dtype[Any]]:
        """The structs of the source."""
        return {"BuildSchedule": BUILD_DTYPE, "Item": ITEM_DTYPE}


KERNEL = BuildKernel()


class Outline(NamedTuple):
    """A schedule of which the host knows only the kernel, and how much room there is.

    Attributes
    ----------
    spec : AttentionSpec
    device : DeviceModel
        What it is divided for.
    lengths : Lengths
    shape : Shape
        Of all query tiles.
    room : Room
    light_len : int
        Of `heuristics.light_len()`.
    """

    spec: AttentionSpec
    device: DeviceModel
    lengths: Lengths
    shape: Shape
    room: Room
    light_len: int

    @property
    def grid(self) -> int:
        """Thread blocks; one that finds no work ends."""
        room = self.room
        return min(slots(room.config, self.device), room.items * self.spec.num_kv_heads)

    def build(self) -> Schedule:
        """The schedule, by the host: item for item what the device builds."""
        frame = {self.shape: self.room}
        return schedule.build(self.spec, self.lengths, self.device, frame=frame)


def outline(spec: AttentionSpec, lengths: Lengths, device: DeviceModel) -> Outline | None:
    """A batch that the GPU builds the schedule of; None where the host has to, or had better."""
    batch = len(lengths.kv_len)
    if not _MIN_BATCH <= batch <= _MAX_BATCH or spec.window_left >= 0 or not lengths.nnz_qo:
        return None
    rows = schedule.packed_rows(spec, lengths)
    members = schedule.members(spec, lengths, device, rows, by_request=False)
    if len(members) > 1:
        return None
    (shape,) = members
    config = kernel_config(device.arch, spec.needs, shape)
    num_slots = slots(config, device)
    partials = heuristics.most_partials(num_slots, spec.num_kv_heads)
    room = Room(config, rows.all // config.cta_tile_q + batch, partials)
    most_keys = lengths.kv_len.item(lengths.kv_len.argmax())
    if (
        room.items > _MAX_ITEMS
        or partials > _MAX_PARTIALS
        or most_keys > _MAX_KV_TILES * config.cta_tile_kv
    ):
        return None
    light_len = heuristics.light_len(config, spec.gqa_group_size, rows.fewest, rows.most)
    return Outline(spec, device, lengths, shape, room, light_len)


def launch(
    outlined: Outline,
    function: int,
    lengths: tuple[int, int, int],
    target: tuple[int, int, int],
    stream: int,
) -> None:
    """Start building a schedule.

    Parameters
    ----------
    outlined : Outline
    function : int
        The `CUfunction` of `KERNEL`.
    lengths : tuple of int
        Addresses of `qo_indptr`, `kv_len` and `paged_kv_indptr`.
    target : tuple of int
        Addresses of the items, the work counters and the merge counters, whatever they hold.
    stream : int
    """
    spec, device, of_requests, shape, room, light_len = outlined
    config, batch = room.config, len(of_requests.kv_len)
    memory, address = argument = _arguments.take()
    _PARAMS.pack_into(
        *(memory, _PARAMS_BEGIN, *lengths, *target),
        *(num_merge_counters(outlined), room.partials, batch),
        *(spec.gqa_group_size, spec.num_kv_heads, spec.causal),
        *(config.cta_tile_q, config.cta_tile_kv, slots(config, device)),
        *(shape == "long", light_len),
    )
    shared = 4 * ((1 << (room.tiles - 1).bit_length()) + batch)
    cupy().cuda.driver.launchKernel(
        function, 1, 1, 1, _NUM_THREADS, 1, 1, shared, stream, address, 0
    )
    _arguments.put_back(argument)


def num_merge_counters(outlined: Outline) -> int:
    """Counters of the query tiles that may be split."""
    room = outlined.room
    return room.merges * outlined.spec.num_kv_heads * room.config.splits_merged_by
