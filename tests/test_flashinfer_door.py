"""Names that FlashInfer's programs use beside the wrappers, on the reference backend."""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import replace
from typing import Any

import batches
import decode_calls
import numpy as np
import oracle
import pytest
from oracle import Formula
from small_call import SPEAKS_DLPACK, check_error, pages, plan_arguments, run_arguments

import cupaged

Sink = cupaged.BatchAttentionWithAttentionSinkWrapper
TOLD: dict[str, Any] = {
    "backend": "reference",
    "q_data_type": "float16",
    "kv_data_type": "float16",
    "head_dim_qk": 64,
    "head_dim_vo": 64,
}


def table(batch: batches.Batch) -> tuple[Any, ...]:
    return batch.index_arrays[1:]


def shape_of(batch: batches.Batch) -> tuple[int, int, int, int]:
    return (batch.num_qo_heads, batch.num_kv_heads, batch.head_dim, batch.page_size)


@pytest.mark.parametrize("window_left", [-1, 9])
@pytest.mark.parametrize(("planned_scale", "given_scale"), [(None, 0.3), (0.3, None), (0.2, 0.2)])
def test_sink(
    rng: np.random.Generator,
    planned_scale: float | None,
    given_scale: float | None,
    window_left: int,
) -> None:
    batch = batches.build(rng, [5, 1, 0, 30], [70, 33, 4, 30])
    sink = rng.standard_normal(batch.num_qo_heads).astype(np.float32)
    told = TOLD | {"head_dim_qk": batch.head_dim, "head_dim_vo": batch.head_dim}
    wrapper = Sink(**told, window_left=window_left, kv_layout=batch.kv_layout)
    wrapper.plan(
        *(batch.qo_indptr, *table(batch), *shape_of(batch)),
        causal=True,
        sm_scale=planned_scale,
        window_left=window_left,
    )
    out, lse = wrapper.run(
        batch.q, batch.cache, sink, given_scale, k_scale=0.5, q_scale=2.0, return_lse=True
    )
    scale = planned_scale if given_scale is None else given_scale
    formula = Formula(
        causal=True, sm_scale=scale, k_scale=0.5, q_scale=2.0, sinks=sink, window_left=window_left
    )
    oracle.check_all(batch, formula, out, lse)


SINK_PLAN_ERRORS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"q_data_type": "bfloat16", "kv_data_type": "bfloat16"},
        {},
        "q_data_type = float16, expected bfloat16 as the constructor was told",
    ),
    (
        {"kv_data_type": "float8_e5m2"},
        {},
        "kv_data_type = float16, expected float8_e5m2 as the constructor was told",
    ),
    ({"head_dim_qk": 128}, {}, "head_dim_qk = 64, expected 128 as the constructor was told"),
    ({"head_dim_vo": 128}, {}, "head_dim_vo = 64, expected 128 as the constructor was told"),
    (
        {"pos_encoding_mode": "ALIBI"},
        {},
        "pos_encoding_mode = NONE, expected ALIBI as the constructor was told",
    ),
    (
        {},
        {"window_left": 3},
        "window_left = 3, expected -1: the constructor was told of no window",
    ),
    (
        {"window_left": 3},
        {},
        "window_left = -1, expected at least 0: the constructor was told of a window",
    ),
]


@pytest.mark.parametrize(("told", "plan", "message"), SINK_PLAN_ERRORS)
def test_sink_is_planned_as_the_constructor_was_told(
    told: dict[str, Any], plan: dict[str, Any], message: str
) -> None:
    wrapper = Sink(**TOLD | told)
    check_error(ValueError, message, wrapper.plan, **plan_arguments(**plan))
    check_error(
        *(RuntimeError, "run() before plan()", wrapper.run),
        **run_arguments(sink=np.zeros(4, np.float32), sm_scale=1.0),
    )


SINK_RUN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sink": None}, TypeError, "sink is None, expected a float32 array [num_qo_heads]"),
    ({"sinks": np.zeros(4, np.float32)}, ValueError, "sink and sinks exclude each other"),
    (
        {"sink": np.zeros(2, np.float32)},
        ValueError,
        "sinks has shape (2,), expected (num_qo_heads=4,)",
    ),
    ({"sm_scale": 0.5}, ValueError, "sm_scale = 0.5, expected 0 as planned"),
    ({"sm_scale": "a"}, TypeError, "sm_scale is a str, expected a number"),
]


@pytest.mark.parametrize(("changes", "error", "message"), SINK_RUN_ERRORS)
def test_sink_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    wrapper = Sink(**TOLD)
    wrapper.plan(**plan_arguments(sm_scale=0.0))
    arguments = run_arguments(sink=np.zeros(4, np.float32)) | changes
    check_error(error, message, wrapper.run, **arguments)


def test_forward_has_no_sink() -> None:
    """FlashInfer's has no argument for it either."""
    wrapper = Sink(**TOLD)
    wrapper.plan(**plan_arguments())
    message = (
        "forward() has no sink: call run(q, paged_kv_cache, sink), and give other features to "
        "plan()"
    )
    for call in (wrapper.forward, wrapper.forward_return_lse):
        check_error(NotImplementedError, message, call, **run_arguments())
        check_error(NotImplementedError, message, call, **run_arguments(), causal=True)


