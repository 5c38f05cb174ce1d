"""Arrays in and out at the public boundary: no copy, on the caller's own device and stream.

Inside the library a tensor is a NumPy array (host) or a CuPy array (CUDA device). A framework
is touched only when the caller's object is of it, and CuPy only for what is on a device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from cupaged import dlpack
from cupaged.dtypes import dtype_name, from_torch_dtype, torch_dtype
from cupaged.spec import DTYPES
from cupaged.streams import (
    caller_stream,
    cupy,
    framework,
    on,
    on_stream_of,
    order_after,
    torch_stream,
)

__all__ = [
    "allocate_output",
    "caller_stream",
    "device_id",
    "dtype_name",
    "empty",
    "export",
    "framework",
    "import_index",
    "import_tensor",
    "on",
    "on_stream_of",
    "torch_stream",
    "writable",
]

Array: TypeAlias = Any  # a numpy.ndarray or a cupy.ndarray
HostArray: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

_INT32 = np.dtype(np.int32)
_INT64 = np.dtype(np.int64)
_INT32_RANGE = np.iinfo(np.int32)
_INT64_RANGE = np.iinfo(np.int64)
_SPEAKS_DLPACK = "an array that speaks DLPack (CuPy, NumPy, PyTorch, JAX, numba)"


def import_tensor(x: Any, name: str, beside: Any = None) -> Array:
    """View the caller's array as a NumPy or CuPy array, without a copy.

    Parameters
    ----------
    x : array
        Of any framework that speaks DLPack or the CUDA array interface; any shape and strides.
        A PyTorch tensor that requires grad is detached.
    name : str
        The argument's, for errors.
    beside : array, optional
        The array on whose stream, `caller_stream(beside)`, the work will be launched; `x` itself
        where not given. Where that is not the stream of x's own framework, what is pending on
        `x` is ordered before what comes on it. The host never waits.

    Returns
    -------
    numpy.ndarray or cupy.ndarray
        On x's own device; bfloat16 and float8 come as dtypes of `ml_dtypes`. It keeps x's memory
        alive.

    Raises
    ------
    TypeError
        No array, on a device that is neither host nor CUDA, or its framework won't share it.
    NotImplementedError
        A dtype that NumPy or CuPy can't hold.
    BackendUnavailableError
        `x` is on a CUDA device, and CuPy isn't installed.
    """
    kind = framework(x)
    if kind == "numpy":
        return x
    if kind == "cupy":
        if beside is None or type(beside) is type(x):
            return x
        array = x
    elif kind == "torch":
        array = _from_torch(x, name)
    elif hasattr(x, "__dlpack_device__"):
        return _from_dlpack(x, name, beside)
    elif hasattr(x, "__cuda_array_interface__"):
        array = cupy().asarray(x)
    else:
        raise TypeError(f"{name} is {_describe(x)}, expected {_SPEAKS_DLPACK}")
    if beside is not None and (kind == "torch") != (framework(beside) == "torch"):
        device = device_id(array)
        if device is not None:
            order_after(x, beside, device)
    return array


def import_index(x: Any, name: str) -> HostArray:
    """View an index array on the host, or copy it there.

    Parameters
    ----------
    x : array, or list or tuple of int
        int32 or int64; not copied where it is an array on the host. From a device it is
        copied, which waits for the work that is pending on it.
    name : str
        The argument's, for errors.

    Returns
    -------
    numpy.ndarray
        int32 or int64, as it came; int64 for a list.

    Raises
    ------
    TypeError
        No array and no list, or of another dtype; a tensor on neither host nor CUDA.
    ValueError
        A list with a number that int64 can't hold.
    """
    if isinstance(x, np.ndarray):
        host = x
    elif isinstance(x, list | tuple):
        host = _index_list(x, name)
    else:
        if framework(x) == "torch":
            if not (x.is_cpu or x.is_cuda):
                raise _out_of_reach(x, name)
            x = x.cpu()
        host = import_tensor(x, name)
        if not isinstance(host, np.ndarray):
            _check_index_dtype(host.dtype, name)
            with host.device:
                host = host.get()
    _check_index_dtype(host.dtype, name)
    return host


def device_id(a: Array) -> int | None:
    """CUDA device of an imported array; None on the host."""
    return None if isinstance(a, np.ndarray) else a.data.device_id


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], like: Array) -> Array:
    """An uninitialised, C-contiguous array where the imported array `like` is.

    On a device it comes from CuPy's pool for the stream that is current there.
    """
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    cp = cupy()
    if cp.cuda.runtime.getDevice() == like.data.device_id:  # making it current takes a while
        return cp.empty(shape, dtype)
    with like.device:
        return cp.empty(shape, dtype)


def allocate_output(
    shape: tuple[int, ...], dtype: np.dtype[Any], like: Array, like_obj: Any
) -> tuple[Array, Any | None]:
    """An uninitialised array for a result of the kind of the caller's array.

    PyTorch's own allocator serves for its tensors. It knows which stream uses the memory, and
    keeps it where a CUDA graph is being captured; CuPy's pool knows neither.

    Parameters
    ----------
    shape : tuple of int
    dtype : numpy.dtype
        One of `spec.DTYPES`.
    like : numpy.ndarray or cupy.ndarray
        `like_obj` as it was imported.
    like_obj : array
        The caller's.

    Returns
    -------
    array : numpy.ndarray or cupy.ndarray
        What the work writes to.
    result : array or None
        The same memory as the caller's kind of array; None where `export(array, like_obj)`
        has to make it, once the work has been launched.
    """
    kind = framework(like_obj)
    if kind == "torch":
        result = like_obj.new_empty(shape, dtype=torch_dtype(dtype))
        return _from_torch(result, "the output"), result
    array = empty(shape, dtype, like)
    return array, (array if kind in ("numpy", "cupy") else None)


def export(a: Array, like_obj: Any) -> Any:
    """Give `a` out as the kind of array that the caller's `like_obj` is.

    Called once the work that writes `a` has been launched on `caller_stream(like_obj)`.

    Parameters
    ----------
    a : numpy.ndarray or cupy.ndarray
        C-contiguous.
    like_obj : array
        The caller's, on the same device.

    Returns
    -------
    array
        NumPy, CuPy, PyTorch and numba: the same memory. JAX: the same memory on a device; on
        the host JAX may copy. What has another owner yields `a` itself.
    """
    kind = framework(like_obj)
    if kind == "torch":
        torch = sys.modules["torch"]
        if not isinstance(a, np.ndarray):
            # The work is on PyTorch's own stream: there is nothing to order.
            return torch.from_dlpack(a.__dlpack__(stream=-1))
        if a.dtype == DTYPES["bfloat16"]:
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)
    if kind == "jax":
        jax = sys.modules["jax"]
        if isinstance(a, np.ndarray):
            return jax.device_put(a, like_obj.sharding)
        with a.device:
            # A JAX buffer may be freed, or donated to a computation on XLA's stream, as soon
            # as nobody holds its DLPack export, and XLA's stream does not wait for this one:
            # the inputs have to have been read before they are let go.
            cupy().cuda.get_current_stream().synchronize()
            return jax.dlpack.from_dlpack(a)
    if kind == "numba" and not isinstance(a, np.ndarray):
        return sys.modules["numba"].cuda.as_cuda_array(a)
    return a


def writable(x: Any, name: str) -> Any:
    """Refuse an `out` or `lse` that can't be written; returns `x`.

    Raises
    ------
    TypeError
        A JAX array.
    ValueError
        A read-only NumPy array.
    """
    if framework(x) == "jax":
        raise TypeError(
            f"{name} is a JAX array, which is immutable: omit {name} and use what is returned"
        )
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ValueError(f"{name} is a read-only array, expected one that can be written")
    return x


def _from_torch(x: Any, name: str) -> Array:
    dtype = from_torch_dtype(x.dtype)
    if dtype is None:
        raise NotImplementedError(f"{name} has dtype {x.dtype}, which NumPy has no name for")
    if x.requires_grad:
        x = x.detach()
    if x.is_cuda:
        return _from_torch_cuda(x, name, dtype)
    if not x.is_cpu:
        raise _out_of_reach(x, name)
    try:
        if dtype.isbuiltin == 1:  # NumPy's own; bfloat16 is not
            return x.numpy()
        torch = sys.modules["torch"]
        if dtype.itemsize == 1:  # float8, which has not always been in DLPack
            return x.view(torch.uint8).numpy().view(dtype)
        capsule = torch.to_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:
        raise _not_shared(x, name, error) from error
    return _read(dlpack.host_array, capsule, x, name)


def _from_torch_cuda(x: Any, name: str, dtype: np.dtype[Any]) -> Array:
    # Not through DLPack: that takes longer, and a tensor's `__dlpack__()` refuses when another
    # device than its own is current. Nothing has to be ordered, as work on a tensor goes to
    # PyTorch's own stream.
    cp = cupy()
    try:
        memory = cp.cuda.UnownedMemory(x.data_ptr(), x.nbytes, x, x.get_device())
    except RuntimeError as error:  # a sparse one has no such pointer
        raise _not_shared(x, name, error) from error
    strides = None
    if not x.is_contiguous():
        itemsize = dtype.itemsize
        strides = [step * itemsize for step in x.stride()]
    return cp.ndarray(tuple(x.shape), dtype, cp.cuda.MemoryPointer(memory, 0), strides)


def _from_dlpack(x: Any, name: str, beside: Any) -> Array:
    read: Callable[[object], Array]
    try:
        device_type, device = map(int, x.__dlpack_device__())
        if device_type in dlpack.HOST:
            if framework(x) == "jax":
                # Read-only, which JAX's capsules can't say.
                return np.asarray(x)
            read = dlpack.host_array
            try:
                capsule = x.__dlpack__(max_version=(1, 0))
            except TypeError:  # a producer of before DLPack 1.0
                capsule = x.__dlpack__()
        elif device_type in dlpack.DEVICE:
            read = _device_array
            with cupy().cuda.Device(device):
                # The producer orders itself before this stream. DLPack's number for the legacy
                # default stream is 1.
                stream = caller_stream(x if beside is None else beside, device)
                capsule = x.__dlpack__(stream=stream or 1)
        else:
            raise BufferError(f"DLPack device type {device_type} is neither host nor CUDA")
    except (BufferError, TypeError) as error:
        raise _not_shared(x, name, error) from error
    return _read(read, capsule, x, name)


def _device_array(capsule: object) -> Array:
    float8 = dlpack.as_bytes(capsule)
    array = cupy().from_dlpack(capsule)
    return array if float8 is None else array.view(float8)


def _read(read: Callable[[object], Array], capsule: object, x: Any, name: str) -> Array:
    try:
        return read(capsule)
    except (TypeError, NotImplementedError) as error:
        raise NotImplementedError(
            f"{name} has dtype {x.dtype}, which can't be read through DLPack: {error}"
        ) from error


def _index_list(x: Sequence[int], name: str) -> HostArray:
    if len(x) == 0:
        return np.empty(0, _INT64)
    try:
        array = np.array(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} is {_describe(x)} of {_describe(x[0])}, expected ints") from error
    if array.dtype != _INT64 and array.dtype != _INT32:
        _check_magnitudes(x, name)
    return array


def _check_magnitudes(x: Sequence[int], name: str) -> None:
    """Refuse ints for which NumPy takes another dtype than int64, where there are only ints."""
    if any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in x):
        return
    for place, i in enumerate(map(int, x)):
        if not _INT64_RANGE.min <= i <= _INT64_RANGE.max:
            end = "at most" if i > 0 else "at least"
            limit = _INT32_RANGE.max if i > 0 else _INT32_RANGE.min
            raise ValueError(f"{name}[{place}] = {i}, expected {end} {limit}")


def _check_index_dtype(dtype: np.dtype[Any], name: str) -> None:
    if dtype != _INT32 and dtype != _INT64:
        raise TypeError(f"{name} has dtype {dtype}, expected int32 or int64")


def _out_of_reach(x: Any, name: str) -> TypeError:
    return TypeError(f"{name} is on device {x.device}, expected a CPU or CUDA tensor")


def _not_shared(x: Any, name: str, error: Exception) -> TypeError:
    reason = str(error).partition("\n")[0]
    if framework(x) == "jax" and x.is_deleted():
        reason = "it has been deleted, or donated to a computation"
    return TypeError(f"{name} is {_describe(x)} whose memory can't be shared: {reason}")


def _describe(x: object) -> str:
    if x is None:
        return "None"
    kind = type(x).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
