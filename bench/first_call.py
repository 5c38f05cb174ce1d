"""Time the first attention call of a process and a later one; prints them as JSON.

`host_costs.py` starts it twice on one fresh kernel cache: the first time it compiles, the second
time it loads. CuPy and the GPU's context are up before the clock starts.
"""

from __future__ import annotations

import json
import os
import time

import numpy as np
from contender import Cupaged
from problem import make_problem
from timing import CudaDevice
from workloads import Workload


def main() -> None:
    """Solve one small problem with a new wrapper, several times, on two cores where it can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    device = CudaDevice()
    contender = Cupaged(device)
    # Four equal requests of one tile each: no split, so no kernel but the attention kernel.
    workload = Workload("first-call", (128,) * 4, (128,) * 4, 32, 8, True, page_size=16)
    problem = make_problem(workload, "float16", device, np.random.default_rng())
    device.synchronize()
    milliseconds = []
    for _ in range(6):
        start = time.perf_counter()
        contender.prepare(problem).call()
        device.synchronize()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    print(json.dumps({"first_ms": milliseconds[0], "later_ms": min(milliseconds[1:])}))


if __name__ == "__main__":
    main()
