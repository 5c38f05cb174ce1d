"""Every check of what a `PagedKVCache` is asked, and how each one is worded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from cupaged.page_pool import NAMED, Request, counted
from cupaged.page_tables import Step
from cupaged.validate import what


def ids(requests: Any) -> list[Hashable]:
    """Ids of requests as a list; a single one is refused, since a str can be iterated over too."""
    try:
        # An array without an axis is Iterable, and can't be iterated over.
        each = None if isinstance(requests, str | bytes) else iter(requests)
    except TypeError:
        each = None
    if each is None:
        raise TypeError(f"requests is {what(requests)}, expected a list of requests")
    return list(each)


def unhashable(request: object, name: str) -> TypeError:
    """The error for what can't be an id."""
    return TypeError(f"{name} is {what(request)}, expected a hashable id")


def once(requests: Sequence[Request], call: str) -> None:
    """Refuse a request that is there twice."""
    if len(set(requests)) == len(requests):
        return
    seen: set[Request] = set()
    for request in requests:
        if request in seen:
            raise ValueError(f"{call}: request {request.id!r} is there twice, expected once")
        seen.add(request)


def count(value: object, name: str, request: Hashable) -> int:
    """`value` as a number of tokens of a request."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {what(value)} (request {request!r}), expected an int")
    if value < 0:
        raise ValueError(f"{name} = {value} (request {request!r}), expected at least 0")
    return int(value)


def counts(values: Any, requests: Sequence[Request]) -> list[int]:
    """`values`, one for all requests or one each, as numbers of tokens."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, (int, np.integer)):
        return [count(values, "n", requests[0].id)] * len(requests) if requests else []
    if not isinstance(values, list | tuple):
        raise TypeError(f"n is {what(values)}, expected an int, or a list of one for each request")
    if len(values) != len(requests):
        raise ValueError(
            f"n has length {len(values)}, expected {len(requests)}: an int for each request"
        )
    return [
        count(value, f"n[{i}]", request.id)
        for i, (value, request) in enumerate(zip(values, requests, strict=True))
    ]


def layer(value: object, num_layers: int) -> int:
    """`value` as the number of a layer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"layer is {what(value)}, expected an int")
    if not 0 <= value < num_layers:
        raise ValueError(f"layer = {value}, expected 0..{num_layers - 1} (num_layers={num_layers})")
    return int(value)


def fill(value: object) -> int:
    """`value` as an entry of a page table that is not used."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"fill is {what(value)}, expected an int")
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"fill = {value}, expected an int32")
    return int(value)


def rows(x: Any, name: str, step: Step, num_kv_heads: int, head_dim: int) -> None:
    """Check the shape of new keys or values; what has none is no array, and is refused later."""
    shape = getattr(x, "shape", ())
    if not isinstance(shape, tuple) or not shape or shape == (step.rows, num_kv_heads, head_dim):
        return
    shape = tuple(shape)  # which PyTorch's writes in another way
    if len(shape) != 3 or shape[1:] != (num_kv_heads, head_dim):
        raise ValueError(
            f"{name} has shape {shape}, expected ({step.rows}, num_kv_heads={num_kv_heads}, "
            f"head_dim={head_dim})"
        )
    words = ", ".join(f"{request.new} of {request.id!r}" for request in step.requests[:NAMED])
    others = len(step.requests) - NAMED
    if others > 0:
        words += f" and those of {others} more"
    raise ValueError(
        f"{name} has {counted(shape[0], 'row')}, expected {step.rows} = the new tokens of the "
        f"requests: {words or 'there is none'}"
    )


def not_written(request: Request, call: str) -> RuntimeError:
    """The error for new tokens that are still to be appended at a layer."""
    missing = next(
        i for i in range(request.written.bit_length() + 1) if not request.written >> i & 1
    )
    return RuntimeError(
        f"{call}: request {request.id!r} has {counted(request.new, 'new token')} not yet appended "
        f"at layer {missing}: append() or mark_appended() first, or truncate() it to "
        f"{request.length - request.new}"
    )


def nothing_new(step: Step, layer: int) -> RuntimeError:
    """The error for a request without new tokens at a layer."""
    request = step.first_written(layer)
    words = f"append(): request {request.id!r} has no new tokens"
    if request.new:
        last = "one is" if request.new == 1 else f"{request.new} are"
        words += f" at layer {layer}, where its last {last} written"
    return RuntimeError(f"{words}: extend() it first")
