"""What the wrappers of attention over a paged cache share: a plan, and running it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from cupaged import arrays, schedule, torch_ops, validate, validate_lengths, validate_run
from cupaged import backend as backend_room
from cupaged.graph import Graph
from cupaged.graph_buffers import GraphBuffers
from cupaged.replan import replan
from cupaged.schedule import Lengths
from cupaged.spec import DTYPES, AttentionSpec, KVLayout
from cupaged.validate_lengths import Names

if TYPE_CHECKING:
    from cupaged.masks import CustomMask

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

#: Index arrays that can't be on a device.
_ON_THE_HOST = (np.ndarray, list, tuple, range)


class PagedAttention:
    """A plan of a ragged batch, and the attention that was planned.

    Parameters
    ----------
    float_workspace_buffer : array or None
    kv_layout : {"NHD", "HND"}
    backend : {"auto", "reference", "cuda"}
    graph_buffers : GraphBuffers or None
        What a plan may hold at most whose run is recorded in a CUDA graph; None where none is.
    """

    #: What `plan()` calls its arguments, and where the number of q's rows comes from.
    _names: ClassVar[Names]
    _rows_are: ClassVar[str]
    #: What `run()` calls K and V.
    _kv_names: ClassVar[tuple[str, str]] = ("k cache", "v cache")

    run: Callable[..., Any]

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
            validate_run.workspace(workspace)
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
        names = self._names
        choices = validate.plan_choices(fixed_split_size, disable_split_kv, non_blocking)
        pages, highest = validate_lengths.page_indices(
            arrays.import_index(indices, names.indices), lengths, names
        )
        validate_lengths.warn_of_mistakes(spec, lengths, pages, highest, names)
        self._schedule(spec, lengths, pages, highest, index_arrays, choices, equal_rows, mask)

    def _schedule(
        self,
        spec: AttentionSpec,
        lengths: Lengths,
        pages: schedule.IntArray,
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
        if self._graph is None:
            model = backend_room.device_model(device)
            built = schedule.build(spec, lengths, model, *splits, mask=mask)
            if self._workspace is not None:
                validate_run.workspace_size(self._workspace, built.workspace_bytes)
            plan = backend_room.Plan(built, pages, highest, self._workspace)
            if device is not None:
                with arrays.on(device, stream):
                    placed = plan.on_device(device)
        else:
            assert device is not None  # which planning_place() has seen to
            with arrays.on(device, stream):
                plan = self._graph.plan(
                    *(spec, lengths, pages, highest, splits, equal_rows, device, mask),
                    *(self._workspace, self._names, self._check_range),
                )
                placed = plan.on_device(device)
        if device is not None and not choices.non_blocking:
            placed.wait()
        self._plan = plan
        torch_ops.register(self)

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

    def _keys_and_values(self, cache: Any, q: Any, spec: AttentionSpec) -> tuple[Any, Any, int]:
        """K and V as `run()` was given them, imported and checked, and what `_check_range()` asks.

        Parameters
        ----------
        cache
            As the caller gave it.
        q : array
            The caller's, on whose stream they will be read.
        spec : AttentionSpec
        """
        return validate_run.cache(import_cache(cache, q), spec)

    def _check_range(
        self, pages: schedule.IntArray, highest: int, lengths: Lengths, num_pages: int
    ) -> None:
        """Refuse a page table of more than what `_keys_and_values()` found there to be."""
        validate_lengths.page_range(pages, highest, lengths, num_pages, self._names)

    def _check_window(self, window_left: Any) -> None:
        """Refuse a window that isn't the planned one."""
        if self._plan is not None:
            planned = self._plan.schedule.spec.window_left
            validate.window_as_planned(window_left, planned)

    def _attend(
        self,
        q: Any,
        paged_kv_cache: Any,
        q_scale: Any,
        k_scale: Any,
        v_scale: Any,
        out: Any,
        lse: Any,
        return_lse: Any,
        lse_base: Any,
        sinks: Any = None,
    ) -> Any:
        """The rest of `run()`, once what is not served has been refused."""
        if torch_ops.is_compiling():
            scales = (q_scale, k_scale, v_scale)
            return torch_ops.run(
                self, q, paged_kv_cache, scales, out, lse, return_lse, lse_base, sinks
            )
        return self.attend(
            *(q, paged_kv_cache, q_scale, k_scale, v_scale, out, lse, return_lse, lse_base, sinks)
        )

    def output_shape(self, num_rows: int) -> tuple[int, int, int]:
        """Shape of the output for so many rows of q."""
        if self._plan is None:
            raise RuntimeError("run() before plan()")
        spec = self._plan.schedule.spec
        return num_rows, spec.num_qo_heads, spec.head_dim_vo

    def attend(
        self,
        q: Any,
        paged_kv_cache: Any,
        q_scale: Any,
        k_scale: Any,
        v_scale: Any,
        out: Any,
        lse: Any,
        return_lse: Any,
        lse_base: Any,
        sinks: Any,
    ) -> Any:
        """`run()` in the order of its arguments, all of them; `torch.compile` can't see it."""
        plan = self._plan
        if plan is None:
            raise RuntimeError("run() before plan()")
        spec = plan.schedule.spec
        queries = arrays.import_tensor(q, "q")
        keys, values, num_pages = self._keys_and_values(paged_kv_cache, q, spec)
        num_rows = validate_run.query(
            *(queries, spec, plan.nnz_qo, self._rows_are, self._names.head_dim),
            more=self._graph is not None,
        )
        device = validate_run.one_device(queries, keys, values, self._kv_names)
        validate_run.backend_serves(self._backend, device)
        if plan.workspace is not None:
            validate_run.workspace_device(plan.workspace, device, "q is")
        if plan.highest_page >= num_pages:
            lengths = plan.schedule.lengths
            self._check_range(plan.page_indices, plan.highest_page, lengths, num_pages)
        if sinks is not None:
            sinks = arrays.import_tensor(sinks, "sinks", q)
            validate_run.sinks(sinks, spec, device)
        factors = (
            LOG2_E * validate.logit_scale(spec.sm_scale, q_scale, k_scale),
            1.0 if v_scale is None else validate.scale(v_scale, "v_scale"),
            LN_2 if validate.choice(lse_base, "lse_base", ("log2", "ln")) == "ln" else 1.0,
        )
        want_lse = validate.flag(return_lse, "return_lse") or lse is not None
        rows = (num_rows, spec.num_qo_heads)
        result, result_lse = None, None
        if out is not None:
            result = arrays.import_tensor(arrays.writable(out, "out"), "out", q)
            validate_run.given(result, "out", (*rows, spec.head_dim_vo), queries.dtype, device)
        if lse is not None:
            result_lse = arrays.import_tensor(arrays.writable(lse, "lse"), "lse", q)
            validate_run.given(result_lse, "lse", rows, DTYPES["float32"], device)
        if self._graph is not None and device is None:
            raise ValueError("q is on the host, expected a CUDA device: use_cuda_graph=True")
        current, stream = arrays.on_stream_of(q, device)
        with current:
            if result is None:
                result, out = arrays.allocate_output(
                    (*rows, spec.head_dim_vo), queries.dtype, queries, q
                )
            if result_lse is None and want_lse:
                result_lse, lse = arrays.allocate_output(rows, DTYPES["float32"], queries, q)
            # Without rows there is nothing to launch, unless another plan has them.
            if plan.nnz_qo or (self._graph is not None and num_rows):
                tensors = (queries, keys, values, result, result_lse)
                if plan.run(device, stream, tensors, factors, sinks):
                    self._note_recorded(plan, num_rows, num_pages)
            if out is None:
                out = arrays.export(result, q)
            if lse is None and return_lse:
                lse = arrays.export(result_lse, q)
        return (out, lse) if return_lse else out

    def _note_recorded(self, plan: backend_room.Plan, num_rows: int, num_pages: int) -> None:
        """Remember a run that a CUDA graph holds."""
        if self._graph is not None:
            self._graph.note_recorded(num_rows, num_pages)
        else:
            self._recorded.add(plan)

    def run_return_lse(self, *args: Any, **options: Any) -> Any:
        """`run()` with `return_lse=True`.

        Parameters
        ----------
        *args, **options
            As `run()` takes them, but for `return_lse`.

        Returns
        -------
        out : array [rows of q, num_qo_heads, head_dim]
        lse : float32 array [rows of q, num_qo_heads]

        Raises
        ------
        TypeError, ValueError, RuntimeError, NotImplementedError, BackendUnavailableError
            As `run()` does.
        """
        return self.run(*args, return_lse=True, **options)

    def _plan_features(self, causal: Any, mode: Any, features: dict[str, Any]) -> None:
        """Plan the same batch with the features that `forward()` names, as `replan` takes them."""
        if self._plan is not None:
            fixed = self._graph is not None
            self._plan = replan(self._plan, self._names.head_dim, causal, mode, features, fixed)

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


def import_cache(paged_kv_cache: Any, q: Any) -> Any:
    """K and V, or both stacked, ordered behind what is pending on their owners' streams."""
    if isinstance(paged_kv_cache, tuple | list):
        if len(paged_kv_cache) != 2:
            raise ValueError(
                f"paged_kv_cache has {len(paged_kv_cache)} arrays, expected two: (k, v)"
            )
        k, v = paged_kv_cache
        return arrays.import_tensor(k, "k cache", q), arrays.import_tensor(v, "v cache", q)
    return arrays.import_tensor(paged_kv_cache, "paged_kv_cache", q)
