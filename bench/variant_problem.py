"""A workload of variants with its arrays on a device, and what its output has to be.

The formula serves NumPy and CuPy arrays alike (`xp`), so what judges the GPU is tested without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from check import Answers, Verdict, compare, sample_rows, widen
from problem import Problem, draw_cache
from timing import HostDevice
from variant_workloads import RAGGED, VariantWorkload
from workloads import PageTable, cache_shape, head_rows, indptr, make_page_table

FLOAT8 = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}

#: NaN in either float8.
POISON_FLOAT8 = 0x7F


@dataclass(frozen=True, slots=True)
class VariantProblem(Problem):
    """Queries, K and V, in pages or one request behind the other, and sinks."""

    workload: VariantWorkload
    table: PageTable
    device: HostDevice
    q: Any  # [nnz_qo, num_qo_heads, head_dim]
    # K and V: [num_pages, page_size, num_kv_heads, head_dim or head_dim_vo], and without pages
    # [sum(kv_lens), num_kv_heads, ...]; float8 as uint8
    layers: tuple[tuple[Any, Any], ...]
    sinks: Any  # float32 [num_qo_heads], or None
    known: dict[int, Answers] = field(default_factory=dict)  # by layer, as they are asked for

    @property
    def dtype(self) -> str:
        """Of the queries and of the output."""
        return self.workload.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the output."""
        w = self.workload
        return sum(w.qo_lens), w.num_qo_heads, w.head_dims[1]

    @property
    def kv_indptr(self) -> np.ndarray:
        """Rows of K and V that belong to each request, where they have no pages."""
        return indptr(self.workload.kv_lens)

    def slots(self, request: int) -> np.ndarray:
        """Where a request's keys lie among all tokens."""
        if self.workload.wrapper == RAGGED:
            return np.arange(*self.kv_indptr[request : request + 2])
        return self.table.slots(request)

    def verify(self, out_bits: Any, rng: np.random.Generator, layer: int) -> Verdict:
        """Compare an output, given by its bits, with the formula."""
        if layer not in self.known:
            self.known[layer] = self.answers(layer, rng)
        return compare(self.device.xp, self.known[layer], self.dtype, out_bits, self.shape)

    def answers(self, layer: int, rng: np.random.Generator) -> Answers:
        """Draw rows of every request, and compute them in float64."""
        xp, w = self.device.xp, self.workload
        requests, sampled, places, expected = [], [], [], []
        for request, (qo_len, kv_len) in enumerate(zip(w.qo_lens, w.kv_lens, strict=True)):
            rows = sample_rows(qo_len, w.batch, rng)
            requests.append(np.full(len(rows), request))
            sampled.append(rows)
            places.append(rows + int(self.table.qo_indptr[request]))
            q = widen(xp, self.q.view(np.uint16)[xp.asarray(places[-1])], self.dtype)
            lie = xp.asarray(head_rows(w, self.table, self.slots(request)))
            k, v = (values_of(xp, cache, lie, w.kv_name) for cache in self.layers[layer])
            expected.append(attend(xp, w, q, k, v, w.seen(rows, qo_len, kv_len), self.sinks))
        return Answers(
            np.concatenate(requests),
            np.concatenate(sampled),
            xp.asarray(np.concatenate(places)),
            xp.concatenate(expected),
        )

    def describe(self) -> Mapping[str, Any]:
        w = self.workload
        return {
            "kind": "variant",
            "workload": w.name,
            "beside": w.beside,
            "wrapper": w.wrapper,
            "qo_lens": list(w.qo_lens),
            "kv_lens": list(w.kv_lens),
            "num_qo_heads": w.num_qo_heads,
            "num_kv_heads": w.num_kv_heads,
            "head_dim": w.head_dim,
            "head_dim_vo": w.head_dims[1],
            "page_size": w.page_size,
            "kv_layout": w.kv_layout,
            "dtype": w.dtype,
            "kv_dtype": w.kv_name,
            "causal": w.causal,
            "window_left": w.window_left,
            "logits_soft_cap": w.logits_soft_cap,
            "pos_encoding_mode": w.pos_encoding_mode,
            "custom_mask": w.custom_mask,
            "sinks": w.sinks,
            "sweep": w.sweep,
            "flops": w.flops(),
            "bytes": w.bytes(),
            "layers": len(self.layers),
            "fits_l2": self.fits_l2(w.kv_bytes()),
        }


def make_variant(
    workload: VariantWorkload, device: HostDevice, rng: np.random.Generator
) -> VariantProblem:
    """Draw a workload's page order and values, and put them on the device."""
    table = make_page_table(workload, rng)
    k, v = (draw(workload, head_dim, table, device, rng) for head_dim in workload.head_dims)
    shape = sum(workload.qo_lens), workload.num_qo_heads, workload.head_dim
    q = device.normal(rng, shape, workload.dtype)
    sinks = None
    if workload.sinks:
        sinks = device.put(rng.standard_normal(workload.num_qo_heads, np.float32))
    return VariantProblem(workload, table, device, q, ((k, v),), sinks)


