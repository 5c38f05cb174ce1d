"""`PagedKVCache` on the host: steps, what sharing costs, index arrays, kinds of arrays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from small_call import check_error

from cupaged import page_arrays
from cupaged.page_pool import OutOfPagesError
from cupaged.paged_cache import PagedKVCache

HEADS, DIM = 2, 4


def rows(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal((count, HEADS, DIM)).astype(np.float16)


def filled(rng: np.random.Generator, num_pages: int = 8, **options: Any) -> PagedKVCache:
    """Pages of 4; requests "a" of 10 tokens and "b" of 4, all written at two layers."""
    cache = PagedKVCache(num_pages, 4, HEADS, DIM, num_layers=2, **options)
    cache.add("a", 10)
    cache.add("b", 4)
    for layer in range(2):
        cache.append(["a", "b"], rows(rng, 14), rows(rng, 14), layer)
    return cache


def read(cache: PagedKVCache, request: Any, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A request's K and V at a layer, as bits."""
    pages = cache.block_table([request])[0].tolist()
    k, v = (
        oracle.gather(x, cache.layout, pages, cache.length(request), cache.page_size)
        for x in cache.layers[layer]
    )
    return k.view(np.uint16), v.view(np.uint16)


def table(cache: PagedKVCache, request: Any) -> list[int]:
    return cache.block_table([request])[0].tolist()


# Steps


def test_append_may_go_request_by_request_and_layer_by_layer(rng: np.random.Generator) -> None:
    cache = PagedKVCache(8, 4, HEADS, DIM, num_layers=2)
    cache.add("a", 3)
    cache.add("b", 6)
    k = {r: [rows(rng, cache.length(r)) for _ in range(2)] for r in "ab"}
    for request, layer in (("b", 1), ("a", 0), ("a", 1), ("b", 0)):
        cache.append([request], k[request][layer], -k[request][layer], layer)
    for request in "ab":
        for layer in range(2):
            keys, values = read(cache, request, layer)
            assert (keys == k[request][layer].view(np.uint16)).all()
            assert (values == (-k[request][layer]).view(np.uint16)).all()
    with pytest.raises(RuntimeError):
        cache.append(["a"], k["a"][0], k["a"][0], 0)


def test_tokens_that_were_not_appended_are_appended_with_the_next(rng: np.random.Generator) -> None:
    cache = PagedKVCache(8, 4, HEADS, DIM)
    cache.add("a", 3)
    cache.extend("a", 2)
    assert cache.qo_indptr(["a"]).tolist() == [0, 5]
    k = rows(rng, 5)
    cache.append(["a"], k, k)
    assert (read(cache, "a")[0] == k.view(np.uint16)).all()
    cache.extend("a", 1)
    assert cache.qo_indptr(["a"]).tolist() == [0, 1]
    assert cache.positions(["a"]).tolist() == [5]


def test_a_refused_append_can_be_made_again(rng: np.random.Generator) -> None:
    cache = PagedKVCache(8, 4, HEADS, DIM)
    cache.add("a", 3)
    k = rows(rng, 3)
    with pytest.raises(TypeError, match="float32"):
        cache.append(["a"], k.astype(np.float32), k)
    with pytest.raises(ValueError):
        cache.append(["a"], k[:2], k)
    assert not cache.layers[0][0].any()
    cache.append(["a"], k, k)
    assert (read(cache, "a")[0] == k.view(np.uint16)).all()


def test_another_way_to_write(rng: np.random.Generator) -> None:
    cache = PagedKVCache(8, 4, HEADS, DIM, num_layers=3)
    cache.add("a", 3)
    cache.mark_appended(["a"])
    cache.fork("a", "b")
    cache.extend("a", 1)
    k = rows(rng, 1)
    cache.append(["a"], k, k, 2)
    assert (read(cache, "a", 2)[0][3] == k.view(np.uint16)).all()


