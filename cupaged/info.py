"""`python -m cupaged info`: versions, GPUs, the kernel cache; what is missing and how to get it."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import cupaged
from cupaged import append_cuda, device_pages, device_schedule, devices, kernels, merge_cuda
from cupaged.errors import BackendUnavailableError
from cupaged.kernel_spec import Kernel

_CUPY_WHEELS = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
_NVRTC_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
_GIB = 1 << 30
_LABEL_WIDTH = 14


def info() -> str:
    """Say what is installed, what the GPUs are, and which kernels are compiled for them.

    Works without CuPy and without a GPU: it then says what is missing and what to install.

    Returns
    -------
    str
        Without a newline at the end.
    """
    lines = [
        _line("cupaged", cupaged.__version__),
        _line("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _line("NumPy", _installed("numpy")),
        _line("ml_dtypes", _installed("ml_dtypes")),
        _line("PyTorch", _installed("torch")),
        _line("JAX", _installed("jax")),
        _line("CuPy", _installed(*_CUPY_WHEELS)),
        _line("NVRTC", _nvrtc_words()),
        *_driver_lines(),
    ]
    try:
        runtime = devices.cupy().cuda.runtime
    except BackendUnavailableError as error:
        lines.append(_line("CUDA backend", f"unavailable: {error}"))
        gpus = []
    else:
        gpus = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
    lines += [_line(f"cuda:{i}", _gpu_words(gpu)) for i, gpu in enumerate(gpus)]
    architectures = sorted({gpu["major"] * 10 + gpu["minor"] for gpu in gpus})
    lines += _cache_lines([arch for arch in architectures if arch >= devices.MIN_ARCH])
    return "\n".join(lines)


def gpu_name(properties: dict[str, Any]) -> str:
    """A GPU's name out of what the CUDA runtime says of it."""
    return str(properties["name"].decode())


def _installed(*distributions: str) -> str:
    """Version of the first of some distributions that is installed; none is imported."""
    for name in distributions:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return version if len(distributions) == 1 else f"{version} ({name})"
    return "not installed"


def _nvrtc_words() -> str:
    """NVRTC as CuPy loads it, which need not be the wheel that is installed."""
    wheel = _installed(*_NVRTC_WHEELS)
    try:
        loaded = ".".join(map(str, kernels.nvrtc().getVersion()))
    except BackendUnavailableError:
        return f"not loaded; wheel: {wheel}"
    return f"{loaded}; wheel: {wheel}"


def _driver_lines() -> list[str]:
    """The CUDA driver and runtime, which CuPy can tell without a GPU."""
    try:
        import cupy
    except ImportError:
        return []
    runtime = cupy.cuda.runtime
    return [
        _line("CUDA driver", _cuda_version(runtime.driverGetVersion())),
        _line("CUDA runtime", _cuda_version(runtime.runtimeGetVersion())),
    ]


def _cuda_version(number: int) -> str:
    """CUDA writes 12.9 as 12090, and no driver as 0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "not installed"


def _gpu_words(gpu: dict[str, Any]) -> str:
    words = (
        f"{gpu_name(gpu)}, compute capability {gpu['major']}.{gpu['minor']}, "
        f"{gpu['multiProcessorCount']} SMs, {gpu['totalGlobalMem'] / _GIB:.1f} GiB"
    )
    too_old = gpu["major"] * 10 + gpu["minor"] < devices.MIN_ARCH
    return f"{words}; too old, expected at least 8.0" if too_old else words


def _cache_lines(architectures: list[int]) -> list[str]:
    folder, used = kernels.cache_folder(), kernels.private_folder()
    state = (
        "usable"
        if used == folder
        else "not usable: it must be yours, writable, and nobody else's to write; "
        f"this process keeps its kernels in {used}"
    )
    lines = [_line("cache folder", f"{folder} ({state})")]
    if not architectures:
        lines.append(_line("kernels", "not looked for: no GPU that they could be compiled for"))
    for arch in architectures:
        every: list[Kernel] = [
            *kernels.configurations(arch),
            *append_cuda.KERNELS,
            *merge_cuda.KERNELS.values(),
            device_pages.KERNEL,
            device_schedule.KERNEL,
        ]
        compiled = [each.name for each in every if kernels.find_cached(each, arch) is not None]
        words = f"{len(compiled)} of {len(every)} compiled for {kernels.target(arch)}"
        if len(compiled) < len(every):
            words += "; the others will be when they are first needed"
        lines.append(_line("kernels", words))
        lines += [_line("", name) for name in compiled]
    return lines


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL_WIDTH}}{text}"
