"""Slopes of ALiBi and turns of RoPE, against numbers of the papers and exact arithmetic."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupaged.positions import alibi_slopes, rope_turns
from cupaged.spec import AttentionSpec

PI = Decimal("3.14159265358979323846264338327950288419716939937510")
#: Of float64: turns of 2^-64 have eleven bits more.
ROUNDING = 2**11


def rope_spec(head_dim: int, scale: float = 1.0, theta: float = 1e4) -> AttentionSpec:
    return AttentionSpec(
        num_qo_heads=1,
        num_kv_heads=1,
        head_dim_qk=head_dim,
        page_size=1,
        causal=False,
        sm_scale=1.0,
        dtype="float16",
        kv_layout="NHD",
        pos_encoding_mode="ROPE_LLAMA",
        rope_scale=scale,
        rope_theta=theta,
    )


def exact_turns(pair: int, head_dim: int, scale: float, theta: float) -> Decimal:
    """Turns a position, whole ones and all."""
    power = (-2 * pair / Decimal(head_dim) * Decimal(theta).ln()).exp()
    return power / Decimal(scale) / (2 * PI)


def off_by(found: int, exact: Decimal) -> Decimal:
    """By how much a part of a turn is wrong, in units of 2^-64; whole turns are none."""
    error = abs((found - exact * 2**64) % 2**64)
    return min(error, 2**64 - error)


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (3, [4, 8, 2]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (16, np.arange(1, 17) / 2),
        (28, [*np.arange(1, 17) / 2, *(np.arange(12) / 2 + 0.25)]),
    ],
)
def test_slopes_of_alibi(num_heads: int, exponents: list[float]) -> None:
    slopes = alibi_slopes(num_heads)
    assert slopes.dtype == np.float32
    np.testing.assert_allclose(slopes, np.exp2(-np.array(exponents)), rtol=1e-7)


@given(st.integers(1, 500))
def test_every_head_has_a_slope_of_its_own(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,)
    assert len(set(slopes.tolist())) == num_heads
    assert (slopes >= 2.0**-8).all()
    assert (slopes < 1).all()


@given(st.sampled_from([64, 96, 128, 192, 256]), st.floats(2**-6, 2**16), st.floats(2.0, 1e8))
def test_turns_of_rope(head_dim: int, scale: float, theta: float) -> None:
    """As exact as float64 is, of what is left of whole turns."""
    turns = rope_turns(rope_spec(head_dim, scale, theta))
    assert turns.dtype == np.uint64
    assert turns.shape == (head_dim // 2,)
    with localcontext() as context:
        context.prec = 50
        for pair, found in enumerate(turns.tolist()):
            exact = exact_turns(pair, head_dim, scale, theta)
            # A few roundings of float64, at the magnitude of the turns.
            assert off_by(found, exact) <= 8 * ROUNDING * max(exact, Decimal(2) ** -11), pair


@pytest.mark.parametrize("position", [1, 4095, 2**20 + 3, 2**30, -1, -(2**17) - 5])
def test_a_position_loses_whole_turns_by_overflowing(position: int) -> None:
    """The angle is right to 2^-20 of a turn wherever a key may be."""
    turns = rope_turns(rope_spec(128, theta=5e5))
    product = np.array([position]).view(np.uint64) * turns
    with localcontext() as context:
        context.prec = 50
        for pair, found in enumerate(product.tolist()):
            exact = position * exact_turns(pair, 128, 1.0, 5e5)
            assert off_by(found, exact) < 2**44, pair
