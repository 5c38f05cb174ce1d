"""Every error of the constructor and of `plan()`, by its type and full text."""

from __future__ import annotations

from typing import Any

import batches
import ml_dtypes
import numpy as np
import pytest
from small_call import (
    INT_MAX,
    SERVED,
    SPEAKS_DLPACK,
    Wrapper,
    check_error,
    ints,
    pages,
    plan_arguments,
    planned,
    run_arguments,
)

from cupaged import validate

MODES = "expected one of 'NONE', 'ROPE_LLAMA', 'ALIBI'"
LAYOUTS = "expected one of 'NHD', 'HND'"
BACKENDS = "expected one of 'auto', 'reference', 'cuda', 'fa2', 'fa3'"
FLOAT8 = "float8_e4m3fn, float8_e5m2"

# (arguments changed, error, its message)
PLAN_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    # Numbers
    ({"num_qo_heads": 4.0}, TypeError, "num_qo_heads is a float, expected an int"),
    ({"num_qo_heads": True}, TypeError, "num_qo_heads is a bool, expected an int"),
    ({"num_qo_heads": 0}, ValueError, "num_qo_heads = 0, expected at least 1"),
    ({"num_kv_heads": "2"}, TypeError, "num_kv_heads is a str, expected an int"),
    ({"num_kv_heads": -2}, ValueError, "num_kv_heads = -2, expected at least 1"),
    (
        {"num_qo_heads": 5},
        ValueError,
        "num_qo_heads = 5, expected a multiple of num_kv_heads = 2",
    ),
    (
        {"num_qo_heads": 2, "num_kv_heads": 4},
        ValueError,
        "num_qo_heads = 2, expected a multiple of num_kv_heads = 4",
    ),
    ({"head_dim_qk": None}, TypeError, "head_dim_qk is a NoneType, expected an int"),
    ({"head_dim_qk": 0}, ValueError, "head_dim_qk = 0, expected at least 1"),
    ({"head_dim_qk": 80}, NotImplementedError, "head_dim_qk = 80, served are 64, 96, 128, 256"),
    ({"head_dim_qk": 192}, NotImplementedError, "head_dim_qk = 192, served are 64, 96, 128, 256"),
    ({"head_dim_vo": 64.0}, TypeError, "head_dim_vo is a float, expected an int"),
    ({"head_dim_vo": -1}, ValueError, "head_dim_vo = -1, expected at least 1"),
    (
        {"head_dim_vo": 128},
        NotImplementedError,
        "head_dim_qk = 64 with head_dim_vo = 128, served are equal ones of 64, 96, 128, 256, and "
        "192/128",
    ),
    ({"page_size": 16.0}, TypeError, "page_size is a float, expected an int"),
    ({"page_size": 0}, ValueError, "page_size = 0, expected at least 1"),
    *(
        ({name: value}, ValueError, f"{name} = {value}, expected at most 1073741824")
        for name, value in {
            "num_qo_heads": 2**31,
            "num_kv_heads": 2**40,
            "head_dim_qk": np.int64(2**31),
            "head_dim_vo": 2**30 + 1,
            "page_size": 2**31,
            "fixed_split_size": 10**30,
        }.items()
    ),
    ({"causal": 1}, TypeError, "causal is an int, expected a bool"),
    ({"causal": None}, TypeError, "causal is a NoneType, expected a bool"),
    ({"disable_split_kv": "no"}, TypeError, "disable_split_kv is a str, expected a bool"),
    ({"non_blocking": "no"}, TypeError, "non_blocking is a str, expected a bool"),
    ({"non_blocking": 1}, TypeError, "non_blocking is an int, expected a bool"),
    ({"sm_scale": True}, TypeError, "sm_scale is a bool, expected a number"),
    ({"sm_scale": "1.5"}, TypeError, "sm_scale is a str, expected a number"),
    ({"sm_scale": "small"}, TypeError, "sm_scale is a str, expected a number"),
    ({"sm_scale": np.zeros(2)}, TypeError, "sm_scale is an ndarray, expected a number"),
    ({"sm_scale": np.array(True)}, TypeError, "sm_scale is an ndarray, expected a number"),
    ({"sm_scale": float("nan")}, ValueError, "sm_scale = nan, expected a finite number"),
    ({"sm_scale": float("-inf")}, ValueError, "sm_scale = -inf, expected a finite number"),
    ({"sm_scale": 10**400}, ValueError, "sm_scale = inf, expected a finite number"),
    (
        {"sm_scale": 1e300},
        ValueError,
        "sm_scale = 1e+300, expected at most 3.403e+38 in magnitude",
    ),
    (
        {"sm_scale": -1e39},
        ValueError,
        "sm_scale = -1e+39, expected at most 3.403e+38 in magnitude",
    ),
    ({"fixed_split_size": 2.5}, TypeError, "fixed_split_size is a float, expected an int"),
    ({"fixed_split_size": 0}, ValueError, "fixed_split_size = 0, expected at least 1"),
    (
        {"fixed_split_size": 2, "disable_split_kv": np.ones(2)},
        TypeError,
        "disable_split_kv is an ndarray, expected a bool",
    ),
    ({"fixed_split_size": -2}, ValueError, "fixed_split_size = -2, expected at least 1"),
    ({"fixed_split_size": -1.0}, TypeError, "fixed_split_size is a float, expected an int"),
    (
        {"fixed_split_size": np.ones(2)},
        TypeError,
        "fixed_split_size is an ndarray, expected an int",
    ),
    # Dtypes
    ({"q_data_type": "float64"}, TypeError, f"q_data_type = 'float64', {SERVED}"),
    ({"q_data_type": None}, TypeError, f"q_data_type = None, {SERVED}"),
    ({"q_data_type": np.int8}, TypeError, f"q_data_type = <class 'numpy.int8'>, {SERVED}"),
    ({"kv_data_type": "fp8"}, TypeError, f"kv_data_type = 'fp8', {SERVED}"),
    ({"o_data_type": "int4"}, TypeError, f"o_data_type = 'int4', {SERVED}"),
    (
        {"q_data_type": "float32"},
        NotImplementedError,
        "q_data_type = float32, served are float16, bfloat16",
    ),
    (
        {"q_data_type": "float8_e4m3fn", "kv_data_type": "float8_e4m3fn"},
        NotImplementedError,
        "q_data_type = float8_e4m3fn, served are float16, bfloat16",
    ),
    (
        {"q_data_type": ml_dtypes.bfloat16, "kv_data_type": np.float16},
        NotImplementedError,
        f"kv_data_type = float16, served are q_data_type = bfloat16 and {FLOAT8}",
    ),
    (
        {"o_data_type": np.dtype(np.float32)},
        NotImplementedError,
        "o_data_type = float32 differs from q_data_type = float16, which no backend serves",
    ),
    # Words
    (
        {"pos_encoding_mode": "ROPE"},
        ValueError,
        f"pos_encoding_mode = 'ROPE', {MODES}",
    ),
    ({"pos_encoding_mode": None}, TypeError, f"pos_encoding_mode is a NoneType, {MODES}"),
    ({"pos_encoding_mode": np.ones(2)}, TypeError, f"pos_encoding_mode is an ndarray, {MODES}"),
    # qo_indptr
    ({"qo_indptr": None}, TypeError, f"qo_indptr is None, {SPEAKS_DLPACK}"),
    ({"qo_indptr": 7}, TypeError, f"qo_indptr is an int, {SPEAKS_DLPACK}"),
    (
        {"qo_indptr": np.array([0.0, 3, 8, 9])},
        TypeError,
        "qo_indptr has dtype float64, expected int32 or int64",
    ),
    ({"qo_indptr": [0, 3.5]}, TypeError, "qo_indptr has dtype float64, expected int32 or int64"),
    ({"qo_indptr": [0, [3]]}, TypeError, "qo_indptr is a list of an int, expected ints"),
    (
        {"qo_indptr": np.array([0, 3, 8, 9], np.uint32)},
        TypeError,
        "qo_indptr has dtype uint32, expected int32 or int64",
    ),
    ({"qo_indptr": []}, ValueError, "qo_indptr has shape (0,), expected (batch + 1,)"),
    (
        {"qo_indptr": np.zeros((1, 4), np.int32)},
        ValueError,
        "qo_indptr has shape (1, 4), expected (batch + 1,)",
    ),
    ({"qo_indptr": ints(1, 3, 8, 9)}, ValueError, "qo_indptr[0] = 1, expected 0"),
    (
        {"qo_indptr": ints(0, 3, 2, 9)},
        ValueError,
        "qo_indptr[2] = 2 (end of request 1), expected at least 3 = qo_indptr[1]",
    ),
    (
        {"qo_indptr": ints(0, INT_MAX, -5, 9)},
        ValueError,
        f"qo_indptr[2] = -5 (end of request 1), expected at least {INT_MAX} = qo_indptr[1]",
    ),
    (
        {"qo_indptr": np.array([0, 3, 8, 2**40])},
        ValueError,
        f"qo_indptr[3] = 1099511627776, expected at most {INT_MAX}",
    ),
    (
        {"qo_indptr": ints(0, 3, 8, 2**28 + 1)},
        ValueError,
        "qo_indptr[3] = 268435457 query rows of 4 heads, "
        "expected at most 1073741824 rows times heads in a call",
    ),
    # paged_kv_indptr
    (
        {"paged_kv_indptr": np.array([0, 2, 3, 3], np.float32)},
        TypeError,
        "paged_kv_indptr has dtype float32, expected int32 or int64",
    ),
    ({"paged_kv_indptr": ints(-1, 2, 3, 3)}, ValueError, "paged_kv_indptr[0] = -1, expected 0"),
    (
        {"paged_kv_indptr": ints(0, 2, 3, 1)},
        ValueError,
        "paged_kv_indptr[3] = 1 (end of request 2), expected at least 3 = paged_kv_indptr[2]",
    ),
    (
        {"paged_kv_indptr": ints(0, 2, 3)},
        ValueError,
        "paged_kv_indptr has 3 entries, expected 4 = batch + 1: qo_indptr has 4 entries",
    ),
    (
        {"paged_kv_indptr": ints(0)},
        ValueError,
        "paged_kv_indptr has 1 entry, expected 4 = batch + 1: qo_indptr has 4 entries",
    ),
    (
        {"paged_kv_indptr": ints(0, 2, 3, 2**28), "paged_kv_last_page_len": ints(4, 16, 9)},
        ValueError,
        "paged_kv_indptr: request 2 has 268435453 pages of 16 tokens, "
        "expected at most 1073741824 tokens",
    ),
    (
        {"page_size": 2**30, "paged_kv_last_page_len": ints(4, 2**30, 0)},
        ValueError,
        "paged_kv_indptr: request 0 has 2 pages of 1073741824 tokens, "
        "expected at most 1073741824 tokens",
    ),
    (
        {"paged_kv_indptr": np.array([0, 2, 3, 2**31])},
        ValueError,
        f"paged_kv_indptr[3] = 2147483648, expected at most {INT_MAX}",
    ),
    # paged_kv_last_page_len
    (
        {"paged_kv_last_page_len": None},
        TypeError,
        f"paged_kv_last_page_len is None, {SPEAKS_DLPACK}",
    ),
    (
        {"paged_kv_last_page_len": ints(4, 16)},
        ValueError,
        "paged_kv_last_page_len has shape (2,), expected (3,): qo_indptr has 4 entries",
    ),
    (
        {"paged_kv_last_page_len": ints(4, 17, 0)},
        ValueError,
        "paged_kv_last_page_len[1] = 17, expected 1..16 (page_size=16)",
    ),
    (
        {"paged_kv_last_page_len": ints(0, 16, 0)},
        ValueError,
        "paged_kv_last_page_len[0] = 0, expected 1..16 (page_size=16)",
    ),
    (
        {"paged_kv_last_page_len": ints(4, 16, -1)},
        ValueError,
        "paged_kv_last_page_len[2] = -1, expected 0..16 (page_size=16)",
    ),
    (
        {"paged_kv_last_page_len": ints(4, 16, 17)},
        ValueError,
        "paged_kv_last_page_len[2] = 17, expected 0..16 (page_size=16)",
    ),
    # paged_kv_indices
    (
        {"paged_kv_indices": np.array([4, 1, 0], np.int16)},
        TypeError,
        "paged_kv_indices has dtype int16, expected int32 or int64",
    ),
    (
        {"paged_kv_indices": np.zeros((3, 1), np.int32)},
        ValueError,
        "paged_kv_indices has shape (3, 1), expected one axis",
    ),
    (
        {"paged_kv_indices": ints(4)},
        ValueError,
        "paged_kv_indices has 1 entry, expected at least 3 = paged_kv_indptr[-1]",
    ),
    (
        {"paged_kv_indices": ints(4, 1, -3)},
        ValueError,
        "paged_kv_indices[2] = -3 (request 1, its page 0), expected at least 0",
    ),
    (
        {"paged_kv_indices": np.array([4, 2**31, 0])},
        ValueError,
        f"paged_kv_indices[1] = 2147483648 (request 0, its page 1), expected at most {INT_MAX}",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), PLAN_ERRORS)
