"""Schedules that the GPU builds: those of the host, item for item."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from cupaged import backend, device_schedule, devices, kernels
from cupaged.device_schedule import KERNEL, Outline, outline
from cupaged.kernel_spec import ITEM_DTYPE
from cupaged.schedule import Lengths
from cupaged.spec import AttentionSpec, DeviceModel

HOPPER, AMPERE = DeviceModel(132, 90), DeviceModel(108, 80)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_compiles(arch: int) -> None:
    _, log = kernels.compile_cubin(KERNEL, arch, ("--ptxas-options=-v",))
    assert "0 bytes spill stores" in log
    assert "warning" not in log


def make_spec(heads: tuple[int, int] = (32, 8), **changes: Any) -> AttentionSpec:
    values = {"head_dim_qk": 128, "page_size": 16, "causal": True, "sm_scale": 0.1}
    values |= {"dtype": "float16", "kv_layout": "NHD"} | changes
    return AttentionSpec(*heads, **values)


def make_lengths(qo_len: Any, kv_len: Any, page_size: int = 16) -> Lengths:
    qo_len, kv_len = np.asarray(qo_len, np.int32), np.asarray(kv_len, np.int32)

    def indptr(counts: np.ndarray) -> np.ndarray:
        return np.cumsum([0, *counts], dtype=np.int32)

    return Lengths(indptr(qo_len), indptr(-(-kv_len // page_size)), qo_len, kv_len)


def test_what_the_host_builds() -> None:
    """Few requests or very many, windows, several launches, too much, and no rows."""
    spec, some = make_spec(), make_lengths([1] * 64, [4096] * 64)
    assert outline(spec, some, HOPPER) is not None
    assert outline(spec, make_lengths([1] * 31, [4096] * 31), HOPPER) is None
    assert outline(spec, make_lengths([1] * 4097, [10] * 4097), HOPPER) is None
    assert outline(spec, make_lengths([0] * 64, [10] * 64), HOPPER) is None
    assert outline(dataclasses.replace(spec, window_left=5), some, HOPPER) is None
    mixed = make_lengths([1] * 60 + [64] * 4, [100_000] * 60 + [4096] * 4)
    assert outline(spec, mixed, HOPPER) is not None
    assert outline(spec, mixed, AMPERE) is None
    tiles = make_lengths([192] * 4000, [192] * 4000)
    assert outline(spec, tiles, HOPPER) is None
    assert outline(spec, make_lengths([192] * 3000, [192] * 3000), HOPPER) is not None
    most = device_schedule._MAX_KV_TILES * 64
    assert outline(spec, make_lengths([1] * 64, [most] * 64), HOPPER) is not None
    assert outline(spec, make_lengths([1] * 64, [most + 1] * 64), HOPPER) is None


def built(cp: Any, outlined: Outline) -> tuple[np.ndarray, int]:
    """Items as the device makes them, and the launch's thread blocks."""
    cp.full(256 << 20, 0x55, np.uint8)  # what the pool has is anything
    lengths = outlined.lengths
    pages = np.zeros(lengths.paged_kv_indptr[-1], np.int32)
    highest = int(pages.max(initial=-1))
    found = backend.plan_on_device(
        outlined.spec, lengths, pages, highest, None, cp.cuda.Device().id, ask=False
    )
    assert found is not None
    (launch,) = found[0].on_device(cp.cuda.Device().id).launches
    cp.cuda.Device().synchronize()

    def read(address: int, count: int, dtype: Any) -> np.ndarray:
        memory = cp.cuda.UnownedMemory(address, count * np.dtype(dtype).itemsize, found)
        words = cp.ndarray(memory.size // 4, np.int32, cp.cuda.MemoryPointer(memory, 0))
        return words.get().view(dtype)

    items, _, _, _, merge_counters, work_counters = launch.parameters[:6]
    count = int(read(work_counters, 3, np.int32)[2])
    assert not read(work_counters, 2, np.int32).any()
    counters = outlined.recipe.num_merge_counters
    assert not read(merge_counters, counters, np.int32).any()
    return read(items, count, ITEM_DTYPE), launch.grid


def draw(rng: np.random.Generator) -> tuple[AttentionSpec, Lengths]:
    """A batch of one kind or another."""
    batch = int(rng.choice([32, 33, 64, 100, 500, 1024, 1500, 4096]))
    heads = [(32, 8), (8, 8), (32, 32), (7, 1), (24, 2), (8, 1)][rng.integers(6)]
    kind = rng.choice(["decode", "append", "ragged", "mixed", "equal", "holes", "brief"])
    kv_len = np.minimum(rng.lognormal(rng.uniform(3, 9), rng.uniform(0, 1.5), batch), 2e5)
    qo_len = np.ones(batch)
    if kind == "append":
        qo_len = rng.integers(1, 30, batch)
    elif kind == "ragged":
        qo_len = np.minimum(rng.lognormal(5, 1, batch), 3000)
    elif kind == "mixed":
        qo_len[rng.integers(batch, size=int(rng.integers(1, 9)))] = rng.integers(200, 5000)
    elif kind == "equal":
        kv_len[:], qo_len[:] = rng.integers(1, 10_000), rng.integers(1, 600)
    elif kind == "holes":
        kv_len *= rng.random(batch) < 0.7
        qo_len = rng.integers(0, 300, batch) * (rng.random(batch) < 0.7)
    elif kind == "brief":
        batch, heads = 32, (8, 2)
        qo_len, kv_len = rng.integers(9, 20, batch), rng.integers(0, 200, batch)
    kv_len = kv_len + (qo_len if rng.random() < 0.8 else 0)
    spec = make_spec(
        heads,
        head_dim_qk=int(rng.choice([64, 128, 256])),
        causal=bool(rng.random() < 0.7),
        page_size=int(rng.choice([1, 16, 48])),
        dtype=str(rng.choice(["float16", "bfloat16"])),
    )
    return spec, make_lengths(qo_len, kv_len, spec.page_size)


@pytest.mark.gpu
def test_items_are_the_hosts(cp: Any, rng: np.random.Generator) -> None:
    model = devices.device_model(cp.cuda.Device().id)
    tried = split = late = 0
    for _ in range(400):
        spec, lengths = draw(rng)
        outlined = outline(spec, lengths, model)
        if outlined is None:
            continue
        items, grid = built(cp, outlined)
        (launch,) = outlined.build().launches
        np.testing.assert_array_equal(items, launch.items)
        assert grid >= launch.grid
        tried += 1
        split += launch.num_merges > 0
        late += bool(launch.num_merges and launch.items["num_splits"][0] == 1)
    assert tried > 150
    assert 0 < split < tried
    assert late
