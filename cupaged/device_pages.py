"""A page table that is sent ahead of its plan: the GPU looks for pages that a request has twice.

On the host that takes 1.5 to 2 ns an entry, which is more than all the rest of a plan where there
are many. The GPU does it while the host goes on; should it be busy and have no answer by the time
that the host needs one, the host looks for itself.
"""

from __future__ import annotations

import struct
import threading
import time
from functools import cache

import numpy as np
import numpy.typing as npt

from cupaged import kernels
from cupaged.devices import cupy, device_model
from cupaged.kernel_spec import OnlyKernel
from cupaged.launch_arguments import ArgumentLayout, Arguments
from cupaged.staging import IntArray, Upload, upload

_NUM_THREADS = 256
#: A bit a page; as much as a block may have on every GPU that is served.
_SHARED_BYTES = 96 * 1024
#: Of fewer entries than this, sending them ahead takes the host longer than looking for itself.
_MIN_ENTRIES = 12_288
_UINT32_MAX = 2**32 - 1
#: Answers, of 4 bytes, that all questions share.
_ROOM = 1 << 16
#: Parts of the uploaded block begin at multiples of this many int32.
_ALIGNMENT = 32

REPEATS_DTYPE = np.dtype(
    [(pointer, np.uint64) for pointer in ("pages", "indptr", "answers")]
    + [("none", np.uint32), ("num_words", np.int32)]
)
#: Its fields.
PARAMS = struct.Struct("3QIi")
_LAYOUT = ArgumentLayout(REPEATS_DTYPE.itemsize)
(_PARAMS_BEGIN,) = _LAYOUT.begins
_arguments = Arguments(_LAYOUT)


KERNEL = OnlyKernel(
    "find_repeats", _SHARED_BYTES, {"NUM_THREADS": _NUM_THREADS}, {"Repeats": REPEATS_DTYPE}
)


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


_making = threading.Lock()


@cache
def _only_answers() -> _Answers:
    return _Answers()


def _answers() -> _Answers:
    with _making:  # threads that ask first at once share one
        return _only_answers()


def worth_asking(
    page_indices: IntArray,
    indptr: IntArray,
    highest: int,
    shared_bytes: int = _SHARED_BYTES,
    fewest: int = _MIN_ENTRIES,
) -> bool:
    """Whether the GPU looks for repeated pages, and does so sooner than the host would.

    Parameters
    ----------
    page_indices : int32 [indptr[-1]]
    indptr : int32 [batch + 1]
    highest : int
        The highest page number.
    shared_bytes : int
        What a block has for a bit a page.
    fewest : int
        Of fewer entries than this, asking takes the host longer than looking.
    """
    bitmap = 4 * (highest // 32 + 1)
    return len(page_indices) >= fewest and len(indptr) <= _ROOM and bitmap <= shared_bytes


class Question:
    """Whether a request of a page table has a page twice, for a CUDA device to answer.

    Parameters
    ----------
    pages, indptr : int
        Addresses of the page table, and of where each request's pages begin in it.
    batch : int
    highest : int
        The highest page number.
    patience : float
        Seconds that an answer is waited for.

    Attributes
    ----------
    parameters : tuple of int
        The fields of REPEATS_DTYPE.
    shared_bytes : int
        Of a block that looks for the answer. There is one for each request.
    """

    __slots__ = ("_number", "_patience", "_words", "parameters", "shared_bytes")

    def __init__(
        self, pages: int, indptr: int, batch: int, highest: int, patience: float = 0.0
    ) -> None:
        self._patience = patience
        answers, self._words, self._number = _answers().take(batch)
        num_words = highest // 32 + 1
        self.parameters = (pages, indptr, answers, self._number, num_words)
        self.shared_bytes = 4 * num_words

    def is_denied(self) -> bool:
        """Whether the device finds in time that no request has a page twice."""
        end = time.perf_counter() + self._patience
        while not (self._words == self._number).all():
            if time.perf_counter() >= end or (self._words == ~self._number & _UINT32_MAX).any():
                return False
        return True


class DevicePages:
    """A page table on one CUDA device, which is asked whether a request has a page twice.

    It has to be `worth_asking()`.

    Parameters
    ----------
    page_indices : int32 [indptr[-1]], on the host
    indptr : int32 [batch + 1], on the host
        Where each request's pages begin.
    highest : int
        The highest page number.
    device : int
        CUDA device, the current one; what is done goes to its current stream.

    Attributes
    ----------
    device : int
    address : int
        Of the pages.
    question : Question
    """

    def __init__(self, page_indices: IntArray, indptr: IntArray, highest: int, device: int) -> None:
        cuda = cupy().cuda
        indptr_begin = -(-len(page_indices) // _ALIGNMENT) * _ALIGNMENT
        size = indptr_begin + len(indptr)
        self._block, stream = cuda.alloc(4 * size), cuda.get_current_stream()
        parts = [(0, page_indices), (indptr_begin, indptr)]
        upload([Upload(self._block, size, parts)], device, stream)
        self.device = device
        self.address: int = self._block.ptr
        batch = len(indptr) - 1
        self.question = Question(self.address, self.address + 4 * indptr_begin, batch, highest)
        function = kernels.load(KERNEL, device_model(device).arch, device)
        memory, address = argument = _arguments.take()
        PARAMS.pack_into(memory, _PARAMS_BEGIN, *self.question.parameters)
        shared_bytes = self.question.shared_bytes
        cuda.driver.launchKernel(
            *(function, batch, 1, 1, _NUM_THREADS, 1, 1, shared_bytes, stream.ptr, address, 0)
        )
        _arguments.put_back(argument)
