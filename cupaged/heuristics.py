"""Choices the planner makes, each with its reason: tiles, splits, kernel configurations.

Pure functions of the lengths and of the machine's size; no arrays on any GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from cupaged.spec import ROWS_PER_PAGE_LOOKUP, DeviceModel, KernelConfig

Shape = Literal["long", "short"]
SHAPES: tuple[Shape, ...] = ("long", "short")
IntArray = npt.NDArray[np.int64]

#: Compute capability → class of shared memory: "large" has 227 KiB a block, "medium" 163, "small"
#: 99 (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
_SHARED_CLASS = {
    80: "medium", 86: "small", 87: "medium", 89: "small",
    90: "large", 100: "large", 103: "large", 110: "large", 120: "small", 121: "small",
}  # fmt: skip

#: The most dynamic shared memory a block of each class may ask for, in bytes.
SHARED_LIMIT = {"large": 227 * 1024, "medium": 163 * 1024, "small": 99 * 1024}


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
# "short": 16 rows, the keys divided over the warps: decoding and very short queries are bound by
# the reading of K and V, so the tile is as short as the matrix unit allows and the stages deep.
_TILES: dict[tuple[str, int, Shape], _Tile] = {
    ("large", 64, "long"): _Tile(128, 64, 4, 1, 2, 2),
    ("large", 128, "long"): _Tile(128, 64, 4, 1, 2, 2),
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
    ("small", 128, "long"): _Tile(128, 64, 4, 1, 2, 1),
    ("small", 256, "long"): _Tile(64, 32, 4, 1, 2, 1),
    ("small", 64, "short"): _Tile(16, 64, 1, 4, 2, 2),
    ("small", 128, "short"): _Tile(16, 64, 1, 4, 2, 1),
    ("small", 256, "short"): _Tile(16, 32, 1, 2, 2, 1),
}

#: A request of at most this many packed rows takes the "short" shape. Above it, the second and
#: third 16-row tile read K and V again, and the long shape's spare rows are the lesser waste.
SHORT_MAX_ROWS = 32

#: Costs in units of one KV tile's time. An item pays _ITEM_COST for its first loads, its last
#: stores and the softmax's final step; a split pays _SPLIT_COST more to store and merge.
_ITEM_COST = 2
_SPLIT_COST = 2

#: A split of fewer KV tiles than this isn't worth its item and merge cost.
_MIN_TILES_PER_SPLIT = 4

#: Waves of thread blocks that a candidate split aims to fill, and the slack it leaves for chunks
#: that don't divide the tiles evenly.
_WAVES = np.array([1.0, 2.0, 3.0])
_SLACK = np.array([1.0, 1.07, 1.15, 1.3, 1.6])
_CANDIDATES = np.outer(_SLACK, 1 / _WAVES).ravel()


def shared_class(arch: int) -> str:
    """Class of shared memory of compute capability `arch` (major * 10 + minor).

    A capability newer than the table gets the smallest class, which fits everywhere.
    """
    return _SHARED_CLASS.get(arch, "small")


@lru_cache(maxsize=None)
def kernel_config(
    arch: int, dtype: str, head_dim: int, page_aligned: bool, shape: Shape
) -> KernelConfig:
    """The kernel that serves a shape of query tile on compute capability `arch`."""
    tile = _TILES[shared_class(arch), head_dim, shape]
    return KernelConfig(
        family="prefill_sm80",
        dtype=dtype,
        head_dim=head_dim,
        cta_tile_q=tile.cta_tile_q,
        cta_tile_kv=tile.cta_tile_kv,
        warps_q=tile.warps_q,
        warps_kv=tile.warps_kv,
        num_stages=tile.num_stages,
        ctas_per_sm=tile.ctas_per_sm,
        page_aligned=page_aligned,
    )


def page_aligned(page_size: int) -> bool:
    """Whether one page lookup serves a warp's whole share of a KV tile."""
    return page_size % ROWS_PER_PAGE_LOOKUP == 0


def choose_shapes(
    packed_len: IntArray, kv_len: IntArray, num_kv_heads: int, slots: int, by_request: bool
) -> npt.NDArray[np.bool_]:
    """Which requests take the "short" shape.

    Parameters
    ----------
    packed_len, kv_len : int64 [batch]
        Packed query rows and keys of each request.
    num_kv_heads : int
    slots : int
        Thread blocks of the long shape that run at once.
    by_request : bool
        Decide each request by its own length alone, so that its bits don't depend on the batch.

    Returns
    -------
    bool [batch]
    """
    short = packed_len <= SHORT_MAX_ROWS
    num_short = int(np.count_nonzero(short))
    if by_request or num_short in (0, len(short)):
        return short
    # Each shape present is a launch. Where the whole batch fits one wave of long tiles, and the
    # short requests' keys are no more than the others', they ride along for nothing.
    tiles = int(np.maximum(packed_len // 128 + 1, 1).sum()) * num_kv_heads
    if tiles <= slots and kv_len[short].max() <= 2 * kv_len[~short].max():
        return np.zeros_like(short)
    return short


def choose_split(num_tiles: IntArray, num_kv_heads: int, slots: int) -> int | None:
    """KV tiles of a split, or None where no split pays.

    The finish time of a longest-first schedule is estimated by its lower bounds: the mean work
    of a slot, the longest item, and whole waves of equal items (Graham 1969, "Bounds on
    multiprocessing timing anomalies"). Splitting is tried where the unsplit bound lies more than
    a tenth above the mean.

    Parameters
    ----------
    num_tiles : int64 [items]
        KV tiles of each unsplit item, the same for every KV head.
    num_kv_heads : int
    slots : int
        Thread blocks that run at once.
    """
    if len(num_tiles) == 0:
        return None
    longest = int(num_tiles.max())
    if longest < 2 * _MIN_TILES_PER_SPLIT:
        return None
    mean = (float(num_tiles.sum()) + _ITEM_COST * len(num_tiles)) * num_kv_heads / slots
    unsplit = max(mean, float(longest + _ITEM_COST))
    if len(num_tiles) * num_kv_heads > slots:
        # The item at each whole wave waits for one at least as long in every wave before it.
        descending = np.sort(num_tiles)[::-1][:: max(1, slots // num_kv_heads)]
        waves = (descending + _ITEM_COST) * np.arange(1, len(descending) + 1)
        unsplit = max(unsplit, float(waves.max()))
    if unsplit <= 1.1 * mean:
        return None
    total = float(num_tiles.sum()) * num_kv_heads
    chunks = np.unique(np.ceil(_CANDIDATES * (total / slots)).astype(np.int64))
    chunks = chunks[(chunks >= _MIN_TILES_PER_SPLIT) & (chunks < longest)]
    if len(chunks) == 0:
        chunks = np.array([_MIN_TILES_PER_SPLIT])
    whole = num_tiles // chunks[:, None]  # [candidates, items]
    rest = num_tiles - whole * chunks[:, None]
    full_items = whole.sum(axis=1) * num_kv_heads
    items = full_items + np.count_nonzero(rest, axis=1) * num_kv_heads
    overhead = _ITEM_COST + _SPLIT_COST
    finish = np.maximum(
        (total + items * overhead) / slots,
        np.ceil(full_items / slots) * (chunks + overhead),
    )
    best = int(finish.argmin())
    return int(chunks[best]) if finish[best] < unsplit else None


def slots(config: KernelConfig, device: DeviceModel) -> int:
    """Thread blocks of a kernel that run at once on a device: its persistent grid."""
    return config.ctas_per_sm * device.num_sms
