"""The planner: every (query row, visible key, head) is worked on once, and the work is balanced."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import strategies
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cupaged import device_plan, explain, schedule, tiles, validate_lengths
from cupaged.schedule import Launch, Schedule
from cupaged.spec import HOST_MODEL, AttentionSpec, DeviceModel

Lengths = list[tuple[int, int]]


def spec_of(
    group: int = 1,
    num_kv_heads: int = 1,
    page_size: int = 16,
    causal: bool = False,
    head_dim: int = 128,
) -> AttentionSpec:
    return AttentionSpec(
        num_qo_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim_qk=head_dim,
        page_size=page_size,
        causal=causal,
        sm_scale=1.0,
        dtype="float16",
        kv_layout="NHD",
    )


def lengths_of(spec: AttentionSpec, batch: Lengths) -> schedule.Lengths:
    """As `plan()` derives them."""
    qo_len = [qo for qo, _ in batch]
    pages = [-(-kv // spec.page_size) for _, kv in batch]
    last = [
        kv - (p - 1) * spec.page_size if p else 0 for (_, kv), p in zip(batch, pages, strict=True)
    ]
    return validate_lengths.lengths(
        np.cumsum([0, *qo_len]), np.cumsum([0, *pages]), np.array(last, np.int64), spec
    )


def build(
    spec: AttentionSpec, batch: Lengths, device: DeviceModel = HOST_MODEL, **options: Any
) -> Schedule:
    return schedule.build(spec, lengths_of(spec, batch), device, **options)


def specs() -> st.SearchStrategy[AttentionSpec]:
    return st.builds(
        spec_of,
        group=st.sampled_from(strategies.GROUPS),
        num_kv_heads=st.integers(1, 8),
        page_size=st.one_of(st.sampled_from([1, 16, 32, 128]), st.integers(1, 200)),
        causal=st.booleans(),
        head_dim=st.sampled_from([64, 128, 256]),
    )


def devices() -> st.SearchStrategy[DeviceModel]:
    return st.builds(DeviceModel, num_sms=st.integers(1, 200), arch=st.sampled_from([80, 86, 90]))


def length_lists(max_qo: int, max_kv: int) -> st.SearchStrategy[Lengths]:
    pair = st.tuples(strategies.lengths(max_qo), strategies.lengths(max_kv))
    return st.lists(pair, max_size=12)


def split_options() -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.just({}),
        st.just({"disable_split_kv": True}),
        st.builds(lambda pages: {"fixed_split_size": pages}, st.integers(1, 300)),
    )


def tiles_of(launch: Launch) -> dict[tuple[int, int], list[np.void]]:
    """The items of each query tile, by (request, row_begin), in the order of their splits."""
    found: dict[tuple[int, int], list[np.void]] = defaultdict(list)
    for item in np.sort(launch.items, order="split"):
        found[int(item["request"]), int(item["row_begin"])].append(item)
    return found


def check_coverage(plan: Schedule) -> None:
    """Count how often each (packed row, key) of each request is worked on.

    An item stands for every KV head, and a packed row for one query head of a group, so these
    are all (query row, key, head).
    """
    spec, lengths = plan.spec, plan.lengths
    group = spec.gqa_group_size
    counts = [
        np.zeros((int(qo) * group, int(kv)), np.int8)
        for qo, kv in zip(lengths.qo_len, lengths.kv_len, strict=True)
    ]
    for launch in plan.launches:
        tile_rows = launch.config.cta_tile_q
        for item in launch.items:
            count = counts[item["request"]]
            assert 0 <= item["row_begin"] < len(count)
            assert item["row_begin"] % tile_rows == 0
            assert 0 <= item["kv_begin"] <= item["kv_end"] <= count.shape[1]
            rows = slice(item["row_begin"], item["row_begin"] + tile_rows)
            count[rows, item["kv_begin"] : item["kv_end"]] += 1
    for r, count in enumerate(counts):
        qo_len, kv_len = int(lengths.qo_len[r]), int(lengths.kv_len[r])
        seen = oracle.visible(qo_len, kv_len, spec.causal).repeat(group, axis=0)
        assert (count[seen] == 1).all(), f"request {r}: a visible key is not covered once"
        assert (count[~seen] <= 1).all(), f"request {r}: a hidden key is covered twice"


@given(specs(), length_lists(200, 600), devices(), split_options())
def test_every_row_and_visible_key_is_covered_once(
    spec: AttentionSpec, batch: Lengths, device: DeviceModel, options: dict[str, Any]
) -> None:
    check_coverage(build(spec, batch, device, **options))


@given(specs(), length_lists(200, 600), devices(), split_options())
def test_an_item_says_where_its_request_lies(
    spec: AttentionSpec, batch: Lengths, device: DeviceModel, options: dict[str, Any]
) -> None:
    plan = build(spec, batch, device, **options)
    lengths = plan.lengths
    for items in (launch.items for launch in plan.launches):
        r = items["request"]
        np.testing.assert_array_equal(items["qo_begin"], lengths.qo_indptr[r])
        np.testing.assert_array_equal(items["qo_len"], lengths.qo_len[r])
        np.testing.assert_array_equal(items["kv_len"], lengths.kv_len[r])
        np.testing.assert_array_equal(items["page_begin"], lengths.paged_kv_indptr[r])


@given(specs(), length_lists(300, 20_000), devices(), split_options())
def test_tiles_and_splits_are_in_order(
    spec: AttentionSpec, batch: Lengths, device: DeviceModel, options: dict[str, Any]
) -> None:
    """Each request's rows are tiled once, each tile's keys partitioned by its splits."""
    plan = build(spec, batch, device, **options)
    assert len({launch.config for launch in plan.launches}) == len(plan.launches)
    assert len(plan.launches) <= len(tiles.SHAPES)
    tiled: dict[int, list[int]] = defaultdict(list)
    for launch in plan.launches:
        tile_rows = launch.config.cta_tile_q
        for (r, row_begin), items in tiles_of(launch).items():
            tiled[r].append(row_begin)
            qo_len, kv_len = batch[r]
            last_row = min(row_begin + tile_rows, qo_len * spec.gqa_group_size) - 1
            extent = kv_len
            if spec.causal:
                extent = max(kv_len - qo_len + last_row // spec.gqa_group_size + 1, 0)
            assert [item["split"] for item in items] == list(range(len(items)))
            assert {item["num_splits"] for item in items} == {len(items)}
            edges = [0] + [int(item["kv_end"]) for item in items]
            assert [item["kv_begin"] for item in items] == edges[:-1]
            assert edges[-1] == extent
            assert len(items) == 1 or all(item["kv_begin"] < item["kv_end"] for item in items)
    for r, (qo_len, _) in enumerate(batch):
        packed = qo_len * spec.gqa_group_size
        step = max(tile_rows_of(plan, r), 1)
        assert sorted(tiled[r]) == list(range(0, packed, step)), f"request {r}"


def tile_rows_of(plan: Schedule, request: int) -> int:
    """cta_tile_q of the one launch that has items of a request; 0 where it has no rows."""
    found = [
        launch.config.cta_tile_q for launch in plan.launches if request in launch.items["request"]
    ]
    assert len(found) <= 1, f"request {request} is in {len(found)} launches"
    return found[0] if found else 0


@given(specs(), length_lists(300, 20_000), devices(), split_options())
def test_partial_slots_and_merge_counters(
    spec: AttentionSpec, batch: Lengths, device: DeviceModel, options: dict[str, Any]
) -> None:
    """Slots of a tile follow each other, no two tiles share one, and none is wasted."""
    for launch in build(spec, batch, device, **options).launches:
        slots: list[int] = []
        merges: list[int] = []
        for items in tiles_of(launch).values():
            if len(items) == 1:
                continue
            assert len({(item["first_partial"], item["merge"]) for item in items}) == 1
            slots += [int(item["first_partial"] + item["split"]) for item in items]
            merges.append(int(items[0]["merge"]))
        assert sorted(slots) == list(range(launch.num_partials))
        assert sorted(merges) == list(range(launch.num_merges))


@given(specs(), length_lists(300, 20_000), devices(), split_options())
def test_items_are_longest_first_and_the_grid_fits(
    spec: AttentionSpec, batch: Lengths, device: DeviceModel, options: dict[str, Any]
) -> None:
    for launch in build(spec, batch, device, **options).launches:
        keys = launch.items["kv_end"] - launch.items["kv_begin"]
        kv_tiles = -(-keys // launch.config.cta_tile_kv)
        assert (np.diff(kv_tiles) <= 0).all()
        pieces = len(launch.items) * spec.num_kv_heads
        assert launch.grid == min(pieces, launch.config.ctas_per_sm * device.num_sms)


@given(specs(), length_lists(200, 3000), devices())
def test_split_options_are_honoured(
    spec: AttentionSpec, batch: Lengths, device: DeviceModel
) -> None:
    for launch in build(spec, batch, device, disable_split_kv=True).launches:
        assert (launch.items["num_splits"] == 1).all()
        assert launch.num_partials == 0
    for launch in build(spec, batch, device, fixed_split_size=3).launches:
        assert (launch.items["kv_begin"] % (3 * spec.page_size) == 0).all()
        assert (launch.items["kv_end"] - launch.items["kv_begin"] <= 3 * spec.page_size).all()


def shape_of_items(plan: Schedule, request: int) -> list[tuple[Any, ...]]:
    """What the bits of a request depend on: its kernels, tiles and splits."""
    fields = ["row_begin", "kv_begin", "kv_end", "split", "num_splits"]
    return sorted(
        (launch.config.name, *item)
        for launch in plan.launches
        for item in launch.items[launch.items["request"] == request][fields].tolist()
    )


@given(
    specs(),
    length_lists(300, 5000),
    devices(),
    split_options().filter(bool),
    st.integers(0, 11),
)
def test_items_of_a_request_do_not_depend_on_its_batch(
    spec: AttentionSpec, batch: Lengths, device: DeviceModel, options: dict[str, Any], r: int
) -> None:
    assume(batch)
    r %= len(batch)
    together = shape_of_items(build(spec, batch, device, **options), r)
    alone = shape_of_items(build(spec, [batch[r]], device, **options), 0)
    assert together == alone


def unsplit(launch: Launch) -> Launch:
    """The same tiles without splits."""
    firsts = launch.items[launch.items["split"] == 0].copy()
    extents = {
        tile: max(int(item["kv_end"]) for item in items) for tile, items in tiles_of(launch).items()
    }
    for item in firsts:
        item["kv_end"] = extents[int(item["request"]), int(item["row_begin"])]
    firsts["num_splits"] = 1
    order = np.argsort(-firsts["kv_end"], kind="stable")
    return launch._replace(item_fields=firsts[order].view(np.int32).reshape(len(order), -1))


def predicted_finish(launch: Launch, spec: AttentionSpec, device: DeviceModel) -> float:
    costs = explain.piece_costs(launch, spec)
    return float(explain.finish_times(costs, tiles.slots(launch.config, device))[-1])


#: The planner estimates a split's finish by lower bounds, and so may choose one that ends later
#: than no split would: by so much at most.
SPLIT_SLACK = 1.25


@example(
    spec_of(group=3, num_kv_heads=8, page_size=1, causal=False, head_dim=256),
    [(342, 225)],
    DeviceModel(num_sms=39, arch=80),
)
@given(specs(), length_lists(3000, 40_000), devices())
def test_a_chosen_split_is_not_predicted_slower_than_none(
    spec: AttentionSpec, batch: Lengths, device: DeviceModel
) -> None:
    for launch in build(spec, batch, device).launches:
        if launch.num_merges:
            split = predicted_finish(launch, spec, device)
            none = predicted_finish(unsplit(launch), spec, device)
            in_one_wave = launch.grid == len(launch.items) * spec.num_kv_heads
            assert split <= none * (1 if in_one_wave else SPLIT_SLACK)


@pytest.mark.parametrize("kv_len", [4096, 131_072])
def test_a_lone_long_request_fills_the_device(kv_len: int) -> None:
    """One decoding request of 8 KV heads: without splits, 8 of 132 SMs would work."""
    spec = spec_of(group=4, num_kv_heads=8)
    (launch,) = build(spec, [(1, kv_len)]).launches
    assert launch.num_merges == 1
    unsplit_finish = predicted_finish(unsplit(launch), spec, HOST_MODEL)
    assert predicted_finish(launch, spec, HOST_MODEL) < unsplit_finish / 2


def test_a_part_filled_last_wave_is_filled_up() -> None:
    """94 tiles for 16 heads are 11.4 waves of 132: the last one's are cut, and no others."""
    spec = spec_of(group=1, num_kv_heads=16, causal=False)
    plan = build(spec, [(94 * 192, 12_000)])
    (launch,) = plan.launches
    check_coverage(plan)
    assert len(launch.items) == 94 + launch.num_merges
    assert launch.num_merges == 94 - 11 * 132 // 16
    saved = predicted_finish(unsplit(launch), spec, HOST_MODEL) - predicted_finish(
        launch, spec, HOST_MODEL
    )
    assert saved > 0.03 * predicted_finish(unsplit(launch), spec, HOST_MODEL)
    # Whole waves, and items whose shorter ones fill the last one up, stay as they are.
    whole = build(spec, [(132 * 192, 12_000)])
    causal = build(replace(spec, causal=True), [(94 * 192, 94 * 192)])
    assert [launch.num_merges for launch in (*whole.launches, *causal.launches)] == [0, 0]


