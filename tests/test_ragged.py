"""Keys and values without pages, on the reference backend: results, arguments, and every error."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any

import batches
import numpy as np
import oracle
import pytest
import ragged_calls
import strategies
from hypothesis import given
from hypothesis import strategies as st
from oracle import Formula
from ragged_calls import Ragged, Wrapper
from small_call import INT_MAX, SPEAKS_DLPACK, check_error, ints

import cupaged

LAYOUTS = ("NHD", "HND")


def mixed(rng: np.random.Generator, **options: Any) -> batches.Batch:
    """Requests of every tile shape, with more keys than queries and fewer, with none of either."""
    qo_len, kv_len = [3, 70, 1, 0, 40, 5, 2], [200, 300, 130, 20, 25, 2, 0]
    return batches.build(
        rng, qo_len, kv_len, **{"group": 3, "num_kv_heads": 2, "page_size": 8, **options}
    )


def attention(
    batch: batches.Batch, formula: Formula, *, plan: dict[str, Any] | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Plan, run into poisoned arrays; out and LSE."""
    ragged = Ragged(batch.kv_layout, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cupaged.CupagedWarning)
        batch.plan(ragged, **formula.plan_options, **(plan or {}))
    out, lse = batch.poisoned_out().array, batch.poisoned_lse().array
    ragged.run(batch.q, batch.cache, out=out, lse=lse, **formula.run_options)
    return out, lse


# Results


@given(
    strategies.calls(variants=True),
    st.sampled_from([0, 0, 1, 7]),
    st.sampled_from(LAYOUTS),
    st.sampled_from(ragged_calls.FORMS),
)
def test_random_calls_equal_the_formula(
    call: strategies.Call, gap: int, kv_layout: str, form: str
) -> None:
    """All features at once; rows between requests are NaN, and so are keys that no row sees."""
    strategies.check_call(call, Ragged(call.build_options["kv_layout"], gap, kv_layout, form))


@pytest.mark.parametrize("plan", [{}, {"disable_split_kv": True}])
def test_it_is_attention_over_pages(rng: np.random.Generator, plan: dict[str, Any]) -> None:
    """Bit for bit: it is the same planner and the same kernels."""
    for options in ({"head_dim": 192, "head_dim_vo": 128}, {"kv_dtype": "float8_e5m2"}):
        batch, formula = mixed(rng, **options), Formula(causal=True, window_left=90)
        paged = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend="reference")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cupaged.CupagedWarning)
            batch.plan(paged, **formula.plan_options, **plan)
        out, lse = paged.run(batch.q, batch.cache, return_lse=True)
        for gap in (0, 3):
            found, found_lse = attention(batch, formula, plan=plan, gap=gap)
            assert found.tobytes() == out.tobytes()
            assert found_lse.tobytes() == lse.tobytes()


@pytest.mark.parametrize("tokens", [40, 64, 100])
def test_fixed_splits_are_of_tokens(rng: np.random.Generator, tokens: int) -> None:
    batch = batches.build(rng, [3, 70], [200, 300], page_size=1, group=2)
    ragged = Ragged("NHD")
    batch.plan(ragged, fixed_split_size=tokens)
    for launch in ragged.schedule.launches:
        assert (launch.items["kv_begin"] % tokens == 0).all()
        assert (launch.items["kv_end"] - launch.items["kv_begin"] <= tokens).all()
    oracle.check_all(batch, Formula(), *attention(batch, Formula(), plan={"fixed_split_size": 40}))


def test_requests_may_share_rows_and_come_in_any_order(rng: np.random.Generator) -> None:
    k, v = (rng.standard_normal((100, 2, 64)).astype(np.float16) for _ in range(2))
    q = rng.standard_normal((9, 4, 64)).astype(np.float16)
    wrapper = Wrapper(backend="reference")
    begins, kv_len = [60, 0, 70], [40, 80, 0]
    wrapper._plan_rows([0, 3, 8, 9], begins, kv_len, 4, 2, 64)
    out, lse = wrapper.run_return_lse(q, k, v)
    for rows, begin, count in zip((slice(3), slice(3, 8)), begins, kv_len, strict=False):
        own = slice(begin, begin + count)
        expected, expected_lse = oracle.attend(q[rows], k[own], v[own], Formula())
        plain = oracle.plain_same_dtype(q[rows], k[own], v[own], Formula())
        oracle.assert_close(out[rows], expected, plain, np.ones(rows.stop - (rows.start or 0), bool))
        oracle.assert_lse_close(lse[rows], expected_lse)
    assert (out[8] == 0).all()
    assert np.isneginf(lse[8]).all()


