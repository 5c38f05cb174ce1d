"""Appending keys and values to a paged cache: the problem, and what its solution is.

A workload is one of attention: its queries' tokens are those that are appended, its keys hold them
and the prefix before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from check import POISON_BITS, Verdict
from problem import Problem, cold_layers, draw_cache
from timing import HostDevice
from workloads import PageTable, Workload, make_page_table


def append_workload(name: str, tokens: tuple[int, ...], prefixes: tuple[int, ...]) -> Workload:
    """Tokens for each request, after prefixes of such lengths: 8 heads of 128, pages of 16."""
    kv_lens = tuple(n + prefix for n, prefix in zip(tokens, prefixes, strict=True))
    return Workload(name, tokens, kv_lens, 8, 8, True, page_size=16)


def append_workloads() -> list[Workload]:
    """The append table; prefixes end anywhere in a page."""
    return [
        append_workload("8x625", (625,) * 8, tuple(1001 + 37 * r for r in range(8))),
        append_workload("1x5000", (5000,), (3003,)),
        append_workload("64x1", (1,) * 64, tuple(251 + 7 * r for r in range(64))),
    ]


def shrink_append(workload: Workload) -> Workload:
    """The same shape at a size for a run that only shows that it works."""
    tokens = tuple(max(1, n // 25) for n in workload.qo_lens)
    prefixes = (kv - n for kv, n in zip(workload.kv_lens, workload.qo_lens, strict=True))
    keys = tuple(n + prefix for n, prefix in zip(tokens, prefixes, strict=True))
    return replace(workload, qo_lens=tokens, kv_lens=keys)


@dataclass(frozen=True, slots=True)
class AppendLayer:
    """What one call reads, and where it writes."""

    key: Any  # [tokens, num_kv_heads, head_dim]
    value: Any  # like key
    k_cache: Any  # [num_pages, page_size, num_kv_heads, head_dim]
    v_cache: Any  # like k_cache


@dataclass(frozen=True, slots=True)
class Append(Problem):
    """Tokens to be appended, and caches for them."""

    workload: Workload
    table: PageTable
    dtype: str
    device: HostDevice
    batch_indices: np.ndarray  # int32 [tokens]: whose token it is
    positions: np.ndarray  # int32 [tokens]: which of that request's
    before: Any  # K, and V, before anything is appended: NaN where no token of a prefix is
    layers: tuple[AppendLayer, ...]

    @property
    def slots(self) -> np.ndarray:
        """Where the tokens belong in a cache that is seen as `[-1, num_kv_heads * head_dim]`."""
        page = self.table.kv_indptr[self.batch_indices] + self.positions // self.table.page_size
        first = self.table.kv_indices[page].astype(np.int64) * self.table.page_size
        slots: np.ndarray = first + self.positions % self.table.page_size
        return slots

    @property
    def copied_bytes(self) -> int:
        """Bytes of the appended keys and values."""
        first = self.layers[0]
        return int(first.key.nbytes + first.value.nbytes)

    def describe(self) -> Mapping[str, Any]:
        w = self.workload
        return {
            "kind": "append",
            "workload": w.name,
            "append_lens": list(w.qo_lens),
            "kv_lens": list(w.kv_lens),
            "tokens": sum(w.qo_lens),
            "num_kv_heads": w.num_kv_heads,
            "head_dim": w.head_dim,
            "page_size": w.page_size,
            "kv_layout": w.kv_layout,
            "dtype": self.dtype,
            "sweep": w.sweep,
            "bytes": 2 * self.copied_bytes,
            "layers": len(self.layers),
            "fits_l2": self.fits_l2(2 * self.copied_bytes),
        }

    def rows(self, array: Any) -> Any:
        """An array of tokens as their bits, `[tokens or slots, num_kv_heads * head_dim]`."""
        return array.view(np.uint16).reshape(
            -1, self.workload.num_kv_heads * self.workload.head_dim
        )

    def reset(self) -> None:
        """Make all caches what they were before."""
        for layer in self.layers:
            self.rows(layer.k_cache)[...] = self.rows(self.before)
            self.rows(layer.v_cache)[...] = self.rows(self.before)

    def verify(self, layer: int) -> Verdict:
        """Whether every byte of a layer's caches is what it has to be."""
        slots = self.device.xp.asarray(self.slots)
        this = self.layers[layer]
        for name, cache, tokens in (
            ("K", this.k_cache, this.key),
            ("V", this.v_cache, this.value),
        ):
            expected = self.rows(self.before).copy()
            expected[slots] = self.rows(tokens)
            wrong = (self.rows(cache) != expected).any(axis=1)
            count = int(wrong.sum())
            if count:
                return Verdict(False, np.inf, np.inf, self.blame(name, count, int(wrong.argmax())))
        return Verdict(True, 0.0, 0.0)

    def blame(self, name: str, count: int, slot: int) -> str:
        """What to say of a cache whose first wrong slot it is."""
        (found,) = np.nonzero(self.slots == slot)
        if len(found):
            token = int(found[0])
            place = f"request {self.batch_indices[token]}, position {self.positions[token]}"
        else:
            page, row = divmod(slot, self.table.page_size)
            place = f"page {page}, row {row}, where no token belongs"
        return f"{count} slots of {name} are wrong, the first: {place}"


def make_append(
    workload: Workload, dtype: str, device: HostDevice, rng: np.random.Generator
) -> Append:
    """Draw a workload's page order and values, and put them on the device."""
    table = make_page_table(workload, rng)
    lens = np.asarray(workload.qo_lens)
    batch_indices = np.repeat(np.arange(len(lens)), lens)
    behind = np.repeat(np.asarray(workload.kv_lens) - table.qo_indptr[1:], lens)
    positions = np.arange(len(batch_indices)) + behind
    shape = int(lens.sum()), workload.num_kv_heads, workload.head_dim
    nbytes = 2 * int(np.prod(shape)) * np.dtype(np.uint16).itemsize
    before = draw_cache(workload, table, device, dtype, rng)

    def layer() -> AppendLayer:
        tokens = (device.normal(rng, shape, dtype) for _ in range(2))
        return AppendLayer(*tokens, *(device.empty(before.shape, before.dtype) for _ in range(2)))

    problem = Append(
        workload,
        table,
        dtype,
        device,
        batch_indices.astype(np.int32),
        positions.astype(np.int32),
        before,
        tuple(layer() for _ in range(cold_layers(device, 2 * nbytes))),
    )
    problem.rows(before)[device.xp.asarray(problem.slots)] = POISON_BITS
    problem.reset()
    return problem
