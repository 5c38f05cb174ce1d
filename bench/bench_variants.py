"""What each variant of attention costs, beside the plain kernel in the same run.

    python bench/bench_variants.py --quick                 # no GPU: does the script work?
    python bench/bench_variants.py --json variants.json    # on a GPU: the figures, the bars

Every output is compared with the plain formula before it is timed. Workloads that are held against
each other take turns; calls are recorded into CUDA graphs, so that no launch from the host is among
them. The exit status is 1 where an output is wrong or cupaged fails, 2 where the run could not
start.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ceilings import MATMUL, READ, ceilings
from check import POISON_BITS, Verdict
from contender import Contender, Cupaged, Runner
from looks import Look, Row
from measure import Method, measure
from report import ROOT, header, rates, save, table
from script import Clock, exit_status, positive, some_of
from timing import Call, CudaDevice, HostDevice, NoDeviceError, paired_ratio
from variant_bars import FASTER, RATE_RATIO, SUITE
from variant_problem import VariantProblem, make_variant
from variant_workloads import DECODE, RAGGED, VariantWorkload, shrink_variant, variant_workloads
from workloads import DTYPES, Workload

METHOD = Method(time="graph_us", sweeps_in_graphs=True, plans=False)

LOOK = Look(
    columns=(
        ("workload", -26, "workload", "s"),
        ("K, V", -13, "kv_dtype", "s"),
        ("graph µs", 8, "graph_us", ".1f"),
        ("µs", 8, "us", ".1f"),
        ("TFLOP/s", 8, "tflops", ".1f"),
        ("%mm", 4, "share_of_matmul", ".0%"),
        ("GB/s", 6, "gbs", ".0f"),
        ("%rd", 4, "share_of_read", ".0%"),
        ("tokens/s", 10, "tokens_per_s", ",.0f"),
        ("x TFLOP/s", 9, RATE_RATIO, ".3f"),
        ("faster", 7, FASTER, ".3f"),
        ("rel.err", 8, "max_rel_err", ".1e"),
        ("status", -6, "status", "s"),
    ),
    legend="""\
graph µs: of calls back to back in a CUDA graph, no launch from the host among them; µs: median of
single calls, by events. The rates are of graph µs, of µs where there is no graph.
TFLOP/s: 2 (head_dim_qk + head_dim_vo) FLOPs a visible (query head row, key) pair. GB/s: K, V, Q
read once, the output written once. %mm, %rd: of the matrix product and the read above.
x TFLOP/s, faster: over the plain one of the same turn, which is its first, medians of paired
rounds. tokens/s: query rows, of prefills prompt tokens. rel.err: of sampled rows.
*: K and V fit in the L2 cache.""",
    rate="tflops",
    unit="TFLOP/s",
    time="graph_us",
)


def plan_call(wrapper: Any, problem: VariantProblem) -> Call:
    """`plan()` of a workload's wrapper with its arguments."""
    w, pages = problem.workload, problem.table
    paged = pages.kv_indptr, pages.kv_indices, pages.last_page_len
    heads = w.num_qo_heads, w.num_kv_heads, w.head_dim
    arguments: tuple[Any, ...]
    if w.wrapper == RAGGED:
        arguments = pages.qo_indptr, problem.kv_indptr, *heads
    elif w.wrapper == DECODE:
        arguments = *paged, *heads, w.page_size
    else:
        arguments = pages.qo_indptr, *paged, *heads, w.page_size
    return functools.partial(wrapper.plan, *arguments, q_data_type=w.dtype, **w.features())


class CupagedVariants(Contender):
    """The library under test, by whichever of its wrappers a workload names."""

    name = Cupaged.name

    def __init__(self, device: HostDevice) -> None:
        import cupaged

        self.cupaged = cupaged
        self.version = cupaged.__version__
        self.backend = device.backend

    def unfit(self, workload: Workload) -> str | None:
        return None

    def prepare(self, problem: VariantProblem) -> Runner:
        wrapper = getattr(self.cupaged, problem.workload.wrapper)(backend=self.backend)
        plan_call(wrapper, problem)()
        return VariantRunner(problem, wrapper)


