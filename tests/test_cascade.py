"""The cascade on host arrays, against the plain formula over the keys of all levels."""

from __future__ import annotations

from typing import Any

import batches
import cascades
import numpy as np
import pytest
from cascades import Cascade
from hypothesis import given
from hypothesis import strategies as st

import cupaged
from cupaged.cascade import MultiLevelCascadeAttentionWrapper

Results = tuple[np.ndarray, np.ndarray]


def attention(cascade: Cascade, **options: Any) -> Results:
    """Plan, run into poisoned arrays; out and LSE."""
    wrapper = MultiLevelCascadeAttentionWrapper(
        cascade.num_levels, kv_layout=cascade.flat.kv_layout, backend="reference"
    )
    cascade.plan(wrapper, **options)
    out, lse = cascade.flat.poisoned_out().array, cascade.flat.poisoned_lse().array
    assert wrapper.run(cascade.flat.q, cascade.flat.cache, out=out, lse=lse) is out
    return out, lse


@given(cascades.calls(), st.sampled_from(batches.Q_FORMS), st.booleans())
def test_random_cascades_equal_the_formula(
    call: tuple[Cascade, bool], out_form: str, return_lse: bool
) -> None:
    cascade, causal = call
    wrapper = MultiLevelCascadeAttentionWrapper(
        cascade.num_levels, kv_layout=cascade.flat.kv_layout
    )
    cascade.plan(wrapper, causal=causal)
    q_and_cache = cascade.flat.q, cascade.flat.cache
    result = wrapper.run(*q_and_cache, return_lse=return_lse)
    cascades.check(cascade, *(result if return_lse else (result,)), causal=causal)
    view, lse = cascade.flat.poisoned_out(out_form), cascade.flat.poisoned_lse(strided=True)
    wrapper.forward(*q_and_cache, out=view.array, lse=lse.array)
    cascades.check(cascade, view.array, lse.array, causal=causal)
    assert np.isnan(view.outside()).all()
    assert np.isnan(lse.outside()).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_levels(rng: np.random.Generator, dtype: str, page_size: int, causal: bool) -> None:
    """A long prefix that all share, and a few keys of each request's own."""
    cascade = cascades.build(
        rng, [1, 5, 2], [[1500], [1, 40, 7]], [[3]], page_size=page_size, group=4, dtype=dtype
    )
    cascades.check(cascade, *attention(cascade, causal=causal), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_three_levels(rng: np.random.Generator, causal: bool) -> None:
    """A system prompt, documents, and questions about them."""
    cascade = cascades.build(
        rng,
        [3, 1, 4, 2, 6],
        [[300], [80, 0, 33], [9, 1, 4, 30, 6]],
        [[3], [2, 1, 2]],
        group=2,
        head_dim=128,
    )
    cascades.check(cascade, *attention(cascade, causal=causal), causal=causal)


@pytest.mark.parametrize("options", [{"logits_soft_cap": 2.0}, {"logits_soft_cap": 30.0}])
@pytest.mark.parametrize("causal", [False, True])
def test_soft_caps(rng: np.random.Generator, causal: bool, options: dict[str, Any]) -> None:
    cascade = cascades.build(rng, [1, 5, 2], [[300], [1, 40, 7]], [[3]], group=4, magnitude=4.0)
    results = attention(cascade, causal=causal, **options)
    cascades.check(cascade, *results, causal=causal, **options)


@pytest.mark.parametrize("kv_dtype", batches.FLOAT8_DTYPES)
def test_float8(rng: np.random.Generator, kv_dtype: str) -> None:
    cascade = cascades.build(rng, [1, 5, 2], [[300], [1, 40, 7]], [[3]], kv_dtype=kv_dtype)
    cascades.check(cascade, *attention(cascade, kv_data_type=kv_dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"window_left": 9},
        {"pos_encoding_mode": "ALIBI"},
        {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0, "rope_theta": 1e3},
    ],
)
def test_one_level_has_what_needs_a_place_among_the_keys(
    rng: np.random.Generator, options: dict[str, Any]
) -> None:
    cascade = cascades.build(rng, [3, 5, 2], [[30, 5, 70]], [], group=2)
    cascades.check(cascade, *attention(cascade, causal=True, **options), causal=True, **options)


