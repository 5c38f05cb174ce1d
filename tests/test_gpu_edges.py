"""Where tiles, pages, boxes and pieces of work end, on a GPU: one before, at and one after.

Whatever is no key is NaN, in K and in V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import batches
import numpy as np
import oracle
import pytest
from gpu_calls import check, planned, run, schedule_of, to_gpu, to_host, told
from oracle import Formula

from cupaged.device_plan import DevicePlan
from cupaged.kernel_spec import KernelConfig

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("family")]

#: Packed rows at the ends of warpgroups' and of tiles' rows.
ROWS = (33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257)


@pytest.fixture
def without_maps(monkeypatch: pytest.MonkeyPatch) -> list[KernelConfig]:
    """The kernels that gave way to those that take no tensor maps."""
    found: list[KernelConfig] = []
    original = DevicePlan.without_maps

    def noted(self: DevicePlan, config: KernelConfig, recorded: bool) -> int:
        found.append(config)
        return original(self, config, recorded)

    monkeypatch.setattr(DevicePlan, "without_maps", noted)
    return found


def lengths_around(*edges: int) -> list[int]:
    return sorted({edge + d for edge in edges for d in (-1, 0, 1)})


# Keys


@pytest.mark.parametrize("page_size", [1, 8, 16, 24, 40, 48, 64, 128, 192, 256])
@pytest.mark.parametrize("head_dim", batches.HEAD_DIMS)
def test_keys_end_around_the_ends_of_pages_and_tiles(
    cp: Any, rng: np.random.Generator, head_dim: int, page_size: int
) -> None:
    """Of each length, whole and in splits; each row sees all, or its part."""
    config = (
        schedule_of(
            planned(
                batches.build(rng, [40], [9], head_dim=head_dim, page_size=page_size), Formula()
            )
        )
        .launches[0]
        .config
    )
    tile = config.cta_tile_kv
    edges = {page_size, 2 * page_size, tile, 2 * tile, 3 * tile, 8 * (tile // 8 - 1)}
    kv_len = lengths_around(*edges)
    batch = batches.build(
        rng,
        [40] * len(kv_len),
        kv_len,
        page_size=page_size,
        num_kv_heads=1,
        head_dim=head_dim,
        dtype=str(rng.choice(["float16", "bfloat16"])),
    )
    for causal, options in (
        (False, {"disable_split_kv": True}),
        (True, {"fixed_split_size": -(-100 // page_size)}),
    ):
        with told(f"{batch.dtype}, causal={causal}, {options}"):
            check(batch, Formula(causal=causal), **options)


@pytest.mark.parametrize("head_dim", batches.HEAD_DIMS)
@pytest.mark.parametrize("page_size", [1, 16])
def test_tiles_without_keys_among_others(
    cp: Any, rng: np.random.Generator, page_size: int, head_dim: int
) -> None:
    """More queries than keys: whole tiles see none, some warps of the next one neither."""
    batch = batches.build(
        rng,
        [500, 300, 0, 64, 200],
        [20, 150, 0, 0, 200],
        page_size=page_size,
        head_dim=head_dim,
        num_kv_heads=2,
    )
    wrapper = planned(batch, Formula(causal=True))
    (launch,) = schedule_of(wrapper).launches
    keys = launch.items["kv_end"] - launch.items["kv_begin"]
    assert (keys == 0).any()
    assert (keys > 0).any()
    expected = oracle.expect(batch, Formula(causal=True))
    for _ in range(2):
        oracle.check_expected(expected, *run(wrapper, batch, Formula(causal=True)))


# Rows


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("head_dim", batches.HEAD_DIMS)
@pytest.mark.parametrize("options", [{"disable_split_kv": True}, {"fixed_split_size": 4}])
def test_rows_end_around_the_ends_of_warpgroups_and_tiles(
    cp: Any, rng: np.random.Generator, options: dict[str, Any], head_dim: int, group: int
) -> None:
    """Warpgroups without rows, with a few, and full; their splits are merged each on its own."""
    qo_len = [-(-rows // group) for rows in ROWS]
    kv_len = [n + int(rng.integers(0, 150)) for n in qo_len]
    batch = batches.build(
        rng, qo_len, kv_len, num_kv_heads=1, group=group, head_dim=head_dim, dtype="bfloat16"
    )
    for causal in (False, True):
        check(batch, Formula(causal=causal), **options)


# Pieces of work


@pytest.mark.parametrize("head_dim", batches.HEAD_DIMS)
@pytest.mark.parametrize("page_size", [4, 16])
def test_thread_blocks_take_several_pieces(
    cp: Any, rng: np.random.Generator, page_size: int, head_dim: int
) -> None:
    """Of all kinds: many keys and few, none, a tile's rows and a part; and the counters go back."""
    count = 250
    qo_len = rng.integers(33, 140, count)
    kv_len = rng.integers(0, 200, count)
    kv_len[rng.random(count) < 0.1] = 0
    batch = batches.build(
        rng,
        qo_len.tolist(),
        kv_len.tolist(),
        page_size=page_size,
        num_kv_heads=3,
        head_dim=head_dim,
    )
    formula = Formula(causal=True)
    wrapper = planned(batch, formula)
    (launch,) = schedule_of(wrapper).launches
    assert len(launch.items) * 3 > 2 * launch.grid
    expected = oracle.expect(batch, formula)
    first = run(wrapper, batch, formula)
    oracle.check_expected(expected, *first)
    for _ in range(5):
        again = run(wrapper, batch, formula)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))


