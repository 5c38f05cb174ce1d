"""What prefill costs beside the kernel: planning, launching, importing, compiling, loading."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from contender import Contender
from host_rows import Job, call_jobs, host_row, rows_of
from looks import Row
from problem import make_problem
from report import ROOT
from timing import HostDevice, host_us
from workloads import PageTable, Workload, issue192, make_page_table, ragged, shrink

HERE = Path(__file__).resolve().parent

#: Planned for: name, requests, median query length; 0 for one query each, as in decoding.
PLANS = (
    ("plan-64-decode", 64, 0.0),
    ("plan-1024-decode", 1024, 0.0),
    ("plan-64", 64, 256.0),
    ("plan-1024", 1024, 256.0),
    ("plan-64-append", 64, 16.0),
    ("plan-1024-append", 1024, 16.0),
)
PLAN_PAGE_SIZE = 16

#: All that can be measured here, as `--workloads` names it.
RUN, IMPORT, FIRST_CALL = "run-host", "import", "first-call"
HOST_COSTS = (*(name for name, _, _ in PLANS), RUN, IMPORT, FIRST_CALL)

#: What `import cupaged` must not bring along.
FOREIGN = ("cupy", "torch", "jax")


def host_costs(
    names: Sequence[str],
    contenders: Sequence[Contender],
    dtype: str,
    device: HostDevice,
    quick: bool,
) -> Iterator[Row]:
    """Rows of those of `HOST_COSTS` that are named; one that fails gives a row that says so."""
    rng = np.random.default_rng()
    jobs = list(plan_jobs(names, contenders, dtype, device, rng, quick))
    if RUN in names:
        workload = shrink(issue192()) if quick else issue192()
        problem = make_problem(workload, dtype, device, rng)
        jobs += call_jobs(RUN, problem, contenders, device, quick)
    if IMPORT in names:
        jobs.append(Job(IMPORT, "cupaged", lambda: import_rows(3 if quick else 7)))
    if FIRST_CALL in names and device.backend == "cuda":
        jobs.append(Job(FIRST_CALL, "cupaged", first_call_rows))
    return rows_of(jobs)


def plan_jobs(
    names: Sequence[str],
    contenders: Sequence[Contender],
    dtype: str,
    device: HostDevice,
    rng: np.random.Generator,
    quick: bool,
) -> Iterator[Job]:
    """µs of `plan()` from host arrays, the device idle."""
    for name, batch, query_median in PLANS:
        if name not in names:
            continue
        workload = ragged(name, batch, max(query_median, 1.0), PLAN_PAGE_SIZE)
        if query_median == 0:
            workload = replace(workload, qo_lens=(1,) * batch)
        if quick:
            workload = shrink(workload)
        table = make_page_table(workload, rng)

        def measure(
            contender: Contender, workload: Workload = workload, table: PageTable = table
        ) -> list[Row]:
            planner = contender.planner(workload, dtype)
            if planner is None:
                return []
            plan = planner(table)
            plan()
            times = host_us(plan, 5 if quick else 500, device)
            note = f"{sum(workload.qo_lens)} queries, {len(table.kv_indices)} pages"
            return [host_row(workload.name, contender.name, statistics.median(times), "us", note)]

        for contender in contenders:
            yield Job(name, contender.name, functools.partial(measure, contender))


def run_python(arguments: Sequence[str], environment: dict[str, str]) -> str:
    """What a new Python process prints; it finds this checkout's package.

    Raises
    ------
    RuntimeError
        It failed; the message is its last line.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")
    return done.stdout


def import_rows(repeat: int) -> list[Row]:
    """Seconds in a fresh process, and what came along: the import, and with the wrapper's class.

    The package imports what a public name needs when the name is first used.
    """
    rows = []
    for name, use in (
        (IMPORT, ""),
        ("import-wrapper", "cupaged.BatchPrefillWithPagedKVCacheWrapper; "),
    ):
        program = (
            f"import sys, time; start = time.perf_counter(); import cupaged; {use}"
            "print(time.perf_counter() - start, "
            f"*(name for name in {FOREIGN!r} if name in sys.modules))"
        )
        seconds, foreign = [], []
        for _ in range(repeat):
            taken, *foreign = run_python(["-c", program], {}).split()
            seconds.append(float(taken))
        note = f"brings {', '.join(foreign)}" if foreign else f"free of {', '.join(FOREIGN)}"
        rows.append(host_row(name, "cupaged", statistics.median(seconds), "s", note))
    return rows


def first_call_rows() -> list[Row]:
    """A process's first call on an empty kernel cache, and on the cache that one leaves.

    What a later call of the same process takes is subtracted, so that compiling and loading
    remain.
    """
    with tempfile.TemporaryDirectory(prefix="cupaged-bench-") as folder:
        # NVRTC keeps a cache of its own since 12.9, in the driver's folder: not for this.
        environment = {"CUPAGED_CACHE_DIR": folder, "CUDA_CACHE_DISABLE": "1"}
        times = [
            json.loads(run_python([str(HERE / "first_call.py")], environment)) for _ in range(2)
        ]
        files = sum(1 for path in Path(folder).rglob("*") if path.is_file())
    compiled, loaded = (t["first_ms"] - t["later_ms"] for t in times)
    note = f"{files} files in the cache, at most two cores"
    return [
        host_row("kernel-compile", "cupaged", compiled / 1e3, "s", note),
        host_row("kernel-load", "cupaged", loaded, "ms", "from the disk cache"),
    ]
