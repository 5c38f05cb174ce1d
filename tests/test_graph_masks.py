"""Masks and ragged keys under CUDA graphs: the constructors' buffers, and what plans write."""

from __future__ import annotations

from typing import Any

import decode_calls
import numpy as np
import pytest
from machine import Machine, install, ndarray
from ragged_calls import Wrapper as Ragged
from ragged_calls import plan_arguments as ragged_arguments
from small_call import SPEAKS_DLPACK, Wrapper, check_error, ints, plan_arguments
from test_graph_buffers import OWN, buffers_of
from test_graph_plans import PLAN_FIELDS, record

import cupaged
from cupaged.variant_tables import mask_tables

#: Bits of each request's mask in the small call.
SIZES = (60, 80, 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return install(monkeypatch)


def mask_buffers(size: int = 40, batch: int = 3, **changes: Any) -> dict[str, Any]:
    bits, begins = np.full(size, 0xA5, np.uint8), np.full(batch + 1, -7, np.int32)
    return {"custom_mask_buf": ndarray(bits), "mask_indptr_buf": ndarray(begins), **changes}


def ragged_buffers(batch: int = 3, **changes: Any) -> dict[str, Any]:
    return {
        "qo_indptr_buf": ndarray(np.full(batch + 1, -7, np.int32)),
        "kv_indptr_buf": ndarray(np.full(batch + 1, -7, np.int32)),
        **changes,
    }


KINDS: list[tuple[type, Any, Any]] = [
    (Wrapper, plan_arguments, lambda: dict(OWN)),
    (Wrapper, plan_arguments, lambda: buffers_of(Wrapper)),
    (Ragged, ragged_arguments, lambda: {"max_batch_size": 3}),
    (Ragged, ragged_arguments, ragged_buffers),
]
every_kind = pytest.mark.parametrize(("kind", "arguments", "sizes"), KINDS)


def packed(mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Each request's bits from a byte on, and where they begin."""
    parts = np.split(mask, np.cumsum(SIZES)[:-1])
    bits = [np.packbits(part, bitorder="little") for part in parts]
    return np.concatenate(bits), np.cumsum([0, *map(len, bits)]).tolist()


@every_kind
def test_a_plan_writes_its_mask_where_kernels_read_it(
    machine: Machine, rng: np.random.Generator, kind: type, arguments: Any, sizes: Any
) -> None:
    buffers = mask_buffers()
    bits, begins = buffers.values()
    wrapper = kind(use_cuda_graph=True, **sizes(), **buffers)
    places = set()
    for _ in range(3):
        mask = rng.random(sum(SIZES)) < 0.5
        wrapper.plan(**arguments(custom_mask=mask))
        expected, indptr = packed(mask)
        np.testing.assert_array_equal(bits.get()[: len(expected)], expected)
        assert (bits.get()[20:] == 0xA5).all()
        assert begins.get().tolist() == indptr
        for launch in wrapper._plan.on_device(0).launches:
            params = dict(zip(PLAN_FIELDS, launch.parameters, strict=True))
            assert (params["mask_bits"], params["mask_begin"]) == (bits.data.ptr, begins.data.ptr)
            places.add(params["seen_keys"])
            seen = mask_tables(wrapper._plan.schedule)["seen_keys"]
            np.testing.assert_array_equal(machine.read(params["seen_keys"], "i4", len(seen)), seen)
    assert len(places) == 1


@every_kind
def test_a_mask_without_buffers_or_with_small_ones(
    machine: Machine, kind: type, arguments: Any, sizes: Any
) -> None:
    mask = np.ones(sum(SIZES), np.bool_)
    message = (
        "a custom mask with use_cuda_graph=True: expected custom_mask_buf and mask_indptr_buf, "
        "which the constructor takes"
    )
    wrapper = kind(use_cuda_graph=True, **sizes())
    check_error(ValueError, message, wrapper.plan, **arguments(custom_mask=mask))
    wrapper.plan(**arguments())
    message = (
        "the custom mask takes 20 bytes, packed into words of 4, expected at most 19: "
        "custom_mask_buf has so many"
    )
    wrapper = kind(use_cuda_graph=True, **sizes(), **mask_buffers(19))
    check_error(ValueError, message, wrapper.plan, **arguments(custom_mask=mask))
    kind(use_cuda_graph=True, **sizes(), **mask_buffers(20)).plan(**arguments(custom_mask=mask))


@every_kind
def test_a_recorded_run_stays_with_its_features(
    machine: Machine, kind: type, arguments: Any, sizes: Any
) -> None:
    wrapper = kind(use_cuda_graph=True, **sizes(), **mask_buffers())
    wrapper.plan(**arguments(window_left=9, logits_soft_cap=30.0, kv_data_type="float8_e5m2"))
    record(machine, wrapper, 9, 36)
    held = {"window_left": 9, "logits_soft_cap": 30.0, "kv_data_type": "float8_e5m2"}
    recorded = "run() was recorded in a CUDA graph with it"
    for changes, message in (
        ({"window_left": -1}, "window_left = -1, expected 9"),
        ({"logits_soft_cap": None}, "logits_soft_cap = 0.0, expected 30.0"),
        ({"kv_data_type": None}, "kv_data_type = float16, expected float8_e5m2"),
        ({"head_dim_qk": 128}, "head_dim_qk = 128, expected 64"),
        ({"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode = ALIBI, expected NONE"),
        ({"custom_mask": np.ones(sum(SIZES))}, None),
    ):
        if message is None:
            changes = {"custom_mask": np.ones(sum(SIZES), np.bool_)}
            message = "custom_mask = True, expected False"
        given = arguments(**held | changes)
        check_error(ValueError, f"{message}: {recorded}", wrapper.plan, **given)
    wrapper.plan(**arguments(**held))


def test_what_is_no_buffer_for_masks(machine: Machine) -> None:
    on_host = "is on the host, expected a CUDA device: use_cuda_graph=True"
    table: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"custom_mask_buf": None},
            ValueError,
            "custom_mask_buf is missing: expected custom_mask_buf and mask_indptr_buf, or neither",
        ),
        (
            {"mask_indptr_buf": None},
            ValueError,
            "mask_indptr_buf is missing: expected custom_mask_buf and mask_indptr_buf, or neither",
        ),
        ({"custom_mask_buf": 3}, TypeError, f"custom_mask_buf is an int, {SPEAKS_DLPACK}"),
        ({"custom_mask_buf": np.zeros(9, np.uint8)}, ValueError, f"custom_mask_buf {on_host}"),
        ({"mask_indptr_buf": ints(0, 0, 0, 0)}, ValueError, f"mask_indptr_buf {on_host}"),
        (
            {"custom_mask_buf": ndarray(ints(0, 0))},
            TypeError,
            "custom_mask_buf has dtype int32, expected uint8",
        ),
        (
            {"mask_indptr_buf": ndarray(np.zeros(4, np.int64))},
            TypeError,
            "mask_indptr_buf has dtype int64, expected int32",
        ),
        (
            {"custom_mask_buf": ndarray(np.zeros((2, 4), np.uint8))},
            ValueError,
            "custom_mask_buf has shape (2, 4), expected one contiguous axis",
        ),
    ]
    for kind, _, sizes in KINDS:
        for changes, error, message in table:
            arguments = sizes() | mask_buffers(**changes)
            check_error(error, message, kind, use_cuda_graph=True, **arguments)
        given = mask_buffers(batch=2)
        why = "the buffers are for 3 requests"
        if "max_batch_size" in sizes():
            why = "max_batch_size = 3"
        message = f"mask_indptr_buf has 3 entries, expected 4: {why}"
        check_error(ValueError, message, kind, use_cuda_graph=True, **sizes(), **given)
        there = ndarray(np.zeros(4, np.int32), device=1)
        beside = "custom_mask_buf" if "max_batch_size" in sizes() else "the page table"
        message = f"mask_indptr_buf is on cuda:1, expected cuda:0 as {beside} is"
        given = mask_buffers(mask_indptr_buf=there)
        check_error(ValueError, message, kind, use_cuda_graph=True, **sizes(), **given)
        message = "custom_mask_buf is given, which takes effect with use_cuda_graph=True"
        check_error(ValueError, message, kind, **mask_buffers())


