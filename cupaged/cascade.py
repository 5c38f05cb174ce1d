"""Attention over shared prefixes, each of which is computed once: the public wrapper."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

from cupaged import (
    arrays,
    flashinfer_modules,
    merge_cuda,
    unserved,
    validate,
    validate_cascade,
    validate_run,
)
from cupaged.cascade_scratch import GraphScratch, refuse_capture, scratch
from cupaged.errors import CupagedWarning, warn
from cupaged.merge import States
from cupaged.merging import merge_where_they_are
from cupaged.opaque import opaque
from cupaged.paged_attention import import_cache
from cupaged.planned_attention import dtype_names
from cupaged.prefill import BatchPrefillWithPagedKVCacheWrapper
from cupaged.spec import DTYPES, AttentionSpec
from cupaged.validate_cascade import Level, of_level

_FLOAT32 = DTYPES["float32"]
_ROWS_ARE = "qo_indptr[-1] of every level"


class _Planned(NamedTuple):
    """A plan of every level."""

    spec: AttentionSpec
    levels: tuple[Level, ...]
    wrappers: tuple[BatchPrefillWithPagedKVCacheWrapper, ...]

    @property
    def num_rows(self) -> int:
        return self.levels[0].lengths.nnz_qo


class MultiLevelCascadeAttentionWrapper:
    """Attention of a batch whose requests share prefixes, each of which is computed once.

    Keys lie in levels. Those of level 0 are shared by the most rows of q, those of the last level
    belong to one request each; a row attends to the keys that its group has at every level. Each
    level is a batch of its own, whose requests are the groups; their states are merged at the end.

    Parameters
    ----------
    num_levels : int
    float_workspace_buffer : array, optional
        Device memory for the partial states of split requests, as
        `BatchPrefillWithPagedKVCacheWrapper` takes it; the levels take turns with it.
    kv_layout : {"NHD", "HND"}
        Order of the cache's axes.
    use_cuda_graph : bool
        `run()` may be recorded in a CUDA graph, and another `plan()` then changes what the graph
        computes.
    qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, \
