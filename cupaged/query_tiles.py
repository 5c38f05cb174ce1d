"""Requests cut into query tiles: columns while they are sorted, items once their order is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged.item_table import (
    KV_END,
    KV_LEN,
    PAGE_BEGIN,
    QO_BEGIN,
    QO_LEN,
    REQUEST,
    ROW_BEGIN,
    IntArray,
    ceil_div,
    counting,
    int32,
    unsplit_items,
)
from cupaged.kernel_spec import KernelConfig
from cupaged.spec import AttentionSpec

if TYPE_CHECKING:
    from cupaged.schedule import Lengths

Indices = npt.NDArray[np.intp]


class QueryTiles(NamedTuple):
    """Query tiles, request after request.

    Of the twelve fields of an item, the tiles of a request share all but two: whole items are
    made once only, when their order is known.

    Attributes
    ----------
    requests : int32 [requests, fields of ITEM_DTYPE]
        What each request's tiles share. To its ROW_BEGIN a tile adds `cta_tile_q` times its number
        among all tiles.
    request : intp [tiles], optional
        Each tile's row of `requests`; None where each request is one tile.
    kv_end, kv_tiles : int32 [tiles]
        The keys that a tile sees, from key 0, and the KV tiles that hold them.
    cta_tile_q : int
    """

    requests: IntArray
    request: Indices | None
    kv_end: IntArray
    kv_tiles: IntArray
    cta_tile_q: int

    @property
    def qo_len(self) -> IntArray:
        """Queries of each tile's request."""
        qo_len = self.requests[:, QO_LEN]
        return qo_len if self.request is None else qo_len[self.request]

    def items(self, order: Indices) -> IntArray:
        """The tiles in that order, each as one unsplit item: int32 [tiles, fields of an item]."""
        if self.request is None:
            return self.requests.take(order, axis=0)
        items = self.requests.take(self.request[order], axis=0)
        row_begin = items[:, ROW_BEGIN]
        row_begin += order.astype(np.int32) * int32(self.cta_tile_q)
        items[:, KV_END] = self.kv_end[order]
        return items


def query_tiles(
    spec: AttentionSpec,
    config: KernelConfig,
    lengths: Lengths,
    chosen: Indices | None,
    one_each: bool,
) -> QueryTiles:
    """The query tiles of the chosen requests, of all where None.

    `one_each` says that each has one tile.
    """
    qo_begin, page_begin, qo_len, kv_len = lengths
    if chosen is None:
        requests = unsplit_items(len(qo_len))
        qo_begin, page_begin = qo_begin[:-1], page_begin[:-1]
    else:
        requests = unsplit_items(len(chosen))
        requests[:, REQUEST] = chosen
        qo_begin, page_begin = qo_begin[chosen], page_begin[chosen]
        qo_len, kv_len = qo_len[chosen], kv_len[chosen]
    # Each as the last of its tiles, which sees all of its keys.
    requests[:, KV_END] = kv_len
    requests[:, QO_BEGIN] = qo_begin
    requests[:, QO_LEN] = qo_len
    requests[:, KV_LEN] = kv_len
    requests[:, PAGE_BEGIN] = page_begin
    request, kv_end, cta_tile_q = None, kv_len, config.cta_tile_q
    if not one_each:
        group = spec.gqa_group_size
        counts = ceil_div(qo_len * int32(group), cta_tile_q)
        ends = np.add.accumulate(counts, dtype=np.int32)
        # A tile's place in its request: its number among all tiles, less where its request began.
        places = counts - ends
        np.multiply(places, int32(cta_tile_q), out=requests[:, ROW_BEGIN])
        request = np.arange(len(counts)).repeat(counts)
        kv_end = kv_len[request]
        if spec.causal:
            seen = _keys_seen(kv_len - qo_len, places, request, group, cta_tile_q)
            # The last tile of a request has room for more rows than there are.
            np.minimum(seen, kv_end, out=kv_end)
            np.maximum(kv_end, int32(0), out=kv_end)
    return QueryTiles(requests, request, kv_end, ceil_div(kv_end, config.cta_tile_kv), cta_tile_q)


def _keys_seen(
    before: IntArray, places: IntArray, request: Indices, group: int, cta_tile_q: int
) -> IntArray:
    """The keys up to that of each tile's last row under causality; negative where there are none.

    Parameters
    ----------
    before : int32 [requests]
        Keys before the one of each request's first query.
    places : int32 [requests]
        A tile's place in its request, less its number among all tiles.
    request : intp [tiles]
    group, cta_tile_q : int
        Packed rows of a query, and of a tile.
    """
    number = counting(len(request))
    queries, rest = divmod(cta_tile_q, group)
    if rest == 0:
        # Each tile holds whole queries, and sees so many keys more than the one before it.
        seen = (before + (places * int32(queries) + int32(queries)))[request]
        seen += number * int32(queries)
        return seen
    last_row = (places * int32(cta_tile_q) + int32(cta_tile_q - 1))[request]
    last_row += number * int32(cta_tile_q)
    last_row //= int32(group)
    last_row += (before + int32(1))[request]
    return last_row
