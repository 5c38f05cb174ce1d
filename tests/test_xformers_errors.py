"""What xFormers' door refuses, word by word."""

from __future__ import annotations

import math
from typing import Any

import doors
import numpy as np
import pytest

from cupaged import door
from cupaged.xformers import attn_bias as twins
from cupaged.xformers import memory_efficient_attention_forward as attention
from cupaged.xformers.reading import FORMS

Q, KV = np.zeros((1, 5, 2, 64), np.float16), np.zeros((1, 9, 2, 64), np.float16)
BLOCKS = twins.BlockDiagonalMask.from_seqlens([2, 3], [4, 5])
PAGED = twins.PagedBlockDiagonalPaddedKeysMask


def with_window(left: int) -> Any:
    """As xFormers' own class lets it be made."""
    bias = twins.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(
        [2, 3], 5, [4, 5], 1, 0
    )
    object.__setattr__(bias, "window_left", left)
    return bias


def paged(table: Any, page_size: int = 3, kv_len: Any = (4, 5)) -> Any:
    return PAGED.from_seqlens([2, 3], list(kv_len), np.array(table, np.int32), page_size)


def gappy(table: Any) -> Any:
    """Pages of 3 keys; no request has keys on its first page, nor the first one on its last."""
    kind = twins.PagedBlockDiagonalGappyKeysMask
    return kind.from_seqlens([2, 3], [4, 5], [2, 2], np.array(table, np.int32), 3)


