"""A plan for a CUDA graph: launches that stay as they are, over arrays that change under them."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupaged import kernels
from cupaged.device_plan import PlacedPlan, ready
from cupaged.devices import cupy, device_model
from cupaged.frames import Frame
from cupaged.graph_buffers import GraphBuffers
from cupaged.kernel_spec import ITEM_DTYPE
from cupaged.schedule import IntArray, Schedule
from cupaged.spec import AttentionSpec
from cupaged.staging import Upload, upload
from cupaged.tiles import slots
from cupaged.variant_tables import Addresses, mask_tables, most_seen_words, spec_tables

#: Counters of a launch, see `params.cuh`: two work counters, and the number of its items. In int32.
_HEADER = 4
_NUM_ITEMS = 2
_ITEM_WORDS = ITEM_DTYPE.itemsize // 4


class GraphPlan(PlacedPlan):
    """Launches on one CUDA device, and at fixed addresses the arrays of one schedule after another.

    Parameters
    ----------
    spec : AttentionSpec
    frame : Frame
        The launches, and what fits them.
    buffers : GraphBuffers
    device : int
        CUDA device, the current one.
    workspace : cupy.ndarray, optional
        Bytes for partial states; allocated where not given.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        frame: Frame,
        buffers: GraphBuffers,
        device: int,
        workspace: Any | None,
    ) -> None:
        super().__init__(spec, device)
        self._buffers = buffers
        rooms = list(frame.values())
        # Compiled first: should that fail, nothing has been allocated.
        loaded = [kernels.load(room.config, self._arch, device) for room in rooms]
        memory = cupy().cuda.alloc
        needed = max(room.partial_bytes(spec) for room in rooms)
        self._partials = memory(max(needed, 1)) if workspace is None else workspace.data
        # In one block, by int32: a header for each launch, then each launch's items. Kernels read
        # those by 16 bytes, as headers and items are long.
        begin = len(rooms) * _HEADER
        self._items = []
        for room in rooms:
            self._items.append(begin)
            begin += room.items * _ITEM_WORDS
        self._block = memory(begin * 4)
        self._pages = (
            memory(buffers.max_pages * 4) if buffers.indices is None else buffers.indices.data
        )
        merges = [room.merges * spec.num_kv_heads * room.config.splits_merged_by for room in rooms]
        self._merge_counters = memory(max(4 * sum(merges), 1))
        self.stream = cupy().cuda.get_current_stream()
        # Kernels leave them as zeros.
        self._merge_counters.memset_async(0, max(4 * sum(merges), 1), self.stream)
        tables = spec_tables(spec)
        self._tables = {name: memory(4 * len(table)) for name, table in tables.items()}
        if tables:
            uploads = [_whole(self._tables[name], table) for name, table in tables.items()]
            upload(uploads, device, self.stream)
        if spec.custom_mask:
            sizes = len(buffers.custom_mask), buffers.max_pages * spec.page_size
            seen_words = most_seen_words(buffers.max_batch, *sizes)
            self._tables |= {
                "mask_bits": buffers.custom_mask.data,
                "mask_begin": buffers.mask_indptr.data,
                # FlashInfer's buffers have no room for it.
                "seen_keys": memory(4 * seen_words),
            }
        extras = Addresses(**{name: table.ptr for name, table in self._tables.items()})
        self._configs = [room.config for room in rooms]
        model = device_model(device)
        base = self._block.ptr
        self.launches = tuple(
            ready(
                spec,
                room.config,
                slots(room.config, model),
                kernel,
                (base + items * 4, self._pages.ptr),
                (self._partials.ptr, room.partials * spec.num_kv_heads * room.config.cta_tile_q),
                (base + i * _HEADER * 4, self._merge_counters.ptr + sum(merges[:i]) * 4),
                -1,
                extras,
            )
            for i, (room, kernel, items) in enumerate(zip(rooms, loaded, self._items, strict=True))
        )

    def update(self, schedule: Schedule, page_indices: IntArray) -> None:
        """Put another schedule in the place of the one before, in the current stream's order.

        Parameters
        ----------
        schedule : Schedule
            Built for the frame, of requests and pages that fit the buffers.
        page_indices : int32 [paged_kv_indptr[-1]], on the host
        """
        items = dict.fromkeys(self._configs, np.empty(0, np.int32))
        items.update((launch.config, launch.item_fields) for launch in schedule.launches)
        headers = np.zeros((len(self._configs), _HEADER), np.int32)
        headers[:, _NUM_ITEMS] = [len(items[config]) for config in self._configs]
        parts = [(0, headers.reshape(-1))]
        parts += [
            (begin, items[config].reshape(-1))
            for begin, config in zip(self._items, self._configs, strict=True)
        ]
        last, part = parts[-1]
        uploads = [Upload(self._block, last + len(part), parts)]
        lengths, buffers = schedule.lengths, self._buffers
        uploads += [_whole(self._pages, page_indices)]
        if buffers.indptr is not None:
            uploads.append(_whole(buffers.indptr.data, lengths.paged_kv_indptr))
            uploads.append(_whole(buffers.last_page_len.data, _last_page_len(schedule)))
        if buffers.qo_indptr is not None:
            uploads.append(_whole(buffers.qo_indptr.data, lengths.qo_indptr))
        if schedule.mask is not None:
            uploads += [
                _whole(self._tables[name], table) for name, table in mask_tables(schedule).items()
            ]
        stream = cupy().cuda.get_current_stream()
        if stream.ptr != self.stream.ptr:
            # Runs on other streams hold that of their plan back: behind it, nobody reads any more.
            stream.wait_event(self.stream.record())
        self.stream = stream
        self.uploaded = upload([each for each in uploads if each.size], self.device, self.stream)


def _last_page_len(schedule: Schedule) -> IntArray:
    """Tokens of each request's last page, 0 where it has none."""
    lengths, page_size = schedule.lengths, schedule.spec.page_size
    pages = np.diff(lengths.paged_kv_indptr)
    last: IntArray = lengths.kv_len - np.maximum(pages - 1, 0) * np.int32(page_size)
    return last


def _whole(target: Any, part: IntArray) -> Upload:
    return Upload(target, len(part), [(0, part)])
