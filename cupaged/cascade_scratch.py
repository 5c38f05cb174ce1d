"""Memory for the states of a cascade's levels; under CUDA graphs, always the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cupaged import arrays
from cupaged.devices import cupy, is_recorded
from cupaged.spec import DTYPES, AttentionSpec


class Scratch(NamedTuple):
    """States of all levels, but for the last one's output, which goes where the result goes.

    Attributes
    ----------
    v : array [num_levels - 1, max_rows, num_qo_heads, head_dim]
    s : float32 array [num_levels, max_rows, num_qo_heads]
    mask : uint8 cupy.ndarray [max_rows] or None
        1 where the plan has a row; None where it has them all.
    """

    v: Any
    s: Any
    mask: Any

    def fits(self, num_rows: int, spec: AttentionSpec, device: int) -> bool:
        """Whether there is room for a run."""
        max_rows, *inner = self.v.shape[1:]
        made_for = (inner, self.v.dtype, arrays.device_id(self.v))
        wanted = ([spec.num_qo_heads, spec.head_dim_vo], DTYPES[spec.dtype], device)
        return bool(max_rows >= num_rows) and made_for == wanted


def scratch(num_levels: int, num_rows: int, spec: AttentionSpec, device: int | None) -> Scratch:
    """Memory on the host, or on the current device in the order of its current stream."""
    module = np if device is None else cupy()
    rows = (num_rows, spec.num_qo_heads)
    v = module.empty((num_levels - 1, *rows, spec.head_dim_vo), DTYPES[spec.dtype])
    return Scratch(v, module.empty((num_levels, *rows), np.float32), None)


def refuse_capture(stream: int) -> None:
    """Refuse to record a run whose memory will be another's before the graph is replayed."""
    if is_recorded(stream):
        raise RuntimeError(
            "run() is being recorded in a CUDA graph: construct the wrapper with "
            "use_cuda_graph=True"
        )


class GraphScratch:
    """Memory that stays for as long as a wrapper whose runs are recorded in CUDA graphs.

    Parameters
    ----------
    num_levels : int
    """

    def __init__(self, num_levels: int) -> None:
        self._num_levels = num_levels
        self._num_rows = 0
        # All of it, since runs that are recorded may hold any.
        self._kept: list[Scratch] = []

    def plan(self, num_rows: int, spec: AttentionSpec, device: int, stream: int) -> None:
        """Make room for a plan, and let the runs that are recorded pass over rows it doesn't have.

        Parameters
        ----------
        num_rows : int
            Rows of q that are planned.
        spec : AttentionSpec
        device, stream : int
            The current ones.
        """
        self._num_rows = num_rows
        if self._find(num_rows, spec, device) is None:
            self._keep(num_rows, spec, device)
        for kept in self._kept:
            if arrays.device_id(kept.v) == device:
                self._write_mask(kept, stream)

    def run(self, num_rows: int, spec: AttentionSpec, device: int, stream: int) -> Scratch:
        """Memory for a run.

        Parameters
        ----------
        num_rows : int
            Rows of q, at least those planned.
        spec : AttentionSpec
        device, stream : int
            The current ones.

        Raises
        ------
        RuntimeError
            There is none, and a CUDA graph is being captured.
        """
        found = self._find(num_rows, spec, device)
        if found is not None:
            return found
        if is_recorded(stream):
            raise RuntimeError(
                f"run() in the capture of a CUDA graph with {num_rows} rows of q, for which no "
                "memory is kept: call it once before, or plan() with as many rows"
            )
        kept = self._keep(num_rows, spec, device)
        self._write_mask(kept, stream)
        return kept

    def _find(self, num_rows: int, spec: AttentionSpec, device: int) -> Scratch | None:
        return next((kept for kept in self._kept if kept.fits(num_rows, spec, device)), None)

    def _keep(self, num_rows: int, spec: AttentionSpec, device: int) -> Scratch:
        v, s, _ = scratch(self._num_levels, num_rows, spec, device)
        kept = Scratch(v, s, cupy().empty(num_rows, np.uint8))
        self._kept.append(kept)
        return kept

    def _write_mask(self, kept: Scratch, stream: int) -> None:
        memset = cupy().cuda.runtime.memsetAsync
        planned = min(self._num_rows, len(kept.mask))
        if planned:
            memset(kept.mask.data.ptr, 1, planned, stream)
        if planned < len(kept.mask):
            memset(kept.mask.data.ptr + planned, 0, len(kept.mask) - planned, stream)
