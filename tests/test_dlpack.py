"""DLPack capsules on the host: read without a copy, and given back once."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from producers import BFLOAT16, Producer, rename_capsule

import cupaged
from cupaged import dlpack


@pytest.mark.parametrize("version", [None, (1, 0), (1, 3)])
def test_capsule_lives_as_long_as_its_views_and_is_deleted_once(
    version: tuple[int, int] | None, rng: np.random.Generator
) -> None:
    values = rng.standard_normal((3, 5)).astype(BFLOAT16)
    producer = Producer(values.view(np.uint16), 4, 16, version=version)
    array = dlpack.host_array(producer.capsule())
    assert array.dtype == BFLOAT16
    assert array.flags.writeable
    np.testing.assert_array_equal(array, values)
    assert array.ctypes.data == values.ctypes.data
    part = array[1:, ::2]
    del array
    gc.collect()
    assert producer.deleted == 0
    np.testing.assert_array_equal(part, values[1:, ::2])
    del part
    gc.collect()
    assert producer.deleted == 1


@pytest.mark.parametrize(
    "dtype", [np.int8, np.int32, np.int64, np.uint8, np.uint64, np.float16, np.float64, np.bool_]
)
def test_capsule_dtypes_and_strides_against_numpys_own_export(
    dtype: type, rng: np.random.Generator
) -> None:
    values = rng.integers(0, 2 if dtype is np.bool_ else 100, (4, 6, 8)).astype(dtype)
    expected = values.transpose(2, 0, 1)[::-1, :, 1::2]
    array = dlpack.host_array(expected.__dlpack__(max_version=(1, 0)))
    assert array.dtype == dtype
    assert array.strides == expected.strides
    np.testing.assert_array_equal(array, expected)


def test_capsule_keeps_its_producer_alive() -> None:
    class Owner(np.ndarray):
        pass

    owner = np.arange(6).view(Owner)
    alive = weakref.ref(owner)
    array = dlpack.host_array(owner.__dlpack__())
    del owner
    gc.collect()
    assert alive() is not None
    del array
    gc.collect()
    assert alive() is None


def test_capsule_without_strides_and_with_byte_offset() -> None:
    values = np.arange(24, dtype=np.int32)
    producer = Producer(values, 0, 32, shape=(2, 5), byte_offset=8)
    np.testing.assert_array_equal(dlpack.host_array(producer.capsule()), values[2:12].reshape(2, 5))


def test_capsule_of_a_scalar() -> None:
    producer = Producer(np.array(7, np.int64), 0, 64)
    array = dlpack.host_array(producer.capsule())
    assert array.shape == ()
    assert array == 7


def test_capsule_of_an_empty_tensor_without_memory() -> None:
    producer = Producer(np.empty(0, np.uint16), 4, 16, shape=(3, 0), null_data=True)
    array = dlpack.host_array(producer.capsule())
    assert (array.shape, array.dtype) == ((3, 0), BFLOAT16)
    gc.collect()
    assert producer.deleted == 1


def test_capsule_says_read_only() -> None:
    producer = Producer(np.zeros(3, np.float32), 2, 32, version=(1, 0), read_only=True)
    array = dlpack.host_array(producer.capsule())
    assert not array.flags.writeable


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"version": (2, 0)}, BufferError, "DLPack 2.0, expected at most 1.x"),
        ({"device": (2, 0)}, BufferError, "DLPack device type 2 is not host memory"),
        ({"lanes": 4}, NotImplementedError, "DLPack dtype code 2, 32 bits, 4 lanes"),
        ({"bits": 24}, NotImplementedError, "DLPack dtype code 2, 24 bits, 1 lanes"),
    ],
)
def test_capsule_refused_is_deleted_once(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    producer = Producer(np.zeros(3, np.float32), 2, **{"bits": 32, **options})
    with pytest.raises(error) as raised:
        dlpack.host_array(producer.capsule())
    assert str(raised.value) == message
    del raised
    gc.collect()
    assert producer.deleted == 1


@pytest.mark.parametrize("version", [None, (1, 0)])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_a_capsule_of_float8_says_that_it_is_of_bytes(
    name: str, version: tuple[int, int] | None
) -> None:
    """NumPy and CuPy read those, and not float8."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    bits = np.arange(256, dtype=np.uint8)
    code = {"float8_e4m3fn": 10, "float8_e5m2": 12}[name]
    producer = Producer(bits, code, 8, version=version, device=(2, 0))
    capsule = producer.capsule()
    assert dlpack.as_bytes(capsule) == dtype
    assert dlpack.as_bytes(capsule) is None
    producer = Producer(bits, code, 8, version=version)
    capsule = producer.capsule()
    assert dlpack.as_bytes(capsule) == dtype
    array = dlpack.host_array(capsule)
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, bits)
    del array, capsule
    gc.collect()
    assert producer.deleted == 1


@pytest.mark.parametrize(("code", "bits"), [(1, 8), (2, 16), (4, 16), (10, 16), (11, 8)])
def test_other_capsules_stay_as_they_are(code: int, bits: int) -> None:
    producer = Producer(np.zeros(4, f"u{bits // 8}"), code, bits)
    capsule = producer.capsule()
    assert dlpack.as_bytes(capsule) is None
    if code < 10:
        assert dlpack.host_array(capsule).itemsize == bits // 8
    else:
        with pytest.raises(NotImplementedError, match=rf"^DLPack dtype code {code}, {bits} bits"):
            dlpack.host_array(capsule)


def test_capsule_that_someone_else_consumed() -> None:
    producer = Producer(np.zeros(3, np.float32), 2, 32)
    capsule = producer.capsule()
    rename_capsule(capsule, b"used_dltensor")
    with pytest.raises(BufferError, match="is not an unconsumed DLPack capsule"):
        dlpack.host_array(capsule)
    for read in (dlpack.host_array, dlpack.as_bytes):
        with pytest.raises(BufferError, match=r"^17 is not an unconsumed DLPack capsule$"):
            read(17)
    del capsule
    gc.collect()
    assert producer.deleted == 0


@pytest.mark.parametrize("version", [None, (1, 0)])
@pytest.mark.parametrize("return_lse", [False, True])
def test_bare_producers_serve_a_single_request(
    version: tuple[int, int] | None, return_lse: bool, rng: np.random.Generator
) -> None:
    """They have nothing but their memory: no shape, and no way to be given another one."""
    arrays = [rng.standard_normal(n).astype(np.float16) for n in ((4, 64), (9, 2, 64), (9, 2, 64))]
    for call, shape in (
        (cupaged.single_decode_with_kv_cache, (4, 64)),
        (cupaged.single_prefill_with_kv_cache, (1, 4, 64)),
    ):
        arrays[0] = arrays[0].reshape(shape)
        expected = call(*arrays, return_lse=return_lse)
        found = call(*(Producer(x, 2, 16, version=version) for x in arrays), return_lse=return_lse)
        if not return_lse:
            expected, found = (expected,), (found,)
        for x, y in zip(found, expected, strict=True):
            assert x.shape == y.shape
            assert x.tobytes() == y.tobytes()