def test_plan_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    wrapper = Wrapper(backend="reference")
    check_error(error, message, wrapper.plan, **plan_arguments(**changes))
    check_error(RuntimeError, "run() before plan()", wrapper.run, **run_arguments())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kv_layout": "HDN"}, ValueError, f"kv_layout = 'HDN', {LAYOUTS}"),
        ({"kv_layout": None}, TypeError, f"kv_layout is a NoneType, {LAYOUTS}"),
        ({"kv_layout": np.ones(2)}, TypeError, f"kv_layout is an ndarray, {LAYOUTS}"),
        ({"backend": "fa4"}, ValueError, f"backend = 'fa4', {BACKENDS}"),
        ({"backend": None}, TypeError, f"backend is a NoneType, {BACKENDS}"),
        ({"backend": np.ones(2)}, TypeError, f"backend is an ndarray, {BACKENDS}"),
        (
            {"float_workspace_buffer": 1 << 20},
            TypeError,
            f"float_workspace_buffer is an int, {SPEAKS_DLPACK}",
        ),
        (
            {"float_workspace_buffer": np.zeros(100, np.uint8)[::2]},
            ValueError,
            "float_workspace_buffer is not contiguous, expected one piece of memory",
        ),
    ],
)
def test_constructor_errors(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    check_error(error, message, Wrapper, **arguments)


def test_dtypes_are_taken_in_any_form() -> None:
    for dtype in ("bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        wrapper = planned(q_data_type=dtype, kv_data_type="bfloat16", o_data_type=dtype)
        cache = pages(dtype=ml_dtypes.bfloat16)
        wrapper.run(np.zeros((9, 4, 64), ml_dtypes.bfloat16), (cache, cache))
    for dtype in ("float16", "half", np.float16, np.dtype(np.float16)):
        planned(q_data_type=dtype).run(**run_arguments())


@pytest.mark.parametrize(
    "changes", [PLAN_ERRORS[0][0], PLAN_ERRORS[-1][0], {"custom_mask": np.ones(3)}]
)
def test_a_plan_that_fails_leaves_the_earlier_one(
    rng: np.random.Generator, changes: dict[str, Any]
) -> None:
    batch = batches.build(rng, [3, 9], [20, 40], page_size=16, group=2)
    wrapper = Wrapper(backend="reference")
    batch.plan(wrapper)
    before = wrapper.run(batch.q, batch.cache)
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        wrapper.plan(**plan_arguments(**changes))
    assert before.tobytes() == wrapper.run(batch.q, batch.cache).tobytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": 0}, "causal is an int, expected a bool"),
        ({"num_kv_heads": 2.0}, "num_kv_heads is a float, expected an int"),
        ({"page_size": [16]}, "page_size is a list, expected an int"),
    ],
)
def test_a_call_like_one_that_was_planned_is_checked(changes: dict[str, Any], message: str) -> None:
    """Arguments are remembered; ones that equal them, and are of another type, are not theirs."""
    arguments = plan_arguments(num_kv_heads=2, page_size=16, causal=False)
    wrapper = Wrapper(backend="reference")
    wrapper.plan(**arguments)
    check_error(TypeError, message, wrapper.plan, **arguments | changes)


