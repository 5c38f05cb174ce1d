"""A plan as text: the batch, and for each launch its tiles, splits, grid and predicted balance."""

from __future__ import annotations

import functools
import heapq

import numpy as np
import numpy.typing as npt

from cupaged import heuristics, shape_choice, tiles
from cupaged.extents import seen
from cupaged.kernel_spec import KernelConfig
from cupaged.schedule import Launch, Schedule
from cupaged.spec import AttentionSpec

FloatArray = npt.NDArray[np.float64]

#: Pieces of work that are walked one by one; of more, the first are taken as evenly shared out.
MAX_SIMULATED = 1_000_000

_BAR_WIDTH = 48
_HISTOGRAM_ROWS = 8
_LABEL_WIDTH = 10


def explain(schedule: Schedule) -> str:
    """Say in words what a plan will do, and why.

    Times are in units of one KV tile, the cost model's own: a piece of work (an item, for one KV
    head) takes as many as it has KV tiles, and some more for its beginning and end.

    Parameters
    ----------
    schedule : Schedule

    Returns
    -------
    str
        Lines of at most about 100 characters, ASCII, without a newline at the end.
    """
    lines = _batch_lines(schedule)
    if not schedule.launches:
        lines += ["", "no query rows: nothing is launched"]
    for number, launch in enumerate(schedule.launches, 1):
        lines += ["", f"launch {number} of {len(schedule.launches)}: {launch.config.name}"]
        lines += _launch_lines(schedule, launch)
    return "\n".join(lines)


