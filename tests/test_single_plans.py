"""Plans of single requests: which calls find one again, and how many are kept."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from oracle import Formula
from single_calls import check, count_plans, drawn
from small_call import check_error

import cupaged
from cupaged import single_plans
from cupaged.kept_plans import KeptPlans

prefill, decode = cupaged.single_prefill_with_kv_cache, cupaged.single_decode_with_kv_cache


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The schedules of all plans that are made; nothing is kept before."""
    return count_plans(monkeypatch)


def test_equal_shapes_and_options_are_planned_once(
    rng: np.random.Generator, plans: list[Any]
) -> None:
    """Whatever the values, their strides, and the options of `run()`."""
    options: dict[str, Any] = {"causal": True, "window_left": 9, "logits_soft_cap": 3.0}
    for scale in (None, 0.5, 2.0):
        host = drawn(rng)
        sinks = rng.standard_normal(4).astype(np.float32)
        own = {"k_scale": scale, "v_scale": scale, "sinks": None if scale is None else sinks}
        out, lse = prefill(*host, **options, **own, return_lse=True)
        check(host, Formula(**options, **own), out, lse)
        wide = np.zeros((5, 4, 72), np.float16)[..., :64]
        wide[...] = host[0]
        check(host, Formula(**options), prefill(wide, *host[1:], **options))
    assert len(plans) == 1
    for q_scale in (None, 0.5):
        host = drawn(rng, 1, 300)
        out, lse = decode(host[0][0], *host[1:], q_scale=q_scale, return_lse=True)
        check(host, Formula(q_scale=q_scale), out[None], lse[None])
        check(host, Formula(), decode(host[0][0], *host[1:])[None])
    assert len(plans) == 2


