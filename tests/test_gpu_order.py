"""Frameworks' streams in order with each other's, also on a second GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from frameworks import FLOATS, on_device, slow

from cupaged import arrays
from cupaged.spec import DTYPES

pytestmark = pytest.mark.gpu


def test_index_array_waits_for_its_writer(cp: Any, torch: Any, late_write: Any) -> None:
    with cp.cuda.Stream(non_blocking=True):
        x = cp.zeros(8, np.int32)
        late_write(x, 41)
        np.testing.assert_array_equal(arrays.import_index(x, "qo_indptr"), 41)
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.zeros(8, dtype=torch.int32, device="cuda")
        with arrays.on(0, arrays.caller_stream(x)):
            late_write(arrays.import_tensor(x, "x"), 43)
        np.testing.assert_array_equal(arrays.import_index(x, "qo_indptr"), 43)


def test_torch_comes_before_work_on_cupys_stream(cp: Any, torch: Any, late_write: Any) -> None:
    with torch.cuda.stream(torch.cuda.Stream()), cp.cuda.Stream(non_blocking=True) as stream:
        x = torch.full((1000,), torch.nan, device="cuda")
        with arrays.on(0, arrays.caller_stream(x)):
            late_write(arrays.import_tensor(x, "x"), 5.5)
        q = cp.zeros(1)
        got = arrays.import_tensor(x, "k cache", beside=q).copy()
        stream.synchronize()
    np.testing.assert_array_equal(got.get(), 5.5)


def test_cupy_comes_before_work_on_torchs_stream(cp: Any, torch: Any, late_write: Any) -> None:
    with torch.cuda.stream(torch.cuda.Stream()), cp.cuda.Stream(non_blocking=True):
        x = cp.full(1000, cp.nan, np.float32)
        late_write(x, 5.5)
        q = torch.zeros(1, device="cuda")
        view = arrays.import_tensor(x, "k cache", beside=q)
        with arrays.on(0, arrays.caller_stream(q)):
            got = view.copy()
            cp.cuda.get_current_stream().synchronize()
    np.testing.assert_array_equal(got.get(), 5.5)


def test_jax_comes_before_work_on_cupys_stream(cp: Any, jax: Any, rng: np.random.Generator) -> None:
    x = slow(jax, rng)
    with cp.cuda.Stream(non_blocking=True) as stream:
        got = arrays.import_tensor(x, "q").copy()
        stream.synchronize()
    np.testing.assert_array_equal(got.get(), np.asarray(x))


def test_jax_comes_before_work_on_torchs_stream(
    cp: Any, jax: Any, torch: Any, rng: np.random.Generator
) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        q = torch.zeros(1, device="cuda")
        x = slow(jax, rng)
        view = arrays.import_tensor(x, "k cache", beside=q)
        with arrays.on(0, arrays.caller_stream(q)):
            got = view.copy()
            cp.cuda.get_current_stream().synchronize()
    np.testing.assert_array_equal(got.get(), np.asarray(x))


def test_export_to_torch_follows_the_work(cp: Any, torch: Any, late_write: Any) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        q = torch.zeros(1, device="cuda")
        (q + 1).tolist()  # PyTorch has loaded that kernel
        with arrays.on(0, arrays.caller_stream(q)):
            array = cp.full(1000, cp.nan, np.float32)
            late_write(array, 5.5)
            out = arrays.export(array, q)
        got = out + 1
        assert not torch.cuda.current_stream().query()  # nobody has waited
        assert (got == 6.5).all().item()


def test_export_to_jax_follows_the_work(cp: Any, jax: Any, late_write: Any) -> None:
    q = on_device(jax, np.zeros(1, np.float32))
    with cp.cuda.Stream(non_blocking=True) as stream:
        array = cp.full(1000, cp.nan, np.float32)
        late_write(array, 5.5)
        written = stream.record()
        out = arrays.export(array, q)
        assert written.done  # the inputs may go
    np.testing.assert_array_equal(np.asarray(out + 1), 6.5)


# A second GPU


@pytest.mark.usefixtures("two_gpus")
def test_cupy_on_the_second_gpu(cp: Any) -> None:
    with cp.cuda.Device(1):
        x = cp.ones((3, 4), np.float16)
        stream = cp.cuda.Stream(non_blocking=True)
        with stream, cp.cuda.Device(0):
            assert arrays.caller_stream(x) == stream.ptr
    assert arrays.device_id(arrays.import_tensor(x, "q")) == 1
    assert arrays.empty((2, 2), x.dtype, x).device.id == 1
    assert cp.cuda.runtime.getDevice() == 0
    with arrays.on(1, stream.ptr):
        assert cp.cuda.runtime.getDevice() == 1
        assert cp.cuda.get_current_stream().ptr == stream.ptr
    assert cp.cuda.runtime.getDevice() == 0
    assert cp.cuda.get_current_stream(0).ptr == cp.cuda.get_current_stream(1).ptr == 0
    indptr = cp.asarray([0, 3])
    with cp.cuda.Device(1):
        indptr = cp.asarray([0, 3])
    np.testing.assert_array_equal(arrays.import_index(indptr, "qo_indptr"), [0, 3])


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("dtype", FLOATS)
def test_torch_on_the_second_gpu(cp: Any, torch: Any, dtype: str) -> None:
    x = torch.full((3, 4), 2.0, dtype=getattr(torch, dtype), device="cuda:1")
    array = arrays.import_tensor(x, "q")
    assert arrays.device_id(array) == 1
    assert array.data.ptr == x.data_ptr()
    side = torch.cuda.Stream(1)
    with torch.cuda.stream(side), torch.cuda.device(0):
        assert arrays.caller_stream(x) == side.cuda_stream
    made, result = arrays.allocate_output((2, 2), DTYPES[dtype], array, x)
    assert (made.device.id, result.device) == (1, x.device)
    empty = arrays.empty((2, 2), DTYPES[dtype], array)
    out = arrays.export(empty, x)
    assert (out.device, out.data_ptr()) == (x.device, empty.data.ptr)
    index = torch.tensor([0, 3], device="cuda:1")
    np.testing.assert_array_equal(arrays.import_index(index, "qo_indptr"), [0, 3])
    assert torch.cuda.current_device() == cp.cuda.runtime.getDevice() == 0


@contextmanager
def keeps_device_0(cp: Any) -> Iterator[None]:
    """CUDA's current device is 0 before and after. JAX's own calls leave another one behind."""
    cp.cuda.runtime.setDevice(0)
    yield
    assert cp.cuda.runtime.getDevice() == 0


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("dtype", FLOATS)
def test_jax_on_the_second_gpu(cp: Any, jax: Any, dtype: str) -> None:
    values = np.full((3, 4), 2.0).astype(DTYPES[dtype])
    x = on_device(jax, values, 1)
    with keeps_device_0(cp):
        array = arrays.import_tensor(x, "q")
    assert arrays.device_id(array) == 1
    np.testing.assert_array_equal(array.get(), values)
    made = arrays.empty((3, 4), DTYPES[dtype], array)
    with keeps_device_0(cp), arrays.on(1, arrays.caller_stream(x)):
        made[...] = array
        out = arrays.export(made, x)
    assert out.devices() == x.devices()
    np.testing.assert_array_equal(np.asarray(out), values)
    index = on_device(jax, np.array([0, 3], np.int32), 1)
    with keeps_device_0(cp):
        np.testing.assert_array_equal(arrays.import_index(index, "qo_indptr"), [0, 3])


@pytest.mark.usefixtures("two_gpus")
def test_order_between_frameworks_on_the_second_gpu(cp: Any, torch: Any, late_write: Any) -> None:
    with keeps_device_0(cp), torch.cuda.stream(torch.cuda.Stream(1)):
        x = torch.full((1000,), torch.nan, device="cuda:1")
        with arrays.on(1, arrays.caller_stream(x)):
            late_write(arrays.import_tensor(x, "x"), 5.5)
        with cp.cuda.Device(1), cp.cuda.Stream(non_blocking=True) as stream:
            q = cp.zeros(1)
            with cp.cuda.Device(0):
                view = arrays.import_tensor(x, "k cache", beside=q)
            got = view.copy()
            stream.synchronize()
            np.testing.assert_array_equal(got.get(), 5.5)
