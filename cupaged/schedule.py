"""From indptr arrays to work items: NumPy only, no loop over tokens, tiles or requests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged import extents, heuristics, splits
from cupaged.extents import CustomMask
from cupaged.frames import Frame
from cupaged.item_table import (
    ITEM_FIELDS,
    KV_BEGIN,
    KV_END,
    KV_LEN,
    MERGE,
    NUM_SPLITS,
    PAGE_BEGIN,
    QO_BEGIN,
    QO_LEN,
    REQUEST,
    ROW_BEGIN,
    ceil_div,
    counting,
    int32,
    longest_first,
)
from cupaged.kernel_spec import ITEM_DTYPE, KernelConfig
from cupaged.spec import AttentionSpec, DeviceModel
from cupaged.tiles import Shape, kernel_config, slots

IntArray = npt.NDArray[np.int32]


class Lengths(NamedTuple):
    """A ragged batch: what the four index arrays say, checked.

    Attributes
    ----------
    qo_indptr, paged_kv_indptr : int32 [batch + 1]
    qo_len, kv_len : int32 [batch]
    """

    qo_indptr: IntArray
    paged_kv_indptr: IntArray
    qo_len: IntArray
    kv_len: IntArray

    @property
    def nnz_qo(self) -> int:
        """Rows of q."""
        return int(self.qo_indptr[-1])


class Launch(NamedTuple):
    """The items of one query-tile shape: one launch of one kernel.

    Attributes
    ----------
    config : KernelConfig
    item_fields : int32 [num_items, fields of ITEM_DTYPE]
        Longest first. Every item stands for `num_kv_heads` pieces of work, one a KV head.
    grid : int
        Thread blocks. Block `b` begins with piece `b`; whoever is done takes the next one.
        Piece `w` is item `w // num_kv_heads` for KV head `w % num_kv_heads`.
    num_partials : int
        Partial-state slots its items write; one holds `cta_tile_q` rows for every KV head.
    num_merges : int
        Query tiles of several items, each merged by whichever of them ends last.
    """

    config: KernelConfig
    item_fields: IntArray
    grid: int
    num_partials: int
    num_merges: int

    @property
    def items(self) -> npt.NDArray[np.void]:
        """The items as records: ITEM_DTYPE [num_items]."""
        return self.item_fields.view(ITEM_DTYPE).reshape(-1)

    def num_partial_rows(self, spec: AttentionSpec) -> int:
        """Rows of all partial states."""
        return self.num_partials * spec.num_kv_heads * self.config.cta_tile_q

    def partial_bytes(self, spec: AttentionSpec) -> int:
        """Bytes of all partial states: float32, an output row and an LSE for each row."""
        return self.num_partial_rows(spec) * (spec.head_dim_vo + 1) * 4


class Schedule(NamedTuple):
    """All that depends on the lengths alone.

    Attributes
    ----------
    spec : AttentionSpec
    device : DeviceModel
        What it was divided for. It is right on any other of the same class of tiles.
    lengths : Lengths
    fixed_split_size : int, optional
        Pages of a split, where the caller fixed it.
    disable_split_kv : bool
    launches : tuple of Launch
        At most one for each shape of query tile; empty where there is no query row.
    mask : CustomMask, optional
    """

    spec: AttentionSpec
    device: DeviceModel
    lengths: Lengths
    fixed_split_size: int | None
    disable_split_kv: bool
    launches: tuple[Launch, ...]
    mask: CustomMask | None = None

    @property
    def workspace_bytes(self) -> int:
        """Bytes of partial states; the launches, one after the other, share them."""
        sizes = [launch.partial_bytes(self.spec) for launch in self.launches if launch.num_merges]
        return max(sizes, default=0)


def build(
    spec: AttentionSpec,
    lengths: Lengths,
    device: DeviceModel,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    frame: Frame | None = None,
    mask: CustomMask | None = None,
) -> Schedule:
    """Divide a ragged batch into work items.

    Every (query row, visible key, head) is covered by exactly one item. With `fixed_split_size`
    or `disable_split_kv`, a request's items don't depend on the rest of the batch. Under a window
    or a mask, no item has a KV tile that all of its rows are blind to; where a query tile's mask
    has such holes, each run of KV tiles between them is a split.

    Parameters
    ----------
    spec : AttentionSpec
    lengths : Lengths
    device : DeviceModel
    fixed_split_size : int, optional
        Pages of a split.
    disable_split_kv : bool
        Never split a run.
    frame : Frame, optional
        What the batch must fit. A mask's holes are items' work then, as there is no room for more
        items.
    mask : CustomMask, optional
    """
    launches = []
    narrowed = mask is not None or spec.window_left >= 0
    # Bits may depend on the batch only where the caller has not asked that they don't.
    by_request = fixed_split_size is not None or disable_split_kv
    if lengths.nnz_qo:
        packed_len = lengths.qo_len * int32(spec.gqa_group_size)
        fewest, most = int(packed_len[packed_len.argmin()]), int(packed_len[packed_len.argmax()])
        members = _members(spec, lengths, device, packed_len, (fewest, most), by_request, frame)
        for shape, chosen in members.items():
            config = kernel_config(device.arch, spec.needs, shape)
            num_slots = slots(config, device)
            one_each = fewest > 0 and most <= config.cta_tile_q
            tiles, kv_tiles = _query_tiles(spec, lengths, packed_len, chosen, one_each, config)
            split_size, first = None, 0
            if fixed_split_size is not None:
                split_size = min(fixed_split_size * spec.split_unit, splits.MAX_SPLIT)
            if narrowed:
                # There is room in a frame for a run of each query tile.
                one_run = frame is not None
                tiles, kv_tiles = _visible_runs(spec, config, tiles, mask, split_size, one_run)
            order = longest_first(kv_tiles)
            if split_size is None and not disable_split_kv:
                split = heuristics.choose_split(
                    kv_tiles, order, spec.num_kv_heads, num_slots, shape == "long"
                )
                if split is not None:
                    split_size, first = split.kv_tiles * config.cta_tile_kv, split.first
            tiles = tiles.take(order, axis=0)
            most_partials = None if frame is None or by_request else frame[shape].partials
            chosen_split = (split_size, first)
            if narrowed:
                from_zero = fixed_split_size is not None
                launch = _launch_of_runs(
                    spec, config, tiles, chosen_split, from_zero, num_slots, most_partials
                )
            else:
                launch = _launch(spec, config, tiles, *chosen_split, num_slots, most_partials)
            launches.append(launch)
    return Schedule(
        spec,
        device,
        lengths,
        fixed_split_size,
        disable_split_kv,
        tuple(launches),
        mask,
    )


def _members(
    spec: AttentionSpec,
    lengths: Lengths,
    device: DeviceModel,
    packed_len: IntArray,
    extremes: tuple[int, int],
    by_request: bool,
    frame: Frame | None,
) -> dict[Shape, npt.NDArray[np.intp] | None]:
    """Which requests take which shape of query tile; None for all of them.

    `extremes` are the lowest and the highest of `packed_len`.
    """
    if frame is not None and len(frame) == 1:
        (shape,) = frame
        return {shape: None}
    config = kernel_config(device.arch, spec.needs, "long")
    num_rows = lengths.nnz_qo * spec.gqa_group_size
    num_slots = slots(config, device)
    members = heuristics.choose_shapes(
        packed_len,
        lengths.kv_len,
        *extremes,
        num_rows,
        spec.num_kv_heads,
        num_slots,
        config.carries_short,
        by_request,
    )
    if "long" in members and not by_request:
        num_items = num_slots // spec.num_kv_heads
        brief = kernel_config(device.arch, spec.needs, "brief")
        if heuristics.is_brief(lengths.kv_len, num_rows, brief, num_items):
            members["brief"] = members.pop("long")
    return members


def rebuild(schedule: Schedule, device: DeviceModel) -> Schedule:
    """The same batch, divided for another device."""
    return build(
        schedule.spec,
        schedule.lengths,
        device,
        schedule.fixed_split_size,
        schedule.disable_split_kv,
        mask=schedule.mask,
    )


def _query_tiles(
    spec: AttentionSpec,
    lengths: Lengths,
    packed_len: IntArray,
    chosen: npt.NDArray[np.intp] | None,
    one_each: bool,
    config: KernelConfig,
) -> tuple[IntArray, IntArray]:
    """The query tiles of the chosen requests, of all where None, request after request.

    `one_each` says that each has one tile.

    Returns
    -------
    tiles : int32 [tiles, fields of ITEM_DTYPE]
        Each tile as one unsplit item.
    kv_tiles : int32 [tiles]
        Their KV tiles.
    """
    cta_tile_q = config.cta_tile_q
    qo_len, extent = lengths.qo_len, lengths.kv_len
    qo_begin, page_begin = lengths.qo_indptr[:-1], lengths.paged_kv_indptr[:-1]
    if chosen is not None:
        packed_len, qo_len, extent = packed_len[chosen], qo_len[chosen], extent[chosen]
        qo_begin, page_begin = qo_begin[chosen], page_begin[chosen]
    batch = len(packed_len)
    # Each request as the last of its tiles, which sees all of its keys.
    tiles = np.zeros((batch, ITEM_FIELDS), np.int32)
    tiles[:, REQUEST] = counting(batch) if chosen is None else chosen
    tiles[:, KV_END] = extent
    tiles[:, NUM_SPLITS] = 1
    tiles[:, QO_BEGIN] = qo_begin
    tiles[:, QO_LEN] = qo_len
    tiles[:, KV_LEN] = extent
    tiles[:, PAGE_BEGIN] = page_begin
    if not one_each:
        counts = ceil_div(packed_len, cta_tile_q)
        ends = np.add.accumulate(counts, out=np.empty_like(counts))
        # A tile's row_begin: its place among all tiles, less where its request began.
        tiles[:, ROW_BEGIN] = (counts - ends) * int32(cta_tile_q)
        first_sees = extent - qo_len + int32(1)  # keys that each first query sees under causal
        tiles = tiles.repeat(counts, axis=0)
        row_begin = tiles[:, ROW_BEGIN]
        row_begin += counting(len(tiles)) * int32(cta_tile_q)
        extent = tiles[:, KV_END]
        if spec.causal:
            # The tile's last row, if the request has so many, sees the most keys.
            seen = row_begin + int32(cta_tile_q - 1)
            seen //= int32(spec.gqa_group_size)
            seen += first_sees.repeat(counts)
            np.minimum(seen, extent, out=seen)
            np.maximum(seen, int32(0), out=seen)
            extent[:] = seen
            extent = seen
    return tiles, ceil_div(extent, config.cta_tile_kv)


def _launch(
    spec: AttentionSpec,
    config: KernelConfig,
    tiles: IntArray,
    split_size: int | None,
    first: int,
    num_slots: int,
    most_partials: int | None,
) -> Launch:
    """Items of query tiles, longest first, each from `first` on cut into splits of so many keys.

    Whole where more than `most_partials` partial states would be needed. Writes into `tiles`, and
    may keep them.
    """
    num_partials = num_merges = 0
    items = tiles
    if split_size is not None:
        cut = tiles[:, KV_END] > int32(split_size)
        cut[:first] = False
        num_merges = int(np.count_nonzero(cut))
    if split_size is not None and num_merges:
        pieces = splits.cut(tiles[cut], split_size)
        num_partials = len(pieces)
        if most_partials is not None and num_partials > most_partials:
            return _launch(spec, config, tiles, None, 0, num_slots, None)
        items = np.concatenate((pieces, tiles[~cut])) if num_merges < len(tiles) else pieces
        kv_tiles = ceil_div(items[:, KV_END] - items[:, KV_BEGIN], config.cta_tile_kv)
        items = items.take(longest_first(kv_tiles), axis=0)
    grid = min(num_slots, len(items) * spec.num_kv_heads)
    return Launch(config, items, grid, num_partials, num_merges)


def _visible_runs(
    spec: AttentionSpec,
    config: KernelConfig,
    tiles: IntArray,
    mask: CustomMask | None,
    split_size: int | None,
    one_run: bool,
) -> tuple[IntArray, IntArray]:
    """What of query tiles' keys a window and a mask leave; writes into `tiles`.

    Returns
    -------
    runs : int32 [runs, fields of ITEM_DTYPE]
        Each as one unsplit item, with the number of its query tile for MERGE.
    kv_tiles : int32 [runs]
        Their KV tiles.
    """
    tiles[:, MERGE] = counting(len(tiles))
    if mask is not None:
        tile = (config.cta_tile_q, config.cta_tile_kv)
        tiles = extents.runs(tiles, spec, mask, tile, split_size, one_run)
    else:
        extents.narrow(tiles, spec, config.cta_tile_kv, split_size)
    return tiles, ceil_div(tiles[:, KV_END] - tiles[:, KV_BEGIN], config.cta_tile_kv)


def _launch_of_runs(
    spec: AttentionSpec,
    config: KernelConfig,
    runs: IntArray,
    split: tuple[int | None, int],
    from_zero: bool,
    num_slots: int,
    most_partials: int | None,
) -> Launch:
    """As `_launch()`, of what `_visible_runs()` found, longest first.

    `split` is its `split_size` and `first`; `from_zero` says where splits begin.
    """
    items, num_partials, num_merges = splits.cut_runs(runs, *split, from_zero)
    if most_partials is not None and num_partials > most_partials:
        items, num_partials, num_merges = splits.cut_runs(runs, None, 0, from_zero)
    kv_tiles = ceil_div(items[:, KV_END] - items[:, KV_BEGIN], config.cta_tile_kv)
    items = items.take(longest_first(kv_tiles), axis=0)
    grid = min(num_slots, len(items) * spec.num_kv_heads)
    return Launch(config, items, grid, num_partials, num_merges)
