"""Attention of one request, on the reference backend: results, kinds of array, and every error."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import strategies
from formula import visible
from hypothesis import given
from hypothesis import strategies as st
from oracle import Formula
from processes import run_python
from ragged_calls import FORMS, kv_rows
from small_call import SERVED, SPEAKS_DLPACK, check_error

import cupaged
from cupaged import (
    single_decode_with_kv_cache,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
LAYOUTS = ("NHD", "HND")


def tensors(
    rng: np.random.Generator,
    qo_len: int,
    kv_len: int,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dims: tuple[int, int] = (64, 64),
    dtype: str = "float16",
    kv_dtype: str | None = None,
    kv_layout: str = "NHD",
    form: str = "contiguous",
) -> tuple[Arrays, Arrays]:
    """q, k and v as the functions take them, and as the oracle does."""
    element = np.dtype(getattr(ml_dtypes, dtype, dtype))
    kv_element = element if kv_dtype is None else np.dtype(getattr(ml_dtypes, kv_dtype))
    q = rng.standard_normal((qo_len, heads[0], head_dims[0])).astype(element)
    given = [kv_rows(kv_layout, form, kv_len, heads[1], d, kv_element) for d in head_dims]
    for x in given:
        x[...] = rng.standard_normal(x.shape).astype(kv_element)
    plain = [x if kv_layout == "NHD" else x.swapaxes(0, 1) for x in given]
    return (q, *given), (q, *plain)


def hide(plain: Arrays, formula: Formula) -> None:
    """Make keys and values NaN that no row sees, in place."""
    q, k, v = plain
    mask = None if formula.custom_mask is None else formula.custom_mask[0]
    seen = visible(len(q), len(k), formula.causal, formula.window_left, mask)
    for x in (k, v):
        x[~seen.any(axis=0)] = np.nan


def check(arrays: Arrays, formula: Formula, out: np.ndarray, lse: np.ndarray | None) -> None:
    batch = SimpleNamespace(qo_len=(len(arrays[0]),), gathered=lambda request: arrays)
    oracle.check_all(batch, formula, out, lse)


@st.composite
def features(draw: st.DrawFn) -> dict[str, Any]:
    """Options of both functions."""
    mode = draw(st.sampled_from(["NONE", "ALIBI", "ROPE_LLAMA"]))
    options: dict[str, Any] = {
        "pos_encoding_mode": mode,
        "window_left": draw(st.sampled_from([-1, 0, 5, 70, 500])),
        "logits_soft_cap": draw(st.sampled_from([None, 0.0, 3.0])),
        "sm_scale": draw(st.sampled_from([None, -0.2, 0.3])),
        "k_scale": draw(st.sampled_from([None, 0.5])),
        "v_scale": draw(st.sampled_from([None, -2.0])),
    }
    if mode == "ROPE_LLAMA" and draw(st.booleans()):
        options |= {"rope_scale": 4.0, "rope_theta": 1e5}
    return options


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Options of `tensors()`."""
    num_kv_heads = draw(st.integers(1, 3))
    return {
        "heads": (num_kv_heads * draw(st.sampled_from([1, 4, 5])), num_kv_heads),
        "head_dims": draw(st.sampled_from(strategies.ALL_HEAD_DIMS)),
        "dtype": draw(st.sampled_from(["float16", "bfloat16"])),
        "kv_layout": draw(st.sampled_from(LAYOUTS)),
        "form": draw(st.sampled_from(FORMS)),
    }


FLOAT8 = st.sampled_from([None, None, "float8_e4m3fn", "float8_e5m2"])


