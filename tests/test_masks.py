"""Custom masks: packed bit by bit, and read with every check."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
from gpu_calls import to_gpu, to_host
from hypothesis import given
from hypothesis import strategies as st
from small_call import check_error

from cupaged import masks
from cupaged.schedule import Lengths

BIT_ORDERS = ("big", "little")


def packed_by_hand(bits: list[int], bitorder: str) -> list[int]:
    """Byte after byte, by powers of two."""
    found = []
    for begin in range(0, len(bits), 8):
        byte = bits[begin : begin + 8]
        places = range(len(byte)) if bitorder == "little" else range(7, 7 - len(byte), -1)
        found.append(sum(2**place for bit, place in zip(byte, places, strict=True) if bit))
    return found


def lengths_of(qo_len: list[int], kv_len: list[int]) -> Lengths:
    """Of pages of one token."""
    qo, kv = np.array(qo_len, np.int32), np.array(kv_len, np.int32)
    indptr = (np.concatenate([[0], n.cumsum()]).astype(np.int32) for n in (qo, kv))
    return Lengths(*indptr, qo, kv)


# Packing

DTYPES = [np.bool_, np.uint8, np.int8, np.int32, np.int64, np.uint64]


@given(st.lists(st.integers(0, 1), max_size=70), st.sampled_from(BIT_ORDERS))
def test_packbits_packs_by_powers_of_two(bits: list[int], bitorder: str) -> None:
    for dtype in DTYPES:
        packed = masks.packbits(np.array(bits, dtype), bitorder)
        assert packed.dtype == np.uint8
        assert packed.tolist() == packed_by_hand(bits, bitorder)


def test_the_first_bit_is_the_highest_unless_told() -> None:
    """As FlashInfer's documentation has it."""
    bits = np.array([1, 0, 1, 1, 0, 0, 1, 1], np.bool_)
    assert masks.packbits(bits).tolist() == [0b10110011]
    assert masks.packbits(bits, "little").tolist() == [0b11001101]
    bits = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], np.bool_)
    packed, indptr = masks.segment_packbits(bits, np.array([0, 4, 7, 11]))
    assert packed.tolist() == [0b10110000, 0b00100000, 0b11010000]
    assert indptr.tolist() == [0, 1, 2, 3]


def test_whatever_is_not_0_is_packed_as_1() -> None:
    assert masks.packbits(np.array([0, 2, -1, 256], np.int32), "little").tolist() == [0b1110]


@given(
    st.lists(st.lists(st.integers(0, 1), max_size=30), max_size=6),
    st.sampled_from(BIT_ORDERS),
    st.sampled_from([np.int32, np.int64, list]),
)
def test_segments_begin_at_bytes(segments: list[list[int]], bitorder: str, kind: Any) -> None:
    indptr: Any = np.cumsum([0, *map(len, segments)])
    indptr = indptr.tolist() if kind is list else indptr.astype(kind)
    bits = np.array([*chain(*segments)], np.bool_)
    packed, begins = masks.segment_packbits(bits, indptr, bitorder)
    expected = [packed_by_hand(segment, bitorder) for segment in segments]
    assert packed.dtype == np.uint8
    assert packed.tolist() == [*chain(*expected)]
    assert begins.dtype == np.int32
    assert begins.tolist() == np.cumsum([0, *map(len, expected)]).tolist()


def test_strided_bits_are_packed(rng: np.random.Generator) -> None:
    bits = rng.integers(0, 2, 300).astype(np.bool_)
    expected = packed_by_hand(bits[::-3].astype(int).tolist(), "big")
    assert masks.packbits(bits[::-3]).tolist() == expected
    packed, _ = masks.segment_packbits(bits[::-3], [0, 100])
    assert packed.tolist() == expected


def test_torch_gives_torch() -> None:
    torch = pytest.importorskip("torch")
    bits = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    packed = masks.packbits(bits)
    assert isinstance(packed, torch.Tensor)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0b10110011, 0b10000000]
    packed, indptr = masks.segment_packbits(bits, torch.tensor([0, 4, 9]), bitorder="little")
    assert (packed.tolist(), indptr.tolist()) == ([0b1101, 0b11100], [0, 1, 2])
    assert (packed.dtype, indptr.dtype) == (torch.uint8, torch.int32)
    mask = masks.read(bits.reshape(3, 3), None, lengths_of([3], [3]))
    assert mask is not None
    assert mask.bits.tolist() == [0b11001101, 1]


