"""`run()` inside of `torch.compile`: an operator of PyTorch's, which is not looked into.

Made by the first plan for which PyTorch is there already; nothing here imports it.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakValueDictionary

#: PyTorch, once the operators are made.
torch: Any = None

#: Wrappers by a number that a compiled program can hold.
_wrappers: WeakValueDictionary[int, Any] = WeakValueDictionary()

_SCALES = "float? q_scale, float? k_scale, float? v_scale"
_ARGUMENTS = f"int wrapper, Tensor q, Tensor[] cache, {_SCALES}, Tensor? sinks, str lse_base"


def register(wrapper: Any) -> None:
    """Make the operators where PyTorch is, and let a wrapper be found by them."""
    global torch
    module = sys.modules.get("torch")
    if module is None or not hasattr(module, "library"):
        return
    _wrappers[id(wrapper)] = wrapper
    if torch is not None:
        return
    into = f"({_ARGUMENTS}, Tensor(a!) out, Tensor(b!) lse, bool want_lse) -> ()"
    tags = _tags(module)
    module.library.define("cupaged::run", f"({_ARGUMENTS}) -> (Tensor, Tensor)", tags=tags)
    module.library.define("cupaged::run_into", into, tags=tags)
    module.library.impl("cupaged::run", ("cpu", "cuda"), _run)
    module.library.impl("cupaged::run_into", ("cpu", "cuda"), _run_into)
    module.library.register_fake("cupaged::run", _like_run)
    module.library.register_fake("cupaged::run_into", lambda *arguments: None)
    torch = module


def _tags(module: Any) -> tuple[Any, ...]:
    """What the compiler is told of both operators, where PyTorch has a word for it.

    They take the strides that `run()` was given, and stay out of CUDA graphs that the compiler
    records by itself: those would keep the plan of the recording.
    """
    names = ("needs_exact_strides", "cudagraph_unsafe")
    return tuple(getattr(module.Tag, name) for name in names if hasattr(module.Tag, name))


def is_compiling() -> bool:
    """Whether `torch.compile` is looking at the caller."""
    return torch is not None and torch.compiler.is_compiling()


def run(
    wrapper: Any,
    q: Any,
    cache: Any,
    scales: tuple[float | None, float | None, float | None],
    out: Any,
    lse: Any,
    return_lse: bool,
    lse_base: str,
    sinks: Any,
) -> Any:
    """`run()` by way of an operator; everything is checked when that runs."""
    # No gradients, as without the compiler.
    q, sinks = q.detach(), None if sinks is None else sinks.detach()
    given = cache if isinstance(cache, tuple | list) else [cache]
    parts = [part.detach() for part in given]
    arguments = (id(wrapper), q, parts, *scales, sinks, lse_base)
    if out is None and lse is None:
        out, lse = torch.ops.cupaged.run(*arguments)
    else:
        shape = wrapper.output_shape(q.shape[0])
        want_lse = return_lse or lse is not None
        out = q.new_empty(shape) if out is None else out
        lse = q.new_empty(shape[:2], dtype=torch.float32) if lse is None else lse
        torch.ops.cupaged.run_into(*arguments, out, lse, want_lse)
    return (out, lse) if return_lse else out


def _run(
    wrapper: int,
    q: Any,
    cache: list[Any],
    q_scale: float | None,
    k_scale: float | None,
    v_scale: float | None,
    sinks: Any,
    lse_base: str,
) -> tuple[Any, Any]:
    result: tuple[Any, Any] = _wrappers[wrapper].attend(
        *(q, _whole(cache), q_scale, k_scale, v_scale, None, None, True, lse_base, sinks)
    )
    return result


def _run_into(
    wrapper: int,
    q: Any,
    cache: list[Any],
    q_scale: float | None,
    k_scale: float | None,
    v_scale: float | None,
    sinks: Any,
    lse_base: str,
    out: Any,
    lse: Any,
    want_lse: bool,
) -> None:
    _wrappers[wrapper].attend(
        *(q, _whole(cache), q_scale, k_scale, v_scale, out, lse if want_lse else None, False),
        *(lse_base, sinks),
    )


def _whole(cache: list[Any]) -> Any:
    """What the caller gave: one array, or K and V."""
    return cache[0] if len(cache) == 1 else tuple(cache)


def _like_run(wrapper: int, q: Any, *others: Any) -> tuple[Any, Any]:
    """What the operator returns, as far as the compiler has to know."""
    shape = _wrappers[wrapper].output_shape(q.shape[0])
    return q.new_empty(shape), q.new_empty(shape[:2], dtype=torch.float32)
