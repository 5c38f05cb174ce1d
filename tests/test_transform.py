"""How the factor of capped and biased logits is shared out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cupaged import transform
from cupaged.spec import AttentionSpec
from cupaged.transform import Transform

LOG2_E = math.log2(math.e)


def spec_of(soft_cap: float = 0.0, mode: str = "NONE") -> AttentionSpec:
    return AttentionSpec(
        *(4, 2, 128, 16, False, 0.1, "float16", "NHD"),
        logits_soft_cap=soft_cap,
        pos_encoding_mode=mode,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("cap", [1e-3, 1.0, 10.0, 30.0, 50.0, 1e3])
def test_the_polynomial_is_near_and_reaches_far(cap: float) -> None:
    """No further off than is allowed, and nearly that: a larger range would not do."""
    small, (first, third) = transform._third_power(cap)
    x = np.linspace(0, small, 4001)
    off = cap * np.abs(np.tanh(x) - x * (first + third * (x * x / small**2 - 1))).max()
    assert off <= 1.02 * transform._MAX_ERROR
    assert small == transform._MAX_SMALL or off > 0.9 * transform._MAX_ERROR


@pytest.mark.parametrize("logit_scale", [0.1, -0.1, 1e-4, 30.0])
@pytest.mark.parametrize("cap", [0.5, 30.0, 50.0])
def test_small_products_are_capped_as_others_are(cap: float, logit_scale: float) -> None:
    """In float32, as the kernels compute; logits are in base 2."""
    softmax, inner, square, *ratio = Transform(spec_of(cap)).factors(logit_scale)
    assert softmax == pytest.approx(cap * LOG2_E)
    largest = math.sqrt(square)
    x = np.linspace(-largest, largest, 4001)
    exact = cap * LOG2_E * np.tanh(x * logit_scale / (cap * LOG2_E))
    np.testing.assert_allclose(softmax * np.tanh(x * inner), exact, rtol=1e-12)
    beyond = (x * x).astype(np.float32) - np.float32(square)
    c0, c1 = (np.float32(c) for c in ratio)
    got = x.astype(np.float32) * (c1 * beyond + c0)
    np.testing.assert_allclose(got, exact, atol=1.02 * transform._MAX_ERROR * LOG2_E)


@pytest.mark.parametrize("logit_scale", [0.0, 1e-9, -1e-12])
def test_products_are_never_small_where_coefficients_would_vanish(logit_scale: float) -> None:
    _, inner, *rest = Transform(spec_of(30.0)).factors(logit_scale)
    assert rest == [0.0] * 3
    assert inner == pytest.approx(logit_scale / (30.0 * LOG2_E))


def test_biases_leave_the_softmax_no_factor() -> None:
    assert Transform(spec_of(mode="ALIBI")).factors(-0.25) == (1.0, -0.25, 0.0, 0.0, 0.0)
    softmax, inner, *_ = Transform(spec_of(20.0, "ALIBI")).factors(0.5)
    assert (softmax, inner) == (1.0, pytest.approx(0.5 / (20.0 * LOG2_E)))


def test_a_factor_beyond_float32_is_its_largest() -> None:
    _, inner, *_ = Transform(spec_of(1e-30)).factors(1e30)
    assert inner == pytest.approx(float(np.finfo(np.float32).max))


@pytest.mark.parametrize(
    ("spec", "on"),
    [(spec_of(), False), (spec_of(30.0), True), (spec_of(mode="ALIBI"), True)],
    ids=["plain", "cap", "bias"],
)
def test_it_is_on_where_products_are_changed(spec: AttentionSpec, on: bool) -> None:
    assert Transform(spec).is_on == on
