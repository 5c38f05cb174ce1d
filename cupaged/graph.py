"""Plans under CUDA graphs: what a recorded run holds fast, and which plans may follow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeAlias

from cupaged import backend, schedule
from cupaged.frames import Frame, bytes_of_a_partial, make_frame
from cupaged.graph_buffers import GraphBuffers
from cupaged.graph_plan import GraphPlan
from cupaged.schedule import IntArray, Lengths, Schedule
from cupaged.spec import AttentionSpec
from cupaged.validate_lengths import Names

if TYPE_CHECKING:
    from cupaged.masks import CustomMask

#: Fields of a spec that `plan()` calls otherwise.
_ARGUMENTS = {"dtype": "q_data_type", "kv_dtype": "kv_data_type"}

#: Refuses a page table, whose highest number is given, of more pages than a cache has.
CheckRange: TypeAlias = Callable[[IntArray, int, Lengths, int], None]


class Graph:
    """The arrays of one plan after another at the same addresses.

    Until a run is recorded they may be made anew, larger or for another spec; from then on a plan
    must fit what was recorded.

    Parameters
    ----------
    buffers : GraphBuffers
    """

    def __init__(self, buffers: GraphBuffers) -> None:
        self.buffers = buffers
        self._placed: GraphPlan | None = None
        self._frame: Frame = {}
        self._made_for: tuple[Any, ...] = ()
        self._max_rows = 0
        # The fewest rows of q and pages of a cache that a recorded run has.
        self._recorded: tuple[int, int] | None = None

    def let_go(self) -> None:
        """Make the arrays anew at the next plan.

        Raises
        ------
        RuntimeError
            A run is recorded.
        """
        if self._recorded is not None:
            raise RuntimeError(
                "reset_workspace_buffer() after run() was recorded in a CUDA graph, which holds "
                "the present workspace: use another wrapper"
            )
        if self._placed is not None:
            self._placed.recordable = False
        self._placed = None

    def note_recorded(self, num_rows: int, num_pages: int) -> None:
        """Remember a run that was recorded, by the rows of its q and the pages of its cache."""
        rows, pages = self._recorded or (num_rows, num_pages)
        self._recorded = min(rows, num_rows), min(pages, num_pages)

    def plan(
        self,
        spec: AttentionSpec,
        lengths: Lengths,
        page_indices: IntArray,
        highest_page: int,
        splits: tuple[int | None, bool],
        equal_rows: int | None,
        device: int,
        mask: CustomMask | None,
        workspace: Any | None,
        names: Names,
        check_range: CheckRange,
    ) -> backend.Plan:
        """A plan in the place of the one before.

        Parameters
        ----------
        spec : AttentionSpec
        lengths : Lengths
        page_indices : int32 [paged_kv_indptr[-1]]
        highest_page : int
        splits : tuple
            `fixed_split_size` and `disable_split_kv`.
        equal_rows : int, optional
            Rows of q that every request has.
        device : int
            CUDA device, the current one.
        mask : CustomMask, optional
        workspace : cupy.ndarray, optional
            The caller's bytes for partial states.
        names : Names
            What the call names its arrays.
        check_range : callable
            How the page table is checked against the caches of recorded runs.

        Raises
        ------
        ValueError
            The plan doesn't fit the buffers, or what was recorded.
        """
        self._check_size(lengths, len(page_indices), names)
        self._check_mask(mask)
        if self._recorded is not None:
            self._check_recorded(spec, lengths, splits, equal_rows, device, names)
            check_range(page_indices, highest_page, lengths, self._recorded[1])
        model = backend.device_model(device)
        max_rows = max(self._max_rows, lengths.nnz_qo)
        if equal_rows is not None:
            max_rows = self.buffers.max_batch * equal_rows
        made_for = (spec, splits, equal_rows, device, max_rows)
        frame = self._frame
        fits = self._placed is not None and (self._recorded or made_for == self._made_for)
        if not fits:
            frame = make_frame(
                *(spec, model, self.buffers.max_batch, max_rows, self.buffers.max_pages),
                *(equal_rows, splits, None if workspace is None else workspace.nbytes),
            )
        built = schedule.build(spec, lengths, model, *splits, frame, mask)
        _check_partials(built, frame, workspace)
        if not fits:
            self._placed = GraphPlan(spec, frame, self.buffers, device, workspace)
            self._frame, self._made_for, self._max_rows = frame, made_for, max_rows
        assert self._placed is not None
        self._placed.update(built, page_indices)
        return backend.Plan(
            built, page_indices, highest_page, workspace, self._placed, only_there=True
        )

    def _check_size(self, lengths: Lengths, num_pages: int, names: Names) -> None:
        batch, buffers = len(lengths.kv_len), self.buffers
        if batch > buffers.max_batch:
            raise ValueError(
                f"{names.indptr} has {batch + 1} entries, expected at most "
                f"{buffers.max_batch + 1}: the buffers of use_cuda_graph=True are for "
                f"{buffers.max_batch} requests"
            )
        if num_pages > buffers.max_pages:
            raise ValueError(
                f"{names.indptr}[{batch}] = {num_pages}, expected at most {buffers.max_pages}: "
                f"the buffers of use_cuda_graph=True are for so many pages"
            )

    def _check_mask(self, mask: CustomMask | None) -> None:
        if mask is None:
            return
        if self.buffers.custom_mask is None:
            raise ValueError(
                "a custom mask with use_cuda_graph=True: expected custom_mask_buf and "
                "mask_indptr_buf, which the constructor takes"
            )
        have, needed = len(self.buffers.custom_mask), -(-len(mask.bits) // 4) * 4
        if needed > have:
            raise ValueError(
                f"the custom mask takes {needed} bytes, packed into words of 4, expected at most "
                f"{have}: custom_mask_buf has so many"
            )

    def _check_recorded(
        self,
        spec: AttentionSpec,
        lengths: Lengths,
        splits: tuple[int | None, bool],
        equal_rows: int | None,
        device: int,
        names: Names,
    ) -> None:
        """Refuse what a recorded run can't follow."""
        assert self._recorded is not None
        before, splits_before, rows_before, device_before, _ = self._made_for
        changes = [("q_len_per_req", rows_before, equal_rows)]  # on which `causal` depends
        arguments = _ARGUMENTS | {"head_dim_qk": names.head_dim}
        changes += [
            (arguments.get(name, name), getattr(before, name), getattr(spec, name))
            for name in (field.name for field in fields(AttentionSpec) if field.compare)
        ]
        changes += [
            ("fixed_split_size", splits_before[0], splits[0]),
            ("disable_split_kv", splits_before[1], splits[1]),
            ("the device", device_before, device),
        ]
        for name, was, given in changes:
            if was != given:
                raise ValueError(
                    f"{name} = {given}, expected {was}: run() was recorded in a CUDA graph with it"
                )
        if lengths.nnz_qo > self._recorded[0]:
            raise ValueError(
                f"the batch has {lengths.nnz_qo} rows of q, expected at most {self._recorded[0]}: "
                "run() was recorded in a CUDA graph with so many"
            )
        if equal_rows is None and lengths.nnz_qo > self._max_rows:
            raise ValueError(
                f"the batch has {lengths.nnz_qo} rows of q, expected at most {self._max_rows}, the "
                "most that were planned for before run() was recorded in a CUDA graph"
            )


def _check_partials(built: Schedule, frame: Frame, workspace: Any | None) -> None:
    """Refuse splits that the caller fixed, and whose partial states don't fit."""
    for launch in built.launches:
        (room,) = (room for room in frame.values() if room.config == launch.config)
        if launch.num_partials > room.partials:
            size = bytes_of_a_partial(built.spec, room.config)
            have = room.partials * size if workspace is None else workspace.nbytes
            raise ValueError(
                f"fixed_split_size = {built.fixed_split_size} takes {launch.num_partials * size} "
                f"bytes of partial states, expected at most {have}: give a float_workspace_buffer "
                "of as many bytes before run() is recorded in a CUDA graph"
            )
