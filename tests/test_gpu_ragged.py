"""Keys and values without pages on a GPU: batches, single requests, graphs, and frameworks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import batches
import numpy as np
import oracle
import pytest
import ragged_calls
import strategies
from frameworks import on_device
from gpu_calls import Results, to_gpu, to_host
from graph_calls import put, take, with_cupy
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Formula
from ragged_calls import Ragged, Wrapper
from variant_calls import masks_of

import cupaged
from cupaged import arrays
from cupaged.spec import DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning"),
]
both_families = pytest.mark.usefixtures("family")


def on_gpu(pages_layout: str, *options: Any) -> Ragged:
    return Ragged(pages_layout, *options, asarray=to_gpu, asnumpy=to_host, backend="cuda")


@both_families
@given(
    strategies.calls(variants=True, max_batch=8, max_kv=500),
    st.sampled_from([0, 0, 1, 7]),
    st.sampled_from(["NHD", "HND"]),
    st.sampled_from(ragged_calls.FORMS),
)
@settings(max_examples=60)
def test_random_calls_equal_the_formula(
    cp: Any, call: strategies.Call, gap: int, kv_layout: str, form: str
) -> None:
    """All features at once; rows between requests are NaN, and so are keys that no row sees."""
    ragged = on_gpu(call.build_options["kv_layout"], gap, kv_layout, form)
    strategies.check_call(call, ragged, to_gpu, to_host)


@both_families
@given(
    strategies.calls(max_batch=8, max_kv=700),
    st.sampled_from([0, 0, 1, 7]),
    st.sampled_from(["NHD", "HND"]),
    st.sampled_from(ragged_calls.FORMS),
)
@settings(max_examples=60)
def test_random_plain_calls_equal_the_formula(
    cp: Any, call: strategies.Call, gap: int, kv_layout: str, form: str
) -> None:
    """What the sm_90 family serves."""
    ragged = on_gpu(call.build_options["kv_layout"], gap, kv_layout, form)
    strategies.check_call(call, ragged, to_gpu, to_host)


@both_families
def test_the_last_rows_of_the_last_request(
    cp: Any, rng: np.random.Generator, exact_allocations: None
) -> None:
    """Nothing is read behind them: they end where their memory ends."""
    for kv_len in (1, 31, 63, 65, 127, 129, 300):
        batch = batches.build(rng, [130, 3], [50, kv_len], head_dim=128, group=2)
        ragged = on_gpu("NHD")
        batch.plan(ragged)
        out = ragged.run(to_gpu(batch.q), batch.on(to_gpu).cache)
        oracle.check_all(batch, Formula(), to_host(out))


# CUDA graphs

MOST_REQUESTS, MOST_ROWS, MOST_KEYS = 4, 150, 1000
STEPS: list[list[tuple[int, int]]] = [
    [(100, 300), (1, 20), (0, 9), (49, 100)],
    [(1, 900), (7, 3)],
    [],
    [(0, 30), (3, 0)],
    [(141, 1000)],
]


def rows_of(x: list[np.ndarray], heads: int, most: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Rows one behind the other, and NaN up to `most`."""
    found = np.full((most, heads, 64), np.nan, dtype)
    begin = 0
    for part in x:
        found[begin : begin + len(part)] = part
        begin += len(part)
    return found


