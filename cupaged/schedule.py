"""From indptr arrays to work items: NumPy only, no loop over tokens, tiles or requests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged import extents, heuristics, shape_choice, splits
from cupaged.extents import CustomMask
from cupaged.frames import Frame
from cupaged.item_table import MERGE, QO_LEN, counting, kv_tiles_of, longest_first
from cupaged.kernel_spec import ITEM_DTYPE, KernelConfig
from cupaged.query_tiles import Indices, QueryTiles, query_tiles
from cupaged.spec import AttentionSpec, DeviceModel
from cupaged.splits import Cut
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
        return self.qo_indptr.item(-1)


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
    group = spec.gqa_group_size
    if lengths.nnz_qo:
        rows = packed_rows(spec, lengths)
        fewest, most, _ = rows
        for shape, chosen in members(spec, lengths, device, rows, by_request, frame).items():
            config = kernel_config(device.arch, spec.needs, shape)
            num_slots = slots(config, device)
            one_each = fewest > 0 and most <= config.cta_tile_q
            tiles = query_tiles(spec, config, lengths, chosen, one_each)
            split_size, first = None, 0
            if fixed_split_size is not None:
                split_size = min(fixed_split_size * spec.split_unit, splits.MAX_SPLIT)
            kv_tiles = tiles.kv_tiles
            if narrowed:
                # There is room in a frame for a run of each query tile.
                one_run = frame is not None
                runs, kv_tiles = _visible_runs(spec, config, tiles, mask, split_size, one_run)
            order = longest_first(kv_tiles)
            longest = kv_tiles.item(order.item(0))
            if not by_request and longest >= heuristics.SHORTEST_SPLIT:
                light_len = heuristics.light_len(config, group, fewest, most)
                light_tiles = 0
                if light_len:
                    item_qo_len = runs[:, QO_LEN] if narrowed else tiles.qo_len
                    light_tiles = heuristics.count_light_tiles(
                        *(kv_tiles, order, item_qo_len, light_len)
                    )
                split = heuristics.choose_split(
                    *(kv_tiles, order, spec.num_kv_heads, num_slots, shape == "long", light_tiles)
                )
                if split is not None:
                    split_size, first = split.kv_tiles * config.cta_tile_kv, split.first
            most_partials = None if frame is None or by_request else frame[shape].partials
            if narrowed:
                runs, from_zero = runs.take(order, axis=0), fixed_split_size is not None
                cut = _cut_runs(config, runs, (split_size, first), from_zero, most_partials)
            elif split_size is not None:
                items = tiles.items(order)
                cut = splits.cut(items, split_size, first, config.cta_tile_kv, most_partials)
            else:
                cut = Cut(tiles.items(order), 0, 0)
            grid = min(num_slots, len(cut.items) * spec.num_kv_heads)
            launches.append(Launch(config, cut.items, grid, cut.num_partials, cut.num_merges))
    return Schedule(
        spec,
        device,
        lengths,
        fixed_split_size,
        disable_split_kv,
        tuple(launches),
        mask,
    )


class PackedRows(NamedTuple):
    """Packed rows: the fewest and the most of a request, and those of all."""

    fewest: int
    most: int
    all: int


def packed_rows(spec: AttentionSpec, lengths: Lengths) -> PackedRows:
    """Those of a batch that has a row."""
    qo_len, group = lengths.qo_len, spec.gqa_group_size
    fewest, most = qo_len.item(qo_len.argmin()), qo_len.item(qo_len.argmax())
    return PackedRows(fewest * group, most * group, lengths.nnz_qo * group)


def members(
    spec: AttentionSpec,
    lengths: Lengths,
    device: DeviceModel,
    rows: PackedRows,
    by_request: bool,
    frame: Frame | None = None,
) -> dict[Shape, Indices | None]:
    """Which requests take which shape of query tile; None for all of them.

    Parameters
    ----------
    spec, lengths, device, frame
        As `build()` takes them.
    rows : PackedRows
    by_request : bool
        Decide each request by its own length alone.
    """
    if frame is not None and len(frame) == 1:
        (shape,) = frame
        return {shape: None}
    fewest, most, num_rows = rows
    if most <= shape_choice.SHORT_MAX_ROWS:
        return {"short": None}
    config = kernel_config(device.arch, spec.needs, "long")
    num_slots = slots(config, device)
    chosen = shape_choice.choose_shapes(
        lengths.qo_len,
        lengths.kv_len,
        spec.gqa_group_size,
        fewest,
        num_rows,
        spec.num_kv_heads,
        num_slots,
        config.carries_short,
        by_request,
    )
    num_items = num_slots // spec.num_kv_heads
    if "long" in chosen and not by_request and len(lengths.kv_len) <= num_items:
        brief = kernel_config(device.arch, spec.needs, "brief")
        if shape_choice.is_brief(lengths.kv_len, num_rows, brief, num_items):
            chosen["brief"] = chosen.pop("long")
    return chosen


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


def _visible_runs(
    spec: AttentionSpec,
    config: KernelConfig,
    tiles: QueryTiles,
    mask: CustomMask | None,
    split_size: int | None,
    one_run: bool,
) -> tuple[IntArray, IntArray]:
    """What of query tiles' keys a window and a mask leave.

    Returns
    -------
    runs : int32 [runs, fields of ITEM_DTYPE]
        Each as one unsplit item, with the number of its query tile for MERGE.
    kv_tiles : int32 [runs]
        Their KV tiles.
    """
    runs = tiles.items(np.arange(len(tiles.kv_end)))
    runs[:, MERGE] = counting(len(runs))
    if mask is not None:
        tile = (config.cta_tile_q, config.cta_tile_kv)
        runs = extents.runs(runs, spec, mask, tile, split_size, one_run)
    else:
        extents.narrow(runs, spec, config.cta_tile_kv, split_size)
    return runs, kv_tiles_of(runs, config.cta_tile_kv)


def _cut_runs(
    config: KernelConfig,
    runs: IntArray,
    split: tuple[int | None, int],
    from_zero: bool,
    most_partials: int | None,
) -> Cut:
    """Items of what `_visible_runs()` found, longest first: `splits.cut_runs()` and its arguments.

    `split` is its `split_size` and `first`. Whole where more than `most_partials` partial states
    would be needed.
    """
    cut = splits.cut_runs(runs, *split, from_zero)
    if most_partials is not None and cut.num_partials > most_partials:
        cut = splits.cut_runs(runs, None, 0, from_zero)
    order = longest_first(kv_tiles_of(cut.items, config.cta_tile_kv))
    return cut._replace(items=cut.items.take(order, axis=0))
