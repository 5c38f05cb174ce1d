"""xFormers' door, against `materialize()` of xFormers' own masks and the float64 formula."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import doors
import numpy as np
import pytest
from biases import KINDS, Drawn, drawn_biases
from doors import FRAMEWORKS, check, drawn, given_as, to_numpy
from formula import visible
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cupaged import bands, door
from cupaged.door import Rows
from cupaged.xformers import attn_bias as twins
from cupaged.xformers import memory_efficient_attention_forward as attention
from cupaged.xformers.reading import FORMS, read

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def masks() -> Any:
    return doors.real_masks()


@pytest.fixture(autouse=True)
def nothing_planned(monkeypatch: pytest.MonkeyPatch) -> list[door.Call]:
    return doors.count_plans(monkeypatch)


def materialized(masks: Any, case: Drawn) -> Array:
    """Bool [queries, keys]: what xFormers' own bias shows."""
    import torch

    bias = case.bias(masks, torch.from_numpy(case.table.copy()))
    columns = len(case.table) * case.room if case.page_size else case.num_keys
    shown = doors.seen_keys(masks, bias, (case.num_queries, columns))
    if not case.page_size:
        return shown
    seen = np.zeros((case.num_queries, case.num_keys), np.bool_)
    seen[:, : shown.shape[1]] = shown
    return seen


def read_as_plan(bias: Any, case: Drawn) -> Array:
    """Bool [queries, keys]: what a plan of a bias shows, by the words of `semantics.md`."""
    batch = read(bias, 1, case.num_queries, case.num_keys, True).describe()
    found = bands.view(batch.band)
    seen = np.zeros((case.num_queries, case.num_keys), np.bool_)
    first_bit = 0
    for r, (begin, end) in enumerate(case.blocks):
        rows, keys = end - begin, int(found.kv_len[r])
        mask = None
        if found.packed_mask is not None:
            bits = np.unpackbits(found.packed_mask, bitorder="little")[first_bit:]
            mask = bits[: rows * keys].reshape(rows, keys).astype(np.bool_)
            first_bit += -(-rows * keys // 8) * 8
        place = np.arange(keys)
        if isinstance(batch.keys, Rows):
            place += batch.keys.begin[r]
        else:
            page, in_page = np.divmod(batch.keys.begin[r] + place, batch.keys.page_size)
            page = batch.keys.table[r, page]
            place = page * batch.keys.page_size + in_page
        seen[begin:end, place] = visible(rows, keys, found.causal, found.window_left, mask)
    return seen


@given(drawn_biases(longest=9))
def test_twins_are_read_as_they_say(case: Drawn) -> None:
    assert (read_as_plan(case.bias(twins, case.table), case) == case.seen()).all()


@given(drawn_biases(longest=9))
def test_masks_of_xformers_are_read_as_they_materialize(masks: Any, case: Drawn) -> None:
    import torch

    seen = materialized(masks, case)
    bias = case.bias(masks, torch.from_numpy(case.table.copy()))
    assert (read_as_plan(bias, case) == seen).all()
    assert (seen == case.seen()).all()  # and the tests' own words are xFormers'


def test_every_form_is_tested() -> None:
    newer = {
        "PagedBlockDiagonalCausalLocalPaddedKeysMask",
        "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask",
    }
    assert set(KINDS) == set(FORMS) - newer
    assert set(KINDS) == set(twins.__all__) - {"AttentionBias"}


def test_newer_masks_of_xformers() -> None:
    """Those that xFormers has had since its masks moved to another package."""

    class PagedBlockDiagonalPaddedKeysMask:
        pass

    class PagedBlockDiagonalCausalLocalPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
        _UNPAGED_TYPE = None  # which makes it another mask than its base

        def __init__(self, like: Any) -> None:
            self.q_seqinfo, self.k_seqinfo = like.q_seqinfo, like.k_seqinfo
            self.block_tables, self.page_size = like.block_tables, like.page_size
            self._window_size = 3

    class BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask:
        def __init__(self, like: Any) -> None:
            self.q_seqinfo, self.k_seqinfo = like.q_seqinfo, like.k_seqinfo
            self.window_left, self.window_right = 3, 2

    paged = twins.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        [2, 3], [5, 7], np.array([[0, 2], [3, 1]]), 4
    )
    band = read(PagedBlockDiagonalCausalLocalPaddedKeysMask(paged), 1, 5, 16, True).describe().band
    assert (band.left, band.right, band.diagonal.tolist()) == (2, 0, [3, 4])
    gappy = twins.BlockDiagonalGappyKeysMask.from_seqlens([2, 3], [1, 8, 20], [5, 7])
    band = (
        read(BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask(gappy), 1, 5, 20, True)
        .describe()
        .band
    )
    assert (band.left, band.right, band.diagonal.tolist()) == (3, 2, [3, 4])


