"""What the wrappers of attention over a paged cache share: running a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from cupaged import arrays, torch_ops, validate, validate_run
from cupaged import backend as backend_room
from cupaged.planned_attention import PlannedAttention
from cupaged.replan import replan
from cupaged.spec import DTYPES, AttentionSpec

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


class PagedAttention(PlannedAttention):
    """A plan of a ragged batch, and the attention that was planned.

    Parameters
    ----------
    float_workspace_buffer, kv_layout, backend, graph_buffers
        As `PlannedAttention` takes them.
    """

    #: Where the number of q's rows comes from.
    _rows_are: ClassVar[str]
    #: `run()` is not without sinks.
    needs_sinks: ClassVar[bool] = False
    #: What `run()` calls K and V.
    _kv_names: ClassVar[tuple[str, str]] = ("k cache", "v cache")

    run: Callable[..., Any]

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

    def _check_window(self, window_left: Any) -> None:
        """Refuse a window that isn't the planned one."""
        if self._plan is not None:
            planned = self._plan.spec.window_left
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

    def check_pages(self, plan: backend_room.Plan, num_pages: int) -> None:
        """Refuse a cache of fewer pages than were planned."""
        self._check_range(plan.page_indices, plan.highest_page, plan.lengths, num_pages)

    def output_shape(self, num_rows: int) -> tuple[int, int, int]:
        """Shape of the output for so many rows of q."""
        if self._plan is None:
            raise RuntimeError("run() before plan()")
        spec = self._plan.spec
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
        spec = plan.spec
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
            self.check_pages(plan, num_pages)
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

    @contextmanager
    def _planned_with(self, causal: Any, mode: Any, features: dict[str, Any]) -> Iterator[None]:
        """Plan the same batch with the features of a `forward()`, as `replan` takes them.

        Should the call fail, the plan before it stays.
        """
        before = self._plan
        if before is not None:
            fixed = self._graph is not None
            self._plan = replan(before, self._names, causal, mode, features, fixed)
        try:
            yield
        except BaseException:
            self._plan = before
            raise


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
