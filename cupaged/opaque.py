"""Functions that `torch.compile` calls and does not look into.

Its compiler would trace the library's NumPy as PyTorch, in dozens of small graphs, and slowly.
`run()` of the wrappers is an operator instead (`cupaged.torch_ops`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])


def opaque(function: _Function) -> _Function:
    """Let `torch.compile` break its graph around a function, which then runs as it always does.

    With `fullgraph=True` the compiler refuses the call. Imports nothing: where PyTorch's compiler
    is not there, nobody looks.
    """
    hidden: Any = None

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        nonlocal hidden
        if "torch._dynamo" not in sys.modules:
            return function(*args, **options)
        if hidden is None:
            hidden = sys.modules["torch"].compiler.disable(function)
        return hidden(*args, **options)

    # What `torch.compiler.disable` itself leaves: the caller's graph ends before this call. The
    # attribute says nothing about the frames below, hence `hidden`.
    marked: Any = call
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "it computes with NumPy and CUDA, which can't be traced"
    return cast(_Function, call)
