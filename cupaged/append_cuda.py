"""Appends to a cache on a CUDA device: the kernel, its parameters, its launch."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from cupaged import kernels
from cupaged.append import Indices, Slots, Uploaded
from cupaged.device_plan import magic
from cupaged.devices import cupy, device_model, is_recorded
from cupaged.launch_arguments import ArgumentLayout, Arguments
from cupaged.staging import Upload, upload

#: How the kernel learns of the rows' slots: they come with the launch; they were uploaded; it looks
#: them up in index arrays on the device.
Way = Literal["launch", "memory", "arrays"]

UNIT_BYTES = (16, 8, 4, 2, 1)
NUM_THREADS = 128
ROWS_PER_THREAD = 5
#: On an H200, 5,280 rows of 128 units are then under way at once.
CTAS_PER_SM = 8
#: Rows whose slots come with a launch: all of its parameters may be 4 KiB.
LAUNCH_ROWS = 480

APPEND_DTYPE = np.dtype(
    [(pointer, np.uint64) for pointer in ("append_key", "append_value", "k", "v")]
    + [
        (f"{tensor}_stride_{axis}", np.int64)
        for tensor, axes in (
            ("key", ("row", "head")),
            ("value", ("row", "head")),
            ("k", ("page", "token", "head")),
            ("v", ("page", "token", "head")),
        )
        for axis in axes
    ]
    + [(number, np.int32) for number in ("num_rows", "row_units", "head_units")]
    + [(divisor, np.uint32) for divisor in ("head_magic", "head_shift")]
    + [("lanes_shift", np.int32)],
    align=True,
)
SLOT_DTYPE = np.dtype([("page", np.int32), ("in_page", np.int32)])
INDEX_ARRAY_DTYPE = np.dtype(
    [("data", np.uint64), ("stride", np.int64), ("wide", np.int32)], align=True
)
#: Each way's `Slots`.
SLOTS_DTYPES: dict[Way, np.dtype[Any]] = {
    "launch": np.dtype([("of_row", SLOT_DTYPE, (LAUNCH_ROWS,))]),
    "memory": np.dtype([("of_row", np.uint64)]),
    "arrays": np.dtype(
        [
            (name, INDEX_ARRAY_DTYPE)
            for name in (
                "batch_indices",
                "positions",
                "kv_indices",
                "kv_indptr",
                "kv_last_page_len",
            )
        ]
        + [("num_indices", np.int64)]
        + [(number, np.int32) for number in ("batch", "num_pages", "page_size")]
        + [(divisor, np.uint32) for divisor in ("page_magic", "page_shift")],
        align=True,
    ),
}

#: What a launch is given.
LAYOUT = ArgumentLayout(
    APPEND_DTYPE.itemsize, max(dtype.itemsize for dtype in SLOTS_DTYPES.values())
)
APPEND_BEGIN, SLOTS_BEGIN = LAYOUT.begins
_APPEND = struct.Struct("4Q10q3i2Ii")
_ADDRESS = struct.Struct("Q")
_ARRAYS = struct.Struct("Qqi4x" * len(Indices._fields) + "q3i2I")


@dataclass(frozen=True, slots=True)
class AppendKernel:
    """A kernel of `append.cu` as it is compiled, a `kernel_spec.Kernel`.

    Attributes
    ----------
    unit_bytes : int
        What a thread loads and stores at a time.
    way : str
        How it learns of the rows' slots: "launch", "memory" or "arrays".
    """

    unit_bytes: int
    way: Way

    @property
    def family(self) -> str:
        """Stem of the source."""
        return "append"

    @property
    def name(self) -> str:
        """A readable name, unique among kernels."""
        return f"append_{self.way}_by{self.unit_bytes}"

    @property
    def entry(self) -> str:
        """The kernel's name in its source."""
        return "cupaged_append"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 0

    @property
    def flags(self) -> dict[str, int]:
        """Macros of the source."""
        return {
            "UNIT_BYTES": self.unit_bytes,
            "SLOTS_IN_LAUNCH": self.way == "launch",
            "SLOTS_IN_MEMORY": self.way == "memory",
        }

    @property
    def constants(self) -> dict[str, int]:
        """Constants of the source."""
        return {
            "NUM_THREADS": NUM_THREADS,
            "ROWS_PER_THREAD": ROWS_PER_THREAD,
            "CTAS_PER_SM": CTAS_PER_SM,
            "LAUNCH_ROWS": LAUNCH_ROWS,
        }

    @property
    def structs(self) -> dict[str, np.dtype]:
        """The structs of the source."""
        structs = {"Append": APPEND_DTYPE, "Slot": SLOT_DTYPE, "Slots": SLOTS_DTYPES[self.way]}
        return structs | ({"IndexArray": INDEX_ARRAY_DTYPE} if self.way == "arrays" else {})


