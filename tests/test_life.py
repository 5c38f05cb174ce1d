"""Prefill, then a hundred decode steps, requests joining and leaving: on the reference backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from life import HEAD_DIM, LAYERS, NUM_KV_HEADS, Life, live

import cupaged


@pytest.mark.parametrize(("layout", "page_size"), [("NHD", 16), ("HND", 5)])
def test_every_step_equals_attention_over_the_history(
    rng: np.random.Generator, layout: str, page_size: int
) -> None:
    cache = cupaged.PagedKVCache(
        2000 // page_size, page_size, NUM_KV_HEADS, HEAD_DIM, num_layers=LAYERS, layout=layout
    )
    for pages in cache.layers:
        for half in pages:
            half[...] = np.nan

    def same(x: Any) -> Any:
        return x

    live(Life(rng, cache, same, same, "reference"), 100)
