"""What a paged cache knows of its requests: who they are, how long, and which pages they have."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

from cupaged import page_tables, validate_cache
from cupaged.page_pool import IntArray, Request
from cupaged.page_tables import PlanArgs


class RequestBook:
    """The requests of a cache, and what `plan()` has to know of them.

    Parameters
    ----------
    page_size : int
        Tokens of a page.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._requests: dict[Hashable, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: object) -> bool:
        return request in self._requests

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._requests)

    @property
    def requests(self) -> list[Hashable]:
        """The requests that are in the cache, in the order in which they came."""
        return list(self._requests)

    def length(self, request: Hashable) -> int:
        """Tokens of a request.

        Parameters
        ----------
        request : hashable

        Returns
        -------
        int

        Raises
        ------
        TypeError, ValueError
            A request that is not in the cache.
        """
        return self._find_one(request).length

    def lengths(self, requests: Iterable[Hashable]) -> IntArray:
        """Tokens of each request.

        Parameters
        ----------
        requests : iterable of hashable

        Returns
        -------
        int32 [batch]

        Raises
        ------
        TypeError, ValueError
            A request that is not in the cache.
        """
        return page_tables.lengths(self._find(requests))

    def qo_indptr(self, requests: Iterable[Hashable]) -> IntArray:
        """Where the new tokens of each request begin among them all.

        Parameters
        ----------
        requests : iterable of hashable

        Returns
        -------
        int32 [batch + 1]
            New are those of the last step: the rows that `append()` takes, and q's.

        Raises
        ------
        TypeError, ValueError
            A request that is not in the cache.
        """
        return page_tables.indptr(page_tables.new_lengths(self._find(requests)))

    def positions(self, requests: Iterable[Hashable]) -> IntArray:
        """The position of every new token in its request: for RoPE.

        Parameters
        ----------
        requests : iterable of hashable

        Returns
        -------
        int32 [nnz]

        Raises
        ------
        TypeError, ValueError
            A request that is not in the cache.
        """
        return page_tables.positions(self._find(requests))

    def plan_args(self, requests: Iterable[Hashable]) -> PlanArgs:
        """Page table of requests, as `plan()` takes it.

        `decode.plan(*cache.plan_args(requests), ...)`, or
        `prefill.plan(cache.qo_indptr(requests), *cache.plan_args(requests), ...)`.

        Parameters
        ----------
        requests : iterable of hashable

        Returns
        -------
        PlanArgs
            `(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)`, copies.

        Raises
        ------
        TypeError, ValueError
            A request that is not in the cache.
        """
        return page_tables.plan_args(self._find(requests), self.page_size)

    def block_table(self, requests: Iterable[Hashable], fill: int = 0) -> IntArray:
        """Page table of requests, a row each.

        Parameters
        ----------
        requests : iterable of hashable
        fill : int
            What stands behind a request's pages. By default a page that exists, since some
            kernels fetch it without using it.

        Returns
        -------
        int32 [batch, pages of the longest]

        Raises
        ------
        TypeError, ValueError
            A request that is not in the cache; `fill` is no int32.
        """
        return page_tables.block_table(self._find(requests), validate_cache.fill(fill))

    def _find_one(self, request: Hashable) -> Request:
        try:
            return self._requests[request]
        except KeyError:
            raise ValueError(f"request {request!r} is not in the cache") from None
        except TypeError:
            raise validate_cache.unhashable(request, "request") from None

    def _find(self, requests: Iterable[Hashable]) -> list[Request]:
        ids, known = validate_cache.ids(requests), self._requests
        try:
            return [known[request] for request in ids]
        except (KeyError, TypeError):
            return [self._find_one(request) for request in ids]  # which says what is wrong

    def _check_new(self, request: Hashable, name: str) -> None:
        try:
            known = request in self._requests
        except TypeError:
            raise validate_cache.unhashable(request, name) from None
        if known:
            raise ValueError(f"{name} = {request!r} is in the cache, expected an id that is not")