def test_sink_of_fp16_accumulation() -> None:
    check_error(
        NotImplementedError,
        "BatchAttentionWithAttentionSinkWrapper: use_fp16_qk_reduction=True is not served by any "
        "backend",
        Sink,
        use_fp16_qk_reduction=True,
    )


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("stacked", [False, True])
def test_pages_of_one_token_without_its_axis(
    rng: np.random.Generator, stacked: bool, kv_layout: str
) -> None:
    """FlashInfer's callers leave the axis of the tokens out where a page has one."""
    form = "stacked" if stacked else "tuple"
    batch = batches.build(rng, [3, 1], [20, 7], page_size=1, kv_layout=kv_layout, cache_form=form)
    wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper(kv_layout=kv_layout, backend="reference")
    wrapper.plan(batch.qo_indptr, *table(batch), *shape_of(batch))
    axis = -3 if kv_layout == "NHD" else -2
    cache = batch.cache
    flat = cache.squeeze(axis) if stacked else tuple(x.squeeze(axis) for x in cache)
    oracle.check_all(batch, Formula(), *wrapper.run(batch.q, flat, return_lse=True))


def test_pages_of_two_tokens_have_their_axis() -> None:
    wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend="reference")
    wrapper.plan(**plan_arguments(page_size=2, paged_kv_last_page_len=[1, 2, 0]))
    check_error(
        ValueError,
        "k cache has shape (5, 2, 64); kv_layout='NHD' expects (num_pages, page_size=2, "
        "num_kv_heads=2, head_dim=64)",
        wrapper.run,
        **run_arguments(paged_kv_cache=(pages(5, 2, 64), pages(5, 2, 64))),
    )


def with_prefix(
    rng: np.random.Generator, batch: batches.Batch, prefix_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """K and V of a prefix, in the batch's layout."""
    shape = (prefix_len, batch.num_kv_heads, batch.head_dim)
    k, v = (rng.standard_normal(shape).astype(batch.q.dtype) for _ in range(2))
    if batch.kv_layout == "HND":
        return np.ascontiguousarray(k.swapaxes(0, 1)), np.ascontiguousarray(v.swapaxes(0, 1))
    return k, v


def check_prefix(
    batch: batches.Batch, shared: tuple[np.ndarray, np.ndarray], out: np.ndarray, formula: Formula
) -> None:
    """Every row sees the whole prefix, and then its request's own keys."""
    k, v = (x.swapaxes(0, 1) if batch.kv_layout == "HND" else x for x in shared)
    row = 0
    for request, rows in enumerate(batch.qo_len):
        q, own_k, own_v = batch.gathered(request)
        keys, values = np.concatenate([k, own_k]), np.concatenate([v, own_v])
        expected, _ = oracle.attend(q, keys, values, formula)
        # Each level is rounded once, and so is what they are merged to.
        step = 2 * oracle.UNIT_ROUNDOFF["float16"] * np.abs(values.astype(np.float64)).max()
        plain = oracle.plain_same_dtype(q, keys, values, formula)
        bound = oracle.tolerance(expected, plain) + step
        np.testing.assert_allclose(out[row : row + rows], expected, rtol=0, atol=bound)
        row += rows


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [False, True])
def test_shared_prefix_prefill(rng: np.random.Generator, causal: bool, kv_layout: str) -> None:
    batch = batches.build(rng, [5, 1, 9], [20, 33, 9], kv_layout=kv_layout)
    shared = with_prefix(rng, batch, 50)
    wrapper = cupaged.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(None, kv_layout)
    wrapper.reset_workspace_buffer(np.empty(1 << 20, np.uint8))
    wrapper.begin_forward(batch.qo_indptr, *table(batch), *shape_of(batch))
    out = wrapper.forward(batch.q, *shared, batch.cache, causal=causal, sm_scale=0.2)
    # A causal row sees the prefix whole: it is aligned to the bottom right.
    check_prefix(batch, shared, out, Formula(causal=causal, sm_scale=0.2))


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_shared_prefix_decode(rng: np.random.Generator, kv_layout: str) -> None:
    batch = batches.build(rng, [1, 1, 1], [20, 33, 9], kv_layout=kv_layout)
    shared = with_prefix(rng, batch, 50)
    wrapper = cupaged.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(None, kv_layout)
    wrapper.reset_workspace_buffer(np.empty(1 << 20, np.uint8))
    wrapper.begin_forward(*table(batch), *shape_of(batch))
    out = wrapper.forward(batch.q, *shared, batch.cache)
    check_prefix(batch, shared, out, Formula())


def test_a_call_with_a_shared_prefix_is_as_if_it_were_the_first(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [5, 1, 9], [20, 33, 9])
    shared = with_prefix(rng, batch, 50)
    wrapper = cupaged.BatchPrefillWithSharedPrefixPagedKVCacheWrapper()
    wrapper.begin_forward(batch.qo_indptr, *table(batch), *shape_of(batch))
    for options in ({}, {"sm_scale": 0.5}, {}, {"causal": True}, {}):
        out = wrapper.forward(batch.q, *shared, batch.cache, **options)
        check_prefix(batch, shared, out, Formula(**{"causal": False, **options}))


