"""How positions enter the logits: the slopes of ALiBi, the turns of RoPE."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cupaged.spec import AttentionSpec


def alibi_slopes(num_qo_heads: int) -> npt.NDArray[np.float32]:
    """What each head's logits fall by with every key of distance.

    Press, Smith and Lewis 2022, "Train Short, Test Long": `2 ** (-8 * (h + 1) / n)` for `n` heads
    that are a power of two. For others, their authors' rule: the slopes of the next lower power
    `n`, then every other one of `2 * n`.

    Parameters
    ----------
    num_qo_heads : int

    Returns
    -------
    float32 [num_qo_heads]
    """
    power = 1 << (num_qo_heads.bit_length() - 1)
    first = np.arange(1, power + 1) / power
    others = np.arange(1, 2 * (num_qo_heads - power), 2) / (2 * power)
    return np.exp2(-8 * np.concatenate((first, others))).astype(np.float32)


def rope_turns(spec: AttentionSpec) -> npt.NDArray[np.uint64]:
    """By how much of a turn a position rotates each pair of elements.

    Su et al. 2021, "RoFormer": elements `d` and `d + head_dim_qk / 2` turn by
    `rope_theta ** (-2 * d / head_dim_qk) / rope_scale` radians a position. In units of 2^-64 of a
    turn, a product with a position loses whole turns, and nothing else, by overflowing.

    Parameters
    ----------
    spec : AttentionSpec

    Returns
    -------
    uint64 [head_dim_qk / 2]
    """
    pair = np.arange(spec.head_dim_qk // 2)
    radians = spec.rope_theta ** (-2 * pair / spec.head_dim_qk) / spec.rope_scale
    return np.ldexp(radians / (2 * math.pi) % 1.0, 64).astype(np.uint64)