@both_families
@pytest.mark.parametrize("given_buffers", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_recorded_run_follows_every_plan(
    cp: Any, rng: np.random.Generator, masked: bool, given_buffers: bool
) -> None:
    of = with_cupy(cp)
    options: dict[str, Any] = {"max_batch_size": MOST_REQUESTS}
    if given_buffers:
        sizes = dict.fromkeys(("qo_indptr_buf", "kv_indptr_buf"), MOST_REQUESTS + 1)
        options = {name: of.empty((size,), "int32") for name, size in sizes.items()}
    if masked:
        options["custom_mask_buf"] = of.empty((MOST_ROWS * MOST_KEYS,), "uint8")
        options["mask_indptr_buf"] = of.empty((MOST_REQUESTS + 1,), "int32")
    wrapper = Wrapper(use_cuda_graph=True, **options)
    q, out = (of.empty((MOST_ROWS, 4, 64), "float16") for _ in range(2))
    k, v = (of.empty((MOST_KEYS, 2, 64), "float16") for _ in range(2))
    lse = of.empty((MOST_ROWS, 4), "float32")
    replay = None
    for lengths in STEPS:
        qo_len, kv_len = [n for n, _ in lengths], [n for _, n in lengths]
        batch = batches.build(rng, qo_len, kv_len, group=2)
        masks = None
        if masked:
            masks = masks_of(rng, batch)
        formula = Formula(causal=True, custom_mask=masks)
        batch = batch.with_hidden_keys(formula)
        starts = [np.cumsum([0, *lengths]) for lengths in (qo_len, kv_len)]
        wrapper.plan(*starts, 4, 2, 64, **formula.plan_options)
        gathered = [batch.gathered(r) for r in range(len(lengths))]
        for target, heads, parts in (
            (q, 4, [one[0] for one in gathered]),
            (k, 2, [one[1] for one in gathered]),
            (v, 2, [one[2] for one in gathered]),
        ):
            put(target, rows_of(parts, heads, len(target), np.dtype(np.float16)))
        put(out, np.full(out.shape, np.nan, np.float16))
        put(lse, np.full(lse.shape, np.nan, np.float32))
        if replay is None:
            replay = of.record(lambda: wrapper.run(q, k, v, out=out, lse=lse))
        replay()
        cp.cuda.Device().synchronize()
        rows = batch.nnz_qo
        oracle.check_all(batch, formula, take(out)[:rows], take(lse)[:rows])
        assert np.isnan(take(out)[rows:]).all()


# Single requests


def tensors(rng: np.random.Generator, kv_dtype: str = "bfloat16") -> tuple[np.ndarray, ...]:
    q = rng.standard_normal((70, 4, 64)).astype(DTYPES["bfloat16"])
    k, v = (rng.standard_normal((300, 2, 64)).astype(DTYPES[kv_dtype]) for _ in range(2))
    return q, k, v


def check_single(given_arrays: tuple[Any, ...], host: tuple[np.ndarray, ...], back: Any) -> None:
    """Both functions, on a framework's arrays."""
    q, k, v = given_arrays
    out, lse = cupaged.single_prefill_with_kv_cache(q, k, v, causal=True, return_lse=True)
    assert type(out) is type(q)
    results: Results = (back(out), back(lse))
    batch = SimpleNamespace(qo_len=(70,), gathered=lambda request: host)
    oracle.check_all(batch, Formula(causal=True), *results)
    out, lse = cupaged.single_decode_with_kv_cache(q[3], k, v, window_left=99, return_lse=True)
    assert type(out) is type(q)
    batch = SimpleNamespace(qo_len=(1,), gathered=lambda request: (host[0][3:4], *host[1:]))
    oracle.check_all(batch, Formula(window_left=99), back(out)[None], back(lse)[None])


KV_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_single_requests_of_cupy(cp: Any, rng: np.random.Generator, kv_dtype: str) -> None:
    host = tensors(rng, kv_dtype)
    check_single(tuple(map(to_gpu, host)), host, to_host)
    with cp.cuda.Stream(non_blocking=True):
        check_single(tuple(map(to_gpu, host)), host, to_host)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_single_requests_of_torch(
    cp: Any, torch: Any, rng: np.random.Generator, kv_dtype: str
) -> None:
    host = tensors(rng, kv_dtype)

    def to_torch(x: np.ndarray) -> Any:
        bits = torch.from_numpy(x.view("i2" if x.itemsize == 2 else "u1"))
        return bits.cuda().view(getattr(torch, x.dtype.name))

    check_single(tuple(map(to_torch, host)), host, take)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_single_requests_of_jax(cp: Any, jax: Any, rng: np.random.Generator, kv_dtype: str) -> None:
    host = tensors(rng, kv_dtype)
    check_single(tuple(on_device(jax, x) for x in host), host, np.asarray)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float8_of_jax_comes_as_itself(cp: Any, jax: Any, dtype: str) -> None:
    bits = np.arange(256, dtype=np.uint8)
    x = on_device(jax, bits.view(DTYPES[dtype]))
    array = arrays.import_tensor(x, "k cache")
    assert isinstance(array, cp.ndarray)
    assert array.dtype == DTYPES[dtype]
    assert array.data.ptr == x.unsafe_buffer_pointer()
    np.testing.assert_array_equal(array.view(np.uint8).get(), bits)
