"""What stands in for CuPy and a GPU where plans are made: memory that lies on the host.

Nothing is launched. What plans write can be read back, as the kernels would find it.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cupaged import arrays, cuda, device_plan, devices, graph_plan, kernels, staging, streams
from cupaged.spec import DeviceModel

MODEL = DeviceModel(num_sms=7, arch=90)
_POISONED = 1 << 20  # bytes of a block; of larger ones, most are never touched


class Memory:
    """Memory of a device, and CuPy's pointer to it."""

    def __init__(self, size: int, device: int = 0) -> None:
        self.bytes = np.empty(size, np.uint8)
        self.bytes[:_POISONED] = 0xA5
        self.ptr = self.bytes.ctypes.data
        self.device_id = device

    def copy_from_host_async(self, source: int, size: int, stream: Any) -> None:
        assert size <= len(self.bytes), f"{size} bytes are copied to a block of {len(self.bytes)}"
        ctypes.memmove(self.ptr, source, size)
        stream.work.append("copy")

    def memset_async(self, value: int, size: int, stream: Any) -> None:
        assert size <= len(self.bytes)
        self.bytes[:size] = value


class ndarray:  # noqa: N801
    """What stands in for CuPy's class of this name."""

    __module__ = "cupy"

    def __init__(self, values: Any, device: int = 0) -> None:
        host = np.asarray(values)
        self.data = Memory(host.nbytes, device)
        self.data.bytes[:] = np.frombuffer(host.tobytes(), np.uint8)
        self.dtype, self.shape, self.ndim = host.dtype, host.shape, host.ndim
        self.nbytes, self.flags = host.nbytes, host.flags

    def __len__(self) -> int:
        return self.shape[0]

    def get(self) -> np.ndarray:
        return self.data.bytes.view(self.dtype).reshape(self.shape).copy()


class Pinned(bytearray):
    @property
    def ptr(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self))


class Stream:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr
        self.work: list[Any] = []

    def record(self, event: Any = None) -> Any:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None:
        self.work.append(event.stream)


class Event:
    """One that is done as soon as it is recorded."""

    done = True

    def __init__(self, disable_timing: bool = False) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        pass


class Machine:
    """What stands in for CuPy and device 0: memory, a current stream, and whether it captures."""

    def __init__(self) -> None:
        self.blocks: list[Memory] = []
        self.stream = Stream(7)
        self.capturing = False
        self.cuda = SimpleNamespace(
            alloc=self.alloc,
            alloc_pinned_memory=Pinned,
            Event=Event,
            get_current_stream=lambda device=0: self.stream,
            runtime=SimpleNamespace(
                getDevice=lambda: 0, streamIsCapturing=lambda stream: self.capturing
            ),
        )

    def alloc(self, size: int) -> Memory:
        self.blocks.append(Memory(size))
        return self.blocks[-1]

    def read(self, address: int, dtype: Any, count: int) -> np.ndarray:
        """What lies at an address, all of it in one block of memory."""
        size = np.dtype(dtype).itemsize * int(count)
        ends = [block.ptr + len(block.bytes) for block in self.blocks if block.ptr <= address]
        assert not size or any(address + size <= end for end in ends), "outside of any block"
        return np.frombuffer(ctypes.string_at(address, size), dtype)


def install(patch: pytest.MonkeyPatch) -> Machine:
    """Let the library find this machine, with nothing on it yet."""
    found = Machine()
    for module in (arrays, cuda, device_plan, devices, graph_plan, staging, streams):
        patch.setattr(module, "cupy", lambda: found)
    for module in (devices, device_plan, graph_plan):
        patch.setattr(module, "device_model", lambda device: MODEL)
    patch.setattr(kernels, "load", lambda config, arch, device: hash(config) % 1000 + 1)
    patch.setattr(staging, "_staging", defaultdict(list))
    return found