def test_what_comes_between_the_layers_of_a_step(rng: np.random.Generator) -> None:
    k = rows(rng, 3)
    cache = PagedKVCache(8, 4, HEADS, DIM, num_layers=2)
    cache.add("a", 3)
    cache.append(["a"], k, k, 0)
    cache.truncate("a", 2)
    cache.append(["a"], k[:2], k[:2], 1)
    assert (read(cache, "a", 1)[0] == k[:2].view(np.uint16)).all()
    cache.extend("a", 1)
    cache.append(["a"], k[2:], k[2:], 0)
    cache.mark_appended(["a"])
    with pytest.raises(RuntimeError):
        cache.append(["a"], k[2:], k[2:], 1)
    cache.extend("a", 1)
    cache.append(["a"], k[:1], k[:1], 0)
    cache.free("a")
    cache.add("a", 2)
    cache.append(["a"], k[:2], k[:2], 0)
    assert (read(cache, "a", 0)[0] == k[:2].view(np.uint16)).all()


def test_a_list_of_requests_is_extended_as_they_are_one_by_one() -> None:
    one, other = (PagedKVCache(64, 4, HEADS, DIM) for _ in range(2))
    ids = list("abcd")
    for request in ids:
        one.add(request)
        other.add(request)
    for counts in ([3, 0, 9, 1], [1, 1, 1, 1], [0, 4, 3, 100]):
        one.extend(ids, np.array(counts))
        for request, count in zip(ids, counts, strict=True):
            other.extend(request, np.int64(count))
    one.extend(one.requests, 1)
    for request in ids:
        other.extend(request, 1)
    for found, expected in zip(one.plan_args(ids), other.plan_args(ids), strict=True):
        assert (found == expected).all()
    one.extend([], 3)
    assert one.lengths(ids).tolist() == other.lengths(ids).tolist() == [5, 6, 14, 103]


# Sharing


def test_a_fork_shares_full_pages_and_copies_the_part_filled_one(rng: np.random.Generator) -> None:
    cache = filled(rng)
    free = cache.num_free_pages
    cache.fork("a", "c")
    assert table(cache, "c")[:2] == table(cache, "a")[:2]
    assert table(cache, "c")[2] != table(cache, "a")[2]
    assert cache.num_free_pages == free - 1
    before = [read(cache, "a", layer) for layer in range(2)]
    for layer in range(2):
        assert all(
            (x == y).all() for x, y in zip(read(cache, "c", layer), before[layer], strict=True)
        )
    cache.extend("c", 5)
    cache.extend("a", 1)
    for layer in range(2):
        cache.append(["c", "a"], rows(rng, 6), rows(rng, 6), layer)
        for request in "ac":
            for x, y in zip(read(cache, request, layer), before[layer], strict=True):
                assert (x[:10] == y).all()
    cache.free("a")
    assert cache.length("c") == 15
    cache.free("c")
    cache.free("b")
    assert cache.num_free_pages == 8


def test_a_fork_at_the_end_of_a_page_costs_nothing(rng: np.random.Generator) -> None:
    cache = filled(rng, num_pages=4)
    assert cache.num_free_pages == 0
    cache.fork("b", "c")
    cache.add("empty")
    cache.fork("empty", "d")
    assert table(cache, "c") == table(cache, "b")
    assert cache.lengths(["c", "d"]).tolist() == [4, 0]


def test_a_fork_needs_a_page_for_the_part_filled_one(rng: np.random.Generator) -> None:
    cache = filled(rng, num_pages=4)
    message = "fork(): request 'c' needs 1 page of 4 tokens, free are 0 of 4"
    check_error(OutOfPagesError, message, cache.fork, "a", "c")
    assert "c" not in cache


def test_writing_into_a_shared_page_copies_it_first(rng: np.random.Generator) -> None:
    """A fork that goes back into a shared page goes on in one of its own."""
    cache = filled(rng)
    cache.fork("a", "c")
    cache.truncate("c", 6)
    assert table(cache, "c") == table(cache, "a")[:2]
    before = [read(cache, "a", layer) for layer in range(2)]
    free = cache.num_free_pages
    cache.extend("c", 1)
    assert cache.num_free_pages == free - 1
    assert table(cache, "c")[0] == table(cache, "a")[0]
    assert table(cache, "c")[1] != table(cache, "a")[1]
    for layer in range(2):
        k = rows(rng, 1)
        cache.append(["c"], k, k, layer)
        for x, y in zip(read(cache, "a", layer), before[layer], strict=True):
            assert (x == y).all()
        for x, y in zip(read(cache, "c", layer), before[layer], strict=True):
            assert (x[:6] == y[:6]).all()
            assert (x[6] == k.view(np.uint16)).all()
    for request in "abc":
        cache.free(request)
    assert cache.num_free_pages == 8


