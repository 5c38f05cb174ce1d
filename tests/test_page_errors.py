"""Every error of an append to a paged cache, by type and full text; nothing is written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from small_call import SPEAKS_DLPACK, check_error, ints, pages

from cupaged.page import append_paged_kv_cache

#: Of the small append below, for each layout.
NHD_WORDS = (
    "kv_layout='NHD' expects (num_pages, page_size, num_kv_heads=2, head_dim=64) "
    "for an append_key of shape (5, 2, 64)"
)
HND_WORDS = (
    "kv_layout='HND' expects (num_pages, num_kv_heads=2, page_size, head_dim=64) "
    "for an append_key of shape (5, 2, 64)"
)
STACKED_WORDS = (
    "kv_layout='NHD' expects (num_pages, 2, page_size, num_kv_heads=2, head_dim=64) "
    "for an append_key of shape (5, 2, 64)"
)
COUNTED = "Were the appended tokens counted in kv_indptr and kv_last_page_len?"


def tokens(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.ones(shape or (5, 2, 64), dtype)


def append_arguments(**changes: Any) -> dict[str, Any]:
    """Three requests over pages of 16 tokens, of 20, 16 and no tokens.

    The first gets three tokens, the second one, and a row is padding.
    """
    return {
        "append_key": tokens(),
        "append_value": tokens(),
        "batch_indices": ints(0, 0, 0, 1, -1),
        "positions": ints(17, 18, 19, 15, 0),
        "paged_kv_cache": (pages(), pages()),
        "kv_indices": ints(4, 1, 0),
        "kv_indptr": ints(0, 2, 3, 3),
        "kv_last_page_len": ints(4, 16, 0),
        **changes,
    }


APPEND_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    # The layout
    ({"kv_layout": "NDH"}, ValueError, "kv_layout = 'NDH', expected one of 'NHD', 'HND'"),
    ({"kv_layout": None}, TypeError, "kv_layout is a NoneType, expected one of 'NHD', 'HND'"),
    # What is appended
    ({"append_key": None}, TypeError, f"append_key is None, {SPEAKS_DLPACK}"),
    ({"append_value": [[1.0]]}, TypeError, f"append_value is a list, {SPEAKS_DLPACK}"),
    (
        {"append_key": tokens(5, 128)},
        ValueError,
        "append_key has shape (5, 128), expected three axes: (nnz, num_kv_heads, head_dim)",
    ),
    (
        {"append_value": tokens(4, 2, 64)},
        ValueError,
        "append_value has shape (4, 2, 64), expected (5, 2, 64) as append_key has",
    ),
    (
        {"append_value": tokens(5, 2, 32)},
        NotImplementedError,
        "append_value has head_dim 32, served is that of append_key, 64",
    ),
    (
        {"append_key": tokens(dtype=np.float32)},
        TypeError,
        "append_key is float32, expected float16 as the cache is",
    ),
    (
        {"append_value": tokens(dtype=ml_dtypes.bfloat16)},
        TypeError,
        "append_value is bfloat16, expected float16 as the cache is",
    ),
    (
        {"append_key": tokens(dtype=">f2")},
        TypeError,
        "append_key is float16 in foreign byte order, expected float16 as the cache is",
    ),
    (
        {"append_value": tokens(5, 2, 128)[..., ::2]},
        ValueError,
        "append_value has a stride of 2 elements on its last axis, expected 1: "
        "head_dim must be contiguous",
    ),
    (
        dict.fromkeys(
            ("append_key", "append_value"), np.broadcast_to(np.float16(0), (2**30 + 1, 2, 64))
        ),
        ValueError,
        "append_key has 1073741825 rows, expected at most 1073741824",
    ),
    # The cache
    ({"paged_kv_cache": None}, TypeError, f"paged_kv_cache is None, {SPEAKS_DLPACK}"),
    ({"paged_kv_cache": (pages(), 3)}, TypeError, f"v cache is an int, {SPEAKS_DLPACK}"),
    ({"paged_kv_cache": (None, pages())}, TypeError, f"k cache is None, {SPEAKS_DLPACK}"),
    (
        {"paged_kv_cache": (pages(),)},
        ValueError,
        "paged_kv_cache has 1 arrays, expected two: (k, v)",
    ),
    (
        {"paged_kv_cache": [pages(), pages(), pages()]},
        ValueError,
        "paged_kv_cache has 3 arrays, expected two: (k, v)",
    ),
    (
        {"paged_kv_cache": (np.broadcast_to(np.float16(0), (5, 16, 2, 64)), pages())},
        ValueError,
        "k cache is a read-only array, expected one that can be written",
    ),
    (
        {"paged_kv_cache": (pages(), np.broadcast_to(np.float16(0), (5, 16, 2, 64)))},
        ValueError,
        "v cache is a read-only array, expected one that can be written",
    ),
    (
        {"paged_kv_cache": np.broadcast_to(np.float16(0), (5, 2, 16, 2, 64))},
        ValueError,
        "paged_kv_cache is a read-only array, expected one that can be written",
    ),
    (
        {"paged_kv_cache": (pages(5, 2, 16, 64), pages(5, 2, 16, 64))},
        ValueError,
        f"k cache has shape (5, 2, 16, 64); {NHD_WORDS}. It fits kv_layout='HND'",
    ),
    (
        {"kv_layout": "HND"},
        ValueError,
        f"k cache has shape (5, 16, 2, 64); {HND_WORDS}. It fits kv_layout='NHD'",
    ),
    (
        {"paged_kv_cache": (pages(5, 16, 4, 64), pages(5, 16, 4, 64))},
        ValueError,
        f"k cache has shape (5, 16, 4, 64); {NHD_WORDS}",
    ),
    (
        {"paged_kv_cache": (pages(5, 16, 2, 128), pages(5, 16, 2, 128))},
        ValueError,
        f"k cache has shape (5, 16, 2, 128); {NHD_WORDS}",
    ),
    (
        {"paged_kv_cache": (pages(16, 3, 64), pages(16, 3, 64))},
        ValueError,
        f"k cache has shape (16, 3, 64); {NHD_WORDS}",
    ),
    (
        {"paged_kv_cache": (pages(5), pages(5))},
        ValueError,
        f"k cache has shape (5,); {NHD_WORDS}",
    ),
    (  # stacked pages of one token, each given for K's
        {"paged_kv_cache": (pages(5, 1, 2, 2, 64), pages(5, 1, 2, 2, 64))},
        ValueError,
        f"k cache has shape (5, 1, 2, 2, 64); {NHD_WORDS}",
    ),
    (
        {"paged_kv_cache": (pages(5, 2, 64), pages(6, 2, 64))},
        ValueError,
        "v cache has shape (6, 1, 2, 64), expected (5, 1, 2, 64) as the k cache has",
    ),
    (
        {"paged_kv_cache": pages(5, 3, 2, 64)},
        ValueError,
        f"paged_kv_cache has shape (5, 3, 2, 64); {STACKED_WORDS}",
    ),
    (
        {"paged_kv_cache": (pages(5, 0, 2, 64), pages(5, 0, 2, 64))},
        ValueError,
        "k cache has shape (5, 0, 2, 64): page_size = 0, expected 1..1073741824",
    ),
    (
        {"paged_kv_cache": (pages(), pages(6, 16, 2, 64))},
        ValueError,
        "v cache has shape (6, 16, 2, 64), expected (5, 16, 2, 64) as the k cache has",
    ),
    (
        {"paged_kv_cache": pages(5, 2, 2, 16, 64)},
        ValueError,
        f"paged_kv_cache has shape (5, 2, 2, 16, 64); {STACKED_WORDS}. It fits kv_layout='HND'",
    ),
    (
        {"paged_kv_cache": pages(5, 3, 16, 2, 64)},
        ValueError,
        f"paged_kv_cache has shape (5, 3, 16, 2, 64); {STACKED_WORDS}",
    ),
    (
        {"paged_kv_cache": pages(5, 16, 2, 64)},
        ValueError,
        f"paged_kv_cache has shape (5, 16, 2, 64); {STACKED_WORDS}",
    ),
    (
        {"paged_kv_cache": (pages(), pages(dtype=np.int16))},
        TypeError,
        "v cache is int16, expected float16 as the cache is",
    ),
    (
        {"paged_kv_cache": (pages(5, 16, 2, 192)[..., ::3], pages())},
        ValueError,
        "k cache has a stride of 3 elements on its last axis, expected 1: "
        "head_dim must be contiguous",
    ),
    (
        {"paged_kv_cache": pages(5, 2, 16, 2, 128)[..., ::2]},
        ValueError,
        "paged_kv_cache has a stride of 2 elements on its last axis, expected 1: "
        "head_dim must be contiguous",
    ),
    # Index arrays
    ({"batch_indices": None}, TypeError, f"batch_indices is None, {SPEAKS_DLPACK}"),
    (
        {"positions": np.zeros(5, np.float32)},
        TypeError,
        "positions has dtype float32, expected int32 or int64",
    ),
    (
        {"kv_indices": np.zeros(3, np.uint32)},
        TypeError,
        "kv_indices has dtype uint32, expected int32 or int64",
    ),
    ({"kv_indptr": ["a"]}, TypeError, "kv_indptr has dtype <U1, expected int32 or int64"),
    (
        {"batch_indices": ints(0, 0, 0, 1)},
        ValueError,
        "batch_indices has shape (4,), expected (5,): append_key has 5 rows",
    ),
    (
        {"positions": np.zeros((5, 1), np.int32)},
        ValueError,
        "positions has shape (5, 1), expected (5,): append_key has 5 rows",
    ),
    (
        {"kv_indices": np.zeros((3, 1), np.int32)},
        ValueError,
        "kv_indices has shape (3, 1), expected one axis",
    ),
    (
        {"kv_indices": ints(4, 1)},
        ValueError,
        "kv_indices has 2 entries, expected at least 3 = kv_indptr[-1]",
    ),
    ({"kv_indptr": ints()}, ValueError, "kv_indptr has shape (0,), expected (batch + 1,)"),
    (
        {"kv_indptr": np.zeros((2, 2), np.int32)},
        ValueError,
        "kv_indptr has shape (2, 2), expected (batch + 1,)",
    ),
    ({"kv_indptr": ints(1, 2, 3, 3)}, ValueError, "kv_indptr[0] = 1, expected 0"),
    (
        {"kv_indptr": ints(0, 2, 1, 3)},
        ValueError,
        "kv_indptr[2] = 1 (end of request 1), expected at least 2 = kv_indptr[1]",
    ),
    (
        {"kv_last_page_len": ints(4, 16)},
        ValueError,
        "kv_last_page_len has shape (2,), expected (3,): kv_indptr has 4 entries",
    ),
    (
        {"kv_last_page_len": ints(4, 17, 0)},
        ValueError,
        "kv_last_page_len[1] = 17, expected 1..16 (page_size=16)",
    ),
    (
        {"kv_last_page_len": ints(0, 16, 0)},
        ValueError,
        "kv_last_page_len[0] = 0, expected 1..16 (page_size=16)",
    ),
    (
        {"kv_last_page_len": ints(4, 16, -1)},
        ValueError,
        "kv_last_page_len[2] = -1, expected 0..16 (page_size=16)",
    ),
    (
        {"kv_indptr": np.array([0, 2**30, 2**30, 2**30])},
        ValueError,
        "kv_indptr: request 0 has 1073741824 pages of 16 tokens, expected at most 1073741824 "
        "tokens",
    ),
    # Rows
    (
        {"batch_indices": ints(0, 0, 3, 1, -1)},
        ValueError,
        "batch_indices[2] = 3, expected 0..2, or -1 for padding: kv_indptr has 4 entries",
    ),
    (
        {"batch_indices": ints(0, 0, 0, 1, -2)},
        ValueError,
        "batch_indices[4] = -2, expected 0..2, or -1 for padding: kv_indptr has 4 entries",
    ),
    (
        {"batch_indices": np.array([0, 0, 0, 2**32, -1])},
        ValueError,
        "batch_indices[3] = 4294967296, expected 0..2, or -1 for padding: kv_indptr has 4 entries",
    ),
    (
        {"kv_indptr": ints(0), "kv_last_page_len": ints(), "batch_indices": ints(-1, 0, -1, -1, 0)},
        ValueError,
        "batch_indices[1] = 0, expected -1, padding: kv_indptr has 1 entry",
    ),
    (
        {"positions": ints(17, 18, 20, 15, 0)},
        ValueError,
        f"positions[2] = 20, expected 0..19: request 0 has 20 tokens. {COUNTED}",
    ),
    (
        {"positions": ints(17, 18, 19, 16, 0)},
        ValueError,
        f"positions[3] = 16, expected 0..15: request 1 has 16 tokens. {COUNTED}",
    ),
    (
        {"positions": np.array([17, 18, 19, 2**32, 0])},
        ValueError,
        f"positions[3] = 4294967296, expected 0..15: request 1 has 16 tokens. {COUNTED}",
    ),
    (
        {"positions": ints(17, -1, 19, 15, 0)},
        ValueError,
        "positions[1] = -1, expected 0..19: request 0 has 20 tokens",
    ),
    (
        {"batch_indices": ints(-1, 0, 0, 2, -1), "positions": ints(99, 18, 19, 0, 99)},
        ValueError,
        f"positions[3] = 0, expected none: request 2 has 0 tokens. {COUNTED}",
    ),
    (
        {"kv_indices": ints(4, 5, 0)},
        ValueError,
        "kv_indices[1] = 5 (request 0, its page 1), expected 0..4: the cache holds 5 pages",
    ),
    (
        {"kv_indices": ints(4, 1, -1)},
        ValueError,
        "kv_indices[2] = -1 (request 1, its page 0), expected 0..4: the cache holds 5 pages",
    ),
    (
        {"kv_indices": np.array([4, 1, 2**32])},
        ValueError,
        "kv_indices[2] = 4294967296 (request 1, its page 0), expected 0..4: "
        "the cache holds 5 pages",
    ),
    (
        {"paged_kv_cache": (pages(0, 16, 2, 64), pages(0, 16, 2, 64))},
        ValueError,
        "kv_indices[1] = 1 (request 0, its page 1), expected none: the cache holds 0 pages",
    ),
    (
        {"positions": ints(17, 19, 19, 15, 0)},
        ValueError,
        "rows 1 and 2 go to the same slot, 3 of page 1 (position 19 of request 0, position 19 of "
        "request 0), expected one row a slot; padding has batch_indices -1",
    ),
    (
        {
            "batch_indices": ints(1, 0, -1, 0, -1),
            "positions": ints(2, 18, 0, 2, 0),
            "kv_indices": ints(3, 1, 3),
        },
        ValueError,
        "rows 0 and 3 go to the same slot, 2 of page 3 (position 2 of request 1, position 2 of "
        "request 0), expected one row a slot; padding has batch_indices -1",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), APPEND_ERRORS)
def test_append_errors_and_nothing_is_written(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = append_arguments(**changes)
    check_error(error, message, append_paged_kv_cache, **arguments)
    given = arguments["paged_kv_cache"]
    for cache in given if isinstance(given, (tuple, list)) else [given]:
        assert not isinstance(cache, np.ndarray) or not cache.any()


def test_more_pages_than_an_int32_counts() -> None:
    """All of them the same one: nothing else has room for so many."""
    k = np.lib.stride_tricks.as_strided(pages(1, 1, 2, 64), (2**31, 1, 2, 64), (0, 256, 128, 2))
    check_error(
        ValueError,
        "k cache holds 2147483648 pages, expected at most 2147483647",
        append_paged_kv_cache,
        **append_arguments(paged_kv_cache=(k, k)),
    )
    assert not k[0].any()


def test_the_same_call_without_a_mistake() -> None:
    """What the errors above are changes of."""
    k, v = pages(), pages()
    append_paged_kv_cache(**append_arguments(paged_kv_cache=(k, v)))
    for cache in (k, v):
        assert np.argwhere(cache.all(axis=(2, 3))).tolist() == [[0, 15], [1, 1], [1, 2], [1, 3]]
        assert np.count_nonzero(cache) == 4 * 2 * 64


def test_an_error_is_found_after_a_call_without_one() -> None:
    """What that call found does not serve this one."""
    arguments = append_arguments()
    append_paged_kv_cache(**arguments)
    arguments["kv_indices"][2] = 7
    check_error(
        ValueError,
        "kv_indices[2] = 7 (request 1, its page 0), expected 0..4: the cache holds 5 pages",
        append_paged_kv_cache,
        **arguments,
    )
    arguments["kv_indices"][2] = 0
    append_paged_kv_cache(**arguments)
