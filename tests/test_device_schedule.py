"""Schedules that the GPU builds: those of the host, item for item."""

from __future__ import annotations

import dataclasses
from typing import Any

import batches
import numpy as np
import pytest
from gpu_calls import Wrapper, check, planned, run, same_bits, to_gpu
from oracle import Formula

import cupaged
from cupaged import backend, device_schedule, devices, kernels
from cupaged.device_schedule import KERNEL, Outline, outline
from cupaged.kernel_spec import ITEM_DTYPE
from cupaged.schedule import Lengths, Schedule
from cupaged.single_plans import SingleRequestWrapper
from cupaged.spec import RAGGED, AttentionSpec, DeviceModel

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
    assert outline(spec, make_lengths([1] * 16, [4096] * 16), HOPPER) is None
    assert outline(make_spec((32, 32)), make_lengths([1] * 16, [4096] * 16), HOPPER) is not None
    assert outline(spec, make_lengths([4096], [4096]), HOPPER) is not None
    assert outline(spec, make_lengths([1000], [4096]), HOPPER) is None
    assert outline(spec, make_lengths([1024], [4096]), HOPPER) is not None
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


class Placed:
    """A `DevicePlan` that is nowhere."""

    def __init__(self, built: Any, pages: Any, device: int, *others: Any) -> None:
        self.device = device


def test_a_single_requests_plan_is_kept_without_room_for_other_splits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host builds it, where a batch's plan is asked of the device."""
    monkeypatch.setattr(backend, "plan_on_device", lambda *arguments: ("the device's", None))
    monkeypatch.setattr(backend, "device_model", lambda device: HOPPER)
    monkeypatch.setattr(backend, "DevicePlan", Placed)
    spec, lengths = make_spec(page_size=RAGGED), make_lengths([4096], [4096], 1)
    pages = np.arange(4096, dtype=np.int32)

    def planned_by(wrapper: Any) -> Any:
        return wrapper._plan_anew(spec, lengths, pages, 4095, (None, False), 0, None, None)

    ragged = cupaged.BatchPrefillWithRaggedKVCacheWrapper(backend="cuda")
    assert planned_by(ragged) == "the device's"
    assert isinstance(planned_by(SingleRequestWrapper(backend="cuda"))._planned, Schedule)


