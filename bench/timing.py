"""Where work runs and how its time is taken: one device class for NumPy, one for CUDA."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from device_kernels import VECTOR_BYTES, launch
from workloads import DTYPES, standard_normal

Call = Callable[[], object]

Key = TypeVar("Key", bound=Hashable)

#: A measured time in µs that may be asked for only once the device has been synchronised.
Pending = Callable[[], float]

#: A graph holds so many calls that its replay takes about this long, in µs: what it costs to
#: start one is a few µs.
GRAPH_MICROSECONDS = 1000.0
MAX_GRAPH_CALLS = 50


class NoDeviceError(Exception):
    """There is no GPU that could be measured; the message says what is missing."""


class NotCapturableError(Exception):
    """A call can't be recorded into a CUDA graph; the message says why."""


class HostDevice:
    """NumPy arrays and the reference backend: checks the script, says nothing about speed."""

    backend = "reference"
    xp: Any = np
    l2_bytes = 0  # that are known of

    def put(self, array: np.ndarray) -> Any:
        """The array, where this device reads it."""
        return array

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An array of any content."""
        return np.empty(shape, dtype)

    def normal(self, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
        """Normal random numbers, an even count of them."""
        return standard_normal(rng, shape, dtype)

    def copy(self, target: Any, source: Any) -> None:
        """Copy an array's bytes as the platform does it best."""
        np.copyto(target, source)

    def copy_by_kernel(self, target: Any, source: Any) -> None:
        """Copy an array's bytes, a multiple of 16, by a kernel of the benchmark's own."""
        np.copyto(target, source)

    def synchronize(self) -> None:
        """Wait for all that was started."""

    def free(self) -> None:
        """Give back memory that no array uses."""

    def sample(self, call: Call) -> Pending:
        """Time one call."""
        start = time.perf_counter()
        call()
        microseconds = (time.perf_counter() - start) * 1e6
        return lambda: microseconds

    def capture(self, call: Call, calls: int) -> Call:
        """Record so many calls into a graph; returns what replays it."""
        raise NotCapturableError("the reference backend has no stream")

    def describe(self) -> dict[str, Any]:
        """What the header says of the device."""
        return {"gpu": None}


