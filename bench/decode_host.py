"""What decoding costs on the host: planning for batches never seen before, and launching."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
from contender import Contender
from decode_workloads import equal, log_normal, shrink_decode
from host_rows import call_jobs, host_row, rows_of
from looks import Row
from problem import make_problem
from timing import Call, HostDevice, first_line, host_us
from workloads import make_page_table

#: Planned for: name, requests, keys of a request on average.
PLANS = (("plan-64", 64, 4096), ("plan-1024", 1024, 1024))

RUN = "run-host"
HOST_COSTS = (*(name for name, _, _ in PLANS), RUN)

PLAN_WARMUP = 3

#: Batches that a round plans for, one after the other.
PLAN_BATCHES = 8


def host_costs(
    names: Sequence[str],
    contenders: Sequence[Contender],
    dtype: str,
    device: HostDevice,
    quick: bool,
) -> Iterator[Row]:
    """Rows of those of `HOST_COSTS` that are named; one that fails gives a row that says so."""
    rng = np.random.default_rng()
    for name, batch, mean in PLANS:
        if name in names:
            yield from plan_rows(
                name, batch, mean, contenders, dtype, device, rng, 5 if quick else 60
            )
    if RUN in names:
        # Requests so short that the GPU is done before the host has launched the next call.
        workload = equal(RUN, 64, 128)
        problem = make_problem(shrink_decode(workload) if quick else workload, dtype, device, rng)
        yield from rows_of(call_jobs(RUN, problem, contenders, device, quick))


def plan_rows(
    name: str,
    batch: int,
    mean: int,
    contenders: Sequence[Contender],
    dtype: str,
    device: HostDevice,
    rng: np.random.Generator,
    rounds: int,
) -> Iterator[Row]:
    """µs of `plan()` from host arrays, the device idle at the start.

    Batches are drawn, each with lengths and pages of its own. In a round each contender plans for
    all of them, one after the other, as an engine does step after step: what it keeps of the plan
    before is of no use to it. One round begins with one contender and the next with another.
    """
    calls: dict[str, list[Call]] = {}
    times: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    tables = [make_page_table(log_normal(name, batch, mean, rng), rng) for _ in range(PLAN_BATCHES)]
    like = equal(name, batch, mean)
    for contender in contenders:
        if contender.unfit(like) is None:
            try:
                planner = contender.planner(like, dtype)
                if planner is not None:
                    calls[contender.name] = [planner(table) for table in tables]
                    times[contender.name] = []
            except Exception as error:
                failures[contender.name] = first_line(error)
    for turn in range(PLAN_WARMUP + rounds):
        order = list(calls)
        first = turn % max(len(order), 1)
        for who in order[first:] + order[:first]:
            try:
                turns = itertools.cycle(calls[who])
                times[who] += host_us(lambda: next(turns)(), 1, device, PLAN_BATCHES)  # noqa: B023
            except Exception as error:
                failures[who] = first_line(error)
                del calls[who]
    pages = [len(table.kv_indices) for table in tables]
    note = (
        f"{statistics.median(pages):,.0f} pages of 16, log-normal lengths, "
        f"{PLAN_BATCHES} batches in turn"
    )
    for contender in contenders:
        who = contender.name
        if who in failures:
            yield host_row(name, who, None, "", failures[who])
        elif who in times:
            yield host_row(name, who, statistics.median(times[who][PLAN_WARMUP:]), "us", note)
