"""`PagedKVCache` against a plain dictionary of lists: random lives of requests, on the host.

The model knows every token's bits, and every slot's. After each step the cache must say the same,
through what it gives to `plan()` and through its arrays, and no page may be lost or held twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cupaged.page_pool import OutOfPagesError
from cupaged.paged_cache import PagedKVCache

IDS = ("a", 1, ("b", 2), None, 4.5, "c")
POISON = 0x7FFF  # NaN in float16 and in bfloat16
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass
class Model:
    """A request as a list of tokens, each of them a number of its own.

    Attributes
    ----------
    tokens : list of int
    new : int
        How many came with the last step.
    layers : set of int
        Where these have been written.
    """

    tokens: list[int] = field(default_factory=list)
    new: int = 0
    layers: set[int] = field(default_factory=set)


def caches(
    form: str,
    shape: tuple[int, ...],
    layout: str,
    dtype: str,
    layers: int,
    asarray: Callable[[np.ndarray], Any] = np.asarray,
) -> Any:
    """Poisoned arrays of a caller; `shape` is [num_pages, page_size, num_kv_heads, head_dim]."""
    num_pages, tokens, heads, head_dim = shape
    axes = (tokens, heads) if layout == "NHD" else (heads, tokens)

    def poisoned(*shape: int) -> Any:
        return asarray(np.full(shape, POISON, np.uint16).view(DTYPES[dtype]))

    if form == "stacked":
        return [poisoned(num_pages, 2, *axes, head_dim) for _ in range(layers)]
    if form == "tuple":
        return [tuple(poisoned(num_pages, *axes, head_dim) for _ in "kv") for _ in range(layers)]
    return [
        (
            poisoned(num_pages + 1, axes[0] + 2, axes[1], head_dim)[1:, 1:-1],
            poisoned(num_pages, axes[0], axes[1] + 1, head_dim + 3)[:, :, 1:, 2:-1],
        )
        for _ in range(layers)
    ]


class Lives(RuleBasedStateMachine):
    """Requests come, grow, are written, share, shrink and go."""

    @initialize(
        num_pages=st.integers(1, 30),
        page_size=st.sampled_from([1, 2, 3, 4, 5, 16]),
        heads=st.integers(1, 2),
        head_dim=st.integers(1, 3),
        layers=st.integers(1, 3),
        layout=st.sampled_from(["NHD", "HND"]),
        dtype=st.sampled_from(sorted(DTYPES)),
        form=st.sampled_from(["own", "tuple", "stacked", "strided"]),
        length=st.integers(0, 12),
    )
    def begin(
        self,
        num_pages: int,
        page_size: int,
        heads: int,
        head_dim: int,
        layers: int,
        layout: str,
        dtype: str,
        form: str,
        length: int,
    ) -> None:
        shape = (num_pages, page_size, heads, head_dim)
        self.cache = self.make(form, shape, layout, dtype, layers)
        self.shape, self.num_layers, self.dtype = shape, layers, DTYPES[dtype]
        self.model: dict[Any, Model] = {}
        self.count = 0
        #: What every slot holds, uint16 [layer, K or V, page, place, head, element].
        self.slots = self.bits()
        self.add("a", min(length, num_pages * page_size))

    # Where the arrays are: on the host

    def make(
        self, form: str, shape: tuple[int, ...], layout: str, dtype: str, layers: int
    ) -> PagedKVCache:
        given = None if form == "own" else caches(form, shape, layout, dtype, layers)
        return PagedKVCache(*shape, dtype, layers, layout, caches=given)

    def appended(self, rows: np.ndarray) -> Any:
        """New keys or values as they are given to `append()`."""
        return rows

    def bits_of(self, x: Any) -> np.ndarray:
        """A copy of what is in an array, uint16."""
        bits: np.ndarray = x.copy().view(np.uint16)
        return bits

    def put(self, x: Any, index: Any, bits: np.ndarray) -> None:
        """Write bits into an array."""
        x[index] = bits.view(self.dtype)

    # What is known

    def bits(self) -> np.ndarray:
        """The cache's arrays as they are, in the order of `slots`."""
        axes = (1, 2) if self.cache.layout == "HND" else (1, 1)
        layers = [[self.bits_of(x).swapaxes(*axes) for x in layer] for layer in self.cache.layers]
        return np.stack(layers)

    def token(self, number: int, layer: int, tensor: int) -> np.ndarray:
        """K or V of a token at a layer: all elements of all tokens differ, up to 65,536."""
        _, _, heads, head_dim = self.shape
        size = heads * head_dim
        begin = ((number * self.num_layers + layer) * 2 + tensor) * size
        # An odd factor is a permutation.
        values = (np.arange(begin, begin + size) * 40503) % 65536
        return values.astype(np.uint16).reshape(heads, head_dim)

    def rows(self, requests: list[Any], layer: int, tensor: int) -> Any:
        """K or V of the new tokens of requests."""
        numbers = [n for r in requests for n in self.new(r)]
        _, _, heads, head_dim = self.shape
        rows = np.empty((len(numbers), heads, head_dim), np.uint16)
        for row, number in zip(rows, numbers, strict=True):
            row[...] = self.token(number, layer, tensor)
        return rows.view(self.dtype)

    def new(self, request: Any) -> list[int]:
        model = self.model[request]
        return model.tokens[len(model.tokens) - model.new :]

    def tables(self) -> dict[Any, list[int]]:
        """The pages of every request, as `plan()` would be told."""
        indptr, indices, _ = self.cache.plan_args(self.model)
        return {
            r: indices[begin:end].tolist()
            for r, begin, end in zip(self.model, indptr, indptr[1:], strict=False)
        }

    def state(self) -> Any:
        """All that a call that raises must leave as it was."""
        pool = self.cache._pool
        return (
            self.tables(),
            [x.tolist() for x in self.cache.plan_args(self.model)],
            self.cache.lengths(self.model).tolist(),
            self.cache.qo_indptr(self.model).tolist(),
            (self.cache.requests, pool.num_free, pool.references.tolist(), pool._free.tolist()),
            self.bits().tobytes(),
        )

    def needed(self, counts: dict[Any, int]) -> int:
        """Free pages that it takes to add tokens to requests, in this order."""
        page_size = self.shape[1]
        tables = self.tables()
        holders = Counter(page for pages in tables.values() for page in pages)
        total = 0
        for request, count in counts.items():
            length = len(self.model[request].tokens)
            total += -(-(length + count) // page_size) - -(-length // page_size)
            if count and length % page_size and holders[tables[request][-1]] > 1:
                total += 1
                holders[tables[request][-1]] -= 1
        return total

    def refused(self, error: type[Exception], call: Any, *args: Any) -> Any:
        before = self.state()
        with pytest.raises(error) as raised:
            call(*args)
        assert self.state() == before
        return raised.value

    def out_of_pages(self, needed: int, call: Any, *args: Any) -> None:
        error = self.refused(OutOfPagesError, call, *args)
        assert (error.needed, error.free) == (needed, self.cache.num_free_pages)

    def copied(self, before: dict[Any, list[int]]) -> bool:
        """Copy whole slots where a request now has another page than before."""
        after = self.tables()
        found = False
        for request, pages in before.items():
            for old, own in zip(pages, after[request], strict=False):
                if old != own:
                    self.slots[:, :, own] = self.slots[:, :, old]
                    found = True
        return found

    # Steps

    def draw_one(self, data: st.DataObject) -> Any:
        return data.draw(st.sampled_from(list(self.model)), "request")

    def draw_some(self, data: st.DataObject) -> list[Any]:
        some = st.lists(st.sampled_from(list(self.model)), unique=True, min_size=1)
        return data.draw(some, "requests")

    def lengthen(self, request: Any, count: int) -> None:
        model = self.model[request]
        if self.is_written(request):
            model.new, model.layers = 0, set()
        model.tokens += range(self.count, self.count + count)
        model.new += count
        self.count += count

    def is_written(self, request: Any) -> bool:
        return len(self.model[request].layers) == self.num_layers

    @rule(request=st.sampled_from(IDS), length=st.integers(0, 12))
    def add(self, request: Any, length: int) -> None:
        if request in self.model:
            self.refused(ValueError, self.cache.add, request, length)
            return
        needed = -(-length // self.shape[1])
        if needed > self.cache.num_free_pages:
            self.out_of_pages(needed, self.cache.add, request, length)
            return
        self.cache.add(request, length)
        self.model[request] = Model(layers=set(range(self.num_layers)))
        if length:
            self.lengthen(request, length)

    @rule(data=st.data(), together=st.booleans())
    def extend(self, data: st.DataObject, together: bool) -> None:
        requests = self.draw_some(data) if together else [self.draw_one(data)]
        counts = {r: data.draw(st.integers(0, 7), "n") for r in requests}
        self.extend_by(counts, together)

    def extend_by(self, counts: dict[Any, int], together: bool) -> None:
        requests, n = list(counts), list(counts.values())
        args = (requests, n) if together else (requests[0], n[0])
        if any(0 < len(self.model[r].layers) < self.num_layers for r in requests):
            self.refused(RuntimeError, self.cache.extend, *args)
            return
        needed = self.needed(counts)
        if needed > self.cache.num_free_pages:
            self.out_of_pages(needed, self.cache.extend, *args)
            return
        before = self.tables()
        self.cache.extend(*args)
        if self.copied(before):
            event("a shared page was copied")
        for request, count in counts.items():
            self.lengthen(request, count)

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        self.append_at(self.draw_some(data), data.draw(st.integers(0, self.num_layers - 1)))

    def append_at(self, requests: list[Any], layer: int) -> None:
        k, v = (self.appended(self.rows(requests, layer, tensor)) for tensor in (0, 1))
        if any(layer in self.model[r].layers for r in requests):
            self.refused(RuntimeError, self.cache.append, requests, k, v, layer)
            return
        self.cache.append(requests, k, v, layer)
        for request in requests:
            self.write(request, layer)
            self.model[request].layers.add(layer)

    @precondition(lambda self: not all(map(self.is_written, self.model)))
    @rule()
    def append_all(self) -> None:
        """What a model's step does, of those requests that are not written at a layer."""
        for layer in range(self.num_layers):
            self.append_at([r for r, m in self.model.items() if layer not in m.layers], layer)

    def write(self, request: Any, layer: int) -> list[tuple[int, int]]:
        """Put the new tokens of a request where they belong; returns their slots."""
        model, page_size = self.model[request], self.shape[1]
        pages = self.tables()[request]
        length = len(model.tokens)
        found = [divmod(i, page_size) for i in range(length - model.new, length)]
        places = [(pages[page], place) for page, place in found]
        for (page, place), number in zip(places, self.new(request), strict=True):
            for tensor in (0, 1):
                self.slots[layer, tensor, page, place] = self.token(number, layer, tensor)
        return places

    @rule(data=st.data())
    def write_by_other_means(self, data: st.DataObject) -> None:
        requests = self.draw_some(data)
        for request in requests:
            for layer in range(self.num_layers):
                for page, place in self.write(request, layer):
                    index = (page, place)
                    if self.cache.layout == "HND":
                        index = (page, slice(None), place)
                    for x, bits in zip(self.cache.layers[layer], self.slots[layer], strict=True):
                        self.put(x, index, bits[page, place])
        self.cache.mark_appended(requests)
        for request in requests:
            self.model[request].layers = set(range(self.num_layers))

    @rule(data=st.data(), new=st.sampled_from(IDS))
    def fork(self, data: st.DataObject, new: Any) -> None:
        self.fork_of(self.draw_one(data), new)

    @precondition(lambda self: len(self.model) < len(IDS))
    @rule(data=st.data(), together=st.booleans())
    def branch(self, data: st.DataObject, together: bool) -> None:
        """Go on from an earlier token of a request, in a page that is shared."""
        request, new = self.draw_one(data), next(r for r in IDS if r not in self.model)
        if self.fork_of(request, new):
            length = data.draw(st.integers(0, len(self.model[new].tokens)), "length")
            self.truncate_to(new, length)
            counts = {new: data.draw(st.integers(0, 7), "n")}
            if together:
                self.truncate_to(request, length)
                counts[request] = data.draw(st.integers(0, 7), "n")
            self.extend_by(counts, together=True)

    def fork_of(self, request: Any, new: Any) -> bool:
        model = self.model[request]
        if new in self.model:
            self.refused(ValueError, self.cache.fork, request, new)
            return False
        if model.new and not self.is_written(request):
            self.refused(RuntimeError, self.cache.fork, request, new)
            return False
        part_filled = len(model.tokens) % self.shape[1] > 0
        if part_filled and not self.cache.num_free_pages:
            self.out_of_pages(1, self.cache.fork, request, new)
            return False
        before, free = self.tables(), self.cache.num_free_pages
        self.cache.fork(request, new)
        self.model[new] = Model(list(model.tokens), layers=set(range(self.num_layers)))
        assert self.cache.num_free_pages == free - part_filled
        if part_filled:
            self.slots[:, :, self.tables()[new][-1]] = self.slots[:, :, before[request][-1]]
        return True

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        request = self.draw_one(data)
        length = data.draw(st.integers(0, len(self.model[request].tokens) + 1), "length")
        self.truncate_to(request, length)

    def truncate_to(self, request: Any, length: int) -> None:
        model = self.model[request]
        if length > len(model.tokens):
            self.refused(ValueError, self.cache.truncate, request, length)
            return
        self.cache.truncate(request, length)
        gone = len(model.tokens) - length
        del model.tokens[length:]
        if gone:
            model.new = max(0, model.new - gone)
            if not model.new:
                model.layers = set(range(self.num_layers))

    @precondition(lambda self: len(self.model) > 1)  # so that there is one for the other rules
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        request = self.draw_one(data)
        self.cache.free(request)
        del self.model[request]
        self.refused(ValueError, self.cache.free, request)

    # What has to be so after each of them

    @invariant()
    def the_requests_are_the_model_s(self) -> None:
        model, cache = self.model, self.cache
        assert cache.requests == list(cache) == list(model)
        assert len(cache) == len(model)
        assert all((r in cache) == (r in model) for r in IDS)
        expected = [len(m.tokens) for m in model.values()]
        assert cache.lengths(model).tolist() == [cache.length(r) for r in model] == expected
        assert np.diff(cache.qo_indptr(model)).tolist() == [m.new for m in model.values()]
        places = [i for m in model.values() for i in range(len(m.tokens) - m.new, len(m.tokens))]
        assert cache.positions(model).tolist() == places

    @invariant()
    def every_history_is_there(self) -> None:
        """Token by token, as `plan()` and `run()` would read it; what isn't written may be what."""
        page_size = self.shape[1]
        indptr, indices, last = self.cache.plan_args(self.model)
        bits = self.bits()
        assert indptr[0] == 0
        assert indptr[-1] == len(indices)
        for r, (request, model) in enumerate(self.model.items()):
            pages = indices[indptr[r] : indptr[r + 1]]
            length = (len(pages) - 1) * page_size + last[r] if len(pages) else 0
            assert length == len(model.tokens), request
            assert (1 if len(pages) else 0) <= last[r] <= page_size
            for layer in range(self.num_layers):
                written = length if layer in model.layers else length - model.new
                for tensor in (0, 1):
                    found = bits[layer, tensor, pages].reshape(-1, *self.shape[2:])[:written]
                    for i, number in enumerate(model.tokens[:written]):
                        expected = self.token(number, layer, tensor)
                        assert (found[i] == expected).all(), (request, layer, tensor, i)

    @invariant()
    def nothing_else_is_written(self) -> None:
        assert (self.bits() == self.slots).all()

    @invariant()
    def no_page_is_lost_or_held_by_mistake(self) -> None:
        tables, pool = self.tables(), self.cache._pool
        held = Counter(page for pages in tables.values() for page in pages)
        assert all(len(set(pages)) == len(pages) for pages in tables.values())
        assert pool.references.tolist() == [held[page] for page in range(self.shape[0])]
        free = pool._free[: pool.num_free].tolist()
        assert sorted([*free, *held]) == list(range(self.shape[0]))
        assert self.cache.num_free_pages == len(free)

    @invariant()
    def new_tokens_share_no_page(self) -> None:
        """What is still to be written goes where no other request reads."""
        tables, page_size = self.tables(), self.shape[1]
        held = Counter(page for pages in tables.values() for page in pages)
        for request, model in self.model.items():
            if model.new and not self.is_written(request):
                first = (len(model.tokens) - model.new) // page_size
                assert all(held[page] == 1 for page in tables[request][first:])

    @invariant()
    def the_block_table_is_the_plan_s(self) -> None:
        tables = self.tables()
        table = self.cache.block_table(self.model, fill=-1)
        assert table.dtype == np.int32
        assert table.shape == (len(tables), max(map(len, tables.values()), default=0))
        for row, pages in zip(table.tolist(), tables.values(), strict=True):
            assert row == pages + [-1] * (len(row) - len(pages))


TestLives = Lives.TestCase