@pytest.mark.parametrize("decodes", [0, 16, 63])
def test_a_prefill_among_decodes_fills_its_last_wave_up(decodes: int) -> None:
    """43 tiles for 8 heads are 2.6 waves of 132; decodes alone would leave the rest idle."""
    spec = spec_of(group=4, num_kv_heads=8)
    plan = build(spec, [(1, 4096)] * decodes + [(2048, 32_768)])
    (launch,) = plan.launches
    check_coverage(plan)
    assert launch.num_merges == 43 - 2 * 132 // 8
    assert set(launch.items["request"][launch.items["num_splits"] > 1]) == {decodes}
    finish = predicted_finish(launch, spec, HOST_MODEL)
    assert finish < 0.93 * predicted_finish(unsplit(launch), spec, HOST_MODEL)


@pytest.mark.parametrize(
    "options",
    [{}, {"disable_split_kv": True}, {"fixed_split_size": 1}, {"fixed_split_size": 3}],
)
@pytest.mark.parametrize("kv_len", [2**30, 2**30 - 2**20 + 1, 5])
def test_the_largest_lengths_do_not_overflow(options: dict[str, Any], kv_len: int) -> None:
    """Items and requests are int32; a request has at most 2^30 keys."""
    spec = spec_of(page_size=2**20, causal=True)
    plan = build(spec, [(1, kv_len), (300, kv_len)], **options)
    for launch in plan.launches:
        for (r, row_begin), items in tiles_of(launch).items():
            qo_len = (1, 300)[r]
            last_row = min(row_begin + launch.config.cta_tile_q, qo_len) - 1
            edges = [0] + [int(item["kv_end"]) for item in items]
            assert [item["kv_begin"] for item in items] == edges[:-1]
            assert edges == sorted(edges)
            assert edges[-1] == max(kv_len - qo_len + last_row + 1, 0)


