"""Index buffers that stay where they are, so that a CUDA graph may read them again and again."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cupaged import arrays, validate


class GraphBuffers(NamedTuple):
    """The most that a plan may hold whose run is recorded in a CUDA graph.

    Attributes
    ----------
    max_batch : int
        Requests.
    max_pages : int
        Entries of the page table.
    qo_indptr, indptr, indices, last_page_len : cupy.ndarray or None
        The caller's, int32; `plan()` writes them, and kernels read the page table from `indices`.
    owner : array or None
        The caller's own object of one of them, whose stream is planned on.
    custom_mask : cupy.ndarray or None
        uint8 [max_mask_bytes], the caller's: kernels read a plan's mask from it.
    mask_indptr : cupy.ndarray or None
        int32 [max_batch + 1], the caller's: where each request's mask begins there.
    """

    max_batch: int
    max_pages: int
    qo_indptr: Any = None
    indptr: Any = None
    indices: Any = None
    last_page_len: Any = None
    owner: Any = None
    custom_mask: Any = None
    mask_indptr: Any = None


def graph_buffers(
    use_cuda_graph: object,
    buffers: dict[str, Any],
    max_batch_size: object,
    max_num_pages: object,
    custom_mask_buf: Any = None,
    mask_indptr_buf: Any = None,
) -> GraphBuffers | None:
    """Check what a wrapper's constructor was given for CUDA graphs.

    Parameters
    ----------
    use_cuda_graph : bool
    buffers : dict
        Argument's name → what was given. In this order: of qo_indptr, where the call has one, of
        the page table's indptr, of its indices, and of last_page_len.
    max_batch_size, max_num_pages : int or None
        For buffers of the library's own.
    custom_mask_buf, mask_indptr_buf : array or None

    Returns
    -------
    GraphBuffers or None
        None where no graph is meant.

    Raises
    ------
    TypeError, ValueError
        Names the argument.
    """
    sizes = {"max_batch_size": max_batch_size, "max_num_pages": max_num_pages}
    of_mask = {"custom_mask_buf": custom_mask_buf, "mask_indptr_buf": mask_indptr_buf}
    if not _is_meant(use_cuda_graph, {**buffers, **of_mask, **sizes}):
        return None
    if all(value is None for value in buffers.values()):
        for name, value in sizes.items():
            if value is None:
                raise ValueError(
                    f"use_cuda_graph=True without {name}: expected {_all_of(buffers)}; or "
                    "max_batch_size and max_num_pages, for buffers of the library's own"
                )
        found = GraphBuffers(
            validate.positive_int(max_batch_size, "max_batch_size"),
            validate.positive_int(max_num_pages, "max_num_pages"),
        )
        return _with_mask(found, of_mask, f"max_batch_size = {found.max_batch}")
    found = _given_buffers(buffers, sizes)
    return _with_mask(found, of_mask, f"the buffers are for {found.max_batch} requests")


def ragged_graph_buffers(
    use_cuda_graph: object,
    buffers: dict[str, Any],
    max_batch_size: object,
    custom_mask_buf: Any,
    mask_indptr_buf: Any,
) -> GraphBuffers | None:
    """As `graph_buffers()`, where requests have no pages.

    `buffers` are those of qo_indptr and of kv_indptr. The latter is the page table: each request's
    page is the one that begins at its first row.
    """
    sizes = {"max_batch_size": max_batch_size}
    of_mask = {"custom_mask_buf": custom_mask_buf, "mask_indptr_buf": mask_indptr_buf}
    if not _is_meant(use_cuda_graph, {**buffers, **of_mask, **sizes}):
        return None
    if all(value is None for value in buffers.values()):
        if max_batch_size is None:
            raise ValueError(
                f"use_cuda_graph=True without max_batch_size: expected {_all_of(buffers)}; or "
                "max_batch_size, for buffers of the library's own"
            )
        batch = validate.positive_int(max_batch_size, "max_batch_size")
        return _with_mask(GraphBuffers(batch, batch + 1), of_mask, f"max_batch_size = {batch}")
    _check_given(buffers, sizes)
    (qo_name, qo), (kv_name, kv) = ((name, _buffer(value, name)) for name, value in buffers.items())
    if len(qo) != len(kv) or not len(kv):
        raise ValueError(
            f"{qo_name} has {len(qo)} entries and {kv_name} {len(kv)}, expected the same: "
            "max_batch_size + 1"
        )
    _check_device({qo_name: qo}, arrays.device_id(kv), kv_name)
    batch = len(kv) - 1
    found = GraphBuffers(batch, len(kv), qo, indices=kv, owner=buffers[kv_name])
    return _with_mask(found, of_mask, f"the buffers are for {batch} requests")


def _is_meant(use_cuda_graph: object, arguments: dict[str, Any]) -> bool:
    """Whether a graph is meant; without one, none of the arguments may be given."""
    if validate.flag(use_cuda_graph, "use_cuda_graph"):
        return True
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is given, which takes effect with use_cuda_graph=True")
    return False


def _check_given(buffers: dict[str, Any], sizes: dict[str, object]) -> None:
    """Check that all buffers are given, and no sizes beside them."""
    for name, value in buffers.items():
        if value is None:
            raise ValueError(f"{name} is missing: expected {_all_of(buffers)}, or none of them")
    for name, value in sizes.items():
        if value is not None:
            raise ValueError(f"{name} is given beside buffers, whose lengths say as much")


def _check_device(buffers: dict[str, Any], device: int | None, beside: str) -> None:
    for name, buffer in buffers.items():
        if arrays.device_id(buffer) != device:
            raise ValueError(
                f"{name} is on cuda:{arrays.device_id(buffer)}, expected cuda:{device} as "
                f"{beside} is"
            )


def _given_buffers(buffers: dict[str, Any], sizes: dict[str, object]) -> GraphBuffers:
    """Check the caller's buffers for the lengths and the page table."""
    _check_given(buffers, sizes)
    found = {name: _buffer(value, name) for name, value in buffers.items()}
    *indptrs, indices, last_page_len = found
    batch = len(found[last_page_len])
    for name in indptrs:
        if len(found[name]) != batch + 1:
            raise ValueError(
                f"{name} has {len(found[name])} entries, expected {batch + 1}: {last_page_len} "
                f"has {batch}"
            )
    _check_device(found, arrays.device_id(found[indices]), indices)
    return GraphBuffers(
        batch,
        len(found[indices]),
        found[indptrs[0]] if len(indptrs) == 2 else None,
        found[indptrs[-1]],
        found[indices],
        found[last_page_len],
        buffers[indices],
    )


