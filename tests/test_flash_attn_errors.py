"""What FlashAttention's door refuses, word by word; and that nothing has been written by then."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from doors import given_as

from cupaged.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

Array = np.ndarray[Any, Any]

Q, K = np.zeros((5, 2, 64), np.float16), np.zeros((9, 2, 64), np.float16)
CU_Q, CU_K = [0, 2, 5], [0, 4, 9]
VARLEN = {
    "q": Q,
    "k": K,
    "v": K,
    "cu_seqlens_q": CU_Q,
    "cu_seqlens_k": CU_K,
    "max_seqlen_q": 3,
    "max_seqlen_k": 5,
}
PAGES = np.zeros((3, 3, 2, 64), np.float16)
SLOPES = np.array([0.0625, 0.00390625], np.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"dropout_p": 0.1},
            NotImplementedError,
            "dropout_p = 0.1, served is 0: there is no dropout",
        ),
        ({"window_size": 3}, TypeError, "window_size = 3, expected two ints"),
        ({"causal": 1}, TypeError, "causal is an int, expected a bool"),
        ({"softcap": math.inf}, ValueError, "softcap = inf, expected a finite number"),
        ({"softmax_scale": "a"}, TypeError, "softmax_scale is a str, expected a number"),
        (
            {"cu_seqlens_q": None},
            TypeError,
            "cu_seqlens_q is None, expected an int array [batch + 1]",
        ),
        (
            {"cu_seqlens_k": None},
            TypeError,
            "cu_seqlens_k is None, expected an int array [batch + 1]",
        ),
        (
            {"cu_seqlens_q": [0, 3, 2]},
            ValueError,
            "cu_seqlens_q[2] = 2 (end of request 1), expected at least 3 = cu_seqlens_q[1]",
        ),
        ({"cu_seqlens_q": [0, 2, 6]}, ValueError, "q has 5 rows, expected 6 = cu_seqlens_q[-1]"),
        (
            {"cu_seqlens_k": [0, 9]},
            ValueError,
            "cu_seqlens_k has 2 entries, expected 3 as cu_seqlens_q has",
        ),
        (
            {"cu_seqlens_k": [0, 4, 10]},
            ValueError,
            "k has 9 rows, expected at least 10 = cu_seqlens_k[-1]",
        ),
        (
            {"seqused_k": [4, 6]},
            ValueError,
            "seqused_k[1] = 6, expected at most 5: the request's rows in cu_seqlens_k",
        ),
        (
            {"max_seqlen_q": 2},
            ValueError,
            "max_seqlen_q = 2, expected at least 3: request 1 is as long",
        ),
        ({"max_seqlen_k": 4.5}, TypeError, "max_seqlen_k is a float, expected an int"),
        ({"q": Q[0]}, ValueError, "q has shape (2, 64), expected (total_q, num_heads, head_dim)"),
        (
            {"k": PAGES},
            ValueError,
            "k has shape (3, 3, 2, 64), expected (total_k, num_heads_k, head_dim)",
        ),
        (
            {"v": K[:8]},
            ValueError,
            "v has shape (8, 2, 64), expected (9, 2) and head_dim: k's is (9, 2, 64)",
        ),
        ({"v": K.astype(np.float32)}, TypeError, "v is float32, expected float16 as k is"),
        (
            {"k": K[..., :32], "v": K},
            ValueError,
            "k has head_dim 32, expected 64 as q has",
        ),
        (
            {"q": Q[:, :1], "cu_seqlens_q": [0, 2, 6]},
            ValueError,
            "q has 1 heads, expected a multiple of 2 as k has",
        ),
        ({"q": Q[:, :0]}, ValueError, "q has no heads, expected at least 1"),
        (
            {"v": K[..., :32]},
            NotImplementedError,
            "q has head_dim 64 and v 32, served are equal ones of 64, 96, 128, 256, and 192/128",
        ),
        (
            {"alibi_slopes": SLOPES * 2, "causal": True},
            NotImplementedError,
            "alibi_slopes are others than those of Press et al. for 2 heads, which alone are "
            "served",
        ),
        (
            {"alibi_slopes": SLOPES},
            NotImplementedError,
            "alibi_slopes with causal=False and several queries a request: keys behind a row's own "
            "have another bias, which no backend serves",
        ),
        (
            {"alibi_slopes": SLOPES[:1], "causal": True},
            ValueError,
            "alibi_slopes has shape (1,), expected (2,) or (2, 2)",
        ),
        (
            {"alibi_slopes": SLOPES.astype(np.float64), "causal": True},
            TypeError,
            "alibi_slopes is float64, expected float32",
        ),
        (
            {"block_table": [[0]], "page_table": [[0]]},
            ValueError,
            "block_table and page_table exclude each other: they are two names",
        ),
        (
            {"k": PAGES, "v": PAGES, "block_table": np.array([[0, 1], [2, 3]])},
            ValueError,
            "block_table[1, 1] = 3, expected 0..2: the cache holds 3 pages",
        ),
        (
            {"k": PAGES, "v": PAGES, "block_table": np.array([[0], [2]])},
            ValueError,
            "block_table has 1 pages a request, expected at least 2: request 0 has as many of "
            "3 tokens",
        ),
        (
            {"k": PAGES, "v": PAGES, "page_table": np.array([[0, 1]])},
            ValueError,
            "page_table has shape (1, 2), expected (2, pages)",
        ),
    ],
)
def test_errors_of_varlen(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        flash_attn_varlen_func(**{**VARLEN, **options})
    assert str(raised.value) == message


CACHE = {
    "q": np.zeros((2, 1, 2, 64), np.float16),
    "k_cache": np.zeros((3, 8, 2, 64), np.float16),
    "v_cache": np.zeros((3, 8, 2, 64), np.float16),
}
NEW = np.ones((2, 2, 2, 64), np.float16)
BESIDE = np.zeros((3, 2, 8, 2, 64), np.float16).swapaxes(0, 1)
MORE = np.zeros((4, 8, 2, 64), np.float16)
WIDE = CACHE["k_cache"].astype(np.float32)
NO_PAGE = np.zeros((3, 0, 2, 64), np.float16)


def read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rotary_cos": Q}, NotImplementedError, "rotary_cos is an ndarray, served is None"),
        ({"rotary_sin": Q}, NotImplementedError, "rotary_sin is an ndarray, served is None"),
        ({"num_splits": 3}, NotImplementedError, "num_splits = 3, served are 0 and 1"),
        ({"num_splits": np.zeros(2)}, TypeError, "num_splits is an ndarray, expected an int"),
        ({"num_splits": True}, TypeError, "num_splits is a bool, expected an int"),
        (
            {"v_cache": CACHE["v_cache"].astype(np.float32)},
            TypeError,
            "v_cache is float32, expected float16 as k_cache is",
        ),
        (
            {"v_cache": CACHE["v_cache"][:2]},
            ValueError,
            "v_cache has shape (2, 8, 2, 64), expected (3, 8, 2) and head_dim: k_cache's is "
            "(3, 8, 2, 64)",
        ),
        (
            {"k_cache": CACHE["k_cache"][..., :32]},
            ValueError,
            "k_cache has head_dim 32, expected 64 as q has",
        ),
        ({"k": NEW}, ValueError, "v is None, expected both k and v, or neither"),
        (
            {"k": NEW.astype(np.float32), "v": NEW, "cache_seqlens": 1},
            TypeError,
            "k is float32, expected float16 as k_cache is",
        ),
        (
            {"k": NEW, "v": NEW.repeat(2, -1)[..., ::2], "cache_seqlens": 1},
            ValueError,
            "v has a stride of 2 elements on its last axis, expected 1: head_dim must be "
            "contiguous",
        ),
        ({"k": NEW, "v": NEW}, ValueError, "cache_seqlens is None, expected where k and v go"),
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens = -1, expected at least 0"),
        (
            {"cache_seqlens": [1, 9]},
            ValueError,
            "cache_seqlens[1] = 9, expected at most 8: so much fits",
        ),
        (
            {"k": NEW, "v": NEW, "cache_seqlens": [1, 7]},
            ValueError,
            "cache_seqlens[1] = 7, expected at most 6: so much fits",
        ),
        ({"cache_seqlens": [1]}, ValueError, "cache_seqlens has shape (1,), expected (2,)"),
        (
            {"cache_seqlens": [4, 3], "cache_leftpad": [0, 4]},
            ValueError,
            "cache_leftpad[1] = 4, expected at most 3: the request's tokens",
        ),
        (
            {"cache_batch_idx": [0, 3]},
            ValueError,
            "cache_batch_idx[1] = 3, expected 0..2: k_cache has 3 rows",
        ),
        (
            # K and V beside each other: their rows are no one axis.
            {**dict(zip(("k_cache", "v_cache"), BESIDE, strict=True)), "cache_batch_idx": [4, 0]},
            ValueError,
            "cache_batch_idx[0] = 4, expected 0..2: k_cache has 3 rows",
        ),
        (
            {"cache_batch_idx": [0, 1], "block_table": [[0], [1]]},
            ValueError,
            "cache_batch_idx and block_table exclude each other",
        ),
        (
            {"q": np.zeros((4, 1, 2, 64), np.float16)},
            ValueError,
            "k_cache has 3 rows, expected at least 4 as q has",
        ),
        (
            {"k": NEW[:1], "v": NEW, "cache_seqlens": 1},
            ValueError,
            "k has shape (1, 2, 2, 64), expected (2, seqlen_new, 2, 64)",
        ),
        (
            {"k": NEW, "v": NEW[:, :1], "cache_seqlens": 1},
            ValueError,
            "v has 1 tokens, expected 2 as k has",
        ),
        (
            {"k": NEW, "v": NEW, "cache_seqlens": 1, "v_cache": read_only(CACHE["v_cache"])},
            ValueError,
            "v_cache is a read-only array, expected one that can be written",
        ),
        (
            {"k": NEW, "v": NEW, "cache_seqlens": 1, "v_cache": CACHE["k_cache"]},
            ValueError,
            "k_cache and v_cache share memory, expected elements of their own",
        ),
        (
            {"k": NEW, "v": NEW, "cache_seqlens": 1, "k_cache": MORE[:-1], "v_cache": MORE[1:]},
            ValueError,
            "k_cache and v_cache share memory, expected elements of their own",
        ),
        (
            {"k": NEW, "v": NEW, "cache_seqlens": 1, "k_cache": MORE[1:], "v_cache": MORE[:-1]},
            ValueError,
            "k_cache and v_cache share memory, expected elements of their own",
        ),
        (
            {"k": NEW, "v": NEW, "cache_seqlens": 1, "q": CACHE["q"].repeat(2, -1)[..., ::2]},
            ValueError,
            "q has a stride of 2 elements on its last axis, expected 1: head_dim must be "
            "contiguous",
        ),
        (
            {"k": NEW, "v": NEW, "cache_seqlens": 1, "q": CACHE["q"].astype(np.float32)},
            NotImplementedError,
            "q is float32, served are float16, bfloat16",
        ),
        (
            {"k_cache": WIDE, "v_cache": WIDE},
            NotImplementedError,
            "k_cache is float32, served are float16 as q is, and float8_e4m3fn, float8_e5m2",
        ),
        (
            {"q": np.zeros((2, 1, 3, 64), np.float16)},
            ValueError,
            "q has 3 heads, expected a multiple of 2 as k_cache has",
        ),
        (
            {"k_cache": CACHE["k_cache"][:, :, :0], "v_cache": CACHE["v_cache"][:, :, :0]},
            ValueError,
            "k_cache has no heads, expected at least 1",
        ),
        (
            {name: x[..., :56] for name, x in CACHE.items()},
            NotImplementedError,
            "q has head_dim 56, served are 64, 96, 128, 256",
        ),
        (
            {"v_cache": CACHE["v_cache"][..., :56]},
            NotImplementedError,
            "q has head_dim 64 and v_cache 56, served are equal ones of 64, 96, 128, 256, and "
            "192/128",
        ),
        (
            {"k": NEW, "v": NEW, "cache_seqlens": 1, "softmax_scale": 3e38},
            ValueError,
            "softmax_scale = 3e+38, expected at most 1.701e+38 in magnitude",
        ),
        (
            {"k": NEW, "v": NEW, "cache_seqlens": 1, "softcap": 3e38},
            ValueError,
            "softcap = 3e+38, expected at most 1.701e+38 in magnitude",
        ),
        (
            {"k_cache": NO_PAGE, "v_cache": NO_PAGE, "block_table": np.zeros((2, 1), int)},
            ValueError,
            "k_cache has shape (3, 0, 2, 64), expected a page_size of at least 1",
        ),
        (
            {"k": NEW, "v": NEW, "cache_seqlens": 1, "block_table": np.array([[0], [3]])},
            ValueError,
            "block_table[1, 0] = 3, expected 0..2: the cache holds 3 pages",
        ),
        (
            # Only request 0 has a key on its second page.
            {"block_table": np.array([[0, 4], [1, 5]]), "cache_seqlens": [9, 8]},
            ValueError,
            "block_table[0, 1] = 4, expected 0..2: the cache holds 3 pages",
        ),
        (
            {"page_table": np.array([[0, 4], [1, 5]]), "cache_seqlens": [8, 9]},
            ValueError,
            "page_table[1, 1] = 5, expected 0..2: the cache holds 3 pages",
        ),
    ],
)
def test_errors_of_kvcache(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {**CACHE, **options}
    before = [arguments[name].copy() for name in ("k_cache", "v_cache")]
    with pytest.raises(error) as raised:
        flash_attn_with_kvcache(**arguments)
    assert str(raised.value) == message
    for name, x in zip(("k_cache", "v_cache"), before, strict=True):
        assert (arguments[name] == x).all()  # nothing has been written


@pytest.mark.parametrize("which", ["k_cache", "v_cache"])
def test_a_jax_cache_is_not_written(which: str) -> None:
    caches = {**CACHE, which: given_as(CACHE[which], "jax")}
    with pytest.raises(TypeError) as raised:
        flash_attn_with_kvcache(**caches, k=NEW, v=NEW, cache_seqlens=1)
    assert str(raised.value) == (
        f"{which} is a JAX array, which is immutable: write k and v into the cache yourself, and "
        "omit k and v"
    )
    assert all((np.asarray(x) == 0).all() for x in caches.values())


def test_k_and_v_beside_each_other_are_written() -> None:
    """In one piece of memory, but with elements of their own."""
    k_cache, v_cache = np.zeros_like(BESIDE.swapaxes(0, 1)).swapaxes(0, 1)
    flash_attn_with_kvcache(CACHE["q"], k_cache, v_cache, NEW, -NEW, cache_seqlens=1)
    for cache, sign in ((k_cache, 1), (v_cache, -1)):
        assert (cache[:2, 1:3] == sign).all()
        assert (cache != 0).sum() == NEW.size


def test_a_cache_without_room_has_no_key() -> None:
    """Whatever its strides are."""
    cache = np.ones((3, 8, 2, 64), np.float16)[:, :0]
    out, lse = flash_attn_with_kvcache(CACHE["q"], cache, cache, return_softmax_lse=True)
    assert (out == 0).all()
    assert np.isneginf(lse).all()
