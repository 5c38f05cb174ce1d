"""DLPack producers made by hand, which count what is done to their capsules."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class DLTensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_: ClassVar = [
        ("tensor", DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class ManagedVersioned(ctypes.Structure):
    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


new_capsule = ctypes.pythonapi["PyCapsule_New"]
new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
new_capsule.restype = ctypes.py_object
rename_capsule = ctypes.pythonapi["PyCapsule_SetName"]
rename_capsule.argtypes = (ctypes.py_object, ctypes.c_char_p)
is_valid = ctypes.pythonapi["PyCapsule_IsValid"]
is_valid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)  # an address: the object is being freed
Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
producers: list[object] = []  # what capsules point to, for as long as there may be capsules


class Producer:
    """Exports `memory` the way DLPack asks of a producer, and counts calls of its deleter."""

    def __init__(
        self,
        memory: np.ndarray,
        code: int,
        bits: int,
        *,
        shape: tuple[int, ...] | None = None,
        strides: tuple[int, ...] | None = None,
        version: tuple[int, int] | None = None,
        read_only: bool = False,
        device: tuple[int, int] = (1, 0),
        lanes: int = 1,
        byte_offset: int = 0,
        null_data: bool = False,
    ) -> None:
        self.dtype = f"code {code}"
        self.deleted = 0
        self.device = device
        self.name = b"dltensor" if version is None else b"dltensor_versioned"
        shape = memory.shape if shape is None else shape
        self.sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        self.steps = (ctypes.c_int64 * max(len(shape), 1))(*(strides or ()))
        tensor = DLTensor(
            data=None if null_data else memory.ctypes.data,
            device_type=device[0],
            device_id=device[1],
            ndim=len(shape),
            code=code,
            bits=bits,
            lanes=lanes,
            shape=ctypes.addressof(self.sizes),
            strides=None if strides is None else ctypes.addressof(self.steps),
            byte_offset=byte_offset,
        )
        if version is None:
            self.managed: Any = Managed(tensor=tensor)
        else:
            self.managed = ManagedVersioned(
                major=version[0], minor=version[1], flags=int(read_only), tensor=tensor
            )
        self.memory = memory
        self.destructor = Destructor(self.destroy)
        producers.append(self)

    def destroy(self, capsule: int) -> None:
        if is_valid(capsule, self.name):
            self.deleted += 1

    def capsule(self) -> object:
        address = ctypes.cast(self.destructor, ctypes.c_void_p)
        return new_capsule(ctypes.addressof(self.managed), self.name, address)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None) -> object:
        assert max_version == (1, 0)
        return self.capsule()


class OldProducer(Producer):
    """One of before DLPack 1.0, which knows no `max_version`."""

    def __dlpack__(self, *, stream: int | None = None) -> object:  # type: ignore[override]
        assert stream is None
        return self.capsule()