def draw(
    workload: VariantWorkload,
    head_dim: int,
    table: PageTable,
    device: HostDevice,
    rng: np.random.Generator,
) -> Any:
    """K, or V. Slots of pages that hold no key of the batch hold NaN."""
    workload = replace(workload, head_dim=head_dim)
    if workload.wrapper == RAGGED:
        shape = sum(workload.kv_lens), workload.num_kv_heads, head_dim
        return device.normal(rng, shape, workload.dtype)
    if not workload.kv_dtype:
        return draw_cache(workload, table, device, workload.dtype, rng)
    drawn = device.normal(rng, cache_shape(workload, table), "float16")
    cache = float8_bits(device.xp, drawn.view(np.uint16), workload.kv_dtype)
    lie = device.xp.asarray(head_rows(workload, table, table.unused_slots()))
    cache.reshape(-1, head_dim)[lie] = POISON_FLOAT8
    return cache


def float8_bits(xp: Any, bits: Any, kv_dtype: str) -> Any:
    """Numbers of a float8, uint8, from those of float16 below 256, uint16, rounded towards 0."""
    if kv_dtype == "float8_e5m2":
        # The upper half of a float16.
        return (bits >> 8).astype(np.uint8)
    # Three bits of the fraction are left, and an exponent that begins 8 higher: what is less than
    # its smallest normal number becomes 0.
    magnitude = xp.maximum((bits & 0x7FFF) >> 7, 8 << 3) - (8 << 3)
    return (magnitude | ((bits >> 8) & 0x80)).astype(np.uint8)


def values_of(xp: Any, cache: Any, rows: Any, kv_dtype: str) -> Any:
    """float64 values of some rows of K or V, seen as `[-1, head_dim]`."""
    heads = cache.reshape(-1, cache.shape[-1])
    if kv_dtype not in FLOAT8:
        return widen(xp, heads.view(np.uint16)[rows], kv_dtype)
    every = np.arange(256, dtype=np.uint8).view(FLOAT8[kv_dtype]).astype(np.float64)
    return xp.asarray(every)[heads[rows].astype(np.int32)]


def attend(
    xp: Any,
    workload: VariantWorkload,
    q: Any,
    k: Any,
    v: Any,
    seen: tuple[np.ndarray, np.ndarray, np.ndarray],
    sinks: Any,
) -> Any:
    """Attention of some rows of one request, each of which sees a key.

    Parameters
    ----------
    xp : module
        `numpy` or `cupy`.
    workload : VariantWorkload
        What is on.
    q : array, float64, [rows, num_qo_heads, head_dim]
    k : array, float64, [kv_len, num_kv_heads, head_dim]
    v : array, float64, [kv_len, num_kv_heads, head_dim_vo]
    seen : tuple of array
        As `VariantWorkload.seen` returns them, on the host.
    sinks : float32 array [num_qo_heads], or None

    Returns
    -------
    array, float64, [rows, num_qo_heads, head_dim_vo]
    """
    rows, num_qo_heads, head_dim = q.shape
    kv_len, num_kv_heads, head_dim_vo = v.shape
    group = num_qo_heads // num_kv_heads
    own, first, stop = (xp.asarray(array)[:, None] for array in seen)
    key = xp.arange(kv_len)
    if workload.pos_encoding_mode == "ROPE_LLAMA":
        q, k = rotated(xp, q, own[:, 0]), rotated(xp, k, key)
    grouped = q.transpose(1, 0, 2).reshape(num_kv_heads, group * rows, head_dim)
    logits = xp.matmul(grouped, k.transpose(1, 2, 0)) / math.sqrt(head_dim)
    logits = logits.reshape(num_qo_heads, rows, kv_len)
    if workload.logits_soft_cap > 0:
        cap = workload.logits_soft_cap
        logits = cap * xp.tanh(logits / cap)
    if workload.pos_encoding_mode == "ALIBI":
        # Heads are a power of two: Press et al. 2022.
        slopes = 2.0 ** (-8.0 / num_qo_heads * xp.arange(1, num_qo_heads + 1))
        logits = logits + slopes[:, None, None] * (key - own)
    logits = xp.where((key >= first) & (key < stop), logits, -math.inf)
    top = logits.max(axis=-1, keepdims=True)
    weights = xp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + xp.exp(sinks.astype(np.float64)[:, None, None] - top)
    weights = (weights / total).reshape(num_kv_heads, group * rows, kv_len)
    out = xp.matmul(weights, v.transpose(1, 0, 2)).reshape(num_qo_heads, rows, head_dim_vo)
    return out.transpose(1, 0, 2)


def rotated(xp: Any, x: Any, positions: Any) -> Any:
    """Rows `[n, heads, head_dim]` turned by their positions: Su et al. 2021, base 1e4, halves."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 1e4 ** (-xp.arange(half) / half)
    cosine, sine = xp.cos(angle), xp.sin(angle)
    low, high = x[..., :half], x[..., half:]
    return xp.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=-1)