# Ragged keys


def test_a_ragged_plan_writes_its_buffers(machine: Machine) -> None:
    """The page table is `kv_indptr` itself: each request's page begins at its first row."""
    for buffers in ({"max_batch_size": 3}, ragged_buffers()):
        wrapper = Ragged(use_cuda_graph=True, **buffers)
        for kv_indptr in ([0, 20, 36, 36], [0, 0, 5, 90]):
            wrapper.plan(**ragged_arguments(kv_indptr=kv_indptr))
            for launch in wrapper._plan.on_device(0).launches:
                params = dict(zip(PLAN_FIELDS, launch.parameters, strict=True))
                table = params["page_indices"]
                if "kv_indptr_buf" in buffers:
                    assert table == buffers["kv_indptr_buf"].data.ptr
                    assert buffers["kv_indptr_buf"].get().tolist() == kv_indptr
                    assert buffers["qo_indptr_buf"].get().tolist() == [0, 3, 8, 9]
                else:
                    assert machine.read(table, np.int32, 4).tolist() == kv_indptr


def test_ragged_plans_that_do_not_fit(machine: Machine) -> None:
    wrapper = Ragged(use_cuda_graph=True, **ragged_buffers())
    wrapper.plan(**ragged_arguments())
    record(machine, wrapper, 9, 40)
    wrapper.plan(**ragged_arguments(kv_indptr=ints(0, 20, 40, 40)))
    message = (
        "kv_indptr[-1] = 41, expected at most 40: run() was recorded in a CUDA graph with so many "
        "rows of k"
    )
    given = ragged_arguments(kv_indptr=ints(0, 20, 40, 41))
    check_error(ValueError, message, wrapper.plan, **given)
    message = (
        "kv_indptr has 5 entries, expected at most 4: the buffers of use_cuda_graph=True are for "
        "3 requests"
    )
    five = ints(0, 1, 2, 3, 4)
    given = ragged_arguments(qo_indptr=five, kv_indptr=five)
    check_error(ValueError, message, wrapper.plan, **given)


