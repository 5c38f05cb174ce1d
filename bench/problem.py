"""What is to be solved: a workload with its arrays on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from check import POISON_BITS, Answers, Verdict, answers, compare
from timing import HostDevice
from workloads import DTYPES, PageTable, Workload, cache_shape, head_rows, make_page_table

#: Calls take turns on so many copies of what they read and write that all together are this many
#: times the L2 cache: none finds there what it left. A model's layers do the same.
COLD_L2S = 4
MAX_LAYERS = 8


class Problem(ABC):
    """One workload with its arrays on a device; every contender works on these.

    Attributes
    ----------
    workload : Workload
    device : HostDevice
    layers : tuple
        What a call reads and writes, as often as it takes for no call to find its own in the L2
        cache; calls take turns on them.
    """

    workload: Workload
    device: HostDevice
    layers: tuple[Any, ...]

    @abstractmethod
    def describe(self) -> Mapping[str, Any]:
        """What a row of the result says of the problem."""

    def fits_l2(self, layer_bytes: int) -> bool:
        """Whether all layers, of so many bytes each, are in the L2 cache together."""
        return len(self.layers) * layer_bytes < self.device.l2_bytes


def cold_layers(device: HostDevice, layer_bytes: int) -> int:
    """How many layers of so many bytes it takes."""
    needed = -(-COLD_L2S * device.l2_bytes // max(layer_bytes, 1))
    return min(max(needed, 1), MAX_LAYERS)


@dataclass(frozen=True, slots=True)
class Attention(Problem):
    """Queries, and a layer's K and V in pages for each of `layers`."""

    workload: Workload
    table: PageTable
    dtype: str
    device: HostDevice
    q: Any  # [nnz_qo, num_qo_heads, head_dim]
    layers: tuple[tuple[Any, Any], ...]  # K and V: [num_pages, page_size, num_kv_heads, head_dim]
    known: dict[int, Answers] = field(default_factory=dict)  # by layer, as they are asked for

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the queries and of the output."""
        w = self.workload
        return sum(w.qo_lens), w.num_qo_heads, w.head_dim

    @property
    def k(self) -> Any:
        """The first layer's keys."""
        return self.layers[0][0]

    @property
    def v(self) -> Any:
        """The first layer's values."""
        return self.layers[0][1]

    def unpaged(self) -> tuple[Any, Any]:
        """K and V gathered from their pages, `[sum(kv_lens), num_kv_heads, head_dim]` each."""
        slots = self.table.all_slots()
        lie = self.device.xp.asarray(head_rows(self.workload, self.table, slots))
        k, v = (
            cache.view(np.uint16).reshape(-1, self.workload.head_dim)[lie].view(DTYPES[self.dtype])
            for cache in (self.k, self.v)
        )
        return k, v

    def verify(self, out_bits: Any, rng: np.random.Generator, layer: int = 0) -> Verdict:
        """Compare an output, given by its bits, with the formula."""
        xp = self.device.xp
        if layer not in self.known:
            k, v = self.layers[layer]
            self.known[layer] = answers(
                xp, self.workload, self.table, self.dtype, self.q, k, v, rng
            )
        return compare(xp, self.known[layer], self.dtype, out_bits, self.shape)

    def describe(self) -> Mapping[str, Any]:
        w = self.workload
        return {
            "kind": "attention",
            "workload": w.name,
            "qo_lens": list(w.qo_lens),
            "kv_lens": list(w.kv_lens),
            "num_qo_heads": w.num_qo_heads,
            "num_kv_heads": w.num_kv_heads,
            "head_dim": w.head_dim,
            "page_size": w.page_size,
            "kv_layout": w.kv_layout,
            "dtype": self.dtype,
            "causal": w.causal,
            "sweep": w.sweep,
            "flops": w.flops(),
            "bytes": w.bytes(),
            "layers": len(self.layers),
            "fits_l2": self.fits_l2(w.kv_bytes()),
        }


def make_problem(
    workload: Workload,
    dtype: str,
    device: HostDevice,
    rng: np.random.Generator,
    cold: bool = False,
) -> Attention:
    """Draw a workload's page order and values, and put them on the device.

    Parameters
    ----------
    workload : Workload
        The batch; its own dtype goes before the run's.
    dtype : str
        "float16" or "bfloat16".
    device : HostDevice
        Where the arrays will be.
    rng : numpy.random.Generator
        Draws.
    cold : bool
        So many layers that none is found in the L2 cache, instead of one.
    """
    dtype = workload.dtype or dtype
    table = make_page_table(workload, rng)
    count = cold_layers(device, workload.kv_bytes()) if cold else 1
    caches = [draw_cache(workload, table, device, dtype, rng) for _ in range(2 * count)]
    layers = tuple(zip(caches[::2], caches[1::2], strict=True))
    shape = sum(workload.qo_lens), workload.num_qo_heads, workload.head_dim
    return Attention(workload, table, dtype, device, device.normal(rng, shape, dtype), layers)


def draw_cache(
    workload: Workload,
    table: PageTable,
    device: HostDevice,
    dtype: str,
    rng: np.random.Generator,
) -> Any:
    """K, or V, in pages. Slots without a key of the batch hold NaN: whoever reads one shows it."""
    cache = device.normal(rng, cache_shape(workload, table), dtype)
    lie = device.xp.asarray(head_rows(workload, table, table.unused_slots()))
    cache.view(np.uint16).reshape(-1, workload.head_dim)[lie] = POISON_BITS
    return cache
