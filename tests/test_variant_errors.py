"""Every error of what is off by default, by its type and full text, and that nothing is written."""

from __future__ import annotations

from typing import Any

import decode_calls
import ml_dtypes
import numpy as np
import pytest
from decode_calls import Decode
from small_call import (
    SPEAKS_DLPACK,
    Wrapper,
    check_error,
    pages,
    plan_arguments,
    planned,
    run_arguments,
)

import cupaged

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
#: Of the small call: 3 rows over 20 keys, 5 over 16, 1 over none.
BITS, BYTES = 3 * 20 + 5 * 16, 8 + 10

# plan(), with the same arguments for prefill and decoding

FEATURE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    # Windows
    ({"window_left": 4.0}, TypeError, "window_left is a float, expected an int"),
    ({"window_left": None}, TypeError, "window_left is a NoneType, expected an int"),
    ({"window_left": True}, TypeError, "window_left is a bool, expected an int"),
    (
        {"window_left": -2},
        ValueError,
        "window_left = -2, expected at least 0, or -1 for no window",
    ),
    # Soft caps
    ({"logits_soft_cap": "30"}, TypeError, "logits_soft_cap is a str, expected a number"),
    ({"logits_soft_cap": True}, TypeError, "logits_soft_cap is a bool, expected a number"),
    ({"logits_soft_cap": np.inf}, ValueError, "logits_soft_cap = inf, expected a finite number"),
    # Positions
    (
        {"rope_scale": 2.0},
        ValueError,
        "rope_scale = 2.0 with pos_encoding_mode='NONE', expected 'ROPE_LLAMA'",
    ),
    (
        {"rope_theta": 1e4, "pos_encoding_mode": "ALIBI"},
        ValueError,
        "rope_theta = 10000.0 with pos_encoding_mode='ALIBI', expected 'ROPE_LLAMA'",
    ),
    (
        {"rope_scale": 0.0, "pos_encoding_mode": "ROPE_LLAMA"},
        ValueError,
        "rope_scale = 0.0, expected more than 0",
    ),
    (
        {"rope_scale": 1e-310, "pos_encoding_mode": "ROPE_LLAMA"},
        ValueError,
        "rope_scale = 1e-310, expected at least 1.175e-38",
    ),
    (
        {"rope_theta": np.ones((3, 40))},
        ValueError,
        "rope_theta is an ndarray with pos_encoding_mode='NONE', expected 'ROPE_LLAMA'",
    ),
    (
        {"logits_soft_cap": 3e38},
        ValueError,
        "logits_soft_cap = 3e+38, expected at most 1.701e+38 in magnitude",
    ),
    (
        {"rope_theta": -1.0, "pos_encoding_mode": "ROPE_LLAMA"},
        ValueError,
        "rope_theta = -1.0, expected more than 0",
    ),
    (
        {"rope_theta": "1e4", "pos_encoding_mode": "ROPE_LLAMA"},
        TypeError,
        "rope_theta is a str, expected a number",
    ),
    # Dtypes
    (
        {"kv_data_type": "float32"},
        NotImplementedError,
        "kv_data_type = float32, served are q_data_type = float16 and float8_e4m3fn, float8_e5m2",
    ),
    (
        {"q_data_type": "float8_e5m2"},
        NotImplementedError,
        "q_data_type = float8_e5m2, served are float16, bfloat16",
    ),
    (
        {"kv_data_type": E4M3, "o_data_type": E4M3},
        NotImplementedError,
        "o_data_type = float8_e4m3fn differs from q_data_type = float16, which no backend serves",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), FEATURE_ERRORS)
def test_errors_of_features(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    wrapper = Wrapper(backend="reference")
    check_error(error, message, wrapper.plan, **plan_arguments(**changes))
    check_error(RuntimeError, "run() before plan()", wrapper.run, **run_arguments())
    decoder = Decode(backend="reference")
    check_error(error, message, decoder.plan, **decode_calls.plan_arguments(**changes))


MASK_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"custom_mask": np.ones(BITS, np.bool_), "packed_custom_mask": np.ones(BYTES, np.uint8)},
        ValueError,
        "custom_mask and packed_custom_mask exclude each other",
    ),
    ({"custom_mask": [True] * BITS}, TypeError, f"custom_mask is a list, {SPEAKS_DLPACK}"),
    (
        {"custom_mask": np.ones(BITS - 1, np.bool_)},
        ValueError,
        f"custom_mask has shape ({BITS - 1},), expected ({BITS},): the sum of qo_len * kv_len",
    ),
    (
        {"packed_custom_mask": np.ones(BYTES + 1, np.uint8)},
        ValueError,
        f"packed_custom_mask has shape ({BYTES + 1},), expected ({BYTES},): the sum of "
        "qo_len * kv_len bits, each request's rounded up to bytes, as segment_packbits() packs "
        "them",
    ),
    (
        {"packed_custom_mask": np.ones(BYTES, np.int8)},
        TypeError,
        "packed_custom_mask has dtype int8, expected uint8",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), MASK_ERRORS)
