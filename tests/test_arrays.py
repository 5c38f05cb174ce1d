"""Arrays in and out on the host: NumPy, PyTorch, JAX, and any other DLPack producer."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest

from cupaged import arrays, dlpack, streams
from cupaged.errors import BackendUnavailableError
from cupaged.spec import DTYPES

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SPEAKS_DLPACK = "expected an array that speaks DLPack (CuPy, NumPy, PyTorch, JAX, numba)"


def as_float64(tensor: Any) -> np.ndarray:
    """A PyTorch tensor's values, by way of PyTorch alone."""
    return np.array(tensor.detach().double().tolist())


class DLTensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_: ClassVar = [
        ("tensor", DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class ManagedVersioned(ctypes.Structure):
    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


new_capsule = ctypes.pythonapi["PyCapsule_New"]
new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
new_capsule.restype = ctypes.py_object
rename_capsule = ctypes.pythonapi["PyCapsule_SetName"]
rename_capsule.argtypes = (ctypes.py_object, ctypes.c_char_p)
is_valid = ctypes.pythonapi["PyCapsule_IsValid"]
is_valid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)  # an address: the object is being freed
Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
producers: list[object] = []  # what capsules point to, for as long as there may be capsules


class Producer:
    """Exports `memory` the way DLPack asks of a producer, and counts calls of its deleter."""

    def __init__(
        self,
        memory: np.ndarray,
        code: int,
        bits: int,
        *,
        shape: tuple[int, ...] | None = None,
        strides: tuple[int, ...] | None = None,
        version: tuple[int, int] | None = None,
        read_only: bool = False,
        device: tuple[int, int] = (1, 0),
        lanes: int = 1,
        byte_offset: int = 0,
        null_data: bool = False,
    ) -> None:
        self.dtype = f"code {code}"
        self.deleted = 0
        self.device = device
        self.name = b"dltensor" if version is None else b"dltensor_versioned"
        shape = memory.shape if shape is None else shape
        self.sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        self.steps = (ctypes.c_int64 * max(len(shape), 1))(*(strides or ()))
        tensor = DLTensor(
            data=None if null_data else memory.ctypes.data,
            device_type=device[0],
            device_id=device[1],
            ndim=len(shape),
            code=code,
            bits=bits,
            lanes=lanes,
            shape=ctypes.addressof(self.sizes),
            strides=None if strides is None else ctypes.addressof(self.steps),
            byte_offset=byte_offset,
        )
        if version is None:
            self.managed: Any = Managed(tensor=tensor)
        else:
            self.managed = ManagedVersioned(
                major=version[0], minor=version[1], flags=int(read_only), tensor=tensor
            )
        self.memory = memory
        self.destructor = Destructor(self.destroy)
        producers.append(self)

    def destroy(self, capsule: int) -> None:
        if is_valid(capsule, self.name):
            self.deleted += 1

    def capsule(self) -> object:
        address = ctypes.cast(self.destructor, ctypes.c_void_p)
        return new_capsule(ctypes.addressof(self.managed), self.name, address)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None) -> object:
        assert max_version == (1, 0)
        return self.capsule()


class OldProducer(Producer):
    """One of before DLPack 1.0, which knows no `max_version`."""

    def __dlpack__(self, *, stream: int | None = None) -> object:  # type: ignore[override]
        assert stream is None
        return self.capsule()


# -- reading capsules ------------------------------------------------------------------------


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


def test_capsule_that_someone_else_consumed() -> None:
    producer = Producer(np.zeros(3, np.float32), 2, 32)
    capsule = producer.capsule()
    rename_capsule(capsule, b"used_dltensor")
    with pytest.raises(BufferError, match="is not an unconsumed DLPack capsule"):
        dlpack.host_array(capsule)
    with pytest.raises(BufferError, match=r"^17 is not an unconsumed DLPack capsule$"):
        dlpack.host_array(17)
    del capsule
    gc.collect()
    assert producer.deleted == 0


# -- whose array -----------------------------------------------------------------------------


def test_importing_and_using_arrays_imports_no_framework() -> None:
    program = """
import sys
import cupaged.arrays as arrays
import numpy as np

a = arrays.import_tensor(np.zeros(3), "q")
arrays.import_index([0, 1], "qo_indptr")
arrays.framework(a)
arrays.export(arrays.empty((2,), a.dtype, a), a)
arrays.dtype_name("bfloat16", "q_data_type")
with arrays.on(arrays.device_id(a), arrays.caller_stream(a)):
    pass
print(sorted({"cupy", "torch", "jax", "jaxlib", "numba"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_framework_of_numpy_and_of_what_is_no_array() -> None:
    class Mine(np.ndarray):
        pass

    class Tensor:
        """Of PyTorch's name, not of its module."""

    assert arrays.framework(np.zeros(3)) == "numpy"
    assert arrays.framework(np.zeros(3).view(Mine)) == "numpy"
    for x in ([0], None, 3, "numpy", np.float16(3), np.dtype("f2"), Tensor(), np.ndarray):
        assert arrays.framework(x) == "other"


def test_framework_of_torch() -> None:
    torch = pytest.importorskip("torch")
    assert arrays.framework(torch.zeros(3)) == "torch"
    assert arrays.framework(torch.nn.Parameter(torch.zeros(3))) == "torch"
    for x in (torch.float16, torch.Size([3]), torch.nn.Linear(2, 2), torch):
        assert arrays.framework(x) == "other"


def test_framework_of_jax() -> None:
    jax = pytest.importorskip("jax")
    assert arrays.framework(jax.numpy.zeros(3)) == "jax"
    assert arrays.framework(jax.numpy.bfloat16) == "other"


