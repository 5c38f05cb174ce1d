"""What cupaged holds itself to on an H200, and whether a run reached it.

The bars are for bfloat16 and pages of 16 tokens, permuted at random; cuDNN is PyTorch's
CUDNN_ATTENTION on contiguous tensors, timed in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contender import Cupaged
from report import Row, cell

CUDNN = "sdpa-cudnn"

#: The rows that are there, by workload and contender.
Rows = Mapping[tuple[str, str], Row]


def over_cudnn(rows: Rows, names: Sequence[str]) -> float | None:
    """Median of the paired rounds' ratios, above 1 where cupaged is faster."""
    peer = rows.get((names[0], CUDNN))
    return peer["speedup"] if peer is not None and peer["status"] == "ok" else None


def first(field: str) -> Callable[[Rows, Sequence[str]], float | None]:
    """A field of the first of cupaged's rows."""
    return lambda rows, names: rows[names[0], Cupaged.name][field]


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


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a bar is about.

    Attributes
    ----------
    form : str
        How a value is printed.
    at_most : bool
        Less is better.
    value : callable
        Finds the value from the rows and the names of the bar's, whose first is the one that the
        bar is about.
    rate : bool
        TFLOP/s of the first row belong beside it.
    """

    form: str
    at_most: bool
    value: Callable[[Rows, Sequence[str]], float | None]
    rate: bool = False


QUANTITIES = {
    "x cuDNN": Quantity("{:.3f} × cuDNN", False, over_cudnn, rate=True),
    "TFLOP/s": Quantity("{:.1f} TFLOP/s", False, first("tflops"), rate=True),
    "x page 16": Quantity("{:.3f} × page 16", False, first("over_page16"), rate=True),
    "page spread": Quantity("{:.1%}", True, page_spread),
    "graph µs": Quantity("{:.2f} µs", True, first("graph_us")),
    "host µs": Quantity("{:.1f} µs", True, first("value")),
    "plan µs": Quantity("{:.1f} µs", True, largest("plan_us")),
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One figure to be reached.

    Attributes
    ----------
    work : str
        What the table calls it.
    rows : tuple of str
        The workloads and host costs that it is measured on, as `--workloads` names them.
    quantity : str
        A key of `QUANTITIES`.
    must, aim : float
        What has to be reached, and what is hoped for; an aim of None is the must.
    """

    work: str
    rows: tuple[str, ...]
    quantity: str
    must: float
    aim: float | None = None


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

#: All rows that some bar needs, as `--workloads` names them.
NEEDED = tuple(dict.fromkeys(name for bar in BARS for name in bar.rows))

#: A column: its heading, its width (negative: to the left), the verdict's key.
COLUMNS = (
    ("bar", -38, "work"),
    ("must", 16, "must"),
    ("aim", 16, "aim"),
    ("measured", 16, "measured"),
    ("TFLOP/s", 8, "tflops"),
    ("cuDNN's", 8, "cudnn_tflops"),
)


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every bar whose rows are there, with what was measured.

    Parameters
    ----------
    rows : list of dict
        The run's rows of every kind.

    Returns
    -------
    list of dict
        `verdict` is "aim met", "met", "missed", or, where `measured` is None, why: the status of
        cupaged's row, or "no cuDNN".
    """
    found = {(row["workload"], row["contender"]): row for row in rows}
    return [
        judged(bar, found)
        for bar in BARS
        if all((name, Cupaged.name) in found for name in bar.rows)
    ]


def judged(bar: Bar, rows: Rows) -> dict[str, Any]:
    """A bar beside what was measured; all of the bar's rows are there."""
    ours = [rows[name, Cupaged.name] for name in bar.rows]
    bad = [row["status"] for row in ours if row["status"] != "ok"]
    quantity = QUANTITIES[bar.quantity]
    measured = None if bad else quantity.value(rows, bar.rows)
    peer = rows.get((bar.rows[0], CUDNN), {})
    return {
        "work": bar.work,
        "rows": list(bar.rows),
        "quantity": bar.quantity,
        "must": bar.must,
        "aim": bar.aim,
        "measured": measured,
        "tflops": ours[0].get("tflops") if quantity.rate else None,
        "cudnn_tflops": peer.get("tflops") if quantity.rate else None,
        "verdict": verdict(bar, quantity, measured, bad),
    }


def verdict(bar: Bar, quantity: Quantity, measured: float | None, bad: Sequence[str]) -> str:
    """The word for it."""
    if bad:
        return bad[0]
    if measured is None:
        return "no cuDNN" if bar.quantity == "x cuDNN" else "not measured"

    def reached(level: float) -> bool:
        return measured <= level if quantity.at_most else measured >= level

    if not reached(bar.must):
        return "missed"
    return "aim met" if bar.aim is not None and reached(bar.aim) else "met"


def bar_table(found: Sequence[Mapping[str, Any]], title: str) -> Iterator[str]:
    """Lines that show the bars, what was measured, and the verdicts."""
    if not found:
        return
    missed = sum(one["verdict"] not in ("met", "aim met") for one in found)
    yield f"{title}: {len(found) - missed} of {len(found)} met"
    yield " ".join(cell(name, width, "s") for name, width, _ in COLUMNS) + "  verdict"
    for one in found:
        form = QUANTITIES[one["quantity"]].form
        shown = dict(one)
        for key in ("must", "aim", "measured"):
            shown[key] = None if one[key] is None else form.format(one[key])
        for key in ("tflops", "cudnn_tflops"):
            shown[key] = None if one[key] is None else f"{one[key]:.1f}"
        line = " ".join(cell(shown[key], width, "s") for _, width, key in COLUMNS)
        yield f"{line}  {one['verdict']}"
