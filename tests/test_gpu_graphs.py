"""CUDA graphs: a run is recorded once, with CuPy or PyTorch, and follows one plan after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import batches
import numpy as np
import oracle
import pytest
from decode_calls import DECODING, Decoder
from gpu_calls import Wrapper, same_bits, told
from graph_calls import (
    MOST,
    OPTIONS,
    PAGE_SIZE,
    PAGES,
    PREFILL_STEPS,
    ROWS,
    Framework,
    Layer,
    buffers_of,
    build,
    check_steps,
    graphed,
    put,
    steps_of,
    take,
    with_cupy,
    with_torch,
)
from oracle import Formula
from variant_calls import hiding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning"),
]
both_families = pytest.mark.usefixtures("family")


@pytest.fixture(params=["cupy", "torch"])
def of(cp: Any, request: pytest.FixtureRequest) -> Framework:
    """Each framework, one after the other."""
    if request.param == "cupy":
        return with_cupy(cp)
    return with_torch(request.getfixturevalue("torch"))


# Plans that follow a recorded run


@both_families
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize(("kind", "q_len"), [("decode", 1), ("decode", 9), ("prefill", 0)])
def test_a_recorded_run_follows_every_plan(
    of: Framework,
    rng: np.random.Generator,
    kind: str,
    q_len: int,
    given: bool,
    options: dict[str, Any],
) -> None:
    """Longer and shorter, as many requests and fewer, none, no keys; buffers as planned."""
    buffers = buffers_of(of, kind) if given else None
    wrapper = graphed(kind, q_len, buffers)

    def check_buffers(batch: batches.Batch) -> None:
        planned = batch.index_arrays[1 if kind == "decode" else 0 :]
        for buffer, values in zip((buffers or {}).values(), planned, strict=given):
            np.testing.assert_array_equal(take(buffer)[: len(values)], values)

    steps = [build(rng, step, group=4, head_dim=128) for step in steps_of(kind, q_len)]
    check_steps(of, wrapper, steps, Formula(causal=True), check_buffers, **options)


@both_families
@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize(
    ("kv_layout", "cache_form", "dtype"),
    [("NHD", "stacked", "bfloat16"), ("HND", "tuple", "bfloat16"), ("HND", "stacked", "float16")],
)
def test_layouts_and_dtypes(
    of: Framework,
    rng: np.random.Generator,
    kind: str,
    kv_layout: str,
    cache_form: str,
    dtype: str,
) -> None:
    wrapper = graphed(kind, kv_layout=kv_layout)
    shape = {"kv_layout": kv_layout, "cache_form": cache_form, "dtype": dtype, "group": 3}
    steps = [build(rng, step, **shape) for step in steps_of(kind)]
    formula = Formula(True, 0.2, q_scale=0.5, k_scale=1.5, v_scale=-3.0, lse_base="ln")
    check_steps(of, wrapper, steps, formula)


@both_families
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["mask", "mask and window", "causal window"])
def test_keys_that_no_row_sees(
    of: Framework, rng: np.random.Generator, name: str, options: dict[str, Any]
) -> None:
    """Others with every plan. They and their values are NaN."""
    buffers = {}
    if name.startswith("mask"):
        buffers["custom_mask_buf"] = of.empty((ROWS * PAGES * PAGE_SIZE,), "uint8")
        buffers["mask_indptr_buf"] = of.empty((MOST + 1,), "int32")
    wrapper = graphed("prefill", **buffers)
    first = build(rng, PREFILL_STEPS[0], group=4, head_dim=128)
    first.plan(wrapper, **hiding(rng, name, first).plan_options, **options)
    layer = Layer(of, first)
    replay = layer.record(of, wrapper)
    for step in PREFILL_STEPS:
        batch = build(rng, step, group=4, head_dim=128)
        formula = hiding(rng, name, batch)
        with told(step):
            batch.plan(wrapper, **formula.plan_options, **options)
            hidden = batch.with_hidden_keys(formula)
            layer.put(hidden)
            replay()
            layer.check(hidden, formula)


@both_families
@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("options", OPTIONS)
def test_twenty_random_plans_in_a_row(
    of: Framework, rng: np.random.Generator, kind: str, options: dict[str, Any]
) -> None:
    q_len = int(rng.integers(1, 9))
    steps = []
    for _ in range(21):
        count = int(rng.integers(0, MOST + 1))
        longest = int(rng.choice([20, 400, PAGES * PAGE_SIZE // (MOST + 1)]))
        kv_len = rng.integers(0, longest, count)
        qo_len = rng.integers(0, ROWS // MOST, count) if kind == "prefill" else [q_len] * count
        steps.append(list(zip(map(int, qo_len), map(int, kv_len), strict=True)))
    if kind == "prefill":  # a plan has no more rows than the first one had, which is recorded
        steps.sort(key=lambda step: -sum(qo_len for qo_len, _ in step))
        steps[1:] = [steps[i] for i in rng.permutation(np.arange(1, len(steps)))]
    wrapper = graphed(kind, q_len)
    check_steps(of, wrapper, [build(rng, step, group=4) for step in steps], DECODING, **options)


@both_families
def test_a_cache_without_tensor_maps(of: Framework, rng: np.random.Generator) -> None:
    """Other kernels serve it, which an eager run before the recording has loaded."""
    steps = [build(rng, step, group=2, cache_form="strided") for step in PREFILL_STEPS]
    wrapper = graphed("prefill")
    formula = Formula(causal=True)
    steps[0].plan(wrapper, causal=True)
    layer = Layer(of, steps[0])
    layer.put(steps[0])
    layer.run(wrapper, formula)
    layer.check(steps[0], formula)
    check_steps(of, wrapper, steps, formula)


@both_families
@pytest.mark.parametrize(("kind", "q_len"), [("decode", 1), ("decode", 9), ("prefill", 0)])
def test_kernels_read_the_callers_page_table(
    of: Framework, rng: np.random.Generator, kind: str, q_len: int
) -> None:
    """Pages that are exchanged on the device, behind the library's back."""
    buffers = buffers_of(of, kind)
    wrapper = graphed(kind, q_len, buffers)
    batch = build(rng, [(q_len or 40, 100), (q_len or 3, 90)], group=4)
    batch.plan(wrapper, causal=True)
    layer = Layer(of, batch)
    replay = layer.record(of, wrapper)
    layer.put(batch)
    replay()
    layer.check(batch)
    # The second request's full pages become the first's.
    exchanged = replace(batch, pages=(batch.pages[0], (*batch.pages[0][:5], batch.pages[1][5])))
    table = next(buffers[name] for name in buffers if "indices" in name)
    values = take(table)
    values[: len(exchanged.paged_kv_indices)] = exchanged.paged_kv_indices
    put(table, values)
    layer.put(exchanged)
    replay()
    layer.check(exchanged)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_layers_in_one_graph(of: Framework, rng: np.random.Generator, kind: str) -> None:
    """One plan, several runs over caches of their own; each replay reads what is there then."""
    wrapper = graphed(kind, 2)
    first = steps_of(kind, 2)[0]
    layers = [Layer(of, build(rng, first)) for _ in range(3)]
    build(rng, first).plan(wrapper, causal=True)
    replay = of.record(lambda: [layer.run(wrapper) for layer in layers])
    for step in steps_of(kind, 2):
        batch = build(rng, step)
        batch.plan(wrapper, causal=True)
        tensors = [replace(build(rng, step), pages=batch.pages) for _ in layers]
        for tensor in tensors:  # each with other values where the planned pages are
            for view in tensor.cache_views:
                view.storage[...] = rng.standard_normal(view.storage.shape)
        for layer, tensor in zip(layers, tensors, strict=True):
            layer.put(tensor)
        replay()
        for layer, tensor in zip(layers, tensors, strict=True):
            layer.check(tensor)


