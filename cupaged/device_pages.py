"""A page table on a CUDA device, which looks for pages that a request has twice.

On the host that takes 1.5 to 2 ns an entry, which is more than all the rest of a plan where there
are many. The GPU does it while the host goes on; should it be busy and have no answer by the time
that the host needs one, the host looks for itself.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cupaged import kernels
from cupaged.devices import cupy, device_model
from cupaged.launch_arguments import ArgumentLayout, Arguments
from cupaged.staging import IntArray, Upload, upload

_NUM_THREADS = 256
#: A bit a page; as much as a block may have on every GPU that is served.
_SHARED_BYTES = 96 * 1024
#: Of fewer entries than this, asking the GPU takes the host longer than looking for itself.
_MIN_ENTRIES = 4096
#: Answers, of 4 bytes, that all questions share.
_ROOM = 1 << 16
#: Parts of the uploaded block begin at multiples of this many int32.
_ALIGNMENT = 32

REPEATS_DTYPE = np.dtype(
    [(pointer, np.uint64) for pointer in ("pages", "indptr", "answers")]
    + [("none", np.uint32), ("num_words", np.int32)]
)
_PARAMS = struct.Struct("3QIi")
_LAYOUT = ArgumentLayout(REPEATS_DTYPE.itemsize)
(_PARAMS_BEGIN,) = _LAYOUT.begins
_arguments = Arguments(_LAYOUT)


@dataclass(frozen=True, slots=True)
class RepeatsKernel:
    """The kernel of `find_repeats.cu` as it is compiled, a `kernel_spec.Kernel`."""

    family: str = "find_repeats"
    name: str = "find_repeats"
    entry: str = "cupaged_find_repeats"
    shared_bytes: int = _SHARED_BYTES

    @property
    def flags(self) -> dict[str, int]:
        """Macros of the source."""
        return {}

    @property
    def constants(self) -> dict[str, int]:
        """Constants of the source."""
        return {"NUM_THREADS": _NUM_THREADS}

    @property
    def structs(self) -> dict[str, np.dtype[Any]]:
        """The struct of the source."""
        return {"Repeats": REPEATS_DTYPE}


KERNEL = RepeatsKernel()


class _Answers:
    """Host memory that the GPU writes answers to, in turn to all questions.

    Every question has a number of its own, which its answers hold: a late answer to one that nobody
    waits for any more is not taken for another's.
    """

    def __init__(self) -> None:
        self._memory = cupy().cuda.alloc_pinned_memory(4 * _ROOM)
        self._words = np.frombuffer(self._memory, np.uint32, _ROOM)
        self._words[:] = 0
        self._begin = self._number = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> tuple[int, npt.NDArray[np.uint32], int]:
        """Room for so many answers, its address and contents, and the question's number."""
        with self._lock:
            begin = self._begin if self._begin + count <= _ROOM else 0
            self._begin = begin + count
            self._number = self._number % (2**31 - 1) + 1
            return self._memory.ptr + 4 * begin, self._words[begin : begin + count], self._number


@cache
def _answers() -> _Answers:
    return _Answers()


class DevicePages:
    """A page table on one CUDA device.

    Parameters
    ----------
    page_indices : int32 [indptr[-1]], on the host
    indptr : int32 [batch + 1], on the host
        Where each request's pages begin.
    device : int
        CUDA device, the current one; the upload goes to its current stream.

    Attributes
    ----------
    device : int
    address : int
        Of the pages.
    """

    def __init__(self, page_indices: IntArray, indptr: IntArray, device: int) -> None:
        self._entries, self._batch = len(page_indices), len(indptr) - 1
        self._indptr_begin = -(-self._entries // _ALIGNMENT) * _ALIGNMENT
        size = self._indptr_begin + len(indptr)
        self._block = cupy().cuda.alloc(4 * size)
        self.device = device
        self._stream = cupy().cuda.get_current_stream()
        parts = [(0, page_indices), (self._indptr_begin, indptr)]
        upload([Upload(self._block, size, parts)], device, self._stream)
        self.address: int = self._block.ptr
        self._asked: tuple[npt.NDArray[np.uint32], int] | None = None

    def ask_for_repeats(self, highest: int) -> None:
        """Let the GPU look for pages that a request has twice, where it's quicker.

        Parameters
        ----------
        highest : int
            The highest page number.
        """
        num_words = highest // 32 + 1
        if self._entries < _MIN_ENTRIES or self._batch > _ROOM or 4 * num_words > _SHARED_BYTES:
            return
        function = kernels.load(KERNEL, device_model(self.device).arch, self.device)
        answers, words, number = _answers().take(self._batch)
        memory, address = argument = _arguments.take()
        indptr = self.address + 4 * self._indptr_begin
        _PARAMS.pack_into(
            *(memory, _PARAMS_BEGIN, self.address, indptr, answers, number, num_words)
        )
        cupy().cuda.driver.launchKernel(
            *(function, self._batch, 1, 1, _NUM_THREADS, 1, 1, 4 * num_words),
            *(self._stream.ptr, address, 0),
        )
        _arguments.put_back(argument)
        self._asked = words, number

    def are_known_to_differ(self) -> bool:
        """Whether the GPU was asked, and has found by now that no request has a page twice."""
        if self._asked is None:
            return False
        words, number = self._asked
        return bool((words == number).all())
