"""Arguments of FlashInfer's that no backend serves yet, and how they are refused."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np

from cupaged.validate import what


class Arguments(NamedTuple):
    """Arguments of one call that aren't served.

    Attributes
    ----------
    call : str
        For the error.
    off : dict
        Each argument with the values that are off, the default first.
    defaults : tuple
        The first value of each.
    """

    call: str
    off: dict[str, tuple[object, ...]]
    defaults: tuple[object, ...]


def _arguments(call: str, **off: tuple[object, ...]) -> Arguments:
    return Arguments(call, off, tuple(values[0] for values in off.values()))


_MULTI_ITEM: dict[str, tuple[object, ...]] = {
    "prefix_len_ptr": (None,),
    "token_pos_in_items_ptr": (None,),
    "token_pos_in_items_len": (0,),
    "max_item_len_ptr": (None,),
}
_JIT: dict[str, tuple[object, ...]] = {"jit_args": (None,), "jit_kwargs": (None,)}

PREFILL_CONSTRUCTOR = _arguments("BatchPrefillWithPagedKVCacheWrapper", **_JIT)
PREFILL_PLAN = _arguments(
    "plan()",
    use_fp16_qk_reduction=(False,),
    **_MULTI_ITEM,
    seq_lens=(None,),
    seq_lens_q=(None,),
    block_tables=(None,),
    max_token_per_sequence=(None,),
    max_sequence_kv=(None,),
    uniform_q_len=(None,),
)
PREFILL_RUN = _arguments(
    "run()",
    lse_layout=("NH",),
    enable_pdl=(None, False),
    kv_cache_sf=(None,),
    skip_softmax_threshold_scale_factor=(None,),
    use_fp16_softmax=(None, False),
    uses_spcompress=(None, False),
)
FORWARD = _arguments("forward()", use_fp16_qk_reduction=(False,))
SINK_CONSTRUCTOR = _arguments(
    "BatchAttentionWithAttentionSinkWrapper", use_fp16_qk_reduction=(False,)
)
RAGGED_CONSTRUCTOR = _arguments("BatchPrefillWithRaggedKVCacheWrapper", **_JIT)
RAGGED_PLAN = _arguments(
    "plan()",
    use_fp16_qk_reduction=(False,),
    **_MULTI_ITEM,
    seq_lens=(None,),
    seq_lens_q=(None,),
    max_token_per_sequence=(None,),
    max_sequence_kv=(None,),
    v_indptr=(None,),
    o_indptr=(None,),
    uniform_q_len=(None,),
)
RAGGED_RUN = _arguments(
    "run()",
    o_scale=(None, 1.0),
    lse_layout=("NH",),
    enable_pdl=(None, False),
    kv_cache_sf=(None,),
)
DECODE_CONSTRUCTOR = _arguments("BatchDecodeWithPagedKVCacheWrapper", jit_args=(None,))
DECODE_PLAN = _arguments("plan()", block_tables=(None,), seq_lens=(None,), window_right=(0,))
DECODE_RUN = _arguments(
    "run()",
    enable_pdl=(None, False),
    kv_cache_sf=(None,),
    skip_softmax_threshold_scale_factor=(None,),
)
CASCADE_PLAN = _arguments("plan()", use_fp16_qk_reduction=(False,))
SINGLE_PREFILL = _arguments(
    "single_prefill_with_kv_cache()",
    scale_q=(None,),
    scale_k=(None,),
    scale_v=(None,),
    use_fp16_qk_reduction=(False,),
    kv_cache_sf=(None,),
)


def refuse(arguments: Arguments, values: tuple[Any, ...]) -> None:
    """Refuse a call's arguments that no backend serves.

    Parameters
    ----------
    arguments : Arguments
    values : tuple
        What came, in the same order.

    Raises
    ------
    NotImplementedError
        Names the argument.
    """
    if all(map(operator.is_, values, arguments.defaults)):
        return
    for (name, off), value in zip(arguments.off.items(), values, strict=True):
        plain = isinstance(value, (bool, int, float, str, np.number, np.bool_, type(None)))
        if not plain or value not in off:
            shown = repr(value) if plain else what(value)
            raise NotImplementedError(
                f"{arguments.call}: {name}={shown} is not served by any backend"
            )
