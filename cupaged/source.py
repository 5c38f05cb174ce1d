"""CUDA sources: found, inlined into one text, headed by a kernel's constants.

One text a kernel means that its hash says everything about it, and that NVRTC opens no file: a
changed header can't be served from an old cache entry.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path

from cupaged.kernel_spec import Kernel, field_offset

# NVRTC has no `offsetof` without a header; this is what its front end makes of one.
_OFFSET = "(u64)__INTADDR__(&((({struct}*)0)->{field}))"
_INCLUDE = re.compile(r'^#include "([^"]+)"$')


@lru_cache(maxsize=1)
def folder() -> Path:
    """Where the CUDA sources are: inside the installed package, or beside it in a checkout.

    Raises
    ------
    FileNotFoundError
        They are in neither place.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / "kernels_cu", package.parent / "kernels_cu")
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"cupaged's CUDA sources are missing: looked for {candidates[0]} and {candidates[1]}; "
        "reinstall cupaged"
    )


def prologue(kernel: Kernel) -> str:
    """The constants of a kernel, as C++."""
    lines = [f"#define CUPAGED_{name} {int(value)}" for name, value in kernel.flags.items()]
    lines += [
        f"[[maybe_unused]] constexpr int {name} = {value};"
        for name, value in kernel.constants.items()
    ]
    return "\n".join(lines) + "\n"


def layout_checks(kernel: Kernel) -> str:
    """Assertions that a kernel's structs lie as their NumPy mirrors do."""
    lines = []
    for struct, dtype in kernel.structs.items():
        lines.append(f"static_assert(sizeof({struct}) == {dtype.itemsize});")
        lines += [
            f"static_assert({_OFFSET.format(struct=struct, field=field)} == "
            f"{field_offset(dtype, field)});"
            for field in dtype.names or ()
        ]
    return "\n".join(lines) + "\n"


def _inline(name: str, seen: set[str]) -> list[str]:
    seen.add(name)
    lines = [f'#line 1 "{name}"']
    text = (folder() / name).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        include = _INCLUDE.match(line)
        if include is None:
            lines.append("" if line == "#pragma once" else line)
        elif include[1] not in seen:
            lines += _inline(include[1], seen)
            lines.append(f'#line {number + 1} "{name}"')
        else:
            lines.append("")
    return lines


@cache
def _inlined(family: str) -> str:
    return "\n".join(_inline(f"{family}.cu", set())) + "\n"


def render(kernel: Kernel) -> str:
    """The whole source of a kernel: constants, headers, kernel, layout checks."""
    return prologue(kernel) + _inlined(kernel.family) + layout_checks(kernel)
