"""`PagedKVCache` on a GPU: random lives bit by bit, streams, frameworks, devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_calls import to_gpu
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from small_call import check_error
from test_paged_cache_machine import Lives, caches

from cupaged import arrays
from cupaged.paged_cache import PagedKVCache

pytestmark = pytest.mark.gpu

HEADS, DIM = 2, 64


def to_torch(x: np.ndarray) -> Any:
    """Move the bits of 16-bit floats."""
    import torch

    bits = torch.from_numpy(np.ascontiguousarray(x).view(np.int16))
    return bits.cuda().view(getattr(torch, x.dtype.name))


def bits_of(x: Any) -> np.ndarray:
    """A copy on the host, uint16, of an array of 16-bit floats of any strides."""
    bits: np.ndarray
    if arrays.framework(x) == "torch":
        import torch

        bits = x.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
    else:
        with x.device:
            bits = x.view(np.uint16).get()
    return bits


# Random lives


class LivesInCupy(Lives):
    """Arrays of CuPy, or of the cache's own."""

    def storage(self, x: np.ndarray) -> Any:
        return to_gpu(x)

    def make(
        self, form: str, shape: tuple[int, ...], layout: str, dtype: str, layers: int
    ) -> PagedKVCache:
        if form == "own":
            return PagedKVCache(*shape, dtype, layers, layout, device="cuda")
        given = caches(form, shape, layout, dtype, layers, self.storage)
        return PagedKVCache(*shape, dtype, layers, layout, caches=given)

    def appended(self, rows: np.ndarray) -> Any:
        return to_gpu(rows)

    def bits_of(self, x: Any) -> np.ndarray:
        return bits_of(x)

    def put(self, x: Any, index: Any, bits: np.ndarray) -> None:
        if arrays.framework(x) == "torch":
            x[index] = to_torch(bits.view(self.dtype))
        else:
            x.view(np.uint16)[index] = to_gpu(bits)


class LivesInTorch(LivesInCupy):
    """Tensors of PyTorch, on both sides but where the cache allocates."""

    def storage(self, x: np.ndarray) -> Any:
        return to_torch(x)

    def appended(self, rows: np.ndarray) -> Any:
        return to_torch(rows)


class LivesOfTorchInCupy(LivesInCupy):
    """Tensors of PyTorch appended to arrays of CuPy."""

    def appended(self, rows: np.ndarray) -> Any:
        return to_torch(rows)


#: Every look at the cache copies it to the host.
FEW = {"max_examples": 30, "stateful_step_count": 25}


def test_random_lives_in_cupy(cp: Any) -> None:
    run_state_machine_as_test(LivesInCupy, settings=settings(**FEW))


@pytest.mark.parametrize("lives", [LivesInTorch, LivesOfTorchInCupy])
def test_random_lives_with_torch(cp: Any, torch: Any, lives: type[Lives]) -> None:
    run_state_machine_as_test(lives, settings=settings(**FEW))


# Streams

VALUE = 0x3C003C00  # twice 1 in float16