# -- tensors in ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
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
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("q is an ArrayImpl whose memory can't be shared: ")
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


# -- index arrays in -------------------------------------------------------------------------


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
        ([0, 2**70], "object"),
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


def test_index_that_is_no_list_of_ints() -> None:
    with pytest.raises(TypeError) as raised:
        arrays.import_index([[0], [1, 2]], "qo_indptr")
    assert str(raised.value) == "qo_indptr is a list of a list, expected ints"
    with pytest.raises(TypeError) as raised:
        arrays.import_index({0, 3}, "qo_indptr")
    assert str(raised.value) == f"qo_indptr is a set, {SPEAKS_DLPACK}"


# -- arrays out ------------------------------------------------------------------------------


def test_empty_and_export_on_the_host() -> None:
    like = np.zeros((2, 3), np.float16)
    array = arrays.empty((5, 4), np.dtype(np.float32), like)
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((5, 4), np.float32, True)
    assert arrays.export(array, like) is array
    array, result = arrays.allocate_output((5, 0), BFLOAT16, like, like)
    assert result is array
    assert (array.shape, array.dtype) == ((5, 0), BFLOAT16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(5, 4, 8), (0, 4)])
def test_export_to_torch_is_not_a_copy(
    dtype: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    torch = pytest.importorskip("torch")
    q = torch.zeros(2, dtype=torch.float16)
    array = arrays.empty(shape, DTYPES[dtype], arrays.import_tensor(q, "q"))
    array[...] = rng.standard_normal(shape)
    expected = array.astype(np.float64)
    tensor = arrays.export(array, q)
    assert isinstance(tensor, torch.Tensor)
    assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, dtype), shape)
    if tensor.numel():
        assert tensor.data_ptr() == array.ctypes.data
    del array
    gc.collect()
    np.testing.assert_array_equal(as_float64(tensor).reshape(shape), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_output_of_torch_is_torchs_own(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    q = torch.zeros(2, dtype=torch.float16, requires_grad=True)
    array, result = arrays.allocate_output((3, 5), DTYPES[dtype], arrays.import_tensor(q, "q"), q)
    assert (result.dtype, tuple(result.shape)) == (getattr(torch, dtype), (3, 5))
    assert not result.requires_grad
    assert (array.dtype, array.ctypes.data) == (DTYPES[dtype], result.data_ptr())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_export_to_jax(dtype: str, rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    q = jax.device_put(np.zeros(3, np.float16), jax.devices("cpu")[0])
    array, result = arrays.allocate_output((5, 4), DTYPES[dtype], arrays.import_tensor(q, "q"), q)
    assert result is None
    array[...] = rng.standard_normal((5, 4))
    out = arrays.export(array, q)
    assert isinstance(out, jax.Array)
    assert out.devices() == q.devices()
    assert out.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(np.asarray(out), array)


def test_writable() -> None:
    x = np.zeros(3)
    assert arrays.writable(x, "out") is x
    x.flags.writeable = False
    with pytest.raises(ValueError, match=r"^lse is a read-only array, expected one that can"):
        arrays.writable(x, "lse")


def test_writable_torch_and_jax() -> None:
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    x = torch.zeros(3)
    assert arrays.writable(x, "out") is x
    with pytest.raises(TypeError) as raised:
        arrays.writable(jax.numpy.zeros(3), "out")
    assert str(raised.value) == (
        "out is a JAX array, which is immutable: omit out and use what is returned"
    )


# -- streams on the host ---------------------------------------------------------------------


def test_the_host_has_no_stream() -> None:
    for x in (np.zeros(3), [0, 3], Producer(np.zeros(3, np.float32), 2, 32)):
        assert arrays.caller_stream(x) == 0
    with arrays.on(None, 0):
        pass


def test_a_host_tensor_has_no_stream() -> None:
    torch = pytest.importorskip("torch")
    assert arrays.caller_stream(torch.zeros(3)) == 0


# -- dtypes by any name ----------------------------------------------------------------------


@pytest.mark.parametrize("name", list(DTYPES))
def test_dtype_name(name: str) -> None:
    for x in (name, DTYPES[name], DTYPES[name].type):
        assert arrays.dtype_name(x, "q_data_type") == name


@pytest.mark.parametrize(("x", "name"), [("half", "float16"), ("f4", "float32")])
def test_dtype_name_of_an_alias(x: str, name: str) -> None:
    assert arrays.dtype_name(x, "q_data_type") == name


@pytest.mark.parametrize("name", list(DTYPES))
def test_dtype_name_of_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    assert arrays.dtype_name(getattr(torch, name), "q_data_type") == name
    assert arrays.dtype_name(torch.half, "q_data_type") == "float16"


@pytest.mark.parametrize("name", list(DTYPES))
def test_dtype_name_of_jax(name: str) -> None:
    jax = pytest.importorskip("jax")
    scalar = getattr(jax.numpy, name)
    for x in (scalar, jax.numpy.dtype(scalar), jax.numpy.zeros(2, scalar).dtype):
        assert arrays.dtype_name(x, "q_data_type") == name


@pytest.mark.parametrize(
    "x", ["float64", "torch.float64", "nonsense", "", None, float, int, np.dtype(">f2"), 16, object]
)
def test_dtype_name_of_another(x: object) -> None:
    with pytest.raises(TypeError) as raised:
        arrays.dtype_name(x, "kv_data_type")
    assert str(raised.value) == (
        f"kv_data_type = {x!r}, expected one of "
        "float16, bfloat16, float32, float8_e4m3fn, float8_e5m2"
    )


def test_dtype_name_of_another_torch_dtype() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"^q_data_type = torch\.float64, expected one of float16"):
        arrays.dtype_name(torch.float64, "q_data_type")
