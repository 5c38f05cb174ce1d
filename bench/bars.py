"""What cupaged holds itself to, and whether a run reached it: bars, their quantities, verdicts.

The bars of each benchmark are in `prefill_bars.py`, `decode_bars.py` and `append_bars.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contender import Cupaged
from looks import Row
from report import cell

#: The rows that are there, by workload and contender.
Rows = Mapping[tuple[str, str], Row]

#: Figures that stand beside a verdict, by their names.
Beside = Mapping[str, float | None]


def first(field: str) -> Callable[[Rows, Sequence[str]], float | None]:
    """A field of the first of cupaged's rows."""
    return lambda rows, names: rows[names[0], Cupaged.name][field]


def gpu_speedup(row: Row) -> float | None:
    """How many times as fast as this row's contender cupaged is: in CUDA graphs where both are."""
    in_graph: float | None = row["graph_speedup"]
    return row["speedup"] if in_graph is None else in_graph


def gpu_us(row: Row) -> float | None:
    """µs of a call of this row's contender: in a CUDA graph where it can be."""
    in_graph: float | None = row["graph_us"]
    return row["us"] if in_graph is None else in_graph


def sound(rows: Rows, name: str, peers: Callable[[str], bool]) -> list[Row]:
    """The rows of a workload whose contenders are asked for and were right."""
    return [
        row
        for (workload, contender), row in rows.items()
        if workload == name and peers(contender) and row["status"] == "ok"
    ]


def nothing(rows: Rows, names: Sequence[str]) -> Beside:
    """No figures beside the verdict."""
    return {}


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
    beside : callable
        The like, of figures that belong beside it.
    absent : str
        What is said where there is no value.
    """

    form: str
    at_most: bool
    value: Callable[[Rows, Sequence[str]], float | None]
    beside: Callable[[Rows, Sequence[str]], Beside] = nothing
    absent: str = "not measured"


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
        A key of the suite's quantities.
    must, aim : float
        What has to be reached, and what is hoped for; an aim of None is the must.
    """

    work: str
    rows: tuple[str, ...]
    quantity: str
    must: float
    aim: float | None = None


#: A column of what stands beside the verdicts: heading, width, the figure's name, its format.
Column = tuple[str, int, str, str]


@dataclass(frozen=True, slots=True)
class Suite:
    """All bars of a benchmark.

    Attributes
    ----------
    bars : tuple of Bar
    quantities : dict
        What the bars are about, by name.
    beside : tuple of Column
        What the table shows beside a verdict.
    widths : tuple of int
        Of the columns for a bar's work, and for its must, its aim and what was measured.
    """

    bars: tuple[Bar, ...]
    quantities: Mapping[str, Quantity]
    beside: tuple[Column, ...]
    widths: tuple[int, int]

    @property
    def needed(self) -> tuple[str, ...]:
        """All rows that some bar needs, as `--workloads` names them."""
        return tuple(dict.fromkeys(name for bar in self.bars for name in bar.rows))

    def verdicts(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Every bar whose rows are there, with what was measured.

        Parameters
        ----------
        rows : list of dict
            The run's rows of every kind.

        Returns
        -------
        list of dict
            `verdict` is "aim met", "met", "missed", or, where `measured` is None, why: the status
            of cupaged's row, or what the quantity says of its absence.
        """
        found = {(row["workload"], row["contender"]): row for row in rows}
        return [
            self.judged(bar, found)
            for bar in self.bars
            if all((name, Cupaged.name) in found for name in bar.rows)
        ]

    def judged(self, bar: Bar, rows: Rows) -> dict[str, Any]:
        """A bar beside what was measured; all of the bar's rows are there."""
        statuses = [rows[name, Cupaged.name]["status"] for name in bar.rows]
        bad = [status for status in statuses if status != "ok"]
        quantity = self.quantities[bar.quantity]
        measured = None if bad else quantity.value(rows, bar.rows)
        return {
            "work": bar.work,
            "rows": list(bar.rows),
            "quantity": bar.quantity,
            "must": bar.must,
            "aim": bar.aim,
            "measured": measured,
            **dict.fromkeys(name for _, _, name, _ in self.beside),
            **quantity.beside(rows, bar.rows),
            "verdict": bad[0] if bad else verdict(bar, quantity, measured),
        }

    def table(self, found: Sequence[Mapping[str, Any]], title: str) -> Iterator[str]:
        """Lines that show the bars, what was measured, and the verdicts."""
        if not found:
            return
        work, width = self.widths
        missed = sum(one["verdict"] not in ("met", "aim met") for one in found)
        yield f"{title}: {len(found) - missed} of {len(found)} met"
        names = ("must", "aim", "measured")
        headings = [cell("bar", -work, "s"), *(cell(name, width, "s") for name in names)]
        headings += [cell(heading, size, "s") for heading, size, _, _ in self.beside]
        yield " ".join(headings) + "  verdict"
        for one in found:
            form = self.quantities[one["quantity"]].form
            cells = [cell(one["work"], -work, "s")]
            for name in names:
                text = None if one[name] is None else form.format(one[name])
                cells.append(cell(text, width, "s"))
            cells += [cell(one[name], size, how) for _, size, name, how in self.beside]
            yield " ".join(cells) + f"  {one['verdict']}"


def verdict(bar: Bar, quantity: Quantity, measured: float | None) -> str:
    """The word for it."""
    if measured is None:
        return quantity.absent

    def reached(level: float) -> bool:
        return measured <= level if quantity.at_most else measured >= level

    if not reached(bar.must):
        return "missed"
    return "aim met" if bar.aim is not None and reached(bar.aim) else "met"