@pytest.mark.parametrize(
    "kv_len", [[[0], [0, 0]], [[0], [5, 9]], [[20], [0, 0]], [[20], [0, 3]], [[0], [0, 3]]]
)
def test_levels_without_keys(rng: np.random.Generator, kv_len: list[list[int]]) -> None:
    cascade = cascades.build(rng, [2, 3], kv_len, [[2]])
    out, lse = attention(cascade)
    cascades.check(cascade, out, lse)
    unseen = np.repeat([kv_len[0][0] + own == 0 for own in kv_len[1]], [2, 3])
    assert (out[unseen] == 0).all()
    assert np.isneginf(lse[unseen]).all()


@pytest.mark.parametrize("empty", [0, 1])
def test_a_level_without_keys_changes_no_bit(rng: np.random.Generator, empty: int) -> None:
    """The result is the other level's, as it is."""
    kv_len = [[0], [0, 0]]
    kv_len[1 - empty] = [[70], [30, 1]][1 - empty]
    cascade = cascades.build(rng, [2, 3], kv_len, [[2]])
    out, lse = attention(cascade)
    alone = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend="reference")
    alone.plan(*cascade.level(1 - empty), *cascade.flat.geometry)
    expected, expected_lse = alone.run(cascade.flat.q, cascade.flat.cache, return_lse=True)
    assert out.tobytes() == expected.tobytes()
    assert lse.tobytes() == expected_lse.tobytes()


def test_one_level_is_the_plain_wrapper(rng: np.random.Generator) -> None:
    cascade = cascades.build(rng, [2, 30], [[70, 30]], [])
    out, lse = attention(cascade, causal=True)
    plain = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend="reference")
    plain.plan(*cascade.level(0), *cascade.flat.geometry, causal=True)
    expected, expected_lse = plain.run(cascade.flat.q, cascade.flat.cache, return_lse=True)
    assert out.tobytes() == expected.tobytes()
    assert lse.tobytes() == expected_lse.tobytes()


def test_causal_hides_nothing_of_the_levels_above(rng: np.random.Generator) -> None:
    """The first row of a request sees its first key, and all keys that it shares."""
    cascade = cascades.build(rng, [8], [[4], [8]], [[1]], num_kv_heads=1)
    k, v = cascade.flat.keys_and_values()
    k[...] = 0  # all keys weigh the same
    v[...] = 0
    shared, own = cascade.flat.pages[0][0], cascade.flat.pages[1][0]
    v[shared, :4], v[own, :8] = 3, np.arange(8)[:, None, None]
    out, lse = attention(cascade, causal=True)
    rows = np.arange(8)
    expected = (4 * 3 + rows * (rows + 1) / 2) / (5 + rows)
    np.testing.assert_allclose(out[:, 0, 0], expected, rtol=2e-3)
    np.testing.assert_allclose(lse[:, 0], np.log2(5 + rows), rtol=1e-6)


@pytest.mark.parametrize("sm_scale", [0.0, -0.3, 1.0])
def test_sm_scale(rng: np.random.Generator, sm_scale: float) -> None:
    cascade = cascades.build(rng, [2, 3], [[50], [9, 20]], [[2]], magnitude=0.3)
    out, lse = attention(cascade, sm_scale=sm_scale)
    cascades.check(cascade, out, lse, sm_scale=sm_scale)


@pytest.mark.parametrize("lengths", [([], [[], []], [[]]), ([0, 0], [[9], [3, 0]], [[2]])])
def test_no_rows_at_all(rng: np.random.Generator, lengths: Any) -> None:
    cascade = cascades.build(rng, *lengths)
    out, lse = attention(cascade)
    assert out.shape == (0, 2, 64)
    assert lse.shape == (0, 2)


