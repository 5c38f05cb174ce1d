"""The figures as a picture. matplotlib is imported only where it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contender import Cupaged
from looks import Look, Row
from report import along
from workloads import LENGTH_SWEEP, PAGE_SWEEP

#: Colours that can be told apart without seeing red and green, one for each contender everywhere.
COLOURS = {
    Cupaged.name: "#d55e00",
    f"{Cupaged.name}-host": "#f0a070",
    "sdpa-cudnn": "#009e73",
    "fa3": "#0072b2",
    "flashinfer-fa3": "#cc79a7",
    "flashinfer-fa2": "#e69f00",
    "sdpa-flash": "#56b4e9",
    "flashinfer-tc": "#0072b2",
    "flashinfer-cc": "#56b4e9",
    "flashinfer": "#cc79a7",
    "memcpy": "#0072b2",
    "copy-kernel": "#56b4e9",
}
OTHER_COLOUR = "#777777"
CEILING_COLOUR = "#444444"


def plot(path: Path, head: Mapping[str, Any], rows: Sequence[Row], look: Look) -> None:
    """Draw the rates over the length, by workload, and over the page size: what there is of them.

    Parameters
    ----------
    path : Path
        Where the picture goes; its suffix says of what kind it is.
    head : dict
        The run's header: GPU, dtype, page size, ceilings, versions.
    rows : list of dict
        The run's rows; those that have no time are left out.
    look : Look
        Which rate it is, and what is said of it.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row["kind"] != "host" and row["us"] is not None]
    lengths = [row for row in timed if row["sweep"] == LENGTH_SWEEP]
    pages = [row for row in timed if row["sweep"] == PAGE_SWEEP]
    fixed = [row for row in timed if not row["sweep"]]
    layout = [["lengths"] * 3] if lengths else []
    below = ["fixed"] * (2 if pages else 3) if fixed else []
    below += ["pages"] * (3 - len(below)) if pages else []
    layout += [below] if below else []
    if not layout:
        return
    heights = [1.25, 1.0][-len(layout) :] if lengths else [1.0]
    with pyplot.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure, panels = pyplot.subplot_mosaic(
            layout,
            figsize=(12, 5.2 * sum(heights)),
            height_ratios=heights[: len(layout)],
            layout="constrained",
        )
        if lengths:
            draw_lengths(panels["lengths"], head, lengths, look)
        if fixed:
            draw_workloads(panels["fixed"], head, fixed, look)
        if pages:
            draw_pages(panels["pages"], pages, look)
        for panel in panels.values():
            panel.set_ylabel(look.unit, labelpad=6)
            panel.set_ylim(bottom=0)
            panel.grid(axis="y", color="#dddddd", linewidth=0.8)
            panel.set_axisbelow(True)
        figure.suptitle(
            f"{head['gpu'] or 'host, reference backend'} · {head['dtype']} · {head['date'][:10]}",
            fontsize=13,
        )
        figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.1)
        pyplot.close(figure)


def contenders(rows: Sequence[Row]) -> list[str]:
    """Who is in the rows, in the order of the colours."""
    names = dict.fromkeys(row["contender"] for row in rows)
    known = list(COLOURS)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def draw_lines(
    panel: Any, rows: Sequence[Row], sweep: str, rate: str, suffix: Mapping[str, str]
) -> list[int]:
    """A line for each contender over the points of a sweep; returns the points."""
    # Drawn last, and thus on top: cupaged.
    for name in reversed(contenders(rows)):
        ours = name == Cupaged.name
        mine = sorted((along(row, sweep), row[rate]) for row in rows if row["contender"] == name)
        panel.plot(
            *zip(*mine, strict=True),
            color=COLOURS.get(name, OTHER_COLOUR),
            linewidth=3.0 if ours else 1.8,
            marker="o",
            markersize=7 if ours else 4.5,
            label=name + suffix.get(name, ""),
        )
    points = sorted({along(row, sweep) for row in rows})
    panel.set_xscale("log", base=2)
    panel.minorticks_off()
    return points


def draw_ceilings(panel: Any, head: Mapping[str, Any], look: Look, left: float) -> None:
    """The card's own rates as lines, and above them what they are."""
    known = {name: head["ceilings"].get(name) for name in look.ceilings}
    rates = {name: rate for name, rate in known.items() if rate is not None}
    for rate in rates.values():
        panel.axhline(rate, color=CEILING_COLOUR, linestyle="--", linewidth=1.5)
    if rates:
        panel.annotate(
            "; ".join(look.ceilings[name].format(rate) for name, rate in rates.items()),
            (left, max(rates.values())),
            xytext=(0, 5),
            textcoords="offset points",
            color=CEILING_COLOUR,
        )


def draw_lengths(panel: Any, head: Mapping[str, Any], rows: Sequence[Row], look: Look) -> None:
    """The rate over the length of the requests, beneath the card's own."""
    suffixes = look.suffixes(contenders(rows), rows[0])
    points = draw_lines(panel, rows, LENGTH_SWEEP, look.rate, suffixes)
    batches = {along(row, LENGTH_SWEEP): len(row["kv_lens"]) for row in rows}
    panel.set_xticks(points, [f"{point:,}\n{batches[point]} ×" for point in points])
    panel.set_xlabel(look.lengths)
    draw_ceilings(panel, head, look, points[0])
    panel.margins(y=0.1)
    panel.set_title(look.title(rows[0]), loc="left")
    handles, labels = panel.get_legend_handles_labels()
    panel.legend(handles[::-1], labels[::-1], loc="lower right", framealpha=0.9)


def draw_workloads(panel: Any, head: Mapping[str, Any], rows: Sequence[Row], look: Look) -> None:
    """A group of bars for each workload."""
    names = contenders(rows)
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    width = 0.84 / len(names)
    # Those who are absent from a workload leave no gap in its group.
    present = {
        workload: contenders([row for row in rows if row["workload"] == workload])
        for workload in workloads
    }

    def place(row: Row) -> float:
        group = present[row["workload"]]
        shift = group.index(row["contender"]) - (len(group) - 1) / 2
        return workloads.index(row["workload"]) + shift * width

    for name in names:
        mine = [row for row in rows if row["contender"] == name]
        panel.bar(
            [place(row) for row in mine],
            [row[look.rate] for row in mine],
            width,
            color=COLOURS.get(name, OTHER_COLOUR),
            label=name,
        )
    panel.set_xticks(
        range(len(workloads)), workloads, rotation=28, ha="right", rotation_mode="anchor"
    )
    panel.tick_params(axis="x", labelsize=9, length=0)
    panel.set_title("By workload", loc="left")
    draw_ceilings(panel, head, look, -0.5)
    # Above the bars, where nothing is in its way.
    panel.margins(y=0.3)
    panel.legend(fontsize=9, ncols=3, loc="upper right", framealpha=0.9)


def draw_pages(panel: Any, rows: Sequence[Row], look: Look) -> None:
    """The rate over the page size."""
    points = draw_lines(panel, rows, PAGE_SWEEP, look.rate, {})
    # Labels of neighbours that are no powers of two would touch.
    shown = [point for point in points if point & (point - 1) == 0]
    panel.set_xticks(shown, [str(point) for point in shown])
    panel.set_xlabel("tokens of a page")
    panel.margins(y=0.12)
    panel.set_title(look.pages, loc="left")
    handles, labels = panel.get_legend_handles_labels()
    panel.legend(handles[::-1], labels[::-1], fontsize=9, loc="lower right", framealpha=0.9)