def run(
    rng: np.random.Generator, case: Drawn, bias: Any, kind: str, dtype: str, num_heads: int
) -> None:
    shape = (num_heads, 64)
    q = drawn(rng, (1, case.num_queries, *shape), dtype)
    k, v = (drawn(rng, (1, case.num_keys, *shape), dtype) for _ in range(2))
    seen = case.seen()
    case.poison(k[0], v[0])
    out = attention(*(given_as(x, kind) for x in (q, k, v)), bias, scale=0.2)
    got = to_numpy(out, kind)
    assert got.shape == q.shape
    check(got[0], q[0], k[0], v[0], seen, case.blocks, sm_scale=0.2)


@pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning")
@pytest.mark.parametrize("kind", FRAMEWORKS)
@pytest.mark.parametrize("name", sorted(KINDS))
def test_attention_under_a_twin(rng: np.random.Generator, name: str, kind: str) -> None:
    @settings(max_examples=4, suppress_health_check=list(HealthCheck), database=None)
    @given(drawn_biases(name), st.sampled_from(sorted(doors.DTYPES)))
    def under(case: Drawn, dtype: str) -> None:
        run(rng, case, case.bias(twins, given_as(case.table, kind)), kind, dtype, 2)

    under()


@pytest.mark.filterwarnings("ignore::cupaged.CupagedWarning")
@pytest.mark.parametrize("name", sorted(KINDS))
def test_attention_under_xformers_own(masks: Any, rng: np.random.Generator, name: str) -> None:
    @settings(max_examples=4, suppress_health_check=list(HealthCheck), database=None)
    @given(drawn_biases(name), st.sampled_from(sorted(doors.DTYPES)))
    def under(case: Drawn, dtype: str) -> None:
        bias = case.bias(masks, given_as(case.table, "torch"))
        run(rng, case, bias, "torch", dtype, 2)

    under()


def batched(rng: np.random.Generator, batch: int, rows: int, *heads: int) -> Array:
    return drawn(rng, (batch, rows, *heads, 64), "float16")


