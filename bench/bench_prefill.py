"""Batch prefill over a paged KV cache: cupaged and its peers, side by side in one run.

    python bench/bench_prefill.py --quick                  # no GPU: does the script work?
    python bench/bench_prefill.py --json prefill.json      # on a GPU: the figures
    python bench/bench_prefill.py --dtype bfloat16 --workloads bars     # are the bars met?

Every contender's output is compared with the plain formula before it is timed. The exit status
is 1 where one is wrong or cupaged fails, 2 where the run could not start.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import prefill_bars
from ceilings import COPY, MATMUL
from contender import Contender, Cupaged
from host_costs import HOST_COSTS, host_costs
from looks import PREFILL, Row
from measure import Method
from peers import PEERS
from problem import Problem, make_problem
from script import Benchmark, positive, run
from timing import HostDevice
from workloads import (
    LENGTH_SWEEP,
    PAGE_SWEEP,
    Workload,
    length_sweep,
    page_sweep,
    prefill_workloads,
    shrink,
)


class Prefill(Benchmark):
    about = __doc__
    host_names = HOST_COSTS
    peers = PEERS
    ceilings = (MATMUL, COPY)
    look = PREFILL
    suite = prefill_bars.SUITE
    method = Method(time="us", sweeps_in_graphs=False, plans=True)

    def own_options(self) -> dict[str, dict[str, Any]]:
        return {
            "--page-size": {
                "type": positive,
                "default": 16,
                "metavar": "TOKENS",
                "help": f"of all workloads (16) but issue192 and {PAGE_SWEEP}, which have their "
                "own",
            }
        }

    def workloads(self, options: argparse.Namespace | None) -> list[Workload]:
        page_size = 16 if options is None else options.page_size
        return [*prefill_workloads(page_size), *length_sweep(page_size), *page_sweep()]

    def shrink(self, workload: Workload) -> Workload:
        return shrink(workload)

    def rounds(self, sweep: str, repeat: int) -> int:
        # Its longest calls take as long as all the others together, and no bar is on them.
        return -(-repeat // 2) if sweep == LENGTH_SWEEP else repeat

    def contenders(self, device: HostDevice) -> list[Contender]:
        return [Cupaged(device)]

    def problem(
        self,
        workload: Workload,
        options: argparse.Namespace,
        device: HostDevice,
        rng: np.random.Generator,
    ) -> Problem:
        return make_problem(workload, options.dtype, device, rng)

    def host_rows(
        self, options: argparse.Namespace, contenders: Sequence[Contender], device: HostDevice
    ) -> Iterable[Row]:
        return host_costs(options.workloads, contenders, options.dtype, device, options.quick)

    def conditions(self, options: argparse.Namespace) -> str:
        this_run = f"{options.dtype}, pages of {options.page_size}"
        return f"bfloat16, pages of 16 (this run: {this_run})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return run(Prefill(), arguments)


if __name__ == "__main__":
    sys.exit(main())