def built(cp: Any, outlined: Outline) -> tuple[np.ndarray, int]:
    """Items as the device makes them, and the launch's thread blocks."""
    cp.full(256 << 20, 0x55, np.uint8)  # what the pool has is anything
    lengths = outlined.lengths
    pages = np.zeros(lengths.paged_kv_indptr[-1], np.int32)
    highest = int(pages.max(initial=-1))
    found = backend.plan_on_device(
        outlined.spec, lengths, pages, highest, None, False, cp.cuda.Device().id
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
    batch = int(rng.choice([1, 2, 5, 17, 32, 33, 64, 100, 500, 1024, 1500, 4096]))
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
def test_every_kernel_that_builds(
    cp: Any, rng: np.random.Generator, exact_allocations: None
) -> None:
    """The one there is, for compute-sanitizer: with splits, and with pages to be looked for."""
    kv_len = [*rng.integers(1, 90, 36).tolist(), 20_000, 9000, 0, 7000]
    batch = batches.build(rng, [1] * 40, kv_len, num_kv_heads=1, group=2, spare_pages=0)
    wrapper = planned(batch, Formula())
    assert wrapper._plan.on_device(0).question is not None
    assert wrapper._plan.schedule.launches[0].num_merges == 3
    check(batch, Formula())


@pytest.mark.gpu
def test_items_are_the_hosts(cp: Any, rng: np.random.Generator) -> None:
    model = devices.device_model(cp.cuda.Device().id)
    tried = split = late = 0
    for _ in range(500):
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


def many(rng: np.random.Generator, batch: int = 40, **options: Any) -> batches.Batch:
    """Decodes, appends, prefills, requests without keys or queries, in any order."""
    qo_len = rng.choice([0, 1, 1, 5, 70, 300], batch)
    kv_len = qo_len + rng.choice([0, 1, 100, 900], batch)
    kv_len[3] = 0
    settings = {"num_kv_heads": 2, "group": 4, "head_dim": 64} | options
    return batches.build(rng, qo_len.tolist(), kv_len.tolist(), **settings)


def is_device_built(wrapper: Any) -> bool:
    return isinstance(wrapper._plan._planned, Outline)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
def test_calls(cp: Any, rng: np.random.Generator, causal: bool, dtype: str) -> None:
    cap = {"logits_soft_cap": 20.0}
    for head_dim, options in ((64, {}), (128, {}), (128, cap), (256, {})):
        batch = many(rng, head_dim=head_dim, dtype=dtype)
        formula = Formula(causal=causal, **options)
        assert is_device_built(planned(batch, formula)) == (devices.device_model(0).arch == 90)
        check(batch, formula)


@pytest.mark.gpu
def test_few_long_decodes_among_many_are_split(cp: Any, rng: np.random.Generator) -> None:
    kv_len = [20] * 30 + [6000, 3000, 9000]
    batch = batches.build(rng, [1] * 33, kv_len, num_kv_heads=2, group=4, head_dim=128)
    wrapper = planned(batch, Formula())
    assert is_device_built(wrapper)
    assert wrapper._plan.schedule.launches[0].num_merges == 3
    check(batch, Formula())


@pytest.mark.gpu
def test_alibi(cp: Any, rng: np.random.Generator) -> None:
    """Which reads a table that is uploaded beside the lengths."""
    batch = batches.build(rng, [1] * 50, [300] * 50, num_kv_heads=2, group=4, head_dim=128)
    formula = Formula(pos_encoding_mode="ALIBI")
    assert is_device_built(planned(batch, formula))
    check(batch, formula)


@pytest.mark.gpu
def test_a_workspace_takes_the_partial_states_where_it_has_room(
    cp: Any, rng: np.random.Generator
) -> None:
    batch = batches.build(rng, [1] * 40, [3000] * 40, num_kv_heads=1, group=4, head_dim=128)
    outlined = planned(batch, Formula())._plan._planned
    needed = outlined.recipe.partial_bytes
    assert needed > 0
    expected = run(planned(batch, Formula()), batch, Formula())
    for size in (needed, needed - 4):
        workspace = cp.zeros(size, np.uint8)
        wrapper = planned(batch, Formula(), workspace=workspace)
        assert is_device_built(wrapper) == (size == needed)
        assert same_bits(run(wrapper, batch, Formula()), expected)
        assert workspace.any()


@pytest.mark.gpu
def test_a_recorded_run_outlives_the_next_plan(cp: Any, rng: np.random.Generator) -> None:
    batch, other = many(rng), many(rng)
    formula = Formula(causal=True)
    with cp.cuda.Stream(non_blocking=True) as stream:
        wrapper = Wrapper(backend="cuda")
        batch.plan(wrapper, **formula.plan_options)
        on_gpu = batch.on(to_gpu)
        expected = run(wrapper, batch, formula)
        out = to_gpu(batch.poisoned_out().storage)
        stream.begin_capture()
        wrapper.run(on_gpu.q, on_gpu.cache, out=out)
        graph = stream.end_capture()
        other.plan(wrapper, **formula.plan_options)
        run(wrapper, other, formula)
        for _ in range(2):
            graph.launch()
        stream.synchronize()
    assert out.view(np.uint16).get().tobytes() == expected[0].tobytes()


@pytest.mark.gpu
def test_pages_twice_are_found_while_the_schedule_is_built(
    cp: Any, rng: np.random.Generator
) -> None:
    """By a device that is idle, and by the host where it is not; a message names the request."""
    pages = rng.permutation(4000).astype(np.int32)
    indptr = np.arange(41, dtype=np.int32) * 100
    last = np.full(40, 16, np.int32)
    wrapper = cupaged.BatchDecodeWithPagedKVCacheWrapper(backend="cuda")
    wrapper.plan(indptr, pages, last, 8, 2, 64, 16)
    assert is_device_built(wrapper)
    pages[1730] = pages[1711]
    with pytest.warns(cupaged.CupagedWarning, match="request 17 has page .* its pages 11 and 30:"):
        wrapper.plan(indptr, pages, last, 8, 2, 64, 16)
