"""How arrays may lie in a GPU's memory, and what the library itself takes of it."""

from __future__ import annotations

import gc
import re
from typing import Any

import batches
import numpy as np
import oracle
import pytest
from gpu_calls import (
    Wrapper,
    check,
    planned,
    to_gpu,
    to_host,
)
from oracle import Formula
from small_call import check_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("family")]

# Strides and addresses


@pytest.mark.parametrize("form", batches.Q_FORMS)
@pytest.mark.parametrize("which", ["q", "out", "both"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_unaligned_and_strided_q_and_out(
    cp: Any, rng: np.random.Generator, form: str, which: str, dtype: str
) -> None:
    q_form = form if which != "out" else "contiguous"
    batch = batches.build(rng, [40, 1, 5], [50, 60, 5], group=3, dtype=dtype, q_form=q_form)
    wrapper = planned(batch, Formula())
    on_gpu = batch.on(to_gpu)
    view = batch.poisoned_out(form if which != "q" else "contiguous").on(to_gpu)
    lse = batch.poisoned_lse(strided=True).on(to_gpu)
    out = view.array
    assert wrapper.run(on_gpu.q, on_gpu.cache, out=out, lse=lse.array) is out
    on_host, lse_on_host = view.on(to_host), lse.on(to_host)
    oracle.check_all(batch, Formula(), on_host.array, lse_on_host.array)
    assert np.isnan(on_host.outside()).all()
    assert np.isnan(lse_on_host.outside()).all()


def with_idle_strides(cp: Any, x: Any, step: int) -> Any:
    """The same elements, with a stride of `step` elements on axes of length 1 but the last."""
    strides = [
        step * x.itemsize if length == 1 else stride
        for length, stride in zip(x.shape[:-1], x.strides, strict=False)
    ]
    view = cp.ndarray(x.shape, x.dtype, x.data, (*strides, x.itemsize))
    assert view.strides != x.strides
    return view


# (page size, KV heads, keys): what has length 1 is the pages, the heads, the page size, or all
IDLE = {
    "one page": (64, 2, 50),
    "one head": (16, 1, 50),
    "pages of one token": (1, 2, 50),
    "one key": (1, 1, 1),
}


@pytest.mark.parametrize("which", ["k", "v", "both"])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize(("page_size", "num_kv_heads", "kv_len"), IDLE.values(), ids=IDLE)
def test_idle_strides_of_the_cache_do_not_matter(
    cp: Any,
    rng: np.random.Generator,
    page_size: int,
    num_kv_heads: int,
    kv_len: int,
    kv_layout: str,
    which: str,
) -> None:
    """Nothing lies a stride along an axis of length 1: frameworks put any number there."""
    batch = batches.build(
        rng,
        [40],
        [kv_len],
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        group=2,
        kv_layout=kv_layout,
        spare_pages=0,
    )
    k, v = batch.on(to_gpu).cache
    if which != "v":
        k = with_idle_strides(cp, k, 3)
    if which != "k":
        v = with_idle_strides(cp, v, 13)
    wrapper = planned(batch, Formula())
    out, lse = wrapper.run(to_gpu(batch.q), (k, v), return_lse=True)
    oracle.check_all(batch, Formula(), to_host(out), to_host(lse))


@pytest.mark.parametrize("which", ["q", "out", "both"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_idle_strides_of_one_row_do_not_matter(
    cp: Any, rng: np.random.Generator, dtype: str, group: int, which: str
) -> None:
    batch = batches.build(rng, [1], [70], num_kv_heads=1, group=group, dtype=dtype)
    q, k_and_v = to_gpu(batch.q), batch.on(to_gpu).cache
    out = memory = to_gpu(batch.poisoned_out().storage)
    if which != "out":
        q = with_idle_strides(cp, q, 7)
    if which != "q":
        out = with_idle_strides(cp, out, 5)
    wrapper = planned(batch, Formula())
    assert wrapper.run(q, k_and_v, out=out) is out
    oracle.check_all(batch, Formula(), to_host(memory))


def test_idle_strides_beside_a_q_that_is_copied(cp: Any, rng: np.random.Generator) -> None:
    """Both at once: q and out go by way of copies, the cache's idle strides are passed over."""
    batch = batches.build(rng, [40], [50], num_kv_heads=1, group=3, q_form="odd")
    k, v = (with_idle_strides(cp, x, 3) for x in batch.on(to_gpu).cache)
    view = batch.poisoned_out("offset").on(to_gpu)
    planned(batch, Formula()).run(batch.on(to_gpu).q, (k, v), out=view.array)
    on_host = view.on(to_host)
    oracle.check_all(batch, Formula(), on_host.array)
    assert np.isnan(on_host.outside()).all()


@pytest.mark.parametrize("name", ["k cache", "v cache"])
@pytest.mark.parametrize("form", ["odd", "offset"])
def test_an_unaligned_cache_is_refused(
    cp: Any, rng: np.random.Generator, name: str, form: str
) -> None:
    batch = batches.build(rng, [4], [20])
    wrapper = planned(batch, Formula())
    storage = np.zeros((5, 16, 2, 64 + (1 if form == "odd" else 8)), np.float16)
    begin = 0 if form == "odd" else 3
    unaligned = to_gpu(storage)[..., begin : begin + 64]
    fine = to_gpu(np.zeros((5, 16, 2, 64), np.float16))
    cache = (unaligned, fine) if name == "k cache" else (fine, unaligned)
    out = to_gpu(batch.poisoned_out().storage)
    with pytest.raises(ValueError) as raised:
        wrapper.run(to_gpu(np.ascontiguousarray(batch.q)), cache, out=out)
    assert str(raised.value) == (
        f"{name} begins at address {unaligned.data.ptr:#x} with strides {unaligned.strides} in "
        "bytes, expected multiples of 16"
    )
    assert np.isnan(to_host(out)).all()


@pytest.mark.parametrize("stacked", [False, True])
def test_a_cache_of_more_than_2_31_elements(
    cp: Any, rng: np.random.Generator, stacked: bool
) -> None:
    """Pages near both ends of it: their offsets do not fit 32 bits, in elements or in bytes."""
    page_size, heads, head_dim = 16, 8, 128
    page_elements = page_size * heads * head_dim * (2 if stacked else 1)
    num_pages = (2**31 + 2**27) // page_elements
    free, _ = cp.cuda.runtime.memGetInfo()
    needed = num_pages * page_elements * 2 * (1 if stacked else 2)
    if free < needed + (2 << 30):
        pytest.skip(f"{free >> 20} MiB of GPU memory are free, the cache takes {needed >> 20}")
    small = batches.build(
        rng,
        [40, 1],
        [300, 200],
        page_size=page_size,
        num_kv_heads=heads,
        group=2,
        head_dim=head_dim,
        cache_form="stacked" if stacked else "tuple",
    )
    spread = np.concatenate([np.arange(20), num_pages - 1 - np.arange(20)])
    place = rng.permutation(spread)[: sum(map(len, small.pages)) + 3]
    huge = []
    for view in small.cache_views:
        pages = cp.empty((num_pages, *view.storage.shape[1:]), np.float16)
        cp.cuda.runtime.memset(pages.data.ptr, 0xFF, pages.nbytes)  # NaN
        for number, at in enumerate(place):
            pages[int(at)].set(view.storage[number])
        huge.append(pages)
    formula = Formula(causal=True)
    wrapper = Wrapper(backend="cuda")
    indices = place[small.paged_kv_indices].astype(np.int32)
    assert int(indices.max()) * page_elements > 2**31
    qo_indptr, kv_indptr, _, last_page_len = small.index_arrays
    wrapper.plan(qo_indptr, kv_indptr, indices, last_page_len, *small.geometry, causal=True)
    out, lse = wrapper.run(
        to_gpu(small.q_view.storage), huge[0] if stacked else tuple(huge), return_lse=True
    )
    oracle.check_all(small, formula, to_host(out), to_host(lse))
    del huge, pages
    cp.get_default_memory_pool().free_all_blocks()


# The workspace


def split_batch(rng: np.random.Generator) -> batches.Batch:
    return batches.build(rng, [1, 40], [500, 300], group=2, head_dim=128)


def workspace_bytes(rng: np.random.Generator) -> int:
    """What a wrapper asks for, by its error."""
    with pytest.raises(ValueError) as raised:
        planned(
            split_batch(rng), Formula(), fixed_split_size=4, workspace=to_gpu(np.zeros(4, "u1"))
        )
    found = re.fullmatch(
        r"float_workspace_buffer has 4 bytes, expected at least (\d+): "
        r"the plan's partial states take that much",
        str(raised.value),
    )
    assert found is not None, str(raised.value)
    return int(found[1])


def test_a_workspace_of_the_exact_size_and_no_byte_more(cp: Any, rng: np.random.Generator) -> None:
    needed = workspace_bytes(rng)
    guard = 4096
    memory = cp.empty(needed + 2 * guard, np.uint8)
    cp.cuda.runtime.memset(memory.data.ptr, 0xFF, memory.nbytes)
    workspace = memory[guard : guard + needed]
    batch = split_batch(rng)
    check(batch, Formula(), fixed_split_size=4, workspace=workspace)
    bytes_after = memory.get()
    assert (bytes_after[:guard] == 0xFF).all()
    assert (bytes_after[-guard:] == 0xFF).all()
    assert not (bytes_after[guard:-guard] == 0xFF).all()
    with pytest.raises(ValueError):
        planned(batch, Formula(), fixed_split_size=4, workspace=workspace[:-1])


def test_an_unaligned_workspace_is_refused(cp: Any) -> None:
    """The kernels store 16 bytes at a time."""
    workspace = cp.empty(1 << 16, np.uint8)[1:]
    message = (
        f"float_workspace_buffer begins at address {workspace.data.ptr:#x}, "
        "expected a multiple of 16"
    )
    check_error(ValueError, message, Wrapper, workspace)
    check_error(ValueError, message, Wrapper().reset_workspace_buffer, workspace)


def test_another_workspace_is_taken_by_the_next_plan_alone(
    cp: Any, rng: np.random.Generator
) -> None:
    """A run between uses the old one, and is right."""
    batch = split_batch(rng)
    on_gpu = batch.on(to_gpu)
    old, new = (cp.empty(workspace_bytes(rng), np.uint8) for _ in range(2))

    def written() -> tuple[bool, bool]:
        """Which of the two a run writes to."""
        for workspace in (old, new):
            cp.cuda.runtime.memset(workspace.data.ptr, 0xFF, workspace.nbytes)
        out, lse = wrapper.run(on_gpu.q, on_gpu.cache, return_lse=True)
        oracle.check_all(batch, Formula(), to_host(out), to_host(lse))
        in_old, in_new = (bool((workspace.get() != 0xFF).any()) for workspace in (old, new))
        return in_old, in_new

    wrapper = planned(batch, Formula(), fixed_split_size=4, workspace=old)
    assert written() == (True, False)
    wrapper.reset_workspace_buffer(new)
    assert written() == (True, False)
    batch.plan(wrapper, fixed_split_size=4)
    assert written() == (False, True)
    wrapper.reset_workspace_buffer(None)
    assert written() == (False, True)
    batch.plan(wrapper, fixed_split_size=4)
    assert written() == (False, False)


def test_a_workspace_of_any_dtype(cp: Any, rng: np.random.Generator) -> None:
    workspace = cp.empty(-(-workspace_bytes(rng) // 4), np.float32)
    check(split_batch(rng), Formula(), fixed_split_size=4, workspace=workspace)


def test_plans_give_their_memory_back(cp: Any, rng: np.random.Generator) -> None:
    batch = split_batch(rng)
    on_gpu = batch.on(to_gpu)
    wrapper = Wrapper(backend="cuda")

    def used() -> int:
        gc.collect()
        return cp.get_default_memory_pool().used_bytes()

    def step() -> None:
        batch.plan(wrapper, fixed_split_size=4)
        wrapper.run(on_gpu.q, on_gpu.cache)

    step()
    cp.cuda.Device().synchronize()
    before = used()
    for _ in range(50):
        step()
    assert used() == before
