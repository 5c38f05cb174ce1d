"""Every check of `plan()`'s arguments but the index arrays, and how each one is worded."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np

from cupaged.spec import (
    FLOAT8_DTYPES,
    POS_ENCODING_MODES,
    SERVED_DTYPES,
    SERVED_HEAD_DIMS,
    AttentionSpec,
    KVLayout,
    PosEncodingMode,
)

_MAX_INT = 2**30
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MAX_FACTOR = _MAX_FLOAT32 / 2
_MIN_FLOAT32 = float(np.finfo(np.float32).tiny)


def positive_int(value: object, name: str) -> int:
    """`value` as an int of 1 to 2^30.

    Raises
    ------
    TypeError, ValueError
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {what(value)}, expected an int")
    if value < 1:
        raise ValueError(f"{name} = {value}, expected at least 1")
    if value > _MAX_INT:
        raise ValueError(f"{name} = {value}, expected at most {_MAX_INT}")
    return int(value)


def flag(value: object, name: str) -> bool:
    """`value` as a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {what(value)}, expected a bool")
    return bool(value)


def scale(value: object, name: str, highest: float = _MAX_FLOAT32) -> float:
    """`value`, a number or an array of one element, as a finite number of float32's range.

    Its magnitude is `highest` at most.
    """
    try:
        # An array's own; of more than one element there is none.
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, (str, bytes, bool)):
            raise TypeError
        number = float(number)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {what(value)}, expected a number") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} = {number}, expected a finite number")
    if abs(number) > highest:
        raise ValueError(f"{name} = {number}, expected at most {highest:.4g} in magnitude")
    return number


def factor(value: object, name: str) -> float:
    """`value` as a number that float32 can hold times log2(e): the kernels work in base 2."""
    return scale(value, name, _MAX_FACTOR)


def logit_scale(sm_scale: float, q_scale: object, k_scale: object) -> float:
    """What multiplies `q·k`, checked in all."""
    product = sm_scale
    if q_scale is not None:
        product *= scale(q_scale, "q_scale")
    if k_scale is not None:
        product *= scale(k_scale, "k_scale")
    return factor(product, "sm_scale * q_scale * k_scale")


def choice(value: object, name: str, choices: tuple[str, ...]) -> str:
    """`value` as one of `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {what(value)}, expected one of {_quoted(choices)}")
    if value not in choices:
        raise ValueError(f"{name} = {value!r}, expected one of {_quoted(choices)}")
    return value


class Features(NamedTuple):
    """Arguments of `plan()` that are off by default, as the caller gave them."""

    window_left: object = -1
    logits_soft_cap: object = None
    pos_encoding_mode: object = "NONE"
    rope_scale: object = None
    rope_theta: object = None
    custom_mask: bool = False  # whether there is one


_PLAIN = Features()
#: Kinds of features that stay what they are; a tensor of one number may be another the next time.
_FIXED = (type(None), int, float, str, np.generic)


def attention_spec(
    num_qo_heads: object,
    num_kv_heads: object,
    head_dim_qk: object,
    head_dim_vo: object,
    page_size: object,
    causal: object,
    sm_scale: object,
    dtypes: tuple[str, str, str],
    kv_layout: KVLayout,
    head_dim_name: str,
    features: Features = _PLAIN,
) -> AttentionSpec:
    """Check what an attention call is, apart from its lengths.

    `dtypes` names those of q, of K and V, and of the output; `head_dim_name` is what the call calls
    `head_dim_qk`.
    """
    if sm_scale is not None:
        sm_scale = scale(sm_scale, "sm_scale")
    arguments = (
        *(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, causal),
        *(sm_scale, dtypes, kv_layout, head_dim_name, *features),
    )
    _, cap, _, rope_scale, rope_theta, _ = features
    if (
        isinstance(cap, _FIXED)
        and isinstance(rope_scale, _FIXED)
        and isinstance(rope_theta, _FIXED)
    ):
        try:
            return _known_spec(*arguments)
        except TypeError:
            pass  # a wrong type; where it can't be hashed, that is yet to be said
    return _attention_spec(*arguments)


def _attention_spec(
    num_qo_heads: object,
    num_kv_heads: object,
    head_dim_qk: object,
    head_dim_vo: object,
    page_size: object,
    causal: object,
    sm_scale: float | None,
    dtypes: tuple[str, str, str],
    kv_layout: KVLayout,
    head_dim_name: str,
    *given: Any,
) -> AttentionSpec:
    features = Features(*given)
    qo_heads = positive_int(num_qo_heads, "num_qo_heads")
    kv_heads = positive_int(num_kv_heads, "num_kv_heads")
    head_dim = positive_int(head_dim_qk, head_dim_name)
    head_dim_out = head_dim if head_dim_vo is None else positive_int(head_dim_vo, "head_dim_vo")
    if qo_heads % kv_heads:
        raise ValueError(
            f"num_qo_heads = {qo_heads}, expected a multiple of num_kv_heads = {kv_heads}"
        )
    if (head_dim, head_dim_out) not in SERVED_HEAD_DIMS:
        _refuse_head_dims(head_dim, head_dim_out, head_dim_name)
    q_dtype, kv_dtype, o_dtype = dtypes
    if q_dtype not in SERVED_DTYPES:
        raise NotImplementedError(f"q_data_type = {q_dtype}, served are {_listed(SERVED_DTYPES)}")
    if kv_dtype != q_dtype and kv_dtype not in FLOAT8_DTYPES:
        raise NotImplementedError(
            f"kv_data_type = {kv_dtype}, served are q_data_type = {q_dtype} and "
            f"{_listed(FLOAT8_DTYPES)}"
        )
    if o_dtype != q_dtype:
        raise NotImplementedError(
            f"o_data_type = {o_dtype} differs from q_data_type = {q_dtype}, which no backend serves"
        )
    mode = choice(features.pos_encoding_mode, "pos_encoding_mode", POS_ENCODING_MODES)
    rope_scale, rope_theta = (
        default if value is None else _positive(value, name, mode)
        for value, name, default in (
            (features.rope_scale, "rope_scale", 1.0),
            (features.rope_theta, "rope_theta", 1e4),
        )
    )
    soft_cap = 0.0
    if features.logits_soft_cap is not None:
        soft_cap = factor(features.logits_soft_cap, "logits_soft_cap")
    return AttentionSpec(
        num_qo_heads=qo_heads,
        num_kv_heads=kv_heads,
        head_dim_qk=head_dim,
        head_dim_vo=head_dim_out,
        page_size=positive_int(page_size, "page_size"),
        causal=flag(causal, "causal"),
        sm_scale=1 / math.sqrt(head_dim) if sm_scale is None else sm_scale,
        dtype=q_dtype,
        kv_dtype=kv_dtype,
        kv_layout=kv_layout,
        window_left=window_left(features.window_left),
        # FlashInfer has 0 and any negative number for none.
        logits_soft_cap=max(soft_cap, 0.0),
        custom_mask=features.custom_mask,
        pos_encoding_mode=cast(PosEncodingMode, mode),
        rope_scale=rope_scale,
        rope_theta=rope_theta,
    )


# The same few calls are planned again and again. An int is not taken for a bool that equals it.
_known_spec = lru_cache(maxsize=64, typed=True)(_attention_spec)


class PlanChoices(NamedTuple):
    """Arguments of every `plan()`, checked."""

    fixed_split_size: int | None
    disable_split_kv: bool
    non_blocking: bool


def plan_choices(
    fixed_split_size: object, disable_split_kv: object, non_blocking: object
) -> PlanChoices:
    """Check arguments that every `plan()` takes."""
    never = flag(disable_split_kv, "disable_split_kv")
    non_blocking = flag(non_blocking, "non_blocking")
    is_int = isinstance(fixed_split_size, (int, np.integer))  # an array may not be compared
    if fixed_split_size is None or (is_int and fixed_split_size == -1):  # FlashInfer's None
        return PlanChoices(None, never, non_blocking)
    size = positive_int(fixed_split_size, "fixed_split_size")
    # Nothing is split: neither do the bits then depend on the batch.
    return PlanChoices(None if never else size, never, non_blocking)


def _refuse_head_dims(head_dim: int, head_dim_out: int, head_dim_name: str) -> None:
    served = [dim for dim, out in SERVED_HEAD_DIMS if dim == out]
    if head_dim_out == head_dim:
        raise NotImplementedError(
            f"{head_dim_name} = {head_dim}, served are {_listed(tuple(served))}"
        )
    others = ", ".join(f"{dim}/{out}" for dim, out in SERVED_HEAD_DIMS if dim != out)
    raise NotImplementedError(
        f"{head_dim_name} = {head_dim} with head_dim_vo = {head_dim_out}, served are equal ones of "
        f"{_listed(tuple(served))}, and {others}"
    )


def window_as_planned(value: object, planned: int) -> None:
    """Refuse another `window_left` in `run()` than in `plan()`."""
    given = window_left(value)
    if given != planned:
        raise ValueError(f"window_left = {given}, expected {planned} as planned")


def window_left(value: object) -> int:
    """`value` as a number of keys, -1 for all of them."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"window_left is {what(value)}, expected an int")
    if value < -1:
        raise ValueError(f"window_left = {value}, expected at least 0, or -1 for no window")
    return min(int(value), _MAX_INT)


def _positive(value: object, name: str, mode: str) -> float:
    """A factor of the rotation, which means nothing without it."""
    if mode != "ROPE_LLAMA":
        shown = f"= {value}" if isinstance(value, (int, float, np.number)) else f"is {what(value)}"
        raise ValueError(f"{name} {shown} with pos_encoding_mode={mode!r}, expected 'ROPE_LLAMA'")
    number = scale(value, name)
    if number <= 0:
        raise ValueError(f"{name} = {number}, expected more than 0")
    if number < _MIN_FLOAT32:
        raise ValueError(f"{name} = {number}, expected at least {_MIN_FLOAT32:.4g}")
    return number


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))


def _quoted(values: tuple[str, ...]) -> str:
    return ", ".join(map(repr, values))


def what(value: object) -> str:
    """The type of a value, in words."""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' or kind == 'ndarray' else 'a'} {kind}"
