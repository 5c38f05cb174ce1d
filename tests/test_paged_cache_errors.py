"""Every error of `PagedKVCache`, by its type and full text, and that it changes nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from small_call import SERVED, SPEAKS_DLPACK, check_error

from cupaged.page_pool import OutOfPagesError
from cupaged.paged_cache import PagedKVCache

HEADS, DIM = 2, 4


def pages(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.zeros(shape or (8, 4, HEADS, DIM), dtype)


def filled(num_pages: int) -> PagedKVCache:
    """Pages of 4; requests "a" of 10 tokens and "b" of 4, all written at two layers."""
    cache = PagedKVCache(num_pages, 4, HEADS, DIM, num_layers=2)
    cache.add("a", 10)
    cache.add("b", 4)
    for layer in range(2):
        cache.append(["a", "b"], pages(14, HEADS, DIM), pages(14, HEADS, DIM), layer)
    return cache


# Pages


def test_out_of_pages_says_how_many() -> None:
    cache = filled(6)
    message = "extend(): request 'a' needs 3 pages of 4 tokens, free are 2 of 6"
    with pytest.raises(OutOfPagesError) as raised:
        cache.extend("a", 11)
    for error in (raised.value, pickle.loads(pickle.dumps(raised.value)), copy.copy(raised.value)):
        assert isinstance(error, RuntimeError)
        assert (str(error), error.needed, error.free) == (message, 3, 2)
    check_error(
        OutOfPagesError,
        "extend(): requests 'a', 'b' need 3 pages of 4 tokens, free are 2 of 6",
        *(cache.extend, ["a", "b"], [3, 8]),
    )
    check_error(
        OutOfPagesError,
        "add(): request 'c' needs 2500000 pages of 4 tokens, free are 2 of 6",
        *(cache.add, "c", 10**7),
    )
    assert cache.requests == ["a", "b"]
    for request in range(3):
        cache.add(request)
    check_error(
        OutOfPagesError,
        "extend(): requests 'a', 'b', 0 and 2 more need 4 pages of 4 tokens, free are 2 of 6",
        *(cache.extend, cache.requests, 1),
    )
    assert cache.lengths(cache).tolist() == [10, 4, 0, 0, 0]
    assert cache.qo_indptr(cache).tolist() == [0, 10, 14, 14, 14, 14]


# The constructor


def read_only() -> np.ndarray:
    array = pages()
    array.flags.writeable = False
    return array


A, B = pages(), pages()
NINE = pages(9, 4, HEADS, DIM)
WORDS = "kv_layout='NHD' expects (num_pages, page_size=4, num_kv_heads=2, head_dim=4)"
CONSTRUCTOR_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_pages": 0}, ValueError, "num_pages = 0, expected at least 1"),
    ({"page_size": 1.0}, TypeError, "page_size is a float, expected an int"),
    ({"num_kv_heads": True}, TypeError, "num_kv_heads is a bool, expected an int"),
    ({"head_dim": -4}, ValueError, "head_dim = -4, expected at least 1"),
    ({"num_layers": 0}, ValueError, "num_layers = 0, expected at least 1"),
    ({"layout": "HDN"}, ValueError, "layout = 'HDN', expected one of 'NHD', 'HND'"),
    ({"dtype": "float17"}, TypeError, f"dtype = 'float17', {SERVED}"),
    (
        {"dtype": np.float32},
        NotImplementedError,
        "dtype = float32, served are float16, bfloat16",
    ),
    ({"device": "gpu"}, ValueError, "device = 'gpu', expected 'cpu', 'cuda' or 'cuda:0'"),
    ({"device": "cuda:x"}, ValueError, "device = 'cuda:x', expected 'cpu', 'cuda' or 'cuda:0'"),
    (
        {"device": 1.5},
        TypeError,
        "device is a float, expected None, an int, 'cpu', 'cuda' or 'cuda:0'",
    ),
    (
        {"device": True},
        TypeError,
        "device is a bool, expected None, an int, 'cpu', 'cuda' or 'cuda:0'",
    ),
    (
        {"device": "cpu", "caches": [(pages(), pages())]},
        ValueError,
        "device and caches exclude each other: arrays have their own device",
    ),
    ({"caches": pages()}, TypeError, "caches is an ndarray, expected a list: (k, v) of each layer"),
    (
        {"caches": (pages(), pages())},
        ValueError,
        "caches has length 2, expected 1 = num_layers: (k, v) of each layer",
    ),
    (
        {"caches": [(pages(),)]},
        ValueError,
        "caches[0]: 1 arrays, expected two: (k, v)",
    ),
    ({"caches": [(pages(), None)]}, TypeError, f"caches[0]: v cache is None, {SPEAKS_DLPACK}"),
    (
        {"caches": [(pages(8, HEADS, 4, DIM), pages())]},
        ValueError,
        f"caches[0]: k cache has shape (8, 2, 4, 4); {WORDS}. It fits kv_layout='HND'",
    ),
    (
        {"caches": [(pages(), pages()), (pages(), pages(8, 4, 3, DIM))], "num_layers": 2},
        ValueError,
        f"caches[1]: v cache has shape (8, 4, 3, 4); {WORDS}",
    ),
    (
        {"caches": [(pages(9, 4, HEADS, DIM), pages(9, 4, HEADS, DIM))]},
        ValueError,
        "caches[0]: k cache holds 9 pages, expected 8 = num_pages",
    ),
    (
        {"caches": [(pages(), pages(7, 4, HEADS, DIM))]},
        ValueError,
        "caches[0]: v cache holds 7 pages, expected 8 as the k cache does",
    ),
    (
        {"caches": [pages(8, 2, 4, HEADS, DIM, dtype=ml_dtypes.bfloat16)]},
        TypeError,
        "caches[0]: k cache is bfloat16, expected kv_data_type = float16",
    ),
    (
        {"caches": [(pages(), read_only())]},
        ValueError,
        "caches[0]: v cache is a read-only array, expected one that can be written",
    ),
    (
        {"caches": [(pages(8, 4, HEADS, 2 * DIM)[..., ::2], pages())]},
        ValueError,
        "caches[0]: k cache has a stride of 2 elements on its last axis, expected 1: head_dim "
        "must be contiguous",
    ),
    (
        {"caches": [(A, A)]},
        ValueError,
        "caches[0]: k cache and v cache share memory, expected elements of their own",
    ),
    (
        {"caches": [(A, B), (pages(), A)], "num_layers": 2},
        ValueError,
        "caches[1]: v cache and the k cache of layer 0 share memory, expected elements of their "
        "own",
    ),
    (
        {"caches": [(NINE[1:], A), (B, NINE[:-1])], "num_layers": 2},
        ValueError,
        "caches[1]: v cache and the k cache of layer 0 share memory, expected elements of their "
        "own",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), CONSTRUCTOR_ERRORS)
def test_what_can_t_be_a_cache(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"num_pages": 8, "page_size": 4, "num_kv_heads": HEADS, "head_dim": DIM, **changes}
    check_error(error, message, PagedKVCache, **arguments)


def test_jax_arrays_are_immutable() -> None:
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(TypeError, match=r"^caches\[0\]: k cache is a JAX array, .*immutable"):
        PagedKVCache(8, 4, HEADS, DIM, caches=[(jnp.asarray(pages()), pages())])


# Calls

K = pages(1, HEADS, DIM)
#: Of a cache with requests "a" and "b", whose 10 and 4 tokens are appended; "empty"; "c", whose one
#: token is appended at layer 0; and "d" to "g" of 3, 1, 1 and 1 tokens that are not.
CALL_ERRORS: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    # Requests
    ("add", ("a",), ValueError, "request = 'a' is in the cache, expected an id that is not"),
    ("add", (["a"],), TypeError, "request is a list, expected a hashable id"),
    ("add", ({},), TypeError, "request is a dict, expected a hashable id"),
    ("add", ("x", -1), ValueError, "length = -1 (request 'x'), expected at least 0"),
    ("add", ("x", 2.0), TypeError, "length is a float (request 'x'), expected an int"),
    ("extend", ("x", 1), ValueError, "request 'x' is not in the cache"),
    ("extend", (("a", "b"), 1), ValueError, "request ('a', 'b') is not in the cache"),
    ("extend", ({"a"}, 1), TypeError, "request is a set, expected a hashable id"),
    ("extend", (["a", "x"], 1), ValueError, "request 'x' is not in the cache"),
    ("extend", (["a", ["b"]], 1), TypeError, "request is a list, expected a hashable id"),
    (
        "extend",
        (["a", "b", "a"], 1),
        ValueError,
        "extend(): request 'a' is there twice, expected once",
    ),
    ("extend", ("a", -2), ValueError, "n = -2 (request 'a'), expected at least 0"),
    ("extend", ("a", [1]), TypeError, "n is a list (request 'a'), expected an int"),
    ("extend", ("a", True), TypeError, "n is a bool (request 'a'), expected an int"),
    (
        "extend",
        (["a", "b"], "12"),
        TypeError,
        "n is a str, expected an int, or a list of one for each request",
    ),
    (
        "extend",
        (["a", "b"], [1]),
        ValueError,
        "n has length 1, expected 2: an int for each request",
    ),
    ("extend", (["a", "b"], [1, -1]), ValueError, "n[1] = -1 (request 'b'), expected at least 0"),
    (
        "extend",
        (["a", "b"], np.array([1, 0.5])),
        TypeError,
        "n[0] is a float (request 'a'), expected an int",
    ),
    ("truncate", ("a", 11), ValueError, "length = 11 (request 'a'), expected 0..10, its length"),
    ("truncate", ("a", -1), ValueError, "length = -1 (request 'a'), expected at least 0"),
    ("truncate", ("x", 0), ValueError, "request 'x' is not in the cache"),
    ("free", ("x",), ValueError, "request 'x' is not in the cache"),
    ("fork", ("x", "y"), ValueError, "request 'x' is not in the cache"),
    ("fork", ("a", "b"), ValueError, "new = 'b' is in the cache, expected an id that is not"),
    ("fork", ("a", []), TypeError, "new is a list, expected a hashable id"),
    ("length", ("x",), ValueError, "request 'x' is not in the cache"),
    ("lengths", ("a",), TypeError, "requests is a str, expected a list of requests"),
    ("plan_args", ("ab",), TypeError, "requests is a str, expected a list of requests"),
    ("plan_args", (7,), TypeError, "requests is an int, expected a list of requests"),
    ("plan_args", (["a", 7],), ValueError, "request 7 is not in the cache"),
    ("block_table", (None,), TypeError, "requests is a NoneType, expected a list of requests"),
    ("block_table", (["a"], None), TypeError, "fill is a NoneType, expected an int"),
    ("block_table", (["a"], 2**31), ValueError, "fill = 2147483648, expected an int32"),
    ("mark_appended", (b"ab",), TypeError, "requests is a bytes, expected a list of requests"),
    # Tokens that are there, or not
    (
        "append",
        (["a"], K, K, 0),
        RuntimeError,
        "append(): request 'a' has no new tokens at layer 0, where its last 10 are written: "
        "extend() it first",
    ),
    (
        "append",
        (["empty"], K[:0], K[:0], 1),
        RuntimeError,
        "append(): request 'empty' has no new tokens: extend() it first",
    ),
    (
        "append",
        (["b", "c"], K, K, 1),
        RuntimeError,
        "append(): request 'b' has no new tokens at layer 1, where its last 4 are written: "
        "extend() it first",
    ),
    (
        "append",
        (["c"], K, K, 0),
        RuntimeError,
        "append(): request 'c' has no new tokens at layer 0, where its last one is written: "
        "extend() it first",
    ),
    (
        "extend",
        (["a", "c"], 1),
        RuntimeError,
        "extend(): request 'c' has 1 new token not yet appended at layer 1: append() or "
        "mark_appended() first, or truncate() it to 0",
    ),
    (
        "fork",
        ("c", "x"),
        RuntimeError,
        "fork(): request 'c' has 1 new token not yet appended at layer 1: append() or "
        "mark_appended() first, or truncate() it to 0",
    ),
    (
        "fork",
        ("d", "x"),
        RuntimeError,
        "fork(): request 'd' has 3 new tokens not yet appended at layer 0: append() or "
        "mark_appended() first, or truncate() it to 0",
    ),
    # What is appended
    ("append", (["x"], K, K, 0), ValueError, "request 'x' is not in the cache"),
    ("append", ("c", K, K, 1), TypeError, "requests is a str, expected a list of requests"),
    (
        *("append", (np.array("c"), K, K, 1)),
        *(TypeError, "requests is an ndarray, expected a list of requests"),
    ),
    (
        "append",
        (["c", "c"], K, K, 1),
        ValueError,
        "append(): request 'c' is there twice, expected once",
    ),
    ("append", (["c"], K, K, 2), ValueError, "layer = 2, expected 0..1 (num_layers=2)"),
    ("append", (["c"], K, K, -1), ValueError, "layer = -1, expected 0..1 (num_layers=2)"),
    ("append", (["c"], K, K, "1"), TypeError, "layer is a str, expected an int"),
    (
        "append",
        (["c"], pages(2, HEADS, DIM), K, 1),
        ValueError,
        "k has 2 rows, expected 1 = the new tokens of the requests: 1 of 'c'",
    ),
    (
        "append",
        (["c", "d"], pages(4, HEADS, DIM), K, 1),
        ValueError,
        "v has 1 row, expected 4 = the new tokens of the requests: 1 of 'c', 3 of 'd'",
    ),
    (
        "append",
        (["d", "c", "e", "f", "g"], K, K, 1),
        ValueError,
        "k has 1 row, expected 7 = the new tokens of the requests: 3 of 'd', 1 of 'c', 1 of 'e' "
        "and those of 2 more",
    ),
    (
        "append",
        ([], K, K, 1),
        ValueError,
        "k has 1 row, expected 0 = the new tokens of the requests: there is none",
    ),
    (
        "append",
        (["c"], pages(1, HEADS, 3), K, 1),
        ValueError,
        "k has shape (1, 2, 3), expected (1, num_kv_heads=2, head_dim=4)",
    ),
    (
        "append",
        (["c"], K, K[0], 1),
        ValueError,
        "v has shape (2, 4), expected (1, num_kv_heads=2, head_dim=4)",
    ),
    (
        "append",
        (["c"], K.tolist(), K, 1),
        TypeError,
        f"append_key is a list, {SPEAKS_DLPACK}",
    ),
    ("append", (["c"], np.float16, K, 1), TypeError, f"append_key is a type, {SPEAKS_DLPACK}"),
]


def state(cache: PagedKVCache) -> Any:
    pool = cache._pool
    return (
        cache.requests,
        [x.tolist() for x in cache.plan_args(cache)],
        [x.tolist() for x in (cache.lengths(cache), cache.qo_indptr(cache))],
        (pool.num_free, pool.references.tolist(), pool._free.tolist()),
        [x.tobytes() for layer in cache.layers for x in layer],
    )


@pytest.mark.parametrize(("method", "arguments", "error", "message"), CALL_ERRORS)
def test_what_is_refused_changes_nothing(
    method: str,
    arguments: tuple[Any, ...],
    error: type[Exception],
    message: str,
) -> None:
    cache = filled(16)
    cache.add("empty")
    cache.add("c", 1)
    cache.append(["c"], K, K, 0)
    for request, length in zip("defg", (3, 1, 1, 1), strict=True):
        cache.add(request, length)
    before = state(cache)
    check_error(error, message, getattr(cache, method), *arguments)
    assert state(cache) == before
    # And what is not yet appended still can be.
    cache.append(["c"], K, K, 1)
    cache.extend("c", 1)


@pytest.mark.parametrize("odd", [np.zeros(2), np.zeros(1), np.array(0)])
def test_arrays_are_no_ids_of_requests_at_later_layers_either(odd: np.ndarray) -> None:
    cache = PagedKVCache(8, 4, HEADS, DIM, num_layers=2)
    cache.add(0, 1)
    cache.append([0], K, K, 0)
    message = "request is an ndarray, expected a hashable id"
    check_error(TypeError, message, cache.append, [odd], K, K, 1)
    cache.append([0], K, K, 1)
