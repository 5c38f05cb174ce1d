"""No CuPy, no NVRTC, no GPU or too old a one: one error that says what to install."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
from compiler import plain_kernel
from stand_ins import FakeNvrtc, install, uninstall_cupy

from cupaged import devices, kernels
from cupaged.errors import BackendUnavailableError

pytestmark = pytest.mark.usefixtures("nothing_remembered")

CONFIG = plain_kernel(90, "float16", 128, 16)
NVRTC_WHEELS = "nvidia-cuda-nvrtc-cu12 (for cupy-cuda12x) or nvidia-cuda-nvrtc (cupy-cuda13x)"


def check_unavailable(message: str, call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(BackendUnavailableError) as raised:
        call(*args)
    assert str(raised.value) == message


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall_cupy(monkeypatch)
    message = (
        "the CUDA backend needs CuPy (No module named 'cupy'): "
        "pip install 'cupaged[cuda12]' for a driver of CUDA 12, 'cupaged[cuda13]' for CUDA 13; "
        "or pass host arrays to use the reference backend"
    )
    check_unavailable(message, kernels.nvrtc)
    check_unavailable(message, devices.cupy)


def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = FakeNvrtc()
    install(monkeypatch, binding)

    def refuse() -> tuple[int, int]:
        raise RuntimeError("CuPy failed to load libnvrtc.so.12: cannot open\nand how to mend it")

    binding.getVersion = refuse
    check_unavailable(
        "the CUDA backend needs NVRTC, which CuPy can't load "
        f"(CuPy failed to load libnvrtc.so.12: cannot open): pip install {NVRTC_WHEELS}",
        kernels.nvrtc,
    )


def test_an_old_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvrtc(version=(11, 8)))
    check_unavailable(
        f"NVRTC is 11.8, expected at least 12.0: pip install --upgrade {NVRTC_WHEELS}",
        kernels.nvrtc,
    )


def test_an_nvrtc_that_does_not_know_the_gpu(nvrtc: FakeNvrtc) -> None:
    check_unavailable(
        "NVRTC 12.9 can't compile for compute capability 12.0: "
        f"pip install --upgrade {NVRTC_WHEELS}",
        kernels.compile_cubin,
        CONFIG,
        120,
    )


def test_a_source_that_nvrtc_refuses(nvrtc: FakeNvrtc) -> None:
    """A defect of the library's own: it comes with the compiler's words."""
    nvrtc.fails = True
    with pytest.raises(RuntimeError) as raised:
        kernels.compile_cubin(CONFIG, 90)
    assert str(raised.value) == f"NVRTC refused {CONFIG.name} for sm_90a:\nline 1: no"


def fake_runtime(**functions: Any) -> types.SimpleNamespace:
    error = type("CUDARuntimeError", (RuntimeError,), {})
    return types.SimpleNamespace(CUDARuntimeError=error, **functions)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = install(monkeypatch, FakeNvrtc())
    runtime = fake_runtime()

    def refuse() -> int:
        raise runtime.CUDARuntimeError("cudaErrorInsufficientDriver: too old")

    runtime.getDeviceCount = refuse
    cupy.cuda.runtime = runtime
    check_unavailable(
        "the CUDA backend finds no usable GPU (cudaErrorInsufficientDriver: too old): install an "
        "NVIDIA driver, or pass host arrays to use the reference backend",
        devices.cupy,
    )


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = install(monkeypatch, FakeNvrtc())
    cupy.cuda.runtime = fake_runtime(getDeviceCount=lambda: 0)
    check_unavailable(
        "the CUDA backend finds no GPU: pass host arrays to use the reference backend", devices.cupy
    )


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {"major": 7, "minor": 5, "multiProcessorCount": 40, "name": b"Tesla T4"}
    cupy = install(monkeypatch, FakeNvrtc())
    cupy.cuda.runtime = fake_runtime(
        getDeviceCount=lambda: 2, getDeviceProperties=lambda device: properties
    )
    check_unavailable(
        "cuda:1 (Tesla T4) has compute capability 7.5, expected at least 8.0: "
        "pass host arrays to use the reference backend",
        devices.device_model,
        1,
    )
    properties |= {"major": 8, "minor": 9}
    assert devices.device_model(0).arch == 89
    assert devices.device_model(0).num_sms == 40


def test_an_error_is_no_answer_to_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was missing can be installed while the process runs."""
    uninstall_cupy(monkeypatch)
    with pytest.raises(BackendUnavailableError):
        kernels.nvrtc()
    install(monkeypatch, FakeNvrtc())
    assert kernels.nvrtc().getVersion() == (12, 9)