def test_lists_and_tuples(rng: np.random.Generator) -> None:
    cascade = cascades.build(rng, [1, 1, 1], [[40], [1, 16, 0]], [[3]], kv_layout="HND")
    wrapper = MultiLevelCascadeAttentionWrapper(2, None, "HND")
    qo, kv, pages, last = cascade.index_arrays
    wrapper.begin_forward(
        tuple(x.tolist() for x in qo),
        [x.tolist() for x in kv],
        [[*map(int, x), 10**6] for x in pages],  # entries beyond the last are not looked at
        last,
        *cascade.flat.geometry,
    )
    cascades.check(cascade, wrapper.run(cascade.flat.q, cascade.flat.cache))


def test_a_plan_serves_many_layers(rng: np.random.Generator) -> None:
    """And what index arrays become after it does not matter."""
    cascade = cascades.build(rng, [4, 2], [[50], [9, 20]], [[2]])
    wrapper = MultiLevelCascadeAttentionWrapper(2)
    arrays = cascade.index_arrays
    wrapper.plan(*arrays, *cascade.flat.geometry, causal=True)
    for levels in arrays:
        for array in levels:
            array[...] = -1
    for _ in range(3):
        cascade.flat.q[...] = rng.standard_normal(cascade.flat.q.shape)
        out = wrapper.run(cascade.flat.q, cascade.flat.cache)
        assert type(out) is np.ndarray
        cascades.check(cascade, out, causal=True)


def test_a_workspace_is_shared(rng: np.random.Generator) -> None:
    cascade = cascades.build(rng, [4, 2], [[3000], [900, 20]], [[2]])
    wrapper = MultiLevelCascadeAttentionWrapper(2, np.zeros(1 << 22, np.uint8))
    cascade.plan(wrapper)
    cascades.check(cascade, wrapper.run(cascade.flat.q, cascade.flat.cache))
    wrapper.reset_workspace_buffer(None)
    cascade.plan(wrapper)
    cascades.check(cascade, wrapper.run(cascade.flat.q, cascade.flat.cache))


def test_a_shared_prefix_is_computed_once(rng: np.random.Generator) -> None:
    """Not once a request: its keys are those of one item's range for all rows."""
    cascade = cascades.build(rng, [1] * 16, [[1024], [16] * 16], [[16]], num_kv_heads=1)
    wrapper = MultiLevelCascadeAttentionWrapper(2, backend="reference")
    cascade.plan(wrapper)
    assert wrapper._planned is not None
    keys = []
    for level in wrapper._planned.wrappers:
        launches = level._plan.schedule.launches
        items = [item for launch in launches for item in launch.items]
        keys.append(sum(int(item["kv_end"] - item["kv_begin"]) for item in items))
    assert keys == [1024, 16 * 16]


# Arrays of frameworks


def test_torch_tensors_on_the_host(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    cascade = cascades.build(rng, [1, 5, 2], [[100], [1, 40, 7]], [[3]], dtype="bfloat16")

    def tensor(x: np.ndarray) -> Any:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)

    there = cascade.on(tensor)
    wrapper = MultiLevelCascadeAttentionWrapper(2)
    cascade.plan(wrapper, q_data_type=torch.bfloat16, causal=True)
    out, lse = wrapper.run(there.flat.q, there.flat.cache, return_lse=True)
    assert isinstance(out, torch.Tensor)
    assert isinstance(lse, torch.Tensor)
    values = out.view(torch.int16).numpy().view(batches.DTYPES["bfloat16"])
    cascades.check(cascade, values, lse.numpy(), causal=True)


def test_jax_arrays_on_the_host(rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    cascade = cascades.build(rng, [1, 5, 2], [[100], [1, 40, 7]], [[3]])
    with jax.default_device(jax.devices("cpu")[0]):
        there = cascade.on(jax.numpy.asarray)
        wrapper = MultiLevelCascadeAttentionWrapper(2)
        cascade.plan(wrapper)
        out = wrapper.run(there.flat.q, there.flat.cache)
    assert isinstance(out, jax.Array)
    cascades.check(cascade, np.asarray(out))
