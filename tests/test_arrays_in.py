"""Tensors and index arrays in, on the host: NumPy, PyTorch, JAX and any DLPack producer."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import numpy as np
import pytest
from processes import run_python
from producers import BFLOAT16, OldProducer, Producer
from small_call import SPEAKS_DLPACK

from cupaged import arrays, streams
from cupaged.errors import BackendUnavailableError
from cupaged.spec import DTYPES


def as_float64(tensor: Any) -> np.ndarray:
    """A PyTorch tensor's values, by way of PyTorch alone."""
    return np.array(tensor.detach().double().tolist())


# Tensors


def test_numpy_passes_straight_through() -> None:
    x = np.zeros((4, 3), BFLOAT16)[::2]
    assert arrays.import_tensor(x, "q") is x
    assert arrays.import_tensor(x, "q", beside=x) is x
    assert arrays.device_id(x) is None


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "int32", "float8_e4m3fn", "float8_e5m2"]
)
def test_torch_is_shared(dtype: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    source = torch.tensor(rng.standard_normal((5, 4, 6)) * 10).to(getattr(torch, dtype))
    tensor = source.permute(2, 0, 1)[1:, ::2]
    array = arrays.import_tensor(tensor, "q")
    assert array.dtype == DTYPES.get(dtype, np.dtype(np.int32))
    assert array.shape == tuple(tensor.shape)
    assert array.strides == tuple(step * array.itemsize for step in tensor.stride())
    assert array.ctypes.data == tensor.data_ptr()
    np.testing.assert_array_equal(array.astype(np.float64), as_float64(tensor))
    array[2, 1, 3] = 42
    assert tensor[2, 1, 3].double().item() == array[2, 1, 3].astype(np.float64) > 30


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_memory_stays_while_the_view_does(dtype: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(rng.standard_normal(16)).to(getattr(torch, dtype))
    expected = as_float64(tensor)
    storage = weakref.ref(tensor.untyped_storage())
    array = arrays.import_tensor(tensor, "q")
    del tensor
    gc.collect()
    assert storage() is not None
    others = [torch.full((16,), torch.nan, dtype=getattr(torch, dtype)) for _ in range(64)]
    np.testing.assert_array_equal(array.astype(np.float64), expected)
    del array, others
    gc.collect()
    assert storage() is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_that_requires_grad_is_detached(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.ones(3, dtype=getattr(torch, dtype), requires_grad=True)
    assert arrays.import_tensor(tensor, "q").ctypes.data == tensor.data_ptr()
    assert tensor.requires_grad


def test_torch_that_cant_be_shared() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError) as raised:
        arrays.import_tensor(torch.empty(3, device="meta"), "out")
    assert str(raised.value) == "out is on device meta, expected a CPU or CUDA tensor"
    with pytest.raises(TypeError, match=r"^q is a Tensor whose memory can't be shared: [^\n]+$"):
        arrays.import_tensor(torch.eye(3).to_sparse(), "q")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float8_of_torch_comes_as_itself(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    bits = np.arange(256, dtype=np.uint8)
    tensor = torch.from_numpy(bits).view(getattr(torch, dtype))
    array = arrays.import_tensor(tensor, "k cache")
    assert array.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(array.view(np.uint8), bits)
    assert arrays.import_tensor(torch.empty((0, 4), dtype=tensor.dtype), "q").shape == (0, 4)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"]
)
def test_jax_is_shared_and_read_only(dtype: str, rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    values = rng.standard_normal((4, 6)).astype(DTYPES[dtype])
    x = jax.device_put(values, jax.devices("cpu")[0])
    array = arrays.import_tensor(x, "q")
    assert array.dtype == DTYPES[dtype]
    assert array.ctypes.data == x.unsafe_buffer_pointer()
    assert not array.flags.writeable
    np.testing.assert_array_equal(array, values)


def test_jax_that_cant_be_shared() -> None:
    jax = pytest.importorskip("jax")
    x = jax.device_put(np.ones(3, np.float32), jax.devices("cpu")[0])

    with pytest.raises(TypeError) as raised:
        jax.jit(lambda traced: arrays.import_tensor(traced, "q"))(x)
    assert str(raised.value) == f"q is a DynamicJaxprTracer, {SPEAKS_DLPACK}"

    x.delete()
    with pytest.raises(TypeError) as raised:
        arrays.import_tensor(x, "k cache")
    assert str(raised.value) == (
        "k cache is an ArrayImpl whose memory can't be shared: "
        "it has been deleted, or donated to a computation"
    )


def test_sharded_jax_is_refused() -> None:
    pytest.importorskip("jax")
    program = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
from cupaged import arrays

mesh = jax.sharding.Mesh(jax.devices(), ("x",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
try:
    arrays.import_tensor(jax.device_put(jax.numpy.zeros(4), sharding), "q")
except TypeError as error:
    print(error)
"""
    done = run_python("-c", program)
    assert done.stdout.startswith("q is an ArrayImpl whose memory can't be shared: "), done.stderr
    assert "shard" in done.stdout


@pytest.mark.parametrize("kind", [Producer, OldProducer])
def test_another_producer_is_shared(kind: type[Producer], rng: np.random.Generator) -> None:
    values = rng.standard_normal((6, 4)).astype(BFLOAT16)
    producer = kind(values.view(np.uint16), 4, 16, shape=(2, 3), strides=(1, 8))
    array = arrays.import_tensor(producer, "q")
    np.testing.assert_array_equal(array, values[::2, :2].T)
    assert arrays.framework(producer) == "other"
    assert arrays.export(array, producer) is array
    del array
    gc.collect()
    assert producer.deleted == 1


def test_pinned_memory_is_host_memory() -> None:
    values = np.arange(5, dtype=np.int32)
    array = arrays.import_tensor(Producer(values, 0, 32, device=(3, 0)), "q")
    np.testing.assert_array_equal(array, values)


def test_a_dtype_that_numpy_has_not() -> None:
    producer = Producer(np.zeros(4, np.uint8), 17, 8)
    with pytest.raises(NotImplementedError) as raised:
        arrays.import_tensor(producer, "q")
    assert str(raised.value) == (
        "q has dtype code 17, which can't be read through DLPack: "
        "DLPack dtype code 17, 8 bits, 1 lanes"
    )


def test_a_device_that_is_neither_host_nor_cuda() -> None:
    producer = Producer(np.zeros(4, np.float32), 2, 32, device=(8, 0))
    with pytest.raises(TypeError) as raised:
        arrays.import_tensor(producer, "q")
    assert str(raised.value) == (
        "q is a Producer whose memory can't be shared: "
        "DLPack device type 8 is neither host nor CUDA"
    )


@pytest.mark.parametrize(
    ("x", "what"),
    [
        ([1.0], "a list"),
        (3, "an int"),
        (None, "None"),
        ("q", "a str"),
        (np.float16(3), "a float16"),
        ({}, "a dict"),
    ],
)
def test_what_is_no_array(x: object, what: str) -> None:
    with pytest.raises(TypeError) as raised:
        arrays.import_tensor(x, "q")
    assert str(raised.value) == f"q is {what}, {SPEAKS_DLPACK}"


class OnDevice:
    """Says that it is on a GPU; nobody gets as far as its memory."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **_: object) -> object:
        raise AssertionError


class Tensor:
    """What of a tensor on a GPU is looked at before its memory."""

    dtype = "torch.float16"
    is_cuda = True
    requires_grad = False


Tensor.__module__ = "torch"


@pytest.mark.parametrize("kind", [OnDevice, Tensor])
def test_device_array_without_cupy(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    streams.cupy.cache_clear()
    with pytest.raises(BackendUnavailableError) as raised:
        arrays.import_tensor(kind(), "q")
    assert str(raised.value).startswith("arrays on a GPU need CuPy (")
    assert "pip install 'cupaged[cuda12]'" in str(raised.value)
    assert "\n" not in str(raised.value)
    streams.cupy.cache_clear()


# Index arrays


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_index_array_on_the_host_is_not_copied(dtype: type) -> None:
    x = np.arange(9, dtype=dtype)[::2]
    assert arrays.import_index(x, "qo_indptr") is x


@pytest.mark.parametrize("x", [[0, 3, 5], (0, 3, 5)])
def test_index_list(x: Any) -> None:
    array = arrays.import_index(x, "qo_indptr")
    assert array.dtype == np.int64
    np.testing.assert_array_equal(array, [0, 3, 5])


@pytest.mark.parametrize("x", [[], ()])
def test_index_list_of_none(x: Any) -> None:
    array = arrays.import_index(x, "paged_kv_indices")
    assert (array.dtype, array.shape) == (np.int64, (0,))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_index_tensor_of_torch_is_not_copied(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor([0, 3, 5], dtype=getattr(torch, dtype))
    array = arrays.import_index(x, "qo_indptr")
    assert array.dtype == np.dtype(dtype)
    assert array.ctypes.data == x.data_ptr()
    np.testing.assert_array_equal(array, [0, 3, 5])


def test_index_array_of_jax() -> None:
    jax = pytest.importorskip("jax")
    x = jax.device_put(np.array([0, 3, 5], np.int32), jax.devices("cpu")[0])
    array = arrays.import_index(x, "qo_indptr")
    assert array.dtype == np.int32
    assert array.ctypes.data == x.unsafe_buffer_pointer()
    np.testing.assert_array_equal(array, [0, 3, 5])


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (np.array([0.0, 3.0], np.float32), "float32"),
        (np.array([False, True]), "bool"),
        (np.array([0, 3], np.uint32), "uint32"),
        (np.array([0, 3], np.int16), "int16"),
        (np.array([0, 3]).astype(">i4"), ">i4"),
        (np.zeros(2, BFLOAT16), "bfloat16"),
        ([0, 1.5], "float64"),
        ([False, True], "bool"),
        ([0, 2**70, 0.5], "object"),
        ([[0, 2**70]], "object"),
        (["0", "3"], "<U1"),
    ],
)
def test_index_array_of_another_dtype(x: Any, dtype: str) -> None:
    with pytest.raises(TypeError) as raised:
        arrays.import_index(x, "qo_indptr")
    assert str(raised.value) == f"qo_indptr has dtype {dtype}, expected int32 or int64"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_index_tensor_of_another_dtype(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError) as raised:
        arrays.import_index(torch.zeros(3, dtype=getattr(torch, dtype)), "qo_indptr")
    assert str(raised.value) == f"qo_indptr has dtype {dtype}, expected int32 or int64"


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ([0, 2, 2**70], "[2] = 1180591620717411303424, expected at most 2147483647"),
        ((0, 2**63), "[1] = 9223372036854775808, expected at most 2147483647"),
        ([-1, 2**63, 2**70], "[1] = 9223372036854775808, expected at most 2147483647"),
        ([0, np.uint64(2**63)], "[1] = 9223372036854775808, expected at most 2147483647"),
        ([-(2**70), 0], "[0] = -1180591620717411303424, expected at least -2147483648"),
    ],
)
def test_an_index_that_no_integer_dtype_holds(x: Any, words: str) -> None:
    with pytest.raises(ValueError) as raised:
        arrays.import_index(x, "qo_indptr")
    assert str(raised.value) == f"qo_indptr{words}"


def test_index_tensor_on_another_device() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError) as raised:
        arrays.import_index(torch.zeros(3, dtype=torch.int32, device="meta"), "qo_indptr")
    assert str(raised.value) == "qo_indptr is on device meta, expected a CPU or CUDA tensor"


def test_index_that_is_no_list_of_ints() -> None:
    with pytest.raises(TypeError) as raised:
        arrays.import_index([[0], [1, 2]], "qo_indptr")
    assert str(raised.value) == "qo_indptr is a list of a list, expected ints"
    with pytest.raises(TypeError) as raised:
        arrays.import_index({0, 3}, "qo_indptr")
    assert str(raised.value) == f"qo_indptr is a set, {SPEAKS_DLPACK}"
