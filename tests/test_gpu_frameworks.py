"""Arrays in and out on a GPU: CuPy, PyTorch, JAX and numba."""

from __future__ import annotations

import gc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from frameworks import FLOATS, on_device

from cupaged import arrays
from cupaged.spec import DTYPES

pytestmark = pytest.mark.gpu

# CuPy


@pytest.mark.parametrize("dtype", FLOATS)
def test_cupy_passes_straight_through(cp: Any, dtype: str) -> None:
    x = cp.zeros((4, 3), DTYPES[dtype])[::2]
    assert arrays.framework(x) == "cupy"
    assert arrays.import_tensor(x, "q") is x
    assert arrays.import_tensor(x, "q", beside=x) is x
    assert arrays.device_id(x) == 0
    assert arrays.export(x, x) is x
    out = arrays.empty((5, 4), DTYPES[dtype], x)
    assert isinstance(out, cp.ndarray)
    assert (out.shape, out.dtype, out.flags.c_contiguous) == ((5, 4), DTYPES[dtype], True)
    out, result = arrays.allocate_output((5, 0), DTYPES[dtype], x, x)
    assert result is out
    assert out.shape == (5, 0)


def test_cupy_stream(cp: Any) -> None:
    x = cp.zeros(3)
    assert arrays.caller_stream(x) == cp.cuda.get_current_stream().ptr
    with cp.cuda.Stream(non_blocking=True) as stream:
        assert arrays.caller_stream(x) == stream.ptr != 0
        assert arrays.caller_stream([0, 1], 0) == stream.ptr
        assert arrays.caller_stream(np.zeros(3)) == 0


def test_on_makes_a_stream_current_and_gives_the_old_one_back(cp: Any) -> None:
    stream, outer = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    with outer:
        with arrays.on(0, stream.ptr):
            assert cp.cuda.get_current_stream().ptr == stream.ptr
            with arrays.on(0, stream.ptr):
                assert cp.cuda.get_current_stream().ptr == stream.ptr
            with arrays.on(0, 0):
                assert cp.cuda.get_current_stream().ptr == 0
            with arrays.on(None, 0):
                assert cp.cuda.get_current_stream().ptr == stream.ptr
        assert cp.cuda.get_current_stream().ptr == outer.ptr
        with pytest.raises(KeyError), arrays.on(0, stream.ptr):
            raise KeyError
        assert cp.cuda.get_current_stream().ptr == outer.ptr
    stream.synchronize()  # it is not `on`'s to destroy


def test_array_interface_alone(cp: Any) -> None:
    class Speaks:
        def __init__(self, array: Any) -> None:
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    x = cp.arange(24, dtype=np.float16).reshape(4, 6)[:, ::2]
    array = arrays.import_tensor(Speaks(x), "q")
    assert (array.data.ptr, array.strides, array.dtype) == (x.data.ptr, x.strides, x.dtype)
    assert arrays.caller_stream(Speaks(x)) == 0
    assert arrays.export(array, Speaks(x)) is array


def on_host(array: Any) -> Any:
    """A copy, by way of bytes: CuPy copies no float8."""
    copy = np.empty(array.shape, f"u{array.itemsize}")
    for index in np.ndindex(array.shape[:-1]):
        copy[index] = array[index].view(copy.dtype).get()
    return copy.view(array.dtype)


# PyTorch


@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "float8_e4m3fn"])
def test_torch_is_shared(cp: Any, torch: Any, dtype: str, rng: np.random.Generator) -> None:
    values = torch.tensor(rng.standard_normal((5, 4, 6)) * 10, device="cuda")
    source = values.to(getattr(torch, dtype))
    for tensor in (source, source.permute(2, 0, 1)[1:, ::2], source[3:3]):
        array = arrays.import_tensor(tensor, "q")
        assert isinstance(array, cp.ndarray)
        assert array.dtype == DTYPES.get(dtype, np.dtype(np.int32))
        assert array.shape == tuple(tensor.shape)
        if tensor.numel():
            assert array.strides == tuple(step * array.itemsize for step in tensor.stride())
            assert array.data.ptr == tensor.data_ptr()
        assert arrays.device_id(array) == 0
        expected = np.array(tensor.double().tolist()).reshape(array.shape)
        np.testing.assert_array_equal(on_host(array).astype(np.float64), expected)
    arrays.import_tensor(source, "q").view(np.uint8)[...] = 0
    assert not source.double().any().item()


