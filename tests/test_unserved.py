"""Arguments of FlashInfer's that no backend serves: none is ignored in silence."""

from __future__ import annotations

import inspect
from typing import Any

import decode_calls
import numpy as np
import pytest
import ragged_calls
from decode_calls import Decode
from small_call import (
    Wrapper,
    check_error,
    ints,
    plan_arguments,
    planned,
    run_arguments,
)

CONSTRUCTOR_UNSERVED: dict[str, tuple[Any, str]] = {
    "jit_args": ([1], "a list"),
    "jit_kwargs": ({"a": 1}, "a dict"),
}
PLAN_UNSERVED: dict[str, tuple[Any, str]] = {
    "use_fp16_qk_reduction": (True, "True"),
    "prefix_len_ptr": (ints(0), "an ndarray"),
    "token_pos_in_items_ptr": (ints(0), "an ndarray"),
    "token_pos_in_items_len": (4, "4"),
    "max_item_len_ptr": (ints(0), "an ndarray"),
    "seq_lens": (ints(0), "an ndarray"),
    "seq_lens_q": (ints(0), "an ndarray"),
    "block_tables": (ints(0), "an ndarray"),
    "max_token_per_sequence": (8, "8"),
    "max_sequence_kv": (8, "8"),
    "uniform_q_len": (8, "8"),
}
RUN_UNSERVED: dict[str, tuple[Any, str]] = {
    "lse_layout": ("HN", "'HN'"),
    "enable_pdl": (True, "True"),
    "kv_cache_sf": (np.zeros(4, np.uint8), "an ndarray"),
    "skip_softmax_threshold_scale_factor": (1.0, "1.0"),
    "use_fp16_softmax": (True, "True"),
    "uses_spcompress": (True, "True"),
}

DECODE_CONSTRUCTOR_UNSERVED: dict[str, tuple[Any, str]] = {"jit_args": ([1], "a list")}
DECODE_PLAN_UNSERVED: dict[str, tuple[Any, str]] = {
    "window_right": (1, "1"),
    "block_tables": (ints(0), "an ndarray"),
    "seq_lens": (ints(0), "an ndarray"),
}
DECODE_RUN_UNSERVED: dict[str, tuple[Any, str]] = {
    "enable_pdl": (True, "True"),
    "skip_softmax_threshold_scale_factor": (1.0, "1.0"),
    "kv_cache_sf": (np.zeros(4, np.uint8), "an ndarray"),
}
RAGGED_CONSTRUCTOR_UNSERVED = CONSTRUCTOR_UNSERVED
RAGGED_PLAN_UNSERVED: dict[str, tuple[Any, str]] = {
    **{name: row for name, row in PLAN_UNSERVED.items() if name != "block_tables"},
    "v_indptr": (ints(0), "an ndarray"),
    "o_indptr": (ints(0), "an ndarray"),
}
RAGGED_RUN_UNSERVED: dict[str, tuple[Any, str]] = {
    "o_scale": (0.5, "0.5"),
    "lse_layout": ("HN", "'HN'"),
    "enable_pdl": (True, "True"),
    "kv_cache_sf": (np.zeros(4, np.uint8), "an ndarray"),
}
#: Served by the constructors, and checked in test_graph_buffers.py.
MASK_BUFFERS = {"custom_mask_buf", "mask_indptr_buf"}
GRAPHS = {"use_cuda_graph", "max_batch_size", "max_num_pages"}
#: Served by every `plan()`, and by all but decoding's.
FEATURES = {"window_left", "logits_soft_cap", "pos_encoding_mode", "rope_scale", "rope_theta"}
MASKS = {"custom_mask", "packed_custom_mask"}
DTYPES = {"q_data_type", "kv_data_type", "o_data_type"}
PLANNING = {"sm_scale", "non_blocking", "fixed_split_size", "disable_split_kv"} | DTYPES
RUNNING = {"q", "q_scale", "k_scale", "v_scale", "out", "lse", "return_lse", "lse_base"}
RUNNING |= {"window_left", "sinks"}
PREFILL_NAMES = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
DECODE_NAMES = ("indptr", "indices", "last_page_len")


def check_unserved(where: str, name: str, row: tuple[Any, str], call: Any, **others: Any) -> None:
    value, words = row
    message = f"{where}: {name}={words} is not served by any backend"
    check_error(NotImplementedError, message, call, **others, **{name: value})


@pytest.mark.parametrize(("name", "row"), CONSTRUCTOR_UNSERVED.items())
def test_unserved_by_the_constructor(name: str, row: tuple[Any, str]) -> None:
    check_unserved(Wrapper.__name__, name, row, Wrapper)


@pytest.mark.parametrize(("name", "row"), PLAN_UNSERVED.items())
def test_unserved_by_plan(name: str, row: tuple[Any, str]) -> None:
    check_unserved("plan()", name, row, planned)


@pytest.mark.parametrize(("name", "row"), RUN_UNSERVED.items())
def test_unserved_by_run(name: str, row: tuple[Any, str]) -> None:
    out = np.full((9, 4, 64), 7, np.float16)
    check_unserved("run()", name, row, planned().run, **run_arguments(out=out))
    assert (out == 7).all()


@pytest.mark.parametrize(("name", "row"), DECODE_CONSTRUCTOR_UNSERVED.items())
def test_unserved_by_decodes_constructor(name: str, row: tuple[Any, str]) -> None:
    check_unserved(Decode.__name__, name, row, Decode)