class CudaDevice(HostDevice):
    """The current GPU through CuPy, on one stream that every contender uses."""

    backend = "cuda"

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise NoDeviceError(f"CuPy can't be imported: {error}") from error
        try:
            cupy.cuda.Device().use()
            # Not the null stream: that one can't be captured.
            self.stream = cupy.cuda.Stream(non_blocking=True)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise NoDeviceError(f"no CUDA device: {error}") from error
        self.stream.use()
        self.xp = cupy
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        self.gpu = properties["name"].decode()
        self.num_sms = properties["multiProcessorCount"]
        self.l2_bytes = properties["l2CacheSize"]

    def put(self, array: np.ndarray) -> Any:
        return self.xp.asarray(array.view(np.uint16)).view(array.dtype)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return self.xp.empty(shape, np.dtype(f"u{dtype.itemsize}")).view(dtype)

    def normal(self, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
        out = self.empty(shape, DTYPES[dtype])
        pairs = math.prod(shape) // 2
        seed = np.uint64(rng.integers(0, 1 << 63))
        arguments = out.view(np.uint16), np.int64(pairs), seed, np.int32(dtype == "bfloat16")
        launch("fill_normal", self.num_sms, pairs, arguments)
        return out

    def copy(self, target: Any, source: Any) -> None:
        runtime = self.xp.cuda.runtime
        runtime.memcpyAsync(
            target.data.ptr,
            source.data.ptr,
            source.nbytes,
            runtime.memcpyDeviceToDevice,
            self.stream.ptr,
        )

    def copy_by_kernel(self, target: Any, source: Any) -> None:
        count = source.nbytes // VECTOR_BYTES
        launch("copy_all", self.num_sms, count, (target, source, np.int64(count)))

    def read(self, source: Any, out: Any) -> None:
        """Read an array's bytes, a multiple of 16; nothing but a hash goes to the uint32 `out`."""
        count = source.nbytes // VECTOR_BYTES
        launch("read_all", self.num_sms, count, (source, np.int64(count), out))

    def synchronize(self) -> None:
        self.stream.synchronize()

    def free(self) -> None:
        self.synchronize()
        self.xp.get_default_memory_pool().free_all_blocks()

    def sample(self, call: Call) -> Pending:
        """Time one call by events.

        A call of the same kind runs right before it: the GPU is busy while the host launches the
        timed one, so that the host's share does not show where the GPU's is longer, and every
        contender finds the caches as it leaves them itself.
        """
        start, end = self.xp.cuda.Event(), self.xp.cuda.Event()
        call()
        start.record(self.stream)
        call()
        end.record(self.stream)
        return lambda: 1e3 * float(self.xp.cuda.get_elapsed_time(start, end))

    def capture(self, call: Call, calls: int) -> Call:
        self.synchronize()
        self.stream.begin_capture()
        try:
            for _ in range(calls):
                call()
        except Exception as error:
            # The stream stays in capture until it is ended, and what it holds is of no use.
            with contextlib.suppress(self.xp.cuda.runtime.CUDARuntimeError):
                self.stream.end_capture()
            raise NotCapturableError(first_line(error)) from error
        try:
            graph = self.stream.end_capture()
            graph.upload(self.stream)
        except self.xp.cuda.runtime.CUDARuntimeError as error:
            raise NotCapturableError(first_line(error)) from error
        return lambda: graph.launch(self.stream)

    def describe(self) -> dict[str, Any]:
        runtime = self.xp.cuda.runtime
        return {
            "gpu": self.gpu,
            "num_sms": self.num_sms,
            "l2_bytes": self.l2_bytes,
            "cuda_driver": runtime.driverGetVersion(),
            "cuda_runtime": runtime.runtimeGetVersion(),
        }


def torch_on(device: CudaDevice) -> Any:
    """PyTorch, with the device's stream as its current one.

    Raises
    ------
    ImportError
        It is not installed, or sees no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise ImportError("PyTorch sees no GPU")
    torch.cuda.set_stream(torch.cuda.ExternalStream(device.stream.ptr))
    return torch


def interleave(
    samplers: Mapping[Key, Callable[[], Pending]],
    warmup: int,
    repeat: int,
    device: HostDevice,
) -> dict[Key, list[float]]:
    """Times of several contenders, taken in turns so that a drift of the clock meets them alike.

    Returns
    -------
    dict
        µs of each of the `repeat` rounds, under the sampler's key.
    """
    for sample in samplers.values():
        for _ in range(warmup):
            sample()
    pending: dict[Key, list[Pending]] = {name: [] for name in samplers}
    for _ in range(repeat):
        for name, sample in samplers.items():
            pending[name].append(sample())
    device.synchronize()
    return {name: [read() for read in reads] for name, reads in pending.items()}


def host_us(call: Call, repeat: int, device: HostDevice, calls: int = 1) -> list[float]:
    """Host time of a call in µs, the device idle at the start and not waited for.

    Parameters
    ----------
    call : callable
        What is timed.
    repeat : int
        Number of times returned.
    device : HostDevice
        Waited for before each of them, outside the timed region.
    calls : int
        Calls in a row that a time is the mean of.
    """
    times = []
    for _ in range(repeat):
        device.synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        times.append((time.perf_counter_ns() - start) / 1e3 / calls)
    device.synchronize()
    return times


def calls_in_graph(microseconds: float) -> int:
    """How many calls of that length a graph should hold."""
    return min(MAX_GRAPH_CALLS, max(1, round(GRAPH_MICROSECONDS / max(microseconds, 1e-3))))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def first_line(error: BaseException) -> str:
    """An error in one line: its kind and the start of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:200]
