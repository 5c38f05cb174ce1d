"""How an axis of rows is divided among requests: the twins of xFormers' `_SeqLenInfo` and its kin.

xFormers keeps each number twice, on the device and on the host in a list whose name ends in `_py`.
The library plans on the host, and reads the lists.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from cupaged import arrays, validate


@dataclass(eq=False)
class SeqLenInfo:
    """Requests one behind the other.

    Attributes
    ----------
    seqstart_py : list of int [batch + 1]
        First row of each request; the last entry is the number of rows.
    """

    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: Any, name: str = "seqlens") -> SeqLenInfo:
        """Of requests with so many rows each."""
        return SeqLenInfo([0, *accumulate(lengths(seqlens, name))])

    def split(self, x: Any, batch_sizes: Sequence[int] | None = None) -> list[Any]:
        """Cut `[1, rows, ...]` into one array a request, `[1, rows of it, ...]`.

        Parameters
        ----------
        x : array
        batch_sizes : sequence of int, optional
            How many requests, of the same length, each array holds: `[batch size, rows, ...]`.

        Raises
        ------
        ValueError
            `x` has another shape.
        """
        rows = self.seqstart_py[-1]
        if len(x.shape) < 2 or x.shape[0] != 1 or x.shape[1] != rows:
            raise ValueError(f"tensor has shape {tuple(x.shape)}, expected (1, {rows}, ...)")
        if batch_sizes is None:
            batch_sizes = [1] * (len(self.seqstart_py) - 1)
        parts, begin = [], 0
        for batch_size in batch_sizes:
            first, last = self.seqstart_py[begin], self.seqstart_py[begin + batch_size]
            length = (last - first) // max(batch_size, 1)
            parts.append(x[:, first:last].reshape((batch_size, length, *x.shape[2:])))
            begin += batch_size
        return parts


@dataclass(eq=False)
class PaddedSeqLenInfo(SeqLenInfo):
    """Requests with room for as many rows each, of which they use the first.

    Attributes
    ----------
    seqlen_py : list of int [batch]
    padding : int
        Rows that a request has room for.
    """

    seqlen_py: list[int]
    padding: int

    @classmethod
    def from_seqlens_padded(cls, seqlens: Any, padding: int) -> PaddedSeqLenInfo:
        """Of requests that use so many rows each, of `padding`."""
        padding = validate.positive_int(padding, "kv_padding")
        used = lengths(seqlens, "kv_seqlen")
        for r, length in enumerate(used):
            if length > padding:
                raise ValueError(
                    f"kv_seqlen[{r}] = {length}, expected 0..{padding}: there is no more room"
                )
        return cls([r * padding for r in range(len(used) + 1)], used, padding)


@dataclass(eq=False)
class GappySeqInfo(SeqLenInfo):
    """Requests that lie anywhere.

    Attributes
    ----------
    seqlen_py : list of int [batch]
        How many rows each request has. With pages: where it ends, as `seqstart_py` counted from the
        first row of the request's own pages.
    """

    seqlen_py: list[int]


def lengths(x: Any, name: str) -> list[int]:
    """Lengths, or places, as a list of ints, checked.

    Raises
    ------
    TypeError, ValueError
        No ints; more than one axis; one of them is negative.
    """
    values = arrays.import_index(x, name)
    if values.ndim != 1:
        raise ValueError(f"{name} has shape {values.shape}, expected one axis")
    if len(values) and values.min() < 0:
        r = int(values.argmin())
        raise ValueError(f"{name}[{r}] = {values[r]}, expected at least 0")
    found: list[int] = values.tolist()
    return found


def concatenated(tensors: Sequence[Any], name: str = "tensors") -> Any:
    """`[batch, rows, ...]` arrays of one framework behind one another: `[1, all rows, ...]`."""
    if not len(tensors):
        raise ValueError(f"{name} has no array, expected at least one")
    flat = [x.reshape((1, x.shape[0] * x.shape[1], *x.shape[2:])) for x in tensors]
    kind = arrays.framework(flat[0])
    if kind not in ("numpy", "cupy", "torch", "jax"):
        raise TypeError(
            f"{name}[0] is {validate.what(tensors[0])}, expected an array of NumPy, CuPy, "
            "PyTorch or JAX"
        )
    module = sys.modules["jax.numpy" if kind == "jax" else kind]
    return module.concatenate(flat, 1)


def check_batch(q_seqinfo: SeqLenInfo, batch: int) -> None:
    expected = len(q_seqinfo.seqstart_py) - 1
    if batch != expected:
        raise ValueError(f"kv_seqlen has {batch} entries, expected {expected} as q_seqlen has")


def check_lists(
    tensors_q: Sequence[Any], tensors_k: Sequence[Any], tensors_v: Sequence[Any] | None
) -> None:
    """Hold lists of queries, keys and values against each other."""
    lists = {"tensors_k": tensors_k}
    if tensors_v is not None:
        lists["tensors_v"] = tensors_v
    for name, tensors in lists.items():
        if len(tensors) != len(tensors_q):
            raise ValueError(
                f"{name} has {len(tensors)} arrays, expected {len(tensors_q)} as tensors_q has"
            )
    for name, tensors in {"tensors_q": tensors_q, **lists}.items():
        for i, x in enumerate(tensors):
            if len(x.shape) < 2:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(x.shape)}, expected (batch, rows, ...)"
                )
    for i, (q, k) in enumerate(zip(tensors_q, tensors_k, strict=True)):
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"tensors_k[{i}] has batch size {k.shape[0]}, expected {q.shape[0]} as "
                f"tensors_q[{i}] has"
            )
        v = k if tensors_v is None else tensors_v[i]
        if tuple(v.shape[:2]) != tuple(k.shape[:2]):
            raise ValueError(
                f"tensors_v[{i}] has shape {tuple(v.shape)}, expected "
                f"({k.shape[0]}, {k.shape[1]}, ...) as tensors_k[{i}] has"
            )


def check_windows(window_left: int, window_right: int) -> None:
    for name, value in (("window_left", window_left), ("window_right", window_right)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {validate.what(value)}, expected an int")
        if value < 0:
            raise ValueError(f"{name} = {value}, expected at least 0")