@pytest.mark.parametrize("kv_layout", LAYOUTS)
def test_read_only_views_and_lists_are_taken(rng: np.random.Generator, kv_layout: str) -> None:
    batch = mixed(rng)
    ragged = Ragged("NHD", kv_layout=kv_layout)
    with pytest.warns(cupaged.CupagedWarning):
        batch.plan(ragged, causal=True)
    k, v = (ragged.rows(x) for x in batch.cache)
    k.flags.writeable = v.flags.writeable = False
    wrapper = Wrapper(kv_layout=kv_layout)
    with pytest.warns(cupaged.CupagedWarning):
        wrapper.begin_forward(
            batch.qo_indptr.tolist(), ragged.begin.tolist(), 6, 2, 64, causal=True
        )
    oracle.check_all(batch, Formula(causal=True), wrapper.run(batch.q, k, v))


@pytest.mark.parametrize("qo_len", [[], [0, 0], [3, 1]])
def test_no_keys_at_all(rng: np.random.Generator, qo_len: list[int]) -> None:
    batch = batches.build(rng, qo_len, [0] * len(qo_len), group=2)
    out, lse = attention(batch, Formula())
    assert (out == 0).all()
    assert np.isneginf(lse).all()
    assert len(out) == sum(qo_len)


def test_a_plan_that_fails_leaves_the_earlier_one(rng: np.random.Generator) -> None:
    batch = mixed(rng)
    ragged = Ragged("NHD")
    batch.plan(ragged)
    before = ragged.run(batch.q, batch.cache)
    for changes in ({"kv_indptr": ints(0, 1)}, {"window_left": -2}, {"custom_mask": np.ones(3)}):
        with pytest.raises((ValueError, TypeError)):
            ragged.wrapper.plan(**plan_arguments(**changes))
    assert ragged.run(batch.q, batch.cache).tobytes() == before.tobytes()


def test_forward_takes_the_arguments_of_plan(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [3, 9], [40, 60], group=2)
    ragged = Ragged("NHD")
    batch.plan(ragged)
    k, v = (ragged.rows(x) for x in batch.cache)
    for formula, options in (
        (Formula(), {}),
        (Formula(causal=True), {"causal": True}),
        (Formula(causal=True, window_left=5), {"window_left": 5}),
    ):
        out, lse = ragged.wrapper.forward_return_lse(batch.q, k, v, **options)
        oracle.check_all(batch, formula, out, lse)
        again = ragged.wrapper.forward(batch.q, k, v)
        assert again.tobytes() == out.tobytes()


def test_explain_shows_the_plan(rng: np.random.Generator) -> None:
    ragged = Ragged("NHD")
    mixed(rng).plan(ragged)
    assert ragged.wrapper.explain().startswith("batch of 7 requests, full attention, float16")


# Warnings


def test_fewer_keys_than_queries_warns() -> None:
    """At the caller's line."""
    wrapper = Wrapper(backend="reference")
    with pytest.warns(cupaged.CupagedWarning) as found:
        wrapper.plan(ints(0, 3, 8), ints(0, 2, 7), 4, 2, 64, causal=True)
    (warning,) = found
    assert warning.filename == __file__
    assert str(warning.message) == (
        "request 0 has 3 queries and 2 keys: with causal=True its first 1 rows see no key, and "
        "will be 0. Are the queries' own keys and values in k and v, and counted in kv_indptr?"
    )
    with pytest.warns(cupaged.CupagedWarning) as found:
        wrapper._plan_rows(ints(0, 3), ints(0), ints(2), 4, 2, 64, causal=True)
    assert found[0].filename == __file__


# Arguments


