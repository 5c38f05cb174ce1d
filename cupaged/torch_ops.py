"""`run()` inside of `torch.compile`: an operator of PyTorch's, which is not looked into.

Made by the first plan for which PyTorch is there already; nothing here imports it.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from cupaged import validate

#: PyTorch, once the operators are made.
torch: Any = None

#: Wrappers by a number that a compiled program can hold.
_wrappers: WeakValueDictionary[int, Any] = WeakValueDictionary()

_SCALE_NAMES = ("q_scale", "k_scale", "v_scale")
# A scale is a number or a tensor, for which a schema has no one word: each is in one of two places.
_SCALES = ", ".join(f"float? {name}" for name in _SCALE_NAMES) + ", Tensor?[] scales"
_ARGUMENTS = (
    f"int wrapper, Tensor q, Tensor[] cache, bool apart, {_SCALES}, Tensor? sinks, str lse_base"
)


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
    scales: tuple[Any, Any, Any],
    out: Any,
    lse: Any,
    return_lse: Any,
    lse_base: str,
    sinks: Any,
) -> Any:
    """`run()` by way of an operator.

    What its schema would take for something else is checked here, all else when it runs.
    """
    validate.flag(return_lse, "return_lse")
    numbers, tensors = _by_kind(scales)
    # No gradients, as without the compiler.
    q, sinks = q.detach(), None if sinks is None else sinks.detach()
    apart = isinstance(cache, tuple | list)
    parts = [part.detach() for part in (cache if apart else [cache])]
    arguments = (id(wrapper), q, parts, apart, *numbers, tensors, sinks, lse_base)
    if out is None and lse is None:
        out, lse = torch.ops.cupaged.run(*arguments)
    else:
        shape = wrapper.output_shape(q.shape[0])
        want_lse = return_lse or lse is not None
        out = q.new_empty(shape) if out is None else out
        lse = q.new_empty(shape[:2], dtype=torch.float32) if lse is None else lse
        torch.ops.cupaged.run_into(*arguments, out, lse, want_lse)
    return (out, lse) if return_lse else out


def _by_kind(scales: tuple[Any, Any, Any]) -> tuple[list[Any], list[Any]]:
    """Scales that are numbers, and those that are tensors; None in place of the others."""
    numbers, tensors = [], []
    for value, name in zip(scales, _SCALE_NAMES, strict=True):
        number, tensor = None, None
        # A tuple of types: the compiler can't trace a union that has NumPy's in it.
        if isinstance(value, (np.ndarray, np.generic)):
            tensor = torch.as_tensor(value)  # which the compiler holds it for anyway
        elif isinstance(value, torch.Tensor):
            tensor = value.detach()
        elif value is not None:
            # A schema's float takes a bool.
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(
                    f"{name} is {validate.what(value)}, expected a number: "
                    "an int, a float or a tensor under torch.compile"
                )
            number = value
        numbers.append(number)
        tensors.append(tensor)
    return numbers, tensors


def _run(
    wrapper: int,
    q: Any,
    cache: list[Any],
    apart: bool,
    q_scale: float | None,
    k_scale: float | None,
    v_scale: float | None,
    scales: list[Any],
    sinks: Any,
    lse_base: str,
) -> tuple[Any, Any]:
    given = _as_given(cache, apart, (q_scale, k_scale, v_scale), scales)
    result: tuple[Any, Any] = _wrappers[wrapper].attend(
        *(q, *given, None, None, True, lse_base, sinks)
    )
    return result


def _run_into(
    wrapper: int,
    q: Any,
    cache: list[Any],
    apart: bool,
    q_scale: float | None,
    k_scale: float | None,
    v_scale: float | None,
    scales: list[Any],
    sinks: Any,
    lse_base: str,
    out: Any,
    lse: Any,
    want_lse: bool,
) -> None:
    given = _as_given(cache, apart, (q_scale, k_scale, v_scale), scales)
    _wrappers[wrapper].attend(*(q, *given, out, lse if want_lse else None, False, lse_base, sinks))


def _as_given(
    cache: list[Any], apart: bool, numbers: tuple[float | None, ...], tensors: list[Any]
) -> tuple[Any, ...]:
    """The cache and the three scales as the caller gave them."""
    whole = tuple(cache) if apart else cache[0]
    pairs = zip(numbers, tensors, strict=True)
    return (whole, *(number if tensor is None else tensor for number, tensor in pairs))


def _like_run(wrapper: int, q: Any, *others: Any) -> tuple[Any, Any]:
    """What the operator returns, as far as the compiler has to know."""
    shape = _wrappers[wrapper].output_shape(q.shape[0])
    return q.new_empty(shape), q.new_empty(shape[:2], dtype=torch.float32)
