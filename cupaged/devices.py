"""CUDA devices through CuPy: whether one can be used, and what the planner must know of it."""

from __future__ import annotations

import functools
from typing import Any

from cupaged import kernels
from cupaged.errors import BackendUnavailableError
from cupaged.spec import DeviceModel

#: Compute capability of the first GPUs with `cp.async` and `mma.sync` for bfloat16.
MIN_ARCH = 80


@functools.lru_cache(maxsize=1)
def cupy() -> Any:
    """CuPy, with a GPU that it can use.

    Raises
    ------
    BackendUnavailableError
        CuPy, NVRTC, a driver or a GPU is missing.
    """
    kernels.nvrtc()
    import cupy as module

    try:
        count = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        raise BackendUnavailableError(
            f"the CUDA backend finds no usable GPU ({error}): install an NVIDIA driver, or pass "
            "host arrays to use the reference backend"
        ) from error
    if count == 0:
        raise BackendUnavailableError(
            "the CUDA backend finds no GPU: pass host arrays to use the reference backend"
        )
    return module


def is_recorded(stream: int) -> bool:
    """Whether what is launched on a stream goes into a CUDA graph."""
    # The legacy default stream can't be recorded, and must not be asked while another one is.
    return stream != 0 and bool(cupy().cuda.runtime.streamIsCapturing(stream))


@functools.cache
def device_model(device: int) -> DeviceModel:
    """What the planner needs to know of CUDA device `device`.

    Raises
    ------
    BackendUnavailableError
        Its compute capability is below 8.0.
    """
    properties = cupy().cuda.runtime.getDeviceProperties(device)
    arch = properties["major"] * 10 + properties["minor"]
    if arch < MIN_ARCH:
        name = properties["name"].decode()
        raise BackendUnavailableError(
            f"cuda:{device} ({name}) has compute capability {arch // 10}.{arch % 10}, expected at "
            "least 8.0: pass host arrays to use the reference backend"
        )
    return DeviceModel(num_sms=properties["multiProcessorCount"], arch=arch)


def current_place() -> tuple[int, int]:
    """CuPy's current device and its current stream."""
    module = cupy()
    return module.cuda.runtime.getDevice(), module.cuda.get_current_stream().ptr