def test_outputs_that_torch_allocates_while_it_records(
    torch: Any, cp: Any, rng: np.random.Generator
) -> None:
    of = with_torch(torch)
    wrapper = graphed("decode")
    steps = [build(rng, [(1, n) for n in kv_len]) for kv_len in ([300, 20, 7], [9], [2000, 0, 1])]
    layer = Layer(of, steps[0], rows=3)
    steps[0].plan(wrapper)
    found: list[Any] = []
    replay = of.record(lambda: found.extend(wrapper.run(layer.q, layer.cache, return_lse=True)))
    out, lse = found
    others = [torch.full_like(out, torch.nan) for _ in range(8)]
    for batch in steps:
        batch.plan(wrapper)
        layer.put(batch)
        replay()
        oracle.check_all(batch, DECODING, take(out)[: batch.nnz_qo], take(lse)[: batch.nnz_qo])
    assert all(other.isnan().all().item() for other in others)


def test_bits_are_those_of_a_run_that_is_not_recorded(
    of: Framework, rng: np.random.Generator
) -> None:
    for kind, options in (("decode", OPTIONS[1]), ("prefill", OPTIONS[1]), ("prefill", OPTIONS[2])):
        batch = build(rng, steps_of(kind)[0], group=4)
        results = []
        for use_cuda_graph in (False, True):
            wrapper: Any = Decoder() if kind == "decode" else Wrapper()
            if use_cuda_graph:
                wrapper = graphed(kind)
            batch.plan(wrapper, causal=True, **options)
            layer = Layer(of, batch, rows=batch.nnz_qo)
            replay = layer.record(of, wrapper) if use_cuda_graph else None
            layer.put(batch)
            layer.run(wrapper) if replay is None else replay()
            results.append(layer.result())
        assert same_bits(*results)
