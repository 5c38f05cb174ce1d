"""Items cut into splits, each with its place among those that are merged with it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cupaged.item_table import (
    FIRST_PARTIAL,
    KV_BEGIN,
    KV_END,
    MERGE,
    NUM_SPLITS,
    SPLIT,
    IntArray,
    ceil_div,
    counting,
    int32,
    kv_tiles_of,
    longest_first,
    sums_before,
)

MAX_SPLIT = 2**30  # no request has more keys


class Cut(NamedTuple):
    """Items, and what merging them takes.

    Attributes
    ----------
    items : int32 [items, fields of ITEM_DTYPE]
    num_partials, num_merges : int
        Partial-state slots, and query tiles of several items.
    """

    items: IntArray
    num_partials: int
    num_merges: int


def cut(
    tiles: IntArray, split_size: int, first: int, cta_tile_kv: int, most_partials: int | None
) -> Cut:
    """Query tiles whose keys begin at 0, in splits where they are longer than one; longest first.

    Parameters
    ----------
    tiles : int32 [tiles, fields of ITEM_DTYPE]
        Each tile as one unsplit item, longest first; may be written into, and kept.
    split_size : int
        Keys of a split.
    first : int
        Tiles before this one are not cut. They have more KV tiles than a split.
    cta_tile_kv : int
    most_partials : int, optional
        Where more partial states would be needed, no tile is cut.
    """
    longer = tiles[first:, KV_END] > int32(split_size)
    num_merges = int(np.count_nonzero(longer))
    if num_merges == 0:
        return Cut(tiles, 0, 0)
    if num_merges < len(longer) and longer.argmin() < num_merges:
        # The longest first are so by KV tiles: where a split ends within one, as the caller may
        # ask for, tiles of as many may be longer than a split or not.
        tiles = np.concatenate((tiles[:first], tiles[first:][longer], tiles[first:][~longer]))
    end = first + num_merges
    wholes = tiles[first:end]
    num_splits = ceil_div(wholes[:, KV_END], split_size)
    ends = np.add.accumulate(num_splits, dtype=np.int32)
    num_partials = ends.item(-1)
    if most_partials is not None and num_partials > most_partials:
        return Cut(tiles, 0, 0)
    wholes[:, NUM_SPLITS] = num_splits
    np.subtract(ends, num_splits, out=wholes[:, FIRST_PARTIAL])
    wholes[:, MERGE] = counting(num_merges)
    pieces = wholes.repeat(num_splits, axis=0)
    split, kv_end = counting(num_partials) - pieces[:, FIRST_PARTIAL], pieces[:, KV_END]
    pieces[:, SPLIT] = split
    split *= int32(split_size)
    pieces[:, KV_BEGIN] = split
    split += int32(split_size)
    np.minimum(split, kv_end, out=kv_end)
    items = np.concatenate((pieces, tiles[end:])) if end < len(tiles) else pieces
    items = items.take(longest_first(kv_tiles_of(items, cta_tile_kv)), axis=0)
    if first:
        items = np.concatenate((tiles[:first], items))
    return Cut(items, num_partials, num_merges)


def cut_runs(runs: IntArray, split_size: int | None, first: int, from_zero: bool) -> Cut:
    """The splits of query tiles of which there are runs of keys, one or several.

    Parameters
    ----------
    runs : int32 [runs, fields of ITEM_DTYPE]
        Each as one unsplit item, with the number of its query tile for MERGE; may be written into,
        and kept.
    split_size : int, optional
        Keys of a split; None where no run is cut.
    first : int
        Runs before this one are not cut.
    from_zero : bool
        Splits begin at multiples of their size; else the first one where the run does.
    """
    if split_size is None and runs[:, MERGE].max() + 1 == len(runs):  # whole query tiles
        runs[:, MERGE] = 0
        return Cut(runs, 0, 0)
    sizes = np.full(len(runs), MAX_SPLIT if split_size is None else split_size, np.int32)
    sizes[:first] = MAX_SPLIT
    kv_begin = runs[:, KV_BEGIN]
    base = kv_begin // sizes * sizes if from_zero else kv_begin
    counts = (runs[:, KV_END] - base + (sizes - int32(1))) // sizes
    np.maximum(counts, int32(1), out=counts)  # an empty run is an item too
    place = counting(int(counts.sum())) - sums_before(counts).repeat(counts)
    pieces, sizes = runs.repeat(counts, axis=0), sizes.repeat(counts)
    begin = base.repeat(counts) + place * sizes
    kv_begin, kv_end = pieces[:, KV_BEGIN], pieces[:, KV_END]
    np.maximum(begin, kv_begin, out=kv_begin)
    np.minimum(begin + sizes, kv_end, out=kv_end)
    # Those of a query tile beside each other, in the order of their keys.
    pieces = pieces[np.lexsort((kv_begin, pieces[:, MERGE]))]
    new_tile = np.ones(len(pieces), np.bool_)
    np.not_equal(pieces[1:, MERGE], pieces[:-1, MERGE], out=new_tile[1:])
    (begins,) = new_tile.nonzero()
    num_splits = np.diff(begins, append=len(pieces)).astype(np.int32)
    merged = num_splits > 1
    partials = num_splits * merged
    pieces[:, SPLIT] = counting(len(pieces)) - begins.repeat(num_splits)
    pieces[:, NUM_SPLITS] = num_splits.repeat(num_splits)
    pieces[:, FIRST_PARTIAL] = (sums_before(partials) * merged).repeat(num_splits)
    pieces[:, MERGE] = (sums_before(merged.astype(np.int32)) * merged).repeat(num_splits)
    return Cut(pieces, int(partials.sum()), int(np.count_nonzero(merged)))
