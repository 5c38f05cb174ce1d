"""Items cut into splits, each with its place among those that are merged with it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cupaged.heuristics import Split
from cupaged.item_table import (
    FIRST_PARTIAL,
    KV_BEGIN,
    KV_END,
    LIGHT,
    MERGE,
    NUM_SPLITS,
    QO_LEN,
    SPLIT,
    IntArray,
    costs_of,
    counting,
    int32,
    longest_first,
    sums_before,
)

MAX_SPLIT = 2**30  # no request has more keys


class Rule(NamedTuple):
    """Where items are cut, longest first.

    Attributes
    ----------
    keys, light_keys : int, optional
        Keys of a split, and of a light request's; None where nothing is cut.
    light_len : int
        Requests of at most so many queries are light, and cost what `costs_of()` says.
    first : int
        Items before this one are not cut. They have more KV tiles than a split.
    """

    keys: int | None = None
    light_keys: int | None = None
    light_len: int = 0
    first: int = 0

    def sizes(self, items: IntArray) -> IntArray:
        """The keys of each item's splits, or of all."""
        if self.keys is None or self.light_keys is None:
            return int32(MAX_SPLIT)
        if self.light_len == 0 or self.light_keys == self.keys:
            return int32(self.keys)
        light = items[:, QO_LEN] <= int32(self.light_len)
        sizes: IntArray = np.where(light, int32(self.light_keys), int32(self.keys))
        return sizes


def rule(split: Split | None, cta_tile_kv: int, light_len: int) -> Rule:
    """A chosen split as a rule. As light requests cost less, their splits are longer."""
    if split is None:
        return Rule(light_len=light_len)
    keys = split.kv_tiles * cta_tile_kv
    return Rule(keys, min(LIGHT * keys, MAX_SPLIT), light_len, split.first)


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


def cut(tiles: IntArray, rule: Rule, cta_tile_kv: int, most_partials: int | None) -> Cut:
    """Query tiles whose keys begin at 0, in splits where they are longer than one; longest first.

    Parameters
    ----------
    tiles : int32 [tiles, fields of ITEM_DTYPE]
        Each tile as one unsplit item, longest first; may be written into, and kept.
    rule : Rule
        Cuts some.
    cta_tile_kv : int
    most_partials : int, optional
        Where more partial states would be needed, no tile is cut.
    """
    first = rule.first
    longer = tiles[first:, KV_END] > rule.sizes(tiles[first:])
    num_merges = int(np.count_nonzero(longer))
    if num_merges == 0:
        return Cut(tiles, 0, 0)
    if num_merges < len(longer) and longer.argmin() < num_merges:
        # They are longest first by what they cost. A light one may be shorter than its splits, and
        # where a split ends within a KV tile, as the caller may ask for, so may one of as many.
        tiles = np.concatenate((tiles[:first], tiles[first:][longer], tiles[first:][~longer]))
    end = first + num_merges
    wholes = tiles[first:end]
    sizes = rule.sizes(wholes)
    num_splits = (wholes[:, KV_END] + (sizes - int32(1))) // sizes
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
    sizes = rule.sizes(pieces)
    split *= sizes
    pieces[:, KV_BEGIN] = split
    split += sizes
    np.minimum(split, kv_end, out=kv_end)
    items = np.concatenate((pieces, tiles[end:])) if end < len(tiles) else pieces
    items = items.take(longest_first(costs_of(items, cta_tile_kv, rule.light_len)), axis=0)
    if first:
        items = np.concatenate((tiles[:first], items))
    return Cut(items, num_partials, num_merges)


def cut_runs(runs: IntArray, rule: Rule, from_zero: bool, most_partials: int | None) -> Cut:
    """The splits of query tiles of which there are runs of keys, one or several.

    Parameters
    ----------
    runs : int32 [runs, fields of ITEM_DTYPE]
        Each as one unsplit item, with the number of its query tile for MERGE; may be written into,
        and kept.
    rule : Rule
    from_zero : bool
        Splits begin at multiples of their size; else the first one where the run does.
    most_partials : int, optional
        Where more partial states would be needed, no run is cut.
    """
    if rule.keys is None and runs[:, MERGE].max() + 1 == len(runs):  # whole query tiles
        runs[:, MERGE] = 0
        return Cut(runs, 0, 0)
    sizes = np.full(len(runs), MAX_SPLIT, np.int32)
    sizes[rule.first :] = rule.sizes(runs[rule.first :])
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
    num_partials = int(partials.sum())
    if rule.keys is not None and most_partials is not None and num_partials > most_partials:
        return cut_runs(runs, Rule(), from_zero, None)
    pieces[:, SPLIT] = counting(len(pieces)) - begins.repeat(num_splits)
    pieces[:, NUM_SPLITS] = num_splits.repeat(num_splits)
    pieces[:, FIRST_PARTIAL] = (sums_before(partials) * merged).repeat(num_splits)
    pieces[:, MERGE] = (sums_before(merged.astype(np.int32)) * merged).repeat(num_splits)
    return Cut(pieces, num_partials, int(np.count_nonzero(merged)))
