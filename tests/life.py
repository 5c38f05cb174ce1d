"""A server's life in small: requests that join, decode, fork, go back and leave, over one cache.

Every output is compared with attention over the request's plain, contiguous history.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
from oracle import Formula

import cupaged
from cupaged.spec import DTYPES

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, LAYERS = 6, 2, 64, 2
MOST_REQUESTS, LONGEST_PROMPT = 7, 60
CAUSAL = Formula(causal=True)


class Life:
    """One cache, two wrappers, and what every living request has seen.

    Parameters
    ----------
    rng : numpy.random.Generator
    cache : PagedKVCache
        Empty, of `LAYERS` layers.
    put, get : callable
        A host array to where the cache is, and back.
    backend : str
    """

    def __init__(
        self,
        rng: np.random.Generator,
        cache: Any,
        put: Callable[[np.ndarray], Any],
        get: Callable[[Any], np.ndarray],
        backend: str,
    ) -> None:
        self.rng, self.cache, self.put, self.get = rng, cache, put, get
        self.prefill = cupaged.BatchPrefillWithPagedKVCacheWrapper(
            kv_layout=cache.layout, backend=backend
        )
        self.decode = cupaged.BatchDecodeWithPagedKVCacheWrapper(
            kv_layout=cache.layout, backend=backend
        )
        # request → of each layer, K and V [length, NUM_KV_HEADS, HEAD_DIM]
        self.history: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.born = 0
        self.kinds: set[str] = set()

    def draw(self, rows: int, heads: int) -> np.ndarray:
        values = self.rng.standard_normal((rows, heads, HEAD_DIM), np.float32)
        return values.astype(DTYPES["float16"])

    def step(self) -> None:
        """Some leave, go back or join; those prefill, and the others decode one token."""
        for request in list(self.history):
            chance = self.rng.random()
            if chance < 0.06:
                self.kinds.add("leave")
                self.cache.free(request)
                del self.history[request]
            elif chance < 0.12:
                self.kinds.add("truncate")
                kept = int(self.rng.integers(0, self.cache.length(request) + 1))
                self.cache.truncate(request, kept)
                self.history[request] = [(k[:kept], v[:kept]) for k, v in self.history[request]]
            elif chance < 0.18 and len(self.history) < MOST_REQUESTS:
                self.kinds.add("fork")
                self.cache.fork(request, self.born)
                self.history[self.born] = list(self.history[request])
                self.born += 1
        decoding = [r for r in self.history if self.rng.random() < 0.9]
        joining = []
        while (not decoding and not joining) or (
            len(self.history) < MOST_REQUESTS and self.rng.random() < 0.4
        ):
            self.kinds.add("join")
            empty = np.empty((0, NUM_KV_HEADS, HEAD_DIM), DTYPES["float16"])
            self.cache.add(self.born)
            self.history[self.born] = [(empty, empty)] * LAYERS
            joining.append(self.born)
            self.born += 1
        if joining:
            self.run(joining, [int(self.rng.integers(1, LONGEST_PROMPT)) for _ in joining])
        if decoding:
            self.rng.shuffle(decoding)
            self.run(decoding, [1] * len(decoding))

    def run(self, requests: list[int], new: list[int]) -> None:
        """Append so many new tokens to requests, and attend from them, at every layer."""
        heads = (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, self.cache.page_size)
        for request, count in zip(requests, new, strict=True):
            self.cache.extend(request, count)
        arguments = self.cache.plan_args(requests)
        wrapper: Any
        if max(new) == 1:
            wrapper = self.decode
            wrapper.plan(*arguments, *heads)
        else:
            wrapper = self.prefill
            wrapper.plan(self.cache.qo_indptr(requests), *arguments, *heads, causal=True)
        begins = np.cumsum([0, *new])
        for layer in range(LAYERS):
            k, v = self.draw(sum(new), NUM_KV_HEADS), self.draw(sum(new), NUM_KV_HEADS)
            q = self.draw(sum(new), NUM_QO_HEADS)
            self.cache.append(requests, self.put(k), self.put(v), layer)
            out = self.get(wrapper.run(self.put(q), self.cache.layers[layer]))
            for request, begin, end in zip(requests, begins[:-1], begins[1:], strict=True):
                before = self.history[request][layer]
                keys, values = (
                    np.concatenate((old, added[begin:end]))
                    for old, added in zip(before, (k, v), strict=True)
                )
                self.history[request] = [*self.history[request]]
                self.history[request][layer] = keys, values
                rows = q[begin:end]
                oracle.assert_close(
                    out[begin:end],
                    oracle.attend(rows, keys, values, CAUSAL)[0],
                    oracle.plain_same_dtype(rows, keys, values, CAUSAL),
                    np.ones(end - begin, np.bool_),
                    f"layer {layer} of request {request}, {len(keys)} keys",
                )

    def end(self) -> None:
        """All leave, and no page is left behind."""
        for request in list(self.history):
            assert self.cache.length(request) == len(self.history[request][0][0])
            self.cache.free(request)
        assert self.cache.num_free_pages == self.cache.num_pages
        assert self.kinds == {"leave", "truncate", "fork", "join"}


def live(life: Life, steps: int) -> None:
    """So many steps."""
    for _ in range(steps):
        life.step()
    life.end()
