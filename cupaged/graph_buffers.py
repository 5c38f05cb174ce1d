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
    """

    max_batch: int
    max_pages: int
    qo_indptr: Any = None
    indptr: Any = None
    indices: Any = None
    last_page_len: Any = None
    owner: Any = None


def graph_buffers(
    use_cuda_graph: object,
    buffers: dict[str, Any],
    max_batch_size: object,
    max_num_pages: object,
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
    given = [name for name, value in {**buffers, **sizes}.items() if value is not None]
    if not validate.flag(use_cuda_graph, "use_cuda_graph"):
        if given:
            raise ValueError(f"{given[0]} is given, which takes effect with use_cuda_graph=True")
        return None
    if all(value is None for value in buffers.values()):
        for name, value in sizes.items():
            if value is None:
                raise ValueError(
                    f"use_cuda_graph=True without {name}: expected {_all_of(buffers)}; or "
                    "max_batch_size and max_num_pages, for buffers of the library's own"
                )
        return GraphBuffers(
            validate.positive_int(max_batch_size, "max_batch_size"),
            validate.positive_int(max_num_pages, "max_num_pages"),
        )
    for name, value in buffers.items():
        if value is None:
            raise ValueError(f"{name} is missing: expected {_all_of(buffers)}, or none of them")
    for name, value in sizes.items():
        if value is not None:
            raise ValueError(f"{name} is given beside buffers, whose lengths say as much")
    found = {name: _buffer(value, name) for name, value in buffers.items()}
    *indptrs, indices, last_page_len = found
    batch = len(found[last_page_len])
    for name in indptrs:
        if len(found[name]) != batch + 1:
            raise ValueError(
                f"{name} has {len(found[name])} entries, expected {batch + 1}: {last_page_len} "
                f"has {batch}"
            )
    device = arrays.device_id(found[indices])
    for name, buffer in found.items():
        if arrays.device_id(buffer) != device:
            raise ValueError(
                f"{name} is on cuda:{arrays.device_id(buffer)}, expected cuda:{device} as "
                f"{indices} is"
            )
    return GraphBuffers(
        batch,
        len(found[indices]),
        found[indptrs[0]] if len(indptrs) == 2 else None,
        found[indptrs[-1]],
        found[indices],
        found[last_page_len],
        buffers[indices],
    )


def _all_of(buffers: dict[str, Any]) -> str:
    *names, last = buffers
    return f"{', '.join(names)} and {last}"


def _buffer(value: Any, name: str) -> Any:
    """A caller's buffer: int32, on a CUDA device, one piece."""
    buffer = arrays.import_tensor(arrays.writable(value, name), name)
    if arrays.device_id(buffer) is None:
        raise ValueError(f"{name} is on the host, expected a CUDA device: use_cuda_graph=True")
    if buffer.dtype != np.int32:
        raise TypeError(f"{name} has dtype {buffer.dtype}, expected int32")
    if buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise ValueError(f"{name} has shape {buffer.shape}, expected one contiguous axis")
    return buffer
