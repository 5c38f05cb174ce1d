"""What decoding is measured on: the table, the page sizes, the lengths, and batches to plan for.

Every workload is causal, with as many query tokens for each request: one, or some to be verified.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from workloads import LENGTH_SWEEP, PAGE_SWEEP, Workload, log_normal_of_mean, shrink

PAGE_SIZE = 16

#: page sizes of the sweep, on 64 requests of 8,192 keys
SWEEP_PAGE_SIZES = (1, 16, 64, 128)

#: keys of a request in the other sweep, and how many requests
SWEEP_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SWEEP_BATCH = 64

#: `--quick` has so many times fewer keys.
QUICK = 256


def equal(name: str, batch: int, kv_len: int, qo_heads: int = 32, kv_heads: int = 8) -> Workload:
    """Requests of one length and one query token."""
    return Workload(name, (1,) * batch, (kv_len,) * batch, qo_heads, kv_heads, True, PAGE_SIZE)


def log_normal(name: str, batch: int, mean: int, rng: np.random.Generator) -> Workload:
    """Requests of log-normal lengths with that mean, one query token each, 32/8 heads."""
    return replace(equal(name, batch, mean), kv_lens=log_normal_of_mean(rng, batch, mean))


def decode_workloads() -> list[Workload]:
    """The decode table: first what has a bar, then what else a user would ask for."""
    usual = equal("64x8192", 64, 8192)
    return [
        usual,
        equal("1x131072", 1, 131072),
        equal("256x1024", 256, 1024),
        equal("16x4096-heads32-32", 16, 4096, 32, 32),
        equal("64x8192-heads8-1", 64, 8192, 8, 1),
        # Lengths are the same in every run.
        log_normal("lognormal-128", 128, 4096, np.random.default_rng(20261122)),
        replace(usual, name="64x8192-4queries", qo_lens=(4,) * 64),
        replace(usual, name="64x8192-bfloat16", dtype="bfloat16"),
        replace(usual, name="64x8192-hd64", head_dim=64),
        replace(usual, name="64x8192-hd256", head_dim=256),
        replace(usual, name="64x8192-HND", kv_layout="HND"),
    ]


def page_sweep() -> list[Workload]:
    """64 × 8,192 at every page size of the sweep."""
    return [
        replace(equal(f"64x8192-page{size}", 64, 8192), page_size=size, sweep=PAGE_SWEEP)
        for size in SWEEP_PAGE_SIZES
    ]


def length_sweep() -> list[Workload]:
    """64 requests of each length of the sweep."""
    return [
        replace(equal(f"length-{length}", SWEEP_BATCH, length), sweep=LENGTH_SWEEP)
        for length in SWEEP_LENGTHS
    ]


def shrink_decode(workload: Workload) -> Workload:
    """The same shape at a size that NumPy computes in milliseconds; the queries stay."""
    keys = (max(1, kv // QUICK) for kv in workload.kv_lens)
    enough = tuple(max(q, kv) for q, kv in zip(workload.qo_lens, keys, strict=True))
    return replace(shrink(workload), qo_lens=workload.qo_lens, kv_lens=enough)
