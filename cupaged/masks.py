"""Custom masks: bits packed into bytes, as FlashInfer's functions of these names do it.

A mask of a ragged batch is flattened, `[qo_len, kv_len]` for each request, one after the other.
Packed, each request begins at a byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cupaged import arrays, validate
from cupaged.devices import cupy
from cupaged.extents import CustomMask
from cupaged.schedule import Lengths
from cupaged.validate_lengths import check_indptr

__all__ = ["CustomMask", "packbits", "read", "segment_packbits"]

Bytes = npt.NDArray[np.uint8]
Sizes = npt.NDArray[np.int64]

_ON_THE_HOST = (list, tuple)
_BIT_ORDERS = ("big", "little")
_MAX_BYTES = 2**31 - 1  # where a request begins is an int32


def packbits(x: Any, bitorder: str = "big") -> Any:
    """Pack the elements of a binary-valued array into the bits of bytes.

    Parameters
    ----------
    x : bool or int array [n]
        Whatever is not 0 becomes 1. On a device it is copied to the host and back, which waits for
        what is pending on it.
    bitorder : {"big", "little"}
        Whether the first element becomes a byte's highest bit, or its lowest.

    Returns
    -------
    uint8 array [ceil(n / 8)]
        Where `x` is, and of its kind. The bits left over are 0.

    Raises
    ------
    TypeError, ValueError
        Names the argument, what was expected and what came.
    """
    order = validate.choice(bitorder, "bitorder", _BIT_ORDERS)
    packed = np.packbits(_bits(x), bitorder=order)  # type: ignore[call-overload]
    return _as_kind_of(x, "x", packed)


def segment_packbits(x: Any, indptr: Any, bitorder: str = "big") -> tuple[Any, Any]:
    """Pack the segments of a binary-valued array, each from a byte on.

    Parameters
    ----------
    x : bool or int array [indptr[-1]]
        As `packbits()` takes it.
    indptr : int array [segments + 1]
        Segment `i` is `x[indptr[i]:indptr[i + 1]]`.
    bitorder : {"big", "little"}
        As `packbits()` takes it; the wrappers take masks in "little".

    Returns
    -------
    packed : uint8 array [new_indptr[-1]]
        Where `x` is, and of its kind.
    new_indptr : int32 array [segments + 1]
        Where `indptr` is, and of its kind; for a list a NumPy array. Segment `i` is
        `packed[new_indptr[i]:new_indptr[i + 1]]`.

    Raises
    ------
    TypeError, ValueError
        Names the argument, what was expected and what came.
    """
    order = validate.choice(bitorder, "bitorder", _BIT_ORDERS)
    bits = _bits(x)
    begins, sizes = check_indptr(arrays.import_index(indptr, "indptr"), "indptr")
    if len(bits) != begins[-1]:
        raise ValueError(
            f"x has shape ({len(bits)},), expected ({begins[-1]},) = indptr[{len(sizes)}]"
        )
    packed, new_indptr = _pack(bits, sizes.astype(np.int64), order)
    kind = None if isinstance(indptr, _ON_THE_HOST) else indptr
    return _as_kind_of(x, "x", packed), _as_kind_of(kind, "indptr", new_indptr)


def read(custom_mask: Any, packed_custom_mask: Any, lengths: Lengths) -> CustomMask | None:
    """Check a batch's mask, and copy it to the host.

    Parameters
    ----------
    custom_mask : bool or int array [sum of qo_len * kv_len], optional
        Of 0 and 1, flattened; of one request also `[qo_len, kv_len]`.
    packed_custom_mask : uint8 array, optional
        The same as `segment_packbits(custom_mask, ..., bitorder="little")` packs it.
    lengths : Lengths

    Returns
    -------
    CustomMask or None
        None where there is neither.

    Raises
    ------
    TypeError, ValueError
        Names the argument, what was expected and what came.
    """
    if custom_mask is None and packed_custom_mask is None:
        return None
    if custom_mask is not None and packed_custom_mask is not None:
        raise ValueError("custom_mask and packed_custom_mask exclude each other")
    sizes = lengths.qo_len.astype(np.int64) * lengths.kv_len
    num_bits, num_bytes = int(sizes.sum()), int(_byte_counts(sizes).sum())
    if num_bytes > _MAX_BYTES:
        name = "packed_custom_mask" if custom_mask is None else "custom_mask"
        raise ValueError(
            f"{name} is of {num_bits} bits, the sum of qo_len * kv_len, in {num_bytes} bytes, "
            f"expected at most {_MAX_BYTES} bytes"
        )
    if custom_mask is None:
        packed = _to_host(packed_custom_mask, "packed_custom_mask")
        if packed.dtype != np.uint8:
            raise TypeError(f"packed_custom_mask has dtype {packed.dtype}, expected uint8")
        if packed.shape != (num_bytes,):
            raise ValueError(
                f"packed_custom_mask has shape {packed.shape}, expected ({num_bytes},): the sum of "
                "qo_len * kv_len bits, each request's rounded up to bytes, as segment_packbits() "
                "packs them"
            )
        return CustomMask(packed.copy(), _byte_indptr(sizes))
    return CustomMask(*_pack(_flat_mask(custom_mask, num_bits, lengths), sizes, "little"))


def _flat_mask(custom_mask: Any, num_bits: int, lengths: Lengths) -> npt.NDArray[Any]:
    mask = _to_host(custom_mask, "custom_mask")
    _check_dtype(mask, "custom_mask", "bool, or an integer dtype of 0 and 1")
    whole = (*lengths.qo_len, *lengths.kv_len) if len(lengths.qo_len) == 1 else (num_bits,)
    if mask.shape not in ((num_bits,), whole):
        raise ValueError(
            f"custom_mask has shape {mask.shape}, expected ({num_bits},): "
            "the sum of qo_len * kv_len"
        )
    mask = mask.reshape(-1)
    if mask.dtype != np.bool_ and mask.size and (mask.min() < 0 or mask.max() > 1):
        i = int(((mask != 0) & (mask != 1)).argmax())
        raise ValueError(f"custom_mask[{i}] = {mask[i]}, expected 0 or 1")
    return mask


def _byte_counts(sizes: Sizes) -> Sizes:
    return (sizes + 7) // 8


def _byte_indptr(sizes: Sizes) -> npt.NDArray[np.int32]:
    """Where each segment of so many bits begins, in bytes."""
    indptr = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(_byte_counts(sizes), out=indptr[1:])
    return indptr


def _pack(
    bits: npt.NDArray[Any], sizes: Sizes, bitorder: str
) -> tuple[Bytes, npt.NDArray[np.int32]]:
    """Segments of so many elements, each packed from a byte on, and where they begin."""
    indptr = _byte_indptr(sizes)
    packed = np.empty(indptr[-1], np.uint8)
    begin = 0
    for i, size in enumerate(sizes.tolist()):
        segment = bits[begin : begin + size]
        packed[indptr[i] : indptr[i + 1]] = np.packbits(segment, bitorder=bitorder)  # type: ignore[call-overload]
        begin += size
    return packed, indptr


def _bits(x: Any) -> npt.NDArray[Any]:
    """What is to be packed, on the host."""
    bits = _to_host(x, "x")
    if bits.ndim != 1:
        raise ValueError(f"x has shape {bits.shape}, expected one axis")
    return _check_dtype(bits, "x", "bool or an integer dtype")


def _check_dtype(x: npt.NDArray[Any], name: str, expected: str) -> npt.NDArray[Any]:
    if x.dtype.kind not in "bui":
        raise TypeError(f"{name} has dtype {x.dtype}, expected {expected}")
    return x


def _to_host(x: Any, name: str) -> npt.NDArray[Any]:
    """View an array on the host, or copy it there, behind what is pending on it."""
    array = arrays.import_tensor(x, name)
    device = arrays.device_id(array)
    if device is not None:
        current, _ = arrays.on_stream_of(x, device)
        with current:
            array = array.get()
    host: npt.NDArray[Any] = array
    return host


def _as_kind_of(x: Any, name: str, host: npt.NDArray[Any]) -> Any:
    """An array on the host as the caller's kind of array, where the caller's `x` is."""
    if x is None:
        return host
    device = arrays.device_id(arrays.import_tensor(x, name))
    current, _ = arrays.on_stream_of(x, device)
    with current:
        return arrays.export(host if device is None else cupy().asarray(host), x)
