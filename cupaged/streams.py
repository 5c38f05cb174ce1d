"""Whose array an object is, and the CUDA stream on which its owner expects work.

No framework is imported: PyTorch is asked only about its own tensors, CuPy only where the work
is on a device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, Literal

from cupaged import dlpack
from cupaged.errors import BackendUnavailableError

Framework = Literal["numpy", "cupy", "torch", "jax", "numba", "other"]

#: (root module, name) of an array class → its framework
_ARRAY_CLASSES: dict[tuple[str, str], Framework] = {
    ("numpy", "ndarray"): "numpy",
    ("cupy", "ndarray"): "cupy",
    ("torch", "Tensor"): "torch",
    ("jaxlib", "ArrayImpl"): "jax",
    ("jax", "ArrayImpl"): "jax",
    ("numba", "DeviceNDArrayBase"): "numba",
    ("numba_cuda", "DeviceNDArrayBase"): "numba",
}

_ALREADY_CURRENT = nullcontext()


def _find_framework(kind: type) -> Framework:
    for base in kind.__mro__:
        found = _ARRAY_CLASSES.get((base.__module__.partition(".")[0], base.__name__))
        if found is not None:
            return found
    return "other"


_frameworks: dict[type, Framework] = {}  # of the classes seen: half the time of lru_cache


def framework(x: object) -> Framework:
    """Tell whose array `x` is, without importing anything.

    "other" is whatever is no array of the five; it may still speak DLPack.
    """
    kind = type(x)
    found = _frameworks.get(kind)
    if found is None:
        found = _frameworks[kind] = _find_framework(kind)
    return found


@lru_cache(maxsize=1)
def cupy() -> Any:
    """CuPy, imported when it is first needed.

    Raises
    ------
    BackendUnavailableError
        It isn't installed.
    """
    try:
        import cupy as module
    except ImportError as error:
        raise BackendUnavailableError(
            f"arrays on a GPU need CuPy ({error}): pip install 'cupaged[cuda12]' for a driver of "
            "CUDA 12, 'cupaged[cuda13]' for CUDA 13; or pass host arrays"
        ) from error
    return module


def caller_stream(x: Any, device: int | None = None) -> int:
    """Raw pointer of the CUDA stream on which the owner of `x` expects work.

    Parameters
    ----------
    x : array, list or tuple
    device : int, optional
        CUDA device of the work; by default the one that `x` is on.

    Returns
    -------
    int
        PyTorch's current stream on the device where `x` is a tensor, CuPy's for everything else.
        0 is the legacy default stream, and the answer where the work is on the host.
    """
    kind = framework(x)
    if device is None:
        device = _cuda_device(x, kind)
        if device is None:
            return 0
    stream: int
    if kind == "torch":
        cuda = sys.modules["torch"].cuda
        # A host tensor says little: PyTorch may be built without CUDA, or not be using it.
        if x.is_cuda or cuda.is_initialized():
            stream = cuda.current_stream(device).cuda_stream
            return stream
    stream = cupy().cuda.get_current_stream(device).ptr
    return stream


def torch_stream(device: int) -> int:
    """Raw pointer of PyTorch's current stream on a CUDA device; 0 where it isn't in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


def on(device: int | None, stream: int) -> AbstractContextManager[None]:
    """Make a CUDA device and a raw stream of it CuPy's current ones; None is the host."""
    if device is None:
        return _ALREADY_CURRENT
    cuda = cupy().cuda
    if cuda.runtime.getDevice() == device and cuda.get_current_stream().ptr == stream:
        return _ALREADY_CURRENT
    return _made_current(device, stream)


def order_after(x: Any, beside: Any, device: int) -> None:
    """Let the caller's stream of `beside` wait for what is pending on that of `x`."""
    producer, consumer = caller_stream(x, device), caller_stream(beside, device)
    if producer == consumer:
        return
    cuda = cupy().cuda
    with cuda.Device(device):
        event = cuda.Event(disable_timing=True)
        cuda.runtime.eventRecord(event.ptr, producer)
        cuda.runtime.streamWaitEvent(consumer, event.ptr)


def on_stream_of(x: Any, device: int | None) -> tuple[AbstractContextManager[None], int]:
    """What makes `caller_stream(x, device)` the current stream, and that stream."""
    if device is None:
        return _ALREADY_CURRENT, 0
    if framework(x) == "cupy":
        cuda = cupy().cuda
        if cuda.runtime.getDevice() == device:
            # It is the one that is current.
            return _ALREADY_CURRENT, cuda.get_current_stream(device).ptr
    stream = caller_stream(x, device)
    return on(device, stream), stream


@contextmanager
def _made_current(device: int, stream: int) -> Iterator[None]:
    cuda = cupy().cuda
    with cuda.Device(device), cuda.Stream.from_external(_RawStream(stream)):
        yield


class _RawStream:
    """A stream that someone else owns, as the CUDA stream protocol has it."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def _cuda_device(x: Any, kind: Framework) -> int | None:
    if kind == "numpy":
        return None
    if kind == "cupy":
        return int(x.data.device_id)
    if kind == "torch":
        return int(x.get_device()) if x.is_cuda else None
    if hasattr(x, "__dlpack_device__"):
        device_type, device = map(int, x.__dlpack_device__())
        return None if device_type in dlpack.HOST else device
    if hasattr(x, "__cuda_array_interface__"):
        return int(cupy().asarray(x).data.device_id)
    return None
