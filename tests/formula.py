"""The options of a call that change its numbers, and what they mean on their own.

Nothing here imports the library under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """The options of a call that change its numbers.

    `sinks` is float32 [num_qo_heads], and `custom_mask` has a bool [qo_len, kv_len] for each
    request.
    """

    causal: bool = False
    sm_scale: float | None = None
    q_scale: float | None = None
    k_scale: float | None = None
    v_scale: float | None = None
    lse_base: str = "log2"
    window_left: int = -1
    logits_soft_cap: float | None = None
    pos_encoding_mode: str = "NONE"
    rope_scale: float | None = None
    rope_theta: float | None = None
    sinks: Array | None = None
    custom_mask: tuple[Array, ...] | None = None

    @property
    def plan_options(self) -> dict[str, Any]:
        """As `plan()` takes them; variants that are off are left out."""
        variants: dict[str, Any] = {
            "window_left": None if self.window_left == -1 else self.window_left,
            "logits_soft_cap": self.logits_soft_cap,
            "pos_encoding_mode": None
            if self.pos_encoding_mode == "NONE"
            else self.pos_encoding_mode,
            "rope_scale": self.rope_scale,
            "rope_theta": self.rope_theta,
            "custom_mask": self.flat_mask,
        }
        on = {name: value for name, value in variants.items() if value is not None}
        return {"causal": self.causal, "sm_scale": self.sm_scale, **on}

    @property
    def run_options(self) -> dict[str, Any]:
        return {
            "q_scale": self.q_scale,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
            "lse_base": self.lse_base,
            **({} if self.sinks is None else {"sinks": self.sinks}),
        }

    @property
    def flat_mask(self) -> Array | None:
        """The masks of all requests, one behind the other."""
        if self.custom_mask is None:
            return None
        return np.concatenate([np.zeros(0, np.bool_), *(mask.ravel() for mask in self.custom_mask)])

    @property
    def packed_mask(self) -> Array:
        """Its bits, the lowest of a byte first; every request begins a byte."""
        assert self.custom_mask is not None
        packed = [np.packbits(mask, axis=None, bitorder="little") for mask in self.custom_mask]
        return np.concatenate([np.zeros(0, np.uint8), *packed])

    def of(self, r: int) -> Formula:
        """The formula of request `r` alone."""
        if self.custom_mask is None:
            return self
        return replace(self, custom_mask=(self.custom_mask[r],))

    def logit_scale(self, head_dim: int) -> float:
        scale = 1 / math.sqrt(head_dim) if self.sm_scale is None else self.sm_scale
        for factor in (self.q_scale, self.k_scale):
            scale *= 1.0 if factor is None else factor
        return scale

    def output_scale(self) -> float:
        return 1.0 if self.v_scale is None else self.v_scale


def visible(
    qo_len: int, kv_len: int, causal: bool, window_left: int = -1, mask: Array | None = None
) -> Array:
    """Bool [qo_len, kv_len]: which keys each query row sees."""
    own, key = kv_len - qo_len + np.arange(qo_len)[:, None], np.arange(kv_len)
    seen = np.ones((qo_len, kv_len), np.bool_) if mask is None else mask.copy()
    assert seen.shape == (qo_len, kv_len)
    if causal:
        seen &= key <= own
    if window_left >= 0:
        seen &= key >= own - window_left
    return seen


def alibi_slope(head: int, num_heads: int) -> float:
    """Press et al. 2022; of heads beyond a power of two, as their code has it."""
    power = 1
    while 2 * power <= num_heads:
        power *= 2
    if head < power:
        return float(2.0 ** (-8 * (head + 1) / power))
    return float(2.0 ** (-8 * (2 * (head - power) + 1) / (2 * power)))


def rotated(x: Array, positions: Array, scale: float, theta: float) -> Array:
    """RoPE of rows [rows, heads, head_dim], in x's dtype: element d goes with d + head_dim / 2."""
    half = x.shape[-1] // 2
    angle = positions[:, None] / scale * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(x.dtype)[:, None], np.sin(angle).astype(x.dtype)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
