"""What decoding is to reach on an H200, beside FlashInfer in the same run.

The bars are for float16, head_dim 128 and pages of 16 tokens, permuted at random. FlashInfer's
figure is that of whichever of its wrappers is fastest: on tensor cores or on CUDA cores, and for
several queries a request its prefill wrappers too.
"""

from __future__ import annotations

from collections.abc import Sequence

from bars import Bar, Beside, Quantity, Rows, Suite, first, gpu_speedup, gpu_us, sound
from contender import Cupaged


def is_flashinfer(contender: str) -> bool:
    return contender.startswith("flashinfer")


def over_flashinfer(rows: Rows, names: Sequence[str]) -> float | None:
    """Median of the paired rounds' ratios to the fastest, above 1 where cupaged is faster."""
    ratios = (gpu_speedup(row) for row in sound(rows, names[0], is_flashinfer))
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def rates_beside(rows: Rows, names: Sequence[str]) -> Beside:
    """GB/s of cupaged and of the fastest of FlashInfer's."""
    peers = [row for row in sound(rows, names[0], is_flashinfer) if gpu_us(row) is not None]
    return {
        "gbs": rows[names[0], Cupaged.name]["gbs"],
        "flashinfer_gbs": max((row["gbs"] for row in peers), default=None),
    }


def plans_beside(rows: Rows, names: Sequence[str]) -> Beside:
    """µs of the fastest of FlashInfer's plans."""
    times = [row["value"] for row in sound(rows, names[0], is_flashinfer)]
    return {"flashinfer_us": min(times, default=None)}


QUANTITIES = {
    "x FlashInfer": Quantity("{:.3f} ×", False, over_flashinfer, rates_beside, "no FlashInfer"),
    "plan µs": Quantity("{:.1f} µs", True, first("value"), plans_beside),
}

BARS = (
    Bar("64 × 8,192", ("64x8192",), "x FlashInfer", 0.98, 1.0),
    Bar("1 × 131,072", ("1x131072",), "x FlashInfer", 1.0, 1.06),
    Bar("256 × 1,024", ("256x1024",), "x FlashInfer", 1.0, 1.05),
    Bar("16 × 4,096, heads 32/32", ("16x4096-heads32-32",), "x FlashInfer", 0.98, 1.0),
    Bar("64 × 8,192, heads 8/1", ("64x8192-heads8-1",), "x FlashInfer", 1.0, 1.1),
    Bar("128 log-normal, 4,096 on average", ("lognormal-128",), "x FlashInfer", 1.2, 1.3),
    Bar("64 × 4 queries over 8,192", ("64x8192-4queries",), "x FlashInfer", 0.98, 1.0),
    Bar("plan(), batch 64", ("plan-64",), "plan µs", 80.0),
    Bar("plan(), batch 1,024", ("plan-1024",), "plan µs", 250.0),
)

SUITE = Suite(
    bars=BARS,
    quantities=QUANTITIES,
    beside=(
        ("GB/s", 8, "gbs", ".0f"),
        ("FI GB/s", 8, "flashinfer_gbs", ".0f"),
        ("FI plan", 8, "flashinfer_us", ".1f"),
    ),
    widths=(34, 12),
)