def test_arguments_are_flashinfers() -> None:
    """In name and order; what is this library's own comes behind."""
    constructor = list(inspect.signature(Wrapper).parameters)
    assert constructor == [
        *("float_workspace_buffer", "kv_layout", "use_cuda_graph", "qo_indptr_buf"),
        *("kv_indptr_buf", "custom_mask_buf", "mask_indptr_buf", "backend", "jit_args"),
        *("jit_kwargs", "max_batch_size"),
    ]
    assert list(inspect.signature(Wrapper.plan).parameters)[1:] == [
        *("qo_indptr", "kv_indptr", "num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo"),
        *("custom_mask", "packed_custom_mask", "causal", "pos_encoding_mode"),
        *("use_fp16_qk_reduction", "window_left", "logits_soft_cap", "sm_scale", "rope_scale"),
        *("rope_theta", "q_data_type", "kv_data_type", "o_data_type", "non_blocking"),
        *("prefix_len_ptr", "token_pos_in_items_ptr", "token_pos_in_items_len"),
        *("max_item_len_ptr", "fixed_split_size", "disable_split_kv", "seq_lens", "seq_lens_q"),
        *("max_token_per_sequence", "max_sequence_kv", "v_indptr", "o_indptr", "uniform_q_len"),
    ]
    run = list(inspect.signature(Wrapper.run).parameters)[1:]
    assert run[:4] == ["q", "k", "v", "q_scale"]
    assert inspect.signature(Wrapper.run).parameters["q_scale"].kind.name == "KEYWORD_ONLY"
    assert list(inspect.signature(Wrapper.forward).parameters)[1:12] == [
        *("q", "k", "v", "causal", "pos_encoding_mode", "use_fp16_qk_reduction", "window_left"),
        *("logits_soft_cap", "sm_scale", "rope_scale", "rope_theta"),
    ]


# Errors


def plan_arguments(**changes: Any) -> dict[str, Any]:
    """Three requests: 3, 5 and 1 queries; 20, 16 and no keys."""
    return {
        "qo_indptr": ints(0, 3, 8, 9),
        "kv_indptr": ints(0, 20, 36, 36),
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim_qk": 64,
        **changes,
    }


def kv(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.zeros(shape or (36, 2, 64), dtype)


def run_arguments(**changes: Any) -> dict[str, Any]:
    return {"q": np.zeros((9, 4, 64), np.float16), "k": kv(), "v": kv(), **changes}


def planned(kv_layout: str = "NHD", **changes: Any) -> Wrapper:
    wrapper = Wrapper(backend="reference", kv_layout=kv_layout)
    wrapper.plan(**plan_arguments(**changes))
    return wrapper


PLAN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"qo_indptr": None}, TypeError, f"qo_indptr is None, {SPEAKS_DLPACK}"),
    ({"qo_indptr": ints(1, 3, 8, 9)}, ValueError, "qo_indptr[0] = 1, expected 0"),
    (
        {"qo_indptr": np.zeros((1, 4), np.int32)},
        ValueError,
        "qo_indptr has shape (1, 4), expected (batch + 1,)",
    ),
    (
        {"qo_indptr": ints(0, 3, 8, 2**28 + 1)},
        ValueError,
        "qo_indptr[3] = 268435457 query rows of 4 heads, "
        "expected at most 1073741824 rows times heads in a call",
    ),
    ({"kv_indptr": "rows"}, TypeError, f"kv_indptr is a str, {SPEAKS_DLPACK}"),
    (
        {"kv_indptr": np.array([0.0, 20, 36, 36])},
        TypeError,
        "kv_indptr has dtype float64, expected int32 or int64",
    ),
    (
        {"kv_indptr": ints(0, 20, 19, 36)},
        ValueError,
        "kv_indptr[2] = 19 (end of request 1), expected at least 20 = kv_indptr[1]",
    ),
    (
        {"kv_indptr": ints(0, 20)},
        ValueError,
        "kv_indptr has 2 entries, expected 4 = batch + 1: qo_indptr has 4 entries",
    ),
    (
        {"kv_indptr": ints(0, 20, 2**30 + 21, 2**30 + 21)},
        ValueError,
        "request 1 has 1073741825 keys, expected at most 1073741824",
    ),
    (
        {"kv_indptr": np.array([0, 20, 36, 2**31])},
        ValueError,
        f"kv_indptr[3] = 2147483648, expected at most {INT_MAX}",
    ),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads = 0, expected at least 1"),
    (
        {"head_dim_qk": 192},
        NotImplementedError,
        "head_dim_qk = 192, served are 64, 96, 128, 256",
    ),
    (
        {"head_dim_vo": 96},
        NotImplementedError,
        "head_dim_qk = 64 with head_dim_vo = 96, served are equal ones of 64, 96, 128, 256, and "
        "192/128",
    ),
    ({"causal": None}, TypeError, "causal is a NoneType, expected a bool"),
    ({"non_blocking": 1}, TypeError, "non_blocking is an int, expected a bool"),
    ({"fixed_split_size": 0}, ValueError, "fixed_split_size = 0, expected at least 1"),
    (
        {"fixed_split_size": 64, "disable_split_kv": True},
        ValueError,
        "fixed_split_size and disable_split_kv exclude each other",
    ),
    (
        {"custom_mask": np.ones(141, np.bool_)},
        ValueError,
        "custom_mask has shape (141,), expected (140,): the sum of qo_len * kv_len",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), PLAN_ERRORS)