def _with_mask(found: GraphBuffers, of_mask: dict[str, Any], why: str) -> GraphBuffers:
    """Add the caller's buffers for masks, which a wrapper may be without."""
    if all(value is None for value in of_mask.values()):
        return found
    for name, value in of_mask.items():
        if value is None:
            raise ValueError(f"{name} is missing: expected {_all_of(of_mask)}, or neither")
    (mask_name, mask), (indptr_name, indptr) = of_mask.items()
    bits, begins = _buffer(mask, mask_name, "uint8"), _buffer(indptr, indptr_name)
    if len(begins) != found.max_batch + 1:
        raise ValueError(
            f"{indptr_name} has {len(begins)} entries, expected {found.max_batch + 1}: {why}"
        )
    device, beside = arrays.device_id(bits), mask_name
    if found.indices is not None:
        device, beside = arrays.device_id(found.indices), "the page table"
    _check_device({mask_name: bits, indptr_name: begins}, device, beside)
    owner = mask if found.owner is None else found.owner
    return found._replace(custom_mask=bits, mask_indptr=begins, owner=owner)


def _all_of(buffers: dict[str, Any]) -> str:
    *names, last = buffers
    return f"{', '.join(names)} and {last}"


def _buffer(value: Any, name: str, dtype: str = "int32") -> Any:
    """A caller's buffer: on a CUDA device, one piece."""
    buffer = arrays.import_tensor(arrays.writable(value, name), name)
    if arrays.device_id(buffer) is None:
        raise ValueError(f"{name} is on the host, expected a CUDA device: use_cuda_graph=True")
    if buffer.dtype != np.dtype(dtype):
        raise TypeError(f"{name} has dtype {buffer.dtype}, expected {dtype}")
    if buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise ValueError(f"{name} has shape {buffer.shape}, expected one contiguous axis")
    return buffer
