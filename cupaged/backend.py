"""Which backend serves a call; the one room that knows both."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from cupaged import (
    cuda,
    device_pages,
    device_schedule,
    devices,
    reference,
    schedule,
    tiles,
    validate_run,
)
from cupaged.device_built_plan import DeviceBuiltPlan
from cupaged.device_pages import DevicePages, Question
from cupaged.device_plan import DevicePlan, PlacedPlan
from cupaged.device_schedule import Outline
from cupaged.errors import BackendUnavailableError
from cupaged.schedule import Schedule
from cupaged.spec import HOST_MODEL, AttentionSpec, DeviceModel

if TYPE_CHECKING:
    from cupaged.masks import CustomMask

Backend = Literal["auto", "reference", "cuda"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "cuda")
#: What FlashInfer calls its own kernels, and what serves in their place.
ALIASES: dict[str, Backend] = {"fa2": "cuda", "fa3": "cuda"}

#: Frameworks that, once imported, suggest that the arrays to come live on a GPU.
_GPU_FRAMEWORKS = ("cupy", "torch", "jax", "numba.cuda")


def current_place(backend: Backend) -> tuple[int | None, int]:
    """The CUDA device to plan for where no array says which, None for the host, and its stream.

    With `backend="auto"` that is the current device where a framework that uses GPUs is at work,
    since host index arrays are the usual way to plan for one.

    Raises
    ------
    BackendUnavailableError
        `backend="cuda"` without CuPy, NVRTC or a GPU.
    """
    if backend == "reference":
        return None, 0
    if backend == "auto" and not any(name in sys.modules for name in _GPU_FRAMEWORKS):
        return None, 0
    try:
        return devices.current_place()
    except BackendUnavailableError:
        if backend == "cuda":
            raise
        return None, 0


def device_model(device: int | None) -> DeviceModel:
    """The machine to balance a schedule for."""
    return HOST_MODEL if device is None else devices.device_model(device)


def plan_on_device(
    spec: AttentionSpec,
    lengths: schedule.Lengths,
    page_indices: npt.NDArray[np.int32],
    highest: int,
    workspace: Any | None,
    ask: bool,
    device: int,
    equal_rows: int | None = None,
) -> tuple[Plan, Question | None] | None:
    """A plan whose schedule CUDA device `device`, the current one, builds; None where it can't.

    Parameters
    ----------
    spec, lengths
        Of a batch without a mask, whose splits the planner chooses.
    page_indices : int32 [paged_kv_indptr[-1]]
    highest : int
        The highest page number.
    workspace : cupy.ndarray, optional
        The caller's bytes for partial states.
    ask : bool
        Ask the device whether a request has a page twice, where that pays.
    device : int
    equal_rows : int, optional
        Rows of q of every request, where they can't be anything else.

    Returns
    -------
    plan : Plan
    question : Question or None
    """
    outlined = device_schedule.outline(spec, lengths, devices.device_model(device), equal_rows)
    if outlined is None:
        return None
    if workspace is not None and workspace.nbytes < outlined.recipe.partial_bytes:
        return None  # it may have enough for this batch
    ask = ask and device_schedule.can_ask(page_indices, lengths.paged_kv_indptr, highest)
    placed = DeviceBuiltPlan(outlined, page_indices, device, workspace, highest if ask else None)
    return Plan(outlined, page_indices, highest, workspace, placed), placed.question


def plan_on_host(
    spec: AttentionSpec,
    lengths: schedule.Lengths,
    page_indices: npt.NDArray[np.int32],
    highest: int,
    workspace: Any | None,
    ask: bool,
    device: int | None,
    splits: tuple[int | None, bool] = (None, False),
    mask: CustomMask | None = None,
) -> tuple[Plan, Question | None]:
    """A plan whose schedule the host builds.

    Parameters
    ----------
    device : int or None
        The current CUDA device, to which the plan is uploaded; None for the host.
    splits : tuple
        `fixed_split_size` and `disable_split_kv`.
    mask : CustomMask, optional
    spec, lengths, page_indices, highest, workspace, ask
        As `plan_on_device()` takes them.

    Returns
    -------
    plan : Plan
    question : Question or None

    Raises
    ------
    ValueError
        The workspace is too small.
    """
    pages, indptr = None, lengths.paged_kv_indptr
    if device is not None and ask and device_pages.worth_asking(page_indices, indptr, highest):
        # The GPU looks at them while the host goes on.
        pages = DevicePages(page_indices, indptr, highest, device)
    built = schedule.build(spec, lengths, device_model(device), *splits, mask=mask)
    if workspace is not None:
        validate_run.workspace_size(workspace, built.workspace_bytes)
    placed = None
    if device is not None:
        placed = DevicePlan(built, page_indices, device, workspace, pages)
    question = None if pages is None else pages.question
    return Plan(built, page_indices, highest, workspace, placed), question


def refuse_recording(stream: int) -> None:
    """Refuse a plan on a stream that is being recorded: its copies would become part of the graph.

    Raises
    ------
    RuntimeError
    """
    if devices.is_recorded(stream):
        raise RuntimeError(
            "plan() while a CUDA graph is being recorded: plan before, and for other lengths again "
            "before a replay"
        )


class Plan:
    """A schedule and its page table, on the host and on every device that has run it.

    Parameters
    ----------
    planned : Schedule or Outline
    page_indices : int32 [paged_kv_indptr[-1]]
    highest_page : int
        The highest page number, -1 where there is none.
    workspace : cupy.ndarray, optional
        The caller's bytes for partial states.
    placed : PlacedPlan, optional
        On a device.
    only_there : bool
        It can't be on another.
    """

    def __init__(
        self,
        planned: Schedule | Outline,
        page_indices: npt.NDArray[np.int32],
        highest_page: int,
        workspace: Any | None,
        placed: PlacedPlan | None = None,
        only_there: bool = False,
    ) -> None:
        self._planned = planned
        self.spec = planned.spec
        self.lengths = planned.lengths
        self.nnz_qo = planned.lengths.nnz_qo
        self.page_indices = page_indices
        self.highest_page = highest_page
        self.workspace = workspace
        self._only = placed if only_there else None
        self._on_device: dict[int, PlacedPlan] = {}
        if placed is not None:
            self._on_device[placed.device] = placed

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule; one that a device has built is built again, by the host."""
        return self._planned if isinstance(self._planned, Schedule) else self._planned.build()

    def on_device(self, device: int) -> PlacedPlan:
        """The plan on CUDA device `device`, the current one; uploaded the first time.

        Raises
        ------
        ValueError
            It is for another device alone.
        """
        found = self._on_device.get(device)
        if found is None:
            if self._only is not None:
                raise ValueError(
                    f"q is on cuda:{device}, expected cuda:{self._only.device}: "
                    "with use_cuda_graph=True a plan is for one device"
                )
            model = devices.device_model(device)
            planned = self.schedule
            if tiles.tile_class(model.arch) != tiles.tile_class(planned.device.arch):
                planned = schedule.rebuild(planned, model)
            found = DevicePlan(planned, self.page_indices, device, self.workspace)
            self._on_device[device] = found
        return found

    def run(
        self,
        device: int | None,
        stream: int,
        tensors: tuple[Any, Any, Any, Any, Any | None],
        factors: tuple[float, float, float],
        sinks: Any | None = None,
    ) -> bool:
        """Compute attention where the tensors live.

        Parameters
        ----------
        device : int or None
            CUDA device, the current one; None for the host.
        stream : int
            Its current stream.
        tensors : tuple
            q, k, v, out and lse; K and V in the plan's layout.
        factors : tuple of float
            What multiplies `q·k` in base 2, the output, and the base-2 LSE.
        sinks : float32 array [num_qo_heads], optional
            Natural logits.

        Returns
        -------
        bool
            A CUDA graph holds the launches.
        """
        if device is None:
            q, k, v, out, lse = tensors
            if self.spec.kv_layout == "HND":
                k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
            reference.run(self.schedule, self.page_indices, q, k, v, out, lse, *factors, sinks)
            return False
        return cuda.run(self.on_device(device), stream, *tensors, factors, sinks=sinks)
