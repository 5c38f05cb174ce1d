"""Merges attention states on a CUDA device: the kernel, its parameters, its launch."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cupaged import kernels
from cupaged.device_plan import magic
from cupaged.devices import cupy, device_model, is_recorded
from cupaged.launch_arguments import ArgumentLayout, Arguments
from cupaged.merge import States
from cupaged.spec import DTYPES

NUM_THREADS = 128
#: Bytes that a lane loads and stores at a time, where all rows begin at multiples of that.
_VECTOR_BYTES = 16
#: Lanes that share a row and head are of one warp; each has two vectors on their way at a time.
_MAX_LANES = 32
_PER_LANE = 2
#: The number of states that has a kernel of its own. The others are served by one with loops.
_TWO = 2

#: What the kernel is launched with; `kernels_cu/merge_states.cu` says what each field means.
MERGE_DTYPE = np.dtype(
    [(pointer, np.uint64) for pointer in ("v", "v_rest", "v_out", "s", "s_rest", "s_out", "mask")]
    + [
        (f"{tensor}_stride_{axis}", np.int64)
        for tensor, axes in (
            ("v", ("row", "head")),
            ("v_rest", ("state", "row", "head")),
            ("v_out", ("row", "head")),
            ("s", ("row", "head")),
            ("s_rest", ("state", "row", "head")),
            ("s_out", ("row", "head")),
        )
        for axis in axes
    ]
    + [("mask_stride", np.int64)]
    + [(number, np.int32) for number in ("num_states", "num_vectors", "num_places", "num_heads")]
    + [(divisor, np.uint32) for divisor in ("heads_magic", "heads_shift")]
    + [("lanes_log2", np.int32)],
    align=True,
)

#: What a launch is given.
LAYOUT = ArgumentLayout(MERGE_DTYPE.itemsize)
(_PARAMS_BEGIN,) = LAYOUT.begins
# The fields of MERGE_DTYPE, in their order: seven pointers, fifteen strides, seven numbers.
_PARAMS = struct.Struct("7Q15q4i2Ii")

_arguments = Arguments(LAYOUT)


@dataclass(frozen=True, slots=True)
class MergeKernel:
    """A kernel of `merge_states.cu` as it is compiled, a `kernel_spec.Kernel`.

    Attributes
    ----------
    dtype : str
        Of the outputs: "float16", "bfloat16" or "float32".
    aligned : bool
        Rows begin at multiples of 16 bytes, and are such.
    num_states : int
        2; or 0, which stands for any number.
    """

    dtype: str
    aligned: bool
    num_states: int

    @property
    def family(self) -> str:
        """Stem of the source."""
        return "merge_states"

    @property
    def name(self) -> str:
        """A readable name, unique among kernels."""
        count = self.num_states or "any"
        return f"merge_states_{self.dtype}_of{count}_{'aligned' if self.aligned else 'unaligned'}"

    @property
    def entry(self) -> str:
        """The kernel's name in its source."""
        return "cupaged_merge_states"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 0

    @property
    def ctas_per_sm(self) -> int:
        """Thread blocks that share an SM; bounds the registers."""
        return 8 if self.num_states else 6

    @property
    def flags(self) -> dict[str, int]:
        """Macros of the source."""
        return {
            "BFLOAT16": self.dtype == "bfloat16",
            "FLOAT32": self.dtype == "float32",
            "ALIGNED": self.aligned,
        }

    @property
    def constants(self) -> dict[str, int]:
        """Constants of the source."""
        return {
            "NUM_STATES": self.num_states,
            "NUM_THREADS": NUM_THREADS,
            "CTAS_PER_SM": self.ctas_per_sm,
            "PER_LANE": _PER_LANE,
        }

    @property
    def structs(self) -> dict[str, np.dtype]:
        """The struct of the source."""
        return {"Merge": MERGE_DTYPE}


#: By dtype, alignment and the number of states, 2 or 0.
KERNELS: dict[tuple[np.dtype[Any], bool, int], MergeKernel] = {
    (DTYPES[name], aligned, num_states): MergeKernel(name, aligned, num_states)
    for name in ("float16", "bfloat16", "float32")
    for aligned in (True, False)
    for num_states in (_TWO, 0)
}


# (kernel, device) → its `CUfunction`
_functions: dict[tuple[MergeKernel, int], int] = {}


