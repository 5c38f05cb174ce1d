"""CUDA sources: found, inlined into one text, headed by a kernel configuration's constants.

One text a kernel means that its hash says everything about it, and that NVRTC opens no file: a
changed header can't be served from an old cache entry.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path

from cupaged.spec import DEVICE_STRUCTS, KernelConfig, field_offset

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


def prologue(config: KernelConfig) -> str:
    """The constants of a kernel configuration, as C++."""
    num_warps = config.warps_q * config.warps_kv
    constants = {
        "HEAD_DIM": config.head_dim,
        "CTA_TILE_Q": config.cta_tile_q,
        "CTA_TILE_KV": config.cta_tile_kv,
        "WARPS_Q": config.warps_q,
        "WARPS_KV": config.warps_kv,
        "NUM_WARPS": num_warps,
        "NUM_THREADS": config.num_threads,
        "MMA_Q": config.cta_tile_q // (16 * config.warps_q),
        "NUM_STAGES": config.num_stages,
        "NUM_Q_STAGES": config.num_q_stages,
        "SHARED_BYTES": config.shared_bytes,
        "CTAS_PER_SM": config.ctas_per_sm,
    }
    flags = {"BFLOAT16": config.dtype == "bfloat16", "PAGE_ALIGNED": config.page_aligned}
    lines = [f"#define CUPAGED_{name} {int(value)}" for name, value in flags.items()]
    lines += [
        f"[[maybe_unused]] constexpr int {name} = {value};" for name, value in constants.items()
    ]
    return "\n".join(lines) + "\n"


def layout_checks() -> str:
    """Assertions that the device structs lie as their NumPy mirrors do."""
    lines = []
    for struct, dtype in DEVICE_STRUCTS.items():
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


def render(config: KernelConfig) -> str:
    """The whole source of a kernel: constants, headers, kernel, layout checks."""
    return prologue(config) + _inlined(config.family) + layout_checks()
