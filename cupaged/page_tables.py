"""Index arrays of requests in a paged cache, as `plan()` and appending take them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from cupaged.page_pool import EVERY_LAYER, IntArray, Request


class PlanArgs(NamedTuple):
    """What `plan()` takes of a cache, in its order; int32, on the host.

    Attributes
    ----------
    paged_kv_indptr : int32 [batch + 1]
    paged_kv_indices : int32 [paged_kv_indptr[-1]]
    paged_kv_last_page_len : int32 [batch]
        0 for a request without tokens.
    """

    paged_kv_indptr: IntArray
    paged_kv_indices: IntArray
    paged_kv_last_page_len: IntArray


def lengths(requests: Sequence[Request]) -> IntArray:
    """Tokens of each request, [batch]."""
    return np.fromiter([request.length for request in requests], np.int32, len(requests))


def new_lengths(requests: Sequence[Request]) -> IntArray:
    """New tokens of each request, [batch]."""
    return np.fromiter([request.new for request in requests], np.int32, len(requests))


def indptr(counts: IntArray) -> IntArray:
    """Where each request's part begins, and the end, [batch + 1]."""
    begins = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=begins[1:])
    return begins


def positions(requests: Sequence[Request]) -> IntArray:
    """The position of every new token in its request, [nnz]."""
    new = new_lengths(requests)
    begins = indptr(new)
    # A request's first new token is at its length less their number.
    shift = lengths(requests) - begins[1:]
    places: IntArray = np.arange(begins[-1], dtype=np.int32) + shift.repeat(new)
    return places


def batch_indices(requests: Sequence[Request]) -> IntArray:
    """The place in `requests` of every new token's request, [nnz]."""
    return np.arange(len(requests), dtype=np.int32).repeat(new_lengths(requests))


def plan_args(requests: Sequence[Request], page_size: int) -> PlanArgs:
    """Pages of the requests, one request's behind the other's."""
    tokens = lengths(requests)
    pages = -(-tokens // page_size)
    indices = [request.pages for request in requests]
    return PlanArgs(
        indptr(pages),
        np.concatenate(indices) if indices else np.empty(0, np.int32),
        tokens - np.maximum(pages - 1, 0) * page_size,
    )


def block_table(requests: Sequence[Request], fill: int) -> IntArray:
    """Pages of the requests, a row each, [batch, pages of the longest]."""
    width = max((len(request.pages) for request in requests), default=0)
    table = np.full((len(requests), width), fill, np.int32)
    for row, request in zip(table, requests, strict=True):
        row[: len(request.pages)] = request.pages
    return table


class Step:
    """The new tokens of requests while they are being appended, layer after layer.

    Parameters
    ----------
    ids : tuple of hashable
    requests : list of Request
        None of them twice.
    page_size : int

    Attributes
    ----------
    rows : int
        New tokens in all.
    batch_indices, positions : int32 [rows]
    plan_args : PlanArgs
    """

    def __init__(self, ids: tuple[Hashable, ...], requests: list[Request], page_size: int) -> None:
        self.ids, self.hash = ids, hash(ids)
        self.requests = requests
        self.batch_indices = batch_indices(requests)
        self.positions = positions(requests)
        self.plan_args = plan_args(requests, page_size)
        self.rows = len(self.positions)
        self._before = 0  # layers at which some of the requests were written before this step
        for request in requests:
            self._before |= request.written
        self._written = 0

    def is_written(self, layer: int) -> bool:
        """Whether the new tokens of a request are written at a layer, or it has none."""
        return bool((self._before | self._written) >> layer & 1)

    def first_written(self, layer: int) -> Request:
        """The request of which that is so."""
        return next(
            request for request in self.requests if (request.written | self._written) >> layer & 1
        )

    def write(self, layer: int) -> None:
        """Remember that the new tokens of all the requests are written at a layer."""
        self._written |= 1 << layer

    def end(self, num_layers: int) -> None:
        """Tell the requests what was written."""
        every = (1 << num_layers) - 1
        for request in self.requests:
            request.written |= self._written
            if request.written == every:
                request.written = EVERY_LAYER
