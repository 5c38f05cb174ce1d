"""Which tests run where, fresh random draws that can be repeated, and a cache of the session's own.

`--seed N` repeats the draws of a failed test; hypothesis prints its own examples.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Their assertions shall say what was compared, as those of the tests do.
pytest.register_assert_rewrite(
    *("gpu_calls", "processes", "small_call", "stand_ins", "strategies"),
    *("cascades", "compiler", "gpu_appends", "life", "page_problems", "states"),
)

# The benchmark is a folder of scripts, no package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

# JAX would take three quarters of the GPU's memory as soon as it touches it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

_COMMON = {
    "deadline": None,  # the first call of a kind compiles, imports or fills caches
    "suppress_health_check": (HealthCheck.too_slow, HealthCheck.function_scoped_fixture),
    "print_blob": True,
}
settings.register_profile("default", max_examples=100, **_COMMON)
settings.register_profile("ci", max_examples=40, derandomize=False, database=None, **_COMMON)
settings.register_profile("thorough", max_examples=2000, **_COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# Spins, then fills x: what reads x without waiting reads what was there before.
_LATE_WRITE = r"""
extern "C" __global__ void late_write(unsigned* x, int n, unsigned value, long long delay_ns) {
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - begin < delay_ns);
    for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = value;
}
"""
_DELAY_NS = 100_000_000

_COMPUTE_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_MIN_MAJOR = 8


@lru_cache(maxsize=1)
def _why_no_gpu() -> str | None:
    """Why the GPU tests can't run, None where they can.

    Asks the driver itself: a GPU that CuPy or the library can't use is a failure, and no reason to
    skip.
    """
    names = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
    for name in names:
        try:
            driver = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return f"no NVIDIA driver ({names[0]} not found)"
    status = driver.cuInit(0)
    if status:
        return f"no usable GPU (cuInit returned {status})"
    count, device, major = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "no GPU"
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    if major.value < _MIN_MAJOR:
        return f"the GPU has compute capability {major.value}.x, the kernels need 8.0"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="of the random draws")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "gpu: needs an NVIDIA GPU of compute capability 8.0 or later"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of compiled kernels come last: they are compiled beside all others."""
    from compiler import reads_logs

    items.sort(key=reads_logs)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        reason = _why_no_gpu()
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh draws; a failing test's report says how to repeat them."""
    seed = request.config.getoption("--seed")
    if seed is None:
        seed = secrets.randbits(32)
    print(f"repeat the draws with --seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Kernels are compiled anew, into a folder of the session's."""
    folder = tmp_path_factory.mktemp("cupaged-cache")
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPAGED_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def compiler() -> None:
    """NVRTC."""
    from cupaged import kernels
    from cupaged.errors import BackendUnavailableError

    try:
        kernels.nvrtc()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="session")
def _compiling(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The kernels of tests that are still to come."""
    from compiler import compiling

    with compiling(request.session.items) as logs:
        yield logs


@pytest.fixture
def logs(compiler: None, _compiling: Any) -> Any:
    """What the compiler says of each kernel: `compiler.Logs`."""
    return _compiling


@pytest.fixture(scope="session")
def compiled_kernels(_own_cache: Path) -> None:
    """Compile every kernel of device 0, in as many threads as there are cores."""
    from concurrent.futures import ThreadPoolExecutor

    from gpu_calls import every_configuration

    from cupaged import append_cuda, devices, kernels, merge_cuda

    arch = devices.device_model(0).arch
    every = (*every_configuration(), *append_cuda.KERNELS, *merge_cuda.KERNELS.values())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda kernel: kernels.cubin_path(kernel, arch), every))


@pytest.fixture(scope="session")
def cp(compiled_kernels: None) -> Any:
    """CuPy, with the library's kernels compiled.

    The tests move bits and leave the arithmetic of 16-bit floats to NumPy: CuPy's own kernels for
    those dtypes need CUDA headers, which the library does without.
    """
    import cupy

    return cupy


@pytest.fixture
def exact_allocations(cp: Any) -> Iterator[None]:
    """Take memory from CUDA itself: CuPy's pool rounds up, and hides what is outside."""
    cp.cuda.set_allocator(None)
    yield
    cp.cuda.Device().synchronize()
    cp.cuda.set_allocator(cp.get_default_memory_pool().malloc)


@pytest.fixture(params=["prefill_sm90", "prefill_sm80"])
def family(cp: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """Each family of kernels for the long shape, one after the other."""
    from gpu_calls import families, served_by

    if request.param not in families():
        pytest.skip(f"{request.param} is for compute capability 9.0")
    with served_by(request.param):
        yield request.param


@pytest.fixture
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No kernel is loaded or cached, and what stood in for CuPy is forgotten afterwards."""
    from cupaged import devices, kernels, source

    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setattr(kernels, "_locks", defaultdict(threading.Lock))
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "cache"))
    remembered = (
        kernels.nvrtc,
        devices.cupy,
        devices.device_model,
        source.folder,
        source._inlined,
    )
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def nvrtc(nothing_remembered: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What stands in for CuPy's binding of NVRTC."""
    import stand_ins

    binding = stand_ins.FakeNvrtc()
    stand_ins.install(monkeypatch, binding)
    return binding


@pytest.fixture
def torch() -> Any:
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("PyTorch without CUDA")
    return module


@pytest.fixture
def jax() -> Any:
    module = pytest.importorskip("jax")
    try:
        module.devices("gpu")
    except RuntimeError:
        pytest.skip("JAX without CUDA")
    return module


@pytest.fixture
def two_gpus(cp: Any) -> None:
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only")


@pytest.fixture
def late_write(cp: Any) -> Any:
    """Fills a 4-byte CuPy array with a value, on the current stream, a good while from now."""
    kernel = cp.RawKernel(_LATE_WRITE, "late_write")

    def write(x: Any, value: Any) -> None:
        bits = np.array(value, x.dtype).view(np.uint32)[()]
        kernel((1,), (256,), (x, np.int32(x.size), bits, np.int64(_DELAY_NS)))

    write(cp.empty(1, cp.float32), 0)  # compiled, and loaded
    cp.cuda.Device().synchronize()
    return write
