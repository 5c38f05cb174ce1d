"""Measurements of the host's side, in rows of their own; one that fails stops no other."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from contender import Contender
from looks import Row
from problem import Problem
from timing import HostDevice, first_line, host_us

#: Calls in a row: many, and still fewer than the GPU queues before the host must wait.
CALLS = 100


@dataclass(frozen=True, slots=True)
class Job:
    """A measurement to be made: whose it is, and what returns its rows."""

    name: str
    contender: str
    measure: Callable[[], Sequence[Row]]


def host_row(name: str, contender: str, value: float | None, unit: str, note: str = "") -> Row:
    """A row of the result about the host's side; a value of None stands for a failure."""
    return {
        "kind": "host",
        "workload": name,
        "contender": contender,
        "value": value,
        "unit": unit,
        "note": note,
        "status": "failed" if value is None else "ok",
    }


def rows_of(jobs: Iterable[Job]) -> Iterator[Row]:
    """The rows of all jobs; one that fails gives a row that says so."""
    for job in jobs:
        try:
            yield from job.measure()
        # Whatever it is: the other figures are still wanted.
        except Exception as error:
            yield host_row(job.name, job.contender, None, "", first_line(error))


def call_jobs(
    name: str, problem: Problem, contenders: Sequence[Contender], device: HostDevice, quick: bool
) -> Iterator[Job]:
    """µs of host time of one call into a given output, calls following one another."""
    calls = 2 if quick else CALLS

    def measure(contender: Contender) -> list[Row]:
        runner = contender.prepare(problem)
        if runner.waits:
            return []
        runner.call()
        times = host_us(runner.call, 3 if quick else 20, device, calls)
        note = f"{calls} calls in a row, not waited for"
        return [host_row(name, contender.name, statistics.median(times), "us", note)]

    for contender in contenders:
        if contender.unfit(problem.workload) is None:
            yield Job(name, contender.name, functools.partial(measure, contender))