def test_jax_gives_jax() -> None:
    jax = pytest.importorskip("jax")
    bits = jax.numpy.array([1, 0, 1, 1, 0, 0, 1, 1, 1], dtype=bool)
    packed, indptr = masks.segment_packbits(bits, jax.numpy.array([0, 4, 9]), bitorder="little")
    assert isinstance(packed, jax.Array)
    assert isinstance(indptr, jax.Array)
    assert (packed.tolist(), indptr.tolist()) == ([0b1101, 0b11100], [0, 1, 2])
    mask = masks.read(bits, None, lengths_of([3], [3]))
    assert mask is not None
    assert mask.bits.tolist() == [0b11001101, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("bitorder", BIT_ORDERS)
def test_device_arrays_are_packed_in_order(
    cp: Any, rng: np.random.Generator, bitorder: str
) -> None:
    """On a stream of their own, behind what is pending there; strided ones too."""
    bits = rng.integers(0, 2, 999).astype(np.bool_)
    with cp.cuda.Stream(non_blocking=True):
        packed = masks.packbits(to_gpu(bits)[::3], bitorder)
        segments, indptr = masks.segment_packbits(to_gpu(bits), to_gpu(np.array([0, 5, 999])))
        mask = masks.read(to_gpu(bits), None, lengths_of([999], [1]))
        again = masks.read(None, to_gpu(np.packbits(bits)), lengths_of([999], [1]))
        found = [to_host(x) for x in (packed, segments, indptr)]
    assert all(isinstance(x, cp.ndarray) for x in (packed, segments, indptr))
    assert found[0].tolist() == packed_by_hand(bits[::3].astype(int).tolist(), bitorder)
    expected = [packed_by_hand(x.astype(int).tolist(), "big") for x in (bits[:5], bits[5:])]
    assert found[1].tolist() == [*chain(*expected)]
    assert (found[2].dtype, found[2].tolist()) == (np.int32, [0, 1, 126])
    assert mask is not None
    assert again is not None
    assert mask.bits.tolist() == packed_by_hand(bits.astype(int).tolist(), "little")
    assert again.bits.tolist() == packed_by_hand(bits.astype(int).tolist(), "big")


@pytest.mark.gpu
def test_what_is_packed_waits_for_what_writes_it(cp: Any, late_write: Any) -> None:
    x = cp.zeros(40, cp.int32)
    with cp.cuda.Stream(non_blocking=True):
        late_write(x, 1)
        packed = masks.packbits(x)
        assert to_host(packed).tolist() == [255] * 5


@pytest.mark.gpu
def test_torch_on_a_device_gives_torch(cp: Any, torch: Any) -> None:
    bits = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool, device="cuda")
    indptr = torch.tensor([0, 4, 9], device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        bits = ~~bits
        packed, begins = masks.segment_packbits(bits, indptr, bitorder="little")
        got = packed.tolist(), begins.tolist()  # of what is pending on that stream
    assert packed.is_cuda
    assert begins.is_cuda
    assert (packed.dtype, begins.dtype) == (torch.uint8, torch.int32)
    assert got == ([0b1101, 0b11100], [0, 1, 2])


BITS = np.zeros(9, np.bool_)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (
            lambda: masks.packbits(BITS, "bit"),
            ValueError("bitorder = 'bit', expected one of 'big', 'little'"),
        ),
        (
            lambda: masks.packbits(BITS, None),
            TypeError("bitorder is a NoneType, expected one of 'big', 'little'"),
        ),
        (
            lambda: masks.packbits([1, 0]),
            TypeError(
                "x is a list, expected an array that speaks DLPack "
                "(CuPy, NumPy, PyTorch, JAX, numba)"
            ),
        ),
        (
            lambda: masks.packbits(BITS.reshape(3, 3)),
            ValueError("x has shape (3, 3), expected one axis"),
        ),
        (
            lambda: masks.packbits(BITS.astype(np.float32)),
            TypeError("x has dtype float32, expected bool or an integer dtype"),
        ),
        (
            lambda: masks.segment_packbits(BITS, [0, 9], "small"),
            ValueError("bitorder = 'small', expected one of 'big', 'little'"),
        ),
        (
            lambda: masks.segment_packbits(BITS, [0, 4, 8]),
            ValueError("x has shape (9,), expected (8,) = indptr[2]"),
        ),
        (
            lambda: masks.segment_packbits(BITS, [0, 4, 3]),
            ValueError("indptr[2] = 3 (end of request 1), expected at least 4 = indptr[1]"),
        ),
        (
            lambda: masks.segment_packbits(BITS, [1, 9]),
            ValueError("indptr[0] = 1, expected 0"),
        ),
        (
            lambda: masks.segment_packbits(BITS, np.array([0.0, 9.0])),
            TypeError("indptr has dtype float64, expected int32 or int64"),
        ),
        (
            lambda: masks.segment_packbits(BITS[None], [0, 9]),
            ValueError("x has shape (1, 9), expected one axis"),
        ),
    ],
)
def test_bad_input_to_packing(call: Any, error: Exception) -> None:
    check_error(type(error), str(error), call)


# A batch's mask

LENGTHS = lengths_of([3, 0, 1, 2], [5, 7, 0, 4])  # 15 bits, none, none, 8
NUM_BITS = 23


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_is_packed_request_by_request(rng: np.random.Generator, dtype: Any) -> None:
    bits = rng.integers(0, 2, NUM_BITS).astype(dtype)
    mask = masks.read(bits, None, LENGTHS)
    assert mask is not None
    parts = (bits[:15].astype(int).tolist(), bits[15:].astype(int).tolist())
    assert mask.bits.tolist() == [*chain(*(packed_by_hand(part, "little") for part in parts))]
    assert mask.bits.dtype == np.uint8
    assert mask.indptr.tolist() == [0, 2, 2, 2, 3]
    assert mask.indptr.dtype == np.int32
    indptr = np.array([0, 15, 15, 15, 23])
    packed, _ = masks.segment_packbits(bits, indptr, bitorder="little")
    again = masks.read(None, packed, LENGTHS)
    assert again is not None
    np.testing.assert_array_equal(again.bits, mask.bits)
    np.testing.assert_array_equal(again.indptr, mask.indptr)


