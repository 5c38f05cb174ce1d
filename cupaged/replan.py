"""The same batch with other features: what FlashInfer's `forward()` asks for between plans."""

from __future__ import annotations

from typing import Any

from cupaged import schedule, validate, validate_run
from cupaged.backend import Plan
from cupaged.spec import POS_ENCODING_MODES

#: Of `AttentionSpec`, what `forward()` may name beside causality and positions.
_FEATURES = ("sm_scale", "window_left", "logits_soft_cap")
_OF_ROPE = ("rope_scale", "rope_theta")


def replan(
    plan: Plan,
    head_dim_name: str,
    causal: Any,
    mode: Any,
    features: dict[str, Any],
    fixed: bool,
) -> Plan:
    """A plan of the same batch with other features; `plan` itself where they are its own.

    Parameters
    ----------
    plan : Plan
    head_dim_name : str
        What the call names it.
    causal, mode
        `causal` and `pos_encoding_mode`, as the caller gave them.
    features : dict
        Other arguments of `plan()`. Of all of them, None stands for what was planned.
    fixed : bool
        A CUDA graph may hold the plan.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `plan()` does; and the plan is `fixed`.
    """
    given = {name: value for name, value in features.items() if value is not None}
    if causal is None and mode is None and not given:
        return plan
    planned = plan.schedule
    old = planned.spec
    if mode is None:
        mode = old.pos_encoding_mode
    validate.choice(mode, "pos_encoding_mode", POS_ENCODING_MODES)  # before it is compared
    kept = _FEATURES + (_OF_ROPE if mode == old.pos_encoding_mode == "ROPE_LLAMA" else ())
    values = {name: getattr(old, name) for name in kept} | given
    spec = validate.attention_spec(
        *(old.num_qo_heads, old.num_kv_heads, old.head_dim_qk, old.head_dim_vo, old.page_size),
        old.causal if causal is None else causal,
        values.pop("sm_scale"),
        (old.dtype, old.kv_dtype, old.dtype),
        old.kv_layout,
        head_dim_name,
        validate.Features(**values, pos_encoding_mode=mode, custom_mask=old.custom_mask),
    )
    if spec == old:
        return plan
    if fixed:
        raise ValueError(
            "forward() with other arguments than plan(): with use_cuda_graph=True, give them to "
            "plan()"
        )
    built = schedule.rebuild(planned._replace(spec=spec), planned.device)
    if plan.workspace is not None:
        validate_run.workspace_size(plan.workspace, built.workspace_bytes)
    return Plan(built, plan.page_indices, plan.highest_page, plan.workspace)