@pytest.mark.parametrize("bias", [None, "LowerTriangularMask"])
@pytest.mark.parametrize("layout", ["behind", "apart", "heads first"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_batches_without_blocks(
    rng: np.random.Generator, bias: str | None, layout: str, kind: str
) -> None:
    """Each batch is on its own, wherever it lies."""
    whole = [batched(rng, 3, rows, 2) for rows in (7, 12, 12)]
    if layout == "apart":  # so that the rows of all batches are no one axis
        more = [batched(rng, 3, 2 * x.shape[1], 2) for x in whole]
        q, k, v = (given_as(x, kind)[:, : x.shape[1] // 2] for x in more)
        whole = [x[:, : x.shape[1] // 2] for x in more]
    elif layout == "heads first":
        turned = [given_as(x.swapaxes(1, 2).copy(), kind) for x in whole]
        q, k, v = (x.swapaxes(1, 2) for x in turned)
    else:
        q, k, v = (given_as(x, kind) for x in whole)
    mask = None if bias is None else getattr(twins, bias)()
    got = to_numpy(attention(q, k, v, mask), kind)
    seen = np.tri(7, 12, dtype=np.bool_) if bias else np.ones((7, 12), np.bool_)
    for b in range(3):
        check(got[b], *(x[b] for x in whole), seen, [(0, 7)])


@pytest.mark.parametrize(
    ("shape", "kv_shape", "heads_kv"),
    [
        ((2, 3), (2, 1), 2),  # groups whose heads share one
        ((2, 3), (1, 1), 1),  # all heads share one
        ((2, 3), (2, 3), 6),  # none does
        ((4,), (1,), 1),
        ((4,), (4,), 4),
    ],
)
@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_heads_that_share(
    rng: np.random.Generator,
    nothing_planned: list[door.Call],
    shape: tuple[int, ...],
    kv_shape: tuple[int, ...],
    heads_kv: int,
    kind: str,
) -> None:
    """Heads that are broadcast are taken once; which they are is the query's order."""
    q = batched(rng, 1, 6, *shape)
    k, v = (batched(rng, 1, 9, *kv_shape) for _ in range(2))
    full = [np.broadcast_to(x, (1, 9, *shape, 64)) for x in (k, v)]
    if kind == "numpy":
        given_kv = full
    elif kind == "torch":
        given_kv = [given_as(x, kind).expand((1, 9, *shape, 64)) for x in (k, v)]
    else:
        given_kv = [given_as(np.ascontiguousarray(x), kind) for x in full]
        heads_kv = math.prod(shape)  # JAX has no strides
    bias = twins.BlockDiagonalMask.from_seqlens([2, 4], [3, 6])
    got = to_numpy(attention(given_as(q, kind), *given_kv, bias), kind)
    assert got.shape == q.shape
    seen = np.zeros((6, 9), np.bool_)
    seen[:2, :3] = seen[2:, 3:] = True
    flat = [x.reshape(x.shape[1], -1, 64) for x in (got, q, *full)]
    check(*flat, seen, [(0, 2), (2, 6)])
    assert [call.num_kv_heads for call in nothing_planned] == [heads_kv]


def test_one_head_of_a_group_serves_it(rng: np.random.Generator) -> None:
    q, k, v = batched(rng, 1, 6, 2, 3), batched(rng, 1, 9, 2, 1), batched(rng, 1, 9, 2, 1)
    full = [np.ascontiguousarray(np.broadcast_to(x, (1, 9, 2, 3, 64))) for x in (k, v)]
    # Not to the bit: NumPy's products may round otherwise where a group's rows come together.
    np.testing.assert_allclose(attention(q, k, v), attention(q, *full), rtol=0, atol=2e-3)


def test_no_heads(rng: np.random.Generator) -> None:
    q, k, v = batched(rng, 2, 6), batched(rng, 2, 9), batched(rng, 2, 9)
    got = attention(q, k, v)
    assert (got == attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]).all()
    assert got.shape == q.shape


def test_values_of_another_size(rng: np.random.Generator) -> None:
    q, k = (drawn(rng, (1, rows, 2, 192), "float16") for rows in (6, 9))
    v = drawn(rng, (1, 9, 2, 128), "float16")
    got = attention(q, k, v)
    assert got.shape == (1, 6, 2, 128)
    check(got[0], q[0], k[0], v[0], np.ones((6, 9), np.bool_), [(0, 6)])


def test_nothing_to_see_is_zero(rng: np.random.Generator) -> None:
    q, k, v = batched(rng, 2, 6, 2), batched(rng, 2, 0, 2), batched(rng, 2, 0, 2)
    assert (attention(q, k, v) == 0).all()
    assert attention(q[:, :0], k, v).shape == (2, 0, 2, 64)
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 6, 2, 64)


def test_a_bias_is_planned_once(rng: np.random.Generator, nothing_planned: list[door.Call]) -> None:
    q, k = batched(rng, 1, 6, 2), batched(rng, 1, 9, 2)
    bias = twins.BlockDiagonalMask.from_seqlens([2, 4], [3, 6])
    first = attention(q, k, k, bias)
    for _ in range(3):
        assert (attention(q, k, k, bias) == first).all()
    attention(q, k, k, twins.BlockDiagonalMask.from_seqlens([2, 4], [3, 6]))
    assert len(nothing_planned) == 1
    # What else a plan is of.
    attention(q, k, k, bias, scale=0.1)
    attention(q, k, k, bias.make_causal())
    attention(*(x.astype(doors.DTYPES["bfloat16"]) for x in (q, k, k)), bias)
    attention(q, k[:, :, :1].repeat(2, axis=2)[:, :, :1].repeat(2, axis=2), k, bias)
    assert len(nothing_planned) == 4


def test_the_oldest_plan_goes(rng: np.random.Generator, nothing_planned: list[door.Call]) -> None:
    q, k = batched(rng, 1, 6, 2), batched(rng, 1, 9, 2)
    biases = [twins.BlockDiagonalMask.from_seqlens([n, 6 - n], [3, 6]) for n in range(7)]
    biases += [bias.make_causal() for bias in biases[:4]]
    for bias in biases[:8]:
        attention(q, k, k, bias)
    attention(q, k, k, biases[0])
    assert len(nothing_planned) == 8
    attention(q, k, k, biases[8])  # the second has to go
    attention(q, k, k, biases[0])
    assert len(nothing_planned) == 9
    attention(q, k, k, biases[1])
    assert len(nothing_planned) == 10


def test_a_bias_changed_in_place_is_seen(masks: Any, rng: np.random.Generator) -> None:
    import torch

    bias = masks.BlockDiagonalPaddedKeysMask.from_seqlens([2, 3], 8, [6, 7])
    q, k = batched(rng, 1, 5, 2), batched(rng, 1, 16, 2)
    tensors = [torch.from_numpy(x) for x in (q, k, k)]
    for kv_len in ([6, 7], [1, 5], [0, 7]):
        bias.k_seqinfo.from_seqlens_padded_inplace(kv_len)
        seen = doors.seen_keys(masks, bias, (5, 16))
        got = attention(*tensors, bias).numpy()
        check(got[0], q[0], k[0], k[0], seen, [(0, 2), (2, 5)])


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_page_table_changed_in_place_is_seen(
    rng: np.random.Generator, nothing_planned: list[door.Call], kind: str
) -> None:
    table = given_as(np.array([[0, 1]], np.int32), kind)
    bias = twins.PagedBlockDiagonalPaddedKeysMask.from_seqlens([3], [6], table, 4)
    q, k = batched(rng, 1, 3, 2), batched(rng, 1, 16, 2)
    for pages in ([0, 1], [0, 1], [3, 2]):
        table[0, 0], table[0, 1] = pages
        seen = np.zeros((3, 16), np.bool_)
        seen[:, pages[0] * 4 : pages[0] * 4 + 4] = seen[:, pages[1] * 4 : pages[1] * 4 + 2] = True
        got = to_numpy(attention(*(given_as(x, kind) for x in (q, k, k)), bias), kind)
        check(got[0], q[0], k[0], k[0], seen, [(0, 3)])
    assert len(nothing_planned) == 2


def test_paged_twins_without_another(rng: np.random.Generator) -> None:
    """`from_seqlens()` of the gappy ones, which is made as `make_paged()` makes it."""
    table = np.array([[0, 1, 2], [4, 3, 5]], np.int32)
    kind = twins.PagedBlockDiagonalCausalWithOffsetGappyKeysMask
    one = kind.from_seqlens([2, 3], [1, 6], [5, 4], table, 4)
    gappy = twins.BlockDiagonalGappyKeysMask.from_seqlens([2, 3], [1, 18, 24], [5, 4])
    other = gappy.make_paged(table, 4, 12, kind)
    assert (one.k_seqinfo.seqstart_py, one.k_seqinfo.seqlen_py) == ([1, 6, -1], [6, 10])
    assert vars(one.k_seqinfo) == vars(other.k_seqinfo)
    padded = twins.BlockDiagonalPaddedKeysMask.from_seqlens([2, 3], 8, [5, 4])
    paged = padded.make_paged(table, 4, twins.PagedBlockDiagonalPaddedKeysMask)
    again = twins.PagedBlockDiagonalPaddedKeysMask.from_seqlens([2, 3], [5, 4], table, 4)
    assert vars(paged.k_seqinfo) == vars(again.k_seqinfo)
    assert paged.to("cuda") is paged
    local = padded.make_local_attention(1, 2)
    assert type(local) is twins.BlockDiagonalLocalAttentionPaddedKeysMask
    bottom = twins.LowerTriangularFromBottomRightMask().make_local_attention(3)
    assert bottom._window_size == 3


def test_importing_it_imports_no_framework() -> None:
    code = (
        "import sys, cupaged.xformers, cupaged.flash_attn\n"
        "print({'cupy', 'torch', 'jax', 'xformers', 'flash_attn'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "set()"
