"""Arrays of several frameworks on a GPU, for the tests of what they share."""

from __future__ import annotations

from typing import Any

import numpy as np

FLOATS = ["float16", "bfloat16", "float32"]


def on_device(jax: Any, values: np.ndarray, device: int = 0) -> Any:
    return jax.device_put(values, jax.devices("gpu")[device])


def slow(jax: Any, rng: np.random.Generator) -> Any:
    """A JAX array that is still being computed."""
    a = on_device(jax, rng.standard_normal((4096, 4096)).astype(np.float32) / 64)
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda _, y: a @ y, x))
    chain(a).block_until_ready()  # compiled
    return chain(a + 1)
