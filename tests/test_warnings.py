"""Input that is legal and almost surely a mistake: what is said, and how often."""

from __future__ import annotations

import tracemalloc
import warnings
from typing import Any

import batches
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_call import (
    INT_MAX,
    Wrapper,
    ints,
    plan_arguments,
    run_arguments,
)

import cupaged
from cupaged import validate_lengths

NOT_APPENDED = (
    "request 1 has 5 queries and 2 keys (and 1 more requests like it): with causal=True its first "
    "3 rows see no key, and will be 0. Were the new keys and values appended to the cache, and "
    "counted in paged_kv_indptr and paged_kv_last_page_len?"
)
NOT_APPENDED_CALL = {"causal": True, "paged_kv_last_page_len": ints(4, 2, 0)}
TWICE = (
    "request 0 has page 4 twice, as its pages 0 and 1: its keys will be attended to twice. "
    "Was another page meant in paged_kv_indices?"
)
TWICE_CALL = {"paged_kv_indices": ints(4, 4, 0)}


def caught(call: Any, **changes: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call(**plan_arguments(**changes))
    return found


@pytest.mark.parametrize(
    ("changes", "message"), [(NOT_APPENDED_CALL, NOT_APPENDED), (TWICE_CALL, TWICE)]
)
def test_warnings(changes: dict[str, Any], message: str) -> None:
    """Once a plan, at the caller's line, and not again at every run."""
    wrapper = Wrapper(backend="reference")
    (warning,) = caught(wrapper.plan, **changes)
    assert str(warning.message) == message
    assert warning.category is cupaged.CupagedWarning
    assert issubclass(cupaged.CupagedWarning, UserWarning)
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper.run(**run_arguments())
    (again,) = caught(wrapper.plan, **changes)
    assert str(again.message) == message


def test_both_mistakes_warn() -> None:
    found = caught(Wrapper(backend="reference").plan, **NOT_APPENDED_CALL, **TWICE_CALL)
    assert [str(warning.message) for warning in found] == [NOT_APPENDED, TWICE]


def test_one_request_alone_has_no_others_like_it() -> None:
    (warning,) = caught(
        Wrapper(backend="reference").plan,
        causal=True,
        paged_kv_last_page_len=ints(4, 2, 0),
        qo_indptr=ints(0, 3, 8, 8),
    )
    assert str(warning.message) == NOT_APPENDED.replace(" (and 1 more requests like it)", "")


def test_a_page_repeated_in_several_requests() -> None:
    (warning,) = caught(
        Wrapper(backend="reference").plan,
        qo_indptr=ints(0, 1, 2, 3),
        paged_kv_indptr=ints(0, 1, 4, 7),
        paged_kv_indices=ints(2, 3, 5, 3, 9, 9, 9),
        paged_kv_last_page_len=ints(1, 1, 1),
    )
    assert str(warning.message) == (
        "request 1 has page 3 twice, as its pages 0 and 2 (and 1 more requests like it): its keys "
        "will be attended to twice. Was another page meant in paged_kv_indices?"
    )


def test_warnings_point_to_the_caller_of_every_wrapper() -> None:
    """However many of the library's functions are in between."""
    wrapper = cupaged.BatchAttentionWithAttentionSinkWrapper(
        backend="reference",
        q_data_type="float16",
        kv_data_type="float16",
        head_dim_qk=64,
        head_dim_vo=64,
    )
    found = caught(wrapper.plan, **NOT_APPENDED_CALL, **TWICE_CALL)
    assert [warning.filename for warning in found] == [__file__, __file__]


@pytest.mark.parametrize(
    "changes",
    [
        {"causal": True, "qo_indptr": ints(0, 3, 8, 8)},  # fewer queries than keys, or as many
        {"paged_kv_last_page_len": ints(4, 2, 0)},  # fewer keys, and no causal mask
        {"paged_kv_indices": ints(4, 1, 4)},  # a shared prefix: two requests, one page
        {"paged_kv_indices": ints(4, 1, 0, 0, 0)},  # repeats beyond paged_kv_indptr[-1]
        {"paged_kv_last_page_len": ints(4, 16, 5)},  # of a request without pages: ignored
    ],
)
def test_what_does_not_warn(changes: dict[str, Any]) -> None:
    assert caught(Wrapper(backend="reference").plan, **changes) == []


@pytest.mark.parametrize("changes", [NOT_APPENDED_CALL, TWICE_CALL])
def test_warnings_as_errors_keep_the_earlier_plan(
    rng: np.random.Generator, changes: dict[str, Any]
) -> None:
    batch = batches.build(rng, [3, 9], [20, 40], page_size=16, group=2)
    wrapper = Wrapper(backend="reference")
    batch.plan(wrapper, causal=True)
    before = wrapper.run(batch.q, batch.cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(cupaged.CupagedWarning):
            wrapper.plan(**plan_arguments(**changes))
    after = wrapper.run(batch.q, batch.cache)
    assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize(
    ("indices", "messages"),
    [
        (ints(INT_MAX, 1, 0), []),
        (ints(INT_MAX, 1, INT_MAX), []),
        (ints(INT_MAX, INT_MAX, 0), [TWICE.replace("page 4", f"page {INT_MAX}")]),
        (np.array([INT_MAX, INT_MAX, 0]), [TWICE.replace("page 4", f"page {INT_MAX}")]),
    ],
)
def test_high_page_numbers_take_no_more_memory(indices: Any, messages: list[str]) -> None:
    wrapper = Wrapper(backend="reference")
    wrapper.plan(**plan_arguments())  # whatever is loaded or kept at the first call
    tracemalloc.start()
    try:
        found = caught(wrapper.plan, paged_kv_indices=indices)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert [str(warning.message) for warning in found] == messages


@given(
    pages=st.lists(st.integers(0, 40), max_size=12),
    factor=st.sampled_from([1, 7, 1000, INT_MAX // 40]),
    more=st.sampled_from([0, 1, 10**4]),
)
def test_whether_any_page_repeats(pages: list[int], factor: int, more: int) -> None:
    numbers = np.array(pages, np.int32) * np.int32(factor)
    highest = min(int(numbers.max(initial=-1)) + more, INT_MAX)
    found = validate_lengths.any_repeats(numbers, highest)
    assert found == (len(set(pages)) < len(pages))
