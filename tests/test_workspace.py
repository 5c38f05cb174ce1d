"""The caller's workspace on the host: its size, and when another one is taken."""

from __future__ import annotations

import numpy as np
from small_call import (
    Wrapper,
    check_error,
    ints,
    plan_arguments,
)


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