def test_torch_memory_stays_while_the_view_does(torch: Any) -> None:
    torch.cuda.synchronize()
    gc.collect()  # of what other tests left
    before = torch.cuda.memory_allocated()
    tensor = torch.full((1 << 20,), 3.0, dtype=torch.bfloat16, device="cuda")
    array = arrays.import_tensor(tensor, "q")
    part = array[5:9]
    del tensor, array
    gc.collect()
    assert torch.cuda.memory_allocated() > before
    others = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    np.testing.assert_array_equal(part.get().astype(np.float32), 3.0)
    del part, others
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_torch_that_requires_grad_is_detached(torch: Any) -> None:
    tensor = torch.ones(3, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    assert arrays.import_tensor(tensor, "q").data.ptr == tensor.data_ptr()
    assert tensor.requires_grad


def test_torch_that_cant_be_shared(torch: Any) -> None:
    with pytest.raises(TypeError, match=r"^q is a Tensor whose memory can't be shared: [^\n]+$"):
        arrays.import_tensor(torch.eye(3, device="cuda").to_sparse(), "q")


def test_pinned_torch_is_host_memory(torch: Any) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        tensor = torch.ones(3, dtype=dtype).pin_memory()
        array = arrays.import_tensor(tensor, "q")
        assert isinstance(array, np.ndarray)
        assert array.ctypes.data == tensor.data_ptr()


def test_torch_stream(cp: Any, torch: Any) -> None:
    x = torch.zeros(3, device="cuda")
    assert arrays.caller_stream(x) == torch.cuda.current_stream().cuda_stream
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), cp.cuda.Stream(non_blocking=True) as other:
        assert arrays.caller_stream(x) == side.cuda_stream
        assert arrays.caller_stream(torch.zeros(3), 0) == side.cuda_stream
        assert arrays.caller_stream(torch.zeros(3)) == 0
        assert side.cuda_stream not in (0, other.ptr)


@pytest.mark.parametrize("dtype", FLOATS)
def test_export_to_torch_is_not_a_copy(
    cp: Any, torch: Any, dtype: str, rng: np.random.Generator
) -> None:
    q = torch.zeros(2, dtype=torch.float16, device="cuda")
    array = arrays.empty((5, 4), DTYPES[dtype], arrays.import_tensor(q, "q"))
    values = rng.standard_normal((5, 4)).astype(DTYPES[dtype])
    array.set(values)
    tensor = arrays.export(array, q)
    assert (tensor.dtype, tensor.device) == (getattr(torch, dtype), q.device)
    assert tensor.data_ptr() == array.data.ptr
    del array
    gc.collect()
    poison = cp.full((5, 4), cp.nan, np.float32)
    np.testing.assert_array_equal(np.array(tensor.double().tolist()), values.astype(np.float64))
    del poison