def test_plan_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    wrapper = Wrapper(backend="reference")
    check_error(error, message, wrapper.plan, **plan_arguments(**changes))
    check_error(RuntimeError, "run() before plan()", wrapper.run, **run_arguments())


ROWS_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"kv_begin": ints(0, 20)},
        ValueError,
        "kv_begin has shape (2,), expected (3,): qo_indptr has 4 entries",
    ),
    (
        {"kv_len": ints(20, 16, 0, 0)},
        ValueError,
        "kv_len has shape (4,), expected (3,): qo_indptr has 4 entries",
    ),
    ({"kv_begin": ints(0, -1, 3)}, ValueError, "kv_begin[1] = -1, expected at least 0"),
    ({"kv_len": ints(20, 16, -5)}, ValueError, "kv_len[2] = -5, expected at least 0"),
    (
        {"kv_begin": np.array([0, 2**31 - 16, 0])},
        ValueError,
        f"kv_begin + kv_len = 2147483648, expected at most {INT_MAX}",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), ROWS_ERRORS)
def test_errors_of_rows(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    rows = {"kv_begin": ints(0, 20, 36), "kv_len": ints(20, 16, 0), **changes}
    arguments = plan_arguments(**rows)
    del arguments["kv_indptr"]
    check_error(error, message, Wrapper(backend="reference")._plan_rows, **arguments)


K_WORDS = "kv_layout='NHD' expects (nnz_kv, num_kv_heads=2, head_dim=64)"
RUN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": None}, TypeError, f"q is None, {SPEAKS_DLPACK}"),
    ({"k": None}, TypeError, f"k is None, {SPEAKS_DLPACK}"),
    ({"v": 3}, TypeError, f"v is an int, {SPEAKS_DLPACK}"),
    (
        {"q": np.zeros((8, 4, 64), np.float16)},
        ValueError,
        "q has 8 rows, expected 9 = qo_indptr[-1]",
    ),
    ({"k": kv(36, 4, 64)}, ValueError, f"k has shape (36, 4, 64); {K_WORDS}"),
    ({"v": kv(36, 2, 128)}, ValueError, f"v has shape (36, 2, 128); {K_WORDS}"),
    ({"k": kv(2, 36, 64)}, ValueError, f"k has shape (2, 36, 64); {K_WORDS}"),
    ({"k": kv(36, 128)}, ValueError, f"k has shape (36, 128); {K_WORDS}"),
    ({"k": kv(35, 2, 64)}, ValueError, "k has 35 rows, expected 36 = kv_indptr[-1]"),
    ({"v": kv(37, 2, 64)}, ValueError, "v has 37 rows, expected 36 = kv_indptr[-1]"),
    (
        {"k": kv(dtype=np.float32)},
        TypeError,
        "k is float32, expected kv_data_type = float16",
    ),
    ({"v": kv(dtype=np.uint8)}, TypeError, "v is uint8, expected kv_data_type = float16"),
    (
        {"v": kv(36, 2, 128)[..., ::2]},
        ValueError,
        "v has a stride of 2 elements on its last axis, expected 1: head_dim must be contiguous",
    ),
    (
        {"sinks": np.zeros(2, np.float32)},
        ValueError,
        "sinks has shape (2,), expected (num_qo_heads=4,)",
    ),
    ({"window_left": 4}, ValueError, "window_left = 4, expected -1 as planned"),
    ({"v_scale": "big"}, TypeError, "v_scale is a str, expected a number"),
]


