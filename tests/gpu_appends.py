"""Appends on a GPU, and what they leave in its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_calls import to_gpu, to_host
from page_problems import Problem, same_bits

from cupaged.page import append_paged_kv_cache

#: Where the index arrays are.
PLACES: dict[str, Callable[[np.ndarray], Any]] = {"host": np.asarray, "device": to_gpu}


def found(problem: Problem) -> list[np.ndarray]:
    """The memory that a cache on the GPU lies in."""
    return [to_host(storage) for storage in problem.storages]


def check(problem: Problem, as_index: Callable[[np.ndarray], Any]) -> None:
    """Append, and look at every bit of the memory that the cache lies in."""
    on_gpu = problem.on(to_gpu, as_index)
    on_gpu.append(append_paged_kv_cache)
    assert same_bits(found(on_gpu), problem.solved())


def fill(on_gpu: Problem, problem: Problem) -> None:
    """Put the bits of a problem's memory, and its index arrays, into that of one on the GPU."""
    pairs = list(zip(on_gpu.storages, problem.storages, strict=True))
    for view in ("key_view", "value_view"):
        pairs.append((getattr(on_gpu, view).storage, getattr(problem, view).storage))
    pairs += [(getattr(on_gpu, name), array) for name, array in problem.indices.items()]
    for target, source in pairs:
        if not isinstance(target, np.ndarray):
            target.view(f"u{target.itemsize}").set(source.view(f"u{source.itemsize}"))
