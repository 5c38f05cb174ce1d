"""Checking and timing contenders side by side, a row of figures for each and each workload."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from check import Verdict
from contender import Contender, Cupaged, Runner
from looks import Row
from problem import Problem
from timing import (
    Call,
    HostDevice,
    NotCapturableError,
    calls_in_graph,
    first_line,
    host_us,
    interleave,
    paired_ratio,
)
from workloads import PAGE_SWEEP

#: Workload and contender.
Key = tuple[str, str]

WARMUP = 3
PLAN_REPEAT = 200

#: What the other page sizes of the sweep are compared with.
USUAL_PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Method:
    """How a benchmark takes its times.

    Attributes
    ----------
    time : str
        The row's key of the time that its rates are of: "us", of single calls by events, or
        "graph_us", of calls in a CUDA graph, where there is one.
    sweeps_in_graphs : bool
        The points of a sweep are recorded into CUDA graphs too. Where their calls are long, a graph
        would say the same again.
    plans : bool
        `plan()` is timed too, for the same arrays again and again.
    """

    time: str
    sweeps_in_graphs: bool
    plans: bool


def measure(
    problems: Sequence[Problem],
    contenders: Sequence[Contender],
    device: HostDevice,
    repeat: int,
    rng: np.random.Generator,
    method: Method,
) -> list[Row]:
    """Check and time every contender on some problems that are to be compared.

    All take turns: contenders and problems alike.

    Returns
    -------
    list of dict
        A row for each problem and contender that can do it, problem by problem.
    """
    rows: dict[Key, Row] = {}
    runners: dict[Key, Runner] = {}
    sweeps: dict[Key, str] = {}
    for problem in problems:
        for contender in contenders:
            if contender.unfit(problem.workload) is None:
                key = problem.workload.name, contender.name
                row = rows[key] = new_row(problem, contender.name)
                sweeps[key] = problem.workload.sweep
                with recorded(row):
                    runners[key] = checked(contender.prepare(problem), row, rng)
    times = interleave({key: r.sample for key, r in runners.items()}, WARMUP, repeat, device)
    for key, taken in times.items():
        rows[key] |= {"us": statistics.median(taken), "us_all": taken}
    compare(rows, times, "speedup")
    compare_pages(rows, times)
    replayed = {key: r for key, r in runners.items() if method.sweeps_in_graphs or not sweeps[key]}
    replays = time_graphs(replayed, rows, device, repeat, rng)
    compare(rows, replays, "graph_speedup")
    # Where there are graphs, their times say more of the page sizes.
    compare_pages(rows, replays)
    if method.plans:
        for problem in problems:
            for contender in contenders:
                key = problem.workload.name, contender.name
                if key in runners:
                    with recorded(rows[key]):
                        rows[key]["plan_us"] = plan_us(contender, problem, device)
    return list(rows.values())


def plan_us(contender: Contender, problem: Any, device: HostDevice) -> float | None:
    """µs of `plan()` for the same arrays again and again; None where there is no such step."""
    planner = contender.planner(problem.workload, problem.dtype)
    if planner is None:
        return None
    plan = planner(problem.table)
    plan()
    return statistics.median(host_us(plan, PLAN_REPEAT, device))


def time_graphs(
    runners: Mapping[Key, Runner],
    rows: Mapping[Key, Row],
    device: HostDevice,
    repeat: int,
    rng: np.random.Generator,
) -> dict[Key, list[float]]:
    """µs of a call in a CUDA graph, for those that can be recorded; also written into the rows."""
    # As many calls for all, so that what a graph's start costs weighs on all alike: one contender's
    # single calls may be longer than another's only by what its host does.
    shortest: dict[str, float] = {}
    for (workload, _), row in rows.items():
        if row["us"] is not None:
            shortest[workload] = min(row["us"], shortest.get(workload, row["us"]))
    graphs: dict[Key, Call] = {}
    for key, runner in runners.items():
        rows[key]["graph_calls"] = calls_in_graph(shortest[key[0]])
        with recorded(rows[key]):
            graphs[key] = captured(runner, rows[key], rng)
    replays = interleave(
        {key: functools.partial(device.sample, replay) for key, replay in graphs.items()},
        WARMUP,
        repeat,
        device,
    )
    for key, taken in replays.items():
        taken[:] = [t / rows[key]["graph_calls"] for t in taken]
        rows[key].update(graph_us=statistics.median(taken), graph_us_all=taken)
    return replays


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
    judge(row, runner.verdict(rng), "")
    runner.sample()
    runner.device.synchronize()
    return runner


def captured(runner: Runner, row: Row, rng: np.random.Generator) -> Call:
    """Record a contender's calls into a CUDA graph, and compare what a replay computes."""
    replay = runner.capture(row["graph_calls"])
    runner.poison()
    replay()
    judge(row, runner.verdict(rng), " in a CUDA graph")
    return replay


def new_row(problem: Problem, contender: str) -> Row:
    """A row before anything was measured."""
    return {
        **problem.describe(),
        "contender": contender,
        "us": None,
        "us_all": [],
        "graph_us": None,
        "graph_us_all": [],
        "graph_calls": None,
        "tflops": None,
        "gbs": None,
        "share_of_matmul": None,
        "share_of_copy": None,
        "share_of_read": None,
        "speedup": None,
        "graph_speedup": None,
        "over_page16": None,
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


def compare(rows: Mapping[Key, Row], times: Mapping[Key, list[float]], field: str) -> None:
    """How many times as fast as each contender cupaged is, round by round."""
    for (workload, contender), taken in times.items():
        ours = times.get((workload, Cupaged.name))
        if ours is not None and contender != Cupaged.name:
            rows[workload, contender][field] = paired_ratio(taken, ours)


def compare_pages(rows: Mapping[Key, Row], times: Mapping[Key, list[float]]) -> None:
    """How fast each contender is at each page size of the sweep, with that at 16 as 1."""
    swept = [(key, rows[key]) for key in times if rows[key].get("sweep") == PAGE_SWEEP]
    usual = {row["contender"]: key for key, row in swept if row["page_size"] == USUAL_PAGE_SIZE}
    for key, row in swept:
        if row["contender"] in usual:
            row["over_page16"] = paired_ratio(times[usual[row["contender"]]], times[key])