def test_the_most_rows_do_not_overflow() -> None:
    spec = spec_of(group=64)
    (launch,) = build(spec, [(2**24, 5)], disable_split_kv=True).launches
    rows = np.sort(launch.items["row_begin"])
    np.testing.assert_array_equal(rows, np.arange(0, 2**30, launch.config.cta_tile_q))


def divide(n: np.ndarray, divisor: int) -> np.ndarray:
    """What `divide` of params.cuh computes, with uint32 operands and results."""
    multiplier, shift = device_plan.magic(divisor)
    assert 0 <= multiplier < 2**32
    assert 0 <= shift < 32
    if multiplier == 0:
        return n
    return (n * np.uint64(multiplier) >> np.uint64(32)) >> np.uint64(shift)


def dividends(divisor: int, rng: np.random.Generator) -> np.ndarray:
    """Below 2^31: around multiples of the divisor, small, largest and random ones."""
    most = 2**31 // divisor
    quotients = np.concatenate(
        [np.arange(min(most, 50)), most - np.arange(min(most, 50)), rng.integers(0, most + 1, 100)]
    )
    around = (quotients[:, None] * divisor + np.array([-1, 0, 1])).ravel()
    return np.concatenate([around.clip(0, 2**31 - 1), [0, 2**31 - 1]]).astype(np.uint64)