def test_under_a_graph_k_and_v_may_have_more_rows(machine: Machine) -> None:
    wrapper = Ragged(use_cuda_graph=True, max_batch_size=3)
    wrapper.plan(**ragged_arguments())
    q, k = np.zeros((9, 4, 64), np.float16), np.zeros((50, 2, 64), np.float16)
    message = "k has 35 rows, expected at least 36 = kv_indptr[-1]"
    check_error(ValueError, message, wrapper.run, q, k[:35], k)
    message = "q is on the host, expected a CUDA device: use_cuda_graph=True"
    check_error(ValueError, message, wrapper.run, q, k, k)


def test_what_is_no_buffer_of_ragged_keys(machine: Machine) -> None:
    both = "qo_indptr_buf and kv_indptr_buf"
    table: list[tuple[dict[str, Any], str]] = [
        (
            {},
            f"use_cuda_graph=True without max_batch_size: expected {both}; or max_batch_size, for "
            "buffers of the library's own",
        ),
        ({"max_batch_size": 0}, "max_batch_size = 0, expected at least 1"),
        (
            ragged_buffers(kv_indptr_buf=None),
            f"kv_indptr_buf is missing: expected {both}, or none of them",
        ),
        (
            ragged_buffers(max_batch_size=3),
            "max_batch_size is given beside buffers, whose lengths say as much",
        ),
        (
            ragged_buffers(qo_indptr_buf=ndarray(ints(0, 0, 0))),
            "qo_indptr_buf has 3 entries and kv_indptr_buf 4, expected the same: "
            "max_batch_size + 1",
        ),
        (
            ragged_buffers(qo_indptr_buf=ndarray(np.zeros(4, np.int32), device=1)),
            "qo_indptr_buf is on cuda:1, expected cuda:0 as kv_indptr_buf is",
        ),
        (
            {"max_batch_size": 3, "backend": "reference"},
            "use_cuda_graph=True with backend='reference', which launches nothing",
        ),
    ]
    for arguments, message in table:
        check_error(ValueError, message, Ragged, use_cuda_graph=True, **arguments)
    message = "qo_indptr_buf is given, which takes effect with use_cuda_graph=True"
    check_error(ValueError, message, Ragged, **ragged_buffers())


def test_forward_changes_no_plan_of_a_graph(machine: Machine) -> None:
    wrapper = Wrapper(use_cuda_graph=True, **OWN)
    wrapper.plan(**plan_arguments())
    plan = wrapper._plan
    message = (
        "forward() with other arguments than plan(): with use_cuda_graph=True, give them to plan()"
    )
    check_error(ValueError, message, wrapper.forward, None, None, causal=True)
    check_error(TypeError, f"q is None, {SPEAKS_DLPACK}", wrapper.forward, None, None, causal=False)
    assert wrapper._plan is plan


def test_flashinfers_decoding_wrapper_for_graphs(machine: Machine) -> None:
    buffers = list(buffers_of(decode_calls.Decode).values())
    workspace = ndarray(np.zeros(1 << 20, np.uint8))
    wrapper = cupaged.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        workspace, *buffers, "HND", use_tensor_cores=True
    )
    assert wrapper.is_cuda_graph_enabled
    assert wrapper.kv_layout == "HND"
    wrapper.plan(**decode_calls.plan_arguments())
    assert buffers[1].get()[:3].tolist() == [4, 1, 0]
