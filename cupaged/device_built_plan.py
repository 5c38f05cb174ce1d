"""A plan on a CUDA device that builds the schedule itself: lengths are uploaded, not items."""

from __future__ import annotations

from typing import Any

from cupaged import device_schedule, kernels
from cupaged.device_pages import Question
from cupaged.device_plan import PlacedPlan, ready
from cupaged.device_schedule import Outline
from cupaged.devices import cupy
from cupaged.kernel_spec import ITEM_DTYPE
from cupaged.schedule import IntArray
from cupaged.staging import Upload, upload
from cupaged.variant_tables import Addresses, spec_tables

#: Parts of the block begin at multiples of this many int32.
_ALIGNMENT = 64
#: Counters of a launch, see `params.cuh`. In int32.
_WORK_COUNTERS = 4


class DeviceBuiltPlan(PlacedPlan):
    """An outlined schedule on one CUDA device, ready to be launched again and again.

    Parameters
    ----------
    outlined : Outline
    page_indices : int32 [paged_kv_indptr[-1]], on the host
    device : int
        CUDA device, the current one; the upload goes to its current stream.
    workspace : cupy.ndarray, optional
        Bytes for partial states, as many as there is room for; allocated where not given.
    highest_page : int, optional
        The highest page number, where the device is to be asked whether a request has a page twice.

    Attributes
    ----------
    question : Question or None
    """

    def __init__(
        self,
        outlined: Outline,
        page_indices: IntArray,
        device: int,
        workspace: Any | None,
        highest_page: int | None,
    ) -> None:
        spec, lengths, room = outlined.spec, outlined.lengths, outlined.room
        super().__init__(spec, device)
        # Compiled first: should that fail, nothing has been allocated or copied.
        kernel = kernels.load(room.config, self._arch, device)
        builder = kernels.load(device_schedule.KERNEL, self._arch, device)
        tables = spec_tables(spec)
        begins, parts, size = [], [], 0
        for part in (
            *(lengths.qo_indptr, lengths.kv_len, lengths.paged_kv_indptr),
            *tables.values(),
            page_indices,
        ):
            begins.append(size)
            parts.append((size, part))
            size += -(-len(part) // _ALIGNMENT) * _ALIGNMENT
        uploaded = parts[-1][0] + len(page_indices)
        items = size
        counters = items + room.items * (ITEM_DTYPE.itemsize // 4)
        merge_counters = counters + _WORK_COUNTERS
        size = merge_counters + device_schedule.num_merge_counters(outlined)
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        needed = room.partial_bytes(spec) if workspace is None else 0
        self._workspace = workspace
        self._block = block = cupy().cuda.alloc(4 * size + needed)
        base = block.ptr
        qo_indptr, kv_len, kv_indptr, *others, pages = [base + 4 * begin for begin in begins]
        target = (base + 4 * items, base + 4 * counters, base + 4 * merge_counters)
        self.stream = stream = cupy().cuda.get_current_stream()
        self.question: Question | None = None

        def build() -> None:
            if highest_page is not None:
                batch = len(lengths.kv_len)
                self.question = Question(pages, kv_indptr, batch, highest_page, device, stream.ptr)
            device_schedule.launch(
                outlined, builder, (qo_indptr, kv_len, kv_indptr), target, stream.ptr
            )

        self.uploaded = upload([Upload(block, uploaded, parts)], device, stream, build)
        partials = base + 4 * size if workspace is None else workspace.data.ptr
        num_rows = room.partials * spec.num_kv_heads * room.config.cta_tile_q
        self.launches = (
            ready(
                *(spec, room.config, outlined.grid, kernel, (target[0], pages)),
                *((partials, num_rows), target[1:], -1),
                Addresses(**dict(zip(tables, others, strict=True))),
            ),
        )