KERNELS = [AppendKernel(unit_bytes, way) for way in SLOTS_DTYPES for unit_bytes in UNIT_BYTES]

# (unit_bytes, way, device) → the kernel's `CUfunction`
_functions: dict[tuple[int, Way, int], int] = {}

_arguments = Arguments(LAYOUT)


def on_host(indices: Indices, stream: int) -> Indices:
    """The index arrays on the host. What is on the device is copied, and waited for once.

    Parameters
    ----------
    indices : Indices
        One axis each.
    stream : int
        The current one.
    """
    cuda = cupy().cuda
    entries = sum(len(array) for array in indices if not isinstance(array, np.ndarray))
    memory = cuda.alloc_pinned_memory(max(8 * entries, 1))  # those of 4 bytes take as much
    copies, sources, begin = [], [], 0
    for array in indices:
        if not isinstance(array, np.ndarray):
            source = array if array.flags.c_contiguous else array.copy()
            copy = np.frombuffer(memory, array.dtype, len(array), begin)
            if len(array):
                cuda.runtime.memcpyAsync(
                    *(memory.ptr + begin, source.data.ptr, source.nbytes),
                    *(cuda.runtime.memcpyDeviceToHost, stream),
                )
            begin += 8 * len(array)
            sources.append(source)  # which stay until they have been read
            array = copy
        copies.append(array)
    cuda.runtime.streamSynchronize(stream)
    return Indices(*copies)


def run(
    device: int,
    stream: int,
    key: Any,
    value: Any,
    k: Any,
    v: Any,
    kv_layout: str,
    where: Slots | Indices,
) -> None:
    """Launch the kernel.

    Parameters
    ----------
    device, stream : int
        The current ones.
    key, value : cupy.ndarray [nnz, num_kv_heads, head_dim]
        Not empty.
    k, v : cupy.ndarray
        The cache, in `kv_layout`.
    where : Slots or Indices
        Where the rows go; or the index arrays, all on the device, that say so.

    Raises
    ------
    RuntimeError
        A CUDA graph is being captured, and the kernel is not loaded yet.
    """
    nnz, heads, head_dim = key.shape
    head_bytes = head_dim * key.itemsize
    # Each of an array's properties takes CuPy a while: none is asked for twice.
    key_pointer, value_pointer = key.data.ptr, value.data.ptr
    k_pointer, v_pointer = k.data.ptr, v.data.ptr
    (key_row, key_head, _), (value_row, value_head, _) = key.strides, value.strides
    (k_page, k_token, k_head, _), (v_page, v_token, v_head, _) = k.strides, v.strides
    bits = key_pointer | value_pointer | k_pointer | v_pointer | head_bytes
    bits |= key_row | key_head | value_row | value_head
    bits |= k_page | k_token | k_head | v_page | v_token | v_head
    unit_bytes = UNIT_BYTES[0]
    if bits % unit_bytes:
        unit_bytes = _unit_bytes(head_bytes, key, value, k, v)
    if kv_layout == "HND":
        k_token, k_head, v_token, v_head = k_head, k_token, v_head, v_token
    head_units = head_bytes // unit_bytes
    shape = launch_shape(nnz, heads * head_units, head_units, device_model(device).num_sms)
    way: Way = "arrays"
    if isinstance(where, Slots):
        way = "launch" if nnz <= LAUNCH_ROWS else "memory"
    function = _functions.get((unit_bytes, way, device))
    if function is None:
        function = _load(unit_bytes, way, device, stream)
    memory, address = argument = _arguments.take()
    _APPEND.pack_into(
        *(memory, APPEND_BEGIN, key_pointer, value_pointer, k_pointer, v_pointer),
        *(key_row, key_head, value_row, value_head),
        *(k_page, k_token, k_head, v_page, v_token, v_head),
        *(nnz, *shape.numbers),
    )
    block = None  # kept until the launch
    if isinstance(where, Indices):
        page_size = k.shape[1 if kv_layout == "NHD" else 2]
        _pack_arrays(memory, where, len(k), page_size)
    elif way == "launch":
        memory[SLOTS_BEGIN : SLOTS_BEGIN + 8 * nnz] = where.table.tobytes()
    else:
        block = _uploaded(where, device, stream)
        _ADDRESS.pack_into(memory, SLOTS_BEGIN, block.ptr)
    cupy().cuda.driver.launchKernel(
        *(function, shape.blocks, shape.parts, 1, NUM_THREADS, 1, 1, 0, stream, address, 0)
    )
    _arguments.put_back(argument)


