"""A plan's run as a step of JAX's programs."""

from __future__ import annotations

from typing import Any

import batches
import numpy as np
import oracle
import pytest
from oracle import Formula

import cupaged

CAUSAL = Formula(causal=True)
ON = ["host", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture
def door() -> Any:
    """The function, where JAX is."""
    pytest.importorskip("jax")
    from cupaged.jax import paged_attention

    return paged_attention


def build(rng: np.random.Generator, **options: Any) -> batches.Batch:
    options = {"num_kv_heads": 2, "group": 2, "cache_form": "tuple", **options}
    return batches.build(rng, [5, 1, 70], [70, 33, 90], **options)


def planned(batch: batches.Batch, on: str, formula: Formula = CAUSAL) -> Any:
    backend = "cuda" if on == "gpu" else "reference"
    wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper(
        kv_layout=batch.kv_layout, backend=backend
    )
    batch.plan(wrapper, **formula.plan_options)
    return wrapper


def on_jax(on: str, *arrays: np.ndarray) -> list[Any]:
    import jax

    device = jax.devices("gpu" if on == "gpu" else "cpu")[0]
    return [jax.device_put(np.ascontiguousarray(x), device) for x in arrays]


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_call(rng: np.random.Generator, door: Any, dtype: str, jitted: bool, on: str) -> None:
    import jax

    for kv_layout in ("NHD", "HND"):
        batch = build(rng, dtype=dtype, kv_layout=kv_layout, head_dim=128)
        wrapper = planned(batch, on)

        def call(q: Any, k: Any, v: Any, wrapper: Any = wrapper) -> Any:
            return door(q, k, v, wrapper, return_lse=True)

        q, k, v = on_jax(on, batch.q, *batch.keys_and_values())
        out, lse = (jax.jit(call) if jitted else call)(q, k, v)
        assert isinstance(out, jax.Array)
        assert out.devices() == q.devices()
        oracle.check_all(batch, CAUSAL, np.asarray(out), np.asarray(lse))


@pytest.mark.parametrize("on", ON)
def test_in_the_midst_of_a_program_again_and_again(
    rng: np.random.Generator, door: Any, on: str
) -> None:
    """What comes before has ended when it reads, and what it writes is there for what follows."""
    import jax
    import jax.numpy as jnp

    batch = build(rng, head_dim=64)
    wrapper = planned(batch, on)

    @jax.jit
    def program(x: Any, k: Any, v: Any) -> Any:
        heavy = jnp.sin(jnp.ones((600, 600), jnp.float32))
        for _ in range(4):
            heavy = heavy @ heavy * 1e-3
        q = x + (heavy.sum() * 0).astype(x.dtype)
        return door(q, k, v, wrapper) * 2

    k, v = on_jax(on, *batch.keys_and_values())
    for _ in range(5):
        batch.q[...] = rng.standard_normal(batch.q.shape)
        (x,) = on_jax(on, batch.q)
        out = np.asarray(program(x, k, v))
        oracle.check_all(batch, CAUSAL, (out.astype(np.float32) / 2).astype(out.dtype))


@pytest.mark.parametrize("on", ON)
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donated_queries(rng: np.random.Generator, door: Any, on: str) -> None:
    import jax

    batch = build(rng, head_dim=64)
    wrapper = planned(batch, on)
    program = jax.jit(lambda q, k, v: door(q, k, v, wrapper), donate_argnums=0)
    k, v = on_jax(on, *batch.keys_and_values())
    for _ in range(3):
        (q,) = on_jax(on, batch.q.copy())
        oracle.check_all(batch, CAUSAL, np.asarray(program(q, k, v)))


@pytest.mark.parametrize("on", ON)
def test_options_and_another_plan(rng: np.random.Generator, door: Any, on: str) -> None:
    """A plan of as many rows is used by what was jitted before."""
    import jax

    sinks = rng.standard_normal(4).astype(np.float32)
    formula = Formula(causal=True, k_scale=0.5, v_scale=2.0, lse_base="ln", sinks=sinks)
    batch = build(rng, head_dim=64)
    wrapper = planned(batch, on)
    program = jax.jit(
        lambda q, k, v, s: door(
            q, k, v, wrapper, k_scale=0.5, v_scale=2.0, sinks=s, return_lse=True, lse_base="ln"
        )
    )
    for lengths in ([70, 33, 90], [200, 1, 70]):
        batch = batches.build(
            rng, [5, 1, 70], lengths, num_kv_heads=2, group=2, cache_form="tuple", spare_pages=3
        )
        batch.plan(wrapper, **formula.plan_options)
        out, lse = program(*on_jax(on, batch.q, *batch.keys_and_values(), sinks))
        oracle.check_all(batch, formula, np.asarray(out), np.asarray(lse))


def test_errors(rng: np.random.Generator, door: Any) -> None:
    import jax

    batch = build(rng, head_dim=64)
    k, v = on_jax("host", *batch.keys_and_values())
    (q,) = on_jax("host", batch.q)
    with pytest.raises(RuntimeError, match=r"^paged_attention\(\) before plan\(\)$"):
        door(q, k, v, cupaged.BatchPrefillWithPagedKVCacheWrapper(backend="reference"))
    wrapper = planned(batch, "host")
    message = r"^q is float16 \[75, 4, 64\], expected float16 \[76, 4, 64\] as planned"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda q: door(q, k, v, wrapper))(q[1:])
    with pytest.raises(Exception, match="k cache has shape"):
        jax.block_until_ready(jax.jit(lambda q: door(q, k[:, :3], v, wrapper))(q))
    with pytest.raises(ValueError, match="do not support JVP"):
        jax.grad(lambda q: door(q, k, v, wrapper).sum().astype(float))(q)