def test_magic_divides_exactly_by_small_divisors(rng: np.random.Generator) -> None:
    for divisor in range(1, 2001):
        n = dividends(divisor, rng)
        np.testing.assert_array_equal(divide(n, divisor), n // divisor, f"divisor {divisor}")


@given(
    st.one_of(
        st.integers(1, 2**31 - 1),
        st.builds(
            lambda bits, off: min(max(2**bits + off, 1), 2**31 - 1),
            st.integers(0, 31),
            st.integers(-2, 2),
        ),
    ),
    st.integers(0, 2**32 - 1),
)
def test_magic_divides_exactly(divisor: int, seed: int) -> None:
    n = dividends(divisor, np.random.default_rng(seed))
    np.testing.assert_array_equal(divide(n, divisor), n // divisor)


def test_a_small_batch_of_few_keys_takes_the_brief_shape() -> None:
    """A key or a thread block too many, or a caller who asks for fixed bits, and it does not."""
    device = DeviceModel(num_sms=12, arch=90)
    spec = spec_of(num_kv_heads=2)

    def cta_tile_q(batch: Lengths, **options: Any) -> int:
        (launch,) = build(spec, batch, device, **options).launches
        return launch.config.cta_tile_q

    few = [(40, 256), (100, 3), (127, 200), (33, 0)]
    assert cta_tile_q(few) == 128
    assert cta_tile_q([*few[:3], (33, 257)]) == 192
    assert cta_tile_q([*few, (33, 1)]) == 192
    assert cta_tile_q(few, disable_split_kv=True) == 192
    assert cta_tile_q(few, fixed_split_size=100) == 192
