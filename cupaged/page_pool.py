"""Which pages belong to whom: a free list, reference counts, and each request's page numbers.

Nothing here knows an array of keys or values; what has to be copied is told to the caller.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]

#: Pages whose bits have to go to another one: (from, to), in this order.
Copies: TypeAlias = list[tuple[int, int]]

#: `Request.written` where nothing is left to be written.
EVERY_LAYER = -1

#: So many requests an error names.
NAMED = 3


class OutOfPagesError(RuntimeError):
    """A cache has too few free pages for what was asked; nothing was changed.

    Attributes
    ----------
    needed, free : int
        Pages that the call needs, and pages that no request holds.
    """

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message, needed, free)
        self.needed = needed
        self.free = free

    def __str__(self) -> str:
        return str(self.args[0])


class Request:
    """A request's tokens and pages.

    Attributes
    ----------
    id : hashable
        The caller's.
    length : int
        Tokens.
    pages : int32 [ceil(length / page_size)]
        Page numbers.
    new : int
        How many of the last tokens came with the last step: since the ones before were written.
    written : int
        Layers at which the new tokens are written, one bit each; `EVERY_LAYER` where they are at
        all, or there are none to write.
    """

    __slots__ = ("_room", "id", "length", "new", "pages", "written")

    def __init__(self, id: Hashable) -> None:
        self.id = id
        self.length = 0
        self.new = 0
        self.written = EVERY_LAYER
        self._room: IntArray = np.empty(8, np.int32)
        self.pages: IntArray = self._room[:0]

    def add_pages(self, pages: IntArray) -> None:
        """Put more pages behind the request's own."""
        held = len(self.pages)
        count = held + len(pages)
        if count > len(self._room):
            room = np.empty(max(count, 2 * held), np.int32)
            room[:held] = self.pages
            self._room = room
        self._room[held:count] = pages
        self.pages = self._room[:count]

    def drop_pages(self, count: int) -> IntArray:
        """Keep the first `count` pages; a copy of the others."""
        dropped: IntArray = self.pages[count:].copy()
        self.pages = self._room[:count]
        return dropped


class PagePool:
    """The pages of a cache, free or held by one request or several.

    Parameters
    ----------
    num_pages, page_size : int

    Attributes
    ----------
    num_free : int
        Pages that no request holds.
    references : int32 [num_pages]
        How many requests hold each page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_free = num_pages
        self.references: IntArray = np.zeros(num_pages, np.int32)
        # A stack, its top at num_free; page 0 is the first to be taken.
        self._free: IntArray = np.arange(num_pages, dtype=np.int32)[::-1].copy()

    def extend(self, requests: Sequence[Request], counts: Sequence[int], call: str) -> Copies:
        """Add tokens to requests, to all of them or to none.

        Whatever page is written next then belongs to its request alone: where one was shared and
        part-filled, the request gets another, to which its bits have to be copied.

        Parameters
        ----------
        requests : sequence of Request
            None of them twice.
        counts : sequence of int
            Tokens for each.
        call : str
            For the error.

        Raises
        ------
        OutOfPagesError
        """
        page_size, references = self.page_size, self.references
        needed = 0
        growing: list[tuple[Request, int]] = []
        shared: list[tuple[Request, int]] = []
        sharers: dict[int, int] = {}  # of the pages in `shared`, those that will still hold it
        for request, count in zip(requests, counts, strict=True):
            length, pages = request.length, request.pages
            more = (length + count - 1) // page_size + 1 - len(pages)
            if more:
                needed += more
                growing.append((request, more))
            if length % page_size and count:
                page = pages.item(-1)
                holders = sharers.get(page) or references.item(page)
                if holders > 1:
                    sharers[page] = holders - 1
                    shared.append((request, page))
        copies: Copies = []
        if needed or shared:
            needed += len(shared)
            if needed > self.num_free:
                raise self._out_of_pages(call, requests, needed)
            taken = self._take(needed)
            begin = len(shared)
            for (request, page), own in zip(shared, taken[:begin].tolist(), strict=True):
                request.pages[-1] = own
                references[page] -= 1
                copies.append((page, own))
            for request, more in growing:
                request.add_pages(taken[begin : begin + more])
                begin += more
        for request, count in zip(requests, counts, strict=True):
            request.length += count
            if request.written == EVERY_LAYER:
                request.written, request.new = 0, count
            else:
                request.new += count
        return copies

    def fork(self, request: Request, id: Hashable) -> tuple[Request, Copies]:
        """Make a request with the same tokens: full pages are shared, a part-filled one is not.

        Raises
        ------
        OutOfPagesError
        """
        full, rest = divmod(request.length, self.page_size)
        fork = Request(id)
        if rest and not self.num_free:
            raise self._out_of_pages("fork()", [fork], 1)
        fork.length = request.length
        fork.add_pages(request.pages[:full])
        self.references[fork.pages] += 1
        if not rest:
            return fork, []
        fork.add_pages(self._take(1))
        return fork, [(request.pages.item(-1), fork.pages.item(-1))]

    def truncate(self, request: Request, length: int) -> None:
        """Keep the first `length` tokens, and no page beyond them."""
        kept = -(-length // self.page_size)
        if kept < len(request.pages):
            self._release(request.drop_pages(kept))
        gone = request.length - length
        request.length = length
        if gone:
            request.new = max(0, request.new - gone)
            if not request.new:
                request.written = EVERY_LAYER

    def _take(self, count: int) -> IntArray:
        self.num_free -= count
        pages: IntArray = self._free[self.num_free : self.num_free + count][::-1].copy()
        self.references[pages] = 1
        return pages

    def _release(self, pages: IntArray) -> None:
        """Give up one reference to each; no page is there twice."""
        self.references[pages] -= 1
        unheld = pages[self.references[pages] == 0]
        self._free[self.num_free : self.num_free + len(unheld)] = unheld
        self.num_free += len(unheld)

    def _out_of_pages(self, call: str, requests: Sequence[Request], needed: int) -> OutOfPagesError:
        verb = "needs" if len(requests) == 1 else "need"
        return OutOfPagesError(
            f"{call}: {named(requests)} {verb} {counted(needed, 'page')} of {self.page_size} "
            f"tokens, free are {self.num_free} of {self.num_pages}",
            needed,
            self.num_free,
        )


def named(requests: Sequence[Request]) -> str:
    """Requests in words, the first few by their ids."""
    words = ", ".join(repr(request.id) for request in requests[:NAMED])
    others = len(requests) - NAMED
    if others > 0:
        words += f" and {others} more"
    return f"request{'s' if len(requests) > 1 else ''} {words}"


def counted(count: int, what: str) -> str:
    """A count of things in words."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