@pytest.mark.parametrize(("changes", "error", "message"), RUN_ERRORS)
def test_run_errors_and_nothing_is_written(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    out, lse = np.full((9, 4, 64), 7, np.float16), np.full((9, 4), 7, np.float32)
    arguments = run_arguments(out=out, lse=lse) | changes
    check_error(error, message, planned().run, **arguments)
    assert (out == 7).all()
    assert (lse == 7).all()


def test_errors_name_the_layout_and_the_heads_of_k_and_v() -> None:
    check_error(
        ValueError,
        "k has shape (36, 2, 64); kv_layout='HND' expects (num_kv_heads=2, nnz_kv, head_dim=64)",
        planned("HND").run,
        **run_arguments(),
    )
    wide = planned(head_dim_qk=192, head_dim_vo=128)
    q, k = np.zeros((9, 4, 192), np.float16), kv(36, 2, 192)
    for changes, found in (({"k": kv(36, 2, 128)}, "qk=192"), ({"v": kv(36, 2, 192)}, "vo=128")):
        arguments = {"q": q, "k": k, "v": kv(36, 2, 128), **changes}
        ((name, array),) = changes.items()
        check_error(
            ValueError,
            f"{name} has shape {array.shape}; kv_layout='NHD' expects "
            f"(nnz_kv, num_kv_heads=2, head_dim_{found})",
            wide.run,
            **arguments,
        )


def test_rows_that_leave_others_out_need_as_many_as_the_last() -> None:
    wrapper = Wrapper(backend="reference")
    wrapper._plan_rows([0, 1, 2], [3, 50], [10, 0], 4, 2, 64)
    arguments = {"q": np.zeros((2, 4, 64), np.float16), "v": kv(13, 2, 64)}
    message = "k has 12 rows, expected at least 13 = the last row that is planned"
    check_error(ValueError, message, wrapper.run, k=kv(12, 2, 64), **arguments)
    message = "v has 13 rows, expected 40 as k does"
    check_error(ValueError, message, wrapper.run, k=kv(40, 2, 64), **arguments)
    wrapper.run(k=kv(13, 2, 64), **arguments)


def test_a_plan_of_all_rows_after_one_that_leaves_rows_out() -> None:
    wrapper = Wrapper(backend="reference")
    wrapper._plan_rows([0, 1, 2], [3, 50], [10, 0], 4, 2, 64)
    wrapper.plan(**plan_arguments())
    message = "k has 40 rows, expected 36 = kv_indptr[-1]"
    check_error(ValueError, message, wrapper.run, **run_arguments(k=kv(40, 2, 64)))


def test_run_before_plan() -> None:
    for call in ("run", "run_return_lse", "forward", "forward_return_lse"):
        check_error(
            RuntimeError, "run() before plan()", getattr(Wrapper(), call), **run_arguments()
        )


def test_values_of_one_head_dim_where_keys_have_another(rng: np.random.Generator) -> None:
    batch = mixed(rng, head_dim=192, head_dim_vo=128)
    out, lse = attention(batch, Formula(logits_soft_cap=8.0), gap=2, form="strided")
    assert out.shape[-1] == 128
    oracle.check_all(batch, Formula(logits_soft_cap=8.0), out, lse)


def test_bits_of_float8(rng: np.random.Generator) -> None:
    """As uint8 arrays, which say not which float8 they are."""
    batch = mixed(rng, kv_dtype="float8_e4m3fn")
    ragged = Ragged("NHD")
    batch.plan(ragged)
    k, v = (ragged.rows(x) for x in batch.cache)
    out = ragged.wrapper.run(batch.q, k, v)
    oracle.check_all(batch, Formula(), out)
    bits = ragged.wrapper.run(batch.q, k.view(np.uint8), v.view(np.uint8))
    assert bits.tobytes() == out.tobytes()
    other = replace(batch, kv_dtype="float8_e5m2")
    other.plan(ragged)
    message = "k is float8_e4m3fn, expected kv_data_type = float8_e5m2"
    check_error(TypeError, message, ragged.wrapper.run, batch.q, k, v)
