"""Lists of tensors that the twins of xFormers' masks put into one, and cut again."""

from __future__ import annotations

from typing import Any

import doors
import numpy as np
import pytest
from doors import FRAMEWORKS, drawn, given_as, to_numpy

from cupaged.xformers import attn_bias as twins
from cupaged.xformers import memory_efficient_attention_forward as attention


def tensor(rng: np.random.Generator, batch: int, rows: int) -> np.ndarray[Any, Any]:
    return drawn(rng, (batch, rows, 2, 64), "float16")


@pytest.mark.parametrize("kind", FRAMEWORKS)
def test_tensors_of_a_list(rng: np.random.Generator, kind: str) -> None:
    given_list = [given_as(tensor(rng, b, n), kind) for b, n in ((2, 3), (1, 5))]
    bias, x = twins.BlockDiagonalMask.from_tensor_list(given_list)
    assert to_numpy(x, kind).shape == (1, 11, 2, 64)
    assert bias.q_seqinfo.seqstart_py == [0, 3, 6, 11]
    for one, back in zip(given_list, bias.split(attention(x, x, x, bias)), strict=True):
        each = attention(one, one, one)
        assert (to_numpy(back, kind) == to_numpy(each, kind)).all()


@pytest.mark.parametrize("kind", FRAMEWORKS)
@pytest.mark.parametrize(
    "form",
    ["BlockDiagonalMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask"],
)
def test_tensors_of_lists(rng: np.random.Generator, kind: str, form: str) -> None:
    sizes = ((2, 3, 4), (1, 5, 9))
    q = [given_as(tensor(rng, b, n), kind) for b, n, _ in sizes]
    k, v = ([given_as(tensor(rng, b, n), kind) for b, _, n in sizes] for _ in range(2))
    bias, q_rows, k_rows, v_rows = getattr(twins, form).from_tensor_lists_qkv(q, k, v)
    assert type(bias) is getattr(twins, form)
    assert bias.q_seqinfo.seqstart_py == [0, 3, 6, 11]
    assert bias.k_seqinfo.seqstart_py == [0, 4, 8, 17]
    for rows, parts in ((k_rows, k), (v_rows, v)):
        for part, back in zip(parts, bias.split_kv(rows), strict=True):
            assert (to_numpy(back, kind) == to_numpy(part, kind)).all()
    alone = {
        "BlockDiagonalMask": None,
        "BlockDiagonalCausalMask": twins.LowerTriangularMask(),
        "BlockDiagonalCausalFromBottomRightMask": twins.LowerTriangularFromBottomRightMask(),
    }
    out = bias.split_queries(attention(q_rows, k_rows, v_rows, bias))
    for *one, back in zip(q, k, v, out, strict=True):
        each = to_numpy(attention(*one, alone[form]), kind)
        assert (to_numpy(back, kind) == each).all()


def test_lists_are_read_as_xformers_reads_them(rng: np.random.Generator) -> None:
    """Without values, too."""
    masks = doors.real_masks()
    import torch

    q, k = ([tensor(rng, b, n) for b, n in sizes] for sizes in ([(2, 3), (1, 5)], [(2, 4)] * 2))
    k[1] = k[1][:1]
    real, *expected = masks.BlockDiagonalMask.from_tensor_lists_qkv(
        *([torch.from_numpy(x) for x in tensors] for tensors in (q, k))
    )
    twin, *found = twins.BlockDiagonalMask.from_tensor_lists_qkv(q, k)
    assert expected[2] is found[2] is None
    assert twin._batch_sizes == real._batch_sizes
    for name in ("q_seqinfo", "k_seqinfo"):
        assert getattr(twin, name).seqstart_py == getattr(real, name).seqstart_py
    for x, y in zip(expected[:2], found[:2], strict=True):
        assert (x.numpy() == y).all()