class OtherMask(twins.BlockDiagonalMask):
    def materialize(self) -> None:
        pass


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q, KV, KV), {"p": 0.5}, NotImplementedError, "p = 0.5, served is 0: there is no dropout"),
        ((Q, KV, KV), {"p": "a"}, TypeError, "p is a str, expected a number"),
        (
            (Q, KV, KV),
            {"op": "cutlass"},
            NotImplementedError,
            "op = 'cutlass', served is None: the library chooses its kernels",
        ),
        (
            (Q, KV, KV),
            {"output_dtype": "float32"},
            NotImplementedError,
            "output_dtype = float32, served is query's, float16",
        ),
        ((Q, KV, KV), {"scale": math.nan}, ValueError, "scale = nan, expected a finite number"),
        (
            (Q, KV, KV),
            {"scale": 3e38},
            ValueError,
            "scale = 3e+38, expected at most 1.701e+38 in magnitude",
        ),
        (
            (Q[0, 0], KV, KV),
            {},
            ValueError,
            "query has shape (2, 64), expected (batch, rows, head_dim), (batch, rows, heads, "
            "head_dim) or (batch, rows, groups, heads, head_dim)",
        ),
        (
            (Q, KV[:, :, :1], KV),
            {},
            ValueError,
            "key has shape (1, 9, 1, 64), expected (1, rows, 2, 64): query has (1, 5, 2, 64)",
        ),
        (
            (Q, KV, KV[:, :8]),
            {},
            ValueError,
            "value has shape (1, 8, 2, 64), expected (1, 9, 2, head_dim): key has (1, 9, 2, 64)",
        ),
        (
            (Q, KV, KV.astype(np.float32)),
            {},
            TypeError,
            "value is float32, expected float16 as key is",
        ),
        (
            tuple(x.astype(np.float32) for x in (Q, KV, KV)),
            {},
            NotImplementedError,
            "query is float32, served are float16, bfloat16",
        ),
        (
            (Q, KV.astype(np.float32), KV.astype(np.float32)),
            {},
            NotImplementedError,
            "key is float32, served are float16 as query is, and float8_e4m3fn, float8_e5m2",
        ),
        (
            tuple(x[..., :56] for x in (Q, KV, KV)),
            {},
            NotImplementedError,
            "query has head_dim 56, served are 64, 96, 128, 256",
        ),
        (
            (Q, KV, KV[..., :56]),
            {},
            NotImplementedError,
            "query has head_dim 64 and value 56, served are equal ones of 64, 96, 128, 256, and "
            "192/128",
        ),
        (
            tuple(x[:, :, :0] for x in (Q, KV, KV)),
            {},
            ValueError,
            "query has no heads, expected at least 1",
        ),
        (
            (Q[:, :4], KV, KV, BLOCKS),
            {},
            ValueError,
            "query has 4 rows, expected 5 = q_seqinfo.seqstart_py[-1] of attn_bias, "
            "a BlockDiagonalMask",
        ),
        (
            (Q, KV[:, :8], KV[:, :8], BLOCKS),
            {},
            ValueError,
            "key has 8 rows, expected 9 = k_seqinfo.seqstart_py[-1] of attn_bias, "
            "a BlockDiagonalMask",
        ),
        (
            tuple(x.repeat(2, axis=0) for x in (Q, KV, KV)),
            {"attn_bias": BLOCKS},
            ValueError,
            "query has batch size 2, expected 1: attn_bias, a BlockDiagonalMask",
        ),
        (
            (Q, KV, KV, np.zeros((1, 2, 5, 9), np.float16)),
            {},
            NotImplementedError,
            "attn_bias is an array of shape (1, 2, 5, 9), served are None and masks",
        ),
        (
            (Q, KV, KV, OtherMask(BLOCKS.q_seqinfo, BLOCKS.k_seqinfo)),
            {},
            NotImplementedError,
            f"attn_bias is a OtherMask, served are None and {', '.join(FORMS)}",
        ),
        (
            (Q, KV, KV, with_window(-1)),
            {},
            ValueError,
            "attn_bias.window_left = -1, expected at least 0",
        ),
        (
            (Q, KV, KV, paged([[0, 1], [2, 3]])),
            {},
            ValueError,
            "attn_bias.block_tables[1, 1] = 3, expected 0..2: the cache holds 3 pages",
        ),
        (
            (Q, KV, KV, gappy([[7, 0, 1], [7, 2, 9]])),
            {},
            ValueError,
            "attn_bias.block_tables[1, 2] = 9, expected 0..2: the cache holds 3 pages",
        ),
        (
            (Q, KV, KV, paged([[0, 1], [2, -1]])),
            {},
            ValueError,
            "attn_bias.block_tables[1, 1] = -1, expected at least 0",
        ),
        (
            (Q, KV, KV, paged([[0, 1]])),
            {},
            ValueError,
            "attn_bias.block_tables has shape (1, 2), expected (2, pages)",
        ),
        (
            (Q, KV, KV, paged([[0, 1], [2, 1]], 4)),
            {},
            ValueError,
            "key has 9 rows, expected a multiple of page_size = 4",
        ),
    ],
)
def test_errors(
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error) as raised:
        attention(*arguments, **options)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: twins.BlockDiagonalMask.from_seqlens([1, -2]),
            "q_seqlen[1] = -2, expected at least 0",
        ),
        (
            lambda: twins.BlockDiagonalMask.from_seqlens([[1]]),
            "q_seqlen has shape (1, 1), expected one axis",
        ),
        (
            lambda: twins.BlockDiagonalMask.from_seqlens([1, 2], [3]),
            "kv_seqlen has 1 entries, expected 2 as q_seqlen has",
        ),
        (
            lambda: twins.BlockDiagonalMask.from_seqlens([3], [2]).make_causal_from_bottomright(),
            "kv_seqlen[0] = 2, expected at least 3 = q_seqlen[0]",
        ),
        (
            lambda: twins.BlockDiagonalMask.from_seqlens([3], [2]).make_local_attention(0),
            "window_size = 0, expected at least 1",
        ),
        (
            lambda: twins.BlockDiagonalPaddedKeysMask.from_seqlens([3], 4, [5]),
            "kv_seqlen[0] = 5, expected 0..4: there is no more room",
        ),
        (
            lambda: twins.LocalAttentionFromBottomRightMask(1, -1),
            "window_right = -1, expected at least 0",
        ),
        (
            lambda: twins.BlockDiagonalGappyKeysMask.from_seqlens([3], [1], [5]),
            "kv_seqstarts has 1 entries, expected 2 = batch + 1",
        ),
        (
            lambda: twins.BlockDiagonalGappyKeysMask.from_seqlens([3], [1, 9], [5]).make_paged(
                np.zeros((1, 3), np.int32), 4, 10, twins.PagedBlockDiagonalGappyKeysMask
            ),
            "notional_padding = 10, expected a multiple of page_size = 4",
        ),
        (
            lambda: PAGED.from_seqlens([3], [2], np.zeros(3, np.int32), 4),
            "block_tables has shape (3,), expected (batch, pages)",
        ),
        (
            lambda: twins.BlockDiagonalMask.from_tensor_lists_qkv([], []),
            "tensors_q has no array, expected at least one",
        ),
        (
            lambda: twins.BlockDiagonalMask.from_tensor_lists_qkv([Q, Q], [KV]),
            "tensors_k has 1 arrays, expected 2 as tensors_q has",
        ),
        (
            lambda: twins.BlockDiagonalMask.from_tensor_lists_qkv([Q], [KV], [KV, KV]),
            "tensors_v has 2 arrays, expected 1 as tensors_q has",
        ),
        (
            lambda: twins.BlockDiagonalMask.from_tensor_lists_qkv([Q], [KV[0, 0, 0]]),
            "tensors_k[0] has shape (64,), expected (batch, rows, ...)",
        ),
        (
            lambda: twins.BlockDiagonalMask.from_tensor_lists_qkv([Q, Q], [KV, KV.repeat(2, 0)]),
            "tensors_k[1] has batch size 2, expected 1 as tensors_q[1] has",
        ),
        (
            lambda: twins.BlockDiagonalMask.from_tensor_lists_qkv([Q], [KV], [KV[:, :8]]),
            "tensors_v[0] has shape (1, 8, 2, 64), expected (1, 9, ...) as tensors_k[0] has",
        ),
        (
            lambda: BLOCKS.split(Q[:, :4]),
            "tensor has shape (1, 4, 2, 64), expected (1, 5, ...)",
        ),
    ],
)
def test_errors_of_twins(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value) == message


@pytest.mark.parametrize("table", [None, [[0, 1]]], ids=["nothing", "a list"])
def test_a_page_table_is_an_array(table: Any) -> None:
    padded = twins.BlockDiagonalPaddedKeysMask.from_seqlens([3], 4, [2])
    message = rf"^block_tables is {'a list' if table else 'a NoneType'}, expected an int array"
    with pytest.raises(TypeError, match=message):
        PAGED.from_seqlens([3], [2], table, 4)
    with pytest.raises(TypeError, match=message):
        padded.make_paged(table, 4, PAGED)


def test_xformers_mask_with_a_bias_of_its_own_is_refused() -> None:
    masks = doors.real_masks()
    import torch

    bias = masks.LowerTriangularMaskWithTensorBias(torch.zeros(1, 2, 5, 9))
    with pytest.raises(NotImplementedError, match="a LowerTriangularMaskWithTensorBias, served"):
        attention(Q, KV, KV, bias)


def test_capturing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door.devices, "is_recorded", lambda stream: stream == 7)
    call = door.Call(2, 2, 64, 64, "float16", "float16")
    with pytest.raises(RuntimeError, match=r"^a CUDA graph is being captured, and lengths are"):
        door.planned(call, (0, 7), "key", lambda: pytest.fail("described"))