def test_shared_prefix_rotates_nothing(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [1], [4])
    wrapper = cupaged.BatchPrefillWithSharedPrefixPagedKVCacheWrapper()
    call = functools.partial(wrapper.forward, batch.q, *with_prefix(rng, batch, 3), batch.cache)
    check_error(RuntimeError, "run() before plan()", call)
    wrapper.begin_forward(batch.qo_indptr, *table(batch), *shape_of(batch))
    check_error(
        *(ValueError, "rope_theta = 10.0 with pos_encoding_mode='NONE', expected 'ROPE_LLAMA'"),
        *(call,),
        rope_theta=10.0,
    )


def test_fast_plan(rng: np.random.Generator) -> None:
    """In the place of a wrapper's plan(), with another indptr on the host."""
    batch = batches.build(rng, [1, 1, 1], [20, 33, 9])
    wrapper = decode_calls.Decode(kv_layout=batch.kv_layout, backend="reference")
    wrapper.plan = functools.partial(cupaged.fast_decode_plan, wrapper)  # type: ignore[method-assign]
    indptr, indices, last_page_len = table(batch)
    formula = Formula(sm_scale=0.4, window_left=12)
    wrapper.plan(
        *(np.zeros_like(indptr), indices, last_page_len, *shape_of(batch)),
        sm_scale=0.4,
        window_left=12,
        global_override_indptr_cpu=indptr,
    )
    oracle.check_all(batch, formula, *wrapper.run(batch.q, batch.cache, return_lse=True))
    plain = replace(formula, window_left=-1)
    wrapper.plan(indptr, indices, last_page_len, *shape_of(batch), sm_scale=0.4)
    oracle.check_all(batch, plain, *wrapper.run(batch.q, batch.cache, return_lse=True))


def test_fast_plan_takes_what_plan_takes() -> None:
    plan = inspect.signature(decode_calls.Decode.plan).parameters
    fast = inspect.signature(cupaged.fast_decode_plan).parameters
    assert set(fast) - set(plan) == {"global_override_indptr_cpu"}
    # FlashInfer's has none of these.
    assert set(plan) - set(fast) == {"o_data_type", "block_tables", "seq_lens", "window_right"}
    for name in set(fast) & set(plan) - {"q_data_type"}:
        assert fast[name].default == plan[name].default, name


@pytest.mark.parametrize("told", [False, True])
def test_use_tensor_cores(told: bool) -> None:
    wrapper = decode_calls.Decode(use_tensor_cores=told, backend="reference")
    assert wrapper.use_tensor_cores is told


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        (3, TypeError, f"global_override_indptr_cpu is an int, {SPEAKS_DLPACK}"),
        (
            np.zeros(2),
            TypeError,
            "global_override_indptr_cpu has dtype float64, expected int32 or int64",
        ),
        ([1, 2], ValueError, "global_override_indptr_cpu[0] = 1, expected 0"),
        (
            [0, 2, 1],
            ValueError,
            "global_override_indptr_cpu[2] = 1 (end of request 1), expected at least 2 = "
            "global_override_indptr_cpu[1]",
        ),
    ],
)
def test_fast_plan_names_what_it_reads(override: Any, error: type[Exception], message: str) -> None:
    wrapper = decode_calls.Decode(backend="reference")
    arguments = ([0, 1], [0], [1], 4, 2, 64, 16)
    check_error(
        *(error, message, cupaged.fast_decode_plan, wrapper, *arguments),
        global_override_indptr_cpu=override,
    )


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("cascade", "MultiLevelCascadeAttentionWrapper merge_state merge_state_in_place"),
        ("cascade", "merge_states BatchDecodeWithSharedPrefixPagedKVCacheWrapper"),
        ("cascade", "BatchPrefillWithSharedPrefixPagedKVCacheWrapper"),
        ("decode", "BatchDecodeWithPagedKVCacheWrapper single_decode_with_kv_cache"),
        ("decode", "CUDAGraphBatchDecodeWithPagedKVCacheWrapper fast_decode_plan"),
        ("page", "append_paged_kv_cache get_batch_indices_positions get_seq_lens"),
        ("prefill", "BatchPrefillWithPagedKVCacheWrapper BatchPrefillWithRaggedKVCacheWrapper"),
        ("prefill", "single_prefill_with_kv_cache single_prefill_with_kv_cache_return_lse"),
        ("quantization", "packbits segment_packbits"),
    ],
)
def test_names_are_found_in_flashinfers_modules(module: str, names: str) -> None:
    room = importlib.import_module(f"cupaged.{module}")
    for name in names.split():
        assert getattr(room, name) is getattr(cupaged, name)
    with pytest.raises(AttributeError, match=rf"^module 'cupaged.{module}' has no attribute 'no'"):
        _ = room.no
