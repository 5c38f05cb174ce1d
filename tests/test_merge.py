"""Merging attention states on the host, against the plain formula."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import oracle
import pytest
import states
from hypothesis import given
from hypothesis import strategies as st
from oracle import Formula
from states import DTYPES, States, bits

from cupaged.merging import merge_state, merge_state_in_place, merge_states

ANY_NUMBER = st.one_of(st.integers(0, 5), st.sampled_from([9, 40]))


def in_place(found: States, mask: Any = None) -> tuple[Any, Any]:
    """Merge the second state into the first; the first."""
    v, s, v_other, s_other = found.pair(0, 1)
    assert merge_state_in_place(v, s, v_other, s_other, mask) is None
    return v, s


# Against the formula


@given(states.draws(ANY_NUMBER))
def test_any_number_of_states(found: States) -> None:
    before = bits(found.v_view.storage), bits(found.s_view.storage)
    v, s = merge_states(found.v, found.s)
    assert type(v) is type(s) is np.ndarray
    states.check(found.v, found.s, v, s)
    assert (bits(found.v_view.storage), bits(found.s_view.storage)) == before


@given(states.draws(st.just(2)))
def test_two_states(found: States) -> None:
    v, s = merge_state(*found.pair(0, 1))
    states.check(found.v, found.s, v, s)
    assert not np.shares_memory(v, found.v)
    other_v, other_s = merge_states(found.v, found.s)
    assert (bits(v), bits(s)) == (bits(other_v), bits(other_s))


@given(states.draws(st.just(2)), st.sampled_from([None, np.bool_, np.uint8]), st.data())
def test_in_place(found: States, mask_dtype: Any, data: st.DataObject) -> None:
    """Rows outside of the mask, and whatever lies beside the arrays, are left as they are."""
    v, s = found.v.copy(), found.s.copy()
    rows, mask = np.ones(len(v), np.bool_), None
    if mask_dtype is not None:
        rows = np.array(data.draw(st.lists(st.booleans(), min_size=len(v), max_size=len(v))), "?")
        storage = np.zeros((len(v), 2), mask_dtype)
        mask = storage[:, 0]
        mask[rows] = 1 if mask_dtype is np.bool_ else 4
    merged_v, merged_s = in_place(found, mask)
    states.check(v[rows], s[rows], merged_v[rows], merged_s[rows])
    assert bits(merged_v[~rows]) == bits(v[~rows, 0])
    assert bits(merged_s[~rows]) == bits(s[~rows, 0])
    assert bits(found.v[:, 1]) == bits(v[:, 1])
    assert bits(found.s[:, 1]) == bits(s[:, 1])
    assert np.isnan(found.v_view.outside()).all()
    assert np.isnan(found.s_view.outside()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_partition_of_the_keys(rng: np.random.Generator, dtype: str) -> None:
    """States over parts of the keys merge into attention over all of them."""
    rows, keys, kv_heads, group, dim = 6, 50, 2, 3, 40
    q, k, v = (
        rng.standard_normal((n, heads, dim))
        for n, heads in ((rows, kv_heads * group), (keys, kv_heads), (keys, kv_heads))
    )
    part = rng.integers(0, 7, keys)  # some may be empty
    found = states.build(rng, (rows, 8, kv_heads * group, dim), dtype)
    for i in range(8):
        out, lse = oracle.attend(q, k[part == i], v[part == i], Formula())
        found.v[:, i], found.s[:, i] = out.astype(DTYPES[dtype]), lse.astype(np.float32)
    assert np.isneginf(found.s[:, 7]).all()
    found.v[np.isneginf(found.s)] = np.nan
    expected, expected_lse = oracle.attend(q, k, v, Formula())
    merged_v, merged_s = merge_states(found.v, found.s)
    largest = np.abs(np.where(np.isnan(found.v), 0, found.v).astype(np.float64)).max()
    # One rounding of each part's output, one of the result, and the weights'.
    allowed = largest * (2 * states.UNIT_ROUNDOFF[dtype] + 8 * states.WEIGHT_ERROR)
    assert np.abs(merged_v.astype(np.float64) - expected).max() <= allowed
    assert np.abs(merged_s - expected_lse).max() <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_the_states_does_not_matter(rng: np.random.Generator, dtype: str) -> None:
    found = states.build(rng, (7, 4, 3, 33), dtype, empty=0.2)
    for order in itertools.permutations(range(4)):
        v, s = merge_states(found.v[:, order], found.s[:, order])
        states.check(found.v, found.s, v, s)


def test_one_after_the_other(rng: np.random.Generator) -> None:
    """In float32, where roundings in between are small."""
    found = states.build(rng, (7, 5, 3, 64), "float32")
    v, s = found.v[:, 0], found.s[:, 0]
    for i in range(1, 5):
        v, s = merge_state(v, s, found.v[:, i], found.s[:, i])
        merge_state_in_place(found.v[:, 0], found.s[:, 0], found.v[:, i], found.s[:, i])
    assert (bits(v), bits(s)) == (bits(found.v[:, 0]), bits(found.s[:, 0]))
    again = states.build(rng, (7, 5, 3, 64), "float32")
    v, s = again.v[:, 0], again.s[:, 0]
    for i in range(1, 5):
        v, s = merge_state(again.v[:, i], again.s[:, i], v, s)
    expected, expected_s = states.merged(again.v, again.s)
    np.testing.assert_allclose(v, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(s, expected_s, rtol=1e-6, atol=1e-5)


# Empty cases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_state_alone_is_the_result_to_the_bit(dtype: str, number: int) -> None:
    """Not even a signalling NaN is quieted, or minus zero made plus zero."""
    shape = (2, 3, 24)
    odd, lse = (
        states.odd(dtype, shape),
        np.array([[1.5, np.inf, np.nan], [-0.0, 3e38, -3e38]], "f4"),
    )
    poison, nothing = np.full(shape, np.nan, DTYPES[dtype]), np.full((2, 3), -np.inf, "f4")
    for place in range(number):
        parts = [(odd, lse) if i == place else (poison, nothing) for i in range(number)]
        v, s = merge_states(*(np.stack(x, axis=1) for x in zip(*parts, strict=True)))
        assert (bits(v), bits(s)) == (bits(odd), bits(lse))
        if number == 2:
            v, s = merge_state(*parts[0], *parts[1])
            assert (bits(v), bits(s)) == (bits(odd), bits(lse))
            (v, s), other = [x.copy() for x in parts[0]], parts[1]
            merge_state_in_place(v, s, *other)
            assert (bits(v), bits(s)) == (bits(odd), bits(lse))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_states_without_keys_give_zero(dtype: str, number: int) -> None:
    v = np.full((3, number, 2, 17), np.nan, DTYPES[dtype])
    s = np.full((3, number, 2), -np.inf, np.float32)
    results = [merge_states(v, s)]
    if number == 2:
        results.append(merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1]))
        merge_state_in_place(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
        results.append((v[:, 0], s[:, 0]))
    for merged_v, merged_s in results:
        assert merged_v.shape == (3, 2, 17)
        assert bits(merged_v) == bytes(merged_v.nbytes)
        assert np.isneginf(merged_s).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (4, 2, 0, 8), (0, 0, 0, 1)])
def test_no_rows_or_no_heads(shape: tuple[int, int, int, int]) -> None:
    v, s = np.empty(shape, np.float16), np.empty(shape[:-1], np.float32)
    merged_v, merged_s = merge_states(v, s)
    assert (merged_v.shape, merged_v.dtype) == ((shape[0], *shape[2:]), np.float16)
    assert merged_s.shape == (shape[0], shape[2])
    if shape[1]:
        merge_state_in_place(v[:, 0], s[:, 0], v[:, 1], s[:, 1], np.empty(shape[0], np.bool_))


@pytest.mark.parametrize("far", [122.0, 150.0, 3e38])
def test_a_weight_that_vanishes_reads_nothing(far: float) -> None:
    """A state far below another weighs 0, and 0 * NaN is not 0."""
    v = np.full((1, 2, 1, 4), np.nan, np.float32)
    v[:, 0] = 3.0
    merged_v, merged_s = merge_states(v, np.array([[[5.0], [-far]]], np.float32))
    assert (merged_v == 3.0).all()
    assert merged_s == 5.0


def test_a_small_weight_is_one() -> None:
    v = np.full((1, 2, 1, 4), np.inf, np.float32)
    v[:, 0] = 3.0
    merged_v, _ = merge_states(v, np.array([[[5.0], [-120.0]]], np.float32))
    assert np.isposinf(merged_v).all()


# NaN and Inf


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_log_sum_exp_goes_through_as_ieee_has_it(value: float) -> None:
    v = np.ones((1, 3, 2, 4), np.float32)
    s = np.array([[[value, 0.0], [1.0, 1.0], [-np.inf, 2.0]]], np.float32)
    merged_v, merged_s = merge_states(v, s)
    assert np.isnan(merged_v[0, 0]).all()
    assert np.isnan(merged_s[0, 0])
    assert (merged_v[0, 1] == 1).all()


def test_an_output_goes_through_as_ieee_has_it() -> None:
    v = np.ones((1, 2, 1, 4), np.float16)
    v[0, 0, 0] = np.nan, np.inf, -np.inf, 65504
    v[0, 1, 0] = 1, 1, np.inf, 65504
    merged_v, merged_s = merge_states(v, np.zeros((1, 2, 1), np.float32))
    np.testing.assert_array_equal(merged_v[0, 0], np.array([np.nan, np.inf, np.nan, 65504], "f2"))
    assert merged_s == 1.0


def test_a_state_merged_with_itself() -> None:
    v, s = np.arange(8, dtype=np.float16).reshape(2, 1, 4), np.array([[3.0], [-9.0]], np.float32)
    before = v.copy()
    merge_state_in_place(v, s, v, s)
    assert (v == before).all()
    assert s.tolist() == [[4.0], [-8.0]]


# Arrays of frameworks


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(rng: np.random.Generator, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    found = states.build(rng, (4, 3, 2, 40), "float32", form="odd")
    v = torch.from_numpy(found.v_view.storage).to(getattr(torch, dtype))[found.v_view.index]
    s = torch.from_numpy(found.s)

    def host(x: Any) -> np.ndarray:
        x = x.contiguous()
        return (
            x.view(torch.int16).numpy().view(states.BFLOAT16) if dtype == "bfloat16" else x.numpy()
        )

    merged_v, merged_s = merge_states(v, s)
    assert isinstance(merged_v, torch.Tensor)
    assert merged_v.dtype == v.dtype
    assert merged_s.dtype == torch.float32
    states.check(host(v), found.s, host(merged_v), merged_s.numpy())
    pair = v[:, :2].clone(), s[:, :2].clone()
    merged_v, merged_s = merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    states.check(host(pair[0]), pair[1].numpy(), host(merged_v), merged_s.numpy())
    mask = torch.tensor([True, False, True, True])
    merge_state_in_place(v[:, 0], s[:, 0], v[:, 1], s[:, 1], mask)
    assert torch.equal(merged_s[mask], s[mask, 0])
    assert torch.equal(s[1, 0], pair[1][1, 0])


def test_jax_arrays(rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    found = states.build(rng, (4, 3, 2, 40), "bfloat16")
    with jax.default_device(jax.devices("cpu")[0]):
        v, s = jax.numpy.asarray(found.v), jax.numpy.asarray(found.s)
        merged_v, merged_s = merge_states(v, s)
    assert isinstance(merged_v, jax.Array)
    assert isinstance(merged_s, jax.Array)
    states.check(found.v, found.s, np.asarray(merged_v), np.asarray(merged_s))
