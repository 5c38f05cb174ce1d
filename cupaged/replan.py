"""The same batch with other features: what FlashInfer's `forward()` asks for between plans."""

from __future__ import annotations

from typing import Any

from cupaged import schedule, validate, validate_lengths, validate_run
from cupaged.backend import Plan
from cupaged.validate_lengths import Names


def replan(
    plan: Plan, names: Names, causal: Any, mode: Any, features: dict[str, Any], fixed: bool
) -> Plan:
    """A plan of the same batch with other features; `plan` itself where they are its own.

    Parameters
    ----------
    plan : Plan
    names : Names
        What the call names its arguments.
    causal : bool or None
        As the caller gave it; None for what was planned.
    mode
        `pos_encoding_mode`, as the caller gave it.
    features : dict
        Other arguments of `plan()`: `sm_scale` and those of `validate.Features`.
    fixed : bool
        A CUDA graph may hold the plan.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `plan()` does; and the plan is `fixed`.

    Warns
    -----
    CupagedWarning
        More queries than keys in a request, with a `causal` that was not planned.
    """
    old = plan.spec
    others = dict(features)
    sm_scale = others.pop("sm_scale")
    spec = validate.attention_spec(
        *(old.num_qo_heads, old.num_kv_heads, old.head_dim_qk, old.head_dim_vo, old.page_size),
        old.causal if causal is None else causal,
        sm_scale,
        (old.dtype, old.kv_dtype, old.dtype),
        old.kv_layout,
        names.head_dim,
        validate.Features(**others, pos_encoding_mode=mode, custom_mask=old.custom_mask),
    )
    if spec == old:
        return plan
    if fixed:
        raise ValueError(
            "forward() with other arguments than plan(): with use_cuda_graph=True, give them to "
            "plan()"
        )
    if not old.causal:
        validate_lengths.warn_of_too_few_keys(spec, plan.lengths, names)
    planned = plan.schedule
    built = schedule.rebuild(planned._replace(spec=spec), planned.device)
    if plan.workspace is not None:
        validate_run.workspace_size(plan.workspace, built.workspace_bytes)
    return Plan(built, plan.page_indices, plan.highest_page, plan.workspace)