class LaunchShape(NamedTuple):
    """How a launch divides the rows.

    Attributes
    ----------
    blocks : int
        Thread blocks that share the rows.
    parts : int
        Parts of a row, each with as many blocks.
    numbers : tuple of int
        row_units, head_units, head_magic, head_shift and lanes_shift of the parameters.
    """

    blocks: int
    parts: int
    numbers: tuple[int, int, int, int, int]


@functools.lru_cache(maxsize=256)
def launch_shape(nnz: int, row_units: int, head_units: int, num_sms: int) -> LaunchShape:
    """Choose how a launch divides `nnz` rows of `row_units` units.

    A thread takes one row as long as the GPU holds as many blocks at once as that needs, and no
    more than `ROWS_PER_THREAD`.
    """
    # As many lanes a row as there are, unless more than a fifth of them would have nothing to do.
    lanes = NUM_THREADS
    while -(-row_units // lanes) * lanes * 4 > row_units * 5:
        lanes //= 2
    parts = -(-row_units // lanes)
    rows_at_once = NUM_THREADS // lanes
    most = -(-nnz // rows_at_once)
    fewest = -(-nnz // (rows_at_once * ROWS_PER_THREAD))
    at_once = num_sms * CTAS_PER_SM // parts
    lanes_shift = lanes.bit_length() - 1
    return LaunchShape(
        blocks=max(min(most, at_once), fewest),
        parts=parts,
        numbers=(row_units, head_units, *magic(head_units), lanes_shift),
    )


def _unit_bytes(head_bytes: int, *tensors: Any) -> int:
    """The largest unit that all addresses are multiples of.

    Nothing is at a stride of an axis of length 1, whatever that is.
    """
    bits = head_bytes
    for tensor in tensors:
        bits |= tensor.data.ptr
        for length, stride in zip(tensor.shape[:-1], tensor.strides, strict=False):
            if length > 1:
                bits |= stride
    return int(min(bits & -bits, UNIT_BYTES[0]))


def _load(unit_bytes: int, way: Way, device: int, stream: int) -> int:
    """The `CUfunction` of a kernel that is asked for the first time."""
    if is_recorded(stream):
        raise RuntimeError(
            "append_paged_kv_cache() in the capture of a CUDA graph, where its kernel can't be "
            "loaded: call it once before, with the same arrays"
        )
    kernel = AppendKernel(unit_bytes, way)
    found = kernels.load(kernel, device_model(device).arch, device)
    _functions[unit_bytes, way, device] = found
    return found


def _pack_arrays(memory: bytearray, indices: Indices, num_pages: int, page_size: int) -> None:
    """Write the `Slots` of the way "arrays"."""
    fields: list[int] = []
    for array in indices:
        fields += array.data.ptr, array.strides[0], array.itemsize == 8
    batch = len(indices.kv_last_page_len)
    fields += len(indices.kv_indices), batch, num_pages, page_size, *magic(page_size)
    _ARRAYS.pack_into(memory, SLOTS_BEGIN, *fields)


def _uploaded(slots: Slots, device: int, stream: int) -> Any:
    """The slots on the device, uploaded unless the last launch there needed the same."""
    current = cupy().cuda.get_current_stream()
    found = slots.uploaded
    if found is not None and found.place == (device, stream):
        # Should this be another stream with the number of one that is gone.
        current.wait_event(found.event)
        return found.block
    block = cupy().cuda.alloc(slots.table.nbytes)
    upload([Upload(block, slots.table.size, [(0, slots.table.reshape(-1))])], device, current)
    slots.uploaded = Uploaded((device, stream), block, current.record())
    return block
