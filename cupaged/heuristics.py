"""How the planner cuts items into splits, each choice with its reason.

Pure functions of the lengths and of the machine's size; no arrays on any GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged.item_table import IntArray, int32
from cupaged.kernel_spec import KernelConfig

#: Packed rows of a warpgroup.
_LIGHT_ROWS = 64

#: KV tiles of light items, which are read while others compute, take so many times less than
#: theirs. Last waves that were filled up counting on 5, 4 and 3 made one prefill among 63 decodes
#: 8, 8 and 6% faster on an H200 (bench/NOTES-sm90.md).
LIGHT = 4

#: Costs in units of one KV tile's time. An item pays ITEM_COST for its first loads, its last
#: stores and the softmax's final step; a split pays SPLIT_COST more to store and merge.
ITEM_COST = 2
SPLIT_COST = 2

# All shares are in percent, and all is reckoned in whole numbers but for one last division: so the
# kernel of `build_schedule.cu`, which has them from here, chooses the same to the last bit.

#: Filling a part-filled last wave has to save this share of a slot's mean work: an H200 at its
#: power cap lost up to 0.9% where 1.5 to 1.9% were foretold, and gained 3.6% where 4.1% were.
WORTH = 3
#: Splitting all items is tried where they end so much above the mean.
TOO_LATE = 110
#: Of more waves than these, one is not worth so much.
MAX_WAVES = 33
#: Items make waves where they cost at least this share of the longest. Others fill the last wave
#: up by themselves, as they lie longest first.
NEARLY_EQUAL = 85

#: A split of fewer KV tiles than this isn't worth its item and merge cost.
MIN_TILES_PER_SPLIT = 4
#: Nor is an item of fewer worth a look.
SHORTEST_SPLIT = 2 * MIN_TILES_PER_SPLIT

#: Candidate splits, in shares of a slot's mean work: one or two waves of thread blocks, with slack
#: for chunks that don't divide the tiles evenly.
CANDIDATES = (55, 75, 100, 115)


def light_len(config: KernelConfig, group: int, fewest: int, most: int) -> int:
    """Requests of at most so many queries are light beside the others; 0 where none is.

    Where the kernel reads K and V about as fast for few rows as for many, one warpgroup has all
    rows of such a request, and the tensor cores hardly anything to do.

    Parameters
    ----------
    config : KernelConfig
    group : int
        Packed rows of a query.
    fewest, most : int
        Packed rows of the requests that have the fewest and the most.
    """
    light = config.carries_short and fewest <= _LIGHT_ROWS < most
    return _LIGHT_ROWS // group if light else 0


def count_light_tiles(
    kv_tiles: IntArray, order: npt.NDArray[np.intp], qo_len: IntArray, light_len: int
) -> int:
    """KV tiles of all light items; 0 where one of them is the longest of all.

    Parameters
    ----------
    kv_tiles : int32 [items]
    order : intp [items]
        Longest first.
    qo_len : int32 [items]
        Queries of each item's request.
    light_len : int
        Of `light_len()`.
    """
    if qo_len.item(order.item(0)) <= light_len:
        return 0
    return int(np.add.reduce(kv_tiles, dtype=np.int64, where=qo_len <= int32(light_len)))


class Split(NamedTuple):
    """How items are cut.

    Attributes
    ----------
    kv_tiles : int
        KV tiles of a piece.
    first : int
        Items before this one, longest first, stay whole.
    """

    kv_tiles: int
    first: int = 0


def choose_split(
    kv_tiles: IntArray,
    order: npt.NDArray[np.intp],
    num_kv_heads: int,
    slots: int,
    fill_last_wave: bool,
    light_tiles: int,
) -> Split | None:
    """How to cut the items, the longest of `SHORTEST_SPLIT` or more; None where no split pays.

    The finish time of a longest-first schedule is estimated by its lower bounds: the mean work
    of a slot, the longest item, and whole waves of equal items (Graham 1969, "Bounds on
    multiprocessing timing anomalies"). Splitting all items is tried where the unsplit bound lies
    more than a tenth above the mean; and where the last wave is part-filled, splitting its items.

    Parameters
    ----------
    kv_tiles : int32 [items]
        KV tiles of each unsplit item, the same for every KV head.
    order : intp [items]
        The order of the items, longest first.
    num_kv_heads : int
    slots : int
        Thread blocks that run at once.
    fill_last_wave : bool
        A slot without work is lost. Where it isn't, since the items are bound by the memory that
        all share, it leaves the others more.
    light_tiles : int
        KV tiles of light items, see `light_len()`.
    """
    longest = kv_tiles.item(order.item(0))
    tiles = int(np.add.reduce(kv_tiles, dtype=np.int64))
    num_items = len(kv_tiles) * num_kv_heads
    split, finish = None, math.inf
    # Of all slots together, as are the mean work and whatever is compared with it.
    mean = tiles * num_kv_heads + ITEM_COST * num_items
    if 100 * slots * (longest + ITEM_COST) < WORTH * mean:
        return None  # nor is a wave more or less
    unsplit = _waves_end(kv_tiles, order, num_kv_heads, slots)
    # No split can end before its pieces' mean, and there are no fewer pieces than items.
    least = mean + SPLIT_COST * num_items
    if 100 * slots * unsplit > max(TOO_LATE * mean, 100 * least):
        chunks = _chunks(tiles * num_kv_heads, slots, longest - 1)
        if fill_last_wave:
            # Pieces nearly as long as the items make the same waves.
            chunks = [chunk for chunk in chunks if 100 * chunk < NEARLY_EQUAL * longest]
        split, finish = _split_all(kv_tiles, order, num_kv_heads, slots, tiles, chunks, unsplit)
    saved = light_tiles - light_tiles // LIGHT
    late = slots * unsplit - mean + saved * num_kv_heads
    if fill_last_wave and num_items > slots and 100 * late >= WORTH * mean:
        other, its_finish = _split_last_wave(
            kv_tiles, order, num_kv_heads, slots, tiles - saved, mean
        )
        # In one wave, how the shorter items fall decides more than this foretells.
        if split is None or (its_finish < finish and other is not None and other.first):
            split = other
    return split


def _waves_end(
    kv_tiles: IntArray, order: npt.NDArray[np.intp], num_kv_heads: int, slots: int
) -> int:
    """When the items end at the earliest, as waves; the parameters are `choose_split`'s.

    A wave's first piece waits for one at least as long in every wave before it.
    """
    longest = kv_tiles.item(order.item(0)) + ITEM_COST
    end = 0
    for wave in range(min(-(-len(kv_tiles) * num_kv_heads // slots), MAX_WAVES), 0, -1):
        if longest * wave <= end:
            break  # fewer waves end no later
        first = kv_tiles.item(order.item((wave - 1) * slots // num_kv_heads))
        end = max(end, (first + ITEM_COST) * wave)
    return end


def _chunks(work: int, slots: int, highest: int) -> list[int]:
    """Candidates for the KV tiles of a piece, where all slots have so much work; ascending."""
    shares = [-(-percent * work // (100 * slots)) for percent in CANDIDATES]
    return [min(max(share, MIN_TILES_PER_SPLIT), highest) for share in shares]


def _split_all(
    kv_tiles: IntArray,
    order: npt.NDArray[np.intp],
    num_kv_heads: int,
    slots: int,
    tiles: int,
    chunks: list[int],
    unsplit: int,
) -> tuple[Split | None, float]:
    """The best of some candidates, where it ends earlier than without a split; and when that is.

    Parameters
    ----------
    kv_tiles, order, num_kv_heads, slots
        Those of `choose_split`.
    tiles : int
        Sum of `kv_tiles`.
    chunks : list of int
        Candidates, ascending.
    unsplit : int
        When the items end that aren't split.
    """
    if not chunks:
        return None, math.inf
    # No more items than these can be as long as a chunk. They are so few that plain Python is
    # faster than NumPy's calls.
    long_items = kv_tiles[order[: tiles // chunks[0]]].tolist()
    best, finish = 0, float(unsplit)
    for chunk in chunks:
        if chunk + ITEM_COST + SPLIT_COST >= finish:
            break  # its first piece alone takes as long, and those of longer chunks do
        wholes, rests = 0, len(kv_tiles)
        for item in long_items:
            if item < chunk:
                break
            whole = item // chunk
            wholes += whole
            if item == whole * chunk:
                rests -= 1
        end = _split_finish(chunk, wholes, rests, tiles, num_kv_heads, slots)
        if end < finish:
            best, finish = chunk, end
    return (Split(best), finish) if best else (None, math.inf)


def _split_last_wave(
    kv_tiles: IntArray,
    order: npt.NDArray[np.intp],
    num_kv_heads: int,
    slots: int,
    tiles: int,
    mean: int,
) -> tuple[Split | None, float]:
    """Cut each long item of the last wave in two: a long piece, and a rest for the slots left over.

    The items nearly as long as the longest make waves; what is shorter goes to those slots too.

    Parameters
    ----------
    kv_tiles, order, num_kv_heads, slots
        Those of `choose_split`.
    tiles : int
        Sum of `kv_tiles`, light ones counted for as much as they take.
    mean : int
        A slot's mean work, times `slots`.

    Returns
    -------
    split : Split or None
    finish : float
        When it ends; infinite without one.
    """
    longest, cost = kv_tiles.item(order.item(0)), ITEM_COST + SPLIT_COST
    long_items = int(np.count_nonzero(kv_tiles >= int32(-(-NEARLY_EQUAL * longest // 100))))
    first = (long_items * num_kv_heads - 1) // slots * slots // num_kv_heads
    pieces = (long_items - first) * num_kv_heads
    free, whole = slots - pieces, kv_tiles.item(order.item(first))
    if free <= 0:
        return None, math.inf
    # A slot that is left over takes so many rests, one after the other, while the others work on
    # the long pieces: they end together where rests * (whole - piece + cost) = piece + cost.
    rests = -(-pieces // free)
    piece = -(-(rests * (whole + cost) - cost) // (rests + 1))
    others = len(kv_tiles) - long_items
    if others:
        # The shorter items go to those slots too: no wave is shorter than one of them, nor than all
        # that is left to be done divided by the slots.
        shorter = tiles - int(np.add.reduce(kv_tiles[order[:long_items]], dtype=np.int64))
        work = (shorter + ITEM_COST * others) * num_kv_heads
        level = -(-(pieces * (whole + 2 * cost) + work) // slots) - cost
        piece = max(piece, level, kv_tiles.item(order.item(long_items)))
    saved = whole + ITEM_COST - (piece + cost)
    if piece >= whole or 100 * slots * saved < WORTH * mean:
        return None, math.inf
    waves = first * num_kv_heads // slots
    return Split(piece, first), waves * (longest + ITEM_COST) + piece + cost


def _split_finish(
    chunk: int, wholes: int, rests: int, tiles: int, num_kv_heads: int, slots: int
) -> float:
    """When items cut into `wholes` pieces of `chunk` KV tiles and `rests` shorter ones end."""
    overhead = ITEM_COST + SPLIT_COST
    mean = (tiles + (wholes + rests) * overhead) * num_kv_heads / slots
    # Whole pieces come first, in waves; rests fill the last wave up, and then begin another.
    waves = -(-wholes * num_kv_heads // slots)
    finish: float = waves * (chunk + overhead)
    if rests * num_kv_heads > waves * slots - wholes * num_kv_heads:
        finish += (tiles - wholes * chunk) / rests + overhead
    return max(mean, finish)


def most_partials(slots: int, num_kv_heads: int) -> int:
    """Partial-state slots that the splits of `choose_split` take, but for rare batches.

    A piece is at least the lowest candidate's share of a slot's mean work, and an item is cut into
    two pieces at least: so there are at most twice as many pieces as go into all the work. Where
    all items are shorter than that share, pieces may be too, and there may be more.
    """
    return -(-200 * slots // (CANDIDATES[0] * num_kv_heads)) + 1
