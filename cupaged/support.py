"""Which backend and family of kernels serves which feature: dispatch and the README read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from cupaged.spec import FLOAT8_DTYPES, Needs

Family = Literal["reference", "prefill_sm80", "prefill_sm90"]
#: The reference backend, the kernels for compute capability 8.0 and later, and those for 9.0 alone.
FAMILIES: tuple[Family, ...] = ("reference", "prefill_sm80", "prefill_sm90")

_ALL: frozenset[Family] = frozenset(FAMILIES)
_BUT_SM90: frozenset[Family] = frozenset(("reference", "prefill_sm80"))


class Feature(NamedTuple):
    """Something that a plan may ask for.

    Attributes
    ----------
    name : str
        In the words of the README.
    asked : callable
        Whether needs ask for it.
    served_by : frozenset of str
        Of `FAMILIES`.
    """

    name: str
    asked: Callable[[Needs], bool]
    served_by: frozenset[Family]


def _head_dims(*served: tuple[int, int]) -> Callable[[Needs], bool]:
    return lambda needs: (needs.head_dim_qk, needs.head_dim_vo) in served


FEATURES = (
    Feature(
        "`head_dim` 64, 96, 128, 256", _head_dims((64, 64), (96, 96), (128, 128), (256, 256)), _ALL
    ),
    Feature("`head_dim_qk=192, head_dim_vo=128`", _head_dims((192, 128)), _ALL),
    Feature("`window_left`", lambda needs: needs.variant.window, _ALL),
    Feature("`logits_soft_cap`", lambda needs: needs.variant.soft_cap, _ALL),
    Feature(
        "`custom_mask`, `packed_custom_mask`", lambda needs: needs.variant.custom_mask, _BUT_SM90
    ),
    Feature('`pos_encoding_mode="ALIBI"`', lambda needs: needs.variant.alibi, _ALL),
    Feature(
        "`logits_soft_cap` with ALiBi",
        lambda needs: needs.variant.alibi and needs.variant.soft_cap,
        _BUT_SM90,  # which caps products in the hope that nothing is added to them
    ),
    Feature('`pos_encoding_mode="ROPE_LLAMA"`', lambda needs: needs.variant.rope, _BUT_SM90),
    Feature(
        "float8 K and V (`e4m3fn`, `e5m2`)",
        lambda needs: needs.kv_dtype in FLOAT8_DTYPES,
        _BUT_SM90,
    ),
)


def serves(family: Family, needs: Needs) -> bool:
    """Whether a family has all that is asked for."""
    return all(family in feature.served_by for feature in FEATURES if feature.asked(needs))


def table() -> str:
    """The features and who serves them, in Markdown."""
    lines = [
        "| | `reference` | `cuda`, sm_80 and later | `cuda`, sm_90a |",
        "|---|---|---|---|",
    ]
    for feature in FEATURES:
        marks = ["yes" if family in feature.served_by else "–" for family in FAMILIES]
        lines.append(f"| {' | '.join((feature.name, *marks))} |")
    return "\n".join(lines) + "\n"
