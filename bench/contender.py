"""What is measured against what: one attention problem, and how cupaged solves it.

The peers are in `peers.py`; they and cupaged are `Contender`s, and a contender prepared for one
problem is a `Runner`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from check import POISON_BITS, Verdict, verify
from timing import Call, HostDevice, Pending
from workloads import DTYPES, PageTable, Workload, draw_cache, make_page_table, standard_normal


class UnavailableError(Exception):
    """A contender that can't take part in this run; the message says why."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One workload with its arrays on a device; every contender reads these."""

    workload: Workload
    table: PageTable
    dtype: str
    device: HostDevice
    q: Any  # [nnz_qo, num_qo_heads, head_dim]
    k: Any  # [num_pages, page_size, num_kv_heads, head_dim]
    v: Any  # like k

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the queries and of the output."""
        w = self.workload
        return sum(w.qo_lens), w.num_qo_heads, w.head_dim

    def unpaged(self) -> tuple[Any, Any]:
        """K and V gathered from their pages, `[sum(kv_lens), num_kv_heads, head_dim]` each."""
        slots = self.device.xp.asarray(self.table.all_slots())
        tail = (self.workload.num_kv_heads, self.workload.head_dim)
        k, v = (
            cache.view(np.uint16).reshape(-1, *tail)[slots].view(DTYPES[self.dtype])
            for cache in (self.k, self.v)
        )
        return k, v

    def verify(self, out_bits: Any, rng: np.random.Generator) -> Verdict:
        """Compare an output, given by its bits, with the formula."""
        return verify(
            self.device.xp,
            self.workload,
            self.table,
            self.dtype,
            self.q,
            self.k,
            self.v,
            out_bits,
            rng,
        )


def make_problem(
    workload: Workload, dtype: str, device: HostDevice, rng: np.random.Generator
) -> Problem:
    """Draw a workload's page order and values, and put them on the device."""
    table = make_page_table(workload, rng)
    k, v = draw_cache(workload, table, rng, dtype)
    q = standard_normal(
        rng, (sum(workload.qo_lens), workload.num_qo_heads, workload.head_dim), dtype
    )
    return Problem(workload, table, dtype, device, device.put(q), device.put(k), device.put(v))


class Runner(ABC):
    """A contender that is ready to solve one problem, again and again."""

    #: `call()` returns only once the result is there, so that its host time says nothing.
    waits = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.device = problem.device

    @abstractmethod
    def call(self) -> None:
        """Start one attention call."""

    @abstractmethod
    def poison(self) -> None:
        """Fill the output with NaN, where the contender writes into one that is kept."""

    @abstractmethod
    def out_bits(self) -> Any:
        """The last call's output as uint16 `[nnz_qo, num_qo_heads, head_dim]`, on the device."""

    def sample(self) -> Pending:
        """Time one call."""
        return self.device.sample(self.call)

    def capture(self, calls: int) -> Call:
        """Record so many calls into a CUDA graph; returns what replays it."""
        return self.device.capture(self.call, calls)


class Contender(ABC):
    """Something that computes attention.

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
    def prepare(self, problem: Problem) -> Runner:
        """Get ready: allocate, convert, plan."""

    def planner(self, workload: Workload, table: PageTable, dtype: str) -> Call | None:
        """What plans a workload from host arrays, or None where there is no such step.

        It needs no arrays but the table's, and disturbs no runner's plan.
        """
        return None


class Cupaged(Contender):
    """The library under test."""

    name = "cupaged"

    def __init__(self, device: HostDevice) -> None:
        import cupaged

        self.version = cupaged.__version__
        self.make_wrapper: Callable[[], Any] = functools.partial(
            cupaged.BatchPrefillWithPagedKVCacheWrapper, backend=device.backend
        )

    def unfit(self, workload: Workload) -> str | None:
        return None

    def prepare(self, problem: Problem) -> Runner:
        wrapper = self.make_wrapper()
        plan_call(wrapper, problem.workload, problem.table, problem.dtype)()
        return CupagedRunner(problem, wrapper)

    def planner(self, workload: Workload, table: PageTable, dtype: str) -> Call | None:
        return plan_call(self.make_wrapper(), workload, table, dtype)


def plan_call(wrapper: Any, workload: Workload, table: PageTable, dtype: str) -> Call:
    """A wrapper's `plan()` with its arguments, ready to be called again and again."""
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


class CupagedRunner(Runner):
    def __init__(self, problem: Problem, wrapper: Any) -> None:
        super().__init__(problem)
        self.wrapper = wrapper
        self.out = self.device.empty(problem.shape, DTYPES[problem.dtype])

    def call(self) -> None:
        self.wrapper.run(self.problem.q, (self.problem.k, self.problem.v), out=self.out)

    def poison(self) -> None:
        self.out.view(np.uint16).fill(POISON_BITS)

    def out_bits(self) -> Any:
        return self.out.view(np.uint16)
