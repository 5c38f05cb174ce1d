"""What variants are measured on: turns of workloads, each with a plain one that leads it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from workloads import Workload, shrink

PAGE_SIZE = 16

#: Public classes of cupaged that workloads are run by.
PREFILL = "BatchPrefillWithPagedKVCacheWrapper"
RAGGED = "BatchPrefillWithRaggedKVCacheWrapper"
DECODE = "BatchDecodeWithPagedKVCacheWrapper"

WINDOW_LEFT = 1024
SOFT_CAP = 30.0

#: `--quick` has so many times fewer tokens, and windows that fit them.
QUICK = 64


@dataclass(frozen=True, slots=True)
class VariantWorkload(Workload):
    """A batch of attention requests, and what of attention is off by default.

    Attributes
    ----------
    beside : str
        The workload that its speed is held against; its own name for a plain one. Those beside the
        same one are measured in turns.
    wrapper : str
        Which class runs it.
    head_dim_vo : int
        Elements of a value's head; 0 for as many as a key's.
    kv_dtype : str
        Of K and V; empty for that of the queries.
    window_left : int
        Row `i` sees keys from `kv_len - qo_len + i - window_left` on; -1 for all.
    logits_soft_cap : float
        The logits' bound; 0 for none.
    pos_encoding_mode : str
        "NONE", "ALIBI" or "ROPE_LLAMA".
    custom_mask : bool
        That it is causal is said by a bit for each row and key.
    sinks : bool
        Heads have attention sinks.
    """

    beside: str = ""
    wrapper: str = PREFILL
    head_dim_vo: int = 0
    kv_dtype: str = ""
    window_left: int = -1
    logits_soft_cap: float = 0.0
    pos_encoding_mode: str = "NONE"
    custom_mask: bool = False
    sinks: bool = False

    @property
    def head_dims(self) -> tuple[int, int]:
        """Elements of a key's head, and of a value's."""
        return self.head_dim, self.head_dim_vo or self.head_dim

    @property
    def kv_name(self) -> str:
        """The dtype of K and V."""
        return self.kv_dtype or self.dtype

    def seen(
        self, rows: np.ndarray, qo_len: int, kv_len: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What rows of a request see.

        Parameters
        ----------
        rows : int array [rows]
        qo_len, kv_len : int

        Returns
        -------
        own, first, stop : int array [rows]
            The position of each row; the first key it sees and the one behind the last.
        """
        own = kv_len - qo_len + rows
        stop = np.clip(own + 1, 0, kv_len) if self.causal else np.full_like(own, kv_len)
        left = self.window_left if self.window_left >= 0 else qo_len + kv_len
        return own, np.clip(own - left, 0, stop), stop

    def flops(self) -> int:
        """Floating-point operations: 2 for each element of a key's head and of a value's.

        So many for each (query head row, visible key) pair.
        """
        pairs = 0
        for qo_len, kv_len in zip(self.qo_lens, self.kv_lens, strict=True):
            _, first, stop = self.seen(np.arange(qo_len), qo_len, kv_len)
            pairs += int((stop - first).sum())
        return 2 * sum(self.head_dims) * self.num_qo_heads * pairs

    def kv_bytes(self, itemsize: int = 0) -> int:
        """Bytes of the keys and values; of so many each, or as their dtype has it."""
        itemsize = itemsize or (1 if self.kv_name.startswith("float8") else 2)
        return sum(self.kv_lens) * self.num_kv_heads * sum(self.head_dims) * itemsize

    def bytes(self, itemsize: int = 2) -> int:
        """Bytes that must move: K and V read once, Q read once, the output written once."""
        rows = sum(self.qo_lens) * self.num_qo_heads * sum(self.head_dims)
        return self.kv_bytes() + rows * itemsize

    def features(self) -> Mapping[str, Any]:
        """What of `plan()`'s arguments is not as it is by default."""
        found: dict[str, Any] = {}
        if self.window_left >= 0:
            found["window_left"] = self.window_left
        if self.logits_soft_cap > 0:
            found["logits_soft_cap"] = self.logits_soft_cap
        if self.pos_encoding_mode != "NONE":
            found["pos_encoding_mode"] = self.pos_encoding_mode
        if self.kv_dtype:
            found["kv_data_type"] = self.kv_dtype
        if self.custom_mask:
            found["packed_custom_mask"] = self.packed_mask()
        elif self.wrapper != DECODE:
            found["causal"] = self.causal
        if self.head_dim_vo:
            found["head_dim_vo"] = self.head_dim_vo
        return found

    def packed_mask(self) -> np.ndarray:
        """The causal mask of all requests as little-endian bits, uint8."""
        lens = zip(self.qo_lens, self.kv_lens, strict=True)
        return np.concatenate([causal_bits(qo_len, kv_len) for qo_len, kv_len in lens])


