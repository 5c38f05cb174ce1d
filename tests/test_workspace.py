"""The caller's workspace on the host: its size, and when another one is taken."""

from __future__ import annotations

import batches
import numpy as np
import oracle
import pytest
from oracle import Formula
from producers import Producer
from small_call import (
    Wrapper,
    check_error,
    ints,
    plan_arguments,
)


def test_another_workspace_is_taken_by_the_next_plan_alone(rng: np.random.Generator) -> None:
    """What was planned keeps its own, also where a later plan is refused."""
    batch = batches.build(rng, [40, 1], [500, 300], group=2)
    wrapper = Wrapper(np.zeros(1 << 22, np.uint8), backend="reference")
    batch.plan(wrapper, fixed_split_size=3)
    oracle.check_all(batch, Formula(), *wrapper.run(batch.q, batch.cache, return_lse=True))
    needed = wrapper._plan.schedule.workspace_bytes
    wrapper.reset_workspace_buffer(np.zeros(8, np.uint8))
    for _ in range(2):
        oracle.check_all(batch, Formula(), *wrapper.run(batch.q, batch.cache, return_lse=True))
        check_error(
            ValueError,
            f"float_workspace_buffer has 8 bytes, expected at least {needed}: "
            "the plan's partial states take that much",
            batch.plan,
            wrapper,
            fixed_split_size=3,
        )


def test_a_refused_workspace_leaves_the_earlier_one() -> None:
    first = np.zeros(10, np.uint8)
    wrapper = Wrapper(first, backend="reference")
    with pytest.raises(TypeError, match=r"^float_workspace_buffer is an int, expected an array"):
        wrapper.reset_workspace_buffer(5)
    assert wrapper._workspace is first


def test_a_workspace_too_small_says_how_many_bytes() -> None:
    """One request of 6 pages, split by 2: 3 partial states of 16 rows for each of 2 KV heads."""
    lengths = {
        "qo_indptr": ints(0, 1),
        "paged_kv_indptr": ints(0, 6),
        "paged_kv_indices": ints(0, 1, 2, 3, 4, 5),
        "paged_kv_last_page_len": ints(9),
        "fixed_split_size": 2,
    }
    needed = 3 * 2 * 16 * (64 + 1) * 4
    wrapper = Wrapper(np.zeros(needed - 1, np.uint8), backend="reference")
    check_error(
        ValueError,
        f"float_workspace_buffer has {needed - 1} bytes, expected at least {needed}: "
        "the plan's partial states take that much",
        wrapper.plan,
        **plan_arguments(**lengths),
    )
    wrapper.reset_workspace_buffer(np.zeros(needed // 4, np.float32))
    wrapper.plan(**plan_arguments(**lengths))
    wrapper.reset_workspace_buffer(None)
    wrapper.plan(**plan_arguments(**lengths))


def test_a_workspace_that_can_t_be_written_is_refused() -> None:
    memory = np.zeros(1 << 10, np.uint8)
    memory.flags.writeable = False
    message = "float_workspace_buffer is a read-only array, expected one that can be written"
    behind_dlpack = Producer(memory, 1, 8, version=(1, 0), read_only=True)
    for given in (memory, behind_dlpack):
        check_error(ValueError, message, Wrapper, given, backend="reference")
    first = np.zeros(10, np.uint8)
    wrapper = Wrapper(first, backend="reference")
    check_error(ValueError, message, wrapper.reset_workspace_buffer, memory)
    assert wrapper._workspace is first


def test_a_workspace_of_jax_is_refused() -> None:
    jnp = pytest.importorskip("jax.numpy")
    message = (
        "float_workspace_buffer is a JAX array, which is immutable: omit it, or give memory of "
        "CuPy, PyTorch or NumPy"
    )
    check_error(TypeError, message, Wrapper, jnp.zeros(10), backend="reference")