@pytest.mark.parametrize(("name", "row"), DECODE_PLAN_UNSERVED.items())
def test_unserved_by_decodes_plan(name: str, row: tuple[Any, str]) -> None:
    check_unserved("plan()", name, row, decode_calls.small_plan)


@pytest.mark.parametrize(("name", "row"), DECODE_RUN_UNSERVED.items())
def test_unserved_by_decodes_run(name: str, row: tuple[Any, str]) -> None:
    out = np.full((3, 4, 64), 7, np.float16)
    arguments = decode_calls.run_arguments(q=np.zeros((3, 4, 64), np.float16), out=out)
    check_unserved("run()", name, row, decode_calls.small_plan().run, **arguments)
    assert (out == 7).all()


@pytest.mark.parametrize(("name", "row"), RAGGED_CONSTRUCTOR_UNSERVED.items())
def test_unserved_by_the_ragged_constructor(name: str, row: tuple[Any, str]) -> None:
    check_unserved(ragged_calls.Wrapper.__name__, name, row, ragged_calls.Wrapper)


@pytest.mark.parametrize(("name", "row"), RAGGED_PLAN_UNSERVED.items())
def test_unserved_by_the_ragged_plan(name: str, row: tuple[Any, str]) -> None:
    check_unserved("plan()", name, row, ragged_calls.planned)


@pytest.mark.parametrize(("name", "row"), RAGGED_RUN_UNSERVED.items())
def test_unserved_by_the_ragged_run(name: str, row: tuple[Any, str]) -> None:
    out = np.full((9, 4, 64), 7, np.float16)
    arguments = ragged_calls.run_arguments(out=out)
    check_unserved("run()", name, row, ragged_calls.planned().run, **arguments)
    assert (out == 7).all()


def check_known(wrapper: type, served: dict[str, set[str]]) -> None:
    """The methods have exactly these arguments."""
    for method, names in served.items():
        parameters = set(inspect.signature(getattr(wrapper, method)).parameters) - {"self"}
        assert parameters == names, method


def test_no_argument_is_ignored() -> None:
    """Every argument is served, checked above, or one that these lists know."""
    served = {
        "__init__": {"float_workspace_buffer", "kv_layout", "backend"}
        | (GRAPHS | MASK_BUFFERS)
        | {f"{name}_buf" for name in PREFILL_NAMES}
        | set(CONSTRUCTOR_UNSERVED),
        "plan": set(plan_arguments())
        | (PLANNING | FEATURES | MASKS | {"head_dim_vo", "causal"})
        | set(PLAN_UNSERVED),
        "run": RUNNING | {"paged_kv_cache"} | set(RUN_UNSERVED),
    }
    check_known(Wrapper, served)


def test_no_argument_of_decode_is_ignored() -> None:
    served = {
        "__init__": {"float_workspace_buffer", "kv_layout", "backend", "use_tensor_cores"}
        | GRAPHS
        | {f"paged_kv_{name}_buffer" for name in DECODE_NAMES}
        | set(DECODE_CONSTRUCTOR_UNSERVED),
        "plan": set(decode_calls.plan_arguments())
        | (PLANNING | FEATURES | {"data_type", "q_len_per_req"})
        | set(DECODE_PLAN_UNSERVED),
        "run": RUNNING | {"paged_kv_cache", "q_len_per_req"} | set(DECODE_RUN_UNSERVED),
    }
    check_known(Decode, served)


def test_no_argument_of_the_ragged_wrapper_is_ignored() -> None:
    served = {
        "__init__": {"float_workspace_buffer", "kv_layout", "backend", "use_cuda_graph"}
        | (MASK_BUFFERS | {"qo_indptr_buf", "kv_indptr_buf", "max_batch_size"})
        | set(RAGGED_CONSTRUCTOR_UNSERVED),
        "plan": set(ragged_calls.plan_arguments())
        | (PLANNING | FEATURES | MASKS | {"head_dim_vo", "causal"})
        | set(RAGGED_PLAN_UNSERVED),
        "run": RUNNING | {"k", "v"} | set(RAGGED_RUN_UNSERVED),
    }
    check_known(ragged_calls.Wrapper, served)


def test_what_is_off_in_flashinfer_is_served() -> None:
    """Values that FlashInfer's users pass and that ask for nothing."""
    Wrapper(use_cuda_graph=False)
    wrapper = planned(
        logits_soft_cap=0.0,
        window_left=-1,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        custom_mask=None,
        rope_scale=None,
        token_pos_in_items_len=0,
        non_blocking=False,
    )
    wrapper.run(**run_arguments(window_left=-1, enable_pdl=False, lse_layout="NH", sinks=None))
    ragged = ragged_calls.planned(logits_soft_cap=0.0, use_fp16_qk_reduction=False, v_indptr=None)
    ragged.run(**ragged_calls.run_arguments(o_scale=1.0, enable_pdl=False, kv_cache_sf=None))


def test_what_is_off_in_flashinfers_decode_is_served() -> None:
    Decode(use_cuda_graph=False, use_tensor_cores=True, paged_kv_indptr_buffer=None, jit_args=None)
    wrapper = decode_calls.small_plan(
        logits_soft_cap=0.0,
        window_left=-1,
        pos_encoding_mode="NONE",
        rope_scale=None,
        block_tables=None,
        data_type=None,
        non_blocking=False,
    )
    q = np.zeros((3, 4, 64), np.float16)
    wrapper.run(
        **decode_calls.run_arguments(q=q, window_left=-1, enable_pdl=False, q_len_per_req=1)
    )
