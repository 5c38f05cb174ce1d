"""Which keys a query tile sees under a window and a mask: KV tiles hidden whole are no work.

What a plan has left of a query tile's keys are runs of KV tiles: one under a window, several where
a mask has holes. Its KV tiles begin at multiples of cta_tile_kv, counted from key 0, or where the
caller fixed the splits from the begin of the split that they are in.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged.item_table import (
    KV_BEGIN,
    KV_END,
    KV_LEN,
    QO_LEN,
    REQUEST,
    ROW_BEGIN,
    IntArray,
    int32,
)
from cupaged.spec import AttentionSpec

BoolArray = npt.NDArray[np.bool_]

#: Bits of a mask that are looked at together, so that they take little memory.
_BLOCK = 1 << 24


class CustomMask(NamedTuple):
    """Which keys a query row sees beside what causality and a window let it see.

    Attributes
    ----------
    bits : uint8 [bytes]
        On the host. Request r's are `bits[indptr[r]:indptr[r + 1]]`: little-endian bits, flattened
        `[qo_len, kv_len]`; what is left of its last byte means nothing.
    indptr : int32 [batch + 1]
    """

    bits: npt.NDArray[np.uint8]
    indptr: IntArray


def seen(
    spec: AttentionSpec, mask: CustomMask, request: int, qo_len: int, kv_len: int
) -> Iterator[BoolArray]:
    """Which keys a request's rows see, by the mask, causality and the window together.

    Yields
    ------
    bool [some rows, kv_len]
        Block after block, all rows in order; nothing where the request has no key.
    """
    if not kv_len:
        return
    packed = mask.bits[mask.indptr[request] : mask.indptr[request + 1]]
    step = max(_BLOCK // kv_len, 1)
    key = np.arange(kv_len, dtype=np.int32)
    for begin in range(0, qo_len, step):
        end = min(begin + step, qo_len)
        first_byte, skip = divmod(begin * kv_len, 8)
        unpacked = np.unpackbits(
            packed[first_byte : -(-end * kv_len // 8)],
            count=skip + (end - begin) * kv_len,
            bitorder="little",
        )
        block = unpacked[skip:].view(np.bool_).reshape(end - begin, kv_len)
        # The key of each row's own position.
        own = np.arange(begin, end, dtype=np.int32)[:, None] + np.int32(kv_len - qo_len)
        if spec.causal:
            block &= key <= own
        if spec.window_left >= 0:
            block &= key >= own - np.int32(spec.window_left)
        yield block


def narrow(tiles: IntArray, spec: AttentionSpec, cta_tile_kv: int, split_size: int | None) -> None:
    """Let query tiles begin with the KV tile of the first key that the window shows.

    Parameters
    ----------
    tiles : int32 [tiles, fields of ITEM_DTYPE]
        Written: KV_BEGIN. Further down, rows see later keys, and a tile's keys up to KV_END follow.
    spec : AttentionSpec
        Has a window.
    cta_tile_kv : int
    split_size : int, optional
        Keys of a split, where the caller fixed it.
    """
    first_key = tiles[:, ROW_BEGIN] // int32(spec.gqa_group_size)
    first_key += tiles[:, KV_LEN]
    first_key -= tiles[:, QO_LEN]
    first_key -= int32(spec.window_left)
    np.maximum(first_key, int32(0), out=first_key)
    past = first_key
    if split_size is not None and split_size % cta_tile_kv:
        past = first_key % int32(split_size)
    first_key -= past % int32(cta_tile_kv)
    tiles[:, KV_BEGIN] = first_key


def runs(
    tiles: IntArray,
    spec: AttentionSpec,
    mask: CustomMask,
    tile: tuple[int, int],
    split_size: int | None,
    one_each: bool,
) -> IntArray:
    """The runs of KV tiles in which each query tile sees a key.

    Parameters
    ----------
    tiles : int32 [tiles, fields of ITEM_DTYPE]
        Query tiles, request after request.
    spec : AttentionSpec
    mask : CustomMask
    tile : tuple of int
        cta_tile_q and cta_tile_kv.
    split_size : int, optional
        Keys of a split, where the caller fixed it.
    one_each : bool
        One run for each query tile, from the first to the last KV tile that it sees.

    Returns
    -------
    int32 [runs, fields of ITEM_DTYPE]
        Each run as an item of its own, those of a query tile in order, one after the other; an
        empty one for a query tile that sees no key.
    """
    cta_tile_q, cta_tile_kv = tile
    request = tiles[:, REQUEST]
    edges = [0, *(np.flatnonzero(request[1:] != request[:-1]) + 1).tolist(), len(tiles)]
    kept: list[npt.NDArray[np.intp]] = []
    begins: list[IntArray] = []
    ends: list[IntArray] = []
    for first, end in pairwise(edges):
        of_request = tiles[first:end]
        qo_len, kv_len = int(of_request[0, QO_LEN]), int(of_request[0, KV_LEN])
        starts = _tile_begins(kv_len, cta_tile_kv, split_size)
        blocks = seen(spec, mask, int(of_request[0, REQUEST]), qo_len, kv_len)
        # By row, and then by query tile: whose rows are neighbours, and may be those of the next
        # tile too.
        before = np.zeros((qo_len + 1, len(starts)), np.int32)
        row = 1
        for block in blocks:
            by_row = before[row : row + len(block)]
            by_row[:] = np.logical_or.reduceat(block, starts, axis=1)
            row += len(block)
        np.add.accumulate(before, axis=0, out=before)
        group, row_begin = spec.gqa_group_size, of_request[:, ROW_BEGIN]
        row_end = np.minimum(row_begin + int32(cta_tile_q), int32(qo_len * group))
        sees = before[-(-row_end // group)] > before[row_begin // group]
        where, from_tile, to_tile = _runs_of_ones(sees, one_each)
        kept.append(where + first)
        begins.append(starts[from_tile])
        ends.append(np.append(starts, np.int32(kv_len))[to_tile])
    index = np.concatenate(kept)
    found = tiles[index]
    found[:, KV_BEGIN] = np.concatenate(begins)
    np.minimum(np.concatenate(ends), found[:, KV_END], out=found[:, KV_END])
    # Empty ones, where nothing was found.
    blind = np.ones(len(tiles), np.bool_)
    blind[index] = False
    if blind.any():
        empty = tiles[blind]
        empty[:, [KV_BEGIN, KV_END]] = 0
        order = np.concatenate((index, np.flatnonzero(blind))).argsort(kind="stable")
        found = np.concatenate((found, empty))[order]
    return found


def _tile_begins(kv_len: int, cta_tile_kv: int, split_size: int | None) -> IntArray:
    """Where a request's KV tiles begin."""
    if split_size is None or split_size % cta_tile_kv == 0 or split_size >= kv_len:
        return np.arange(0, kv_len, cta_tile_kv, dtype=np.int32)
    splits = np.arange(0, kv_len, split_size, dtype=np.int32)
    in_split = np.arange(0, split_size, cta_tile_kv, dtype=np.int32)
    begins: IntArray = np.add.outer(splits, in_split).reshape(-1)
    return begins[begins < kv_len]


def _runs_of_ones(
    sees: BoolArray, one_each: bool
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Each run of true elements in a row of `sees`: its row, its first element, and past its last.

    With `one_each`, a row's runs are one, with the holes between them.
    """
    edges = np.zeros((len(sees), sees.shape[1] + 2), np.bool_)
    edges[:, 1:-1] = sees
    where, begin = (edges[:, 1:] > edges[:, :-1]).nonzero()
    _, end = (edges[:, 1:] < edges[:, :-1]).nonzero()
    if one_each:
        first, last = np.diff(where, prepend=-1) != 0, np.diff(where, append=-1) != 0
        return where[first], begin[first], end[last]
    return where, begin, end
