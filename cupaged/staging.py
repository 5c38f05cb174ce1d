"""Index arrays on their way to a device: one pinned block, asynchronous copies from it."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged.devices import cupy

IntArray = npt.NDArray[np.int32]

#: The smallest block, in int32; larger ones are powers of two.
_STAGING_SIZE = 1 << 15

# Pinned blocks to copy from, by device. One is taken again once the copy from it has ended: written
# earlier, it would be overwritten under the copy.
_staging: defaultdict[int, list[_Staging]] = defaultdict(list)
_staging_lock = threading.Lock()


class Upload(NamedTuple):
    """What one copy brings: parts, in their order, and zeros behind the last.

    Attributes
    ----------
    target : cupy.cuda.MemoryPointer
        Where it goes.
    size : int
        In int32.
    parts : list of (int, int32 array)
        Where each begins, in int32. What lies between two of them is undefined.
    """

    target: Any
    size: int
    parts: Sequence[tuple[int, IntArray]]


@dataclass(slots=True)
class _Staging:
    """A pinned block, and the event after the last copy from it."""

    memory: Any
    words: IntArray
    event: Any


def upload(
    uploads: Sequence[Upload],
    device: int,
    stream: Any,
    then: Callable[[], None] | None = None,
) -> Any:
    """Start the copies, in their order; returns the event after the last.

    Parameters
    ----------
    uploads : sequence of Upload
    device : int
        CUDA device, the current one.
    stream : cupy.cuda.Stream
        Of that device.
    then : callable, optional
        Launches what works on the copies; the event comes after that.
    """
    size = 0
    for each in uploads:
        size += each.size
    with _staging_lock:
        blocks = _staging[device]
        for staging in blocks:
            if len(staging.words) >= size and staging.event.done:
                break
        else:
            length = max(_STAGING_SIZE, 1 << (size - 1).bit_length())
            memory = cupy().cuda.alloc_pinned_memory(length * 4)
            words = np.frombuffer(memory, np.int32, length)
            staging = _Staging(memory, words, cupy().cuda.Event(disable_timing=True))
            blocks.append(staging)
        words, begin = staging.words, 0
        for target, length, parts in uploads:
            end = begin
            for offset, part in parts:
                end = begin + offset + len(part)
                words[begin + offset : end] = part
            if end < begin + length:
                words[end : begin + length] = 0
            target.copy_from_host_async(staging.memory.ptr + begin * 4, length * 4, stream)
            begin += length
        if then is not None:
            then()
        staging.event.record(stream)
    return staging.event