def test_errors_of_masks(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    wrapper = Wrapper(backend="reference")
    check_error(error, message, wrapper.plan, **plan_arguments(**changes))
    check_error(RuntimeError, "run() before plan()", wrapper.run, **run_arguments())


# run()

SINKS = "expected (num_qo_heads=4,)"
RUN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sinks": 1.0}, TypeError, f"sinks is a float, {SPEAKS_DLPACK}"),
    ({"sinks": [0.0] * 4}, TypeError, f"sinks is a list, {SPEAKS_DLPACK}"),
    ({"sinks": np.zeros(3, np.float32)}, ValueError, f"sinks has shape (3,), {SINKS}"),
    ({"sinks": np.zeros((4, 1), np.float32)}, ValueError, f"sinks has shape (4, 1), {SINKS}"),
    ({"sinks": np.zeros(4)}, TypeError, "sinks is float64, expected float32"),
    ({"sinks": np.zeros(4, np.float16)}, TypeError, "sinks is float16, expected float32"),
    (
        {"sinks": np.zeros(8, np.float32)[::2]},
        ValueError,
        "sinks has a stride of 2 elements, expected 1",
    ),
    ({"window_left": 8}, ValueError, "window_left = 8, expected 7 as planned"),
    ({"window_left": -1}, ValueError, "window_left = -1, expected 7 as planned"),
    ({"window_left": 7.0}, TypeError, "window_left is a float, expected an int"),
    (
        {"window_left": -9},
        ValueError,
        "window_left = -9, expected at least 0, or -1 for no window",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), RUN_ERRORS)
def test_errors_of_run_and_nothing_is_written(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    out, lse = np.full((9, 4, 64), 7, np.float16), np.full((9, 4), 7, np.float32)
    given = {"out": out, "lse": lse, **changes}
    check_error(error, message, planned(window_left=7).run, **run_arguments(**given))
    given = {"out": out[:3], "lse": lse[:3], "q": np.zeros((3, 4, 64), np.float16), **changes}
    decoder = decode_calls.small_plan(window_left=7)
    check_error(error, message, decoder.run, **decode_calls.run_arguments(**given))
    assert (out == 7).all()
    assert (lse == 7).all()


def test_the_planned_window_may_be_named() -> None:
    planned(window_left=7).run(**run_arguments(window_left=7))
    planned(window_left=2**40).run(**run_arguments(window_left=2**40))
    check_error(RuntimeError, "run() before plan()", Wrapper().run, **run_arguments(window_left=3))
    q = np.zeros((3, 4, 64), np.float16)
    decode_calls.small_plan(window_left=7).run(q, (pages(), pages()), window_left=np.int64(7))


# float8 caches

FLOAT8_ERRORS: list[tuple[Any, type[Exception], str]] = [
    ((pages(), pages()), TypeError, "k cache is float16, expected kv_data_type = float8_e4m3fn"),
    (
        (pages(dtype=E4M3), pages(dtype=E5M2)),
        TypeError,
        "v cache is float8_e5m2, expected kv_data_type = float8_e4m3fn",
    ),
    (
        (pages(dtype=np.int8), pages(dtype=np.int8)),
        TypeError,
        "k cache is int8, expected kv_data_type = float8_e4m3fn",
    ),
    (
        pages(5, 2, 16, 2, 64),
        TypeError,
        "k cache is float16, expected kv_data_type = float8_e4m3fn",
    ),
    (
        (pages(dtype=np.uint8), pages(5, 16, 2, 128, dtype=np.uint8)[..., ::2]),
        ValueError,
        "v cache has a stride of 2 elements on its last axis, expected 1: head_dim must be "
        "contiguous",
    ),
]


@pytest.mark.parametrize(("cache", "error", "message"), FLOAT8_ERRORS)
def test_errors_of_float8_caches(cache: Any, error: type[Exception], message: str) -> None:
    out = np.full((9, 4, 64), 7, np.float16)
    wrapper = planned(kv_data_type="float8_e4m3fn")
    check_error(error, message, wrapper.run, **run_arguments(paged_kv_cache=cache, out=out))
    assert (out == 7).all()


def test_bits_are_taken_for_float8_alone() -> None:
    cache = pages(dtype=np.uint8)
    message = "k cache is uint8, expected kv_data_type = float16"
    check_error(TypeError, message, planned().run, **run_arguments(paged_kv_cache=(cache, cache)))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("stacked", [False, True])
def test_bits_of_float8_are_read_as_what_is_planned(
    rng: np.random.Generator, dtype: Any, stacked: bool
) -> None:
    shape = (5, 2, 16, 2, 64) if stacked else (5, 16, 2, 64)
    values = [rng.standard_normal(shape).astype(dtype) for _ in range(1 if stacked else 2)]
    bits = [x.view(np.uint8) for x in values]
    wrapper = planned(kv_data_type=dtype)
    q = rng.standard_normal((9, 4, 64)).astype(np.float16)
    results = [wrapper.run(q, x[0] if stacked else tuple(x)) for x in (values, bits)]
    assert np.isfinite(results[0]).all()
    assert results[0][:8].any()
    assert results[0].tobytes() == results[1].tobytes()


# Keys and values of different heads

NHD = "kv_layout='NHD' expects (num_pages, page_size=16, num_kv_heads=2, head_dim"
HEAD_DIM_ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {"paged_kv_cache": pages(5, 2, 16, 2, 192)},
        "paged_kv_cache is one array, expected two, (k, v): head_dim_qk = 192 and head_dim_vo = "
        "128",
    ),
    (
        {"paged_kv_cache": (pages(5, 16, 2, 128), pages(5, 16, 2, 128))},
        f"k cache has shape (5, 16, 2, 128); {NHD}_qk=192)",
    ),
    (
        {"paged_kv_cache": (pages(5, 16, 2, 192), pages(5, 16, 2, 192))},
        f"v cache has shape (5, 16, 2, 192); {NHD}_vo=128)",
    ),
    (
        {"paged_kv_cache": (pages(5, 16, 2, 192), pages(5, 2, 16, 128))},
        f"v cache has shape (5, 2, 16, 128); {NHD}_vo=128). It fits kv_layout='HND'",
    ),
    (
        {"paged_kv_cache": (pages(5, 16, 2, 192), pages(6, 16, 2, 128))},
        "v cache holds 6 pages, expected 5 as the k cache does",
    ),
    (
        {"q": np.zeros((9, 4, 128), np.float16)},
        "q has shape (9, 4, 128), expected (nnz_qo, num_qo_heads=4, head_dim_qk=192)",
    ),
    (
        {"out": np.zeros((9, 4, 192), np.float16)},
        "out has shape (9, 4, 192), expected (9, 4, 128)",
    ),
]


