"""Appending to a paged cache on the host, against a plain loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import page_problems
import pytest
from hypothesis import given
from page_problems import Problem, View, build, same_bits, torch_tensor
from processes import run_python

from cupaged.page import append_paged_kv_cache


def check(problem: Problem) -> None:
    """Append, and look at every bit of the memory that the cache lies in."""
    expected = problem.solved()
    problem.append(append_paged_kv_cache)
    assert same_bits(problem.storages, expected)


@given(page_problems.problems())
def test_random_appends_equal_a_loop(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("cache_form", page_problems.CACHE_FORMS)
def test_whole_prompts_fill_their_pages(
    rng: np.random.Generator, cache_form: str, kv_layout: str
) -> None:
    """Enough rows that every slot of many pages is written, and the spare ones are not."""
    problem = build(
        rng, [700, 33, 0, 90], [700, 33, 0, 90], cache_form=cache_form, kv_layout=kv_layout
    )
    before = [storage.copy() for storage in problem.storages]
    check(problem)
    assert not same_bits(problem.storages, before)


def test_token_by_token_equals_all_at_once(rng: np.random.Generator) -> None:
    """As a cache grows: each step counts one token more."""
    whole = build(rng, [37], [37], page_size=5)
    expected = whole.solved()
    for n in range(37):
        pages = n // 5 + 1
        append_paged_kv_cache(
            whole.key_view.array[n : n + 1],
            whole.value_view.array[n : n + 1],
            [0],
            [n],
            whole.cache,
            whole.kv_indices,
            [0, pages],
            [n % 5 + 1],
        )
    assert same_bits(whole.storages, expected)


@pytest.mark.parametrize("position", [-(2**31), -1, 0, 4, 2**31 - 1])
def test_padding_is_passed_over(rng: np.random.Generator, position: int) -> None:
    problem = build(rng, [20, 5], [3, 2], padding=4)
    padding = problem.batch_indices == -1
    assert padding.sum() == 4
    problem.positions[padding] = position
    check(problem)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("kv_len", [[], [0], [20, 0, 5]])
def test_nothing_to_append(rng: np.random.Generator, kv_len: list[int], padding: int) -> None:
    problem = build(rng, kv_len, [0] * len(kv_len), padding=padding)
    before = [storage.copy() for storage in problem.storages]
    problem.append(append_paged_kv_cache)
    assert same_bits(problem.storages, before)


def test_a_cache_of_no_pages(rng: np.random.Generator) -> None:
    check(build(rng, [0, 0], [0, 0], padding=2, spare_pages=0))


def test_lists_are_index_arrays(rng: np.random.Generator) -> None:
    problem = build(rng, [20, 5], [3, 2], padding=1)
    expected = problem.solved()
    problem.on(lambda array: array, lambda array: array.tolist()).append(append_paged_kv_cache)
    assert same_bits(problem.storages, expected)


def test_strided_index_arrays(rng: np.random.Generator) -> None:
    problem = build(rng, [20, 5], [3, 2], padding=1)
    expected = problem.solved()

    def strided(array: np.ndarray) -> np.ndarray:
        return np.repeat(array, 2)[::2]

    problem.on(lambda array: array, strided).append(append_paged_kv_cache)
    assert same_bits(problem.storages, expected)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("cache_form", ["tuple", "stacked", "v with it"])
def test_pages_of_one_token_without_its_axis(
    rng: np.random.Generator, cache_form: str, kv_layout: str
) -> None:
    """As `run()` takes them. There are as many heads as halves of a stacked cache."""
    form = "stacked" if cache_form == "stacked" else "tuple"
    shape = {"page_size": 1, "num_kv_heads": 2, "cache_form": form, "kv_layout": kv_layout}
    problem = build(rng, [9, 5], [3, 2], padding=1, **shape)
    expected = problem.solved()
    views = [view.array for view in problem.cache_views]
    bare = [view.squeeze(-3 if kv_layout == "NHD" else -2) for view in views]
    cache = {"tuple": tuple(bare), "stacked": bare[0], "v with it": (bare[0], views[-1])}
    append_paged_kv_cache(
        *(problem.key_view.array, problem.value_view.array),
        *(problem.batch_indices, problem.positions, cache[cache_form]),
        *(problem.kv_indices, problem.kv_indptr, problem.kv_last_page_len, kv_layout),
    )
    assert same_bits(problem.storages, expected)


def test_the_cache_may_be_a_list(rng: np.random.Generator) -> None:
    problem = build(rng, [20], [3])
    expected = problem.solved()
    arguments = (problem.batch_indices, problem.positions, list(problem.cache))
    rest = (problem.kv_indices, problem.kv_indptr, problem.kv_last_page_len)
    append_paged_kv_cache(problem.key_view.array, problem.value_view.array, *arguments, *rest)
    assert same_bits(problem.storages, expected)


def test_a_prefix_shared_by_two_requests(rng: np.random.Generator) -> None:
    """Only two rows in one slot are a mistake; pages that nobody writes to may be anyone's."""
    problem = build(rng, [20, 21], [4, 5])
    problem.kv_indices[int(problem.kv_indptr[1])] = problem.kv_indices[0]
    check(problem)


