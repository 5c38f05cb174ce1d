"""What kernels read of a variant beside their parameters, as words to be uploaded."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cupaged import extents
from cupaged.extents import CustomMask
from cupaged.positions import alibi_slopes, rope_turns
from cupaged.schedule import IntArray, Lengths, Schedule
from cupaged.spec import AttentionSpec

_LOG2_E = math.log2(math.e)


class Addresses(NamedTuple):
    """Where the tables of a plan lie on its device, in the order of `PARAMS_DTYPE`; 0 for none."""

    mask_bits: int = 0
    mask_begin: int = 0
    seen_keys: int = 0
    alibi_slopes: int = 0
    rope_turns: int = 0


@lru_cache(maxsize=64)
def spec_tables(spec: AttentionSpec) -> dict[str, IntArray]:
    """The tables that a spec alone decides, by their names in `Addresses`."""
    tables = {}
    if spec.needs.variant.alibi:
        slopes = (alibi_slopes(spec.num_qo_heads) * _LOG2_E).astype(np.float32)
        tables["alibi_slopes"] = slopes.view(np.int32)
    if spec.needs.variant.rope:
        tables["rope_turns"] = rope_turns(spec).view(np.int32)
    return tables


def mask_tables(schedule: Schedule) -> dict[str, IntArray]:
    """Those of a schedule's custom mask, by their names in `Addresses`."""
    mask = schedule.mask
    assert mask is not None
    return {
        "mask_bits": _words(mask.bits),
        "mask_begin": mask.indptr,
        "seen_keys": seen_keys(schedule.spec, mask, schedule.lengths),
    }


def seen_keys(spec: AttentionSpec, mask: CustomMask, lengths: Lengths) -> IntArray:
    """Which keys any row of their request sees, by the mask, causality and the window together.

    Returns
    -------
    int32 [words]
        For each request the word that its bits begin at, and then those, one for each key and the
        lowest of a word first. A request that has no rows has none.
    """
    pairs = zip(lengths.qo_len.tolist(), lengths.kv_len.tolist(), strict=True)
    begins, parts = np.empty(len(lengths.kv_len), np.int32), []
    end = len(begins)
    for request, (qo_len, kv_len) in enumerate(pairs):
        begins[request] = end
        if qo_len:
            by_any = np.zeros(kv_len, np.bool_)
            for block in extents.seen(spec, mask, request, qo_len, kv_len):
                by_any |= block.any(axis=0)
            parts.append(_words(np.packbits(by_any, bitorder="little")))
            end += len(parts[-1])
    return np.concatenate((begins, *parts))


def most_seen_words(max_batch: int, max_mask_bytes: int, max_keys: int) -> int:
    """The longest that `seen_keys()` may become.

    Parameters
    ----------
    max_batch, max_mask_bytes, max_keys : int
        Of requests, of their masks, and of the keys of all.
    """
    # A request with rows has no more keys than bits in its mask. Each may fill a word in part.
    return 2 * max_batch + min(8 * max_mask_bytes, max_keys) // 32


def _words(bits: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> IntArray:
    """Bytes, and zeros up to the next whole int32."""
    padded = np.zeros(-(-len(bits) // 4) * 4, np.uint8)
    padded[: len(bits)] = bits
    return padded.view(np.int32)
