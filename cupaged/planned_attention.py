"""What the wrappers of attention over a paged cache plan, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from cupaged import arrays, schedule, torch_ops, validate, validate_lengths, validate_run
from cupaged import backend as backend_room
from cupaged.graph import Graph
from cupaged.graph_buffers import GraphBuffers
from cupaged.schedule import IntArray, Lengths
from cupaged.spec import AttentionSpec, KVLayout
from cupaged.validate_lengths import Names

if TYPE_CHECKING:
    from cupaged.masks import CustomMask

#: Index arrays that can't be on a device.
_ON_THE_HOST = (np.ndarray, list, tuple, range)


class PlannedAttention:
    """A plan of a ragged batch.

    Parameters
    ----------
    float_workspace_buffer : array or None
    kv_layout : {"NHD", "HND"}
    backend : {"auto", "reference", "cuda"}
    graph_buffers : GraphBuffers or None
        What a plan may hold at most whose run is recorded in a CUDA graph; None where none is.
    """

    #: What `plan()` calls its arguments.
    _names: ClassVar[Names]
    #: Page tables list pages, of which a request hardly means to have one twice.
    _pages_may_repeat: ClassVar[bool] = True
    #: Devices may build schedules, whose plans have memory for any split of a batch of their size.
    _devices_build: ClassVar[bool] = True

    def __init__(
        self,
        float_workspace_buffer: Any,
        kv_layout: str,
        backend: str,
        graph_buffers: GraphBuffers | None,
    ) -> None:
        self.kv_layout = cast(KVLayout, validate.choice(kv_layout, "kv_layout", ("NHD", "HND")))
        known = (*backend_room.BACKENDS, *backend_room.ALIASES)
        chosen = validate.choice(backend, "backend", known)
        self._backend = cast(backend_room.Backend, backend_room.ALIASES.get(chosen, chosen))
        if graph_buffers is not None and backend == "reference":
            raise ValueError("use_cuda_graph=True with backend='reference', which launches nothing")
        self._graph = None if graph_buffers is None else Graph(graph_buffers)
        self._plan: backend_room.Plan | None = None
        # Plans that a CUDA graph holds though the wrapper was not made for one: they stay as they
        # are, whatever is planned after them.
        self._recorded: set[backend_room.Plan] = set()
        self.reset_workspace_buffer(float_workspace_buffer)

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plans keep their addresses, so that a CUDA graph may hold a run."""
        return self._graph is not None

    def reset_workspace_buffer(
        self, float_workspace_buffer: Any, int_workspace_buffer: Any = None
    ) -> None:
        """Take another workspace from the next `plan()` on.

        Parameters
        ----------
        float_workspace_buffer : array or None
            As the constructor takes it.
        int_workspace_buffer : array, optional
            For FlashInfer's callers; the library's index arrays are its own.

        Raises
        ------
        RuntimeError
            A run is recorded in a CUDA graph, which holds the present workspace.
        """
        workspace = None
        if float_workspace_buffer is not None:
            workspace = arrays.import_tensor(float_workspace_buffer, "float_workspace_buffer")
            validate_run.workspace(workspace, float_workspace_buffer)
        if self._graph is not None:
            self._graph.let_go()
        self._workspace = workspace
        self._workspace_owner = float_workspace_buffer

    def _take(
        self,
        spec: AttentionSpec,
        lengths: Lengths,
        indices: Any,
        index_arrays: tuple[Any, ...],
        fixed_split_size: Any,
        disable_split_kv: Any,
        non_blocking: Any,
        equal_rows: int | None = None,
        mask: CustomMask | None = None,
    ) -> None:
        """The rest of `plan()`, once the lengths are known.

        Parameters
        ----------
        spec : AttentionSpec
        lengths : Lengths
        indices : array
            The page table, as the caller gave it.
        index_arrays : tuple of array
            All that the caller gave: where they live is planned for.
        fixed_split_size, disable_split_kv, non_blocking
            As the caller gave them.
        equal_rows : int, optional
            Rows of q of every request, where they can't be anything else.
        mask : CustomMask, optional
        """
        choices = validate.plan_choices(fixed_split_size, disable_split_kv, non_blocking)
        pages, highest = validate_lengths.page_indices(
            arrays.import_index(indices, self._names.indices), lengths, self._names
        )
        validate_lengths.warn_of_too_few_keys(spec, lengths, self._names)
        self._schedule(spec, lengths, pages, highest, index_arrays, choices, equal_rows, mask)

    def _schedule(
        self,
        spec: AttentionSpec,
        lengths: Lengths,
        pages: IntArray,
        highest: int,
        index_arrays: tuple[Any, ...],
        choices: validate.PlanChoices,
        equal_rows: int | None = None,
        mask: CustomMask | None = None,
    ) -> None:
        """The rest of `_take()`, once the page table is known to be right.

        Parameters
        ----------
        pages : int32 array
            The page table.
        highest : int
            What `_check_range()` compares with.
        choices : PlanChoices
        spec, lengths, index_arrays, equal_rows, mask
            As `_take()` takes them.
        """
        splits = (choices.fixed_split_size, choices.disable_split_kv)
        device, stream = self.planning_place(index_arrays)
        if device is not None:
            backend_room.refuse_recording(stream)
        with arrays.on(device, stream):
            if self._graph is None:
                plan = self._plan_anew(
                    spec, lengths, pages, highest, splits, device, mask, equal_rows
                )
            else:
                assert device is not None  # which planning_place() has seen to
                if self._pages_may_repeat:
                    validate_lengths.warn_of_repeated_pages(lengths, pages, highest, self._names)
                plan = self._graph.plan(
                    *(spec, lengths, pages, highest, splits, equal_rows, device, mask),
                    *(self._workspace, self._names, self._check_range),
                )
            if device is not None and not choices.non_blocking:
                plan.on_device(device).wait()
        self._plan = plan
        torch_ops.register(self)

    def _plan_anew(
        self,
        spec: AttentionSpec,
        lengths: Lengths,
        pages: IntArray,
        highest: int,
        splits: tuple[int | None, bool],
        device: int | None,
        mask: CustomMask | None,
        equal_rows: int | None,
    ) -> backend_room.Plan:
        """A plan with memory of its own, on the current device."""
        found, ask = None, self._pages_may_repeat
        arguments = (spec, lengths, pages, highest, self._workspace, ask)
        if device is not None and self._devices_build and (mask, *splits) == (None, None, False):
            found = backend_room.plan_on_device(*arguments, device, equal_rows)
        plan, question = found or backend_room.plan_on_host(*arguments, device, splits, mask)
        # Unless the device has found that no request has a page twice.
        if ask and (question is None or not question.is_denied()):
            validate_lengths.warn_of_repeated_pages(lengths, pages, highest, self._names)
        return plan

    def planning_place(self, index_arrays: tuple[Any, ...]) -> tuple[int | None, int]:
        """The CUDA device to plan for, None for the host, and the stream to upload on.

        Those of the workspace or of an index array; where all are on the host, the current ones.
        """
        if self._graph is not None and self._graph.buffers.owner is not None:
            buffers = self._graph.buffers
            owner = buffers.owner
            device = arrays.device_id(
                buffers.custom_mask if buffers.indices is None else buffers.indices
            )
            if self._workspace is not None:
                validate_run.workspace_device(self._workspace, device, "the buffers are")
            return device, arrays.caller_stream(owner)
        if self._workspace is not None:
            device = arrays.device_id(self._workspace)
            if device is None and self._graph is not None:
                raise ValueError(
                    "float_workspace_buffer is on the host, expected a CUDA device: "
                    "use_cuda_graph=True"
                )
            return device, 0 if device is None else arrays.caller_stream(self._workspace_owner)
        for index in index_arrays:
            if not isinstance(index, _ON_THE_HOST):
                device = arrays.device_id(arrays.import_tensor(index, "index array"))
                if device is not None:
                    return device, arrays.caller_stream(index)
        backend = "cuda" if self._graph is not None else self._backend
        device, stream = backend_room.current_place(backend)
        if device is not None:
            for index in index_arrays:
                if not isinstance(index, _ON_THE_HOST):
                    # PyTorch's, on the host: its stream is the one that the caller works on.
                    return device, arrays.caller_stream(index, device)
            if self._graph is not None and not stream:
                # Nothing orders a graph behind the plan, and who replays it may be in PyTorch.
                stream = arrays.torch_stream(device)
        return device, stream

    def _check_range(
        self, pages: schedule.IntArray, highest: int, lengths: Lengths, num_pages: int
    ) -> None:
        """Refuse a page table of more than what `_keys_and_values()` found there to be."""
        validate_lengths.page_range(pages, highest, lengths, num_pages, self._names)

    def end_forward(self) -> None:
        """Nothing: FlashInfer's programs of old end with it what `begin_forward()` begins."""

    def explain(self) -> str:
        """The plan as text: tiles, splits, work for each thread block, predicted imbalance.

        Raises
        ------
        RuntimeError
            There is no plan yet.
        """
        if self._plan is None:
            raise RuntimeError("explain() before plan()")
        from cupaged.explain import explain  # which nothing else needs

        return explain(self._plan.schedule)


def dtype_names(q: Any, kv: Any, o: Any) -> tuple[str, str, str]:
    """Names of the dtypes of q, of K and V, and of the output; the latter two follow q's."""
    name = arrays.dtype_name(q, "q_data_type")
    return (
        name,
        name if kv is None else arrays.dtype_name(kv, "kv_data_type"),
        name if o is None else arrays.dtype_name(o, "o_data_type"),
    )