@functools.cache
def causal_bits(qo_len: int, kv_len: int) -> np.ndarray:
    """The causal mask of one request, aligned to the bottom right."""
    return np.packbits(np.tri(qo_len, kv_len, kv_len - qo_len, bool), bitorder="little")


#: What stands beside 4 x 4,096, by the end of its name.
BESIDE_4X4096: dict[str, dict[str, Any]] = {
    "window": {"window_left": WINDOW_LEFT},
    "softcap": {"logits_soft_cap": SOFT_CAP},
    "window-softcap": {"window_left": WINDOW_LEFT, "logits_soft_cap": SOFT_CAP},
    "alibi": {"pos_encoding_mode": "ALIBI"},
    "rope": {"pos_encoding_mode": "ROPE_LLAMA"},
    "sinks": {"sinks": True},
    "mask": {"custom_mask": True},
    "ragged": {"wrapper": RAGGED},
    "hd96": {"head_dim": 96},
    "hd192-128": {"head_dim": 192, "head_dim_vo": 128, "num_kv_heads": 32},
    "e4m3": {"kv_dtype": "float8_e4m3fn"},
    "e4m3-rope": {"kv_dtype": "float8_e4m3fn", "pos_encoding_mode": "ROPE_LLAMA"},
}


#: Of decoding, what is measured with rotations too.
ROTATED = ("64x8192-float16", "64x8192-float16-e4m3")


def variant_workloads() -> list[VariantWorkload]:
    """All of them, turn by turn, in each the plain one first."""
    return [*prefills(), *long_prefills(16, 16), *long_prefills(32, 8), *decodes()]


def plain(name: str, batch: int, length: int, qo_heads: int, kv_heads: int) -> VariantWorkload:
    """Requests of one length without a prefix, causal, bfloat16, without variants."""
    lens = (length,) * batch
    return VariantWorkload(
        *(name, lens, lens, qo_heads, kv_heads, True, PAGE_SIZE), dtype="bfloat16", beside=name
    )


def prefills() -> list[VariantWorkload]:
    """4 x 4,096: every variant of prefill."""
    base = plain("4x4096", 4, 4096, 32, 8)
    others = BESIDE_4X4096.items()
    return [base, *(replace(base, name=f"{base.name}-{end}", **what) for end, what in others)]


def long_prefills(qo_heads: int, kv_heads: int) -> list[VariantWorkload]:
    """1 x 16,384, of which a window leaves an eighth of the pairs."""
    base = plain(f"1x16384-heads{qo_heads}-{kv_heads}", 1, 16384, qo_heads, kv_heads)
    return [base, replace(base, name=f"{base.name}-window", window_left=WINDOW_LEFT)]


def decodes() -> list[VariantWorkload]:
    """64 x 8,192, one query a request: K and V of the queries' dtype and of 8 bits."""
    table = []
    for dtype in ("float16", "bfloat16"):
        name = f"64x8192-{dtype}"
        base = replace(plain(name, 64, 8192, 32, 8), qo_lens=(1,) * 64, dtype=dtype, wrapper=DECODE)
        table.append(base)
        for kv_dtype in ("float8_e4m3fn", "float8_e5m2"):
            kind = kv_dtype.removeprefix("float8_").removesuffix("fn")
            table.append(replace(base, name=f"{name}-{kind}", kv_dtype=kv_dtype))
        table += [
            replace(w, name=f"{w.name}-rope", pos_encoding_mode="ROPE_LLAMA")
            for w in table
            if w.beside == name and w.name in ROTATED
        ]
    return table


def shrink_variant(workload: VariantWorkload) -> VariantWorkload:
    """The same shape at a size that NumPy computes in milliseconds."""
    left = workload.window_left
    window = left if left < 0 else left // QUICK
    small = shrink(workload)
    assert isinstance(small, VariantWorkload)
    return replace(small, window_left=window)