@pytest.mark.parametrize(("changes", "message"), HEAD_DIM_ERRORS)
def test_errors_of_heads_of_two_widths(changes: dict[str, Any], message: str) -> None:
    wrapper = planned(head_dim_qk=192, head_dim_vo=128)
    arguments: dict[str, Any] = {
        "q": np.zeros((9, 4, 192), np.float16),
        "paged_kv_cache": (pages(5, 16, 2, 192), pages(5, 16, 2, 128)),
    }
    assert wrapper.run(**arguments).shape == (9, 4, 128)
    check_error(ValueError, message, wrapper.run, **arguments | changes)


# FlashInfer's names


def test_names_of_flashinfers_backends() -> None:
    """They mean "cuda", which serves no arrays on the host."""
    for name in ("fa2", "fa3"):
        for kind in (Wrapper, Decode, cupaged.BatchPrefillWithRaggedKVCacheWrapper):
            assert kind(backend=name)._backend == "cuda"


# forward()


def test_errors_of_forward() -> None:
    wrapper = planned()
    message = "forward(): use_fp16_qk_reduction=True is not served by any backend"
    call = wrapper.forward
    arguments = run_arguments()
    check_error(NotImplementedError, message, call, **arguments, use_fp16_qk_reduction=True)
    message = "window_left = -2, expected at least 0, or -1 for no window"
    check_error(ValueError, message, call, **arguments, window_left=-2)
    message = "rope_theta = 1.0 with pos_encoding_mode='NONE', expected 'ROPE_LLAMA'"
    check_error(ValueError, message, call, **arguments, rope_theta=1.0)
    check_error(TypeError, "causal is an int, expected a bool", call, **arguments, causal=1)
    message = "pos_encoding_mode is an ndarray, expected one of 'NONE', 'ROPE_LLAMA', 'ALIBI'"
    check_error(TypeError, message, call, **arguments, pos_encoding_mode=np.zeros((3, 3)))
    for kind in (Wrapper, Decode):
        check_error(RuntimeError, "run() before plan()", kind().forward, **arguments)


def test_a_bool_is_refused_where_the_number_it_equals_was_planned() -> None:
    """Checked arguments are remembered by value, and True equals 1."""
    wrapper = Wrapper(backend="reference")
    wrapper.plan(**plan_arguments(window_left=1))
    with pytest.raises(TypeError, match=r"^window_left is a bool, expected an int$"):
        wrapper.plan(**plan_arguments(window_left=True))
