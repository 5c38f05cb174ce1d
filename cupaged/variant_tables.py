"""What kernels read of a variant beside their parameters, as words to be uploaded."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cupaged.masks import CustomMask
from cupaged.positions import alibi_slopes, rope_turns
from cupaged.schedule import IntArray
from cupaged.spec import AttentionSpec

_LOG2_E = math.log2(math.e)


class Addresses(NamedTuple):
    """Where the tables of a plan lie on its device, in the order of `PARAMS_DTYPE`; 0 for none."""

    mask_bits: int = 0
    mask_begin: int = 0
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


def mask_tables(mask: CustomMask) -> dict[str, IntArray]:
    """A custom mask's, by their names in `Addresses`."""
    return {"mask_bits": words(mask.bits), "mask_begin": mask.indptr}


def words(bits: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> IntArray:
    """Bytes, and zeros up to the next whole int32."""
    padded = np.zeros(-(-len(bits) // 4) * 4, np.uint8)
    padded[: len(bits)] = bits
    return padded.view(np.int32)
