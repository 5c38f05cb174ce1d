"""The factors of a soft cap and of biases, as the kernels take them."""

from __future__ import annotations

import math

import numpy as np

from cupaged.spec import AttentionSpec

_LOG2_E = math.log2(math.e)
_MAX_FLOAT32 = float(np.finfo(np.float32).max)

#: tanh(x) is x * p(x^2 / _SMALL^2 - 1), within 1e-6, for x of at most _SMALL; p's coefficients,
#: the constant's first, interpolate tanh(x) / x at Chebyshev's points. `tests/test_transform.py`
#: fits them anew.
_SMALL = 0.35
_RATIO = (0.96107576, -0.03706119, 0.0018602)

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
        largest = _SMALL / abs(inner) if inner else math.inf
        if not self._cap or largest > _LARGEST_PRODUCT:
            return softmax, inner, 0.0, 0.0, 0.0, 0.0
        square = largest * largest
        ratio = (self._cap * inner * c / square**i for i, c in enumerate(_RATIO))
        return softmax, inner, square, *ratio
