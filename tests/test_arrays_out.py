"""Results out as the caller's kind of array, whose array one is, and dtypes by any name."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from processes import run_python
from producers import BFLOAT16, Producer

from cupaged import arrays
from cupaged.spec import DTYPES

# Whose array


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
    done = run_python("-c", program)
    assert done.stdout.strip() == "[]", done.stderr


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


# Arrays out


def as_float64(tensor: Any) -> np.ndarray:
    """A PyTorch tensor's values, by way of PyTorch alone."""
    return np.array(tensor.detach().double().tolist())


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


# Streams on the host


def test_the_host_has_no_stream() -> None:
    for x in (np.zeros(3), [0, 3], Producer(np.zeros(3, np.float32), 2, 32)):
        assert arrays.caller_stream(x) == 0
    with arrays.on(None, 0):
        pass


def test_a_host_tensor_has_no_stream() -> None:
    torch = pytest.importorskip("torch")
    assert arrays.caller_stream(torch.zeros(3)) == 0


# Dtypes by any name


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