class VariantRunner(Runner):
    def __init__(self, problem: VariantProblem, wrapper: Any) -> None:
        super().__init__(problem)
        self.problem = problem
        self.wrapper = wrapper
        self.options = {} if problem.sinks is None else {"sinks": problem.sinks}
        self.out = self.device.empty(problem.shape, DTYPES[problem.dtype])

    def call(self) -> None:
        k, v = self.problem.layers[self.next_layer()]
        cache = (k, v) if self.problem.workload.wrapper == RAGGED else ((k, v),)
        self.wrapper.run(self.problem.q, *cache, out=self.out, **self.options)

    def poison(self) -> None:
        self.out.view(np.uint16).fill(POISON_BITS)

    def verdict(self, rng: np.random.Generator) -> Verdict:
        return self.problem.verify(self.out.view(np.uint16), rng, self.layer)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options, checked."""
    names = [workload.name for workload in variant_workloads()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workloads",
        type=some_of(names),
        default=names,
        metavar="A,B",
        help=f"some of {', '.join(names)}; a plain one stands for its whole turn, any other brings "
        "it along; by default all",
    )
    parser.add_argument("--repeat", type=positive, help="timed rounds (20; 3 with --quick)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes on the reference backend, without a GPU: seconds",
    )
    options = parser.parse_args(arguments)
    if options.repeat is None:
        options.repeat = 3 if options.quick else 20
    return options


def turns(chosen: Sequence[str]) -> Mapping[str, Sequence[VariantWorkload]]:
    """What is measured together, under the plain one's name: the chosen ones and their plain ones.

    A plain one stands for its whole turn.
    """
    every = variant_workloads()
    plain = {w.beside for w in every if w.name in chosen}
    found: dict[str, list[VariantWorkload]] = {}
    for w in every:
        if w.name in chosen or w.beside in chosen or w.name in plain:
            found.setdefault(w.beside, []).append(w)
    return found


def put_beside(rows: Sequence[Row]) -> None:
    """Write into the rows of a turn how they stand beside its plain one's, and their tokens."""
    by_name = {row["workload"]: row for row in rows}
    for row in rows:
        plain = by_name[row["beside"]]
        in_graphs = row["graph_us_all"] and plain["graph_us_all"]
        ours, theirs = (one["graph_us_all" if in_graphs else "us_all"] for one in (row, plain))
        faster = paired_ratio(theirs, ours) if ours and theirs else None
        us = row["us"] if row["graph_us"] is None else row["graph_us"]
        row |= {
            FASTER: faster,
            RATE_RATIO: None if faster is None else faster * row["flops"] / plain["flops"],
            "tokens_per_s": None if us is None else sum(row["qo_lens"]) / us * 1e6,
        }


def measured(
    workloads: Sequence[VariantWorkload],
    contender: Contender,
    device: HostDevice,
    repeat: int,
    rng: np.random.Generator,
    limits: Mapping[str, float | None],
) -> list[Row]:
    """Rows of a turn; its arrays go when it returns."""
    problems = [make_variant(workload, device, rng) for workload in workloads]
    rows = measure(problems, [contender], device, repeat, rng, METHOD)
    for row in rows:
        if row["us"] is not None:
            row |= rates(row, limits, METHOD.time)
    put_beside(rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = parse(arguments)
    clock = Clock()
    # This checkout's package is what the header's commit speaks of.
    sys.path.insert(0, str(ROOT))
    try:
        device = HostDevice() if options.quick else CudaDevice()
    except NoDeviceError as error:
        print(f"{error}; --quick needs no GPU", file=sys.stderr)
        return 2
    contender = CupagedVariants(device)
    limits = ceilings(device, "bfloat16", (MATMUL, READ))
    own = {
        "dtype": "bfloat16",  # where a workload does not name another
        "quick": options.quick,
        "repeat": options.repeat,
        "seconds": clock.seconds,
    }
    head = header(device, {contender.name: contender.version}, {}, limits, ROOT, own)
    device.free()
    clock.lap("start")
    rng = np.random.default_rng()
    rows: list[Row] = []
    for name, workloads in turns(options.workloads).items():
        if options.quick:
            workloads = [shrink_variant(workload) for workload in workloads]
        rows += measured(workloads, contender, device, options.repeat, rng, limits)
        device.free()
        clock.lap(name)
        # Written after each turn: a run that is cut short leaves what it had.
        if options.json:
            save(options.json, head, rows, [])
    print(file=sys.stderr)
    # Of the reference backend they would say nothing.
    bars = [] if options.quick else SUITE.verdicts(rows)
    if options.json:
        save(options.json, head, rows, bars)
    title = "bars for an H200, × over the plain one of the same turn"
    print("\n".join([*table(head, rows, LOOK), *SUITE.table(bars, title)]))
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
