"""cupaged's batch decode."""

from __future__ import annotations

import functools
from typing import Any

from contender import Cupaged
from timing import Call
from workloads import PageTable, Workload


def queries_each(workload: Workload) -> int:
    """Query tokens of a request; all have as many."""
    (count,) = set(workload.qo_lens)
    return count


def decode_plan_call(wrapper: Any, workload: Workload, dtype: str, table: PageTable) -> Call:
    """A decode wrapper's `plan()` with its arguments, ready to be called again and again."""
    count = queries_each(workload)
    # Not every FlashInfer takes the argument, and for one query none needs it.
    several = {} if count == 1 else {"q_len_per_req": count}
    return functools.partial(
        wrapper.plan,
        table.kv_indptr,
        table.kv_indices,
        table.last_page_len,
        workload.num_qo_heads,
        workload.num_kv_heads,
        workload.head_dim,
        workload.page_size,
        q_data_type=dtype,
        **several,
    )


class CupagedDecode(Cupaged):
    """The library's decode wrapper."""

    wrapper = "BatchDecodeWithPagedKVCacheWrapper"
    plan_call = staticmethod(decode_plan_call)
