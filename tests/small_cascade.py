"""A small legal cascade, to change one argument of."""

from __future__ import annotations

from typing import Any

import numpy as np
from small_call import ints, pages

from cupaged.cascade import MultiLevelCascadeAttentionWrapper as Wrapper


def plan_arguments(**changes: Any) -> dict[str, Any]:
    """Two levels over pages of 16 tokens: groups of 2 and 1 requests; 3, 5 and 1 queries."""
    return {
        "qo_indptr_arr": [ints(0, 8, 9), ints(0, 3, 8, 9)],
        "paged_kv_indptr_arr": [ints(0, 2, 2), ints(0, 1, 2, 3)],
        "paged_kv_indices_arr": [ints(0, 1), ints(2, 3, 4)],
        "paged_kv_last_page_len": [ints(16, 0), ints(4, 16, 1)],
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "page_size": 16,
        **changes,
    }


def planned(**changes: Any) -> Wrapper:
    wrapper = Wrapper(2, backend="reference")
    wrapper.plan(**plan_arguments(**changes))
    return wrapper


def run_arguments(**changes: Any) -> dict[str, Any]:
    return {"q": np.zeros((9, 4, 64), np.float16), "paged_kv_cache": (pages(), pages()), **changes}


def of_level_1(name: str, array: Any) -> dict[str, Any]:
    return {name: [plan_arguments()[name][0], array]}
