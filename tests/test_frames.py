"""Plans under CUDA graphs: whatever a frame was made for fits it, and is still all of the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import strategies
import test_schedule
from hypothesis import given
from hypothesis import strategies as st
from test_schedule import Lengths, lengths_of, spec_of

from cupaged import frames, schedule, shape_choice, tiles
from cupaged.frames import Frame
from cupaged.schedule import Launch, Schedule
from cupaged.spec import HOST_MODEL, AttentionSpec, DeviceModel


@dataclass(frozen=True)
class Case:
    """A frame, and a batch within the bounds it was made for."""

    spec: AttentionSpec
    device: DeviceModel
    batch: Lengths
    equal_rows: int | None
    splits: tuple[int | None, bool]
    workspace_bytes: int | None
    frame: Frame

    def build(self, frame: Frame | None) -> Schedule:
        lengths = lengths_of(self.spec, self.batch)
        return schedule.build(self.spec, lengths, self.device, *self.splits, frame)

    def rooms(self, plan: Schedule) -> list[tuple[Launch, frames.Room]]:
        """Each launch beside its room; there is one of its kernel."""
        found = []
        for launch in plan.launches:
            (room,) = (room for room in self.frame.values() if room.config == launch.config)
            found.append((launch, room))
        return found


def pages_of(spec: AttentionSpec, batch: Lengths) -> int:
    return sum(-(-kv_len // spec.page_size) for _, kv_len in batch)


@st.composite
def cases(draw: st.DrawFn, max_qo: int, max_kv: int) -> Case:
    """Of decoding, where all requests have as many rows, and of prefill; bounds with some slack."""
    spec = draw(test_schedule.specs())
    device = draw(test_schedule.devices())
    equal_rows = draw(st.one_of(st.none(), st.integers(1, 12)))
    batch = draw(test_schedule.length_lists(max_qo, max_kv))
    if equal_rows is not None:
        batch = [(equal_rows, kv_len) for _, kv_len in batch]
    fixed = draw(st.one_of(st.none(), st.integers(1, 40)))
    splits = (fixed, fixed is None and draw(st.booleans()))
    workspace_bytes = draw(st.one_of(st.none(), st.integers(0, 1 << 16), st.integers(0, 1 << 26)))
    slack = st.integers(0, 5)
    frame = frames.make_frame(
        spec,
        device,
        max(len(batch) + draw(slack), 1),
        sum(qo_len for qo_len, _ in batch) + draw(slack),
        max(pages_of(spec, batch) + draw(slack), 1),
        equal_rows,
        splits,
        workspace_bytes,
    )
    return Case(spec, device, batch, equal_rows, splits, workspace_bytes, frame)


@given(cases(200, 600))
def test_every_row_and_visible_key_is_covered_once(case: Case) -> None:
    test_schedule.check_coverage(case.build(case.frame))


@given(cases(300, 20_000))
def test_what_a_frame_was_made_for_fits(case: Case) -> None:
    """Splits that the caller fixed may need more partial states than a workspace has, no less."""
    for launch, room in case.rooms(case.build(case.frame)):
        assert np.count_nonzero(launch.items["split"] == 0) <= room.tiles
        assert launch.grid <= tiles.slots(room.config, case.device)
        bounded = case.splits[0] is None
        if case.equal_rows is not None and case.workspace_bytes is None:
            most = frames._PARTIAL_BYTES // frames.bytes_of_a_partial(case.spec, room.config)
            bounded = room.partials < most
        if bounded or launch.num_partials <= room.partials:
            assert launch.num_partials <= room.partials
            assert launch.num_merges <= room.merges
            assert len(launch.items) <= room.items


@given(cases(300, 20_000))
def test_partial_states_stay_within_the_workspace(case: Case) -> None:
    for room in case.frame.values():
        assert room.partials >= 0
        assert room.partial_bytes(case.spec) == room.partials * frames.bytes_of_a_partial(
            case.spec, room.config
        )
        if case.workspace_bytes is not None:
            assert room.partial_bytes(case.spec) <= case.workspace_bytes
        if case.splits[1]:
            assert room.partials == 0
    for launch, room in case.rooms(case.build(case.frame)):
        size = frames.bytes_of_a_partial(case.spec, room.config)
        assert launch.partial_bytes(case.spec) == launch.num_partials * size


@given(cases(300, 5_000))
def test_slots_items_and_splits_are_in_order(case: Case) -> None:
    """As without a frame: each tile's slots follow each other, the longest item comes first."""
    for launch in case.build(case.frame).launches:
        slots: list[int] = []
        merges: list[int] = []
        for items in test_schedule.tiles_of(launch).values():
            assert [item["split"] for item in items] == list(range(len(items)))
            assert {item["num_splits"] for item in items} == {len(items)}
            if len(items) > 1:
                slots += [int(item["first_partial"] + item["split"]) for item in items]
                merges.append(int(items[0]["merge"]))
        assert sorted(slots) == list(range(launch.num_partials))
        assert sorted(merges) == list(range(launch.num_merges))
        keys = launch.items["kv_end"] - launch.items["kv_begin"]
        assert (np.diff(-(-keys // launch.config.cta_tile_kv)) <= 0).all()


@given(cases(300, 5_000).filter(lambda case: case.splits != (None, False)))
def test_where_bits_do_not_depend_on_the_batch_they_do_not_on_the_frame(case: Case) -> None:
    framed, free = (
        {launch.config: np.sort(launch.items) for launch in case.build(frame).launches}
        for frame in (case.frame, None)
    )
    assert framed.keys() == free.keys()
    for config, items in framed.items():
        np.testing.assert_array_equal(items, free[config])


@given(cases(300, 5_000))
def test_a_frame_has_the_same_launches_for_every_batch(case: Case) -> None:
    """What is recorded: kernels, in their order. A batch uses some or all of them."""
    configs = [room.config for room in case.frame.values()]
    used = [launch.config for launch in case.build(case.frame).launches]
    assert used == [config for config in configs if config in used]
    for shape, room in case.frame.items():
        assert room.config == tiles.kernel_config(case.device.arch, case.spec.needs, shape)


# Which launches


@pytest.mark.parametrize(
    ("equal_rows", "group", "shape"),
    [(1, 1, "short"), (1, 32, "short"), (1, 33, "long"), (8, 4, "short"), (9, 4, "long")],
)
@pytest.mark.parametrize("splits", [(None, False), (4, False), (None, True)])
def test_equal_rows_take_one_shape(
    splits: tuple[int | None, bool], equal_rows: int, group: int, shape: str
) -> None:
    assert shape_choice.SHORT_MAX_ROWS == 32
    frame = frames.make_frame(
        spec_of(group=group), HOST_MODEL, 4, 4 * equal_rows, 99, equal_rows, splits, None
    )
    assert list(frame) == [shape]


def test_other_rows_take_one_shape_unless_each_request_chooses() -> None:
    spec = spec_of(group=4)

    def shapes(*splits: Any) -> list[str]:
        return list(frames.make_frame(spec, HOST_MODEL, 4, 100, 99, None, splits, None))

    assert shapes(None, False) == ["long"]
    assert shapes(4, False) == ["long", "short"]
    assert shapes(None, True) == ["long", "short"]


# Where partial states do not fit


def decoding(
    kv_len: list[int], workspace_bytes: int | None, splits: tuple[int | None, bool] = (None, False)
) -> tuple[Frame, Launch]:
    """The frame and the launch of requests of a row each."""
    spec = spec_of(group=4, num_kv_heads=8)
    batch = [(1, n) for n in kv_len]
    frame = frames.make_frame(
        spec, HOST_MODEL, len(batch), len(batch), pages_of(spec, batch), 1, splits, workspace_bytes
    )
    (launch,) = schedule.build(spec, lengths_of(spec, batch), HOST_MODEL, *splits, frame).launches
    return frame, launch


def test_splits_that_do_not_fit_a_workspace_are_not_made() -> None:
    """All partial states, or none: a byte less, and the request stays whole."""
    _, launch = decoding([131_072], None)
    assert launch.num_merges == 1
    needed = launch.partial_bytes(spec_of(group=4, num_kv_heads=8))
    _, exact = decoding([131_072], needed)
    np.testing.assert_array_equal(exact.items, launch.items)
    for workspace_bytes in (needed - 1, 0):
        frame, whole = decoding([131_072], workspace_bytes)
        assert frame["short"].partials < launch.num_partials
        assert (whole.num_partials, whole.num_merges, len(whole.items)) == (0, 0, 1)
        assert whole.items["kv_end"].tolist() == [131_072]


@given(
    st.lists(strategies.lengths(40_000), min_size=1, max_size=12),
    st.integers(0, 1 << 22),
)
def test_whole_requests_serve_where_a_workspace_is_tiny(
    kv_len: list[int], workspace_bytes: int
) -> None:
    """With a workspace that many plans don't fit: all of a batch's keys, split or whole."""
    frame, launch = decoding(kv_len, workspace_bytes)
    assert launch.num_partials <= frame["short"].partials
    for (r, _), items in test_schedule.tiles_of(launch).items():
        edges = [0] + [int(item["kv_end"]) for item in items]
        assert [item["kv_begin"] for item in items] == edges[:-1]
        assert edges[-1] == kv_len[r]


def test_fixed_splits_of_any_lengths_have_room() -> None:
    """As many as pages go into splits, however requests share the pages."""
    splits = (3, False)
    for kv_len in ([16 * 1000], [16 * 4] * 250, [16] * 1000, [16 * 3 + 1] * 250):
        frame, launch = decoding(kv_len, None, splits)
        assert launch.num_partials <= frame["short"].partials
        assert frame["short"].partials <= len(kv_len) + 1000 // 3


def test_as_many_tiles_can_be_split_as_there_is_room_for_two_splits_each() -> None:
    """Twenty requests of two splits, and a workspace of forty partial states."""
    size = 8 * 16 * (128 + 1) * 4
    frame, launch = decoding([16 * 6] * 20, 40 * size, (3, False))
    room = frame["short"]
    assert (launch.num_partials, launch.num_merges, len(launch.items)) == (40, 20, 40)
    assert (room.partials, room.merges, room.items) == (40, 20, 60)
