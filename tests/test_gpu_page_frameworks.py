"""Appends on a GPU: PyTorch, JAX and CuPy together; and where tokens lie, there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from frameworks import on_device
from gpu_appends import PLACES, check, found
from gpu_calls import to_gpu, to_host
from page_problems import build, same_bits, torch_tensor
from small_call import check_error

from cupaged.append_cuda import LAUNCH_ROWS
from cupaged.page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
from cupaged.spec import DTYPES

pytestmark = pytest.mark.gpu

# Frameworks

#: Which of append_key, append_value, the cache and the index arrays PyTorch owns.
OWNERS = [
    ("key", "value", "cache", "indices"),
    ("key", "value", "cache"),
    ("cache",),
    ("key",),
    ("indices",),
    ("key", "value", "indices"),
]


@pytest.mark.parametrize("of_torch", OWNERS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_cupy_together(
    cp: Any, torch: Any, rng: np.random.Generator, dtype: str, of_torch: tuple[str, ...]
) -> None:
    """On streams of their own, in order with each other."""
    problem = build(rng, [90, 5], [70, 2], padding=1, dtype=dtype, cache_form="stacked")
    tensor = torch_tensor(torch, "cuda")

    def maker(name: str) -> Callable[[np.ndarray], Any]:
        return tensor if name in of_torch else to_gpu

    with torch.cuda.stream(torch.cuda.Stream()), cp.cuda.Stream(non_blocking=True):
        mixed = replace(
            problem,
            key_view=problem.key_view.on(maker("key")),
            value_view=problem.value_view.on(maker("value")),
            cache_views=tuple(view.on(maker("cache")) for view in problem.cache_views),
            **{name: maker("indices")(array) for name, array in problem.indices.items()},
        )
        mixed.append(append_paged_kv_cache)
        if "cache" in of_torch:
            bits = [x.view(torch.uint8).cpu().numpy() for x in mixed.storages]
        else:
            bits = found(mixed)
    assert same_bits(bits, problem.solved())


def test_k_of_cupy_and_v_of_torch(cp: Any, torch: Any, rng: np.random.Generator) -> None:
    problem = build(rng, [90, 5], [70, 2], dtype="float16")
    k, v = problem.cache_views
    tensor = torch_tensor(torch, "cuda")
    with torch.cuda.stream(torch.cuda.Stream()), cp.cuda.Stream(non_blocking=True):
        mixed = replace(problem.on(to_gpu), cache_views=(k.on(to_gpu), v.on(tensor)))
        mixed.append(append_paged_kv_cache)
        of_torch = mixed.storages[1].view(torch.int16).cpu().numpy()
        of_cupy = to_host(mixed.storages[0])
    assert same_bits([of_cupy, of_torch], problem.solved())


def test_keys_of_torch_are_not_reused_too_early(
    cp: Any, torch: Any, rng: np.random.Generator, late_write: Any
) -> None:
    """PyTorch gives the memory of what the caller lets go to the next tensor on its stream."""
    problem = build(rng, [90], [90], dtype="float16")
    check(problem, np.asarray)
    tensor = torch_tensor(torch, "cuda")
    with torch.cuda.stream(torch.cuda.Stream()), cp.cuda.Stream(non_blocking=True) as stream:
        on_gpu = problem.on(to_gpu)
        keys = replace(on_gpu, key_view=problem.key_view.on(tensor))
        shape, dtype = keys.key_view.storage.shape, keys.key_view.storage.dtype
        late_write(cp.empty(4, cp.int32), 1)  # CuPy's stream is busy
        keys.append(append_paged_kv_cache)
        del keys
        others = [torch.full(shape, torch.nan, dtype=dtype, device="cuda") for _ in range(4)]
        torch.cuda.synchronize()
        stream.synchronize()
        del others
    assert same_bits(found(on_gpu), problem.solved())


def test_torch_that_requires_grad(cp: Any, torch: Any, rng: np.random.Generator) -> None:
    """Keys and values as they come out of a layer that is being trained."""
    problem = build(rng, [90, 5], [70, 2], dtype="float32")
    tensor = torch_tensor(torch, "cuda")
    on_torch = problem.on(lambda array: tensor(array).requires_grad_(), tensor)
    on_torch = replace(on_torch, cache_views=tuple(view.on(tensor) for view in problem.cache_views))
    on_torch.append(append_paged_kv_cache)
    assert same_bits([x.cpu().numpy() for x in on_torch.storages], problem.solved())


def test_jax_is_appended_to_a_cupy_cache(cp: Any, jax: Any, rng: np.random.Generator) -> None:
    problem = build(rng, [90, 5], [70, 2], padding=1, dtype="float32")
    for view in (problem.key_view, problem.value_view):  # JAX may quiet a NaN
        view.storage[...] = rng.standard_normal(view.storage.shape)

    def of_jax(array: np.ndarray) -> Any:
        return on_device(jax, array)

    for as_index in (np.asarray, of_jax):
        on_gpu = problem.on(to_gpu, as_index)
        mixed = replace(
            on_gpu,
            key_view=problem.key_view.on(of_jax),
            value_view=problem.value_view.on(of_jax),
        )
        with cp.cuda.Stream(non_blocking=True) as stream:
            mixed.append(append_paged_kv_cache)
            stream.synchronize()
        assert same_bits(found(on_gpu), problem.solved())


def test_a_jax_cache_is_refused(cp: Any, jax: Any, rng: np.random.Generator) -> None:
    problem = build(rng, [20], [3], dtype="float32", cache_form="stacked").on(to_gpu)
    (view,) = problem.cache_views
    of_jax = replace(problem, cache_views=(view.on(lambda x: on_device(jax, to_host(x))),))
    check_error(
        TypeError,
        "paged_kv_cache is a JAX array, which is immutable: keep the cache in arrays of CuPy or "
        "PyTorch, which JAX reads without a copy, or update it in JAX with .at[...].set()",
        of_jax.append,
        append_paged_kv_cache,
    )


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("place", PLACES)
def test_on_the_second_gpu(cp: Any, rng: np.random.Generator, place: str) -> None:
    problem = build(rng, [LAUNCH_ROWS + 9], [LAUNCH_ROWS + 1])
    with cp.cuda.Device(1):
        on_gpu = problem.on(to_gpu, PLACES[place])
    on_gpu.append(append_paged_kv_cache)
    assert cp.cuda.runtime.getDevice() == 0
    with cp.cuda.Device(1):
        assert same_bits(found(on_gpu), problem.solved())
    if place == "device":
        elsewhere = replace(on_gpu, positions=to_gpu(problem.positions))
        check_error(
            ValueError,
            "positions is on cuda:0, expected the host or cuda:1 as the cache is",
            elsewhere.append,
            append_paged_kv_cache,
        )


# Where tokens lie


def test_lengths_and_positions_of_cupy(cp: Any) -> None:
    indptr, last = np.array([0, 2, 2, 3]), np.array([3, 0, 16], np.int32)
    lengths = get_seq_lens(to_gpu(indptr), to_gpu(last), 16)
    assert isinstance(lengths, cp.ndarray)
    assert (lengths.dtype, lengths.get().tolist()) == (np.int32, [19, 0, 16])
    append_indptr = to_gpu(np.array([0, 2, 2, 3], np.int32))
    batch_indices, positions = get_batch_indices_positions(append_indptr, lengths, 5)
    assert batch_indices.get().tolist() == [0, 0, 2, -1, -1]
    assert positions.get().tolist() == [17, 18, 15, 0, 0]
    assert batch_indices.dtype == positions.dtype == np.int32
    given = to_gpu(np.full(7, 77, np.int32))
    found, other = get_batch_indices_positions(append_indptr, lengths, 5, given[1:6])
    assert found.data.ptr == given.data.ptr + 4
    assert given.get().tolist() == [77, 0, 0, 2, -1, -1, 77]
    assert other.get().tolist() == [17, 18, 15, 0, 0]
    empty = get_seq_lens(to_gpu(np.array([0])), to_gpu(np.array([], np.int32)), 16)
    assert (type(empty), empty.shape) == (cp.ndarray, (0,))
    # The first that is no list decides.
    assert isinstance(get_seq_lens([0, 2, 2, 3], to_gpu(last), 16), cp.ndarray)
    assert isinstance(get_seq_lens(indptr, to_gpu(last), 16), np.ndarray)


def test_given_positions_follow_what_is_pending(cp: Any, late_write: Any) -> None:
    with cp.cuda.Stream(non_blocking=True) as stream:
        given = cp.zeros(3, np.int32)
        late_write(given, 77)
        get_batch_indices_positions([0, 2], [5], 3, positions=given)
        stream.synchronize()
        assert given.get().tolist() == [3, 4, 0]


def test_lengths_and_positions_of_torch(cp: Any, torch: Any) -> None:
    indptr = torch.tensor([0, 2, 2, 3], device="cuda")
    last = torch.tensor([3, 0, 16], device="cuda", dtype=torch.int32)
    with torch.cuda.stream(torch.cuda.Stream()):
        lengths = get_seq_lens(indptr, last, 16)
        assert (lengths.dtype, lengths.device) == (torch.int32, last.device)
        assert lengths.tolist() == [19, 0, 16]
        append_indptr = torch.tensor([0, 2, 2, 3], device="cuda")
        given = torch.full((5,), 77, dtype=torch.int32, device="cuda")
        batch_indices, positions = get_batch_indices_positions(
            append_indptr, lengths, 5, positions=given
        )
        assert positions is given
        assert batch_indices.tolist() == [0, 0, 2, -1, -1]
        assert given.tolist() == [17, 18, 15, 0, 0]


def test_lengths_and_positions_of_jax(cp: Any, jax: Any) -> None:
    indptr = on_device(jax, np.array([0, 2, 2, 3], np.int32))
    lengths = get_seq_lens(indptr, [3, 0, 16], 16)
    assert isinstance(lengths, jax.Array)
    assert lengths.devices() == indptr.devices()
    assert np.asarray(lengths).tolist() == [19, 0, 16]
    found = get_batch_indices_positions(indptr, lengths, 4)
    assert [np.asarray(x).tolist() for x in found] == [[0, 0, 2, -1], [17, 18, 15, 0]]
