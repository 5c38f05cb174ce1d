"""A plan on a CUDA device that builds the schedule itself: lengths are uploaded, not items."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cupaged import device_schedule, kernels
from cupaged.device_pages import Question
from cupaged.device_plan import PlacedPlan, ready
from cupaged.device_schedule import Outline, Recipe
from cupaged.devices import cupy
from cupaged.kernel_spec import ITEM_DTYPE
from cupaged.schedule import IntArray
from cupaged.staging import Upload, upload
from cupaged.variant_tables import Addresses, spec_tables

#: Parts of the block begin at multiples of this many int32.
_ALIGNMENT = 64
_ITEM_WORDS = ITEM_DTYPE.itemsize // 4
#: Counters of a launch, see `params.cuh`. In int32.
_WORK_COUNTERS = 4

_NO_TABLES = Addresses()

#: Seconds that an answer is worth waiting for, an entry of the page table: as long as the host
#: itself would be looking.
_PATIENCE = 2e-9


@lru_cache(maxsize=64)
def _functions(recipe: Recipe, arch: int, device: int) -> tuple[int, int]:
    """`CUfunction`s: the kernel that attends, and the one that builds the schedule."""
    return (
        kernels.load(recipe.config, arch, device),
        kernels.load(device_schedule.KERNEL, arch, device),
    )


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
        It is not, where it is busy.

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
        recipe, lengths, tiles, _ = outlined
        spec = recipe.spec
        super().__init__(spec, device)
        # Compiled first: should that fail, nothing has been allocated or copied.
        kernel, builder = _functions(recipe, self._arch, device)
        # Uploaded: the lengths, what variants read, and last the pages.
        tables = spec_tables(spec)
        parts, size = [], 0
        for part in (
            *(lengths.qo_indptr, lengths.kv_len, lengths.paged_kv_indptr),
            *(*tables.values(), page_indices),
        ):
            parts.append((size, part))
            size += -(-len(part) // _ALIGNMENT) * _ALIGNMENT
        # Made there: items, work counters, merge counters; and partial states.
        num_items = tiles + recipe.partials
        counters = size + num_items * _ITEM_WORDS
        end = counters + _WORK_COUNTERS + recipe.num_merge_counters
        end = -(-end // _ALIGNMENT) * _ALIGNMENT
        needed = recipe.partial_bytes if workspace is None else 0
        cuda = cupy().cuda
        self._workspace = workspace
        self._block = block = cuda.alloc(4 * end + needed)
        base = block.ptr
        partials = base + 4 * end if workspace is None else workspace.data.ptr
        qo_indptr, kv_len, kv_indptr, *others, pages = [base + 4 * begin for begin, _ in parts]
        items, work_counters = base + 4 * size, base + 4 * counters
        merge_counters = work_counters + 4 * _WORK_COUNTERS
        self.question = question = None
        self.stream = stream = cuda.get_current_stream()
        if highest_page is not None and stream.done:  # else there is no answer in time
            patience = _PATIENCE * len(page_indices)
            self.question = question = Question(
                *(pages, kv_indptr, len(lengths.kv_len), highest_page, patience)
            )

        def build() -> None:
            device_schedule.launch(
                *(outlined, builder, (qo_indptr, kv_len, kv_indptr)),
                *((items, work_counters, merge_counters), question, stream.ptr),
            )

        uploaded = parts[-1][0] + len(page_indices)
        self.uploaded = upload([Upload(block, uploaded, parts)], device, stream, build)
        self.launches = (
            ready(
                *(spec, recipe.config, min(recipe.num_slots, num_items * spec.num_kv_heads)),
                *(kernel, (items, pages), (partials, recipe.partial_rows)),
                *((work_counters, merge_counters), -1),
                Addresses(**dict(zip(tables, others, strict=True))) if tables else _NO_TABLES,
            ),
        )
