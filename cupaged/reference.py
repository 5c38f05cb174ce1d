"""Runs a schedule in NumPy: the same items, tiles, splits and merges as the kernels.

It is the backend for host arrays, and it lets the planner, the merging and the contract be tested
end to end where there is no GPU. It isn't the oracle of the tests: that is the plain formula.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cupaged.positions import alibi_slopes, rope_turns
from cupaged.schedule import Launch, Schedule
from cupaged.spec import DTYPES, AttentionSpec

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.integer[Any]]

LOG2_E = math.log2(math.e)


def run(
    schedule: Schedule,
    page_indices: npt.NDArray[np.int32],
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array | None,
    logit_scale: float,
    v_scale: float,
    lse_scale: float,
    sinks: Float | None = None,
) -> None:
    """Compute attention on the host.

    Parameters
    ----------
    schedule : Schedule
    page_indices : int32 [paged_kv_indptr[-1]]
    q : [nnz_qo, num_qo_heads, head_dim_qk]
    k : [num_pages, page_size, num_kv_heads, head_dim_qk]
        Whatever its layout in memory. Or, where keys are not paged,
        [nnz_kv, num_kv_heads, head_dim_qk], and `page_indices` has the row of each request's first
        key.
    v : [num_pages, page_size, num_kv_heads, head_dim_vo], or [nnz_kv, num_kv_heads, head_dim_vo]
        As `k`.
    out : [nnz_qo, num_qo_heads, head_dim_vo]
        Written.
    lse : float32 [nnz_qo, num_qo_heads], optional
        Written.
    logit_scale : float
        What multiplies `q·k`, in base 2.
    v_scale, lse_scale : float
        What multiplies the output, and the base-2 LSE.
    sinks : float32 [num_qo_heads], optional
        Natural logit, of each query head, of a key without a value.
    """
    logits = _Logits(schedule.spec, logit_scale)
    with np.errstate(over="ignore", invalid="ignore"):
        for launch in schedule.launches:
            partials: dict[int, list[tuple[Float, Float]]] = {}
            for item in launch.items[np.argsort(launch.items["split"], kind="stable")]:
                tile = _Tile(schedule, launch, item)
                state = tile.attend(page_indices, q, k, v, logits)
                if item["num_splits"] > 1:
                    states = partials.setdefault(int(item["merge"]), [])
                    states.append(state)
                    if len(states) < item["num_splits"]:
                        continue
                    state = _merge(partials.pop(int(item["merge"])))
                if sinks is not None:
                    state = _with_sink(state, sinks[tile.heads] * np.float32(LOG2_E))
                tile.write(state, out, lse, v_scale, lse_scale)


def _exp2_relative(x: Float, top: Float) -> Float:
    """2^(x - top), and 0 for an x of -inf even where top is -inf too."""
    return np.exp2(x - np.where(top == -np.inf, np.float32(0), top))


class _Logits:
    """From queries and keys to base-2 logits, of keys that are all seen."""

    def __init__(self, spec: AttentionSpec, logit_scale: float) -> None:
        variant = spec.needs.variant
        self.scale = np.float32(logit_scale)
        self.cap = np.float32(spec.logits_soft_cap * LOG2_E) if variant.soft_cap else None
        slopes = alibi_slopes(spec.num_qo_heads) if variant.alibi else None
        self.slopes = None if slopes is None else slopes * np.float32(LOG2_E)
        self.turns = rope_turns(spec) if variant.rope else None
        self.dtype = DTYPES[spec.dtype]

    def at(self, x: Array, position: Int) -> Float:
        """Queries or keys [num_kv_heads, rows, head_dim_qk] at their positions [rows]."""
        if self.turns is None:
            return x.astype(np.float32)
        turned = position.astype(np.int64).view(np.uint64)[:, None] * self.turns
        # As a signed number: from half a turn back to half a turn on.
        angle = turned.view(np.int64) * (2 * math.pi / 2**64)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        first, second = np.split(x.astype(np.float32), 2, axis=-1)
        rotated = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
        # The kernels multiply rotated elements of q's dtype.
        rounded: Float = rotated.astype(self.dtype).astype(np.float32)
        return rounded

    def of(self, products: Float, heads: Int, distance: Int) -> Float:
        """Logits of products `q·k` [num_kv_heads, rows, keys].

        `heads` [num_kv_heads, rows] are the rows' query heads, and `distance` [rows, keys] says
        by how much a key is behind the row's own.
        """
        logits: Float = products * self.scale
        if self.cap is not None:
            logits = self.cap * np.tanh(logits / self.cap)
        if self.slopes is not None:
            logits += self.slopes[heads][..., None] * distance.astype(np.float32)
        return logits


class _Tile:
    """The query tile of a work item, for all KV heads at once."""

    def __init__(self, schedule: Schedule, launch: Launch, item: np.void) -> None:
        spec = schedule.spec
        qo_len, self.kv_len = int(item["qo_len"]), int(item["kv_len"])
        self.spec = spec
        self.cta_tile_kv = launch.config.cta_tile_kv
        self.kv_begin, self.kv_end = int(item["kv_begin"]), int(item["kv_end"])
        self.page_begin = int(item["page_begin"])
        end = min(int(item["row_begin"]) + launch.config.cta_tile_q, qo_len * spec.gqa_group_size)
        packed = np.arange(int(item["row_begin"]), end)
        self.query, group_head = np.divmod(packed, spec.gqa_group_size)
        heads = np.arange(spec.num_kv_heads)[:, None] * spec.gqa_group_size
        self.rows = int(item["qo_begin"]) + self.query  # [rows]
        self.heads = heads + group_head  # [num_kv_heads, rows]
        self.position = self.kv_len - qo_len + self.query  # [rows]: the row's own key
        self.mask_bits = None
        if spec.custom_mask:
            assert schedule.mask is not None
            self.mask_bits = schedule.mask.bits[int(schedule.mask.indptr[item["request"]]) :]

    def attend(
        self,
        page_indices: npt.NDArray[np.int32],
        q: Array,
        k: Array,
        v: Array,
        logits_of: _Logits,
    ) -> tuple[Float, Float]:
        """State [num_kv_heads, rows, head_dim_vo], normalised, and its base-2 LSE [.., rows]."""
        queries = logits_of.at(q[self.rows, self.heads], self.position)
        top = np.full(self.heads.shape, -np.inf, np.float32)
        total = np.zeros(self.heads.shape, np.float32)
        output = np.zeros((*self.heads.shape, self.spec.head_dim_vo), np.float32)
        for begin in range(self.kv_begin, self.kv_end, self.cta_tile_kv):
            key = np.arange(begin, min(begin + self.cta_tile_kv, self.kv_end))
            index, in_page = np.divmod(key, self.spec.page_size)
            page = page_indices[self.page_begin + index]
            # Where keys are not paged, a request is one page, of rows from the page's number on.
            slot = (page, in_page) if k.ndim == 4 else (page + in_page,)
            keys = logits_of.at(k[slot].swapaxes(0, 1), key)
            values = v[slot].astype(np.float32).swapaxes(0, 1)
            distance = key - self.position[:, None]
            seen = self.sees(key, distance)
            # A weight of 0 times what lies there is not 0 where that is NaN.
            values[:, ~seen.any(axis=0)] = 0
            logits = logits_of.of(queries @ keys.swapaxes(1, 2), self.heads, distance)
            logits = np.where(seen, logits, np.float32(-np.inf))
            # fmax passes over NaN, as the GPU's maximum does; the weight is NaN all the same.
            higher = np.fmax(top, np.fmax.reduce(logits, axis=-1))
            factor = _exp2_relative(top, higher)
            weights = _exp2_relative(logits, higher[..., None])
            total = total * factor + weights.sum(axis=-1)
            output = output * factor[..., None] + weights @ values
            top = higher
        return _normalise(output, top, total)

    def sees(self, key: Int, distance: Int) -> npt.NDArray[np.bool_]:
        """Which keys [keys] each row sees: [rows, keys]."""
        seen = np.ones(distance.shape, np.bool_)
        if self.spec.causal:
            seen &= distance <= 0
        if self.spec.window_left >= 0:
            seen &= distance >= -self.spec.window_left
        if self.mask_bits is not None:
            bit = self.query[:, None] * self.kv_len + key
            seen &= (self.mask_bits[bit >> 3] >> (bit & 7) & 1).astype(np.bool_)
        return seen

    def write(
        self,
        state: tuple[Float, Float],
        out: Array,
        lse: Array | None,
        v_scale: float,
        lse_scale: float,
    ) -> None:
        """Write the tile's rows of the result."""
        output, state_lse = state
        out[self.rows, self.heads] = (output * np.float32(v_scale)).astype(out.dtype)
        if lse is not None:
            lse[self.rows, self.heads] = state_lse * np.float32(lse_scale)