def test_what_was_read_is_a_copy() -> None:
    """A plan does not change with the caller's arrays."""
    packed = np.array([1, 2, 3, 0], np.uint8)[:3]
    mask = masks.read(None, packed, LENGTHS)
    assert mask is not None
    packed[:] = 7
    assert mask.bits.tolist() == [1, 2, 3]


def test_there_may_be_no_mask_and_no_bits() -> None:
    assert masks.read(None, None, LENGTHS) is None
    for lengths in (lengths_of([], []), lengths_of([0, 5], [9, 0])):
        for given_masks in ((BITS[:0], None), (None, np.empty(0, np.uint8))):
            mask = masks.read(*given_masks, lengths)
            assert mask is not None
            assert len(mask.bits) == 0
            assert mask.indptr.tolist() == [0] * (len(lengths.qo_len) + 1)


def test_a_mask_of_one_request_may_have_two_axes(rng: np.random.Generator) -> None:
    bits = rng.integers(0, 2, (3, 5)).astype(np.bool_)
    mask = masks.read(bits.T.copy().T, None, lengths_of([3], [5]))
    assert mask is not None
    assert mask.bits.tolist() == packed_by_hand(bits.reshape(-1).astype(int).tolist(), "little")


ONES = np.ones(NUM_BITS, np.bool_)
TWO = np.ones(NUM_BITS, np.int32)
TWO[17] = 2
LESS = np.zeros(NUM_BITS, np.int8)
LESS[3] = -1
HUGE = lengths_of([2**20, 2**20], [2**14, 8])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            (ONES, np.ones(3, np.uint8), LENGTHS),
            ValueError("custom_mask and packed_custom_mask exclude each other"),
        ),
        (
            (ONES[1:], None, LENGTHS),
            ValueError("custom_mask has shape (22,), expected (23,): the sum of qo_len * kv_len"),
        ),
        (
            (ONES[None], None, LENGTHS),
            ValueError("custom_mask has shape (1, 23), expected (23,): the sum of qo_len * kv_len"),
        ),
        (
            (np.ones((5, 3), np.bool_), None, lengths_of([3], [5])),
            ValueError("custom_mask has shape (5, 3), expected (15,): the sum of qo_len * kv_len"),
        ),
        (
            (np.ones((0, 1, 2, 2), np.bool_), None, lengths_of([0, 1], [2, 2])),
            ValueError(
                "custom_mask has shape (0, 1, 2, 2), expected (2,): the sum of qo_len * kv_len"
            ),
        ),
        (
            (ONES.astype(np.float16), None, LENGTHS),
            TypeError(
                "custom_mask has dtype float16, expected bool, or an integer dtype of 0 and 1"
            ),
        ),
        ((TWO, None, LENGTHS), ValueError("custom_mask[17] = 2, expected 0 or 1")),
        ((LESS, None, LENGTHS), ValueError("custom_mask[3] = -1, expected 0 or 1")),
        (
            ([True] * NUM_BITS, None, LENGTHS),
            TypeError(
                "custom_mask is a list, expected an array that speaks DLPack "
                "(CuPy, NumPy, PyTorch, JAX, numba)"
            ),
        ),
        (
            (None, np.ones(4, np.uint8), LENGTHS),
            ValueError(
                "packed_custom_mask has shape (4,), expected (3,): the sum of qo_len * kv_len "
                "bits, each request's rounded up to bytes, as segment_packbits() packs them"
            ),
        ),
        (
            (None, np.ones((1, 3), np.uint8), LENGTHS),
            ValueError(
                "packed_custom_mask has shape (1, 3), expected (3,): the sum of qo_len * kv_len "
                "bits, each request's rounded up to bytes, as segment_packbits() packs them"
            ),
        ),
        (
            (None, np.ones(3, np.bool_), LENGTHS),
            TypeError("packed_custom_mask has dtype bool, expected uint8"),
        ),
        (
            (ONES, None, HUGE),
            ValueError(
                "custom_mask is of 17188257792 bits, the sum of qo_len * kv_len, in 2148532224 "
                "bytes, expected at most 2147483647 bytes"
            ),
        ),
        (
            (None, np.ones(3, np.uint8), HUGE),
            ValueError(
                "packed_custom_mask is of 17188257792 bits, the sum of qo_len * kv_len, in "
                "2148532224 bytes, expected at most 2147483647 bytes"
            ),
        ),
    ],
)
def test_bad_masks(arguments: tuple[Any, ...], error: Exception) -> None:
    check_error(type(error), str(error), masks.read, *arguments)
