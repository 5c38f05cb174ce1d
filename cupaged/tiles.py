"""Which kernel serves a shape of query tile on which GPU: families, tile sizes, pipeline depths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from cupaged.kernel_spec import KernelConfig
from cupaged.spec import FLOAT8_DTYPES, RAGGED, DeviceModel, Needs
from cupaged.support import serves

Shape = Literal["long", "brief", "short"]
SHAPES: tuple[Shape, ...] = ("long", "brief", "short")

#: Compute capability → class of tiles: "sm90" and "large" have 227 KiB of shared memory a block,
#: "medium" 163, "small" 99 (CUDA C++ Programming Guide, "Technical Specifications per Compute
#: Capability"); "sm90" has kernels of its own.
_CLASS = {
    80: "medium", 86: "small", 87: "medium", 89: "small",
    90: "sm90", 100: "large", 103: "large", 110: "large", 120: "small", 121: "small",
}  # fmt: skip

#: The most dynamic shared memory a block of each class may ask for, in bytes.
SHARED_LIMIT = {"sm90": 227 * 1024, "large": 227 * 1024, "medium": 163 * 1024, "small": 99 * 1024}


@dataclass(frozen=True, slots=True)
class _Tile:
    cta_tile_q: int
    cta_tile_kv: int
    warps_q: int
    warps_kv: int
    num_stages: int
    ctas_per_sm: int
    family: str = "prefill_sm80"
    num_q_stages: int = 1


#: Heads that take the tiles of wider ones, to which the sm_80 family pads their rows in shared
#: memory.
_PADDED = {(96, 96): (128, 128)}

# "long" of the sm_80 family: rows are divided over the warps. At head_dim 64 and 128 each warp
# takes 32 rows, so that every fragment of K and V read from shared memory feeds two matrix
# products; with 16 rows the reads, 128 bytes a clock, would bound the kernel. At 192 and 256 what
# 32 rows need does not fit the registers, so eight warps take 16 each. Two blocks an SM cover each
# other's softmax and barriers.
# "long" of the sm_90 family: a warpgroup computes 64 rows, and what its registers and the shared
# memory hold decides the keys of a tile. Three warpgroups hide each other's softmax better than two
# with twice the keys do (bench/NOTES-sm90.md); at 256 the output leaves no registers for a third,
# and 192 rows of 192 elements no shared memory for a second tile of Q.
# "brief": for a small batch of few keys, where it pays to compute less past their ends; where there
# is none, "long" stands in.
# "short": 16 rows, the keys divided over the warps: decoding and very short queries are bound by
# the reading of K and V, so the tile is as short as the matrix unit allows and the stages deep.
_D64, _D96, _D128, _D192, _D256 = (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)
_TILES: dict[tuple[str, tuple[int, int], Shape], _Tile] = {
    ("sm90", _D64, "long"): _Tile(192, 128, 12, 1, 6, 1, "prefill_sm90", 2),
    ("sm90", _D96, "long"): _Tile(192, 64, 12, 1, 8, 1, "prefill_sm90", 2),
    ("sm90", _D128, "long"): _Tile(192, 64, 12, 1, 8, 1, "prefill_sm90", 2),
    ("sm90", _D192, "long"): _Tile(192, 64, 12, 1, 6, 1, "prefill_sm90"),
    ("sm90", _D256, "long"): _Tile(128, 80, 8, 1, 4, 1, "prefill_sm90"),
    ("sm90", _D128, "brief"): _Tile(128, 64, 8, 1, 8, 1, "prefill_sm90", 2),
    ("large", _D64, "long"): _Tile(128, 64, 4, 1, 2, 2),
    ("large", _D128, "long"): _Tile(128, 32, 4, 1, 3, 2),
    ("large", _D192, "long"): _Tile(128, 32, 8, 1, 3, 1),
    ("large", _D256, "long"): _Tile(128, 32, 8, 1, 2, 1),
    ("large", _D64, "short"): _Tile(16, 64, 1, 4, 4, 3),
    ("large", _D128, "short"): _Tile(16, 64, 1, 4, 3, 2),
    ("large", _D192, "short"): _Tile(16, 64, 1, 4, 4, 1),
    ("large", _D256, "short"): _Tile(16, 64, 1, 4, 3, 1),
    ("medium", _D64, "long"): _Tile(128, 64, 4, 1, 2, 2),
    ("medium", _D128, "long"): _Tile(128, 32, 4, 1, 2, 2),
    ("medium", _D192, "long"): _Tile(128, 32, 8, 1, 3, 1),
    ("medium", _D256, "long"): _Tile(128, 32, 8, 1, 2, 1),
    ("medium", _D64, "short"): _Tile(16, 64, 1, 4, 3, 3),
    ("medium", _D128, "short"): _Tile(16, 64, 1, 4, 2, 2),
    ("medium", _D192, "short"): _Tile(16, 64, 1, 4, 3, 1),
    ("medium", _D256, "short"): _Tile(16, 64, 1, 4, 2, 1),
    ("small", _D64, "long"): _Tile(128, 64, 4, 1, 2, 2),
    ("small", _D128, "long"): _Tile(128, 32, 4, 1, 3, 1),
    ("small", _D192, "long"): _Tile(64, 32, 4, 1, 2, 1),
    ("small", _D256, "long"): _Tile(64, 32, 4, 1, 2, 1),
    ("small", _D64, "short"): _Tile(16, 64, 1, 4, 2, 2),
    ("small", _D128, "short"): _Tile(16, 64, 1, 4, 2, 1),
    ("small", _D192, "short"): _Tile(16, 32, 1, 2, 3, 1),
    ("small", _D256, "short"): _Tile(16, 32, 1, 2, 2, 1),
}

#: In the place of others where logits are capped: the cap's numbers don't fit three warpgroups'
#: registers.
_CAPPED = {("sm90", _D64, "long"): _Tile(128, 128, 8, 1, 8, 1, "prefill_sm90", 2)}

#: In the place of others where more is done for each product, which takes registers too: 16 rows a
#: warp.
_ROOMY = {
    (name, _D128, "long"): _Tile(128, 32, 8, 1, 3, 1) for name in ("large", "medium", "small")
}

#: In the place of others where 8-bit keys are rotated, which takes more registers yet: for 9.0 too,
#: and at head_dim 64.
_ROTATED = _ROOMY | {
    (name, _D64, "long"): _Tile(128, 64, 8, 1, 2, 1) for name in ("large", "medium", "small")
}

#: In the place of sm90's "long" where keys are copied row by row, which takes the longer the
#: smaller the tile is.
_ROW_BY_ROW = {
    _D128: _Tile(192, 80, 12, 1, 6, 1, "prefill_sm90", 2),
    _D192: _Tile(192, 80, 12, 1, 5, 1, "prefill_sm90"),
}

#: Page sizes that between them ask for every configuration there is.
TYPICAL_PAGE_SIZES = (16, 8, 1)


def tile_class(arch: int) -> str:
    """Class of tiles of compute capability `arch` (major * 10 + minor).

    A capability newer than the table gets the smallest class, which fits everywhere.
    """
    return _CLASS.get(arch, "small")


def _does_more(arch: int, needs: Needs) -> bool:
    """Whether a product goes through more than the registers of 32 rows a warp have room for."""
    on = needs.variant
    if arch == 90:
        # Its compiler finds room for two, and with 16 rows a warp ALiBi has 0.7 of the speed.
        return sum(on) > 2
    both = on.window and on.soft_cap
    return on.custom_mask or on.alibi or on.rope or both or needs.kv_dtype in FLOAT8_DTYPES


def _tile(arch: int, needs: Needs, shape: Shape) -> _Tile:
    own = (needs.head_dim_qk, needs.head_dim_vo)
    classes = [tile_class(arch)]
    if classes == ["sm90"]:
        # The sm_80 family, with as much shared memory, has what the other one lacks.
        classes = ["sm90", "large"] if serves("prefill_sm90", needs) else ["large"]
    shapes: list[Shape] = [shape] if shape == "short" else [shape, "long"]
    for candidate in shapes:
        for name in classes:
            head_dims = own if name == "sm90" else _PADDED.get(own, own)
            tile = _TILES.get((name, head_dims, candidate))
            if needs.variant.soft_cap:
                tile = _CAPPED.get((name, head_dims, candidate), tile)
            if _does_more(arch, needs):
                tile = _ROOMY.get((name, head_dims, candidate), tile)
            if needs.variant.rope and needs.kv_dtype in FLOAT8_DTYPES:
                tile = _ROTATED.get((name, head_dims, candidate), tile)
            if tile is not None:
                # Half the bytes: twice the stages are under way, which hides as much latency. Rows
                # of 64 elements have as many, see `padded_row_bytes`.
                narrow = needs.kv_dtype in FLOAT8_DTYPES and needs.head_dim_qk > 64
                deeper = shape == "short" and narrow
                return replace(tile, num_stages=2 * tile.num_stages) if deeper else tile
    raise KeyError((arch, needs, shape))


@cache
def kernel_config(arch: int, needs: Needs, shape: Shape) -> KernelConfig:
    """The kernel that serves a shape of query tile on compute capability `arch`."""
    tile = _tile(arch, needs, shape)
    config = _config(tile, needs)
    aligned = needs.page_size % config.page_unit == 0
    if needs.page_size == RAGGED and config.producer_warps:
        aligned = False  # a box would end where the last request does not
    if aligned:
        return config
    head_dims = (needs.head_dim_qk, needs.head_dim_vo)
    if tile is _TILES.get(("sm90", head_dims, "long")) and not needs.variant.soft_cap:
        config = _config(_ROW_BY_ROW.get(head_dims, tile), needs)
    return replace(config, page_aligned=False)


def _config(tile: _Tile, needs: Needs) -> KernelConfig:
    # Of 16-bit floats only bfloat16 has float32's exponents.
    bounded = needs.low_cap and needs.dtype == "bfloat16" and tile.family == "prefill_sm90"
    # Warpgroups that see different keys do better without. At other head dimensions they don't.
    turns = not (needs.scattered and tile is _TILES["sm90", _D128, "long"])
    return KernelConfig(
        family=tile.family,
        dtype=needs.dtype,
        kv_dtype=needs.kv_dtype,
        head_dim_qk=needs.head_dim_qk,
        head_dim_vo=needs.head_dim_vo,
        variant=needs.variant,
        cta_tile_q=tile.cta_tile_q,
        cta_tile_kv=tile.cta_tile_kv,
        warps_q=tile.warps_q,
        warps_kv=tile.warps_kv,
        num_stages=tile.num_stages,
        num_q_stages=tile.num_q_stages,
        ctas_per_sm=tile.ctas_per_sm,
        page_aligned=True,
        bounded=bounded,
        turns=turns,
    )


def slots(config: KernelConfig, device: DeviceModel) -> int:
    """Thread blocks of a kernel that run at once on a device: its persistent grid."""
    return config.ctas_per_sm * device.num_sms
