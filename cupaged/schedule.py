"""From indptr arrays to work items: NumPy only, no loop over tokens, tiles or requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cupaged import heuristics
from cupaged.spec import ITEM_DTYPE, REQUEST_DTYPE, AttentionSpec, DeviceModel, KernelConfig

IntArray = npt.NDArray[np.int32]

_REQUEST_FIELDS = REQUEST_DTYPE.itemsize // 4
_ITEM_FIELDS = ITEM_DTYPE.itemsize // 4
# Columns of the items while they are a plain array.
_REQUEST, _ROW_BEGIN, _KV_BEGIN, _KV_END, _SPLIT, _NUM_SPLITS, _FIRST_PARTIAL, _MERGE = range(
    _ITEM_FIELDS
)
_UINT16_MAX = 2**16 - 1
_MAX_SPLIT = 2**30  # no request has more keys


@dataclass(frozen=True, slots=True)
class Lengths:
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

    def num_partial_rows(self, spec: AttentionSpec) -> int:
        """Rows of all partial states."""
        return self.num_partials * spec.num_kv_heads * self.config.cta_tile_q

    def partial_bytes(self, spec: AttentionSpec) -> int:
        """Bytes of all partial states: float32, an output row and an LSE for each row."""
        return self.num_partial_rows(spec) * (spec.head_dim + 1) * 4


@dataclass(frozen=True, slots=True)
class Schedule:
    """All that depends on the lengths alone.

    Attributes
    ----------
    spec : AttentionSpec
    device : DeviceModel
        What it was divided for. It is right on any other of the same class of tiles.
    lengths : Lengths
    requests : REQUEST_DTYPE [batch]
    fixed_split_size : int, optional
        Pages of a split, where the caller fixed it.
    disable_split_kv : bool
    launches : tuple of Launch
        At most one for each shape of query tile; empty where there is no query row.
    """

    spec: AttentionSpec
    device: DeviceModel
    lengths: Lengths
    requests: npt.NDArray[np.void]
    fixed_split_size: int | None
    disable_split_kv: bool
    launches: tuple[Launch, ...]

    @property
    def workspace_bytes(self) -> int:
        """Bytes of partial states; the launches, one after the other, share them."""
        return max((launch.partial_bytes(self.spec) for launch in self.launches), default=0)


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
    requests = np.empty((len(lengths.qo_len), _REQUEST_FIELDS), np.int32)
    requests[:, 0] = lengths.qo_indptr[:-1]
    requests[:, 1] = lengths.qo_len
    requests[:, 2] = lengths.kv_len
    requests[:, 3] = lengths.paged_kv_indptr[:-1]
    launches = []
    if lengths.nnz_qo:
        packed_len = lengths.qo_len * spec.gqa_group_size
        # Bits may depend on the batch only where the caller has not asked that they don't.
        by_request = fixed_split_size is not None or disable_split_kv
        long_config = heuristics.kernel_config(
            device.arch, spec.dtype, spec.head_dim, spec.page_size, "long"
        )
        members = heuristics.choose_shapes(
            packed_len,
            lengths.kv_len,
            int(np.minimum.reduce(packed_len)),
            int(np.maximum.reduce(packed_len)),
            spec.num_kv_heads,
            heuristics.slots(long_config, device),
            by_request,
        )
        for shape, chosen in members.items():
            config = heuristics.kernel_config(
                device.arch, spec.dtype, spec.head_dim, spec.page_size, shape
            )
            tiles, kv_tiles = _query_tiles(spec, lengths, packed_len, chosen, config)
            slots = heuristics.slots(config, device)
            if fixed_split_size is not None:
                split_size = min(fixed_split_size * spec.page_size, _MAX_SPLIT)
            elif disable_split_kv:
                split_size = None
            else:
                split_size = heuristics.choose_split(kv_tiles, spec.num_kv_heads, slots)
                split_size = split_size and split_size * config.cta_tile_kv
            launches.append(_launch(spec, config, tiles, split_size, slots))
    return Schedule(
        spec,
        device,
        lengths,
        requests.view(REQUEST_DTYPE).reshape(-1),
        fixed_split_size,
        disable_split_kv,
        tuple(launches),
    )


def rebuild(schedule: Schedule, device: DeviceModel) -> Schedule:
    """The same batch, divided for another device."""
    return build(
        schedule.spec,
        schedule.lengths,
        device,
        schedule.fixed_split_size,
        schedule.disable_split_kv,
    )


def _query_tiles(
    spec: AttentionSpec,
    lengths: Lengths,
    packed_len: IntArray,
    chosen: IntArray | None,
    config: KernelConfig,
) -> tuple[IntArray, IntArray]:
    """The query tiles of the chosen requests, of all where None, longest first.

    Returns
    -------
    fields : int32 [tiles, fields of ITEM_DTYPE]
        Each tile as one unsplit item.
    kv_tiles : int32 [tiles]
        Their KV tiles.
    """
    cta_tile_q = config.cta_tile_q
    qo_len, kv_len = lengths.qo_len, lengths.kv_len
    if chosen is not None:
        packed_len, qo_len, kv_len = packed_len[chosen], qo_len[chosen], kv_len[chosen]
    counts = (packed_len + (cta_tile_q - 1)) // cta_tile_q
    ends = counts.cumsum(dtype=np.int32)
    num_tiles = int(ends[-1])
    fields = np.zeros((num_tiles, _ITEM_FIELDS), np.int32)
    fields[:, _NUM_SPLITS] = 1
    owner = np.arange(len(counts))
    last_row = packed_len - 1
    first_sees = kv_len - qo_len + 1  # keys that a request's first query sees under causal
    if num_tiles > len(counts) or int(np.minimum.reduce(counts)) == 0:
        owner = owner.repeat(counts)
        # A tile's row_begin: its place among all tiles, less where its request began.
        row_begin = np.arange(0, num_tiles * cta_tile_q, cta_tile_q, dtype=np.int32)
        row_begin -= ((ends - counts) * cta_tile_q)[owner]
        fields[:, _ROW_BEGIN] = row_begin
        last_row = np.minimum(row_begin + (cta_tile_q - 1), last_row[owner])
        first_sees = first_sees[owner]
        kv_len = kv_len[owner]
    fields[:, _REQUEST] = owner if chosen is None else chosen[owner]
    extent = kv_len
    if spec.causal:
        # The tile's last row sees the most keys.
        extent = np.maximum(last_row // spec.gqa_group_size + first_sees, 0)
    fields[:, _KV_END] = extent
    kv_tiles = (extent + (config.cta_tile_kv - 1)) // config.cta_tile_kv
    order = _longest_first(kv_tiles)
    return fields.take(order, axis=0), kv_tiles[order]


def _launch(
    spec: AttentionSpec,
    config: KernelConfig,
    tiles: IntArray,
    split_size: int | None,
    slots: int,
) -> Launch:
    """Items of query tiles, each cut into splits of `split_size` keys, longest first."""
    num_partials = num_merges = 0
    fields = tiles
    kv_extent = tiles[:, _KV_END]
    if split_size is not None and int(np.maximum.reduce(kv_extent)) > split_size:
        # A tile without keys still has one split, which writes its zeros.
        num_splits = np.maximum(-(-kv_extent // split_size), 1)
        ends = num_splits.cumsum()
        owner = np.arange(len(num_splits)).repeat(num_splits)
        split = np.arange(len(owner)) - (ends - num_splits)[owner]
        is_split = num_splits > 1
        partials = np.where(is_split, num_splits, 0)
        merges = is_split.cumsum()
        num_partials, num_merges = int(partials.sum()), int(merges[-1])
        fields = tiles.take(owner, axis=0)
        fields[:, _KV_BEGIN] = split * split_size
        fields[:, _KV_END] = np.minimum(fields[:, _KV_BEGIN] + split_size, kv_extent[owner])
        fields[:, _SPLIT] = split
        fields[:, _NUM_SPLITS] = num_splits[owner]
        fields[:, _FIRST_PARTIAL] = (partials.cumsum() - partials)[owner]
        fields[:, _MERGE] = (merges - is_split)[owner]
        kv_tiles = -(-(fields[:, _KV_END] - fields[:, _KV_BEGIN]) // config.cta_tile_kv)
        fields = fields.take(_longest_first(kv_tiles), axis=0)
    items = fields.view(ITEM_DTYPE).reshape(-1)
    grid = min(slots, len(items) * spec.num_kv_heads)
    return Launch(config, items, grid, num_partials, num_merges)


def _longest_first(kv_tiles: IntArray) -> npt.NDArray[np.intp]:
    """The order by descending KV tiles, equal ones as they come."""
    descending = ~kv_tiles
    if int(np.maximum.reduce(kv_tiles)) <= _UINT16_MAX:
        # NumPy sorts 16-bit integers by radix, several times as fast as wider ones.
        return descending.astype(np.uint16).argsort(kind="stable")
    return descending.argsort(kind="stable")
