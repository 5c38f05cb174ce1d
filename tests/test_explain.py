"""A plan as text and as a picture: that both say what the plan is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cupaged
from cupaged import examples, heuristics, schedule
from cupaged import explain as explain_room
from cupaged.explain import explain, finish_times, piece_costs
from cupaged.extents import CustomMask
from cupaged.spec import HOST_MODEL, AttentionSpec, DeviceModel


def build(
    qo_len: list[int],
    kv_len: list[int],
    *,
    heads: tuple[int, int] = (8, 2),
    page_size: int = 16,
    causal: bool = True,
    device: DeviceModel = HOST_MODEL,
    head_dim: int = 128,
    variant: dict[str, Any] | None = None,
    **options: Any,
) -> schedule.Schedule:
    qo, kv = np.array(qo_len, np.int32), np.array(kv_len, np.int32)
    spec = AttentionSpec(
        *heads, head_dim, page_size, causal, 0.1, "float16", "NHD", **(variant or {})
    )
    lengths = schedule.Lengths(
        np.concatenate([[0], qo.cumsum()]).astype(np.int32),
        np.concatenate([[0], (-(-kv // page_size)).cumsum()]).astype(np.int32),
        qo,
        kv,
    )
    return schedule.build(spec, lengths, device, **options)


def walk(costs: list[int], grid: int) -> list[int]:
    """The grid clock tick by clock tick: who has nothing left to do takes the next piece."""
    left, finish = [0] * grid, [0] * grid
    queue = list(costs)
    now = 0
    while queue or any(left):
        for block in range(grid):
            if left[block] == 0 and queue:
                left[block] = queue.pop(0)
        now += 1
        for block in range(grid):
            if left[block]:
                left[block] -= 1
                finish[block] = now
    return sorted(finish)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 9))
def test_finish_times_are_those_of_a_walk(costs: list[int], grid: int) -> None:
    times = finish_times(np.array(costs, np.float64), grid)
    assert times.tolist() == walk(costs, grid)
    assert times.sum() == sum(costs)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 9))
def test_evenly_shared_pieces_change_little(costs: list[int], grid: int) -> None:
    costs.sort(reverse=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain_room, "MAX_SIMULATED", 20)
        times = finish_times(np.array(costs, np.float64), grid)
    assert times.sum() == pytest.approx(sum(costs))
    assert abs(times[-1] - walk(costs, grid)[-1]) <= costs[0]
    if len(costs) <= max(20, grid):
        assert times.tolist() == walk(costs, grid)


SCHEDULES = {
    "short and long": ([1, 700, 1, 0], [90000, 3000, 9, 5], {}),
    "one wave": ([40, 100, 7], [100, 128, 65], {"heads": (2, 2)}),
    "fixed splits": ([1, 40], [1000, 700], {"fixed_split_size": 3}),
    "no splits": ([1, 40], [9000, 700], {"disable_split_kv": True}),
    "full": ([300], [20000], {"causal": False, "heads": (3, 1)}),
    "rows without keys": ([50, 40], [20, 0], {}),
    "window": ([300, 1], [900, 5000], {"variant": {"window_left": 200}}),
    "full window": (
        *([700], [500]),
        {"variant": {"window_left": 3}, "causal": False, "fixed_split_size": 5},
    ),
}


@pytest.fixture(params=SCHEDULES, ids=lambda name: name.replace(" ", "-"))
def planned(request: pytest.FixtureRequest) -> schedule.Schedule:
    qo_len, kv_len, options = SCHEDULES[request.param]
    return build(qo_len, kv_len, **options)


def test_a_piece_costs_its_tiles_and_its_overhead(planned: schedule.Schedule) -> None:
    for launch in planned.launches:
        costs = iter(piece_costs(launch, planned.spec).tolist())
        rows = launch.items["qo_len"] * planned.spec.gqa_group_size
        # One warpgroup's, beside requests of more.
        light = launch.config.family == "prefill_sm90" and rows.max() > 64
        for item, few in zip(launch.items, (rows <= 64) & light, strict=True):
            tiles = len(range(item["kv_begin"], item["kv_end"], launch.config.cta_tile_kv))
            tiles = -(-tiles // 4) if few else tiles
            split = heuristics.SPLIT_COST if item["num_splits"] > 1 else 0
            for _ in range(planned.spec.num_kv_heads):
                assert next(costs) == tiles + heuristics.ITEM_COST + split
        assert next(costs, None) is None


def sections(text: str) -> Iterator[dict[str, str]]:
    """The labelled lines of each launch."""
    for part in text.split("\n\n")[1:]:
        yield dict(re.findall(r"^  (\w+) +(.*)$", part, re.MULTILINE))


def numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def visible(plan: schedule.Schedule, r: int) -> np.ndarray:
    """Bool [qo_len, kv_len], without a mask."""
    qo_len, kv_len = int(plan.lengths.qo_len[r]), int(plan.lengths.kv_len[r])
    seen = oracle.visible(qo_len, kv_len, plan.spec.causal)
    if plan.spec.window_left >= 0:
        row, key = np.arange(qo_len)[:, None], np.arange(kv_len)
        seen = seen & (key >= kv_len - qo_len + row - plan.spec.window_left)
    return seen


def test_the_text_says_what_the_plan_is(planned: schedule.Schedule) -> None:
    text = explain(planned)
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()
    assert f"workspace {planned.workspace_bytes:,} bytes" in text
    seen = sum(int(visible(planned, r).sum()) for r in range(len(planned.lengths.qo_len)))
    assert f"{seen:,} visible (query, key) pairs a head" in text
    found = list(sections(text))
    assert len(found) == len(planned.launches)
    for section, launch in zip(found, planned.launches, strict=True):
        assert f": {launch.config.name}\n" in text
        config, heads = launch.config, planned.spec.num_kv_heads
        assert numbers(section["tile"])[:3] == [
            config.cta_tile_q,
            config.cta_tile_kv,
            config.num_threads,
        ]
        tiles = Counter((int(i["request"]), int(i["row_begin"])) for i in launch.items)
        items = numbers(section["items"])
        assert items[:2] == [len(launch.items), len(tiles)]
        assert items[-2:] == [heads, heads * len(launch.items)]
        rows = sum(
            min(
                int(planned.lengths.qo_len[r]) * planned.spec.gqa_group_size - row,
                config.cta_tile_q,
            )
            for r, row in tiles
        )
        assert items[2] == round(100 * rows / (len(tiles) * config.cta_tile_q))
        split = [count for count in tiles.values() if count > 1]
        if split:
            words = numbers(section["splits"])
            assert words[:2] == [len(split), len(tiles)]
            assert words[2] == min(split)
            assert words[-2:] == [sum(split), config.cta_tile_q]
        else:
            assert section["splits"] == "none"
        assert numbers(section["grid"])[:2] == [launch.grid, config.ctas_per_sm * 132]
        costs = piece_costs(launch, planned.spec)
        last, mean, imbalance, full = numbers(section["finish"])
        assert last == walk([int(c) for c in costs], launch.grid)[-1]
        assert mean == pytest.approx(costs.sum() / launch.grid, abs=0.051)
        assert imbalance == pytest.approx(last / (costs.sum() / launch.grid), abs=0.0051)
        assert full == pytest.approx(
            100 * costs.sum() / (last * config.ctas_per_sm * 132), abs=0.51
        )
        assert numbers(section["work"])[-1] == costs.max()


def test_the_picture_counts_every_thread_block(planned: schedule.Schedule) -> None:
    text = explain(planned)
    bars = [
        re.findall(r"^ +[\d.,]+ \|(#*) +(\d+)$", part, re.MULTILINE)
        for part in text.split("\n\n")[1:]
    ]
    for rows, launch in zip(bars, planned.launches, strict=True):
        assert 1 <= len(rows) <= 8
        counts = [int(count) for _, count in rows]
        assert sum(counts) == launch.grid
        assert all(bool(bar) == (count != "0") for bar, count in rows)
        longest = counts.index(max(counts))
        assert len(rows[longest][0]) == 48


def test_the_text_names_the_shape_and_why() -> None:
    mixed = explain(build([1, 700], [90000, 3000], disable_split_kv=True))
    assert (
        "rows: for requests of at most 32 (queries x group): reading K and V bounds them" in mixed
    )
    assert "rows: for requests of more than 32 (queries x group); " in mixed
    assert "along" not in mixed
    carried = explain(build([1, 700], [90000, 3000]))
    why = "few rows cost little beside the reading of K and V"
    assert f"1 shorter request rides along: {why}" in carried
    ampere = explain(build([2000, 4, 4], [2000, 60, 60], device=DeviceModel(100, 80)))
    assert "2 shorter requests ride along: too little work for a launch of their own" in ampere


@pytest.mark.parametrize(
    ("arch", "head_dim", "rows", "why"),
    [
        (90, 64, "64 rows a warpgroup,", "which {} warpgroups compute; one more brings Q, K and V"),
        (
            90,
            128,
            "64 rows a warpgroup,",
            "which {} warpgroups compute; one more brings Q, K and V",
        ),
        (80, 128, "32 rows a warp,", "so that each fragment of K and V feeds two matrix products"),
        (
            80,
            256,
            "16 rows a warp,",
            "as the output of more, 256 wide, would not fit the registers",
        ),
    ],
)
def test_the_text_says_where_a_tile_is_computed(
    arch: int, head_dim: int, rows: str, why: str
) -> None:
    plan = build([700], [3000], device=DeviceModel(100, arch), head_dim=head_dim)
    (launch,) = plan.launches
    config = launch.config
    lines = [line.strip() for line in explain(plan).splitlines()]
    begin = lines.index(f"rows: for requests of more than 32 (queries x group); {rows}")
    assert lines[begin + 1] == why.format(config.cta_tile_q // 64)
    (tile,) = (line for line in lines if line.startswith("tile "))
    if arch == 90:
        assert config.num_threads == 2 * config.cta_tile_q + 128
        stages = f"{config.num_stages} stages of K or V"
        assert (
            lines[begin + 2] == f"keys: as many as fit the registers, and leave room for {stages}"
        )
    else:
        stages = f"{config.num_stages} KV stages"
        assert lines[begin + 2].startswith(f"keys: as many as leave room for {config.num_stages}")
    assert tile.endswith(stages)


@pytest.mark.parametrize(("qo_len", "kv_len"), [([], []), ([0, 0], [7, 0])])
def test_a_plan_without_rows(qo_len: list[int], kv_len: list[int]) -> None:
    text = explain(build(qo_len, kv_len))
    assert text.startswith(f"batch of {len(qo_len)} requests")
    assert text.endswith("\n\nno query rows: nothing is launched")


def test_sums_beyond_31_bits() -> None:
    text = explain(build([65536, 65536], [65536, 131072], causal=False))
    assert f"{3 * 2**32:,} visible (query, key) pairs a head, 52,776.56 GFLOP" in text


def test_ten_thousand_items() -> None:
    text = explain(build([1920] * 500, [4096] * 500, heads=(16, 16)))
    (section,) = sections(text)
    assert numbers(section["items"])[:2] == [5000, 5000]
    assert numbers(section["items"])[-1] == 80000


def test_wrapper_explains_its_plan() -> None:
    wrapper = cupaged.BatchPrefillWithPagedKVCacheWrapper(backend="reference")
    with pytest.raises(RuntimeError, match="before plan"):
        wrapper.explain()
    batch = examples.mixed()
    wrapper.plan(**batch.plan_arguments(np.arange(batch.pages.sum(), dtype=np.int32)))
    assert wrapper.explain().startswith("batch of 64 requests, causal attention, float16\n")


# Variants


def test_the_text_names_what_is_on() -> None:
    variant = {
        "window_left": 1023,
        "logits_soft_cap": 30.5,
        "pos_encoding_mode": "ROPE_LLAMA",
        "rope_theta": 5e5,
        "kv_dtype": "float8_e4m3fn",
        "head_dim_vo": 128,
    }
    lines = explain(build([4], [900], variant=variant, head_dim=192)).splitlines()
    begin = lines.index(
        "  heads     8 query heads over 2 KV heads (groups of 4), head_dim 192 (values 128)"
    )
    assert lines[begin + 1 : begin + 5] == [
        "  K and V   float8_e4m3fn",
        "  window    a row sees no more than 1,023 keys before its own position",
        "  soft cap  logits become 30.5 * tanh(logit / 30.5)",
        "  positions ROPE_LLAMA: q and k are rotated; rope_scale 1, rope_theta 500000",
    ]
    alibi = explain(build([4], [900], variant={"pos_encoding_mode": "ALIBI", "window_left": 1}))
    assert "  positions ALIBI: logits are biased by the distance to the key\n" in alibi
    assert "  window    a row sees no more than 1 key before its own position\n" in alibi
    plain = explain(build([4], [900]))
    for word in ("K and V   ", "window", "soft cap", "positions", "mask", "dropped"):
        assert word not in plain


@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 3}, {"disable_split_kv": True}])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window_left", [-1, 90])
@pytest.mark.parametrize("masked", [True, False])
def test_the_text_says_what_is_dropped(
    rng: np.random.Generator,
    options: dict[str, Any],
    causal: bool,
    window_left: int,
    masked: bool,
) -> None:
    """KV tiles, those of a split from its begin on, that a query tile's rows see nothing of."""
    qo_len, kv_len = [250, 1, 20], [700, 300, 11]
    blocks = rng.random((3, 16, 32)) < 0.2
    bits = [
        block.repeat(16, axis=0).repeat(25, axis=1)[:qo, :kv]
        for block, qo, kv in zip(blocks, qo_len, kv_len, strict=True)
    ]
    mask = None
    if masked:
        parts = [np.packbits(each, bitorder="little") for each in bits]
        indptr = np.cumsum([0, *map(len, parts)]).astype(np.int32)
        mask = CustomMask(np.concatenate(parts), indptr)
    variant = {"window_left": window_left, "custom_mask": masked}
    plan = build(
        *(qo_len, kv_len),
        causal=causal,
        variant=variant,
        mask=mask,
        device=DeviceModel(100, 80),
        **options,
    )
    text = explain(plan)
    assert max(map(len, text.splitlines())) <= 100
    seen = [visible(plan, r) & (bits[r] if masked else True) for r in range(3)]
    pairs = sum(int(each.sum()) for each in seen)
    assert f"{pairs:,} visible (query, key) pairs a head" in text
    assert (f"\n  mask      {sum(-(-each.size // 8) for each in bits):,} bytes" in text) == masked
    dropped = 0
    for section, launch in zip(sections(text), plan.launches, strict=True):
        if window_left < 0 and not masked:
            assert "dropped" not in section
            continue
        there = hidden = 0
        for r, row_begin in {(int(i["request"]), int(i["row_begin"])) for i in launch.items}:
            rows = slice(row_begin, row_begin + launch.config.cta_tile_q)
            sees = seen[r].repeat(4, axis=0)[rows]
            allowed = oracle.visible(qo_len[r], kv_len[r], causal).repeat(4, axis=0)[rows]
            split = 16 * options.get("fixed_split_size", 1000)
            for begin in range(0, kv_len[r], split):
                end = min(begin + split, kv_len[r])
                for first in range(begin, end, launch.config.cta_tile_kv):
                    tile = slice(first, min(first + launch.config.cta_tile_kv, end))
                    there += bool(allowed[:, tile].any())
                    hidden += bool(allowed[:, tile].any() and not sees[:, tile].any())
        assert numbers(section["dropped"])[:2] == [hidden, there]
        dropped += hidden
    assert (dropped > 0) == (masked or window_left >= 0)
