"""What a kernel is: its constants, the records it reads, and how they lie in memory."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Protocol

import numpy as np

from cupaged.spec import DTYPES, Variant

#: A work item: one query tile of one request, against one range of its keys, for every KV head. It
#: says where the request lies too, so that whoever works on it has no other record to wait for.
#:
#: Rows are *packed*: row ``i * gqa_group_size + g`` is query ``i`` under the ``g``-th query head
#: of the KV head's group, so that one tile of K and V serves the whole group.
ITEM_DTYPE = np.dtype(
    [
        ("request", np.int32),
        ("row_begin", np.int32),  # first packed row of the tile; it holds cta_tile_q of them
        ("kv_begin", np.int32),  # first key, inclusive
        ("kv_end", np.int32),  # last key, exclusive; equal to kv_begin where no row sees a key
        ("split", np.int32),  # which of the tile's splits this is
        ("num_splits", np.int32),  # 1: the item writes its result; more: a partial state
        ("first_partial", np.int32),  # partial-state slot of split 0; the others follow it
        ("merge", np.int32),  # which counter tells the tile's last split that it is the last
        ("qo_begin", np.int32),  # first row of q of the request: qo_indptr[r]
        ("qo_len", np.int32),  # the request's query rows
        ("kv_len", np.int32),  # the request's keys
        ("page_begin", np.int32),  # first entry of its page table: paged_kv_indptr[r]
    ]
)


def padded_row_bytes(head_dim: int, dtype: str) -> int:
    """Bytes of a row in shared memory, where it isn't in panels.

    A power of two, so that a warp copies whole rows, and at least 128, so that the swizzle of eight
    rows reaches every bank.
    """
    size = head_dim * DTYPES[dtype].itemsize
    return max(128, 1 << (size - 1).bit_length())


class Kernel(Protocol):
    """What is compiled, cached and loaded: a source in `kernels_cu` and its constants.

    Attributes
    ----------
    family : str
        Stem of the source in `kernels_cu`.
    name : str
        A readable name, unique among kernels.
    entry : str
        The kernel's name in its source.
    shared_bytes : int
        Dynamic shared memory of a block.
    flags : dict
        Macros of the source, without their prefix `CUPAGED_`.
    constants : dict
        Its other constants, all int.
    structs : dict
        Names of its structs, and the NumPy dtypes that mirror them.
    """

    @property
    def family(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def entry(self) -> str: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def flags(self) -> dict[str, int]: ...
    @property
    def constants(self) -> dict[str, int]: ...
    @property
    def structs(self) -> dict[str, np.dtype]: ...
    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class OnlyKernel:
    """A `Kernel` whose source has one configuration.

    Attributes
    ----------
    family : str
        Its name too.
    shared_bytes : int
    constants, structs : dict
    """

    family: str
    shared_bytes: int
    constants: dict[str, int] = field(compare=False)
    structs: dict[str, np.dtype] = field(compare=False)

    @property
    def name(self) -> str:
        """A readable name."""
        return self.family

    @property
    def entry(self) -> str:
        """The kernel's name in its source."""
        return f"cupaged_{self.family}"

    @property
    def flags(self) -> dict[str, int]:
        """Macros of the source: none."""
        return {}


