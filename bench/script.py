"""What the benchmark's scripts have in common: options, the run, what is written and printed."""

from __future__ import annotations

import argparse
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bars import Suite
from ceilings import ceilings
from contender import Contender, Cupaged, Factory, gather_peers
from looks import Look, Row
from measure import Method, measure
from plotting import plot
from problem import Problem
from report import ROOT, header, rates, save, table
from timing import CudaDevice, HostDevice, NoDeviceError
from workloads import DTYPES, LENGTH_SWEEP, PAGE_SWEEP, Workload

#: What one name in `--workloads` stands for in every script: the host's costs, the bars' rows.
HOST, BARS = "host", "bars"


class Benchmark(ABC):
    """One script: what it measures, against whom, and how that is shown.

    Attributes
    ----------
    about : str
        The script's docstring, for `--help`.
    host_names : tuple of str
        The host's costs, as `--workloads` names them.
    peers : dict
        What makes each peer.
    ceilings : tuple of str
        Which rates of the device are measured.
    look, suite, method
        How figures are shown, what they are held against, how they are taken.
    """

    about: str
    host_names: tuple[str, ...]
    peers: Mapping[str, Factory]
    ceilings: tuple[str, ...]
    look: Look
    suite: Suite
    method: Method

    @abstractmethod
    def workloads(self, options: argparse.Namespace | None) -> list[Workload]:
        """All workloads, in the order in which they run; without options, for their names alone."""

    @abstractmethod
    def shrink(self, workload: Workload) -> Workload:
        """The workload at a size for `--quick`."""

    @abstractmethod
    def contenders(self, device: HostDevice) -> list[Contender]:
        """Those who are there without being installed: cupaged, first of all."""

    @abstractmethod
    def problem(
        self,
        workload: Workload,
        options: argparse.Namespace,
        device: HostDevice,
        rng: np.random.Generator,
    ) -> Problem:
        """The workload's arrays on the device."""

    @abstractmethod
    def host_rows(
        self, options: argparse.Namespace, contenders: Sequence[Contender], device: HostDevice
    ) -> Iterable[Row]:
        """Rows of the host's costs that are chosen."""

    @abstractmethod
    def conditions(self, options: argparse.Namespace) -> str:
        """What the bars speak of, and what this run had."""

    def own_options(self) -> dict[str, dict[str, Any]]:
        """Options of this script alone, as `add_argument` takes them."""
        return {}

    def rounds(self, sweep: str, repeat: int) -> int:
        """How many rounds the points of a sweep are timed for; the empty sweep is no sweep."""
        return repeat

    def groups(self) -> dict[str, tuple[str, ...]]:
        """What one name in `--workloads` stands for, beside the name of every row."""
        everything = self.workloads(None)
        sweeps = {
            sweep: tuple(w.name for w in everything if w.sweep == sweep)
            for sweep in (LENGTH_SWEEP, PAGE_SWEEP)
        }
        found = {sweep: names for sweep, names in sweeps.items() if names}
        return {**found, HOST: self.host_names, BARS: self.suite.needed}