@given(
    shapes(),
    features(),
    st.tuples(st.integers(0, 80), st.integers(0, 300), st.booleans(), st.booleans()),
    st.sampled_from([None, *strategies.MASKS]),
    FLOAT8,
    st.integers(0, 2**32 - 1),
)
@pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning")
def test_random_prefill_equals_the_formula(
    shape: dict[str, Any],
    options: dict[str, Any],
    call: tuple[int, int, bool, bool],
    masked: str | None,
    float8: str | None,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    qo_len, kv_len, causal, with_sinks = call
    shape["kv_dtype"] = float8
    arrays, plain = tensors(rng, qo_len, kv_len, **shape)
    mask = None if masked is None else strategies.random_mask(rng, masked, qo_len, kv_len)
    sinks = rng.normal(0, 2, shape["heads"][0]).astype(np.float32) if with_sinks else None
    own = {"causal": causal, "sinks": sinks}
    formula = Formula(**options, **own, custom_mask=None if mask is None else (mask,))
    hide(plain, formula)
    given = {**options, **own, "kv_layout": shape["kv_layout"]}
    alone = single_prefill_with_kv_cache(*arrays, custom_mask=mask, **given)
    check(plain, formula, alone, None)
    if mask is not None:
        given["packed_custom_mask"] = np.packbits(mask, bitorder="little")
    out, lse = single_prefill_with_kv_cache_return_lse(*arrays, **given)
    check(plain, formula, out, lse)
    assert out.tobytes() == alone.tobytes()


@given(
    shapes(),
    features(),
    st.tuples(st.integers(0, 700), st.booleans(), st.sampled_from([None, 0.5])),
    FLOAT8,
    st.integers(0, 2**32 - 1),
)
def test_random_decoding_equals_the_formula(
    shape: dict[str, Any],
    options: dict[str, Any],
    call: tuple[int, bool, float | None],
    float8: str | None,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    kv_len, with_sinks, q_scale = call
    shape["kv_dtype"] = float8
    (q, k, v), plain = tensors(rng, 1, kv_len, **shape)
    sinks = rng.normal(0, 2, shape["heads"][0]).astype(np.float32) if with_sinks else None
    own = {"sinks": sinks, "q_scale": q_scale}
    formula = Formula(**options, **own)
    hide(plain, formula)
    given = {**options, **own, "kv_layout": shape["kv_layout"]}
    out, lse = single_decode_with_kv_cache(q[0], k, v, return_lse=True, **given)
    check(plain, formula, out[None], lse[None])
    assert single_decode_with_kv_cache(q[0], k, v, **given).tobytes() == out.tobytes()


def test_flashinfers_order_of_arguments(rng: np.random.Generator) -> None:
    """What is this library's own comes behind."""
    prefill = list(inspect.signature(single_prefill_with_kv_cache).parameters)
    assert prefill == [
        *("q", "k", "v", "scale_q", "scale_k", "scale_v", "o_dtype", "custom_mask"),
        *("packed_custom_mask", "causal", "kv_layout", "pos_encoding_mode"),
        *("use_fp16_qk_reduction", "sm_scale", "window_left", "logits_soft_cap", "rope_scale"),
        *("rope_theta", "backend", "return_lse", "kv_cache_sf", "k_scale", "v_scale", "sinks"),
    ]
    decode = list(inspect.signature(single_decode_with_kv_cache).parameters)
    assert decode == [
        *("q", "k", "v", "kv_layout", "pos_encoding_mode", "use_tensor_cores", "q_scale"),
        *("k_scale", "v_scale", "window_left", "logits_soft_cap", "sm_scale", "rope_scale"),
        *("rope_theta", "return_lse", "sinks"),
    ]


def test_read_only_arrays_and_names_of_dtypes(rng: np.random.Generator) -> None:
    arrays, plain = tensors(rng, 5, 40, dtype="bfloat16")
    for x in arrays:
        x.flags.writeable = False
    out = single_prefill_with_kv_cache(*arrays, o_dtype="bfloat16", backend="reference")
    check(plain, Formula(), out, None)
    q, k, v = arrays
    single_decode_with_kv_cache(q[2], k, v, use_tensor_cores=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn", "float8_e5m2"])
def test_torch_in_torch_out(rng: np.random.Generator, dtype: str, kv_dtype: str | None) -> None:
    torch = pytest.importorskip("torch")
    arrays, plain = tensors(rng, 5, 40, dtype=dtype, kv_dtype=kv_dtype)

    def as_torch(x: np.ndarray) -> Any:
        bits = torch.from_numpy(x.view(f"i{x.itemsize}" if x.itemsize > 1 else "u1"))
        return bits.view(getattr(torch, x.dtype.name))

    def as_numpy(x: Any) -> np.ndarray:
        assert x.dtype == getattr(torch, dtype)
        return x.view(torch.int16).numpy().view(plain[0].dtype)

    q, k, v = map(as_torch, arrays)
    mask = torch.ones((5, 40), dtype=torch.bool).tril(35)
    out, lse = single_prefill_with_kv_cache(q, k, v, custom_mask=mask, return_lse=True)
    check(plain, Formula(causal=True), as_numpy(out), lse.numpy())
    out, lse = single_decode_with_kv_cache(q[4], k, v, return_lse=True)
    check((plain[0][4:], *plain[1:]), Formula(), as_numpy(out[None]), lse[None].numpy())


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn", "float8_e5m2"])
def test_jax_in_jax_out(rng: np.random.Generator, kv_dtype: str | None) -> None:
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    arrays, plain = tensors(rng, 5, 40, dtype="bfloat16", kv_dtype=kv_dtype)
    q, k, v = (jax.device_put(x, cpu) for x in arrays)
    out, lse = single_prefill_with_kv_cache(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, jax.Array)
    check(plain, Formula(causal=True), np.asarray(out), np.asarray(lse))
    out, lse = single_decode_with_kv_cache(q[4], k, v, return_lse=True)
    assert isinstance(lse, jax.Array)
    last = (plain[0][4:], *plain[1:])
    check(last, Formula(), np.asarray(out)[None], np.asarray(lse)[None])


def test_more_queries_than_keys_warns(rng: np.random.Generator) -> None:
    """At the caller's line."""
    arrays, _ = tensors(rng, 5, 3)
    with pytest.warns(cupaged.CupagedWarning) as found:
        single_prefill_with_kv_cache(*arrays, causal=True)
    (warning,) = found
    assert warning.filename == __file__
    assert str(warning.message) == (
        "request 0 has 5 queries and 3 keys: with causal=True its first 2 rows see no key, and "
        "will be 0. Are the queries' own keys and values in k and v?"
    )


def test_importing_them_imports_no_framework() -> None:
    program = (
        "import sys, cupaged; cupaged.single_prefill_with_kv_cache; "
        "print([m for m in ('cupy', 'torch', 'jax') if m in sys.modules])"
    )
    assert run_python("-c", program).stdout.strip() == "[]"


# Errors


def small(**changes: Any) -> dict[str, Any]:
    return {
        "q": np.zeros((9, 4, 64), np.float16),
        "k": np.zeros((20, 2, 64), np.float16),
        "v": np.zeros((20, 2, 64), np.float16),
        **changes,
    }


def f16(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)


KV_DTYPES = "expected one of float16, bfloat16, float8_e4m3fn, float8_e5m2"
BACKENDS = "expected one of 'auto', 'reference', 'cuda', 'fa2', 'fa3'"
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": None}, TypeError, f"q is None, {SPEAKS_DLPACK}"),
    ({"k": [1.0]}, TypeError, f"k is a list, {SPEAKS_DLPACK}"),
    ({"v": 3}, TypeError, f"v is an int, {SPEAKS_DLPACK}"),
    (
        {"k": f16(20, 128)},
        ValueError,
        "k has shape (20, 128), expected (kv_len, num_kv_heads, head_dim)",
    ),
    (
        {"v": f16(20, 1, 2, 64), "kv_layout": "HND"},
        ValueError,
        "v has shape (20, 1, 2, 64), expected (num_kv_heads, kv_len, head_dim)",
    ),
    (
        {"q": np.zeros((9, 4, 64), np.float32)},
        TypeError,
        "q is float32, expected one of float16, bfloat16",
    ),
    ({"k": np.zeros((20, 2, 64))}, TypeError, f"k is float64, {KV_DTYPES}"),
    ({"k": np.zeros((20, 2, 64), np.uint8)}, TypeError, f"k is uint8, {KV_DTYPES}"),
    (
        {"v": np.zeros((20, 2, 64), ml_dtypes.bfloat16)},
        TypeError,
        "v is bfloat16, expected float16 as k is",
    ),
    (
        {"k": np.zeros((20, 2, 64), ml_dtypes.bfloat16)},
        NotImplementedError,
        "k is bfloat16, served are float16 as q is and float8_e4m3fn, float8_e5m2",
    ),
    ({"v": np.zeros((20, 2, 64), np.uint8)}, TypeError, "v is uint8, expected float16 as k is"),
    ({"k": f16(20, 2, 32)}, ValueError, "k has head_dim 32, expected 64 as q has"),
    (
        {"k": f16(20, 3, 64)},
        ValueError,
        "num_qo_heads = 4, expected a multiple of num_kv_heads = 3",
    ),
    (
        {"v": f16(20, 4, 64)},
        ValueError,
        "v has shape (20, 4, 64); kv_layout='NHD' expects (nnz_kv, num_kv_heads=2, head_dim=64)",
    ),
    (
        {"v": f16(20, 2, 128)},
        NotImplementedError,
        "head_dim_qk = 64 with head_dim_vo = 128, served are equal ones of 64, 96, 128, 256, and "
        "192/128",
    ),
    ({"kv_layout": "DHN"}, ValueError, "kv_layout = 'DHN', expected one of 'NHD', 'HND'"),
    ({"return_lse": 1}, TypeError, "return_lse is an int, expected a bool"),
    ({"v_scale": "2"}, TypeError, "v_scale is a str, expected a number"),
    (
        {"window_left": -3},
        ValueError,
        "window_left = -3, expected at least 0, or -1 for no window",
    ),
    (
        {"rope_scale": 2.0},
        ValueError,
        "rope_scale = 2.0 with pos_encoding_mode='NONE', expected 'ROPE_LLAMA'",
    ),
    (
        {"sinks": np.zeros(2, np.float32)},
        ValueError,
        "sinks has shape (2,), expected (num_qo_heads=4,)",
    ),
]
PREFILL_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"q": f16(4, 64)},
        ValueError,
        "q has shape (4, 64), expected (qo_len, num_qo_heads, head_dim)",
    ),
    ({"v": f16(19, 2, 64)}, ValueError, "v has 19 rows, expected 20 as k does"),
    (
        {"v": f16(21, 2, 64)},
        ValueError,
        "v has 21 rows, expected 20 as k does",
    ),
    ({"backend": "fa4"}, ValueError, f"backend = 'fa4', {BACKENDS}"),
    (
        {"o_dtype": "float32"},
        NotImplementedError,
        "o_dtype = float32 differs from that of q, float16, which no backend serves",
    ),
    ({"o_dtype": np.zeros((2, 2))}, TypeError, f"o_dtype is an ndarray, {SERVED}"),
    ({"backend": np.zeros(2)}, TypeError, f"backend is an ndarray, {BACKENDS}"),
    (
        {"custom_mask": np.ones((9, 21), np.bool_)},
        ValueError,
        "custom_mask has shape (9, 21), expected (180,): the sum of qo_len * kv_len",
    ),
    *(
        (
            {name: value},
            NotImplementedError,
            f"single_prefill_with_kv_cache(): {name}={words} is not served by any backend",
        )
        for name, value, words in (
            ("scale_q", 2.0, "2.0"),
            ("scale_k", np.ones(2), "an ndarray"),
            ("scale_v", np.ones(2), "an ndarray"),
            ("use_fp16_qk_reduction", True, "True"),
            ("kv_cache_sf", (1, 2), "a tuple"),
        )
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), [*ERRORS, *PREFILL_ERRORS])
def test_errors_of_prefill(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    check_error(error, message, single_prefill_with_kv_cache, **small(**changes))


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors_of_decoding(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = small(**changes)
    if isinstance(arguments["q"], np.ndarray):
        arguments["q"] = arguments["q"][0]
    check_error(error, message, single_decode_with_kv_cache, **arguments)


def test_errors_of_decoding_alone() -> None:
    message = "q has shape (9, 4, 64), expected (num_qo_heads, head_dim)"
    check_error(ValueError, message, single_decode_with_kv_cache, **small())
    message = "use_tensor_cores is an int, expected a bool"
    check_error(TypeError, message, single_decode_with_kv_cache, **small(), use_tensor_cores=1)
