"""How each benchmark's figures are shown: the columns, the words, the rate that matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workloads import LENGTH_SWEEP, PAGE_SWEEP

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Look:
    """How a benchmark's figures are shown, as a table and as a picture.

    Attributes
    ----------
    columns : tuple
        Of each: its heading, its width (negative: to the left), the row's key, its format.
    legend : str
        Lines that say what the columns mean.
    rate, unit : str
        The row's key of what sweeps and pictures show, and its unit.
    time : str
        The row's key of the time that the rates are of, where there is one: "us" or "graph_us".
    sweeps : dict
        A sweep's rows make a table of their own: its heading, and the ratio that is said beneath a
        contender's rates by its name and the row's key.
    ceilings : dict
        Which of the header's ceilings belong into a picture, and what is said of each.
    title : callable
        What stands above the picture of the lengths, from one of its rows.
    lengths : str
        What stands beneath it.
    pages : str
        What stands above the picture of the page sizes.
    suffixes : callable
        What the legend of the lengths says of contenders beside their names, from the names and one
        of the rows.
    """

    columns: tuple[tuple[str, int, str, str], ...]
    legend: str
    rate: str
    unit: str
    time: str
    sweeps: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    ceilings: Mapping[str, str] = field(default_factory=dict)
    title: Callable[[Row], str] = lambda row: ""
    lengths: str = ""
    pages: str = ""
    suffixes: Callable[[Sequence[str], Row], Mapping[str, str]] = lambda names, row: {}


def contiguous_or_paged(names: Sequence[str], row: Row) -> Mapping[str, str]:
    """Who reads pages, and who contiguous tensors."""
    paged = f", pages of {row['page_size']} permuted at random"
    reads_pages = ("cupaged", "flashinfer-fa2", "flashinfer-fa3")
    return {name: paged if name in reads_pages else ", contiguous" for name in names}


def prefill_title(row: Row) -> str:
    kind = "causal" if row["causal"] else "full"
    heads = f"{row['num_qo_heads']}/{row['num_kv_heads']} heads"
    return f"Batch prefill, {kind}, {heads}, head_dim {row['head_dim']}"


PREFILL = Look(
    columns=(
        ("workload", -21, "workload", "s"),
        ("contender", -14, "contender", "s"),
        ("µs", 9, "us", ".1f"),
        ("graph µs", 9, "graph_us", ".1f"),
        ("TFLOP/s", 8, "tflops", ".1f"),
        ("%mm", 5, "share_of_matmul", ".0%"),
        ("GB/s", 7, "gbs", ".0f"),
        ("%cp", 5, "share_of_copy", ".0%"),
        ("speedup", 8, "speedup", ".2f"),
        ("in graph", 8, "graph_speedup", ".2f"),
        ("plan µs", 8, "plan_us", ".0f"),
        ("rel.err", 8, "max_rel_err", ".1e"),
    ),
    legend="""\
µs: median of single calls, by events on a GPU; graph µs: of calls back to back in a CUDA graph.
A call shorter than its launch from Python has the launch for its µs: graph µs is the kernel's.
TFLOP/s and GB/s are of µs: 4 head_dim FLOPs a visible (query head row, key) pair; K, V, Q read
once, the output written once. %mm, %cp: of the matrix product and the copy above.
speedup: cupaged over this contender, median of paired rounds. rel.err: of sampled rows.
over its page 16: a contender's speed, that at page size 16 being 1, median of paired rounds.
*: K and V fit in the L2 cache. !: wrong output.""",
    rate="tflops",
    unit="TFLOP/s",
    time="us",
    sweeps={
        LENGTH_SWEEP: ("TFLOP/s by length", "  cupaged over it", "speedup"),
        PAGE_SWEEP: ("TFLOP/s by page size", "  over its page 16", "over_page16"),
    },
    ceilings={"matmul_tflops": "the card's matrix product, {:.0f} TFLOP/s"},
    title=prefill_title,
    lengths="tokens of a request, and how many requests",
    pages="By page size, 4 × 4,096",
    suffixes=contiguous_or_paged,
)


def decode_title(row: Row) -> str:
    heads = f"{row['num_qo_heads']}/{row['num_kv_heads']} heads"
    return (
        f"Batch decode, {len(row['kv_lens'])} requests, {heads}, head_dim {row['head_dim']}, "
        f"pages of {row['page_size']} permuted at random"
    )


DECODE = Look(
    columns=(
        ("workload", -21, "workload", "s"),
        ("contender", -14, "contender", "s"),
        ("graph µs", 9, "graph_us", ".1f"),
        ("µs", 9, "us", ".1f"),
        ("GB/s", 7, "gbs", ".0f"),
        ("%rd", 5, "share_of_read", ".0%"),
        ("in graph", 8, "graph_speedup", ".3f"),
        ("speedup", 8, "speedup", ".3f"),
        ("rel.err", 8, "max_rel_err", ".1e"),
    ),
    legend="""\
graph µs: of calls back to back in a CUDA graph, no launch from the host among them; µs: median of
single calls, by events. A call shorter than its launch from Python has the launch for its µs.
GB/s are of graph µs, of µs where there is no graph: K and V read once, Q read and the output
written once. %rd: of the read above. Where K and V would stay in the L2 cache, calls take turns on
several layers, which do not.
in graph, speedup: cupaged over this contender, medians of paired rounds of graph µs and of µs.
over its page 16: a contender's speed, that at page size 16 being 1, median of paired rounds.
rel.err: of all rows. *: K and V of all layers fit in the L2 cache. !: wrong output.""",
    rate="gbs",
    unit="GB/s",
    time="graph_us",
    sweeps={
        LENGTH_SWEEP: ("GB/s by length", "  cupaged over it", "graph_speedup"),
        PAGE_SWEEP: ("GB/s by page size", "  over its page 16", "over_page16"),
    },
    ceilings={
        "read_gbs": "the card's plain read, {:.0f} GB/s",
        "copy_gbs": "its copy, {:.0f} GB/s",
    },
    title=decode_title,
    lengths="keys of a request, and how many requests",
    pages="By page size, 64 × 8,192",
)

APPEND = Look(
    columns=(
        ("workload", -21, "workload", "s"),
        ("contender", -14, "contender", "s"),
        ("tokens", 7, "tokens", "d"),
        ("graph µs", 9, "graph_us", ".2f"),
        ("µs", 9, "us", ".1f"),
        ("GB/s", 7, "gbs", ".0f"),
        ("%cp", 5, "share_of_copy", ".0%"),
        ("in graph", 8, "graph_speedup", ".3f"),
        ("speedup", 8, "speedup", ".3f"),
    ),
    legend="""\
graph µs: of calls back to back in a CUDA graph, no launch from the host among them; µs: median of
single calls, by events. A call shorter than its launch from Python has the launch for its µs.
GB/s are of graph µs, of µs where there is no graph: the appended K and V read once and written
once. %cp: of the large copy above. memcpy and copy-kernel copy as many bytes from one place to
another. Calls take turns on several sets of tokens and caches, which do not stay in the L2 cache;
of 64x1, which are small, there are 8.
cupaged has its index arrays on the device, cupaged-host on the host.
in graph, speedup: cupaged over this contender, medians of paired rounds of graph µs and of µs.
*: all sets fit in the L2 cache. !: wrong bytes.""",
    rate="gbs",
    unit="GB/s",
    time="graph_us",
    ceilings={"copy_gbs": "the card's copy of 2 GiB, {:.0f} GB/s"},
)
