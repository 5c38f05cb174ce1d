"""Who solves it: cupaged, and what it has in common with its peers.

The peers are in `peers.py`, `flashinfer_peers.py` and `append_contenders.py`; they and cupaged are
`Contender`s, and a contender prepared for one problem is a `Runner`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from check import POISON_BITS, Verdict
from problem import Attention, Problem
from timing import Call, CudaDevice, HostDevice, Pending, first_line
from workloads import DTYPES, PageTable, Workload

#: Binds a batch's arrays to a `plan()`.
Planner = Callable[[PageTable], Call]


class UnavailableError(Exception):
    """A contender that can't take part in this run; the message says why."""


class Runner(ABC):
    """A contender that is ready to solve one problem, again and again."""

    #: `call()` returns only once the result is there, so that its host time says nothing.
    waits = False

    def __init__(self, problem: Problem) -> None:
        self.device = problem.device
        self.num_layers = len(problem.layers)
        #: The layer that the last call worked on.
        self.layer = 0

    @abstractmethod
    def call(self) -> None:
        """Start one call."""

    @abstractmethod
    def poison(self) -> None:
        """Fill what a call writes with NaN, where that is kept from call to call."""

    @abstractmethod
    def verdict(self, rng: np.random.Generator) -> Verdict:
        """Whether the last call's result is right."""

    def next_layer(self) -> int:
        """Which layer this call works on."""
        self.layer = (self.layer + 1) % self.num_layers
        return self.layer

    def sample(self) -> Pending:
        """Time one call."""
        return self.device.sample(self.call)

    def capture(self, calls: int) -> Call:
        """Record so many calls into a CUDA graph; returns what replays it."""
        return self.device.capture(self.call, calls)


class AttentionRunner(Runner):
    """What all have in common that compute attention."""

    def __init__(self, problem: Attention) -> None:
        super().__init__(problem)
        self.problem = problem

    @abstractmethod
    def out_bits(self) -> Any:
        """The last call's output as uint16 `[nnz_qo, num_qo_heads, head_dim]`, on the device."""

    def verdict(self, rng: np.random.Generator) -> Verdict:
        return self.problem.verify(self.out_bits(), rng, self.layer)


class Contender(ABC):
    """Something that solves problems.

    Attributes
    ----------
    name : str
        What tables and `--peers` call it.
    version : str
        Of the software it stands for.
    """

    name: str
    version: str

    @abstractmethod
    def unfit(self, workload: Workload) -> str | None:
        """Why it can't do a workload, or None where it can."""

    @abstractmethod
    def prepare(self, problem: Any) -> Runner:
        """Get ready: allocate, convert, plan."""

    def planner(self, workload: Workload, dtype: str) -> Planner | None:
        """What plans batches like a workload, or None where there is no such step.

        It needs no arrays but the batches' own, from the host, and disturbs no runner's plan.
        """
        return None


def plan_call(wrapper: Any, workload: Workload, dtype: str, table: PageTable) -> Call:
    """A prefill wrapper's `plan()` with its arguments, ready to be called again and again."""
    return functools.partial(
        wrapper.plan,
        table.qo_indptr,
        table.kv_indptr,
        table.kv_indices,
        table.last_page_len,
        workload.num_qo_heads,
        workload.num_kv_heads,
        workload.head_dim,
        workload.page_size,
        causal=workload.causal,
        q_data_type=dtype,
    )


class Cupaged(Contender):
    """The library under test."""

    name = "cupaged"

    #: The public class that it is measured by, and its `plan()` with a batch's arguments.
    wrapper = "BatchPrefillWithPagedKVCacheWrapper"
    plan_call = staticmethod(plan_call)

    def __init__(self, device: HostDevice) -> None:
        import cupaged

        self.version = cupaged.__version__
        self.make_wrapper: Callable[..., Any] = functools.partial(
            getattr(cupaged, self.wrapper), backend=device.backend
        )

    def unfit(self, workload: Workload) -> str | None:
        return None

    def prepare(self, problem: Attention) -> Runner:
        workload = problem.workload
        wrapper = self.make_wrapper(kv_layout=workload.kv_layout)
        self.plan_call(wrapper, workload, problem.dtype, problem.table)()
        return CupagedRunner(problem, wrapper)

    def planner(self, workload: Workload, dtype: str) -> Planner | None:
        wrapper = self.make_wrapper(kv_layout=workload.kv_layout)
        return functools.partial(self.plan_call, wrapper, workload, dtype)


class CupagedRunner(AttentionRunner):
    def __init__(self, problem: Attention, wrapper: Any) -> None:
        super().__init__(problem)
        self.wrapper = wrapper
        self.out = self.device.empty(problem.shape, DTYPES[problem.dtype])

    def call(self) -> None:
        self.wrapper.run(self.problem.q, self.problem.layers[self.next_layer()], out=self.out)

    def poison(self) -> None:
        self.out.view(np.uint16).fill(POISON_BITS)

    def out_bits(self) -> Any:
        return self.out.view(np.uint16)


#: Makes a peer for a device and a dtype.
Factory = Callable[[CudaDevice, str], Contender]


def gather_peers(
    names: list[str], device: CudaDevice, dtype: str, factories: Mapping[str, Factory]
) -> tuple[list[Contender], dict[str, str]]:
    """The peers that are there, and of the others why they are not.

    Parameters
    ----------
    names : list of str
        Which to look for: keys of `factories`.
    device : CudaDevice
        What they will run on.
    dtype : str
        "float16" or "bfloat16".
    factories : dict
        Peer by name.
    """
    present: list[Contender] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            present.append(factories[name](device, dtype))
        except UnavailableError as error:
            missing[name] = str(error)
        # An installation that is broken fails at import in ways of its own: OSError,
        # RuntimeError, AttributeError. None of them may end the run of the others.
        except Exception as error:
            missing[name] = first_line(error)
    return present, missing