paged_kv_last_page_len_buf_arr : list of int32 array, optional
        With `use_cuda_graph`, each level's buffers, as `BatchPrefillWithPagedKVCacheWrapper` takes
        them.
    backend : {"auto", "reference", "cuda"}
        "auto" takes host arrays to the reference backend and device arrays to the GPU.
    max_batch_size_arr, max_num_pages_arr : list of int, optional
        With `use_cuda_graph` and no buffers: the most requests of each level's plan, and entries of
        its page table.

    Notes
    -----
    Each level's output is rounded to q's dtype; merging is done in float32 and rounds once more.
    Beside plain attention over all of a row's keys, that is one more rounding of the output's dtype
    at the largest magnitude of a level's output.

    Run one plan on one stream at a time. With `use_cuda_graph`, what
    `BatchPrefillWithPagedKVCacheWrapper` says of graphs holds here too: a plan may have fewer rows
    of q than a recorded run, and leaves the others of its output as they are.
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: Any = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Any = None,
        paged_kv_indptr_buf_arr: Any = None,
        paged_kv_indices_buf_arr: Any = None,
        paged_kv_last_page_len_buf_arr: Any = None,
        backend: str = "auto",
        max_batch_size_arr: Any = None,
        max_num_pages_arr: Any = None,
    ) -> None:
        self._num_levels = validate.positive_int(num_levels, "num_levels")
        self._shared: dict[str, Any] = {
            "kv_layout": kv_layout,
            "use_cuda_graph": use_cuda_graph,
            "backend": backend,
        }
        of_levels = {
            "qo_indptr_buf": qo_indptr_buf_arr,
            "paged_kv_indptr_buf": paged_kv_indptr_buf_arr,
            "paged_kv_indices_buf": paged_kv_indices_buf_arr,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len_buf_arr,
            "max_batch_size": max_batch_size_arr,
            "max_num_pages": max_num_pages_arr,
        }
        self._of_levels = {
            name: validate_cascade.one_each(values, f"{name}_arr", self._num_levels)
            for name, values in of_levels.items()
            if values is not None
        }
        self._workspace = float_workspace_buffer
        self._wrappers = self._new_wrappers()
        self._planned: _Planned | None = None
        self._why_no_plan = "run() before plan()"
        self._graph = GraphScratch(self._num_levels) if self.is_cuda_graph_enabled else None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plans keep their addresses, so that a CUDA graph may hold a run."""
        return self._wrappers[0].is_cuda_graph_enabled

    def _new_wrappers(self) -> tuple[BatchPrefillWithPagedKVCacheWrapper, ...]:
        wrappers = []
        for i in range(self._num_levels):
            own = {name: values[i] for name, values in self._of_levels.items()}
            with of_level(i if own else None):
                wrapper = BatchPrefillWithPagedKVCacheWrapper(
                    self._workspace, **self._shared, **own
                )
            wrappers.append(wrapper)
        return tuple(wrappers)

    def reset_workspace_buffer(
        self, float_workspace_buffer: Any, int_workspace_buffers: Any = None
    ) -> None:
        """Take another workspace from the next `plan()` on.

        Parameters
        ----------
        float_workspace_buffer : array or None
            As the constructor takes it.
        int_workspace_buffers : list of array, optional
            For FlashInfer's callers; the library's index arrays are its own.

        Raises
        ------
        RuntimeError
            A run is recorded in a CUDA graph, which holds the present workspace.
        """
        for wrapper in self._wrappers:
            wrapper.reset_workspace_buffer(float_workspace_buffer)
        self._workspace = float_workspace_buffer

    def plan(
        self,
        qo_indptr_arr: Any,
        paged_kv_indptr_arr: Any,
        paged_kv_indices_arr: Any,
        paged_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        """Schedule every level.

        Parameters
        ----------
        qo_indptr_arr : list of int array [batch + 1]
            For each level, the rows of q that share keys there: rows
            `qo_indptr[g]..qo_indptr[g + 1] - 1` are group `g`. All levels end at the same number of
            rows, and a group is made of whole groups of the next level.
        paged_kv_indptr_arr : list of int array [batch + 1]
            For each level, the entries of its page table that belong to each group.
        paged_kv_indices_arr : list of int array [>= paged_kv_indptr[-1]]
            For each level, page numbers; all levels have their pages in one cache.
        paged_kv_last_page_len : list of int array [batch]
            For each level, the tokens in each group's last page, 1 to `page_size`.
        num_qo_heads, num_kv_heads : int
            The first a multiple of the second.
        head_dim : {64, 96, 128, 256}
        page_size : int
            Tokens of a page.
        causal : bool
            At the last level, row `i` of a request sees keys up to `kv_len - qo_len + i` of those
            that it has there. All keys of the other levels are seen.
        sm_scale : float, optional
            What multiplies `q·k`; by default `1 / sqrt(head_dim)`.
        logits_soft_cap : float, optional
            Logits `x` become `cap * tanh(x / cap)`, where it is more than 0.
        q_data_type, kv_data_type : dtype or str
            "float16" or "bfloat16"; the second follows the first. K and V may be "float8_e4m3fn" or
            "float8_e5m2" too.
        pos_encoding_mode, window_left, rope_scale, rope_theta
            With one level, as `BatchPrefillWithPagedKVCacheWrapper` takes them. Over several they
            have no meaning, as a row has no place among the keys of a level: anything but the
            default raises `NotImplementedError`.
        use_fp16_qk_reduction
            Not served; anything but the default raises `NotImplementedError`.

        Raises
        ------
        TypeError, ValueError
            An argument is of the wrong kind or has a wrong value; names the level and the request.
            The plan before it stands.
        NotImplementedError
            A legal request that no backend serves.
        BackendUnavailableError
            `backend="cuda"` without CuPy, NVRTC or a GPU.

        Warns
        -----
        CupagedWarning
            `causal` with more queries than keys in a request of the last level; a page twice in a
            request; a page that a level above has for the same rows.

        Notes
        -----
        With `use_cuda_graph`, a plan that the buffers of a level have no room for fails when the
        levels before it have been planned: `run()` then asks for another plan.
        """
        unserved.refuse(unserved.CASCADE_PLAN, (use_fp16_qk_reduction,))
        spec = validate.attention_spec(
            *(num_qo_heads, num_kv_heads, head_dim, None, page_size, causal, sm_scale),
            *(dtype_names(q_data_type, kv_data_type, None), self._wrappers[0].kv_layout),
            "head_dim",
            validate.Features(
                *(window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta)
            ),
        )
        validate_cascade.features(spec, self._num_levels)
        given = [
            validate_cascade.one_each(values, name, self._num_levels)
            for name, values in (
                ("qo_indptr_arr", qo_indptr_arr),
                ("paged_kv_indptr_arr", paged_kv_indptr_arr),
                ("paged_kv_indices_arr", paged_kv_indices_arr),
                ("paged_kv_last_page_len", paged_kv_last_page_len),
            )
        ]
        levels = []
        for i, index_arrays in enumerate(zip(*given, strict=True)):
            with of_level(i):
                levels.append(validate_cascade.level(index_arrays, spec))
        validate_cascade.nested(levels)
        mistakes = validate_cascade.mistakes(levels, spec.causal)
        for mistake in mistakes:
            warn(mistake)
        device, stream = self._wrappers[0].planning_place(tuple(x for xs in given for x in xs))
        with arrays.on(device, stream), warnings.catch_warnings() if mistakes else nullcontext():
            if mistakes:
                warnings.simplefilter("ignore", CupagedWarning)
            self._plan_levels(spec, tuple(levels), device, stream)

    begin_forward = plan

    def end_forward(self) -> None:
        """Nothing, as for the paged wrapper."""

    def _plan_levels(
        self, spec: AttentionSpec, levels: tuple[Level, ...], device: int | None, stream: int
    ) -> None:
        """Plan every level on the current device, or none."""
        if device is not None and self._num_levels > 1:
            merge_cuda.load(DTYPES[spec.dtype], True, self._num_levels, device, stream)
        wrappers = self._new_wrappers() if self._graph is None else self._wrappers
        for i, (wrapper, level) in enumerate(zip(wrappers, levels, strict=True)):
            with of_level(i):
                wrapper.plan(
                    *level.index_arrays,
                    *(spec.num_qo_heads, spec.num_kv_heads, spec.head_dim_qk, spec.page_size),
                    causal=spec.causal and i == self._num_levels - 1,
                    **validate_cascade.plan_options(spec),
                )
            if self._graph is not None and i == 0:
                assert device is not None  # which the wrapper has seen to
                # The wrappers' arrays are overwritten one after the other.
                self._planned = None
                self._why_no_plan = (
                    "run() after plan() failed with some levels planned and others not: plan again"
                )
                self._graph.plan(level.lengths.nnz_qo, spec, device, stream)
        self._planned = _Planned(spec, levels, wrappers)

    @opaque
    def run(
        self,
        q: Any,
        paged_kv_cache: Any,
        *,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
    ) -> Any:
        """Compute the attention that was planned.

        Parameters
        ----------
        q : array [nnz_qo, num_qo_heads, head_dim]
            Of the planned dtype. Any strides with a contiguous last axis.
        paged_kv_cache : (array, array) or array
            Of all levels, as `BatchPrefillWithPagedKVCacheWrapper.run()` takes it.
        out : array [nnz_qo, num_qo_heads, head_dim], optional
            Where the output goes; a new array where not given. It may be q, and shares no memory
            with K, V or `lse`.
        lse : float32 array [nnz_qo, num_qo_heads], optional
            Where the log-sum-exp of the logits goes.
        return_lse : bool
            Return the log-sum-exp too.

        Returns
        -------
        out : array [nnz_qo, num_qo_heads, head_dim]
            The kind of array that q is, or the one given. A row that sees no key is 0.
        lse : float32 array [nnz_qo, num_qo_heads]
            Only with `return_lse`. Base 2; a row that sees no key has -inf.

        Raises
        ------
        RuntimeError
            There is no plan yet, or the last one failed halfway; or a CUDA graph is being captured
            without `use_cuda_graph`, or with more rows of q than any plan or run before had.
        TypeError, ValueError
            An argument doesn't fit the plan; names it, what was expected and what came.
        BackendUnavailableError
            Device arrays without a GPU or NVRTC that serve them.
        """
        planned = self._planned
        if planned is None:
            raise RuntimeError(self._why_no_plan)
        spec, levels = planned.spec, planned.levels
        queries = arrays.import_tensor(q, "q")
        cache = import_cache(paged_kv_cache, q)
        keys, values, num_pages = validate_run.cache(cache, spec)
        num_rows = validate_run.query(
            *(queries, spec, planned.num_rows, _ROWS_ARE, "head_dim"),
            more=self.is_cuda_graph_enabled,
        )
        device = validate_run.one_device(queries, keys, values)
        # Here, since the levels' own runs come one after the other.
        for i, level in enumerate(levels):
            if level.highest_page >= num_pages:
                with of_level(i):
                    level.check_pages(num_pages)
        want_lse = validate.flag(return_lse, "return_lse") or lse is not None
        shape = (num_rows, spec.num_qo_heads, spec.head_dim_vo)
        result, result_lse = None, None
        if out is not None:
            result = arrays.import_tensor(arrays.writable(out, "out"), "out", q)
            validate_run.given(result, "out", shape, queries.dtype, device)
        if lse is not None:
            result_lse = arrays.import_tensor(arrays.writable(lse, "lse"), "lse", q)
            validate_run.given(result_lse, "lse", shape[:-1], _FLOAT32, device)
        current, stream = arrays.on_stream_of(q, device)
        with current:
            if self._graph is None or device is None:
                if device is not None:
                    refuse_capture(stream)
                found = scratch(self._num_levels, num_rows, spec, device)
            else:
                found = self._graph.run(num_rows, spec, device, stream)
            if result is None:
                result, out = arrays.allocate_output(shape, queries.dtype, queries, q)
            if result_lse is None and want_lse:
                result_lse, lse = arrays.allocate_output(shape[:-1], _FLOAT32, queries, q)
            # The last level's output goes where the result goes, those of the others beside it.
            v_rest, s_rest = found.v[:, :num_rows], found.s[:-1, :num_rows]
            last_lse = found.s[-1, :num_rows] if result_lse is None else result_lse
            targets = [*zip(v_rest, s_rest, strict=True), (result, last_lse)]
            for wrapper, (level_out, level_lse) in zip(planned.wrappers, targets, strict=True):
                wrapper.run(queries, cache, out=level_out, lse=level_lse)
            if len(levels) > 1:
                states = States(result, last_lse, v_rest, s_rest)
                mask = None if found.mask is None else found.mask[:num_rows]
                merge_where_they_are(states, result, last_lse, mask, device, stream)
            if out is None:
                out = arrays.export(result, q)
            if lse is None and return_lse:
                lse = arrays.export(result_lse, q)
        return (out, lse) if return_lse else out

    forward = run


def __getattr__(name: str) -> object:
    return flashinfer_modules.find(__name__, name)
