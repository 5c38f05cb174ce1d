"""Schedules that the GPU builds: what takes the host most of a plan, for batches without specials.

The kernel of `build_schedule.cu` makes the items that `schedule.build()` defines, in the same
order. The host then has to know only how much room they may take, which it knows from the number of
requests and rows, as for a CUDA graph.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cupaged import heuristics, schedule
from cupaged.device_pages import PARAMS, REPEATS_DTYPE, Question, worth_asking
from cupaged.devices import cupy
from cupaged.frames import Room
from cupaged.kernel_spec import ITEM_DTYPE, OnlyKernel
from cupaged.launch_arguments import ArgumentLayout, Arguments
from cupaged.schedule import IntArray, Lengths, Schedule
from cupaged.shape_choice import LONG_ROWS
from cupaged.spec import AttentionSpec, DeviceModel
from cupaged.tiles import Shape, kernel_config, slots

_NUM_THREADS = 1024
#: Bits of an item's number in the keys that sort it; the others are for its KV tiles.
_INDEX_BITS = 14
_MAX_ITEMS = 1 << _INDEX_BITS
_MAX_KV_TILES = (1 << (32 - _INDEX_BITS)) - 1
#: A split tile has two partial states at least, and a thread.
_MAX_PARTIALS = 2 * _NUM_THREADS
#: Of a page table of fewer entries, asking beside takes the host longer than looking for itself.
_MIN_ENTRIES = 2048
#: Where fewer requests make fewer pieces of work for an SM, in tiles of LONG_ROWS, the host
#: builds the schedule: what it launches then is as small as the batch.
_MANY_REQUESTS = 32
_MANY_PIECES = 2
_MAX_BATCH = 4096

_POINTERS = ("qo_indptr", "kv_len", "kv_indptr", "items", "work_counters", "merge_counters")
_NUMBERS = (
    *("num_merge_counters", "most_partials", "batch", "gqa_group_size", "num_kv_heads", "causal"),
    *("cta_tile_q", "cta_tile_kv", "slots", "fill_last_wave", "light_len"),
)
BUILD_DTYPE = np.dtype(
    [(pointer, np.uint64) for pointer in _POINTERS]
    + [(number, np.int32) for number in _NUMBERS]
    + [("to_align", np.int32), ("repeats", REPEATS_DTYPE)]
)
_PARAMS = struct.Struct(f"{len(_POINTERS)}Q{len(_NUMBERS)}i4x{PARAMS.format}")
_NO_QUESTION = (0,) * 5
_LAYOUT = ArgumentLayout(BUILD_DTYPE.itemsize)
(_PARAMS_BEGIN,) = _LAYOUT.begins
_arguments = Arguments(_LAYOUT)


KERNEL = OnlyKernel(
    "build_schedule",
    4 * (_MAX_ITEMS + _MAX_BATCH),
    {
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
        **{f"CANDIDATE_{i}": share for i, share in enumerate(heuristics.CANDIDATES)},
    },
    {"BuildSchedule": BUILD_DTYPE, "Item": ITEM_DTYPE, "Repeats": REPEATS_DTYPE},
)


class Recipe:
    """What a spec and a machine decide for all batches of one shape of query tile.

    Parameters
    ----------
    spec : AttentionSpec
    device : DeviceModel
        What batches are divided for.
    shape : Shape

    Attributes
    ----------
    config : KernelConfig
    num_slots : int
        Thread blocks of it that run at once.
    partials : int
        Partial-state slots that there is room for.
    partial_rows, partial_bytes : int
        What they take.
    num_merge_counters : int
        Counters of the query tiles that may be split.
    numbers : tuple of int
        Fields of BUILD_DTYPE, from `gqa_group_size` to `fill_last_wave`.
    """

    def __init__(self, spec: AttentionSpec, device: DeviceModel, shape: Shape) -> None:
        self.spec, self.device, self.shape = spec, device, shape
        self.config = config = kernel_config(device.arch, spec.needs, shape)
        self.num_slots = slots(config, device)
        self.partials = heuristics.most_partials(self.num_slots, spec.num_kv_heads)
        room = Room(config, 0, self.partials)
        self.partial_rows = self.partials * spec.num_kv_heads * config.cta_tile_q
        self.partial_bytes = room.partial_bytes(spec)
        self.num_merge_counters = room.merges * spec.num_kv_heads * config.splits_merged_by
        self.numbers = (
            *(spec.gqa_group_size, spec.num_kv_heads, spec.causal),
            *(config.cta_tile_q, config.cta_tile_kv, self.num_slots, shape == "long"),
        )


_recipe = lru_cache(maxsize=64)(Recipe)


class Outline(NamedTuple):
    """A schedule of which the host knows only the kernel, and how much room there is.

    Attributes
    ----------
    recipe : Recipe
    lengths : Lengths
    tiles : int
        Query tiles that there is room for.
    light_len : int
        Of `heuristics.light_len()`.
    """

    recipe: Recipe
    lengths: Lengths
    tiles: int
    light_len: int

    @property
    def spec(self) -> AttentionSpec:
        """What is computed."""
        return self.recipe.spec

    def build(self) -> Schedule:
        """The schedule, by the host: item for item what the device builds."""
        recipe = self.recipe
        frame = {recipe.shape: Room(recipe.config, self.tiles, recipe.partials)}
        return schedule.build(recipe.spec, self.lengths, recipe.device, frame=frame)


def outline(
    spec: AttentionSpec, lengths: Lengths, device: DeviceModel, equal_rows: int | None = None
) -> Outline | None:
    """A batch that the GPU builds the schedule of; None where the host has to, or had better.

    `equal_rows` are the rows of q of every request, where they can't be anything else.
    """
    batch = len(lengths.kv_len)
    num_queries, group = lengths.nnz_qo, spec.gqa_group_size
    if batch > _MAX_BATCH or spec.window_left >= 0 or not num_queries:
        return None
    pieces = (num_queries * group // LONG_ROWS + batch) * spec.num_kv_heads
    if batch < _MANY_REQUESTS and pieces < _MANY_PIECES * device.num_sms:
        return None
    if equal_rows is None:
        rows = schedule.packed_rows(spec, lengths)
    else:
        rows = schedule.PackedRows(equal_rows * group, equal_rows * group, num_queries * group)
    members = schedule.members(spec, lengths, device, rows, by_request=False)
    if len(members) > 1:
        return None
    (shape,) = members
    recipe = _recipe(spec, device, shape)
    config, tiles = recipe.config, rows.all // recipe.config.cta_tile_q + batch
    if tiles + recipe.partials > _MAX_ITEMS or recipe.partials > _MAX_PARTIALS:
        return None
    most_keys = _MAX_KV_TILES * config.cta_tile_kv
    if lengths.paged_kv_indptr.item(-1) * spec.page_size > most_keys:  # else no request has more
        longest = lengths.kv_len.argmax()
        if lengths.kv_len.item(longest) > most_keys:
            return None
    light_len = heuristics.light_len(config, group, rows.fewest, rows.most)
    return Outline(recipe, lengths, tiles, light_len)


def can_ask(page_indices: IntArray, indptr: IntArray, highest: int) -> bool:
    """Whether to look for pages that a request has twice beside building its schedule.

    Parameters
    ----------
    page_indices : int32 [indptr[-1]]
    indptr : int32 [batch + 1]
    highest : int
        The highest page number.
    """
    return worth_asking(page_indices, indptr, highest, KERNEL.shared_bytes, _MIN_ENTRIES)


def launch(
    outlined: Outline,
    function: int,
    lengths: tuple[int, int, int],
    target: tuple[int, int, int],
    question: Question | None,
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
    question : Question, optional
        To be answered beside it.
    stream : int
    """
    recipe, of_requests, tiles, light_len = outlined
    batch = len(of_requests.kv_len)
    shared_bytes = 4 * ((1 << (tiles - 1).bit_length()) + batch)
    num_blocks, repeats = 1, _NO_QUESTION
    if question is not None:
        num_blocks, repeats = 1 + batch, question.parameters
        shared_bytes = max(shared_bytes, question.shared_bytes)
    memory, address = argument = _arguments.take()
    _PARAMS.pack_into(
        *(memory, _PARAMS_BEGIN, *lengths, *target),
        *(recipe.num_merge_counters, recipe.partials, batch, *recipe.numbers, light_len),
        *repeats,
    )
    cupy().cuda.driver.launchKernel(
        *(function, num_blocks, 1, 1, _NUM_THREADS, 1, 1, shared_bytes, stream, address, 0)
    )
    _arguments.put_back(argument)
