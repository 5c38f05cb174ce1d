"""From indptr arrays to work items: NumPy only, no loop over tokens, tiles or requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cupaged import heuristics
from cupaged.spec import ITEM_DTYPE, REQUEST_DTYPE, AttentionSpec, DeviceModel, KernelConfig

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Lengths:
    """A ragged batch: what the four index arrays say, checked.

    Attributes
    ----------
    qo_indptr, paged_kv_indptr : int64 [batch + 1]
    qo_len, kv_len : int64 [batch]
    """

    qo_indptr: IntArray
    paged_kv_indptr: IntArray
    qo_len: IntArray
    kv_len: IntArray

    @property
    def nnz_qo(self) -> int:
        """Rows of q."""
        return int(self.qo_indptr[-1])


@dataclass(frozen=True, slots=True)
class Launch:
    """The items of one query-tile shape: one launch of one kernel.

    Attributes
    ----------
    config : KernelConfig
    items : ITEM_DTYPE [num_items]
        Longest first. Every item stands for `num_kv_heads` pieces of work, one a KV head.
    grid : int
        Thread blocks. Block `b` begins with piece `b`; whoever is done takes the next one.
        Piece `w` is item `w // num_kv_heads` for KV head `w % num_kv_heads`.
    num_partials : int
        Partial-state slots its items write; one holds `cta_tile_q` rows for every KV head.
    num_merges : int
        Query tiles that are split, each merged by whichever of its splits ends last.
    """

    config: KernelConfig
    items: npt.NDArray[np.void]
    grid: int
    num_partials: int
    num_merges: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """All that depends on the lengths alone.

    Attributes
    ----------
    spec : AttentionSpec
    device : DeviceModel
        What it was balanced for; it is right on any other.
    lengths : Lengths
    requests : REQUEST_DTYPE [batch]
    launches : tuple of Launch
        At most one for each shape of query tile; empty where there is no query row.
    """

    spec: AttentionSpec
    device: DeviceModel
    lengths: Lengths
    requests: npt.NDArray[np.void]
    launches: tuple[Launch, ...]


def build(
    spec: AttentionSpec,
    lengths: Lengths,
    device: DeviceModel,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
) -> Schedule:
    """Divide a ragged batch into work items.

    Every (query row, visible key, head) is covered by exactly one item. With `fixed_split_size`
    or `disable_split_kv`, a request's items don't depend on the rest of the batch.

    Parameters
    ----------
    spec : AttentionSpec
    lengths : Lengths
    device : DeviceModel
    fixed_split_size : int, optional
        Pages of a split.
    disable_split_kv : bool
        Never split.
    """
    requests = np.empty(len(lengths.qo_len), REQUEST_DTYPE)
    requests["qo_begin"] = lengths.qo_indptr[:-1]
    requests["qo_len"] = lengths.qo_len
    requests["kv_len"] = lengths.kv_len
    requests["page_begin"] = lengths.paged_kv_indptr[:-1]
    packed_len = lengths.qo_len * spec.gqa_group_size
    aligned = heuristics.page_aligned(spec.page_size)
    configs = {
        shape: heuristics.kernel_config(device.arch, spec.dtype, spec.head_dim, aligned, shape)
        for shape in heuristics.SHAPES
    }
    fixed = fixed_split_size is not None or disable_split_kv
    short = heuristics.choose_shapes(
        packed_len,
        lengths.kv_len,
        spec.num_kv_heads,
        heuristics.slots(configs["long"], device),
        by_request=fixed,
    )
    launches = []
    for shape, chosen in (("long", ~short), ("short", short)):
        members = np.flatnonzero(chosen & (packed_len > 0))
        if len(members) == 0:
            continue
        config = configs[shape]
        tiles = _query_tiles(spec, lengths, packed_len, members, config.cta_tile_q)
        num_slots = heuristics.slots(config, device)
        if fixed_split_size is not None:
            split_size = fixed_split_size * spec.page_size
        elif disable_split_kv:
            split_size = None
        else:
            kv_tiles = -(-tiles.kv_extent // config.cta_tile_kv)
            chosen_split = heuristics.choose_split(kv_tiles, spec.num_kv_heads, num_slots)
            split_size = chosen_split and chosen_split * config.cta_tile_kv
        launches.append(_launch(spec, config, tiles, split_size, num_slots))
    return Schedule(spec, device, lengths, requests, tuple(launches))


@dataclass(frozen=True, slots=True)
class _QueryTiles:
    """int64 [tiles] each: the request, the first packed row, and the keys any row sees."""

    request: IntArray
    row_begin: IntArray
    kv_extent: IntArray


def _ranges(counts: IntArray) -> tuple[IntArray, IntArray]:
    """For counts [2, 3]: owners [0, 0, 1, 1, 1] and positions [0, 1, 0, 1, 2]."""
    ends = counts.cumsum()
    owners = np.arange(len(counts)).repeat(counts)
    positions = np.arange(len(owners)) - (ends - counts)[owners]
    return owners, positions


def _query_tiles(
    spec: AttentionSpec,
    lengths: Lengths,
    packed_len: IntArray,
    members: IntArray,
    cta_tile_q: int,
) -> _QueryTiles:
    packed = packed_len[members]
    owners, positions = _ranges(-(-packed // cta_tile_q))
    request = members[owners]
    row_begin = positions * cta_tile_q
    kv_len = lengths.kv_len[request]
    if not spec.causal:
        return _QueryTiles(request, row_begin, kv_len)
    # The tile's last row sees the most keys: up to kv_len - qo_len + its query, inclusive.
    last_row = np.minimum(row_begin + cta_tile_q, packed[owners]) - 1
    last_query = last_row // spec.gqa_group_size
    seen = kv_len - lengths.qo_len[request] + last_query + 1
    return _QueryTiles(request, row_begin, np.maximum(seen, 0))


def _launch(
    spec: AttentionSpec,
    config: KernelConfig,
    tiles: _QueryTiles,
    split_size: int | None,
    num_slots: int,
) -> Launch:
    num_tiles = len(tiles.request)
    num_partials = num_merges = 0
    if split_size is None or int(tiles.kv_extent.max()) <= split_size:
        fields = np.zeros((num_tiles, len(ITEM_DTYPE)), np.int32)
        fields[:, 0] = tiles.request
        fields[:, 1] = tiles.row_begin
        fields[:, 3] = tiles.kv_extent
        fields[:, 5] = 1
        work = tiles.kv_extent
    else:
        # A tile without keys still has one split, which writes its zeros.
        num_splits = np.maximum(-(-tiles.kv_extent // split_size), 1)
        owners, split = _ranges(num_splits)
        is_split = num_splits > 1
        partials = np.where(is_split, num_splits, 0)
        merges = is_split.cumsum()
        num_partials, num_merges = int(partials.sum()), int(merges[-1])
        kv_begin = split * split_size
        kv_end = np.minimum(kv_begin + split_size, tiles.kv_extent[owners])
        fields = np.empty((len(owners), len(ITEM_DTYPE)), np.int32)
        fields[:, 0] = tiles.request[owners]
        fields[:, 1] = tiles.row_begin[owners]
        fields[:, 2] = kv_begin
        fields[:, 3] = kv_end
        fields[:, 4] = split
        fields[:, 5] = num_splits[owners]
        fields[:, 6] = (partials.cumsum() - partials)[owners]
        fields[:, 7] = (merges - is_split)[owners]
        work = kv_end - kv_begin
    order = np.argsort(-work, kind="stable")
    items = fields[order].view(ITEM_DTYPE).reshape(-1)
    grid = min(num_slots, len(items) * spec.num_kv_heads)
    return Launch(config, items, grid, num_partials, num_merges)
