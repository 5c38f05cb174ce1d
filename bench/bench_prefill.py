"""Batch prefill over a paged KV cache: cupaged and its peers, side by side in one run.

    python bench/bench_prefill.py --quick                  # no GPU: does the script work?
    python bench/bench_prefill.py --json prefill.json      # on a GPU: the figures

Every contender's output is compared with the plain formula before it is timed. The exit status
is 1 where one is wrong or cupaged fails, 2 where the run could not start.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from check import Verdict
from contender import Contender, Cupaged, Problem, Runner, make_problem
from host_costs import ROOT, host_costs
from peers import PEERS, gather_peers
from report import Row, header, plot, rates, save, table
from timing import (
    Call,
    CudaDevice,
    HostDevice,
    NoDeviceError,
    NotCapturableError,
    calls_in_graph,
    first_line,
    host_us,
    interleave,
    paired_ratio,
)
from workloads import DTYPES, Workload, page_sweep, prefill_workloads, shrink

SWEEP = "page-sweep"
HOST = "host"
WARMUP = 3
PLAN_REPEAT = 20


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options, checked."""
    names = [workload.name for workload in prefill_workloads(16)] + [SWEEP, HOST]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def listed(allowed: Sequence[str]) -> Any:
        def split(text: str) -> list[str]:
            chosen = [name for name in text.split(",") if name]
            for name in chosen:
                if name not in allowed:
                    raise argparse.ArgumentTypeError(
                        f"{name!r} is unknown, expected some of {', '.join(allowed)}"
                    )
            return chosen

        return split

    def positive(text: str) -> int:
        if not text.isdigit() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a positive whole number")
        return int(text)

    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    parser.add_argument(
        "--page-size",
        type=positive,
        default=16,
        metavar="TOKENS",
        help=f"of all workloads (16) but issue192 and {SWEEP}, which have their own",
    )
    parser.add_argument(
        "--workloads",
        type=listed(names),
        default=names,
        metavar="A,B",
        help=f"some of {', '.join(names)}; by default all",
    )
    parser.add_argument(
        "--peers",
        type=listed(list(PEERS)),
        metavar="A,B",
        help=f"some of {', '.join(PEERS)}; by default all that are installed; '' for none",
    )
    parser.add_argument("--repeat", type=positive, help="timed rounds (20; 3 with --quick)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="PATH.png", help="draw them (matplotlib)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes on the reference backend, without a GPU and without peers: seconds",
    )
    options = parser.parse_args(arguments)
    if options.quick and options.peers:
        parser.error("--peers need a GPU, --quick uses none")
    if options.peers is None:
        options.peers = [] if options.quick else list(PEERS)
    if options.repeat is None:
        options.repeat = 3 if options.quick else 20
    return options


def measure(
    workload: Workload,
    contenders: Sequence[Contender],
    device: HostDevice,
    dtype: str,
    repeat: int,
    rng: np.random.Generator,
) -> list[Row]:
    """Check and time every contender on one workload; a row each for those that can do it."""
    problem = make_problem(workload, dtype, device, rng)
    rows: dict[str, Row] = {}
    runners: dict[str, Runner] = {}
    for contender in contenders:
        if contender.unfit(workload) is None:
            row = rows[contender.name] = new_row(problem, contender.name)
            with recorded(row):
                runners[contender.name] = checked(contender.prepare(problem), row, rng)
    times = interleave({n: r.sample for n, r in runners.items()}, WARMUP, repeat, device)
    for name, taken in times.items():
        rows[name] |= {"us": statistics.median(taken), "us_all": taken}
    graphs: dict[str, Call] = {}
    for name, runner in runners.items():
        with recorded(rows[name]):
            graphs[name] = captured(runner, rows[name], rng)
    replays = interleave(
        {n: functools.partial(device.sample, replay) for n, replay in graphs.items()},
        WARMUP,
        repeat,
        device,
    )
    for name, taken in replays.items():
        taken[:] = [t / rows[name]["graph_calls"] for t in taken]
        rows[name] |= {"graph_us": statistics.median(taken), "graph_us_all": taken}
    compare(rows, times, "speedup")
    compare(rows, replays, "graph_speedup")
    for contender in contenders:
        if contender.name in runners:
            row = rows[contender.name]
            with recorded(row):
                plan = contender.planner(workload, problem.table, dtype)
                if plan is not None:
                    plan()
                    row["plan_us"] = statistics.median(host_us(plan, PLAN_REPEAT, device))
    return list(rows.values())


@contextlib.contextmanager
def recorded(row: Row) -> Iterator[None]:
    """Write an error into the row: it is a result too, and the others' are still wanted."""
    try:
        yield
    except NotCapturableError as error:
        row["notes"].append(f"not in a CUDA graph: {error}")
    except Exception as error:
        if row["status"] != "wrong":
            row["status"] = "failed"
        row["notes"].append(first_line(error))


