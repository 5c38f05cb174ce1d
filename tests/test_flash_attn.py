"""FlashAttention's door, against the float64 formula, request by request."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import doors
import numpy as np
import pytest
from doors import DTYPES, FRAMEWORKS, drawn, given_as, to_numpy
from formula import Formula, alibi_slope
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_close, assert_lse_close, attend, plain_same_dtype

from cupaged import door
from cupaged.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning")

_SETTINGS = {"suppress_health_check": list(HealthCheck), "database": None, "deadline": None}


@pytest.fixture(autouse=True)
def nothing_planned(monkeypatch: pytest.MonkeyPatch) -> list[door.Call]:
    return doors.count_plans(monkeypatch)


@dataclass(frozen=True)
class Options:
    """What changes the numbers of a call."""

    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi: bool = False

    def arguments(self, num_heads: int, kind: str) -> dict[str, Any]:
        slopes = [alibi_slope(head, num_heads) for head in range(num_heads)]
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "softmax_scale": self.softmax_scale,
            "alibi_slopes": given_as(np.array(slopes, np.float32), kind) if self.alibi else None,
        }

    def formula(self, qo_len: int, kv_len: int) -> Formula:
        """By the letter of FlashAttention's documentation."""
        left, right = self.window_size
        mask = np.ones((qo_len, kv_len), np.bool_)
        for i in range(qo_len):
            for j in range(kv_len):
                on = i + kv_len - qo_len
                mask[i, j] = (
                    (left < 0 or j >= on - left)
                    and (self.causal or right < 0 or j <= on + right)
                    and (not self.causal or j <= on)
                )
        return Formula(
            sm_scale=self.softmax_scale,
            logits_soft_cap=self.softcap,
            pos_encoding_mode="ALIBI" if self.alibi else "NONE",
            lse_base="ln",
            custom_mask=(mask,),
        )


@st.composite
def drawn_options(draw: Any) -> Options:
    causal = draw(st.booleans())
    edge = st.just(-1) | st.integers(0, 20)
    return Options(
        causal=causal,
        window_size=(draw(edge), draw(edge)),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        softmax_scale=draw(st.sampled_from([None, 0.3])),
        alibi=causal and draw(st.booleans()),
    )


def check(
    out: Array, lse: Array, q: Array, k: Array, v: Array, options: Options, what: str
) -> None:
    """Hold one request's result [rows, heads, ...] and its LSE [heads, rows] to the contract."""
    if not len(q):
        return
    formula = options.formula(len(q), len(k))
    expected, expected_lse = attend(q, k, v, formula)
    assert formula.custom_mask is not None
    seen = formula.custom_mask[0].any(axis=1)
    assert_close(out, expected, plain_same_dtype(q, k, v, formula), seen, what)
    assert_lse_close(lse.T, expected_lse, f"lse of {what}")


def starts(lengths: list[int]) -> Array:
    return np.cumsum([0, *lengths], dtype=np.int32)