def test_the_last_holder_of_a_page_writes_into_it(rng: np.random.Generator) -> None:
    cache = filled(rng)
    cache.fork("a", "c")
    cache.truncate("c", 6)
    pages = table(cache, "c")
    cache.free("a")
    free = cache.num_free_pages
    cache.extend("c", 2)
    assert (table(cache, "c"), cache.num_free_pages) == (pages, free)


def test_of_two_holders_extended_together_one_copies(rng: np.random.Generator) -> None:
    cache = filled(rng, num_pages=5)
    cache.fork("b", "c")
    cache.truncate("b", 2)
    cache.truncate("c", 3)
    assert cache.num_free_pages == 1
    page = table(cache, "b")
    before = read(cache, "c")[0]
    cache.extend(["b", "c"], 1)
    assert cache.num_free_pages == 0
    assert table(cache, "c") == page != table(cache, "b")
    assert (read(cache, "c")[0][:3] == before).all()
    assert (read(cache, "b")[0][:2] == before[:2]).all()


def test_adding_no_token_copies_nothing(rng: np.random.Generator) -> None:
    cache = filled(rng)
    cache.fork("b", "c")
    cache.truncate("c", 2)
    free = cache.num_free_pages
    cache.extend("c", 0)
    assert (table(cache, "c"), cache.num_free_pages) == (table(cache, "b"), free)


# Index arrays


def test_plan_args_are_int32_copies(rng: np.random.Generator) -> None:
    cache = filled(rng)
    cache.add("empty")
    args = cache.plan_args(("b", "empty", "a", "b"))
    assert args._fields == ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
    assert all(x.dtype == np.int32 for x in args)
    assert args.paged_kv_indptr.tolist() == [0, 1, 1, 4, 5]
    assert args.paged_kv_indices.tolist() == [3, 0, 1, 2, 3]
    assert args.paged_kv_last_page_len.tolist() == [4, 0, 2, 4]
    for request in "ab":
        cache.plan_args([request]).paged_kv_indices[...] = 99
    assert table(cache, "a") + table(cache, "b") == [0, 1, 2, 3]


def test_no_requests() -> None:
    cache = PagedKVCache(8, 4, HEADS, DIM)
    assert [x.tolist() for x in cache.plan_args([])] == [[0], [], []]
    assert cache.lengths([]).tolist() == cache.positions([]).tolist() == []
    assert cache.qo_indptr([]).tolist() == [0]
    assert cache.block_table([]).shape == (0, 0)
    cache.append([], np.empty((0, HEADS, DIM), np.float16), np.empty((0, HEADS, DIM), np.float16))
    assert (len(cache), cache.requests, list(cache)) == (0, [], [])


def test_a_block_table_is_filled_with_a_page_that_exists(rng: np.random.Generator) -> None:
    cache = filled(rng)
    assert cache.block_table(["b", "a"]).tolist() == [[3, 0, 0], [0, 1, 2]]
    assert cache.block_table(cache, fill=-1).tolist() == [[0, 1, 2], [3, -1, -1]]


def test_positions_follow_each_request(rng: np.random.Generator) -> None:
    cache = filled(rng)
    cache.extend(["a", "b"], [2, 3])
    assert cache.positions(["b", "a"]).tolist() == [4, 5, 6, 10, 11]
    assert cache.qo_indptr(["b", "a"]).tolist() == [0, 3, 5]
    cache.truncate("b", 6)
    assert cache.positions(["b", "a"]).tolist() == [4, 5, 10, 11]