def _normalise(output: Float, top: Float, total: Float) -> tuple[Float, Float]:
    """Divide by the sum of the weights; without any, 0 and an LSE of -inf."""
    empty = total == 0
    safe = np.where(empty, np.float32(1), total)
    lse = np.where(empty, np.float32(-np.inf), top + np.log2(safe))
    return np.where(empty[..., None], np.float32(0), output / safe[..., None]), lse


def _merge(states: list[tuple[Float, Float]]) -> tuple[Float, Float]:
    """Merge the partial states of a query tile, in the order of its splits."""
    outputs = np.stack([state[0] for state in states])
    lses = np.stack([state[1] for state in states])
    top = np.fmax.reduce(lses, axis=0)
    weights = _exp2_relative(lses, top)
    return _normalise((weights[..., None] * outputs).sum(axis=0), top, weights.sum(axis=0))


def _with_sink(state: tuple[Float, Float], sink: Float) -> tuple[Float, Float]:
    """Add a key without a value, of base-2 logit `sink` [num_kv_heads, rows].

    A row that sees no other key stays 0 and -inf.
    """
    output, lse = state
    total = np.logaddexp2(lse, sink)
    share = _exp2_relative(lse, total)
    return output * share[..., None], np.where(lse == -np.inf, lse, total)