def load(dtype: np.dtype[Any], aligned: bool, num_states: int, device: int, stream: int) -> int:
    """The `CUfunction` that merges `num_states` states, loaded at the first call.

    Parameters
    ----------
    dtype : numpy.dtype
        Of the outputs.
    aligned : bool
        Whether all of their rows are, and are multiples of 16 bytes.
    num_states : int
    device, stream : int
        The current ones.

    Raises
    ------
    RuntimeError
        A CUDA graph is being captured, and the kernel is not loaded yet.
    """
    kernel = KERNELS[dtype, aligned, num_states if num_states == _TWO else 0]
    found = _functions.get((kernel, device))
    if found is None:
        if is_recorded(stream):
            raise RuntimeError(
                "attention states are merged in the capture of a CUDA graph, where the kernel "
                "can't be loaded: make the same call once before"
            )
        found = kernels.load(kernel, device_model(device).arch, device)
        _functions[kernel, device] = found
    return found


def run(device: int, stream: int, states: States, v_out: Any, s_out: Any, mask: Any | None) -> None:
    """Launch the kernel.

    Parameters
    ----------
    device, stream : int
        The current ones.
    states : States
        Of CuPy arrays on the device.
    v_out : cupy.ndarray [num_rows, num_heads, head_dim]
        Written; may be the first state's. Where it is empty, nothing is launched.
    s_out : float32 cupy.ndarray [num_rows, num_heads]
        Written; may be the first state's.
    mask : bool or uint8 cupy.ndarray [num_rows], optional
        Rows where it is 0 are not written.
    """
    num_rows, num_heads, head_dim = v_out.shape
    if num_rows * num_heads == 0:
        return
    tensors = [_place(x, axes) for x, axes in ((states.v, 2), (states.v_rest, 3), (v_out, 2))]
    lses = [_place(x, axes) for x, axes in ((states.s, 2), (states.s_rest, 3), (s_out, 2))]
    mask_pointer, mask_stride = _place(mask, 1)
    row_bytes = head_dim * v_out.dtype.itemsize
    bits = row_bytes
    for pointer, strides in tensors:
        for number in (pointer, *strides):
            bits |= number
    aligned = bits % _VECTOR_BYTES == 0
    num_states = states.num_states
    function = load(v_out.dtype, aligned, num_states, device, stream)
    num_vectors = row_bytes // _VECTOR_BYTES if aligned else head_dim
    shape = launch_shape(num_rows, num_heads, num_vectors)
    memory, address = argument = _arguments.take()
    _PARAMS.pack_into(
        *(memory, _PARAMS_BEGIN),
        *(pointer for pointer, _ in (*tensors, *lses)),
        mask_pointer,
        *(stride for _, strides in (*tensors, *lses) for stride in strides),
        *(*mask_stride, num_states, *shape.numbers),
    )
    cupy().cuda.driver.launchKernel(
        *(function, shape.blocks, 1, 1, NUM_THREADS, 1, 1, 0, stream, address, 0)
    )
    _arguments.put_back(argument)


class LaunchShape(NamedTuple):
    """How a launch divides rows and heads.

    Attributes
    ----------
    blocks : int
        Thread blocks.
    numbers : tuple of int
        num_vectors, num_places, num_heads, heads_magic, heads_shift and lanes_log2 of the
        parameters.
    """

    blocks: int
    numbers: tuple[int, int, int, int, int, int]


@functools.lru_cache(maxsize=256)
def launch_shape(num_rows: int, num_heads: int, num_vectors: int) -> LaunchShape:
    """Choose how a launch divides `num_rows` rows of `num_heads` heads of `num_vectors` vectors.

    As many lanes share a row and head as have something to do, of one warp and a power of two.
    """
    lanes_log2 = min((-(-num_vectors // _PER_LANE) - 1).bit_length(), _MAX_LANES.bit_length() - 1)
    num_places = num_rows * num_heads
    return LaunchShape(
        blocks=-(-num_places // (NUM_THREADS >> lanes_log2)),
        numbers=(num_vectors, num_places, num_heads, *magic(num_heads), lanes_log2),
    )


def _place(array: Any | None, axes: int) -> tuple[int, tuple[int, ...]]:
    """Address and strides in bytes of an array's first `axes` axes.

    Those of axes of length 1 are 0: whatever they were, nothing is at them. Without an array all
    are 0.
    """
    if array is None:
        return 0, (0,) * axes
    strides = tuple(
        0 if length == 1 else stride
        for length, stride in zip(array.shape[:axes], array.strides, strict=False)
    )
    return array.data.ptr, strides
