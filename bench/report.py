"""Results as JSON and as a table; and the header that says what was measured."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from looks import Look, Row
from timing import HostDevice
from workloads import PAGE_SWEEP

ROOT = Path(__file__).resolve().parent.parent

#: Folders whose content decides the figures.
PRODUCT = ("cupaged", "kernels_cu")

#: No line of the report is longer.
MAX_WIDTH = 129

#: What a ceiling is called, by its name in the header.
CEILINGS = {
    "matmul_tflops": "matrix product {:.0f} TFLOP/s",
    "copy_gbs": "copy {:.0f} GB/s",
    "read_gbs": "read {:.0f} GB/s",
}


def header(
    device: HostDevice,
    contenders: Mapping[str, str],
    missing: Mapping[str, str],
    ceilings: Mapping[str, float | None],
    root: Path,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What was measured, on what, when and how.

    Parameters
    ----------
    device : HostDevice
        What it ran on.
    contenders : dict
        Version by name of contender.
    missing : dict
        Reason by name of peer that was asked for and is not there.
    ceilings : dict
        As `HostDevice.ceilings` returns them.
    root : Path
        The checkout.
    options : dict
        The run's own: dtype, repeats and the like.
    """
    return {
        **device.describe(),
        **options,
        "backend": device.backend,
        "driver": driver_version(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("numpy", "ml_dtypes", *CUPY)},
        "contenders": dict(contenders),
        "missing_peers": dict(missing),
        **git_state(root),
        "product_sha256": product_hash(root),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "ceilings": dict(ceilings),
    }


CUPY = ("cupy-cuda12x", "cupy-cuda13x")


def installed(package: str) -> str | None:
    """Version of an installed package, None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(command: Sequence[str], folder: Path | None = None) -> str | None:
    """What a command prints, None where it is not there or fails."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def driver_version() -> str | None:
    """Version of the NVIDIA driver, None where there is none."""
    said = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return said.splitlines()[0] if said else None


def git_state(root: Path) -> dict[str, Any]:
    """Commit of the checkout and whether it has changes; None where git can't tell."""
    status = output_of(["git", "status", "--porcelain"], root)
    return {
        "git_commit": output_of(["git", "rev-parse", "HEAD"], root),
        "git_dirty": None if status is None else status != "",
    }


def product_hash(root: Path) -> str:
    """SHA-256 over the product's sources: says what was measured also where there is no git."""
    digest = hashlib.sha256()
    for folder in PRODUCT:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh"):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0")
                digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def rates(row: Row, ceilings: Mapping[str, float | None], time: str) -> Row:
    """TFLOP/s, GB/s and their shares of the ceilings, for a row that has its µs.

    Parameters
    ----------
    row : dict
        It has `bytes`, `flops` where there are any, and `us`.
    ceilings : dict
        Rates of the device, by name.
    time : str
        The row's key of the time to be taken; `us` where that is None.
    """
    us = row["us"] if row[time] is None else row[time]
    tflops = row["flops"] / us / 1e6 if "flops" in row else None
    gbs = row["bytes"] / us / 1e3

    def share(rate: float | None, name: str) -> float | None:
        ceiling = ceilings.get(name)
        return None if rate is None or ceiling is None else rate / ceiling

    return {
        "tflops": tflops,
        "gbs": gbs,
        "share_of_matmul": share(tflops, "matmul_tflops"),
        "share_of_copy": share(gbs, "copy_gbs"),
        "share_of_read": share(gbs, "read_gbs"),
    }


