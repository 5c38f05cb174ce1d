"""Prefill, then a hundred decode steps, requests joining and leaving: on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_calls import to_gpu, to_host
from life import HEAD_DIM, LAYERS, NUM_KV_HEADS, Life, live

import cupaged

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("layout", "page_size"), [("NHD", 16), ("HND", 16), ("NHD", 5)])
def test_every_step_equals_attention_over_the_history(
    family: str, cp: Any, rng: np.random.Generator, layout: str, page_size: int
) -> None:
    shape = (page_size, NUM_KV_HEADS) if layout == "NHD" else (NUM_KV_HEADS, page_size)
    num_pages = 2000 // page_size
    caches = [
        tuple(to_gpu(np.full((num_pages, *shape, HEAD_DIM), np.nan, np.float16)) for _ in "kv")
        for _ in range(LAYERS)
    ]
    cache = cupaged.PagedKVCache(
        num_pages,
        page_size,
        NUM_KV_HEADS,
        HEAD_DIM,
        num_layers=LAYERS,
        layout=layout,
        caches=caches,
    )
    live(Life(rng, cache, to_gpu, to_host, "cuda"), 100)


def test_with_pytorch(torch: Any, rng: np.random.Generator) -> None:
    caches = [
        torch.full((2000 // 16, 2, 16, NUM_KV_HEADS, HEAD_DIM), torch.nan, device="cuda").half()
        for _ in range(LAYERS)
    ]
    cache = cupaged.PagedKVCache(
        2000 // 16, 16, NUM_KV_HEADS, HEAD_DIM, num_layers=LAYERS, caches=caches
    )

    def put(x: np.ndarray) -> Any:
        return torch.from_numpy(x).cuda()

    def get(x: Any) -> np.ndarray:
        found: np.ndarray = x.cpu().numpy()
        return found

    live(Life(rng, cache, put, get, "cuda"), 100)
