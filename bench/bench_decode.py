"""Batch decode over a paged KV cache: cupaged and FlashInfer, side by side in one run.

    python bench/bench_decode.py --quick                   # no GPU: does the script work?
    python bench/bench_decode.py --json decode.json        # on a GPU: the figures
    python bench/bench_decode.py --workloads bars          # are the bars met?

Every contender's output is compared with the plain formula before it is timed. Calls are recorded
into CUDA graphs, as serving engines do with decoding: some take little longer than their launch
from Python, which would otherwise be what is measured. Times of single calls stand beside them.
The exit status is 1 where an output is wrong or cupaged fails, 2 where the run could not start.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence

import decode_bars
import numpy as np
from ceilings import COPY, READ
from contender import Contender
from decode_contender import CupagedDecode
from decode_host import HOST_COSTS, host_costs
from decode_workloads import decode_workloads, length_sweep, page_sweep, shrink_decode
from flashinfer_peers import DECODE_PEERS
from looks import DECODE, Row
from measure import Method
from problem import Problem, make_problem
from script import Benchmark, run
from timing import HostDevice
from workloads import Workload


class Decode(Benchmark):
    about = __doc__
    host_names = HOST_COSTS
    peers = DECODE_PEERS
    ceilings = (COPY, READ)
    look = DECODE
    suite = decode_bars.SUITE
    method = Method(time="graph_us", sweeps_in_graphs=True, plans=False)

    def workloads(self, options: argparse.Namespace | None) -> list[Workload]:
        return [*decode_workloads(), *length_sweep(), *page_sweep()]

    def shrink(self, workload: Workload) -> Workload:
        return shrink_decode(workload)

    def contenders(self, device: HostDevice) -> list[Contender]:
        return [CupagedDecode(device)]

    def problem(
        self,
        workload: Workload,
        options: argparse.Namespace,
        device: HostDevice,
        rng: np.random.Generator,
    ) -> Problem:
        return make_problem(workload, options.dtype, device, rng, cold=True)

    def host_rows(
        self, options: argparse.Namespace, contenders: Sequence[Contender], device: HostDevice
    ) -> Iterable[Row]:
        return host_costs(options.workloads, contenders, options.dtype, device, options.quick)

    def conditions(self, options: argparse.Namespace) -> str:
        return f"float16, × over the fastest of FlashInfer's (this run: {options.dtype})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    return run(Decode(), arguments)


if __name__ == "__main__":
    sys.exit(main())
