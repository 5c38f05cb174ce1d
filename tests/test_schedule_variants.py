"""The planner under a window and a mask: all that is visible is worked on, what is hidden isn't."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import pytest
import test_schedule
from hypothesis import assume, given
from hypothesis import strategies as st
from test_schedule import Lengths, build, lengths_of, shape_of_items, spec_of, tiles_of

from cupaged import frames, schedule, tiles
from cupaged.extents import CustomMask
from cupaged.schedule import Schedule
from cupaged.spec import HOST_MODEL, AttentionSpec, DeviceModel

Array = np.ndarray
Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A batch with what its rows see: bool [qo_len, kv_len] a request, None without a mask."""

    spec: AttentionSpec
    device: DeviceModel
    batch: Lengths
    bits: list[Array] | None

    @property
    def mask(self) -> CustomMask | None:
        return None if self.bits is None else packed(self.bits)

    def build(self, **options: Any) -> Schedule:
        return build(self.spec, self.batch, self.device, mask=self.mask, **options)

    def visible(self, r: int) -> Array:
        """Bool [qo_len, kv_len]."""
        qo_len, kv_len = self.batch[r]
        seen = oracle.visible(qo_len, kv_len, self.spec.causal)
        if self.spec.window_left >= 0:
            row, key = np.arange(qo_len)[:, None], np.arange(kv_len)
            seen = seen & (key >= kv_len - qo_len + row - self.spec.window_left)
        return seen if self.bits is None else seen & self.bits[r]

    def alone(self, r: int) -> Case:
        bits = None if self.bits is None else [self.bits[r]]
        return replace(self, batch=[self.batch[r]], bits=bits)


def packed(bits: list[Array]) -> CustomMask:
    """Each request from a byte on; what is left of its last byte is all ones."""
    parts = []
    for each in bits:
        flat = each.reshape(-1)
        filled = np.concatenate([flat, np.ones(-len(flat) % 8, np.bool_)])
        parts.append(np.packbits(filled, bitorder="little"))
    indptr = np.cumsum([0, *(len(part) for part in parts)])
    return CustomMask(np.concatenate([np.empty(0, np.uint8), *parts]), indptr.astype(np.int32))


