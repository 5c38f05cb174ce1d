"""`forward()`: what FlashInfer's callers of old gave beside q, and where it is another plan's."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import batches
import decode_calls
import numpy as np
import oracle
import pytest
from decode_calls import Decode
from oracle import Formula
from small_call import Wrapper

import cupaged

FEATURES: list[tuple[dict[str, Any], Formula]] = [
    ({}, Formula()),
    ({"causal": True}, Formula(causal=True)),
    ({"window_left": 9}, Formula(window_left=9)),
    ({"causal": True, "logits_soft_cap": 4.0}, Formula(causal=True, logits_soft_cap=4.0)),
    ({"logits_soft_cap": 0.0}, Formula()),
    ({"pos_encoding_mode": "ALIBI"}, Formula(pos_encoding_mode="ALIBI")),
    (
        {"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 1e3, "sm_scale": 0.5},
        Formula(pos_encoding_mode="ROPE_LLAMA", rope_theta=1e3, sm_scale=0.5),
    ),
    (
        {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 4.0},
        Formula(pos_encoding_mode="ROPE_LLAMA", rope_scale=4.0),
    ),
    ({"k_scale": 0.5, "v_scale": 2.0}, Formula(k_scale=0.5, v_scale=2.0)),
]


@pytest.mark.parametrize(
    "planned", [{}, {"causal": True, "window_left": 3, "sm_scale": 0.1, "logits_soft_cap": 2.0}]
)
def test_a_call_is_what_it_says(rng: np.random.Generator, planned: dict[str, Any]) -> None:
    """Whatever was planned, and whatever calls there were before."""
    batch = batches.build(rng, [3, 9, 70], [40, 60, 200], group=2)
    wrapper = Wrapper(backend="reference")
    batch.plan(wrapper, fixed_split_size=3, **planned)
    for options, formula in FEATURES:
        out, lse = wrapper.forward_return_lse(batch.q, batch.cache, **options)
        oracle.check_all(batch, formula, out, lse)
        plan = wrapper._plan
        assert plan.schedule.fixed_split_size == 3
        assert wrapper.forward(batch.q, batch.cache, **options).tobytes() == out.tobytes()
        assert wrapper._plan is plan


def test_causality_that_was_not_planned_warns() -> None:
    """Of rows without keys, at the caller's line."""
    batch = batches.build(np.random.default_rng(0), [3, 9], [40, 6])
    wrapper = Wrapper(backend="reference")
    batch.plan(wrapper)
    with pytest.warns(cupaged.CupagedWarning, match=r"^request 1 has 9 queries and 6 keys") as told:
        wrapper.forward(batch.q, batch.cache, causal=True)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper.forward(batch.q, batch.cache, causal=True, window_left=30)


def test_each_call_of_decoding_changes_the_plan(rng: np.random.Generator) -> None:
    batch = decode_calls.build(rng, [40, 9, 300], 3, group=2)
    wrapper = Decode(backend="reference")
    wrapper.plan(*batch.index_arrays[1:], *batch.geometry, q_len_per_req=3)
    for options, formula in (
        ({"q_scale": 2.0}, Formula(causal=True, q_scale=2.0)),
        ({"window_left": 5}, Formula(causal=True, window_left=5)),
        (
            {"pos_encoding_mode": "ALIBI"},
            Formula(causal=True, pos_encoding_mode="ALIBI"),
        ),
    ):
        out, lse = wrapper.forward_return_lse(batch.q, batch.cache, **options)
        oracle.check_all(batch, formula, out, lse)
        wrapper.run(batch.q, batch.cache, q_len_per_req=3)


def test_a_mask_stays(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [3, 9], [40, 60])
    masks = tuple(rng.random((m, n)) < 0.5 for m, n in ((3, 40), (9, 60)))
    wrapper = Wrapper(backend="reference")
    batch.plan(wrapper, custom_mask=Formula(custom_mask=masks).flat_mask)
    out = wrapper.forward(batch.q, batch.cache, causal=True, window_left=20)
    oracle.check_all(batch, Formula(causal=True, window_left=20, custom_mask=masks), out)


def test_a_workspace_that_is_too_small_keeps_the_plan(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [2], [3000], num_kv_heads=1)
    wrapper = Wrapper(np.zeros(16, np.uint8), backend="reference")
    batch.plan(wrapper, window_left=3)
    planned = wrapper._plan
    with pytest.raises(ValueError, match=r"^float_workspace_buffer has 16 bytes, expected "):
        wrapper.forward(batch.q, batch.cache, window_left=-1)
    assert wrapper._plan is planned


def test_arguments_are_flashinfers() -> None:
    """In name and order; what is this library's own is given by name."""
    prefill = list(inspect.signature(Wrapper.forward).parameters)[1:]
    assert prefill == [
        *("q", "paged_kv_cache", "causal", "pos_encoding_mode", "use_fp16_qk_reduction"),
        *("k_scale", "v_scale", "window_left", "logits_soft_cap", "sm_scale", "rope_scale"),
        *("rope_theta", "return_lse"),
    ]
    decode = list(inspect.signature(Decode.forward).parameters)[1:]
    assert decode == [
        *("q", "paged_kv_cache", "pos_encoding_mode", "q_scale", "k_scale", "v_scale"),
        *("window_left", "logits_soft_cap", "sm_scale", "rope_scale", "rope_theta", "return_lse"),
    ]
    for kind in (Wrapper, Decode):
        parameters = inspect.signature(kind.forward).parameters
        assert parameters["return_lse"].kind.name == "KEYWORD_ONLY"
        assert kind.begin_forward is kind.plan


def test_a_refused_call_leaves_the_plan_as_it_was(rng: np.random.Generator) -> None:
    batch = batches.build(rng, [3, 9], [40, 60])
    wrapper = Wrapper(backend="reference")
    batch.plan(wrapper)
    with pytest.raises(ValueError, match=r"^q has 11 rows, expected 12"):
        wrapper.forward(batch.q[1:], batch.cache, causal=True)
    oracle.check_all(batch, Formula(), *wrapper.run(batch.q, batch.cache, return_lse=True))