def paged(rng: np.random.Generator, lengths: list[int], page_size: int) -> tuple[Array, int]:
    """A page table whose unused entries are no pages, and a count of pages."""
    counts = [-(-n // page_size) for n in lengths]
    num_pages = sum(counts) + 2
    table = np.full((len(lengths), max(counts, default=0) + 1), -7, np.int32)
    numbers = iter(rng.permutation(num_pages).tolist())
    for r, count in enumerate(counts):
        table[r, :count] = [next(numbers) for _ in range(count)]
    return table, num_pages


def in_pages(rows: list[Array], table: Array, num_pages: int, page_size: int) -> Array:
    """Each request's rows in its pages, NaN around them."""
    cache = np.full((num_pages, page_size, *rows[0].shape[1:]), np.nan, rows[0].dtype)
    for r, own in enumerate(rows):
        for j, row in enumerate(own):
            cache[table[r, j // page_size], j % page_size] = row
    return cache


LENGTHS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", FRAMEWORKS)
@pytest.mark.parametrize("form", ["rows", "rows used", "pages", "pages used"])
def test_varlen(rng: np.random.Generator, kind: str, form: str) -> None:
    @settings(max_examples=8, **_SETTINGS)
    @given(LENGTHS, drawn_options(), st.sampled_from(sorted(DTYPES)), st.sampled_from([1, 5, 16]))
    def under(lengths: list[tuple[int, int]], options: Options, dtype: str, page_size: int) -> None:
        qo_len, kv_len = ([pair[i] for pair in lengths] for i in (0, 1))
        q = drawn(rng, (sum(qo_len), 6, 64), dtype)
        keys, values = ([drawn(rng, (n, 2, 64), dtype) for n in kv_len] for _ in range(2))
        more: dict[str, Any] = {}
        room = kv_len
        if "used" in form:
            more["seqused_k"] = given_as(np.array(kv_len, np.int32), kind)
            room = [n + 3 for n in kv_len]
        cu_seqlens_k: Any = given_as(starts(room), kind)
        if "rows" in form:
            k, v = (np.full((sum(room), 2, 64), np.nan, DTYPES[dtype]) for _ in range(2))
            for begin, own_k, own_v in zip(starts(room)[:-1], keys, values, strict=True):
                k[begin : begin + len(own_k)], v[begin : begin + len(own_v)] = own_k, own_v
        else:
            table, num_pages = paged(rng, kv_len, page_size)
            k, v = (in_pages(rows, table, num_pages, page_size) for rows in (keys, values))
            name = "page_table" if "used" in form else "block_table"
            more[name] = given_as(table, kind)
            cu_seqlens_k = None if "used" in form else cu_seqlens_k
        out, lse, probs = flash_attn_varlen_func(
            *(given_as(x, kind) for x in (q, k, v, starts(qo_len))),
            *(cu_seqlens_k, max(qo_len), max(room)),
            return_attn_probs=True,
            **options.arguments(6, kind),
            **more,
        )
        assert to_numpy(probs, kind).size == 0
        got, got_lse = to_numpy(out, kind), to_numpy(lse, kind)
        assert got.shape == q.shape
        assert got_lse.shape == (6, len(q))
        begins = starts(qo_len)
        for r, (own_k, own_v) in enumerate(zip(keys, values, strict=True)):
            rows = slice(begins[r], begins[r + 1])
            check(got[rows], got_lse[:, rows], q[rows], own_k, own_v, options, f"request {r}")

    under()


@dataclass
class Cache:
    """A cache, what is in it, and what is appended to it."""

    q: Array
    keys: list[Array]
    values: list[Array]
    k_cache: Array
    v_cache: Array
    new: tuple[Array, Array] | None
    arguments: dict[str, Array]


def drawn_cache(
    rng: np.random.Generator, form: str, lengths: list[int], seqlen_q: int, new: int, dtype: str
) -> Cache:
    """Requests of so many tokens, `new` of them yet to be written."""
    batch = len(lengths)
    q = drawn(rng, (batch, seqlen_q, 4, 64), dtype)
    keys, values = ([drawn(rng, (n, 2, 64), dtype) for n in lengths] for _ in range(2))
    arguments = {"cache_seqlens": np.array([n - new for n in lengths], np.int32)}
    padded = [0] * batch
    if "pad" in form:
        padded = rng.integers(0, 9, batch).tolist()
        arguments["cache_leftpad"] = np.array(padded, np.int32)
        arguments["cache_seqlens"] += arguments["cache_leftpad"]
    ends = [n + pad for n, pad in zip(lengths, padded, strict=True)]
    if "pages" in form:
        page_size = 8
        table, num_caches = paged(rng, ends, page_size)
        arguments["block_table"] = table
    else:
        page_size, num_caches = max(ends) + 2, batch + 2
        table = np.arange(batch, dtype=np.int32)[:, None]
        if "picked" in form:
            table = rng.permutation(num_caches)[:batch].astype(np.int32)[:, None]
            arguments["cache_batch_idx"] = table[:, 0]
    caches = []
    for rows in (keys, values):
        written = [
            np.concatenate((np.full((pad, 2, 64), np.nan, x.dtype), x[: len(x) - new]))
            for pad, x in zip(padded, rows, strict=True)
        ]
        caches.append(in_pages(written, table, num_caches, page_size))
    appended = None
    if new:
        appended = tuple(np.stack([x[len(x) - new :] for x in rows]) for rows in (keys, values))
    return Cache(q, keys, values, caches[0], caches[1], appended, arguments)  # type: ignore[arg-type]


FORMS = ["rows", "rows picked", "rows padded", "pages", "pages padded"]


@pytest.mark.parametrize("kind", FRAMEWORKS)
@pytest.mark.parametrize("form", FORMS)
def test_kvcache(rng: np.random.Generator, kind: str, form: str) -> None:
    @settings(max_examples=6, **_SETTINGS)
    @given(
        st.lists(st.integers(3, 40), min_size=1, max_size=4),
        st.integers(1, 5),
        st.integers(0, 3),
        drawn_options(),
        st.sampled_from(sorted(DTYPES)),
    )
    def under(lengths: list[int], seqlen_q: int, new: int, options: Options, dtype: str) -> None:
        new = 0 if kind == "jax" else new  # whose arrays can't be written to
        cache = drawn_cache(rng, form, lengths, seqlen_q, new, dtype)
        k_cache, v_cache = (given_as(x.copy(), kind) for x in (cache.k_cache, cache.v_cache))
        appended = () if cache.new is None else (given_as(x, kind) for x in cache.new)
        out, lse = flash_attn_with_kvcache(
            *(given_as(cache.q, kind), k_cache, v_cache, *appended),
            return_softmax_lse=True,
            **{name: given_as(x, kind) for name, x in cache.arguments.items()},
            **options.arguments(4, kind),
        )
        got, got_lse = to_numpy(out, kind), to_numpy(lse, kind)
        assert got.shape == cache.q.shape
        assert got_lse.shape == (len(lengths), 4, seqlen_q)
        for r, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
            check(got[r], got_lse[r], cache.q[r], k, v, options, f"request {r}")
        # The new tokens are in the cache, and nothing else was touched.
        for given_back, before, rows in (
            (k_cache, cache.k_cache, cache.keys),
            (v_cache, cache.v_cache, cache.values),
        ):
            after = to_numpy(given_back, kind)
            changed = after.view(np.uint16) != before.view(np.uint16)
            assert changed.any(axis=(2, 3)).sum() == new * len(lengths)
            written = after[changed.any(axis=(2, 3))]
            expected = np.concatenate([x[len(x) - new :] for x in rows])
            assert sorted(x.tobytes() for x in written) == sorted(x.tobytes() for x in expected)

    under()


def test_one_length_for_all(rng: np.random.Generator) -> None:
    q, k, v = (drawn(rng, (3, n, 2, 64), "float16") for n in (1, 9, 9))
    whole, whole_lse = flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    part, part_lse = flash_attn_with_kvcache(q, k, v, cache_seqlens=4, return_softmax_lse=True)
    for b in range(3):
        check(whole[b], whole_lse[b], q[b], k[b], v[b], Options(), f"request {b}")
        check(part[b], part_lse[b], q[b], k[b][:4], v[b][:4], Options(), f"request {b}")
    table = np.arange(3, dtype=np.int32)[:, None]
    assert (flash_attn_with_kvcache(q, k, v, block_table=table) == whole).all()
    assert (flash_attn_with_kvcache(q, k, v, num_splits=1) == whole).all()


def test_a_cache_that_is_no_one_axis(rng: np.random.Generator) -> None:
    """K and V side by side in one array: what lies behind a request is another's V."""
    q, kv = drawn(rng, (3, 2, 2, 64), "float16"), drawn(rng, (3, 2, 9, 2, 64), "float16")
    k, v = kv[:, 0], kv[:, 1]
    out, lse = flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True)
    for b in range(3):
        check(out[b], lse[b], q[b], k[b], v[b], Options(causal=True), f"request {b}")
    with pytest.raises(NotImplementedError) as raised:
        flash_attn_with_kvcache(q, k, v, cache_leftpad=[1, 0, 2])
    assert str(raised.value) == (
        "cache_leftpad inside of a page is not served where k_cache's or v_cache's pages do not "
        "lie behind one another"
    )


def test_rows_that_see_nothing(rng: np.random.Generator) -> None:
    q, k = drawn(rng, (1, 5, 2, 64), "float16"), drawn(rng, (1, 2, 2, 64), "float16")
    out, lse = flash_attn_with_kvcache(q, k, k, causal=True, return_softmax_lse=True)
    assert (out[0, :3] == 0).all()
    assert (lse[0, :, :3] == -math.inf).all()
    assert np.isfinite(lse[0, :, 3:]).all()
    empty = flash_attn_with_kvcache(q[:, :0], k, k, return_softmax_lse=True)
    assert [x.shape for x in empty] == [(1, 0, 2, 64), (1, 2, 0)]


def test_decoding_plans_once_a_step(
    rng: np.random.Generator, nothing_planned: list[door.Call]
) -> None:
    """All layers of a step share a plan; lengths counted up in place make another."""
    q, new = (drawn(rng, (2, 1, 2, 64), "float16") for _ in range(2))
    layers = [drawn(rng, (2, 2, 16, 2, 64), "float16") for _ in range(3)]
    cache_seqlens = np.array([3, 7], np.int32)
    for step in range(1, 4):
        for k_cache, v_cache in layers:
            out, lse = flash_attn_with_kvcache(
                *(q, k_cache, v_cache, new, -new),
                cache_seqlens=cache_seqlens,
                causal=True,
                return_softmax_lse=True,
            )
            for b in range(2):
                k, v = (cache[b, : cache_seqlens[b] + 1] for cache in (k_cache, v_cache))
                assert (k[-1] == new[b, 0]).all()
                assert (v[-1] == -new[b, 0]).all()
                check(out[b], lse[b], q[b], k, v, Options(), f"step {step}, request {b}")
        assert len(nothing_planned) == step
        cache_seqlens += 1
