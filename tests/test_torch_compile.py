"""`run()` inside of `torch.compile`: one operator, and no break of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import batches
import numpy as np
import oracle
import pytest
from oracle import Formula

import cupaged

CAUSAL = Formula(causal=True)
ON = ["host", pytest.param("gpu", marks=pytest.mark.gpu)]
COMPILERS = ["eager", "aot_eager"]


@pytest.fixture
def pytorch(request: pytest.FixtureRequest) -> Iterator[Any]:
    """PyTorch, whose compiler forgets what it has seen."""
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    yield torch
    torch._dynamo.reset()


def on_torch(torch: Any, on: str, x: np.ndarray) -> Any:
    bits = torch.from_numpy(np.ascontiguousarray(x).view(np.int16).copy())
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[x.dtype.name]
    return bits.to("cuda" if on == "gpu" else "cpu").view(dtype)


def to_numpy(torch: Any, x: Any) -> np.ndarray:
    if x.dtype == torch.bfloat16:
        return x.cpu().view(torch.int16).numpy().view("bfloat16")
    return x.cpu().numpy()


def planned(batch: batches.Batch, on: str, formula: Formula = CAUSAL) -> Any:
    backend = "cuda" if on == "gpu" else "reference"
    wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend=backend)
    batch.plan(wrapper, **formula.plan_options)
    return wrapper


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("cache_form", ["tuple", "stacked"])
def test_a_compiled_call(
    rng: np.random.Generator, pytorch: Any, compiler: str, cache_form: str, on: str
) -> None:
    sinks = rng.standard_normal(4).astype(np.float32)
    formula = Formula(causal=True, q_scale=0.5, k_scale=0.7, v_scale=2.0, sinks=sinks)
    batch = batches.build(
        rng, [5, 1, 70], [70, 33, 90], num_kv_heads=2, group=2, cache_form=cache_form
    )
    wrapper = planned(batch, on, formula)

    def call(q: Any, *cache: Any) -> Any:
        whole = cache[0] if len(cache) == 1 else cache
        out, lse = wrapper.run(
            q * 1.0, whole, return_lse=True, q_scale=0.5, k_scale=0.7, v_scale=2.0,
            sinks=pytorch.from_numpy(sinks).to(q.device),
        )  # fmt: skip
        return out * 1.0, lse

    parts = [batch.cache] if cache_form == "stacked" else batch.keys_and_values()
    q, *cache = (on_torch(pytorch, on, x) for x in (batch.q, *parts))
    compiled = pytorch.compile(call, backend=compiler, fullgraph=True)
    for _ in range(3):
        out, lse = compiled(q, *cache)
    oracle.check_all(batch, formula, to_numpy(pytorch, out), lse.cpu().numpy())


@pytest.mark.parametrize("on", ON)
def test_results_into_given_tensors_and_another_plan(
    rng: np.random.Generator, pytorch: Any, on: str
) -> None:
    wrapper = None

    def call(q: Any, k: Any, v: Any, out: Any) -> Any:
        wrapper.run(q, (k, v), out=out)
        return out + 0.0

    compiled = pytorch.compile(call, backend="aot_eager", fullgraph=True)
    for lengths in ([70, 33], [20, 150], [20, 150, 8]):
        batch = batches.build(rng, [5] * len(lengths), lengths, num_kv_heads=2, cache_form="tuple")
        if wrapper is None:
            wrapper = planned(batch, on)
        else:
            batch.plan(wrapper, causal=True)
        q, k, v = (on_torch(pytorch, on, x) for x in (batch.q, *batch.keys_and_values()))
        out = pytorch.full_like(q, float("nan"))
        result = compiled(q, k, v, out)
        assert pytorch.equal(result, out)
        oracle.check_all(batch, CAUSAL, to_numpy(pytorch, out))


@pytest.mark.parametrize("on", ON)
def test_decoding_and_rows_without_pages(rng: np.random.Generator, pytorch: Any, on: str) -> None:
    backend = "cuda" if on == "gpu" else "reference"
    batch = batches.build(rng, [1, 1], [70, 33], num_kv_heads=2, cache_form="tuple")
    decode = cupaged.BatchDecodeWithPagedKVCacheWrapper(backend=backend)
    _, indptr, indices, last_page_len = batch.index_arrays
    decode.plan(indptr, indices, last_page_len, *batch.geometry)
    q, k, v = (on_torch(pytorch, on, x) for x in (batch.q, *batch.keys_and_values()))
    compiled = pytorch.compile(
        lambda q, k, v: decode.run(q, (k, v)) + 0.0, backend="eager", fullgraph=True
    )
    oracle.check_all(batch, Formula(), to_numpy(pytorch, compiled(q, k, v)))

    ragged = cupaged.BatchPrefillWithRaggedKVCacheWrapper(backend=backend)
    rows = [batch.gathered(r) for r in range(2)]
    ragged.plan([0, 1, 2], [0, 70, 103], 2, 2, 64)
    k, v = (on_torch(pytorch, on, np.concatenate([row[i] for row in rows])) for i in (1, 2))
    compiled = pytorch.compile(
        lambda q, k, v: ragged.run(q, k, v) + 0.0, backend="eager", fullgraph=True
    )
    oracle.check_all(batch, Formula(), to_numpy(pytorch, compiled(q, k, v)))


def test_an_error_inside_names_the_argument(rng: np.random.Generator, pytorch: Any) -> None:
    batch = batches.build(rng, [5], [70], num_kv_heads=2, cache_form="tuple")
    wrapper = planned(batch, "host")
    q, k, v = (on_torch(pytorch, "host", x) for x in (batch.q, *batch.keys_and_values()))
    compiled = pytorch.compile(lambda q: wrapper.run(q, (k, v)), backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"^q has 4 rows, expected 5 = "):
        compiled(q[1:])


REFUSED = {
    "return_lse, a str": ({"return_lse": "yes"}, "return_lse is a str, expected a bool"),
    "return_lse, an int": ({"return_lse": 1}, "return_lse is an int, expected a bool"),
    "a scale, a bool": ({"k_scale": True}, "k_scale is a bool, expected a number"),
    "a scale, a str": ({"v_scale": "1"}, "v_scale is a str, expected a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_schema_would_convert_is_refused(
    rng: np.random.Generator, pytorch: Any, case: str
) -> None:
    options, message = REFUSED[case]
    batch = batches.build(rng, [5], [70], num_kv_heads=2, cache_form="tuple")
    wrapper = planned(batch, "host")
    q, k, v = (on_torch(pytorch, "host", x) for x in (batch.q, *batch.keys_and_values()))

    def call(q: Any) -> Any:
        return wrapper.run(q, (k, v), **options)

    for function in (call, pytorch.compile(call, backend="eager")):
        with pytest.raises(TypeError, match=f"^{message}"):
            function(q)
    pytorch._dynamo.reset()
    with pytest.raises(pytorch._dynamo.exc.Unsupported, match=message):
        pytorch.compile(call, backend="eager", fullgraph=True)(q)


@pytest.mark.parametrize("form", [tuple, list])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_other_than_two_arrays_are_refused(
    rng: np.random.Generator, pytorch: Any, form: type, count: int
) -> None:
    """One stacked array in a tuple too, as without the compiler."""
    batch = batches.build(rng, [5], [70], num_kv_heads=2, cache_form="stacked")
    wrapper = planned(batch, "host")
    q, cache = (on_torch(pytorch, "host", x) for x in (batch.q, batch.cache))
    compiled = pytorch.compile(
        lambda q, c: wrapper.run(q, form([c] * count)), backend="eager", fullgraph=True
    )
    with pytest.raises(ValueError, match=rf"^paged_kv_cache has {count} arrays, expected two: "):
        compiled(q, cache)


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("given", [False, True], ids=["", "out"])
def test_scales_that_are_arrays_of_one_element(
    rng: np.random.Generator, pytorch: Any, given: bool, compiler: str, on: str
) -> None:
    batch = batches.build(rng, [5], [70], num_kv_heads=2, cache_form="tuple")
    wrapper = planned(batch, on)
    q, k, v = (on_torch(pytorch, on, x) for x in (batch.q, *batch.keys_and_values()))

    def call(q: Any, k_scale: Any, v_scale: Any) -> Any:
        out = pytorch.empty_like(q) if given else None
        return wrapper.run(q, (k, v), q_scale=0.5, k_scale=k_scale, v_scale=v_scale, out=out) + 0.0

    compiled = pytorch.compile(call, backend=compiler, fullgraph=True)
    for number in (0.25, 1.5):
        formula = Formula(causal=True, q_scale=0.5, k_scale=number, v_scale=2.0)
        for scales in (
            (pytorch.tensor(number), pytorch.tensor([2.0], device=q.device, requires_grad=True)),
            (np.float32(number), np.array([2])),
            (np.float64(number), 2),
        ):
            out = compiled(q, *scales)
            assert not out.requires_grad
            assert pytorch.equal(out, call(q, *scales))
            oracle.check_all(batch, formula, to_numpy(pytorch, out))


def test_a_scale_that_is_no_single_number(rng: np.random.Generator, pytorch: Any) -> None:
    batch = batches.build(rng, [5], [70], num_kv_heads=2, cache_form="tuple")
    wrapper = planned(batch, "host")
    q, k, v = (on_torch(pytorch, "host", x) for x in (batch.q, *batch.keys_and_values()))
    compiled = pytorch.compile(
        lambda q, scale: wrapper.run(q, (k, v), k_scale=scale), backend="eager", fullgraph=True
    )
    for scale in (pytorch.ones(2), pytorch.tensor(True)):
        with pytest.raises(TypeError, match=r"^k_scale is a Tensor, expected a number$"):
            compiled(q, scale)
    with pytest.raises(ValueError, match=r"^k_scale = nan, expected a finite number$"):
        compiled(q, pytorch.tensor(float("nan")))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_gradients_as_without_the_compiler(
    rng: np.random.Generator, pytorch: Any, compiler: str
) -> None:
    batch = batches.build(rng, [5], [70], num_kv_heads=2, cache_form="tuple")
    wrapper = planned(batch, "host")
    q, k, v = (on_torch(pytorch, "host", x) for x in (batch.q, *batch.keys_and_values()))
    q.requires_grad_()
    k.requires_grad_()

    def call(q: Any) -> Any:
        return wrapper.run(q * 1.0, (k, v))

    out = pytorch.compile(call, backend=compiler, fullgraph=True)(q)
    assert not call(q).requires_grad
    assert not out.requires_grad
    oracle.check_all(batch, CAUSAL, to_numpy(pytorch, out))


def test_the_compiler_records_no_plan(rng: np.random.Generator, pytorch: Any) -> None:
    """CUDA graphs that it makes by itself leave the operators out."""
    if not hasattr(pytorch.Tag, "cudagraph_unsafe"):
        pytest.skip(f"PyTorch {pytorch.__version__} has no such tag")
    planned(batches.build(rng, [5], [70], num_kv_heads=2), "host")
    for operator in (pytorch.ops.cupaged.run, pytorch.ops.cupaged.run_into):
        assert pytorch.Tag.cudagraph_unsafe in operator.default.tags