# What a call has found serves the next, as long as it is still true


#: An index array of the small problem below, and other values of it.
CHANGES: dict[str, list[int]] = {
    "batch_indices": [1, 0],
    "positions": [0, 2],
    "kv_indices": [2, 0, 1],
    "kv_indptr": [0, 2, 3],
}


def small_problem(rng: np.random.Generator) -> Problem:
    """A row for the first request's one page, and one for the first of the second's two."""
    problem = build(rng, [4, 8], [1, 1], page_size=4, spare_pages=0)
    problem.positions[:] = 1
    problem.kv_indices[:3] = 0, 1, 2
    assert problem.kv_indptr.tolist() == [0, 1, 3]
    return problem


@pytest.mark.parametrize("name", CHANGES)
def test_index_arrays_that_change_in_place(rng: np.random.Generator, name: str) -> None:
    problem = small_problem(rng)
    check(problem)
    before = [storage.copy() for storage in problem.storages]
    values = CHANGES[name]
    getattr(problem, name)[: len(values)] = values
    check(problem)
    assert not same_bits(problem.storages, before)


def test_a_request_that_becomes_shorter(rng: np.random.Generator) -> None:
    problem = small_problem(rng)
    check(problem)
    problem.kv_last_page_len[0] = 1
    with pytest.raises(
        ValueError, match=r"^positions\[0\] = 1, expected 0..0: request 0 has 1 tok"
    ):
        problem.append(append_paged_kv_cache)


def test_pages_that_nobody_appends_to_may_change(rng: np.random.Generator) -> None:
    """Also to what is no page: planning is where they are looked at."""
    problem = build(rng, [40], [1])
    check(problem)
    problem.kv_indices[0] = 10**6
    check(problem)


def test_the_same_bytes_of_another_dtype(rng: np.random.Generator) -> None:
    """Indices of one row in int64 have the bytes of indices of two rows in int32."""
    two, one = (build(rng, [5], [n], page_size=8) for n in (2, 1))
    two.positions[:] = 4, 0
    one = replace(
        one,
        batch_indices=one.batch_indices.astype(np.int64),
        positions=one.positions.astype(np.int64),
        kv_indices=two.kv_indices,
    )
    assert one.batch_indices.tobytes() == two.batch_indices.tobytes()
    assert one.positions.tobytes() == two.positions.tobytes()
    check(two)
    check(one)


def test_pages_of_another_size(rng: np.random.Generator) -> None:
    """The same indices say another slot."""
    for page_size in (8, 16):
        problem = build(rng, [page_size + 5], [1], page_size=page_size, spare_pages=0)
        problem.positions[0] = 12
        problem.kv_indices[:2] = 0, 1
        check(problem)


def test_fewer_pages(rng: np.random.Generator) -> None:
    problem = build(rng, [5], [2])
    problem.kv_indices[0] = 2
    check(problem)
    fewer = replace(problem, cache_views=tuple(View(v.storage[:2]) for v in problem.cache_views))
    with pytest.raises(ValueError, match="the cache holds 2 pages"):
        fewer.append(append_paged_kv_cache)