def checked(runner: Runner, row: Row, rng: np.random.Generator) -> Runner:
    """Run a contender once, compare what it computes, and see that it can be timed."""
    runner.poison()
    runner.call()
    judge(row, runner.problem.verify(runner.out_bits(), rng), "")
    runner.sample()
    runner.device.synchronize()
    return runner


def captured(runner: Runner, row: Row, rng: np.random.Generator) -> Call:
    """Record a contender's calls into a CUDA graph, and compare what a replay computes."""
    row["graph_calls"] = calls_in_graph(row["us"])
    replay = runner.capture(row["graph_calls"])
    runner.poison()
    replay()
    judge(row, runner.problem.verify(runner.out_bits(), rng), " in a CUDA graph")
    return replay


def new_row(problem: Problem, contender: str) -> Row:
    """A row before anything was measured."""
    workload = problem.workload
    l2_bytes = problem.device.describe().get("l2_bytes", 0)
    return {
        "kind": "attention",
        "workload": workload.name,
        "contender": contender,
        "qo_lens": list(workload.qo_lens),
        "kv_lens": list(workload.kv_lens),
        "num_qo_heads": workload.num_qo_heads,
        "num_kv_heads": workload.num_kv_heads,
        "head_dim": workload.head_dim,
        "page_size": workload.page_size,
        "causal": workload.causal,
        "swept": workload.paged_only,
        "flops": workload.flops(),
        "bytes": workload.bytes(),
        "fits_l2": workload.kv_bytes() < l2_bytes,
        "us": None,
        "us_all": [],
        "graph_us": None,
        "graph_us_all": [],
        "graph_calls": None,
        "tflops": None,
        "gbs": None,
        "share_of_matmul": None,
        "share_of_copy": None,
        "speedup": None,
        "graph_speedup": None,
        "plan_us": None,
        "status": "ok",
        "max_abs_err": None,
        "max_rel_err": None,
        "notes": [],
    }


def judge(row: Row, verdict: Verdict, where: str) -> None:
    """Write a verdict into a row; the worse of two stays."""
    for key, value in (("max_abs_err", verdict.max_abs_err), ("max_rel_err", verdict.max_rel_err)):
        row[key] = value if row[key] is None else max(row[key], value)
    if not verdict.ok:
        row["status"] = "wrong"
        row["notes"].append(f"wrong{where}: {verdict.detail}")


def compare(rows: dict[str, Row], times: dict[str, list[float]], key: str) -> None:
    """How many times as fast as each contender cupaged is, round by round."""
    if Cupaged.name in times:
        for name, taken in times.items():
            if name != Cupaged.name:
                rows[name][key] = paired_ratio(taken, times[Cupaged.name])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = parse(arguments)
    # This checkout's package is what the header's commit speaks of.
    sys.path.insert(0, str(ROOT))
    try:
        device = HostDevice() if options.quick else CudaDevice()
    except NoDeviceError as error:
        print(f"{error}; --quick needs no GPU", file=sys.stderr)
        return 2
    contenders: list[Contender] = [Cupaged(device)]
    missing: dict[str, str] = {}
    if isinstance(device, CudaDevice):
        peers, missing = gather_peers(options.peers, device, options.dtype)
        contenders += peers
    ceilings = device.ceilings(options.dtype)
    head = header(
        device,
        {contender.name: contender.version for contender in contenders},
        missing,
        ceilings,
        ROOT,
        {"dtype": options.dtype, "quick": options.quick, "repeat": options.repeat},
    )
    workloads = [w for w in prefill_workloads(options.page_size) if w.name in options.workloads]
    if SWEEP in options.workloads:
        workloads += page_sweep()
    if options.quick:
        workloads = [shrink(workload) for workload in workloads]

    rng = np.random.default_rng()
    rows: list[Row] = []
    for workload in workloads:
        print(workload.name, end=" ", file=sys.stderr, flush=True)
        found = measure(workload, contenders, device, options.dtype, options.repeat, rng)
        for row in found:
            if row["us"] is not None:
                row |= rates(row, ceilings)
        rows += found
        device.free()
        # Written after each workload: a run that is cut short leaves what it had.
        if options.json:
            save(options.json, head, rows)
    if HOST in options.workloads:
        print(HOST, end="", file=sys.stderr, flush=True)
        rows += host_costs(contenders, options.dtype, device, options.quick)
    print(file=sys.stderr)
    if options.json:
        save(options.json, head, rows)
    if options.plot:
        plot(options.plot, head, rows)
    print("\n".join(table(head, rows)))
    return exit_status(rows)


def exit_status(rows: Sequence[Row]) -> int:
    """1 where a result is wrong or cupaged failed; a peer that can't do its part is only noted."""
    return int(
        any(
            row["status"] == "wrong"
            or (row["status"] == "failed" and row["contender"] == Cupaged.name)
            for row in rows
        )
    )


if __name__ == "__main__":
    sys.exit(main())
