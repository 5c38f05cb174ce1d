"""Merging attention states on a GPU, against the plain formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import states
from gpu_calls import to_gpu, to_host
from hypothesis import given
from hypothesis import strategies as st
from small_call import check_error
from states import DTYPES, States, bits

from cupaged import merge_cuda
from cupaged.merging import merge_state, merge_state_in_place, merge_states

pytestmark = pytest.mark.gpu

ANY_NUMBER = st.one_of(st.integers(0, 5), st.sampled_from([9, 40]))


def host(x: Any) -> np.ndarray:
    """A copy of an array of any strides."""
    return to_host(x) if x.size else np.empty(x.shape, x.dtype)


# Against the formula


@given(states.draws(ANY_NUMBER))
def test_any_number_of_states(cp: Any, found: States) -> None:
    there = found.on(to_gpu)
    v, s = merge_states(there.v, there.s)
    assert isinstance(v, cp.ndarray)
    assert isinstance(s, cp.ndarray)
    states.check(found.v, found.s, host(v), host(s))


@given(states.draws(st.just(2)))
def test_two_states(cp: Any, found: States) -> None:
    v, s = merge_state(*found.on(to_gpu).pair(0, 1))
    states.check(found.v, found.s, host(v), host(s))


@given(states.draws(st.just(2)), st.sampled_from([None, np.bool_, np.uint8]), st.data())
def test_in_place(cp: Any, found: States, mask_dtype: Any, data: st.DataObject) -> None:
    """Rows outside of the mask, and whatever lies beside the arrays, are left as they are."""
    there = found.on(to_gpu)
    rows, mask = np.ones(len(found.v), np.bool_), None
    if mask_dtype is not None:
        drawn = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
        rows = np.array(drawn, np.bool_)
        storage = np.zeros((len(rows), 2), mask_dtype)
        storage[rows, 0] = 1 if mask_dtype is np.bool_ else 4
        mask = cp.asarray(storage)[:, 0]
    v, s, v_other, s_other = there.pair(0, 1)
    merge_state_in_place(v, s, v_other, s_other, mask)
    after = there.on(to_host)
    states.check(found.v[rows], found.s[rows], after.v[rows, 0], after.s[rows, 0])
    assert bits(after.v[~rows, 0]) == bits(found.v[~rows, 0])
    assert bits(after.s[~rows, 0]) == bits(found.s[~rows, 0])
    assert bits(after.v[:, 1]) == bits(found.v[:, 1])
    assert bits(after.s[:, 1]) == bits(found.s[:, 1])
    assert np.isnan(after.v_view.outside()).all()
    assert np.isnan(after.s_view.outside()).all()


@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_many_rows(
    cp: Any, rng: np.random.Generator, head_dim: int, dtype: str, number: int
) -> None:
    """More than the GPU holds at once, and the same bits again."""
    found = states.build(rng, (1500, number, 8, head_dim), dtype)
    there = found.on(to_gpu)
    v, s = merge_states(there.v, there.s)
    states.check(found.v, found.s, to_host(v), to_host(s))
    again, s_again = merge_states(there.v, there.s)
    assert (bits(to_host(v)), bits(to_host(s))) == (bits(to_host(again)), bits(to_host(s_again)))


# Empty cases, NaN and Inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [24, 25])
@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_one_state_alone_is_the_result_to_the_bit(
    cp: Any, dtype: str, head_dim: int, number: int
) -> None:
    """Not even a signalling NaN is quieted, or minus zero made plus zero."""
    shape = (2, 3, head_dim)
    odd = states.odd(dtype, shape)
    lse = np.array([[1.5, np.inf, np.nan], [-0.0, 3e38, -3e38]], np.float32)
    poison, nothing = np.full(shape, np.nan, DTYPES[dtype]), np.full((2, 3), -np.inf, np.float32)
    for place in range(number):
        parts = [(odd, lse) if i == place else (poison, nothing) for i in range(number)]
        stacked = [to_gpu(np.stack(x, axis=1)) for x in zip(*parts, strict=True)]
        v, s = merge_states(*stacked)
        assert (bits(to_host(v)), bits(to_host(s))) == (bits(odd), bits(lse))
        if number == 2:
            (v, s), other = map(to_gpu, parts[0]), map(to_gpu, parts[1])
            merge_state_in_place(v, s, *other)
            assert (bits(to_host(v)), bits(to_host(s))) == (bits(odd), bits(lse))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_states_without_keys_give_zero(cp: Any, dtype: str, number: int) -> None:
    v = np.full((3, number, 2, 17), np.nan, DTYPES[dtype])
    s = np.full((3, number, 2), -np.inf, np.float32)
    there = cp.empty(v.shape, v.dtype) if number == 0 else to_gpu(v)
    merged_v, merged_s = merge_states(there, cp.asarray(s))
    assert bits(to_host(merged_v)) == bytes(merged_v.nbytes)
    assert np.isneginf(to_host(merged_s)).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (4, 2, 0, 8), (4, 3, 0, 8), (0, 0, 0, 1)])
def test_nothing_is_launched_for_no_rows_or_heads(
    cp: Any, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int]
) -> None:
    monkeypatch.setattr(merge_cuda, "load", None)
    v, s = cp.empty(shape, np.float16), cp.empty(shape[:-1], np.float32)
    merged_v, merged_s = merge_states(v, s)
    assert (merged_v.shape, merged_s.shape) == ((shape[0], *shape[2:]), (shape[0], shape[2]))
    if shape[1] == 2:
        merge_state_in_place(v[:, 0], s[:, 0], v[:, 1], s[:, 1])


@pytest.mark.parametrize("number", [2, 5])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_log_sum_exp_goes_through_as_ieee_has_it(cp: Any, value: float, number: int) -> None:
    v = np.ones((1, number, 2, 64), np.float16)
    s = np.ones((1, number, 2), np.float32)
    s[0, number - 1, 0] = value
    merged_v, merged_s = map(to_host, merge_states(to_gpu(v), to_gpu(s)))
    assert np.isnan(merged_v[0, 0]).all()
    assert np.isnan(merged_s[0, 0])
    assert (merged_v[0, 1] == 1).all()
    assert merged_s[0, 1] == pytest.approx(1 + np.log2(number), abs=1e-6)


@pytest.mark.parametrize("number", [2, 5])
@pytest.mark.parametrize("far", [122.0, 150.0, 3e38])
def test_a_weight_that_vanishes_reads_nothing(cp: Any, far: float, number: int) -> None:
    v = np.full((1, number, 1, 64), np.nan, np.float32)
    v[:, 1] = 3.0
    s = np.full((1, number, 1), -far, np.float32)
    s[:, 1] = 5.0
    merged_v, merged_s = map(to_host, merge_states(to_gpu(v), to_gpu(s)))
    assert (merged_v == 3.0).all()
    assert merged_s == 5.0


def test_a_state_merged_with_itself(cp: Any, rng: np.random.Generator) -> None:
    """Every lane has read the log-sum-exp before one of them writes it."""
    v = rng.standard_normal((2000, 3, 520)).astype(np.float16)
    s = rng.standard_normal((2000, 3)).astype(np.float32)
    there, lse = to_gpu(v), to_gpu(s)
    merge_state_in_place(there, lse, there, lse)
    np.testing.assert_array_equal(to_host(there), v)  # but for the sign of a zero
    np.testing.assert_allclose(to_host(lse), s + 1, atol=1e-6)


# Memory: for compute-sanitizer, arrays are allocated to the byte


@pytest.mark.usefixtures("exact_allocations")
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel(
    cp: Any, rng: np.random.Generator, dtype: str, aligned: bool, number: int
) -> None:
    """With as many vectors as lanes take at once, fewer, and more."""
    step = 16 // DTYPES[dtype].itemsize if aligned else 1
    for vectors in (1, 2, 3, 5, 24, 63, 64, 65, 130):
        found = states.build(rng, (5, number, 3, vectors * step + (not aligned)), dtype)
        there = found.on(to_gpu)
        v, s = merge_states(there.v, there.s)
        states.check(found.v, found.s, to_host(v), to_host(s))


# Where arrays are


def test_arrays_in_the_wrong_place(cp: Any, rng: np.random.Generator) -> None:
    found = states.build(rng, (3, 2, 2, 64))
    here, there = found.pair(0, 1), found.on(to_gpu).pair(0, 1)
    names = ("v_a", "s_a", "v_b", "s_b")
    for i, name in enumerate(names[1:], 1):
        arguments = list(there)
        arguments[i] = here[i]
        message = f"{name} is on the host, expected cuda:0 as v_a is"
        check_error(ValueError, message, merge_state, *arguments)
        arguments = list(here)
        arguments[i] = there[i]
        message = f"{name} is on cuda:0, expected the host as v_a is"
        check_error(ValueError, message, merge_state, *arguments)
    mask = np.ones(3, np.bool_)
    message = "mask is on the host, expected cuda:0 as v is"
    check_error(ValueError, message, merge_state_in_place, *there, mask)


def test_work_is_ordered_on_the_caller_s_stream(
    cp: Any, rng: np.random.Generator, late_write: Any
) -> None:
    """A log-sum-exp that arrives late is read only then."""
    v = to_gpu(np.ones((4, 2, 2, 64), np.float32))
    v[:, 1].view(np.uint32).fill(np.float32(3).view(np.uint32))
    s = to_gpu(np.full((4, 2, 2), -np.inf, np.float32))
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        late_write(s, np.float32(0))
        merged_v, merged_s = merge_states(v, s)
        stream.synchronize()
    assert (to_host(merged_v) == 2).all()
    assert (to_host(merged_s) == 1).all()


def test_in_a_cuda_graph(cp: Any, rng: np.random.Generator) -> None:
    first, then = (states.build(rng, (9, 2, 3, 128), "bfloat16") for _ in range(2))
    there = first.on(to_gpu)
    mask = cp.asarray(rng.random(9) < 0.5)
    rows = mask.get()
    v, s, v_other, s_other = there.pair(0, 1)
    with cp.cuda.Stream(non_blocking=True) as stream:
        merge_state_in_place(v, s, v_other, s_other, mask)  # loads the kernel
        stream.begin_capture()
        merge_state_in_place(v, s, v_other, s_other, mask)
        graph = stream.end_capture()
        there.v_view.storage.view(np.uint16).set(then.v_view.storage.view(np.uint16))
        there.s_view.storage.set(then.s_view.storage)
        graph.launch()
        stream.synchronize()
    after = there.on(to_host)
    states.check(then.v[rows], then.s[rows], after.v[rows, 0], after.s[rows, 0])
    assert bits(after.v[~rows]) == bits(then.v[~rows])


# Other frameworks


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(cp: Any, torch: Any, rng: np.random.Generator, dtype: str) -> None:
    found = states.build(rng, (50, 3, 2, 128), dtype, empty=0.2)
    unsigned = np.int16 if found.v.itemsize == 2 else np.int32

    def tensor(x: np.ndarray) -> Any:
        kind = torch.float32 if x.dtype == np.float32 else getattr(torch, dtype)
        return torch.from_numpy(x.view(f"i{x.itemsize}")).cuda().view(kind)

    def values(x: Any) -> np.ndarray:
        return x.cpu().contiguous().view(getattr(torch, np.dtype(unsigned).name)).numpy()

    with torch.cuda.stream(torch.cuda.Stream()):
        v, s = tensor(found.v), tensor(found.s)
        merged_v, merged_s = merge_states(v, s)
        assert isinstance(merged_v, torch.Tensor)
        assert (merged_v.dtype, merged_v.device) == (v.dtype, v.device)
        states.check(found.v, found.s, values(merged_v).view(DTYPES[dtype]), merged_s.cpu().numpy())
        pair_v, pair_s = merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
        merge_state_in_place(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
        assert torch.equal(s[:, 0], pair_s)
        assert (values(v[:, 0]) == values(pair_v)).all()


def test_torch_in_a_cuda_graph(cp: Any, torch: Any, rng: np.random.Generator) -> None:
    found = states.build(rng, (50, 2, 2, 64), empty=0)
    v, s = torch.from_numpy(found.v).cuda(), torch.from_numpy(found.s).cuda()
    merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged_v, merged_s = merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    then = states.build(rng, (50, 2, 2, 64), empty=0)
    v.copy_(torch.from_numpy(then.v))
    s.copy_(torch.from_numpy(then.s))
    graph.replay()
    torch.cuda.synchronize()
    states.check(then.v, then.s, merged_v.cpu().numpy(), merged_s.cpu().numpy())


def test_jax_arrays(cp: Any, jax: Any, rng: np.random.Generator) -> None:
    found = states.build(rng, (50, 3, 2, 128), "bfloat16")
    device = jax.devices("gpu")[0]
    v, s = jax.device_put(found.v, device), jax.device_put(found.s, device)
    merged_v, merged_s = merge_states(v, s)
    assert isinstance(merged_v, jax.Array)
    assert isinstance(merged_s, jax.Array)
    states.check(found.v, found.s, np.asarray(merged_v), np.asarray(merged_s))
    check_error(
        TypeError,
        "v is a JAX array, which is immutable: merge_state() returns new arrays",
        merge_state_in_place,
        *(v[:, 0], s[:, 0], v[:, 1], s[:, 1]),
    )