# What a plan depends on, each beside a call without options of 5 queries and 40 keys.
OTHERS: list[dict[str, Any]] = [
    {"qo_len": 6},
    {"kv_len": 41},
    {"dtype": ml_dtypes.bfloat16},
    {"causal": True},
    {"sm_scale": 0.5},
    {"window_left": 3},
    {"logits_soft_cap": 2.0},
    {"pos_encoding_mode": "ALIBI"},
    {"pos_encoding_mode": "ROPE_LLAMA"},
    {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0},
    {"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 1e3},
]


def test_other_shapes_and_options_are_planned(rng: np.random.Generator, plans: list[Any]) -> None:
    """And each finds its own plan again."""
    for again in range(2):
        for i, changes in enumerate([{}, *OTHERS]):
            options = dict(changes)
            shape = {
                key: options.pop(key) for key in ("qo_len", "kv_len", "dtype") & changes.keys()
            }
            host = drawn(rng, **shape)
            check(host, Formula(**options), prefill(*host, **options))
            assert len(plans) == (1 + len(OTHERS) if again else i + 1)


def test_other_heads_head_dims_and_layouts_are_planned(
    rng: np.random.Generator, plans: list[Any]
) -> None:
    shapes = [
        ((5, 4, 64), (40, 2, 64), "NHD"),
        ((5, 8, 64), (40, 2, 64), "NHD"),
        ((5, 4, 64), (40, 4, 64), "NHD"),
        ((5, 4, 128), (40, 2, 128), "NHD"),
        ((5, 4, 64), (2, 2, 64), "NHD"),
        ((5, 4, 64), (2, 2, 64), "HND"),
    ]
    for again in range(2):
        for i, (q_shape, kv_shape, kv_layout) in enumerate(shapes):
            q = rng.standard_normal(q_shape).astype(np.float16)
            k, v = (rng.standard_normal(kv_shape).astype(np.float16) for _ in range(2))
            out = prefill(q, k, v, kv_layout=kv_layout)
            rows = [x if kv_layout == "NHD" else x.swapaxes(0, 1) for x in (k, v)]
            check((q, *rows), Formula(), out)
            assert len(plans) == (len(shapes) if again else i + 1)


def test_a_number_in_an_array_is_read_at_every_call(
    rng: np.random.Generator, plans: list[Any]
) -> None:
    sm_scale = np.array(0.5)
    for value in (0.5, 0.25, 0.5):
        sm_scale[...] = value
        host = drawn(rng)
        check(host, Formula(sm_scale=value), prefill(*host, sm_scale=sm_scale))
    assert len(plans) == 2


def test_a_call_with_a_mask_is_always_planned(rng: np.random.Generator, plans: list[Any]) -> None:
    host = drawn(rng)
    prefill(*host)
    for i in range(3):
        mask = rng.random((5, 40)) < 0.5
        formula = Formula(custom_mask=(mask,))
        check(host, formula, prefill(*host, custom_mask=mask))
        packed = np.packbits(mask, bitorder="little")
        check(host, formula, prefill(*host, packed_custom_mask=packed))
        assert len(plans) == 1 + 2 * (i + 1)
    check(host, Formula(), prefill(*host))
    assert len(plans) == 7
    assert len(single_plans._kept._plans) == 1


@pytest.mark.parametrize(
    ("legal", "wrong", "message"),
    [
        ({"causal": True}, {"causal": 1}, "causal is an int, expected a bool"),
        ({"sm_scale": 1.0}, {"sm_scale": True}, "sm_scale is a bool, expected a number"),
    ],
)
def test_a_plan_lets_no_mistake_through(
    rng: np.random.Generator, legal: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    """Equal values of other types."""
    host = drawn(rng)
    prefill(*host, **legal)
    check_error(TypeError, message, prefill, *host, **wrong)


def test_a_call_that_fails_keeps_no_plan(rng: np.random.Generator, plans: list[Any]) -> None:
    """Its kernels may not be loaded."""
    host = drawn(rng)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^sinks has shape"):
            prefill(*host, sinks=np.zeros(3, np.float32))
    assert len(plans) == 2
    prefill(*host)
    prefill(*host)
    assert len(plans) == 3


def test_every_call_warns_at_its_line(rng: np.random.Generator) -> None:
    host = drawn(rng, 5, 3)
    for _ in range(3):
        with pytest.warns(cupaged.CupagedWarning) as found:
            prefill(*host, causal=True)
        (warning,) = found
        assert warning.filename == __file__
        assert str(warning.message).startswith("request 0 has 5 queries and 3 keys: ")


def test_threads_share_plans_on_the_host(rng: np.random.Generator, plans: list[Any]) -> None:
    host = drawn(rng, 1, 300)
    expected = decode(host[0][0], *host[1:]).tobytes()
    found: list[bytes] = []

    def call() -> None:
        found.extend(decode(host[0][0], *host[1:]).tobytes() for _ in range(5))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 20
    assert len(plans) == 1


# How many are kept


def test_those_used_longest_ago_are_dropped() -> None:
    plans: KeptPlans[str, int] = KeptPlans(3)
    for number, key in enumerate("abc"):
        plans.put(key, number)
    assert plans.get("a") == 0
    plans.put("d", 3)
    assert [plans.get(key) for key in "abcd"] == [0, None, 2, 3]
    plans.put("c", 9)
    plans.put("e", 4)
    assert [plans.get(key) for key in "acde"] == [None, 9, 3, 4]


def test_a_plan_that_is_taken_is_kept_no_longer() -> None:
    plans: KeptPlans[str, int] = KeptPlans(4)
    for number, key in enumerate(("a1", "b1", "a2", "a3")):
        plans.put(key, number)
    plans.get("a2")
    assert plans.take("a1", lambda key: key[0] == "a") == 0
    assert plans.take("a1", lambda key: key[0] == "a") == 2  # used after a3
    assert plans.take("c1", lambda key: key[0] == "c") is None
    assert [plans.get(key) for key in ("a1", "b1", "a2", "a3")] == [None, 1, None, 3]
    plans.clear()
    assert plans.get("b1") is None


def test_the_number_of_plans_has_a_bound(rng: np.random.Generator, plans: list[Any]) -> None:
    most = single_plans._MOST_PLANS
    for kv_len in range(1, most + 2):
        decode(np.zeros((4, 64), np.float16), *drawn(rng, 1, kv_len)[1:])
    assert len(plans) == most + 1
    for kv_len in (most + 1, 2, 1):
        decode(np.zeros((4, 64), np.float16), *drawn(rng, 1, kv_len)[1:])
    assert len(plans) == most + 2