def positive(text: str) -> int:
    """A positive whole number, as `argparse` takes it."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive whole number")
    return int(text)


def some_of(allowed: Sequence[str]) -> Any:
    """Names with commas between them, as `argparse` takes them."""

    def split(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        for name in chosen:
            if name not in allowed:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is unknown, expected some of {', '.join(allowed)}"
                )
        return chosen

    return split


def parse(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options, checked."""
    everything = benchmark.workloads(None)
    table = [workload.name for workload in everything if not workload.sweep]
    rows = [*(workload.name for workload in everything), *benchmark.host_names]
    groups = benchmark.groups()
    shown = [*table, *groups]
    parser = argparse.ArgumentParser(
        description=benchmark.about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    for option, how in benchmark.own_options().items():
        parser.add_argument(option, **how)
    parser.add_argument(
        "--workloads",
        type=some_of([*shown, *(name for name in rows if name not in table)]),
        metavar="A,B",
        help=f"some of {', '.join(shown)}, or of the rows of the latter ones, such as "
        f"{rows[-1]}; {BARS} is what the bars are measured on; by default all",
    )
    parser.add_argument(
        "--peers",
        type=some_of(list(benchmark.peers)),
        metavar="A,B",
        help=f"some of {', '.join(benchmark.peers)}; by default all that are installed; '' for "
        "none",
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
        options.peers = [] if options.quick else list(benchmark.peers)
    chosen = rows if options.workloads is None else options.workloads
    options.workloads = [row for name in chosen for row in groups.get(name, (name,))]
    if options.repeat is None:
        options.repeat = 3 if options.quick else 20
    return options


def run(benchmark: Benchmark, arguments: Sequence[str] | None) -> int:
    """Run the benchmark; returns the exit status."""
    options = parse(benchmark, arguments)
    clock = Clock()
    # This checkout's package is what the header's commit speaks of.
    sys.path.insert(0, str(ROOT))
    try:
        device = HostDevice() if options.quick else CudaDevice()
    except NoDeviceError as error:
        print(f"{error}; --quick needs no GPU", file=sys.stderr)
        return 2
    contenders = benchmark.contenders(device)
    missing: dict[str, str] = {}
    if isinstance(device, CudaDevice):
        peers, missing = gather_peers(options.peers, device, options.dtype, benchmark.peers)
        contenders += peers
    limits = ceilings(device, options.dtype, benchmark.ceilings)
    own = {name: getattr(options, name) for name in ("dtype", "page_size") if name in options}
    head = header(
        device,
        {contender.name: contender.version for contender in contenders},
        missing,
        limits,
        ROOT,
        {**own, "quick": options.quick, "repeat": options.repeat, "seconds": clock.seconds},
    )
    device.free()
    clock.lap("start")
    rng = np.random.default_rng()
    rows: list[Row] = []
    for name, workloads in turns(benchmark, options):
        found = measured(benchmark, workloads, contenders, device, options, rng)
        for row in found:
            if row["us"] is not None:
                row |= rates(row, limits, benchmark.method.time)
        rows += found
        device.free()
        clock.lap(name)
        # Written after each turn: a run that is cut short leaves what it had.
        if options.json:
            save(options.json, head, rows, [])
    rows += benchmark.host_rows(options, contenders, device)
    clock.lap(HOST)
    print(file=sys.stderr)
    # Of the reference backend they would say nothing.
    bars = [] if options.quick else benchmark.suite.verdicts(rows)
    if options.json:
        save(options.json, head, rows, bars)
    if options.plot:
        plot(options.plot, head, rows, benchmark.look)
    title = f"bars for an H200, {benchmark.conditions(options)}"
    print("\n".join([*table(head, rows, benchmark.look), *benchmark.suite.table(bars, title)]))
    return exit_status(rows)


def measured(
    benchmark: Benchmark,
    workloads: Sequence[Workload],
    contenders: Sequence[Contender],
    device: HostDevice,
    options: argparse.Namespace,
    rng: np.random.Generator,
) -> list[Row]:
    """Rows of workloads that are measured together; their arrays go when it returns."""
    problems = [benchmark.problem(workload, options, device, rng) for workload in workloads]
    repeat = benchmark.rounds(workloads[0].sweep, options.repeat)
    return measure(problems, contenders, device, repeat, rng, benchmark.method)


class Clock:
    """Wall-clock seconds of the parts of a run, said on stderr as they pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a part; the next begins."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 1)
        self._last = now
        print(f"{name} {self.seconds[name]} s", end=" · ", file=sys.stderr, flush=True)


def turns(benchmark: Benchmark, options: argparse.Namespace) -> list[tuple[str, list[Workload]]]:
    """The chosen workloads, by what is measured together.

    The page sizes are: a drift of the clock must meet them alike.
    """
    chosen = [w for w in benchmark.workloads(options) if w.name in options.workloads]
    if options.quick:
        chosen = [benchmark.shrink(workload) for workload in chosen]
    alone = [(w.name, [w]) for w in chosen if w.sweep != PAGE_SWEEP]
    pages = [w for w in chosen if w.sweep == PAGE_SWEEP]
    return [*alone, (PAGE_SWEEP, pages)] if pages else alone


def exit_status(rows: Sequence[Row]) -> int:
    """1 where a result is wrong or cupaged failed; a peer that can't do its part is only noted."""
    return int(
        any(
            row["status"] == "wrong"
            or (row["status"] == "failed" and row["contender"].startswith(Cupaged.name))
            for row in rows
        )
    )
