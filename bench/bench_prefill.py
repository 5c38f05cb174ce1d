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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bars import NEEDED, bar_table, verdicts
from contender import Contender, Cupaged
from host_costs import HOST_COSTS, ROOT, host_costs
from measure import measure
from peers import PEERS, gather_peers
from plotting import plot
from report import Row, header, rates, save, table
from timing import CudaDevice, HostDevice, NoDeviceError
from workloads import (
    DTYPES,
    LENGTH_SWEEP,
    PAGE_SWEEP,
    Workload,
    length_sweep,
    page_sweep,
    prefill_workloads,
    shrink,
)

HOST = "host"
BARS = "bars"

#: What one name in `--workloads` stands for, beside the name of every row.
GROUPS: dict[str, tuple[str, ...]] = {
    LENGTH_SWEEP: tuple(workload.name for workload in length_sweep(16)),
    PAGE_SWEEP: tuple(workload.name for workload in page_sweep()),
    HOST: HOST_COSTS,
    BARS: NEEDED,
}


def catalogue(page_size: int) -> list[Workload]:
    """All workloads, in the order in which they run."""
    return [*prefill_workloads(page_size), *length_sweep(page_size), *page_sweep()]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options, checked."""
    table = [workload.name for workload in prefill_workloads(16)]
    rows = [*(workload.name for workload in catalogue(16)), *HOST_COSTS]
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
        help=f"of all workloads (16) but issue192 and {PAGE_SWEEP}, which have their own",
    )
    parser.add_argument(
        "--workloads",
        type=listed([*table, *GROUPS, *(name for name in rows if name not in table)]),
        metavar="A,B",
        help=f"some of {', '.join([*table, *GROUPS])}, or of the rows of the latter ones, such as "
        f"{rows[-1]}; {BARS} is what the bars are measured on; by default all",
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
    chosen = rows if options.workloads is None else options.workloads
    options.workloads = [row for name in chosen for row in GROUPS.get(name, (name,))]
    if options.repeat is None:
        options.repeat = 3 if options.quick else 20
    return options


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
        {
            "dtype": options.dtype,
            "page_size": options.page_size,
            "quick": options.quick,
            "repeat": options.repeat,
            "seconds": clock.seconds,
        },
    )
    clock.lap("start")
    rng = np.random.default_rng()
    rows: list[Row] = []
    for name, workloads in turns(options):
        repeat = options.repeat
        if workloads[0].sweep == LENGTH_SWEEP:
            # Its longest calls take as long as all the others together, and no bar is on them.
            repeat = -(-repeat // 2)
        found = measure(workloads, contenders, device, options.dtype, repeat, rng)
        for row in found:
            if row["us"] is not None:
                row |= rates(row, ceilings)
        rows += found
        device.free()
        clock.lap(name)
        # Written after each turn: a run that is cut short leaves what it had.
        if options.json:
            save(options.json, head, rows, [])
    rows += host_costs(options.workloads, contenders, options.dtype, device, options.quick)
    clock.lap(HOST)
    print(file=sys.stderr)
    # Of the reference backend they would say nothing.
    found_bars = [] if options.quick else verdicts(rows)
    if options.json:
        save(options.json, head, rows, found_bars)
    if options.plot:
        plot(options.plot, head, rows)
    title = f"bars for an H200, bfloat16, pages of 16 (this run: {options.dtype}, pages of "
    title += f"{options.page_size})"
    print("\n".join([*table(head, rows), *bar_table(found_bars, title)]))
    return exit_status(rows)


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


def turns(options: argparse.Namespace) -> list[tuple[str, list[Workload]]]:
    """The chosen workloads, by what is measured together.

    The page sizes are: a drift of the clock must meet them alike.
    """
    chosen = [w for w in catalogue(options.page_size) if w.name in options.workloads]
    if options.quick:
        chosen = [shrink(workload) for workload in chosen]
    alone = [(w.name, [w]) for w in chosen if w.sweep != PAGE_SWEEP]
    pages = [w for w in chosen if w.sweep == PAGE_SWEEP]
    return [*alone, (PAGE_SWEEP, pages)] if pages else alone


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