@pytest.mark.parametrize("dtype", FLOATS)
def test_output_of_torch_is_torchs_own(torch: Any, dtype: str) -> None:
    q = torch.zeros(2, dtype=torch.float16, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    array, result = arrays.allocate_output(
        (64, 1024), DTYPES[dtype], arrays.import_tensor(q, "q"), q
    )
    assert torch.cuda.memory_allocated() >= before + array.nbytes
    assert (result.dtype, result.device) == (getattr(torch, dtype), q.device)
    assert tuple(result.shape) == array.shape == (64, 1024)
    assert not result.requires_grad
    assert (array.dtype, array.data.ptr) == (DTYPES[dtype], result.data_ptr())


def test_output_of_torch_in_a_cuda_graph(cp: Any, torch: Any) -> None:
    q = torch.zeros(2, dtype=torch.float16, device="cuda")
    cp.empty(4, np.float16).fill(7)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        view = arrays.import_tensor(q, "q")
        array, result = arrays.allocate_output((64, 1024), view.dtype, view, q)
        with arrays.on(0, arrays.caller_stream(q)):
            array.fill(7)
    del array
    result.fill_(torch.nan)
    others = [torch.full((64, 1024), torch.nan, dtype=q.dtype, device="cuda") for _ in range(8)]
    graph.replay()
    torch.cuda.synchronize()
    assert (result == 7).all().item()
    assert all(other.isnan().all().item() for other in others)


# JAX


@pytest.mark.parametrize("dtype", FLOATS)
def test_jax_is_shared(cp: Any, jax: Any, dtype: str, rng: np.random.Generator) -> None:
    values = rng.standard_normal((4, 6)).astype(DTYPES[dtype])
    x = on_device(jax, values)
    assert arrays.framework(x) == "jax"
    array = arrays.import_tensor(x, "q")
    assert isinstance(array, cp.ndarray)
    assert (array.dtype, array.data.ptr) == (DTYPES[dtype], x.unsafe_buffer_pointer())
    np.testing.assert_array_equal(array.get(), values)
    assert arrays.device_id(array) == 0
    with cp.cuda.Stream(non_blocking=True) as stream:
        assert arrays.caller_stream(x) == stream.ptr


@pytest.mark.parametrize("dtype", FLOATS)
def test_export_to_jax_is_not_a_copy(
    cp: Any, jax: Any, dtype: str, rng: np.random.Generator
) -> None:
    q = on_device(jax, np.zeros(3, np.float16))
    array, result = arrays.allocate_output((5, 4), DTYPES[dtype], arrays.import_tensor(q, "q"), q)
    assert result is None
    values = rng.standard_normal((5, 4)).astype(DTYPES[dtype])
    array.set(values)
    pointer = array.data.ptr
    out = arrays.export(array, q)
    assert isinstance(out, jax.Array)
    assert (out.devices(), out.dtype) == (q.devices(), DTYPES[dtype])
    assert out.unsafe_buffer_pointer() == pointer
    del array
    gc.collect()
    poison = cp.full((5, 4), cp.nan, np.float32)
    np.testing.assert_array_equal(np.asarray(out), values)
    np.testing.assert_array_equal(np.asarray(out + out), values + values)
    del poison


def test_writable_refuses_jax(jax: Any) -> None:
    with pytest.raises(TypeError, match=r"^out is a JAX array, which is immutable: omit out and "):
        arrays.writable(on_device(jax, np.ones(4)), "out")


# Numba


def test_numba(cp: Any, rng: np.random.Generator) -> None:
    cuda = pytest.importorskip("numba.cuda")
    if not cuda.is_available():
        pytest.skip("numba without CUDA")
    values = rng.standard_normal((4, 6)).astype(np.float16)
    x = cuda.to_device(values)
    assert arrays.framework(x) == "numba"
    array = arrays.import_tensor(x, "q")
    assert array.data.ptr == x.__cuda_array_interface__["data"][0]
    np.testing.assert_array_equal(array.get(), values)
    assert arrays.caller_stream(x) == cp.cuda.get_current_stream().ptr
    out = arrays.export(array, x)
    assert arrays.framework(out) == "numba"
    np.testing.assert_array_equal(out.copy_to_host(), values)
    indptr = arrays.import_index(cuda.to_device(np.array([0, 3], np.int32)), "qo_indptr")
    assert (indptr.dtype, indptr.tolist()) == (np.int32, [0, 3])


# Index arrays


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("of", ["cupy", "torch", "jax"])
def test_index_array(request: pytest.FixtureRequest, of: str, dtype: str, cp: Any) -> None:
    values = np.array([0, 3, 5], dtype)
    x: Any = cp.asarray(values)
    if of == "torch":
        x = request.getfixturevalue("torch").tensor(values, device="cuda")
    elif of == "jax":
        jax = request.getfixturevalue("jax")
        dtype = "int32"  # unless 64 bits are switched on
        x = on_device(jax, values.astype(dtype))
    array = arrays.import_index(x, "qo_indptr")
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(array, values)


@pytest.mark.parametrize("of", ["cupy", "torch", "jax"])
def test_index_array_of_another_dtype(request: pytest.FixtureRequest, of: str, cp: Any) -> None:
    x: Any = cp.zeros(3, ml_dtypes.bfloat16)
    if of == "torch":
        torch = request.getfixturevalue("torch")
        x = torch.zeros(3, dtype=torch.bfloat16, device="cuda")
    elif of == "jax":
        x = on_device(request.getfixturevalue("jax"), np.zeros(3, ml_dtypes.bfloat16))
    with pytest.raises(TypeError) as raised:
        arrays.import_index(x, "qo_indptr")
    assert str(raised.value) == "qo_indptr has dtype bfloat16, expected int32 or int64"