@st.composite
def masks(draw: st.DrawFn, batch: Lengths) -> list[Array]:
    """Blocks of rows and keys that are visible, all or in part, and holes between them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, keys = draw(st.sampled_from([1, 5, 32, 100])), draw(st.sampled_from([1, 32, 50, 128]))
    share = draw(st.sampled_from([0.0, 0.02, 0.3, 0.7, 1.0]))
    density = draw(st.sampled_from([0.01, 0.5, 1.0]))
    found = []
    for qo_len, kv_len in batch:
        blocks = rng.random((qo_len // rows + 1, kv_len // keys + 1)) < share
        seen = blocks.repeat(rows, axis=0).repeat(keys, axis=1)[:qo_len, :kv_len]
        found.append(seen & (rng.random((qo_len, kv_len)) < density))
    return found


@st.composite
def cases(draw: st.DrawFn, max_qo: int = 200, max_kv: int = 600) -> Case:
    """Windows, masks, or both."""
    spec = draw(test_schedule.specs())
    batch = draw(test_schedule.length_lists(max_qo, max_kv))
    window = st.one_of(st.sampled_from([0, 1, 31, 32, 127, 128]), st.integers(0, max_kv))
    masked = draw(st.booleans())
    window_left = draw(st.one_of(st.just(-1), window) if masked else window)
    return Case(
        spec=replace(spec, window_left=window_left, custom_mask=masked),
        device=draw(test_schedule.devices()),
        batch=batch,
        bits=draw(masks(batch)) if masked else None,
    )


def check(case: Case, plan: Schedule) -> None:
    """Every (packed row, visible key) is covered once, and hidden ones once at most."""
    group = case.spec.gqa_group_size
    counts = [np.zeros((qo_len * group, kv_len), np.int8) for qo_len, kv_len in case.batch]
    for launch in plan.launches:
        for item in launch.items:
            begin, end = int(item["kv_begin"]), int(item["kv_end"])
            count = counts[item["request"]]
            assert 0 <= begin <= end <= count.shape[1]
            count[rows_of(item, launch.config.cta_tile_q), begin:end] += 1
    for r, count in enumerate(counts):
        seen = case.visible(r).repeat(group, axis=0)
        assert (count[seen] == 1).all(), f"request {r}: a visible key is not covered once"
        assert (count[~seen] <= 1).all(), f"request {r}: a hidden key is covered twice"


def rows_of(item: np.void, cta_tile_q: int) -> slice:
    return slice(int(item["row_begin"]), int(item["row_begin"]) + cta_tile_q)


def hidden_tiles(case: Case, plan: Schedule) -> list[tuple[int, int, int]]:
    """KV tiles that an item loads and none of its rows sees: request, row_begin, first key."""
    group, found = case.spec.gqa_group_size, []
    seen = [case.visible(r).repeat(group, axis=0) for r in range(len(case.batch))]
    for launch in plan.launches:
        step = launch.config.cta_tile_kv
        for item in launch.items:
            rows = seen[item["request"]][rows_of(item, launch.config.cta_tile_q)]
            for begin in range(item["kv_begin"], item["kv_end"], step):
                if not rows[:, begin : min(begin + step, item["kv_end"])].any():
                    found.append((int(item["request"]), int(item["row_begin"]), begin))
    return found


@given(cases(), test_schedule.split_options())
def test_every_row_and_visible_key_is_covered_once(case: Case, options: Options) -> None:
    check(case, case.build(**options))


@given(cases(), test_schedule.split_options())
def test_no_tile_is_loaded_that_is_hidden_whole(case: Case, options: Options) -> None:
    assert hidden_tiles(case, case.build(**options)) == []


@given(cases(), test_schedule.split_options())
def test_items_of_a_query_tile_are_in_order(case: Case, options: Options) -> None:
    """Splits by their keys, in slots of their own that follow each other; one where none sees."""
    plan = case.build(**options)
    group = case.spec.gqa_group_size
    tiled: dict[int, list[int]] = {r: [] for r in range(len(case.batch))}
    for launch in plan.launches:
        slots: list[int] = []
        merges: list[int] = []
        for (r, row_begin), items in tiles_of(launch).items():
            tiled[r].append(row_begin)
            assert [item["split"] for item in items] == list(range(len(items)))
            assert {item["num_splits"] for item in items} == {len(items)}
            edges = [int(item[field]) for item in items for field in ("kv_begin", "kv_end")]
            assert edges == sorted(edges)
            seen = case.visible(r).repeat(group, axis=0)
            if not seen[rows_of(items[0], launch.config.cta_tile_q)].any():
                assert len(items) == 1
                assert edges[0] == edges[1]
            if len(items) > 1:
                assert all(item["kv_begin"] < item["kv_end"] for item in items)
                assert len({(item["first_partial"], item["merge"]) for item in items}) == 1
                slots += [int(item["first_partial"] + item["split"]) for item in items]
                merges.append(int(items[0]["merge"]))
        assert sorted(slots) == list(range(launch.num_partials))
        assert sorted(merges) == list(range(launch.num_merges))
        keys = launch.items["kv_end"] - launch.items["kv_begin"]
        assert (np.diff(-(-keys // launch.config.cta_tile_kv)) <= 0).all()
        pieces = len(launch.items) * case.spec.num_kv_heads
        assert launch.grid == min(pieces, tiles.slots(launch.config, case.device))
    for r, (qo_len, _) in enumerate(case.batch):
        step = max(test_schedule.tile_rows_of(plan, r), 1)
        assert sorted(tiled[r]) == list(range(0, qo_len * group, step)), f"request {r}"


@given(cases(), test_schedule.split_options())
def test_kv_tiles_begin_where_pages_allow(case: Case, options: Options) -> None:
    """At multiples of cta_tile_kv, from the begin of the split where the caller fixed those."""
    plan = case.build(**options)
    for launch in plan.launches:
        begin, end = launch.items["kv_begin"], launch.items["kv_end"]
        if "fixed_split_size" in options:
            split_size = options["fixed_split_size"] * case.spec.page_size
            assert (begin // split_size == np.maximum(end - 1, begin) // split_size).all()
            begin = begin % split_size
        assert (begin % launch.config.cta_tile_kv == 0).all()


@given(cases(max_kv=2000), test_schedule.split_options().filter(bool), st.integers(0, 11))
def test_items_of_a_request_do_not_depend_on_its_batch(
    case: Case, options: Options, r: int
) -> None:
    assume(case.batch)
    r %= len(case.batch)
    together = shape_of_items(case.build(**options), r)
    assert together == shape_of_items(case.alone(r).build(**options), 0)


@given(
    test_schedule.specs(),
    test_schedule.length_lists(200, 600),
    st.integers(1, 200),
    test_schedule.split_options(),
    st.booleans(),
)
def test_what_hides_nothing_changes_nothing(
    spec: AttentionSpec, batch: Lengths, num_sms: int, options: Options, masked: bool
) -> None:
    """A mask of ones, or a window of all keys, on a device whose tiles are the same for both."""
    device = DeviceModel(num_sms, 80)
    plain = build(spec, batch, device, **options)
    bits = [np.ones(lengths, np.bool_) for lengths in batch] if masked else None
    if masked:
        # No row sees a key: of all that is hidden from the first rows, nothing is left.
        assume(not spec.causal or all(qo_len <= kv_len for qo_len, kv_len in batch))
    widest = replace(spec, window_left=-1 if masked else 2**30, custom_mask=masked)
    # What a mask takes more registers for may leave an SM fewer thread blocks.
    for shape in tiles.SHAPES:
        configs = [tiles.kernel_config(80, each.needs, shape) for each in (spec, widest)]
        assume(configs[0].ctas_per_sm == configs[1].ctas_per_sm)
    wide = Case(widest, device, batch, bits).build(**options)

    def items(plan: Schedule, r: int) -> list[tuple[Any, ...]]:
        return [item[1:] for item in shape_of_items(plan, r)]  # kernels differ

    for r in range(len(batch)):
        assert items(wide, r) == items(plain, r)
    for one, other in zip(wide.launches, plain.launches, strict=True):
        assert (one.num_partials, one.num_merges) == (other.num_partials, other.num_merges)


# Under a CUDA graph


@given(cases(), test_schedule.split_options())
def test_what_a_frame_was_made_for_fits(case: Case, options: Options) -> None:
    """A mask's holes are worked on, what lies before the first and behind the last key is not."""
    spec = case.spec
    fixed = options.get("fixed_split_size")
    splits = (fixed, options.get("disable_split_kv", False))
    pages = sum(-(-kv_len // spec.page_size) for _, kv_len in case.batch)
    bounds = (max(len(case.batch), 1), sum(qo_len for qo_len, _ in case.batch), max(pages, 1))
    frame = frames.make_frame(spec, case.device, *bounds, None, splits, None)
    plan = case.build(**options, frame=frame)
    check(case, plan)
    hidden = hidden_tiles(case, plan)
    for launch in plan.launches:
        (room,) = (room for room in frame.values() if room.config == launch.config)
        assert np.count_nonzero(launch.items["split"] == 0) <= room.tiles
        if fixed is None:
            assert launch.num_partials <= room.partials
            assert len(launch.items) <= room.items
        for (r, row_begin), items in tiles_of(launch).items():
            edges = [int(item[field]) for item in items for field in ("kv_begin", "kv_end")]
            if fixed is None:
                assert edges[1:-1:2] == edges[2::2]
            last = items[-1]
            count = max(-(-(last["kv_end"] - last["kv_begin"]) // launch.config.cta_tile_kv), 1)
            end_tile = int(last["kv_begin"]) + (count - 1) * launch.config.cta_tile_kv
            assert (r, row_begin, edges[0]) not in hidden
            assert (r, row_begin, end_tile) not in hidden
    if case.bits is None:
        assert hidden == []


def test_splits_that_do_not_fit_a_frame_are_not_made() -> None:
    """All partial states, or none: a byte less, and the window stays whole."""
    spec = replace(spec_of(group=4, num_kv_heads=8), window_left=65_000)
    batch = [(1, 131_072)]
    window = Case(spec, HOST_MODEL, batch, None)
    (free,) = window.build().launches
    assert free.num_merges == 1
    for short, splits in ((0, free.num_partials), (1, 0)):
        size = free.partial_bytes(spec) - short
        frame = frames.make_frame(spec, HOST_MODEL, 1, 1, 8192, 1, (None, False), size)
        (launch,) = window.build(frame=frame).launches
        assert (launch.num_partials, launch.num_merges) == (splits, int(splits > 0))
        check(window, window.build(frame=frame))


# What the plans are


def test_a_mask_of_two_holes_makes_three_splits() -> None:
    """Of eight KV tiles those by the numbers 0, 2, 3 and 7, the last one in part."""
    spec = replace(spec_of(), custom_mask=True)
    cta_tile_kv = tiles.kernel_config(80, spec.needs, "long").cta_tile_kv
    bits = np.zeros((100, 8 * cta_tile_kv - 5), np.bool_)
    for tile in (0, 2, 3, 7):
        bits[tile * 9, tile * cta_tile_kv + 11] = True
    case = Case(spec, DeviceModel(100, 80), [bits.shape], [bits])
    for options in ({}, {"disable_split_kv": True}):
        plan = case.build(**options)
        (launch,) = plan.launches
        (items,) = tiles_of(launch).values()
        begins = [int(item["kv_begin"]) // cta_tile_kv for item in items]
        assert begins == [0, 2, 7]
        assert [int(item["kv_end"]) for item in items] == [
            *(cta_tile_kv, 4 * cta_tile_kv, bits.shape[1])
        ]
        assert (launch.num_partials, launch.num_merges) == (3, 1)
        assert plan.workspace_bytes == 3 * launch.config.cta_tile_q * (128 + 1) * 4


def test_a_run_is_cut_further_where_that_pays() -> None:
    """A decoding row of two long runs, on a device that would stand idle."""
    spec = replace(spec_of(group=4, num_kv_heads=8), custom_mask=True)
    bits = np.ones((1, 60_000), np.bool_)
    bits[0, 20_000:30_000] = False
    case = Case(spec, HOST_MODEL, [bits.shape], [bits])
    plan = case.build()
    check(case, plan)
    (launch,) = plan.launches
    assert len(launch.items) > 10
    assert launch.num_merges == 1
    keys = int((launch.items["kv_end"] - launch.items["kv_begin"]).sum())
    assert 50_000 <= keys <= 50_000 + 2 * launch.config.cta_tile_kv


def test_splits_and_order_are_of_the_windows_keys() -> None:
    """A window of a few tiles is not split, however many keys lie before it."""
    spec = replace(spec_of(group=4, num_kv_heads=8), window_left=255)
    long, short = (1, 500_000), (1, 100)
    window = Case(spec, HOST_MODEL, [short, long], None)
    (launch,) = window.build().launches
    assert launch.num_merges == 0
    assert launch.items["request"].tolist() == [1, 0]
    assert launch.items["kv_end"].tolist() == [500_000, 100]
    assert 500_000 - 256 - launch.config.cta_tile_kv < launch.items["kv_begin"][0] <= 500_000 - 256
    # And one of many keys is, as evenly as if they were all that there is.
    wide = replace(spec, window_left=131_071)
    (launch,) = Case(wide, HOST_MODEL, [long], None).build().launches
    (whole,) = build(replace(wide, window_left=-1), [(1, 131_072)]).launches
    assert abs(launch.num_partials - whole.num_partials) <= 1


def test_a_part_filled_last_wave_is_filled_up() -> None:
    """94 tiles of equal windows for 16 heads, 11.4 waves of 132: the last one's are cut alone."""
    spec = replace(spec_of(num_kv_heads=16, causal=True), window_left=12_000)
    (launch,) = build(spec, [(94 * 192, 94 * 192 + 12_000)]).launches
    assert launch.num_merges == 94 - 11 * 132 // 16
    assert launch.num_partials == 2 * launch.num_merges
    assert len(launch.items) == 94 + launch.num_merges


@pytest.mark.parametrize(
    "options",
    [{}, {"disable_split_kv": True}, {"fixed_split_size": 1}, {"fixed_split_size": 3}],
)
@pytest.mark.parametrize("window_left", [0, 2**20, 2**30 - 1, 2**30])
@pytest.mark.parametrize("kv_len", [2**30, 2**30 - 2**20 + 1, 5])
def test_the_largest_lengths_do_not_overflow(
    options: Options, window_left: int, kv_len: int
) -> None:
    """Items are int32; a request has at most 2^30 keys, and a window as many."""
    spec = replace(spec_of(page_size=2**20, causal=True), window_left=window_left)
    plan = build(spec, [(1, kv_len), (300, kv_len)], **options)
    for launch in plan.launches:
        for (r, row_begin), items in tiles_of(launch).items():
            qo_len = (1, 300)[r]
            last_row = min(row_begin + launch.config.cta_tile_q, qo_len) - 1
            begins = [int(item["kv_begin"]) for item in items]
            ends = [int(item["kv_end"]) for item in items]
            first_key = max(kv_len - qo_len + row_begin - window_left, 0)
            assert begins[0] <= first_key < begins[0] + launch.config.cta_tile_kv
            assert begins[1:] == ends[:-1]
            assert ends[-1] == max(kv_len - qo_len + last_row + 1, 0)


def test_a_long_mask_is_read_in_blocks(rng: np.random.Generator) -> None:
    """Some 40 million bits, whose rows begin within bytes; one in a hundred thousand is set."""
    qo_len, kv_len = 321, 130_003
    bits = np.zeros((qo_len, kv_len), np.bool_)
    bits[rng.integers(0, qo_len, 400), rng.integers(0, kv_len, 400)] = True
    spec = replace(spec_of(group=3, causal=True), custom_mask=True, window_left=100_000)
    case = Case(spec, DeviceModel(20, 80), [(qo_len, kv_len)], [bits])
    plan = case.build()
    check(case, plan)
    assert hidden_tiles(case, plan) == []
    assert plan.launches[0].num_merges > 0


def test_a_plan_for_another_device_has_the_same_mask() -> None:
    bits = [np.eye(200, dtype=np.bool_), np.zeros((3, 100), np.bool_)]
    case = Case(replace(spec_of(), custom_mask=True), HOST_MODEL, [(200, 200), (3, 100)], bits)
    plan = case.build(fixed_split_size=4)
    assert build(spec_of(), case.batch).mask is None
    other = DeviceModel(10, 80)
    again = schedule.rebuild(plan, other)
    assert again.mask is plan.mask
    assert again.device == other
    assert hidden_tiles(case, again) == []
    check(case, again)
    lengths = lengths_of(case.spec, case.batch)
    np.testing.assert_array_equal(again.lengths.kv_len, lengths.kv_len)
