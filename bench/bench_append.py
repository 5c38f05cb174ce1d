"""Appending to a paged KV cache: cupaged, FlashInfer and plain copies, side by side in one run.

    python bench/bench_append.py --quick                   # no GPU: does the script work?
    python bench/bench_append.py --json append.json        # on a GPU: the figures, the bars

Every byte of the caches is compared before anything is timed: the appended tokens, and that nothing
else was written. Calls are recorded into CUDA graphs: they take less time than their launch from
Python, which would otherwise be what is measured. The exit status is 1 where bytes are wrong or
cupaged fails, 2 where the run could not start.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence

import append_bars
import numpy as np
from append_contenders import APPEND_PEERS, COPIES, Copy, CupagedAppend
from append_problem import Append, append_workloads, make_append, shrink_append
from ceilings import COPY
from contender import Contender
from host_rows import CALLS, Job, call_jobs, host_row, rows_of
from looks import APPEND, Row
from measure import Method
from problem import Problem
from script import Benchmark, run
from timing import HostDevice, host_us
from workloads import Workload

#: Host µs of an append to 64 requests: for another layer, by the indices of the call before; for a
#: new step, by others; and of finding where its tokens belong.
LAYER, STEP, PLACES = "append-host", "append-host-step", "places-host"
REPEAT = 20


class Appending(Benchmark):
    about = __doc__
    host_names = (LAYER, STEP, PLACES)
    peers = APPEND_PEERS
    ceilings = (COPY,)
    look = APPEND
    suite = append_bars.SUITE
    method = Method(time="graph_us", sweeps_in_graphs=False, plans=False)

    def workloads(self, options: argparse.Namespace | None) -> list[Workload]:
        return append_workloads()

    def shrink(self, workload: Workload) -> Workload:
        return shrink_append(workload)

    def contenders(self, device: HostDevice) -> list[Contender]:
        cupaged = (CupagedAppend(device, on_host) for on_host in (False, True))
        return [*cupaged, *(Copy(device, name) for name in COPIES)]

    def problem(
        self,
        workload: Workload,
        options: argparse.Namespace,
        device: HostDevice,
        rng: np.random.Generator,
    ) -> Problem:
        return make_append(workload, options.dtype, device, rng)

    def host_rows(
        self, options: argparse.Namespace, contenders: Sequence[Contender], device: HostDevice
    ) -> Iterator[Row]:
        names = options.workloads
        if not set(self.host_names) & set(names):
            return
        rng = np.random.default_rng()
        workload = append_workloads()[-1]
        # The same lengths, other pages: a step's indices and the next's.
        steps = [make_append(workload, options.dtype, device, rng) for _ in range(2)]
        appending = [one for one in contenders if one.name not in COPIES]
        jobs: list[Job] = []
        if LAYER in names:
            jobs += call_jobs(LAYER, steps[0], appending, device, options.quick)
        if STEP in names:
            jobs += [
                Job(STEP, one.name, functools.partial(step_rows, one, steps, options.quick))
                for one in appending
            ]
        if PLACES in names:
            jobs += [
                Job(PLACES, one.name, functools.partial(places_rows, one, steps[0]))
                for one in appending
                if isinstance(one, CupagedAppend)
            ]
        yield from rows_of(jobs)

    def conditions(self, options: argparse.Namespace) -> str:
        share, short = append_bars.SHARE_OF_COPY, append_bars.SHORT_CALL
        allowed = f"the faster copy's time / {share}, or {short:.0f} µs"
        return f"× within {allowed} (this run: {options.dtype})"


def step_rows(contender: Contender, steps: Sequence[Append], quick: bool) -> list[Row]:
    """µs of host time of calls whose indices are never those of the call before."""
    device = steps[0].device
    runners = [contender.prepare(problem) for problem in steps]
    for runner in runners:
        runner.call()
    turns = itertools.cycle(runners)
    calls = 2 if quick else CALLS
    times = host_us(lambda: next(turns).call(), REPEAT, device, calls)
    note = f"{calls} calls in a row, the indices of each others than of the one before"
    return [host_row(STEP, contender.name, statistics.median(times), "us", note)]


def places_rows(cupaged: CupagedAppend, problem: Append) -> list[Row]:
    """µs of `get_seq_lens` and `get_batch_indices_positions`, once a step for all layers."""
    indices = cupaged.indices(problem)

    def find() -> None:
        cupaged.places(problem, indices)

    find()
    value = statistics.median(host_us(find, REPEAT, problem.device))
    where = "host" if cupaged.on_host else "device"
    note = f"get_seq_lens and get_batch_indices_positions, arrays on the {where}"
    return [host_row(PLACES, cupaged.name, value, "us", note)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return run(Appending(), arguments)


if __name__ == "__main__":
    sys.exit(main())
