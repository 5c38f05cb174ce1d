"""The table of features is what dispatch goes by."""

from __future__ import annotations

import itertools

import pytest

from cupaged import support, tiles, validate
from cupaged.spec import FLOAT8_DTYPES, SERVED_DTYPES, SERVED_HEAD_DIMS, Needs, Variant

NEEDS = [
    Needs(dtype, kv_dtype, *head_dims, 16, Variant(*on), low_cap=on[1])
    for dtype, head_dims in itertools.product(SERVED_DTYPES, SERVED_HEAD_DIMS)
    for kv_dtype in (dtype, *FLOAT8_DTYPES)
    for on in itertools.product((False, True), repeat=len(Variant._fields))
    if not (on[3] and on[4])  # one encoding of positions at a time
]


def plan(needs: Needs) -> None:
    """Ask `plan()`'s checks for what has these needs."""
    mode = "ALIBI" if needs.variant.alibi else "ROPE_LLAMA" if needs.variant.rope else "NONE"
    spec = validate.attention_spec(
        *(4, 2, needs.head_dim_qk, needs.head_dim_vo, needs.page_size, False, None),
        *((needs.dtype, needs.kv_dtype, needs.dtype), "NHD", "head_dim_qk"),
        validate.Features(
            window_left=5 if needs.variant.window else -1,
            logits_soft_cap=30.0 if needs.variant.soft_cap else None,
            pos_encoding_mode=mode,
            custom_mask=needs.variant.custom_mask,
        ),
    )
    assert spec.needs == needs


@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernels_are_those_of_the_table(arch: int) -> None:
    for needs in NEEDS:
        if not support.serves("prefill_sm80", needs):
            continue
        for shape in tiles.SHAPES:
            family = tiles.kernel_config(arch, needs, shape).family
            best = arch == 90 and shape != "short" and support.serves("prefill_sm90", needs)
            assert family == ("prefill_sm90" if best else "prefill_sm80"), needs


def test_all_features_go_together() -> None:
    for needs in NEEDS:
        assert support.serves("reference", needs)
        assert support.serves("prefill_sm80", needs)
        plan(needs)


@pytest.mark.parametrize("head_dims", [(80, 80), (192, 192), (128, 192), (512, 512)])
def test_head_dims_that_no_row_has_are_refused(head_dims: tuple[int, int]) -> None:
    with pytest.raises(NotImplementedError):
        plan(Needs("float16", "float16", *head_dims, 16))


def test_every_head_dim_has_a_row() -> None:
    for head_dims in SERVED_HEAD_DIMS:
        needs = Needs("float16", "float16", *head_dims, 16)
        assert sum(feature.asked(needs) for feature in support.FEATURES) == 1
