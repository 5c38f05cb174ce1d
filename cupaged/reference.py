"""Runs a schedule in NumPy: the same items, tiles, splits and merges as the kernels.

It is the backend for host arrays, and it lets the planner, the merging and the contract be tested
end to end where there is no GPU. It isn't the oracle of the tests: that is the plain formula.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cupaged.schedule import Launch, Schedule

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]

LN_2 = float(np.log(2.0))


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
) -> None:
    """Compute attention on the host.

    Parameters
    ----------
    schedule : Schedule
    page_indices : int32 [paged_kv_indptr[-1]]
    q : [nnz_qo, num_qo_heads, head_dim]
    k, v : [num_pages, page_size, num_kv_heads, head_dim]
        Whatever their layout in memory.
    out : [nnz_qo, num_qo_heads, head_dim]
        Written.
    lse : float32 [nnz_qo, num_qo_heads], optional
        Written.
    logit_scale : float
        What multiplies `q·k`, in base 2.
    v_scale, lse_scale : float
        What multiplies the output, and the base-2 LSE.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        for launch in schedule.launches:
            partials: dict[int, list[tuple[Float, Float]]] = {}
            for item in launch.items[np.argsort(launch.items["split"], kind="stable")]:
                tile = _Tile(schedule, launch, item)
                state = tile.attend(page_indices, q, k, v, logit_scale)
                if item["num_splits"] > 1:
                    states = partials.setdefault(int(item["merge"]), [])
                    states.append(state)
                    if len(states) < item["num_splits"]:
                        continue
                    state = _merge(partials.pop(int(item["merge"])))
                tile.write(state, out, lse, v_scale, lse_scale)


def _exp2_relative(x: Float, top: Float) -> Float:
    """2^(x - top), and 0 for an x of -inf even where top is -inf too."""
    return np.exp2(x - np.where(top == -np.inf, np.float32(0), top))


class _Tile:
    """The query tile of a work item, for all KV heads at once."""

    def __init__(self, schedule: Schedule, launch: Launch, item: np.void) -> None:
        spec = schedule.spec
        qo_len, kv_len = int(item["qo_len"]), int(item["kv_len"])
        self.spec = spec
        self.cta_tile_kv = launch.config.cta_tile_kv
        self.kv_begin, self.kv_end = int(item["kv_begin"]), int(item["kv_end"])
        self.page_begin = int(item["page_begin"])
        end = min(int(item["row_begin"]) + launch.config.cta_tile_q, qo_len * spec.gqa_group_size)
        packed = np.arange(int(item["row_begin"]), end)
        query, group_head = np.divmod(packed, spec.gqa_group_size)
        heads = np.arange(spec.num_kv_heads)[:, None] * spec.gqa_group_size
        self.rows = int(item["qo_begin"]) + query  # [rows]
        self.heads = heads + group_head  # [num_kv_heads, rows]
        self.row_end = kv_len - qo_len + query + 1 if spec.causal else np.full(len(query), kv_len)

    def attend(
        self, page_indices: npt.NDArray[np.int32], q: Array, k: Array, v: Array, scale: float
    ) -> tuple[Float, Float]:
        """State [num_kv_heads, rows, head_dim], normalised, and its base-2 LSE [.., rows]."""
        queries = q[self.rows, self.heads].astype(np.float32)
        top = np.full(self.heads.shape, -np.inf, np.float32)
        total = np.zeros(self.heads.shape, np.float32)
        output = np.zeros(queries.shape, np.float32)
        for begin in range(self.kv_begin, self.kv_end, self.cta_tile_kv):
            key = np.arange(begin, min(begin + self.cta_tile_kv, self.kv_end))
            index, in_page = np.divmod(key, self.spec.page_size)
            page = page_indices[self.page_begin + index]
            keys = k[page, in_page].astype(np.float32).transpose(1, 2, 0)
            values = v[page, in_page].astype(np.float32).transpose(1, 0, 2)
            logits = (queries @ keys) * np.float32(scale)
            logits = np.where(key < self.row_end[:, None], logits, np.float32(-np.inf))
            # fmax passes over NaN, as the GPU's maximum does; the weight is NaN all the same.
            higher = np.fmax(top, np.fmax.reduce(logits, axis=-1))
            factor = _exp2_relative(top, higher)
            weights = _exp2_relative(logits, higher[..., None])
            total = total * factor + weights.sum(axis=-1)
            output = output * factor[..., None] + weights @ values
            top = higher
        return _normalise(output, top, total)

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
