"""What prefill is to reach on an H200.

The bars are for bfloat16 and pages of 16 tokens, permuted at random; cuDNN is PyTorch's
CUDNN_ATTENTION on contiguous tensors, timed in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bars import Bar, Beside, Quantity, Rows, Suite, first
from contender import Cupaged

CUDNN = "sdpa-cudnn"


def over_cudnn(rows: Rows, names: Sequence[str]) -> float | None:
    """Median of the paired rounds' ratios, above 1 where cupaged is faster."""
    peer = rows.get((names[0], CUDNN))
    return peer["speedup"] if peer is not None and peer["status"] == "ok" else None


def largest(field: str) -> Callable[[Rows, Sequence[str]], float | None]:
    """The largest value of cupaged's rows in a field."""

    def value(rows: Rows, names: Sequence[str]) -> float | None:
        values = [rows[name, Cupaged.name][field] for name in names]
        return None if None in values else max(values)

    return value


def page_spread(rows: Rows, names: Sequence[str]) -> float | None:
    """By how much the fastest page size is faster than the slowest."""
    ratios = [rows[name, Cupaged.name]["over_page16"] for name in names]
    return None if None in ratios else max(ratios) / min(ratios) - 1.0


def with_rates(rows: Rows, names: Sequence[str]) -> Beside:
    """TFLOP/s of the first row, cupaged's and cuDNN's."""
    return {
        "tflops": rows[names[0], Cupaged.name].get("tflops"),
        "cudnn_tflops": rows.get((names[0], CUDNN), {}).get("tflops"),
    }


QUANTITIES = {
    "x cuDNN": Quantity("{:.3f} × cuDNN", False, over_cudnn, with_rates, "no cuDNN"),
    "TFLOP/s": Quantity("{:.1f} TFLOP/s", False, first("tflops"), with_rates),
    "x page 16": Quantity("{:.3f} × page 16", False, first("over_page16"), with_rates),
    "page spread": Quantity("{:.1%}", True, page_spread),
    "graph µs": Quantity("{:.2f} µs", True, first("graph_us")),
    "host µs": Quantity("{:.1f} µs", True, first("value")),
    "plan µs": Quantity("{:.1f} µs", True, largest("plan_us")),
}

#: workloads whose `plan()` the main job bounds
PLANNED = (
    "1x16384-full",
    "1x16384-causal",
    "4x4096",
    "16x1024",
    "8x512-over-8192",
    "ragged-64",
    "prefill-among-decodes",
    "issue192",
)

BARS = (
    Bar("1 × 16,384, full", ("1x16384-full",), "x cuDNN", 1.0, 1.16),
    Bar("1 × 16,384, causal", ("1x16384-causal",), "x cuDNN", 1.0, 1.15),
    Bar("4 × 4,096, causal", ("4x4096",), "x cuDNN", 1.0, 1.10),
    Bar("4 × 4,096, causal, head_dim 64", ("4x4096-hd64",), "x cuDNN", 1.0),
    Bar("4 × 4,096, causal, head_dim 256", ("4x4096-hd256",), "x cuDNN", 1.0),
    Bar("16 × 1,024, causal", ("16x1024",), "x cuDNN", 1.0, 1.20),
    Bar("8 × (512 over 8,192), causal", ("8x512-over-8192",), "TFLOP/s", 620.0, 710.0),
    Bar("ragged, 64 requests", ("ragged-64",), "TFLOP/s", 560.0, 650.0),
    Bar("one prefill among 63 decodes", ("prefill-among-decodes",), "TFLOP/s", 600.0, 680.0),
    Bar("ten short requests, in a graph", ("issue192",), "graph µs", 9.5, 7.0),
    Bar(
        "page sizes 16 to 256, fastest/slowest",
        tuple(f"4x4096-page{size}" for size in (16, 32, 64, 128, 256)),
        "page spread",
        0.03,
    ),
    Bar("page size 1", ("4x4096-page1", "4x4096-page16"), "x page 16", 0.85),
    Bar("run(), host time", ("run-host",), "host µs", 20.0, 12.0),
    Bar("plan() of the batches above, slowest", PLANNED, "plan µs", 100.0),
    Bar("plan(), 64 ragged prefills", ("plan-64",), "host µs", 100.0),
    Bar("plan(), 64 short appends", ("plan-64-append",), "host µs", 100.0),
    Bar("plan(), 64 decodes", ("plan-64-decode",), "host µs", 100.0),
    Bar("plan(), 1,024 ragged prefills", ("plan-1024",), "host µs", 400.0),
    Bar("plan(), 1,024 short appends", ("plan-1024-append",), "host µs", 400.0),
    Bar("plan(), 1,024 decodes", ("plan-1024-decode",), "host µs", 400.0),
)

SUITE = Suite(
    bars=BARS,
    quantities=QUANTITIES,
    beside=(("TFLOP/s", 8, "tflops", ".1f"), ("cuDNN's", 8, "cudnn_tflops", ".1f")),
    widths=(38, 16),
)