# Frameworks, on the host


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize("cache_form", ["tuple", "stacked"])
def test_torch_on_the_host(rng: np.random.Generator, dtype: str, cache_form: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch_tensor(torch, "cpu")
    problem = build(rng, [20, 5], [3, 2], padding=1, dtype=dtype, cache_form=cache_form)
    expected = problem.solved()
    on_torch = problem.on(tensor, tensor)
    on_torch.append(append_paged_kv_cache)
    found = [x.view(torch.uint8).numpy() for x in on_torch.storages]
    assert same_bits(found, expected)


def test_jax_is_appended_to_a_numpy_cache(rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    problem = build(rng, [20, 5], [3, 2], padding=1, dtype="float32")
    # Not any bits: JAX may quiet a NaN.
    for view in (problem.key_view, problem.value_view):
        view.storage[...] = rng.standard_normal(view.storage.shape)
    expected = problem.solved()
    on_jax = replace(
        problem,
        key_view=problem.key_view.on(jax.numpy.asarray),
        value_view=problem.value_view.on(jax.numpy.asarray),
        positions=jax.numpy.asarray(problem.positions),
    )
    on_jax.append(append_paged_kv_cache)
    assert same_bits(problem.storages, expected)


def test_a_jax_cache_is_refused(rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    problem = build(rng, [20], [3], dtype="float32")
    k, v = problem.cache
    for cache, name in (
        ((k, jax.numpy.asarray(v)), "v cache"),
        ((jax.numpy.asarray(k), v), "k cache"),
        (jax.numpy.asarray(k), "paged_kv_cache"),
    ):
        with pytest.raises(TypeError) as raised:
            append_paged_kv_cache(
                problem.key_view.array,
                problem.value_view.array,
                problem.batch_indices,
                problem.positions,
                cache,
                problem.kv_indices,
                problem.kv_indptr,
                problem.kv_last_page_len,
            )
        assert str(raised.value) == (
            f"{name} is a JAX array, which is immutable: keep the cache in arrays of CuPy or "
            "PyTorch, which JAX reads without a copy, or update it in JAX with .at[...].set()"
        )


def test_no_framework_is_imported() -> None:
    """Not for host arrays, and neither by the import."""
    script = (
        "import sys, numpy as np\n"
        "from cupaged.page import append_paged_kv_cache, get_seq_lens\n"
        "cache = np.zeros((3, 4, 2, 8), np.float16)\n"
        "key = np.ones((1, 2, 8), np.float16)\n"
        "append_paged_kv_cache(key, key, [0], [2], (cache, cache.copy()), [1], [0, 1], [3])\n"
        "print(cache.any(axis=(2, 3)).nonzero(), get_seq_lens([0, 1], [3], 4))\n"
        "print({'cupy', 'torch', 'jax'} & set(sys.modules))"
    )
    done = run_python("-c", script)
    assert done.stdout.splitlines() == ["(array([1]), array([2])) [3]", "set()"], done.stderr


@pytest.mark.parametrize("cache_form", ["tuple", "stacked"])
def test_a_cache_with_one_place_for_many_tokens_is_refused(
    rng: np.random.Generator, cache_form: str
) -> None:
    problem = build(rng, [20], [3], cache_form=cache_form)
    pages, *others = (view.array for view in problem.cache_views)
    strided = np.lib.stride_tricks.as_strided(pages, strides=(0, *pages.strides[1:]))
    beside = np.lib.stride_tricks.as_strided(
        pages, strides=(pages.strides[0], 0, *pages.strides[2:])
    )
    if others:
        cases = [
            ((pages, strided), "v cache has a stride of 0 on axis 0"),
            ((beside, *others), "k cache has a stride of 0 on axis 1"),
            ((pages, pages), "k cache and v cache share memory"),
        ]
    else:
        cases = [
            (strided, "paged_kv_cache has a stride of 0 on axis 0"),
            (beside, "paged_kv_cache has a stride of 0 on axis 1"),
        ]
    before = [storage.copy() for storage in problem.storages]
    for cache, words in cases:
        with pytest.raises(ValueError) as raised:
            append_paged_kv_cache(
                *(problem.key_view.array, problem.value_view.array),
                *(problem.batch_indices, problem.positions, cache),
                *(problem.kv_indices, problem.kv_indptr, problem.kv_last_page_len),
            )
        assert str(raised.value) == f"{words}, expected elements of their own"
    assert same_bits(problem.storages, before)


@pytest.mark.parametrize("axis", range(5))
def test_k_and_v_between_each_other(rng: np.random.Generator, axis: int) -> None:
    """In one piece of memory: one behind the other, or by pages, by tokens, by heads, in heads."""
    problem = build(rng, [90, 33, 20], [90, 2, 3], padding=1)
    if axis < 4:
        between = tuple(np.moveaxis(np.stack(problem.cache, axis), axis, 0))
    else:
        both = np.concatenate(problem.cache, axis=3)
        between = both[..., :64], both[..., 64:]
    replace(problem, cache_views=tuple(map(View, between))).append(append_paged_kv_cache)
    check(problem)
    assert same_bits(list(map(np.ascontiguousarray, between)), problem.storages)
