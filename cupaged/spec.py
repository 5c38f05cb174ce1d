"""What an attention call is: frozen dataclasses and the tables of dtypes.

Nothing here computes; every other room reads these types.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

KVLayout = Literal["NHD", "HND"]

#: name of a tensor dtype → NumPy dtype
DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}

#: What the kernels compute in, and what K and V may be beside that.
SERVED_DTYPES = ("float16", "bfloat16")
FLOAT8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
#: (head_dim_qk, head_dim_vo) of the kernels.
SERVED_HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))

#: The page size of K and V that have no pages: each request has one, which begins at its first row.
RAGGED = 2**30

#: How the positions of queries and keys enter the logits.
PosEncodingMode = Literal["NONE", "ROPE_LLAMA", "ALIBI"]
POS_ENCODING_MODES: tuple[PosEncodingMode, ...] = ("NONE", "ROPE_LLAMA", "ALIBI")


class Variant(NamedTuple):
    """What of attention differs by feature and is a constant of a kernel; nothing by default.

    Sinks are none: they come in where a row's result is written, which costs nothing.

    Attributes
    ----------
    window : bool
        A row sees keys from some key on.
    soft_cap : bool
        Logits go through `cap * tanh(x / cap)`.
    custom_mask : bool
        A bit says whether a row sees a key.
    alibi : bool
        Logits are biased by the distance of row and key.
    rope : bool
        Queries and keys are rotated by their positions.
    """

    window: bool = False
    soft_cap: bool = False
    custom_mask: bool = False
    alibi: bool = False
    rope: bool = False


#: e to the power of a cap up to this one is less than 2^73: times 2^20 keys and values of 2^30 that
#: is less than float32 holds, and its inverse is more than the least normal number.
MAX_LOW_CAP = 50.0

#: A window of up to so many tokens is narrow beside a query tile.
_NARROW_WINDOW = 2048


class Needs(NamedTuple):
    """What a spec asks of a kernel.

    Attributes
    ----------
    dtype, kv_dtype : str
        Of q and the output; of K and V.
    head_dim_qk, head_dim_vo : int
    page_size : int
    variant : Variant
    low_cap : bool
        There is a soft cap, of at most `MAX_LOW_CAP`.
    scattered : bool
        Rows of a query tile see few keys, and not the same: there is a narrow window, and heads
        share no KV head.
    """

    dtype: str
    kv_dtype: str
    head_dim_qk: int
    head_dim_vo: int
    page_size: int
    variant: Variant = Variant()
    low_cap: bool = False
    scattered: bool = False


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What `plan()` fixes about an attention call, apart from the lengths.

    Attributes
    ----------
    num_qo_heads, num_kv_heads : int
        Query heads and key/value heads; the first is a multiple of the second.
    head_dim_qk : int
        Elements of a query's and a key's head.
    page_size : int
        Tokens of a page.
    causal : bool
        Row `i` sees keys up to `kv_len - qo_len + i`.
    sm_scale : float
        What multiplies `q·k`.
    dtype : str
        Of q and the output.
    kv_layout : str
        "NHD" or "HND".
    head_dim_vo : int
        Elements of a value's and an output's head; `head_dim_qk` where not given.
    kv_dtype : str
        Of K and V; `dtype` where not given.
    window_left : int
        Row `i` sees keys from `kv_len - qo_len + i - window_left` on; -1 for all.
    logits_soft_cap : float
        The logits' bound; 0 for none.
    custom_mask : bool
        The plan has a bit for each query row and key.
    pos_encoding_mode : str
    rope_scale, rope_theta : float
        For "ROPE_LLAMA": positions are divided by the first; elements `j` and `j + head_dim_qk / 2`
        turn by `rope_theta ** (-2 * j / head_dim_qk)` radians a position.
    needs : Needs
        What all this asks of a kernel.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    page_size: int
    causal: bool
    sm_scale: float
    dtype: str
    kv_layout: KVLayout
    head_dim_vo: int = 0
    kv_dtype: str = ""
    window_left: int = -1
    logits_soft_cap: float = 0.0
    custom_mask: bool = False
    pos_encoding_mode: PosEncodingMode = "NONE"
    rope_scale: float = 1.0
    rope_theta: float = 1e4
    needs: Needs = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Frozen: only here may a field be filled in.
        if not self.head_dim_vo:
            object.__setattr__(self, "head_dim_vo", self.head_dim_qk)
        if not self.kv_dtype:
            object.__setattr__(self, "kv_dtype", self.dtype)
        variant = Variant(
            window=self.window_left >= 0,
            soft_cap=self.logits_soft_cap > 0,
            custom_mask=self.custom_mask,
            alibi=self.pos_encoding_mode == "ALIBI",
            rope=self.pos_encoding_mode == "ROPE_LLAMA",
        )
        head_dims = (self.head_dim_qk, self.head_dim_vo)
        low_cap = 0 < self.logits_soft_cap <= MAX_LOW_CAP
        scattered = 0 <= self.window_left <= _NARROW_WINDOW and self.gqa_group_size == 1
        needs = Needs(
            *(self.dtype, self.kv_dtype, *head_dims, self.page_size),
            *(variant, low_cap, scattered),
        )
        object.__setattr__(self, "needs", needs)
        values = tuple(getattr(self, each.name) for each in fields(self) if each.compare)
        object.__setattr__(self, "_hash", hash(values))

    def __hash__(self) -> int:
        # Asked for several times a plan, which takes long with so many fields.
        return self._hash

    @property
    def gqa_group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def split_unit(self) -> int:
        """Tokens that `fixed_split_size` counts in: a page's, or one where there are no pages."""
        return 1 if self.page_size == RAGGED else self.page_size


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """What the planner needs to know of the machine that will run the plan.

    Attributes
    ----------
    num_sms : int
        Streaming multiprocessors.
    arch : int
        Compute capability, major * 10 + minor.
    """

    num_sms: int
    arch: int


#: What host arrays are planned for: an H200, so that the reference backend walks the very
#: schedule a GPU would.
HOST_MODEL = DeviceModel(num_sms=132, arch=90)