# Strides of the cache

Change = Callable[[np.ndarray], Any]


def wider_rows(x: np.ndarray) -> Any:
    """Eight elements of NaN behind every row: heads are no multiple of 128 bytes apart."""
    storage = np.full((*x.shape[:-1], x.shape[-1] + 8), np.nan, x.dtype)
    storage[..., :-8] = x
    return to_gpu(storage)[..., :-8]


def backwards(axis: int) -> Change:
    reverse = (*[slice(None)] * axis, slice(None, None, -1))
    return lambda x: to_gpu(np.ascontiguousarray(x[reverse]))[reverse]


#: What becomes of K's and V's pages, and whether the copy engine can't address that.
STRIDES: dict[str, tuple[Change, bool]] = {
    "as they are": (to_gpu, False),
    "wider rows": (wider_rows, True),
    "pages backwards": (backwards(0), True),
    "tokens backwards": (backwards(1), True),
    "heads backwards": (backwards(2), True),
}


@pytest.mark.parametrize("which", ["k", "v", "both"])
@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("head_dim", batches.HEAD_DIMS)
def test_strides_that_the_copy_engine_has_no_way_with(
    cp: Any,
    rng: np.random.Generator,
    family: str,
    without_maps: list[KernelConfig],
    head_dim: int,
    name: str,
    which: str,
) -> None:
    change, unfit = STRIDES[name]
    batch = batches.build(rng, [70, 150], [90, 130], num_kv_heads=2, group=2, head_dim=head_dim)
    k, v = batch.cache
    k = change(k) if which != "v" else to_gpu(k)
    v = change(v) if which != "k" else to_gpu(v)
    wrapper = planned(batch, Formula())
    (launch,) = schedule_of(wrapper).launches
    out, lse = wrapper.run(to_gpu(batch.q), (k, v), return_lse=True)
    oracle.check_all(batch, Formula(), to_host(out), to_host(lse))
    assert without_maps == ([launch.config] if unfit and family == "prefill_sm90" else [])


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["pages", "tokens", "heads"])
def test_a_cache_that_repeats_itself(cp: Any, rng: np.random.Generator, axis: int) -> None:
    """Broadcast along an axis: its stride is 0."""
    batch = batches.build(rng, [70, 150], [96, 128], num_kv_heads=2, group=2, spare_pages=0)
    cache = []
    for x in batch.cache:
        part = np.ascontiguousarray(x.take([0], axis))
        x[...] = part
        strides = [0 if i == axis else n for i, n in enumerate(part.strides)]
        on_gpu = to_gpu(part)
        cache.append(cp.ndarray(x.shape, x.dtype, on_gpu.data, strides))
    wrapper = planned(batch, Formula(causal=True))
    out, lse = wrapper.run(to_gpu(batch.q), tuple(cache), return_lse=True)
    oracle.check_all(batch, Formula(causal=True), to_host(out), to_host(lse))


@pytest.mark.parametrize("step", [8, 72, -64])
def test_one_head_at_any_stride(
    cp: Any,
    rng: np.random.Generator,
    without_maps: list[KernelConfig],
    step: int,
) -> None:
    """Nothing lies there: what the copy engine can't do doesn't matter."""
    batch = batches.build(rng, [70, 150], [90, 130], num_kv_heads=1, group=2, head_dim=128)
    cache = []
    for x in map(to_gpu, batch.cache):
        page, token, _, element = x.strides
        strides = (page, token, step * x.itemsize, element)
        cache.append(cp.ndarray(x.shape, x.dtype, x.data, strides))
    wrapper = planned(batch, Formula())
    out, lse = wrapper.run(to_gpu(batch.q), tuple(cache), return_lse=True)
    oracle.check_all(batch, Formula(), to_host(out), to_host(lse))
    assert without_maps == []


@pytest.mark.parametrize("page_size", [40, 128, 200])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_one_page(
    cp: Any, rng: np.random.Generator, family: str, kv_layout: str, page_size: int
) -> None:
    batch = batches.build(
        rng, [150], [page_size - 3], page_size=page_size, kv_layout=kv_layout, spare_pages=0
    )
    check(batch, Formula(causal=True))
    (launch,) = schedule_of(planned(batch, Formula())).launches
    assert launch.config.page_aligned or family == "prefill_sm80"