def tokens_to_come(cp: Any, late_write: Any, count: int) -> Any:
    """Rows of ones, a good while from now; zeros until then."""
    words = cp.zeros(count * HEADS * DIM // 2, np.uint32)
    late_write(words, VALUE)
    return words.view(np.float16).reshape(count, HEADS, DIM)


def live(cache: PagedKVCache, k: Any) -> None:
    """Append 6 tokens, fork, go back into a page of 4 that is shared, and go on."""
    cache.add("a", 6)
    for layer in range(cache.num_layers):
        cache.append(["a"], k[:6], k[:6], layer)
    cache.fork("a", "b")
    cache.fork("a", "c")
    cache.truncate("c", 3)
    cache.extend(["b", "c"], [1, 2])
    for layer in range(cache.num_layers):
        cache.append(["c", "b"], k[:3], k[:3], layer)


def check_ones(cache: PagedKVCache) -> None:
    """Every token of every request is all ones, and nothing else was written."""
    table = cache.block_table(cache, fill=-1)
    slots = np.zeros((cache.num_pages, cache.page_size), np.bool_)
    for pages, length in zip(table, cache.lengths(cache), strict=True):
        for position in range(length):
            slots[pages[position // cache.page_size], position % cache.page_size] = True
    expected = np.where(slots[..., None, None], 0x3C00, 0)
    for layer in cache.layers:
        for x in layer:
            assert (bits_of(x) == np.broadcast_to(expected, x.shape)).all()


def test_no_call_waits_and_all_are_in_order(cp: Any, late_write: Any) -> None:
    warm = PagedKVCache(8, 4, HEADS, DIM, num_layers=2, device=0)
    live(warm, cp.zeros((6, HEADS, DIM), np.float16))
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        cache = PagedKVCache(8, 4, HEADS, DIM, num_layers=2, device=0)
        live(cache, tokens_to_come(cp, late_write, 6))
        assert not stream.done
        stream.synchronize()
        check_ones(cache)


def test_torch_s_stream_and_cupy_s(cp: Any, torch: Any, late_write: Any) -> None:
    """Rows that are still to come on PyTorch's stream, and a cache on CuPy's."""
    warm, cache = (PagedKVCache(8, 4, HEADS, DIM, num_layers=2, device="cuda") for _ in range(2))
    live(warm, torch.ones(6, HEADS, DIM, dtype=torch.float16, device="cuda"))
    cp.cuda.Device().synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        words = torch.zeros(6 * HEADS * DIM // 2, dtype=torch.int32, device="cuda")
        with arrays.on(0, stream.cuda_stream):
            late_write(arrays.import_tensor(words, "words").view(np.uint32), VALUE)
        live(cache, words.view(torch.float16).view(6, HEADS, DIM))
        assert not stream.query()
    cp.cuda.Device().synchronize()
    check_ones(cache)


def test_a_copy_waits_for_those_who_still_read_the_page(
    cp: Any, torch: Any, late_write: Any
) -> None:
    """A page is freed while PyTorch has yet to read it, and a fork takes it."""
    ones = torch.ones(2, HEADS, DIM, dtype=torch.float16, device="cuda")
    live(PagedKVCache(8, 4, HEADS, DIM, device="cuda"), ones.repeat(3, 1, 1))
    cache = PagedKVCache(3, 4, HEADS, DIM, device="cuda")
    cache.add("a", 2)
    cache.append(["a"], ones, ones)
    cache.add("b", 2)
    cache.append(["b"], 2 * ones, 2 * ones)
    k = torch.from_dlpack(cache.layers[0][0])
    k[2].clone()
    cp.cuda.Device().synchronize()
    stream = torch.cuda.Stream()
    page = int(cache.block_table(["a"])[0, 0])
    with torch.cuda.stream(stream):
        with arrays.on(0, stream.cuda_stream):
            late_write(cp.zeros(1, np.uint32), 0)
        read = k[page].clone()
        cache.free("a")
        cache.fork("b", "c")
        assert not stream.query()
    assert int(cache.block_table(["c"])[0, 0]) == page
    cp.cuda.Device().synchronize()
    assert torch.equal(read[:2], ones)
    assert torch.equal(k[page][:2], 2 * ones)


# Devices


def test_on_the_second_gpu(cp: Any, two_gpus: None) -> None:
    with cp.cuda.Device(1):
        k = to_gpu(np.ones((6, HEADS, DIM), np.float16))
        k.device.synchronize()
    cache = PagedKVCache(8, 4, HEADS, DIM, num_layers=2, device="cuda:1")
    live(cache, k)
    assert cp.cuda.runtime.getDevice() == 0
    assert all(x.device.id == 1 for layer in cache.layers for x in layer)
    cp.cuda.Device(1).synchronize()
    check_ones(cache)


def test_layers_on_two_gpus_are_refused(cp: Any, two_gpus: None) -> None:
    here = [to_gpu(np.zeros((8, 4, HEADS, DIM), np.float16)) for _ in "kv"]
    with cp.cuda.Device(1):
        there = [to_gpu(np.zeros((8, 4, HEADS, DIM), np.float16)) for _ in "kv"]
    message = "caches[1]: k cache is on cuda:1, expected cuda:0 as the k cache of layer 0 is"
    check_error(
        ValueError,
        message,
        *(PagedKVCache, 8, 4, HEADS, DIM),
        num_layers=2,
        caches=[here, there],
    )


def test_what_is_elsewhere_is_refused(cp: Any) -> None:
    here = to_gpu(np.zeros((8, 4, HEADS, DIM), np.float16))
    message = "caches[0]: v cache is on the host, expected cuda:0 as the k cache of layer 0 is"
    check_error(
        ValueError,
        message,
        *(PagedKVCache, 8, 4, HEADS, DIM),
        caches=[(here, np.zeros((8, 4, HEADS, DIM), np.float16))],
    )
    count = cp.cuda.runtime.getDeviceCount()
    message = f"device = 99, expected 0..{count - 1}, the CUDA devices that there are"
    check_error(ValueError, message, PagedKVCache, 8, 4, HEADS, DIM, device="cuda:99")
    cache = PagedKVCache(8, 4, HEADS, DIM, device=cp.cuda.Device(0))
    cache.add("a", 1)
    k = np.ones((1, HEADS, DIM), np.float16)
    with pytest.raises(ValueError, match=r"^append_key is on the host, expected cuda:0 "):
        cache.append(["a"], k, k)
    cache.append(["a"], to_gpu(k), to_gpu(k))
    check_ones(cache)


def test_arrays_of_its_own_are_zero(cp: Any) -> None:
    for dtype in ("float16", "bfloat16"):
        cache = PagedKVCache(8, 4, HEADS, DIM, dtype, 2, device=0)
        for x in (x for layer in cache.layers for x in layer):
            assert (x.shape, x.dtype.name, x.flags.c_contiguous) == (
                (8, 4, HEADS, DIM),
                dtype,
                True,
            )
            assert not bits_of(x).any()
