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
def door(request: pytest.FixtureRequest) -> Any:
    """The function, where JAX is, and has a GPU where the test does."""
    if request.node.get_closest_marker("gpu"):
        for needed in ("jax", "cp"):
            request.getfixturevalue(needed)
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
    formula = Formula(
        causal=True, q_scale=3.0, k_scale=0.5, v_scale=2.0, lse_base="ln", sinks=sinks
    )
    factors = {"q_scale": 3.0, "k_scale": 0.5, "v_scale": 2.0}
    batch = build(rng, head_dim=64)
    wrapper = planned(batch, on)
    program = jax.jit(
        lambda q, k, v, s: door(
            *(q, k, v, wrapper), **factors, sinks=s, return_lse=True, lse_base="ln"
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
    with pytest.raises(
        TypeError, match=r"^plan is a NoneType, expected a wrapper that was planned$"
    ):
        door(q, k, v, None)
    wrapper = planned(batch, "host")
    sinks = np.zeros(3, np.float32)
    bad: list[tuple[type[Exception], str, Any]] = [
        (
            TypeError,
            "q is a list, expected a JAX array",
            lambda q: ((batch.q.tolist(), k, v), {}),
        ),
        (
            TypeError,
            "q is float32, expected q_data_type = float16",
            lambda q: ((q.astype("float32"), k, v), {}),
        ),
        (ValueError, "q has 75 rows, expected 76 = qo_indptr[-1]", lambda q: ((q[1:], k, v), {})),
        (
            ValueError,
            f"k cache has shape ({len(k)}, 3, 2, 64); kv_layout='NHD' expects "
            "(num_pages, page_size=16, num_kv_heads=2, head_dim=64)",
            lambda q: ((q, k[:, :3], v), {}),
        ),
        (
            TypeError,
            "v cache is float32, expected kv_data_type = float16",
            lambda q: ((q, k, v.astype("float32")), {}),
        ),
        (
            ValueError,
            "sinks has shape (3,), expected (num_qo_heads=4,)",
            lambda q: ((q, k, v), {"sinks": sinks}),
        ),
        (
            ValueError,
            "lse_base = 'e', expected one of 'log2', 'ln'",
            lambda q: ((q, k, v), {"lse_base": "e"}),
        ),
        (
            TypeError,
            "k_scale is a DynamicJaxprTracer, expected a number",
            lambda q: ((q, k, v), {"k_scale": q[0, 0, 0]}),
        ),
    ]
    for kind, message, arguments in bad:

        def call(q: Any, arguments: Any = arguments) -> Any:
            arrays, options = arguments(q)
            return door(*arrays, wrapper, **options)

        with pytest.raises(kind) as raised:
            jax.jit(call).trace(q)
        assert str(raised.value) == message
    # A later plan is checked when the program runs.
    program = jax.jit(lambda q: door(q, k, v, wrapper))
    program(q).block_until_ready()
    one_more = batches.build(rng, [5, 1, 71], [70, 33, 90], num_kv_heads=2, group=2)
    one_more.plan(wrapper, causal=True)
    with pytest.raises(Exception, match="ValueError: q has 76 rows, expected 77 = "):
        program(q).block_until_ready()
    batch.plan(wrapper, causal=True)
    sinking = cupaged.BatchAttentionWithAttentionSinkWrapper(
        backend="reference", q_data_type="float16", kv_data_type="float16",
        head_dim_qk=64, head_dim_vo=64,
    )  # fmt: skip
    batch.plan(sinking, causal=True)
    with pytest.raises(TypeError, match=r"^sinks is None, expected a float32 array "):
        door(q, k, v, sinking)
    with pytest.raises(ValueError, match=r"^paged_kv_indices\[\d+\] = \d+ .* holds 3 pages$"):
        door(q, k[:3], v[:3], wrapper)
    with pytest.raises(ValueError, match="do not support JVP"):
        jax.grad(lambda q: door(q, k, v, wrapper).sum().astype(float))(q)
    with pytest.raises(NotImplementedError, match=r"^vmap is only supported for "):
        jax.vmap(lambda q: door(q, k, v, wrapper))(q[None])


def test_calls_alike_share_one_program(rng: np.random.Generator, door: Any) -> None:
    """Outside of `jit` too: JAX compiles once, and holds no wrapper more for each call."""
    import jax

    batch = build(rng, head_dim=64)
    wrapper = planned(batch, "host")
    q, k, v = on_jax("host", batch.q, *batch.keys_and_values())
    door(q, k, v, wrapper, k_scale=0.5).block_until_ready()
    compiled: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(3):
        door(q, k, v, wrapper, k_scale=np.float32(0.5)).block_until_ready()
    assert compiled == []
    door(q, k, v, wrapper, k_scale=0.25).block_until_ready()
    assert compiled  # which is how it would have been seen


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(rng: np.random.Generator, door: Any, kv_dtype: str, on: str) -> None:
    import jax

    formula = Formula(causal=True, k_scale=0.5, v_scale=2.0)
    batch = build(rng, head_dim=64, kv_dtype=kv_dtype)
    wrapper = planned(batch, on, formula)
    program = jax.jit(lambda q, k, v: door(q, k, v, wrapper, k_scale=0.5, v_scale=2.0))
    q, k, v = on_jax(on, batch.q, *batch.keys_and_values())
    oracle.check_all(batch, formula, np.asarray(program(q, k, v)))


@pytest.mark.parametrize("on", ON)
def test_every_kind_of_plan(rng: np.random.Generator, door: Any, on: str) -> None:
    backend = "cuda" if on == "gpu" else "reference"
    batch = batches.build(rng, [1, 1], [7, 33], num_kv_heads=2, page_size=1, cache_form="tuple")
    decode = cupaged.BatchDecodeWithPagedKVCacheWrapper(backend=backend)
    _, *pages = batch.index_arrays
    decode.plan(*pages, *batch.geometry)
    q, k, v = on_jax(on, batch.q, *batch.keys_and_values())
    oracle.check_all(batch, Formula(), np.asarray(door(q, k, v, decode)))
    # Pages of one token may lack the axis of the tokens.
    oracle.check_all(batch, Formula(), np.asarray(door(q, k[:, 0], v[:, 0], decode)))

    ragged = cupaged.BatchPrefillWithRaggedKVCacheWrapper(backend=backend)
    ragged.plan([0, 1, 2], [0, 7, 40], 2, 2, 64)
    rows = [batch.gathered(r) for r in range(2)]
    k, v = on_jax(on, *(np.concatenate([row[i] for row in rows]) for i in (1, 2)))
    oracle.check_all(batch, Formula(), np.asarray(door(q, k, v, ragged)))

    sinks = rng.standard_normal(2).astype(np.float32)
    with_sinks = cupaged.BatchAttentionWithAttentionSinkWrapper(
        backend=backend,
        q_data_type="float16",
        kv_data_type="float16",
        head_dim_qk=64,
        head_dim_vo=64,
    )
    batch.plan(with_sinks)
    q, k, v, s = on_jax(on, batch.q, *batch.keys_and_values(), sinks)
    out = np.asarray(door(q, k, v, with_sinks, sinks=s))
    oracle.check_all(batch, Formula(sinks=sinks), out)


@pytest.mark.parametrize("on", ON)
def test_a_donated_cache_is_written_and_read(rng: np.random.Generator, door: Any, on: str) -> None:
    """New keys go into pages that are donated, in the program that reads them."""
    import jax

    batch = build(rng, head_dim=64)
    wrapper = planned(batch, on)

    def step(q: Any, k: Any, v: Any, new: Any) -> Any:
        k = k.at[batch.slot(1, 32)].set(new)
        return door(q, k, v, wrapper), k

    program = jax.jit(step, donate_argnums=1)
    q, k, v = on_jax(on, batch.q, *batch.keys_and_values())
    keys, _ = batch.keys_and_values()
    for _ in range(4):
        keys[batch.slot(1, 32)] = rng.standard_normal((2, 64))
        (new,) = on_jax(on, keys[batch.slot(1, 32)].copy())
        before = k
        out, k = program(q, k, v, new)
        assert before.is_deleted()
        oracle.check_all(batch, CAUSAL, np.asarray(out))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_where_a_buffer_lies(dtype: str) -> None:
    """Told by DLPack, for every dtype that K and V may have."""
    jax = pytest.importorskip("jax")
    from jax.experimental.buffer_callback import buffer_callback

    from cupaged import dlpack

    places = []

    def look(context: Any, result: Any, *buffers: Any) -> None:
        np.asarray(result)[...] = 0
        for buffer in buffers:
            places.append((dlpack.address(buffer.__dlpack__()), np.asarray(buffer).ctypes.data))

    x = np.zeros(8, np.dtype(jax.numpy.dtype(dtype)))
    result = jax.ShapeDtypeStruct((1,), np.float32)
    buffer_callback(look, result)(*on_jax("host", x, x)).block_until_ready()
    assert len(places) == 2
    assert all(told == lies for told, lies in places)