def save(
    path: Path,
    head: Mapping[str, Any],
    rows: Sequence[Row],
    bars: Sequence[Mapping[str, Any]],
) -> None:
    """Write header, rows and the bars' verdicts as JSON, replacing the file in one step."""
    part = path.with_name(path.name + ".part")
    content = {"header": head, "rows": [finite(row) for row in rows], "bars": list(bars)}
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def finite(row: Row) -> Row:
    """The row as JSON can hold it: an error without bounds is null, and its note says why."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def cell(value: Any, width: int, form: str) -> str:
    """One value as a column shows it."""
    text = "-" if value is None else format(value, form)
    return text.ljust(-width) if width < 0 else text.rjust(width)


def table(head: Mapping[str, Any], rows: Sequence[Row], look: Look) -> Iterator[str]:
    """Lines of the report: what was measured, the notes, the tables, the host's costs."""
    yield f"{head['gpu'] or 'host'} · {head['backend']} backend · {head['dtype']} · {head['date']}"
    yield (
        f"commit {head['git_commit'] or 'unknown'}{' + changes' if head['git_dirty'] else ''} · "
        f"sources {head['product_sha256'][:12]}"
    )
    for name, version in head["contenders"].items():
        yield f"{name}: {version}"
    for name, reason in head["missing_peers"].items():
        yield f"{name}: not here: {reason}"[:MAX_WIDTH]
    measured = {name: rate for name, rate in head["ceilings"].items() if rate is not None}
    if measured:
        said = (CEILINGS[name].format(rate) for name, rate in measured.items())
        yield f"ceilings: {', '.join(said)}"
    timed = [row for row in rows if row["kind"] != "host"]
    yield from (line[:MAX_WIDTH] for line in notes(timed))
    if timed:
        yield from look.legend.splitlines()
    fixed = [row for row in timed if not row["sweep"]]
    if fixed:
        yield " ".join(cell(title, width, "s") for title, width, _, _ in look.columns)
    last = None
    for row in fixed:
        name = row["workload"] + ("*" if row["fits_l2"] else "")
        # A name that stands in the line above is not said again.
        shown = {**row, "workload": "" if name == last else name}
        shown["contender"] += "!" if row["status"] == "wrong" else ""
        yield " ".join(
            cell(shown[key], width, form) for _, width, key, form in look.columns
        ).rstrip()
        last = name
    for sweep in look.sweeps:
        yield from sweep_table(sweep, [row for row in timed if row["sweep"] == sweep], look)
    for row in rows:
        if row["kind"] == "host":
            value = cell(row["value"], 9, ".4g")
            yield (
                f"{row['workload']:21s} {row['contender']:14s} {value} "
                f"{row['unit']:2s}  {row['note']}"
            )[:MAX_WIDTH]


def along(row: Row, sweep: str) -> int:
    """Where on its sweep a row lies: its page size, or the length of its requests."""
    return int(row["page_size"] if sweep == PAGE_SWEEP else row["kv_lens"][0])


def sweep_table(sweep: str, rows: Sequence[Row], look: Look) -> Iterator[str]:
    """Lines of one sweep: the rates of each contender, and beneath them the ratios."""
    heading, ratio, key = look.sweeps[sweep]
    points = sorted({along(row, sweep) for row in rows})

    def line(name: str, cells: Iterable[str]) -> str:
        return (cell(name, -22, "s") + " ".join(cells)).rstrip()

    if points:
        yield line(heading, (f"{point:>8,}" for point in points))
    for contender in dict.fromkeys(row["contender"] for row in rows):
        mine = {along(row, sweep): row for row in rows if row["contender"] == contender}
        present = [mine.get(point, {}) for point in points]
        yield line(contender, (rate_cell(row, look.rate) for row in present))
        ratios = [row.get(key) for row in present]
        if any(value is not None for value in ratios):
            yield line(ratio, (cell(value, 8, ".3f") for value in ratios))


def rate_cell(row: Row, rate: str) -> str:
    """The rate of a row of a sweep, marked where the output is wrong; an empty row has none."""
    mark = "!" if row.get("status") == "wrong" else ""
    return (cell(row.get(rate), 1, ".1f") + mark).rjust(8)


def notes(timed: Sequence[Row]) -> Iterator[str]:
    """What there is to say of the rows: the same of several workloads only once."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in timed:
        for note in row["notes"]:
            said.setdefault((row["contender"], note), []).append(row["workload"])
    for (contender, note), workloads in said.items():
        where = workloads[0] if len(workloads) == 1 else f"{len(workloads)} workloads"
        yield f"{contender}, {where}: {note}"