#: family of kernels → warps of a block that bring data and compute nothing
_PRODUCER_WARPS = {"prefill_sm80": 0, "prefill_sm90": 4}
#: family of kernels → bytes of dynamic shared memory beside the tiles
_CONTROL_BYTES = {"prefill_sm80": 0, "prefill_sm90": 512}


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """One kernel as it is compiled: everything that is a constant in its source.

    Attributes
    ----------
    family : str
        Stem of the source in `kernels_cu`.
    dtype : str
        Of q and the output.
    kv_dtype : str
        Of K and V.
    head_dim_qk, head_dim_vo : int
    variant : Variant
    cta_tile_q, cta_tile_kv : int
        Packed query rows and keys that a thread block holds at a time.
    warps_q, warps_kv : int
        How the warps that compute divide the tile: over rows, or over keys (then their states are
        merged).
    num_stages : int
        Tiles of both K and V in shared memory, one of them being worked on; in the sm_90 family,
        where K and V share a ring, tiles of either.
    num_q_stages : int
        Q tiles in shared memory, one of them being worked on.
    ctas_per_sm : int
        Thread blocks that share an SM; bounds the registers.
    page_aligned : bool
        The page size is a multiple of `page_unit`, so that one look into the page table serves
        several keys.
    bounded : bool
        Logits are capped so low that weights need not be relative to a maximum.
    turns : bool
        Warpgroups take turns in issuing products, where there are several.
    """

    family: str
    dtype: str
    kv_dtype: str
    head_dim_qk: int
    head_dim_vo: int
    variant: Variant
    cta_tile_q: int
    cta_tile_kv: int
    warps_q: int
    warps_kv: int
    num_stages: int
    num_q_stages: int
    ctas_per_sm: int
    page_aligned: bool
    bounded: bool = False
    turns: bool = True
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = tuple(getattr(self, each.name) for each in fields(self) if each.compare)
        object.__setattr__(self, "_hash", hash(values))

    def __hash__(self) -> int:
        # Every plan and call looks for kernels by it, and there are many fields.
        return self._hash

    @property
    def entry(self) -> str:
        """The kernel's name in its source."""
        return "cupaged_prefill"

    @property
    def flags(self) -> dict[str, int]:
        """Macros of the source."""
        return {
            "BFLOAT16": self.dtype == "bfloat16",
            "KV_E4M3": self.kv_dtype == "float8_e4m3fn",
            "KV_E5M2": self.kv_dtype == "float8_e5m2",
            "PAGE_ALIGNED": self.page_aligned,
            "BOUNDED": self.bounded,
            "TURNS": self.turns,
            **{name.upper(): on for name, on in self.variant._asdict().items()},
        }

    @property
    def constants(self) -> dict[str, int]:
        """Constants of the source."""
        q_row, k_row, v_row = self._row_bytes
        return {
            "HEAD_DIM_QK": self.head_dim_qk,
            "HEAD_DIM_VO": self.head_dim_vo,
            "Q_ROW_BYTES": q_row,
            "K_ROW_BYTES": k_row,
            "V_ROW_BYTES": v_row,
            "O_ROW_BYTES": padded_row_bytes(self.head_dim_vo, self.dtype),
            "CTA_TILE_Q": self.cta_tile_q,
            "CTA_TILE_KV": self.cta_tile_kv,
            "WARPS_Q": self.warps_q,
            "WARPS_KV": self.warps_kv,
            "NUM_WARPS": self.warps_q * self.warps_kv,
            "NUM_THREADS": self.num_threads,
            "MMA_Q": self.cta_tile_q // (16 * self.warps_q),
            "NUM_STAGES": self.num_stages,
            "NUM_Q_STAGES": self.num_q_stages,
            "SHARED_BYTES": self.shared_bytes,
            "CTAS_PER_SM": self.ctas_per_sm,
        }

    @property
    def _row_bytes(self) -> tuple[int, int, int]:
        """Of a row of Q, of K and of V in shared memory."""
        if self.producer_warps:
            # In panels, see wgmma.cuh, which need no power of two; but results, which do, leave by
            # way of Q's rows.
            itemsize = DTYPES[self.dtype].itemsize
            k, v = self.head_dim_qk * itemsize, self.head_dim_vo * itemsize
            return max(k, padded_row_bytes(self.head_dim_vo, self.dtype)), k, v
        return (
            padded_row_bytes(self.head_dim_qk, self.dtype),
            padded_row_bytes(self.head_dim_qk, self.kv_dtype),
            padded_row_bytes(self.head_dim_vo, self.kv_dtype),
        )

    @property
    def structs(self) -> dict[str, np.dtype]:
        """The structs of the source."""
        return DEVICE_STRUCTS

    @property
    def producer_warps(self) -> int:
        """Warps of a block that bring data and compute nothing."""
        return _PRODUCER_WARPS[self.family]

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return 32 * (self.warps_q * self.warps_kv + self.producer_warps)

    @property
    def page_unit(self) -> int:
        """Neighbouring keys that are copied together where they lie in one page."""
        if self.producer_warps:
            return 8  # rows of a group, see wgmma.cuh
        return self.cta_tile_kv // (self.warps_q * self.warps_kv)

    @property
    def carries_short(self) -> bool:
        """Whether few rows of a tile cost little more than the reading of K and V."""
        return _PRODUCER_WARPS[self.family] > 0

    @property
    def splits_merged_by(self) -> int:
        """Parts of a query tile whose splits are counted and merged each on its own."""
        return self.warps_q // 4 if self.producer_warps else 1

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: the Q stages, the K and V stages, and barriers."""
        q_row, k_row, v_row = self._row_bytes
        # In the sm_90 family a stage is for a tile of either.
        kv_row = max(k_row, v_row) if self.producer_warps else k_row + v_row
        tiles = (
            self.num_q_stages * self.cta_tile_q * q_row
            + self.num_stages * self.cta_tile_kv * kv_row
        )
        return tiles + _CONTROL_BYTES[self.family]

    @property
    def name(self) -> str:
        """A readable name, unique among configurations."""
        pages = f"page{self.page_unit}n" if self.page_aligned else "pageany"
        kv = "" if self.kv_dtype == self.dtype else f"_{self.kv_dtype.replace('float8_', '')}"
        vo = "" if self.head_dim_vo == self.head_dim_qk else f"x{self.head_dim_vo}"
        on = "".join(f"_{name}" for name, is_on in self.variant._asdict().items() if is_on)
        return (
            f"{self.family}_{self.dtype}{kv}_d{self.head_dim_qk}{vo}_q{self.cta_tile_q}"
            f"_kv{self.cta_tile_kv}_w{self.warps_q}x{self.warps_kv}_s{self.num_stages}_{pages}{on}"
            f"{'_bounded' if self.bounded else ''}{'' if self.turns else '_no_turns'}"
        )


#: What a kernel is launched with; `kernels_cu/params.cuh` says what each field means.
PARAMS_DTYPE = np.dtype(
    [(pointer, np.uint64) for pointer in ("q", "k", "v", "out", "lse")]
    + [
        (f"{tensor}_stride_{axis}", np.int64)
        for tensor, axes in (
            ("q", ("row", "head")),
            ("k", ("page", "token", "head")),
            ("v", ("page", "token", "head")),
            ("out", ("row", "head")),
            ("lse", ("row", "head")),
        )
        for axis in axes
    ]
    + [
        (pointer, np.uint64)
        for pointer in (
            "items",
            "page_indices",
            "partial_out",
            "partial_lse",
            "merge_counters",
            "work_counters",
            "mask_bits",
            "mask_begin",
            "seen_keys",
            "alibi_slopes",
            "rope_turns",
        )
    ]
    + [
        (number, np.int32)
        for number in (
            "num_items",
            "num_kv_heads",
            "gqa_group_size",
            "page_size",
            "causal",
            "window_left",
        )
    ]
    + [
        (divisor, np.uint32)
        for divisor in ("group_magic", "group_shift", "page_magic", "page_shift")
    ]
    + [("cap_scale", np.float32)]
    + [("sinks", np.uint64)]
    + [("negate_logits", np.int32)]
    + [("logit_scale", np.float32), ("inner_scale", np.float32), ("cap_square", np.float32)]
    + [("cap_ratio", np.float32, 2), ("v_scale", np.float32), ("lse_scale", np.float32)],
    align=True,
)

#: The attention kernels' structs and the NumPy dtypes that mirror them.
DEVICE_STRUCTS = {"Item": ITEM_DTYPE, "Params": PARAMS_DTYPE}


def field_offset(dtype: np.dtype, field: str) -> int:
    """Bytes before a field of a structured dtype."""
    assert dtype.fields is not None
    return int(dtype.fields[field][1])
