"""What variants are to reach on an H200, beside the plain kernel in the same run."""

from __future__ import annotations

from collections.abc import Sequence

from bars import Bar, Beside, Quantity, Rows, Suite, first, gpu_us
from contender import Cupaged

#: The row's keys of its ratios to the plain one's: TFLOP/s, and how many times as fast it is.
RATE_RATIO, FASTER = "rate_ratio", "faster"


def times_beside(rows: Rows, names: Sequence[str]) -> Beside:
    """µs of the variant and of the plain one."""
    us, plain = (gpu_us(rows[name, Cupaged.name]) for name in names)
    return {"us": us, "plain_us": plain}


QUANTITIES = {
    "x plain TFLOP/s": Quantity("{:.3f} ×", False, first(RATE_RATIO), times_beside),
    "x plain speed": Quantity("{:.2f} ×", False, first(FASTER), times_beside),
}

BARS = (
    Bar("4 × 4,096, window: TFLOP/s", ("4x4096-window", "4x4096"), "x plain TFLOP/s", 0.85),
    Bar("4 × 4,096, soft cap: TFLOP/s", ("4x4096-softcap", "4x4096"), "x plain TFLOP/s", 0.85),
    *(
        Bar(
            f"1 × 16,384, window, heads {heads.replace('-', '/')}",
            (f"1x16384-heads{heads}-window", f"1x16384-heads{heads}"),
            "x plain speed",
            6.0,
        )
        for heads in ("16-16", "32-8")
    ),
    *(
        Bar(
            f"64 × 8,192, {kind} of float16: tokens/s",
            (f"64x8192-float16-{kind}", "64x8192-float16"),
            "x plain speed",
            1.7,
        )
        for kind in ("e4m3", "e5m2")
    ),
)

SUITE = Suite(
    bars=BARS,
    quantities=QUANTITIES,
    beside=(("µs", 9, "us", ".1f"), ("plain µs", 9, "plain_us", ".1f")),
    widths=(42, 10),
)
