"""The factors of a soft cap and of biases, as the kernels take them."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from cupaged.spec import AttentionSpec

_LOG2_E = math.log2(math.e)
_MAX_FLOAT32 = float(np.finfo(np.float32).max)

#: What a capped logit may be off by at most: as much as rounding to float16 changes a weight.
_MAX_ERROR = 2.0**-12
#: Small arguments of tanh are at most this. Beyond it a third power is no good approximation.
_MAX_SMALL = 0.35

#: Beyond this product the coefficients would leave what float32 can hold, and are not used.
_LARGEST_PRODUCT = 1e6


class Transform:
    """How the factor of the logits is shared out between the softmax and what comes before it.

    See `policy.cuh`: a soft cap multiplies the products with the factor over the cap, and the
    softmax with the cap; biases are added to logits that have their factor already.

    Parameters
    ----------
    spec : AttentionSpec

    Attributes
    ----------
    is_on : bool
        There is a soft cap, or there are biases.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        self._cap = spec.logits_soft_cap * _LOG2_E
        self._small, self._ratio = _third_power(spec.logits_soft_cap)
        self._biased = spec.needs.variant.alibi
        self.is_on = self._biased or self._cap > 0

    def factors(self, logit_scale: float) -> tuple[float, ...]:
        """The softmax's factor, the inner one, and how small products are capped.

        Parameters
        ----------
        logit_scale : float
            What multiplies `q·k`, in base 2.

        Returns
        -------
        tuple of float
            `logit_scale`, `inner_scale`, `cap_square` and `cap_ratio` of `params.cuh`.
        """
        inner = logit_scale / self._cap if self._cap else logit_scale
        inner = min(max(inner, -_MAX_FLOAT32), _MAX_FLOAT32)
        softmax = 1.0 if self._biased else self._cap
        largest = self._small / abs(inner) if inner else math.inf
        if not self._cap or largest > _LARGEST_PRODUCT:
            return softmax, inner, 0.0, 0.0, 0.0
        square = largest * largest
        ratio = (self._cap * inner * c / square**i for i, c in enumerate(self._ratio))
        return softmax, inner, square, *ratio


@lru_cache(maxsize=64)
def _third_power(cap: float) -> tuple[float, tuple[float, float]]:
    """How far tanh is a polynomial x * (a + b * (x^2 / small^2 - 1)).

    Its series is x - x^3 / 3 + 2 x^5 / 15 - 17 x^7 / 315; of the fifth and the seventh power the
    polynomial has their share of Chebyshev's first and third polynomials, and lacks a multiple of
    the fifth, which is small^5 / 120 at most.

    Parameters
    ----------
    cap : float
        What tanh is multiplied with; 0 for no cap.

    Returns
    -------
    small : float
        Arguments up to it are at most `_MAX_ERROR / cap` off.
    ratio : tuple of float
        a and b.
    """
    if not cap:
        return 0.0, (0.0, 0.0)
    small = min(_MAX_SMALL, (120 * _MAX_ERROR / cap) ** 0.2)
    square = small * small
    first = 1 - square**2 / 24 + 17 / 315 * 7 / 16 * square**3
    third = -1 / 3 + square / 6 - 17 / 315 * 21 / 16 * square**2
    return small, (first + third * square, third * square)
