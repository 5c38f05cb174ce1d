"""What appending is to reach on an H200, beside plain copies of as many bytes in the same run."""

from __future__ import annotations

from collections.abc import Sequence

from append_contenders import COPIES
from bars import Bar, Beside, Quantity, Rows, Suite, gpu_speedup, gpu_us, sound
from contender import Cupaged

#: How much of the copy's bandwidth has to be reached,
SHARE_OF_COPY = 0.85
#: unless the call takes no longer than this, in µs.
SHORT_CALL = 8.0


def is_copy(contender: str) -> bool:
    return contender in COPIES


def over_allowed(rows: Rows, names: Sequence[str]) -> float | None:
    """How many times as fast as it has to be, held against the fastest way of copying."""
    ours = gpu_us(rows[names[0], Cupaged.name])
    ratios = [gpu_speedup(row) for row in sound(rows, names[0], is_copy)]
    known = [ratio for ratio in ratios if ratio is not None]
    if ours is None or not known:
        return None
    return max(min(known) / SHARE_OF_COPY, SHORT_CALL / ours)


def times_beside(rows: Rows, names: Sequence[str]) -> Beside:
    """µs of a call, of the fastest copy of as many bytes, and of FlashInfer's."""
    copies = [time for row in sound(rows, names[0], is_copy) if (time := gpu_us(row)) is not None]
    theirs = [gpu_us(row) for row in sound(rows, names[0], lambda name: name == "flashinfer")]
    return {
        "us": gpu_us(rows[names[0], Cupaged.name]),
        "copy_us": min(copies, default=None),
        "flashinfer_us": theirs[0] if theirs else None,
    }


QUANTITIES = {"x allowed": Quantity("{:.3f} ×", False, over_allowed, times_beside)}

BARS = (
    Bar("8 × 625 tokens", ("8x625",), "x allowed", 1.0),
    Bar("1 × 5,000 tokens", ("1x5000",), "x allowed", 1.0),
    Bar("64 × 1 token", ("64x1",), "x allowed", 1.0),
)

SUITE = Suite(
    bars=BARS,
    quantities=QUANTITIES,
    beside=(
        ("µs", 8, "us", ".2f"),
        ("copy µs", 8, "copy_us", ".2f"),
        ("FI µs", 8, "flashinfer_us", ".2f"),
    ),
    widths=(34, 12),
)