def piece_costs(launch: Launch, spec: AttentionSpec) -> FloatArray:
    """Predicted time of each piece of work, in the order in which thread blocks take them.

    Parameters
    ----------
    launch : Launch
    spec : AttentionSpec

    Returns
    -------
    float64 [num_items * num_kv_heads]
        In KV tiles.
    """
    items = launch.items
    kv_tiles = -(-(items["kv_end"] - items["kv_begin"]) // launch.config.cta_tile_kv)
    light = items["qo_len"] <= _light_len(launch, spec)
    kv_tiles = np.where(light, -(-kv_tiles // heuristics.LIGHT), kv_tiles)
    overhead = np.where(
        items["num_splits"] > 1,
        heuristics.ITEM_COST + heuristics.SPLIT_COST,
        heuristics.ITEM_COST,
    )
    costs: FloatArray = (kv_tiles + overhead).astype(np.float64).repeat(spec.num_kv_heads)
    return costs


def _light_len(launch: Launch, spec: AttentionSpec) -> int:
    """Requests of at most so many queries count as light, see `heuristics.light_len()`."""
    rows = launch.items["qo_len"] * spec.gqa_group_size
    return heuristics.light_len(
        launch.config, spec.gqa_group_size, int(rows.min()), int(rows.max())
    )


def finish_times(costs: FloatArray, grid: int) -> FloatArray:
    """When each thread block finishes: block b begins with piece b, who is done takes the next.

    Beyond `MAX_SIMULATED` pieces, those too many are taken off the front and shared out evenly,
    which is off by less than the longest of them.

    Parameters
    ----------
    costs : float64 [pieces]
    grid : int
        Thread blocks, at least 1.

    Returns
    -------
    float64 [grid]
        Ascending; in the units of `costs`.
    """
    skipped = max(len(costs) - max(MAX_SIMULATED, grid), 0)
    start = costs[:skipped].sum() / grid
    # Only the time at which a block is free decides what it takes, so a heap of times will do.
    busy_until: list[float] = (start + costs[skipped : skipped + grid]).tolist()
    busy_until += [start] * (grid - len(busy_until))
    heapq.heapify(busy_until)
    for cost in costs[skipped + grid :].tolist():
        heapq.heapreplace(busy_until, busy_until[0] + cost)
    return np.array(sorted(busy_until), np.float64)


def _batch_lines(schedule: Schedule) -> list[str]:
    spec, lengths, device = schedule.spec, schedule.lengths, schedule.device
    batch = len(lengths.qo_len)
    kind = "causal" if spec.causal else "full"
    head_rows = (
        f"{_count(spec.num_qo_heads, 'query head')} over {_count(spec.num_kv_heads, 'KV head')}"
    )
    lines = [
        f"batch of {_count(batch, 'request')}, {kind} attention, {spec.dtype}",
        _line(
            "heads",
            f"{head_rows} (groups of {spec.gqa_group_size}), head_dim {_head_dims(spec)}",
        ),
        *_variant_lines(schedule),
    ]
    if batch:
        pages = int(lengths.paged_kv_indptr[-1])
        pairs = _visible_pairs(schedule)
        flop = 2.0 * (spec.head_dim_qk + spec.head_dim_vo) * spec.num_qo_heads * pairs
        lines += [
            _line("queries", _spread(lengths.qo_len)),
            _line(
                "keys",
                f"{_spread(lengths.kv_len)}; {_count(pages, 'page')} of {spec.page_size} "
                f"({spec.kv_layout})",
            ),
            _line("work", f"{pairs:,} visible (query, key) pairs a head, {flop / 1e9:,.2f} GFLOP"),
        ]
    lines.append(
        _line(
            "device",
            f"balanced for {device.num_sms} SMs of compute capability "
            f"{device.arch // 10}.{device.arch % 10}",
        )
    )
    # Launches follow each other on one stream, and use the same memory.
    lines.append(_line("workspace", f"{schedule.workspace_bytes:,} bytes for partial states"))
    return lines


def _variant_lines(schedule: Schedule) -> list[str]:
    """What the plan has on beside plain attention."""
    spec = schedule.spec
    lines = []
    if spec.kv_dtype != spec.dtype:
        lines.append(_line("K and V", spec.kv_dtype))
    if spec.window_left >= 0:
        before = _count(spec.window_left, "key")
        lines.append(_line("window", f"a row sees no more than {before} before its own position"))
    if schedule.mask is not None:
        lines.append(_line("mask", f"{len(schedule.mask.bits):,} bytes, a bit for a row and a key"))
    if spec.logits_soft_cap > 0:
        cap = f"{spec.logits_soft_cap:g}"
        lines.append(_line("soft cap", f"logits become {cap} * tanh(logit / {cap})"))
    if spec.pos_encoding_mode == "ALIBI":
        lines.append(_line("positions", "ALIBI: logits are biased by the distance to the key"))
    if spec.pos_encoding_mode == "ROPE_LLAMA":
        factors = f"rope_scale {spec.rope_scale:g}, rope_theta {spec.rope_theta:g}"
        lines.append(_line("positions", f"ROPE_LLAMA: q and k are rotated; {factors}"))
    return lines


def _launch_lines(schedule: Schedule, launch: Launch) -> list[str]:
    spec, config = schedule.spec, launch.config
    first_splits = launch.items[launch.items["split"] == 0]
    request = first_splits["request"]
    packed_len = schedule.lengths.qo_len[request] * spec.gqa_group_size
    rows = np.minimum(packed_len - first_splits["row_begin"], config.cta_tile_q)
    used = float(rows.sum()) / (len(rows) * config.cta_tile_q)
    costs = piece_costs(launch, spec)
    light_len = _light_len(launch, spec)
    light = f"(of requests of up to {_count(light_len, 'row')} of q, a quarter of the tiles)"
    finish = finish_times(costs, launch.grid)
    last, mean = float(finish[-1]), float(finish.mean())
    slots = tiles.slots(config, schedule.device)
    lines = [
        _line(
            "tile",
            f"{config.cta_tile_q} rows x {config.cta_tile_kv} keys; {config.num_threads} threads, "
            f"{config.shared_bytes // 1024} KiB of shared memory, {_stages(config)}",
        ),
        *(_line("", reason) for reason in _reasons(schedule, launch, request, packed_len)),
        _line(
            "items",
            f"{_count(len(launch.items), 'item')} of {_count(len(rows), 'query tile')} "
            f"({used:.0%} of the rows used); x {_count(spec.num_kv_heads, 'KV head')}: "
            f"{_count(len(costs), 'piece')}",
        ),
        *_dropped_lines(schedule, launch, first_splits),
        _line("splits", _split_words(launch, first_splits)),
        _line("workspace", f"{launch.partial_bytes(schedule.spec):,} bytes"),
        _line(
            "grid",
            f"{_count(launch.grid, 'thread block')}; the device holds {slots} at once, "
            f"{config.ctas_per_sm} an SM",
        ),
        _line(
            "work",
            f"{_span(finish)} KV tiles a thread block, mean {mean:,.1f}; {_span(costs)} a piece",
        ),
        _line(
            "",
            f"(counting {heuristics.ITEM_COST} for an item's beginning and end, "
            f"{heuristics.SPLIT_COST} more to store and merge a split)",
        ),
        *([_line("", light)] if light_len else []),
        _line(
            "finish",
            f"last {last:,.0f}, mean {mean:,.1f}: imbalance {last / mean:.2f}; "
            f"device {mean * launch.grid / (last * slots):.0%} full till then",
        ),
    ]
    if len(costs) > max(MAX_SIMULATED, launch.grid):
        lines.append(
            _line("", f"(all but the last {MAX_SIMULATED:,} pieces taken as evenly shared out)")
        )
    return lines + _histogram(finish)


def _head_dims(spec: AttentionSpec) -> str:
    if spec.head_dim_vo == spec.head_dim_qk:
        return str(spec.head_dim_qk)
    return f"{spec.head_dim_qk} (values {spec.head_dim_vo})"


def _reasons(
    schedule: Schedule,
    launch: Launch,
    request: npt.NDArray[np.int32],
    packed_len: npt.NDArray[np.int32],
) -> list[str]:
    """Why the launch's tiles have the shape they have."""
    config, spec = launch.config, schedule.spec
    limit = shape_choice.SHORT_MAX_ROWS
    kernel_of = functools.partial(tiles.kernel_config, schedule.device.arch, spec.needs)
    if config == kernel_of("short"):
        return [
            f"rows: for requests of at most {limit} (queries x group): reading K and V bounds them",
            f"keys: divided over {config.warps_kv} warps; {config.num_stages} stages keep loads "
            + "under way",
        ]
    blocks = _count(config.ctas_per_sm, "thread block")
    if config.producer_warps:
        rows = f"{config.cta_tile_q // (config.warps_q // 4)} rows a warpgroup,"
        why_rows = (
            f"which {_count(config.warps_q // 4, 'warpgroup')} compute; one more brings Q, K and V"
        )
        keys = f"fit the registers, and leave room for {_stages(config)}"
        if config != kernel_of("long"):
            keys = f"pay where no request has more than {shape_choice.BRIEF_MAX_KEYS}"
    else:
        per_warp = config.cta_tile_q // config.warps_q
        rows = f"{per_warp} rows a warp,"
        if per_warp > 16:
            why_rows = "so that each fragment of K and V feeds two matrix products"
        else:
            width = f"{config.head_dim_vo} wide"
            why_rows = f"as the output of more, {width}, would not fit the registers"
        keys = f"leave room for {config.num_stages} stages and {blocks} an SM"
    reasons = [
        f"rows: for requests of more than {limit} (queries x group); {rows}",
        f"      {why_rows}",
        f"keys: as many as {keys}",
    ]
    riding = len(np.unique(request[packed_len <= limit]))
    if riding:
        if config.carries_short:
            why = "few rows cost little beside the reading of K and V"
        else:
            why = "too little work for a launch of their own"
        verb = "rides" if riding == 1 else "ride"
        reasons.append(f"{_count(riding, 'shorter request')} {verb} along: {why}")
    return reasons


def _stages(config: KernelConfig) -> str:
    """The depth of the pipeline that brings K and V."""
    if config.producer_warps:
        return f"{config.num_stages} stages of K or V"
    return f"{config.num_stages} KV stages"


def _split_words(launch: Launch, first_splits: npt.NDArray[np.void]) -> str:
    if launch.num_merges == 0:
        return "none"
    counts = first_splits["num_splits"][first_splits["num_splits"] > 1]
    size = int((launch.items["kv_end"] - launch.items["kv_begin"]).max())
    return (
        f"{launch.num_merges} of {_count(len(first_splits), 'query tile')}, into {_span(counts)} "
        f"of at most {size:,} keys; {_count(launch.num_partials, 'partial slot')} x "
        f"{launch.config.cta_tile_q} rows"
    )


def _dropped_lines(
    schedule: Schedule, launch: Launch, first_splits: npt.NDArray[np.void]
) -> list[str]:
    """How many KV tiles a window and a mask save."""
    spec, config = schedule.spec, launch.config
    if spec.window_left < 0 and schedule.mask is None:
        return []
    kv_len = first_splits["kv_len"].astype(np.int64)
    if spec.causal:
        # The keys that each query tile's last row sees.
        row_end = first_splits["row_begin"] + config.cta_tile_q
        queries = np.minimum(-(-row_end // spec.gqa_group_size), first_splits["qo_len"])
        kv_len = np.maximum(kv_len - first_splits["qo_len"] + queries, 0)
    split_size = int(kv_len.max()) + 1
    if schedule.fixed_split_size is not None:
        split_size = min(schedule.fixed_split_size * spec.split_unit, split_size)
    in_split = -(-split_size // config.cta_tile_kv)
    there = kv_len // split_size * in_split + -(-(kv_len % split_size) // config.cta_tile_kv)
    items = launch.items
    loaded = -(-(items["kv_end"] - items["kv_begin"]) // config.cta_tile_kv)
    dropped = int(there.sum()) - int(loaded.sum())
    return [
        _line(
            "dropped",
            f"{dropped:,} of {_count(int(there.sum()), 'KV tile')} of query tiles: hidden whole, "
            "and not loaded",
        )
    ]


def _visible_pairs(schedule: Schedule) -> int:
    """Pairs (query row, visible key) of the whole batch, for one head."""
    spec, lengths, mask = schedule.spec, schedule.lengths, schedule.mask
    if mask is not None:
        pairs = zip(lengths.qo_len.tolist(), lengths.kv_len.tolist(), strict=True)
        return sum(
            int(np.count_nonzero(block))
            for request, (qo_len, kv_len) in enumerate(pairs)
            for block in seen(spec, mask, request, qo_len, kv_len)
        )
    qo_len, kv_len = lengths.qo_len.astype(np.int64), lengths.kv_len.astype(np.int64)
    visible = _staircase(qo_len, kv_len) if spec.causal else int((qo_len * kv_len).sum())
    if spec.window_left >= 0:
        # What lies to the left of the window: of the last row all but so many keys.
        visible -= _staircase(qo_len, np.maximum(kv_len - 1 - spec.window_left, 0))
    return visible


def _staircase(rows: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> int:
    """Keys in all of which the last row has `last`, the row before it one less, down to none."""
    steps = np.minimum(rows, last)
    return int((steps * last - steps * (steps - 1) // 2).sum())


def _histogram(finish: FloatArray) -> list[str]:
    """A bar for each range of finish times, as long as the number of thread blocks in it."""
    low, high = int(finish[0]), int(finish[-1])
    step = max(-(-(high - low + 1) // _HISTOGRAM_ROWS), 1)
    counts = np.bincount((finish.astype(np.int64) - low) // step)
    begins = range(low, high + 1, step)
    labels = [_span(np.array([b, min(b + step - 1, high)])) for b in begins]
    width = max(map(len, labels))
    longest = int(counts.max())
    lines = [_line("picture", f"thread blocks by finish time, {_BAR_WIDTH} # for {longest}")]
    for label, count in zip(labels, counts.tolist(), strict=True):
        # A range that is not empty shows.
        bar = "#" * -(-count * _BAR_WIDTH // longest)
        lines.append(_line("", f"{label:>{width}} |{bar:<{_BAR_WIDTH}} {count}".rstrip()))
    return lines


def _line(label: str, text: str) -> str:
    return f"  {label:<{_LABEL_WIDTH}}{text}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _span(values: npt.NDArray[np.generic]) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,}..{high:,}"


def _spread(values: npt.NDArray[np.int32]) -> str:
    middle = f", median {np.median(values):,.0f}" if values.min() < values.max() else ""
    return f"{int(values.sum()):,} in all, {_span(values)} a request{middle}"
