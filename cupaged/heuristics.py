"""Choices the planner makes, each with its reason: tiles, splits, kernel configurations.

Pure functions of the lengths and of the machine's size; no arrays on any GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from cupaged.spec import DeviceModel, KernelConfig

Shape = Literal["long", "short"]
SHAPES: tuple[Shape, ...] = ("long", "short")
IntArray = npt.NDArray[np.int32]

#: Compute capability → class of tiles: "sm90" and "large" have 227 KiB of shared memory a block,
#: "medium" 163, "small" 99 (CUDA C++ Programming Guide, "Technical Specifications per Compute
#: Capability"); "sm90" is the one whose tiles were measured.
_SHARED_CLASS = {
    80: "medium", 86: "small", 87: "medium", 89: "small",
    90: "sm90", 100: "large", 103: "large", 110: "large", 120: "small", 121: "small",
}  # fmt: skip

#: The most dynamic shared memory a block of each class may ask for, in bytes.
SHARED_LIMIT = {"sm90": 227 * 1024, "large": 227 * 1024, "medium": 163 * 1024, "small": 99 * 1024}


@dataclass(frozen=True, slots=True)
class _Tile:
    cta_tile_q: int
    cta_tile_kv: int
    warps_q: int
    warps_kv: int
    num_stages: int
    ctas_per_sm: int


# "long": rows are divided over the warps. At head_dim 64 and 128 each warp takes 32 rows, so that
# every fragment of K and V read from shared memory feeds two matrix products; with 16 rows the
# reads, 128 bytes a clock, would bound the kernel. At 256 the output of 32 rows does not fit the
# registers, so eight warps take 16 each. Two blocks an SM cover each other's softmax and barriers.
# 64 keys at head_dim 128 take all 255 registers, so that is only where it was seen to fit and pay.
# "short": 16 rows, the keys divided over the warps: decoding and very short queries are bound by
# the reading of K and V, so the tile is as short as the matrix unit allows and the stages deep.
_TILES: dict[tuple[str, int, Shape], _Tile] = {
    ("sm90", 64, "long"): _Tile(128, 64, 4, 1, 2, 2),
    ("sm90", 128, "long"): _Tile(128, 64, 4, 1, 2, 2),
    ("sm90", 256, "long"): _Tile(128, 32, 8, 1, 2, 1),
    ("sm90", 64, "short"): _Tile(16, 64, 1, 4, 4, 3),
    ("sm90", 128, "short"): _Tile(16, 64, 1, 4, 3, 2),
    ("sm90", 256, "short"): _Tile(16, 64, 1, 4, 3, 1),
    ("large", 64, "long"): _Tile(128, 64, 4, 1, 2, 2),
    ("large", 128, "long"): _Tile(128, 32, 4, 1, 3, 2),
    ("large", 256, "long"): _Tile(128, 32, 8, 1, 2, 1),
    ("large", 64, "short"): _Tile(16, 64, 1, 4, 4, 3),
    ("large", 128, "short"): _Tile(16, 64, 1, 4, 3, 2),
    ("large", 256, "short"): _Tile(16, 64, 1, 4, 3, 1),
    ("medium", 64, "long"): _Tile(128, 64, 4, 1, 2, 2),
    ("medium", 128, "long"): _Tile(128, 32, 4, 1, 2, 2),
    ("medium", 256, "long"): _Tile(128, 32, 8, 1, 2, 1),
    ("medium", 64, "short"): _Tile(16, 64, 1, 4, 3, 3),
    ("medium", 128, "short"): _Tile(16, 64, 1, 4, 2, 2),
    ("medium", 256, "short"): _Tile(16, 64, 1, 4, 2, 1),
    ("small", 64, "long"): _Tile(128, 64, 4, 1, 2, 2),
    ("small", 128, "long"): _Tile(128, 32, 4, 1, 3, 1),
    ("small", 256, "long"): _Tile(64, 32, 4, 1, 2, 1),
    ("small", 64, "short"): _Tile(16, 64, 1, 4, 2, 2),
    ("small", 128, "short"): _Tile(16, 64, 1, 4, 2, 1),
    ("small", 256, "short"): _Tile(16, 32, 1, 2, 2, 1),
}

# Where a warp's keys lie in several pages, looking up every row takes the registers that 64 keys
# would need.
_TILES_FOR_SMALL_PAGES: dict[tuple[str, int, Shape], _Tile] = {
    ("sm90", 128, "long"): _Tile(128, 32, 4, 1, 3, 2),
}

#: A request of at most this many packed rows takes the "short" shape. Above it, the second and
#: third 16-row tile read K and V again, and the long shape's spare rows are the lesser waste.
SHORT_MAX_ROWS = 32

#: Page sizes that between them ask for every configuration there is.
TYPICAL_PAGE_SIZES = (16, 8, 1)

#: Short requests ride along in long tiles where that adds at most this share to the work: a tile
#: of their own would be a launch of its own.
_RIDE_ALONG = 0.1
_RIDE_ALONG_FEW_WAVES = 0.5
_FEW_WAVES = 4
_LONG_ROWS = 128

#: Costs in units of one KV tile's time. An item pays ITEM_COST for its first loads, its last
#: stores and the softmax's final step; a split pays SPLIT_COST more to store and merge.
ITEM_COST = 2
SPLIT_COST = 2

#: A split of fewer KV tiles than this isn't worth its item and merge cost.
_MIN_TILES_PER_SPLIT = 4

#: Candidate splits, in shares of a slot's mean work: one or two waves of thread blocks, with slack
#: for chunks that don't divide the tiles evenly.
_CANDIDATES = (0.55, 0.75, 1.0, 1.15)


def tile_class(arch: int) -> str:
    """Class of shared memory of compute capability `arch` (major * 10 + minor).

    A capability newer than the table gets the smallest class, which fits everywhere.
    """
    return _SHARED_CLASS.get(arch, "small")


@cache
def kernel_config(
    arch: int, dtype: str, head_dim: int, page_size: int, shape: Shape
) -> KernelConfig:
    """The kernel that serves a shape of query tile on compute capability `arch`."""
    key = (tile_class(arch), head_dim, shape)
    config = _config(dtype, head_dim, _TILES[key], page_size)
    if not config.page_aligned and key in _TILES_FOR_SMALL_PAGES:
        return _config(dtype, head_dim, _TILES_FOR_SMALL_PAGES[key], page_size)
    return config


def _config(dtype: str, head_dim: int, tile: _Tile, page_size: int) -> KernelConfig:
    config = KernelConfig(
        family="prefill_sm80",
        dtype=dtype,
        head_dim=head_dim,
        cta_tile_q=tile.cta_tile_q,
        cta_tile_kv=tile.cta_tile_kv,
        warps_q=tile.warps_q,
        warps_kv=tile.warps_kv,
        num_stages=tile.num_stages,
        ctas_per_sm=tile.ctas_per_sm,
        page_aligned=True,
    )
    return config if page_size % config.rows_per_warp == 0 else replace(config, page_aligned=False)


def choose_shapes(
    packed_len: IntArray,
    kv_len: IntArray,
    fewest: int,
    most: int,
    num_kv_heads: int,
    slots: int,
    by_request: bool,
) -> dict[Shape, IntArray | None]:
    """Which requests take which shape of query tile.

    Parameters
    ----------
    packed_len, kv_len : int32 [batch]
        Packed query rows and keys of each request; some request has a row.
    fewest, most : int
        The extremes of `packed_len`.
    num_kv_heads : int
    slots : int
        Thread blocks of the long shape that run at once.
    by_request : bool
        Decide each request by its own length alone, so that its bits don't depend on the batch.

    Returns
    -------
    dict
        Shape → indices of requests, in order; None for all of them. Only shapes that occur.
    """
    if most <= SHORT_MAX_ROWS:
        return {"short": None}
    if fewest > SHORT_MAX_ROWS:
        return {"long": None}
    short = (packed_len <= SHORT_MAX_ROWS) & (packed_len > 0)
    if not by_request and _ride_along(packed_len, kv_len, short, num_kv_heads, slots):
        return {"long": None}
    if not np.logical_or.reduce(short):
        return {"long": None}
    return {
        "long": np.flatnonzero(packed_len > SHORT_MAX_ROWS).astype(np.int32),
        "short": np.flatnonzero(short).astype(np.int32),
    }


def _ride_along(
    packed_len: IntArray,
    kv_len: IntArray,
    short: npt.NDArray[np.bool_],
    num_kv_heads: int,
    slots: int,
) -> bool:
    """Whether the short requests had better take long tiles too.

    A shape of their own would be a launch of its own, with its own ragged end. They ride along
    where they add little to the work, as the keys that tiles read tell it; and in a batch of few
    waves, which such an end costs more, also where they add more, if none is the longest of all.
    """
    keys = kv_len.astype(np.float64)  # in which NumPy's dot product is fastest, and can't overflow
    short_work = float(keys.dot(short))
    long_work = float(keys.dot(packed_len * ~short)) / _LONG_ROWS
    if short_work <= _RIDE_ALONG * long_work:
        return True
    rows = int(np.add.reduce(packed_len, dtype=np.int64))
    tiles = rows // _LONG_ROWS + len(packed_len)  # at most
    if tiles * num_kv_heads > _FEW_WAVES * slots or short_work > _RIDE_ALONG_FEW_WAVES * long_work:
        return False
    return bool(float(np.maximum.reduce(keys * short)) <= float(np.maximum.reduce(keys * ~short)))


def choose_split(kv_tiles: IntArray, num_kv_heads: int, slots: int) -> int | None:
    """KV tiles of a split, or None where no split pays.

    The finish time of a longest-first schedule is estimated by its lower bounds: the mean work
    of a slot, the longest item, and whole waves of equal items (Graham 1969, "Bounds on
    multiprocessing timing anomalies"). Splitting is tried where the unsplit bound lies more than
    a tenth above the mean.

    Parameters
    ----------
    kv_tiles : int32 [items]
        KV tiles of each unsplit item, longest first, the same for every KV head.
    num_kv_heads : int
    slots : int
        Thread blocks that run at once.
    """
    longest = int(kv_tiles[0])
    if longest < 2 * _MIN_TILES_PER_SPLIT:
        return None
    tiles = int(np.add.reduce(kv_tiles, dtype=np.int64))
    num_items = len(kv_tiles) * num_kv_heads
    mean = (tiles * num_kv_heads + ITEM_COST * num_items) / slots
    if longest + ITEM_COST <= 0.1 * mean:
        return None  # not even one more of the longest would cost a tenth
    unsplit = max(mean, longest + ITEM_COST)
    if num_items > slots:
        # A wave's first piece waits for one at least as long in every wave before it.
        firsts = kv_tiles[np.arange(0, num_items, slots) // num_kv_heads] + ITEM_COST
        unsplit = max(unsplit, int(np.maximum.reduce(firsts * np.arange(1, len(firsts) + 1))))
    # No split can end before its pieces' mean, and there are no fewer pieces than items.
    least = (tiles * num_kv_heads + (ITEM_COST + SPLIT_COST) * num_items) / slots
    if unsplit <= max(1.1 * mean, least):
        return None
    share = tiles * num_kv_heads / slots
    lowest, highest = _MIN_TILES_PER_SPLIT, longest - 1
    chunks = sorted({min(max(math.ceil(c * share), lowest), highest) for c in _CANDIDATES})
    sizes = np.array(chunks, np.int32)[:, None]  # [candidates, 1]
    wholes = (kv_tiles // sizes).sum(axis=1).tolist()
    pieces = ((kv_tiles + (sizes - 1)) // sizes).sum(axis=1).tolist()
    finish = [
        _split_finish(chunk, whole, piece - whole, tiles, num_kv_heads, slots)
        for chunk, whole, piece in zip(chunks, wholes, pieces, strict=True)
    ]
    best = min(finish)
    return chunks[finish.index(best)] if best < unsplit else None


def _split_finish(
    chunk: int, wholes: int, rests: int, tiles: int, num_kv_heads: int, slots: int
) -> float:
    """When items cut into `wholes` pieces of `chunk` KV tiles and `rests` shorter ones end."""
    overhead = ITEM_COST + SPLIT_COST
    mean = (tiles + (wholes + rests) * overhead) * num_kv_heads / slots
    # Whole pieces come first, in waves; rests fill the last wave up, and then begin another.
    waves = math.ceil(wholes * num_kv_heads / slots)
    finish: float = waves * (chunk + overhead)
    if rests * num_kv_heads > waves * slots - wholes * num_kv_heads:
        finish += (tiles - wholes * chunk) / rests + overhead
    return max(mean, finish)


def slots(config: KernelConfig, device: DeviceModel) -> int:
    """Thread blocks of a kernel that run at once on a device: its persistent grid."""
    return config.ctas_per_sm * device.num_sms
