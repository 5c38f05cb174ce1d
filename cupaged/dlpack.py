"""Reads DLPack capsules in dtypes that `numpy.from_dlpack` and `cupy.from_dlpack` refuse.

A host tensor's capsule is never renamed ("consumed"): it stays with the array as its base, so that
the destructor that its producer gave it calls the deleter, once, when the last view is gone.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

#: DLDeviceType of host memory, CUDA's pinned kind too; and of a CUDA device, managed memory too.
HOST = (1, 3)
DEVICE = (2, 13)

_READ_ONLY = 1  # bit of DLManagedTensorVersioned.flags
_MAJOR_VERSION = 1

#: (DLDataTypeCode, bits) → NumPy dtype
_DTYPES: dict[tuple[int, int], np.dtype[Any]] = {
    **{(0, 8 * n): np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{(1, 8 * n): np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{(2, 8 * n): np.dtype(f"f{n}") for n in (2, 4, 8)},
    (4, 16): np.dtype(ml_dtypes.bfloat16),
    (6, 8): np.dtype(np.bool_),
    (10, 8): np.dtype(ml_dtypes.float8_e4m3fn),
    (12, 8): np.dtype(ml_dtypes.float8_e5m2),
}
_UINT = 1  # DLDataTypeCode
_FLOAT8 = ((10, 8), (12, 8))


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; NULL where C-contiguous
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


# By item, not by attribute: those are shared with everyone who declares them in another way.
_capsule_is_valid = ctypes.pythonapi["PyCapsule_IsValid"]
_capsule_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_is_valid.restype = ctypes.c_int
_capsule_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_pointer.restype = ctypes.c_void_p


class _Base:
    """What a view's memory belongs to; NumPy makes it the base of the array it builds."""

    def __init__(self, capsule: object, interface: dict[str, Any]) -> None:
        self.capsule = capsule
        self.__array_interface__ = interface


def _tensor_of(capsule: object) -> tuple[_Tensor, bool]:
    """The tensor of a capsule that is not consumed, and whether it is read-only."""
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        managed = _ManagedTensorVersioned.from_address(
            _capsule_pointer(capsule, b"dltensor_versioned")
        )
        if managed.major > _MAJOR_VERSION:
            raise BufferError(f"DLPack {managed.major}.{managed.minor}, expected at most 1.x")
        return managed.tensor, bool(managed.flags & _READ_ONLY)
    if _capsule_is_valid(capsule, b"dltensor"):
        # DLManagedTensor begins with its DLTensor.
        return _Tensor.from_address(_capsule_pointer(capsule, b"dltensor")), False
    raise BufferError(f"{capsule!r} is not an unconsumed DLPack capsule")


def address(capsule: object) -> int:
    """Where the tensor of a capsule lies; the capsule is not consumed.

    Raises
    ------
    BufferError
        Not such a capsule, or of a later major version.
    """
    tensor, _ = _tensor_of(capsule)
    begin: int = tensor.data or 0  # NULL where the tensor is empty
    return begin + int(tensor.byte_offset)


def as_bytes(capsule: object) -> np.dtype[Any] | None:
    """Let a capsule of float8 say that it holds uint8, which CuPy can read.

    Parameters
    ----------
    capsule : PyCapsule
        As an array's `__dlpack__()` gave it, and not consumed by anyone: who has it may write to
        it.

    Returns
    -------
    numpy.dtype or None
        What it holds; None where that is not float8, and the capsule is as it was.

    Raises
    ------
    BufferError
        Not such a capsule, or of a later major version.
    """
    tensor, _ = _tensor_of(capsule)
    kind = (tensor.dtype_code, tensor.dtype_bits)
    if kind not in _FLOAT8:
        return None
    tensor.dtype_code = _UINT
    return _DTYPES[kind]


def host_array(capsule: object) -> np.ndarray[Any, np.dtype[Any]]:
    """View the host tensor of a DLPack capsule as a NumPy array.

    Parameters
    ----------
    capsule : PyCapsule
        As an array's `__dlpack__()` gave it, old or versioned, and not consumed by anyone.

    Returns
    -------
    numpy.ndarray
        Shares the tensor's memory and keeps its producer alive; read-only where the capsule
        says so; bfloat16 comes as `ml_dtypes.bfloat16`.

    Raises
    ------
    BufferError
        Not such a capsule, of a later major version, or not of host memory.
    NotImplementedError
        A dtype without a NumPy counterpart in the table above.
    """
    tensor, read_only = _tensor_of(capsule)
    if tensor.device_type not in HOST:
        raise BufferError(f"DLPack device type {tensor.device_type} is not host memory")
    dtype = _DTYPES.get((tensor.dtype_code, tensor.dtype_bits))
    if dtype is None or tensor.dtype_lanes != 1:
        raise NotImplementedError(
            f"DLPack dtype code {tensor.dtype_code}, {tensor.dtype_bits} bits, "
            f"{tensor.dtype_lanes} lanes"
        )

    shape = tuple(tensor.shape[: tensor.ndim])
    # The producer may leave the pointer of an empty tensor NULL, which NumPy takes as a wish
    # for memory of its own.
    if 0 in shape:
        return np.empty(shape, dtype)
    strides = None
    if tensor.strides:
        strides = tuple(s * dtype.itemsize for s in tensor.strides[: tensor.ndim])
    interface = {
        "version": 3,
        "shape": shape,
        "strides": strides,
        # A raw type of the item's size: the array interface has no name for bfloat16.
        "typestr": f"|V{dtype.itemsize}",
        "data": (tensor.data + tensor.byte_offset, read_only),
    }
    return np.asarray(_Base(capsule, interface)).view(dtype)