def test_a_scale_that_changes_in_place_is_read_again() -> None:
    scale = np.array(0.5)
    assert planned(sm_scale=scale)._plan.schedule.spec.sm_scale == 0.5
    scale[...] = 0.25
    assert planned(sm_scale=scale)._plan.schedule.spec.sm_scale == 0.25


def test_the_largest_numbers_are_taken() -> None:
    """One page that holds as many tokens as a call may have, and splits as long as that."""
    planned(
        page_size=2**30,
        paged_kv_indptr=ints(0, 1, 2, 2),
        paged_kv_last_page_len=ints(4, 2**30, 0),
        fixed_split_size=2**30,
        sm_scale=3.4e38,
    )


@pytest.mark.parametrize("one", [np.float32(0.5), np.array(0.5), np.array([[0.5]])])
def test_a_scale_may_be_an_array_of_one_element(one: Any) -> None:
    assert planned(sm_scale=one)._plan.schedule.spec.sm_scale == 0.5


@pytest.mark.parametrize("name", ["sm_scale", "logits_soft_cap", "rope_scale", "rope_theta"])
def test_a_tensor_of_one_number_is_read_anew(name: str) -> None:
    """PyTorch's are the same key of a dictionary whatever they hold."""
    torch = pytest.importorskip("torch")
    mode = {"pos_encoding_mode": "ROPE_LLAMA"} if name.startswith("rope") else {}
    value, wrapper = torch.tensor(30.0), Wrapper(backend="reference")
    for number in (30.0, 0.5):
        value.fill_(number)
        wrapper.plan([0, 1], [0, 1], [0], [1], 4, 2, 64, 16, **mode, **{name: value})
        assert getattr(wrapper._plan.spec, name) == number


def test_splits_as_flashinfers_callers_ask_for_them() -> None:
    """-1 fixes no size, and nothing is split where that is asked for too."""
    assert validate.plan_choices(-1, False, True) == (None, False, True)
    assert validate.plan_choices(3, True, True) == (None, True, True)
    assert validate.plan_choices(3, False, True) == (3, False, True)