def test_long_requests_grow() -> None:
    cache = PagedKVCache(5000, 1, 1, 1)
    cache.add("a")
    expected = []
    for count in (1, 7, 1, 0, 30, 1000, 1, 3000):
        cache.extend("a", count)
        expected += range(len(expected), len(expected) + count)
        assert table(cache, "a") == expected


# Arrays


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_arrays_of_its_own_are_zero(dtype: Any) -> None:
    for layout, shape in (("NHD", (3, 5, 2, 4)), ("HND", (3, 2, 5, 4))):
        cache = PagedKVCache(3, 5, 2, 4, dtype, 2, layout)
        assert len(cache.layers) == 2
        for x in (x for layer in cache.layers for x in layer):
            assert (x.shape, x.dtype, x.flags.c_contiguous) == (shape, dtype, True)
            assert not x.view(np.uint16).any()
    assert (cache.num_pages, cache.page_size, cache.num_kv_heads, cache.head_dim) == (3, 5, 2, 4)
    assert (cache.dtype, cache.num_layers, cache.layout) == (np.dtype(dtype).name, 2, "HND")


def test_arrays_of_the_caller_s_are_what_is_written(rng: np.random.Generator) -> None:
    k, v = (np.zeros((8, 4, HEADS, DIM), np.float16) for _ in "kv")
    stacked = np.zeros((8, 2, 4, HEADS, DIM), np.float16)
    cache = PagedKVCache(8, 4, HEADS, DIM, num_layers=2, caches=[[k, v], stacked])
    assert cache.layers[0][0] is k
    assert cache.layers[0][1] is v
    cache.add("a", 1)
    new = rows(rng, 2)
    for layer in range(2):
        cache.append(["a"], new[:1], new[1:], layer)
    for found in ((k, v), (stacked[:, 0], stacked[:, 1])):
        for x, row in zip(found, new, strict=True):
            assert (x[0, 0] == row).all()
            x[0, 0] = 0
            assert not x.any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_tensors_on_the_host(rng: np.random.Generator, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    storage = torch.full((2, 8, 4, HEADS, DIM + 3), torch.nan, dtype=kind)
    k, v = storage[..., 1 : 1 + DIM]
    cache = PagedKVCache(8, 4, HEADS, DIM, kind, caches=[(k, v)])
    assert cache.layers[0][0] is k
    cache.add("a", 6)
    new = torch.from_numpy(rng.standard_normal((7, HEADS, DIM))).to(kind)
    cache.append(["a"], new[:6], -new[:6])
    cache.fork("a", "b")
    cache.extend("b", 1)
    cache.append(["b"], new[6:], -new[6:])
    for request, length in (("a", 6), ("b", 7)):
        pages = table(cache, request)
        assert torch.equal(k[pages].reshape(-1, HEADS, DIM)[:length], new[:length])
        assert torch.equal(v[pages].reshape(-1, HEADS, DIM)[:length], -new[:length])
    assert storage.isnan().sum() == storage.numel() - 2 * (6 + 3) * HEADS * DIM


def test_which_device_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(getDevice=lambda: 1, getDeviceCount=lambda: 2)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(page_arrays.devices, "cupy", lambda: cupy)
    device = type("Device", (), {"__module__": "cupy.cuda.device", "id": 1})
    for given, expected in (
        *((None, None), ("cpu", None)),
        *((0, 0), (np.int64(1), 1), ("cuda:0", 0), ("cuda", 1), (device(), 1)),
    ):
        assert page_arrays._device(given) == expected
    message = "device = 2, expected 0..1, the CUDA devices that there are"
    for given in (2, "cuda:2"):
        check_error(ValueError, message, page_arrays._device, given)
    message = "device = -1, expected 0..1, the CUDA devices that there are"
    check_error(ValueError, message, page_arrays._device, -1)


def test_what_it_looks_like(rng: np.random.Generator) -> None:
    assert repr(filled(rng)) == (
        "<PagedKVCache: 2 requests, 4 of 8 pages of 4 tokens free, 2 layers of 2 KV heads, "
        "head_dim 4, float16, NHD>"
    )
