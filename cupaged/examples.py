"""Batches for `python -m cupaged`: lengths and shapes, and the options that ask for them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

#: FlashInfer issue 192: ten requests, prefix and append lengths uniform in this range, inclusive
ISSUE_192_BATCH = 10
ISSUE_192_LENGTHS = (16, 128)

_SHAPE_FIELDS = ("num_qo_heads", "num_kv_heads", "head_dim", "page_size", "dtype", "causal")


@dataclass(frozen=True, slots=True)
class Batch:
    """A ragged batch by its lengths; the defaults are those of FlashInfer issue 192.

    Attributes
    ----------
    qo_len, kv_len : int64 [batch]
        Queries and keys of each request.
    num_qo_heads, num_kv_heads, head_dim, page_size : int
    dtype : str
        Of q, K, V and the output.
    causal : bool
    """

    qo_len: IntArray
    kv_len: IntArray
    num_qo_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 32
    dtype: str = "float16"
    causal: bool = True

    @property
    def pages(self) -> IntArray:
        """Pages of each request, int64 [batch]."""
        return -(-self.kv_len // self.page_size)

    @property
    def qo_indptr(self) -> IntArray:
        """First row of q of each request, and their number; int64 [batch + 1]."""
        return _running_sum(self.qo_len)

    @property
    def paged_kv_indptr(self) -> IntArray:
        """First page of each request, and their number; int64 [batch + 1]."""
        return _running_sum(self.pages)

    def plan_arguments(self, page_indices: npt.NDArray[np.int32]) -> dict[str, Any]:
        """What `plan()` takes.

        Parameters
        ----------
        page_indices : int32 [paged_kv_indptr[-1]]
            Page numbers, request after request.
        """
        last_page_len = np.where(self.pages > 0, self.kv_len - (self.pages - 1) * self.page_size, 0)
        return {
            "qo_indptr": self.qo_indptr.astype(np.int32),
            "paged_kv_indptr": self.paged_kv_indptr.astype(np.int32),
            "paged_kv_indices": page_indices,
            "paged_kv_last_page_len": last_page_len.astype(np.int32),
            "num_qo_heads": self.num_qo_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim_qk": self.head_dim,
            "page_size": self.page_size,
            "causal": self.causal,
            "q_data_type": self.dtype,
        }


def draw_lengths(
    rng: np.random.Generator,
    count: int = ISSUE_192_BATCH,
    bounds: tuple[int, int] = ISSUE_192_LENGTHS,
) -> IntArray:
    """`count` lengths, uniform between two bounds, both inclusive."""
    return rng.integers(bounds[0], bounds[1], count, endpoint=True)


def mixed() -> Batch:
    """A 2,048-token prefill over 32,768 keys among 63 decodes of 4,096 keys, 32/8 heads."""
    qo_len = np.ones(64, np.int64)
    kv_len = np.full(64, 4096, np.int64)
    prefill = 31  # neither the first nor the last
    qo_len[prefill], kv_len[prefill] = 2048, 32768
    return Batch(qo_len, kv_len, num_qo_heads=32, page_size=16)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `from_options` reads."""
    parser.add_argument(
        "--example",
        choices=("issue-192", "mixed"),
        default="issue-192",
        help="mixed: a 2,048-token prefill over 32,768 keys among 63 decodes, 32/8 heads, "
        "pages of 16; by default: the ten requests of FlashInfer issue 192",
    )
    low, high = ISSUE_192_LENGTHS
    count = f"requests of issue-192, {ISSUE_192_BATCH} by default"
    parser.add_argument("--batch-size", type=int, metavar="N", help=count)
    for name, what in (("--prefix", "keys before the new tokens"), ("--append", "new tokens")):
        each = f"{what} in each request of issue-192, {low}..{high} by default"
        parser.add_argument(name, type=_bounds, metavar="N or LOW..HIGH", help=each)
    for name in ("--num-qo-heads", "--num-kv-heads", "--head-dim", "--page-size"):
        parser.add_argument(name, type=int, metavar="N")
    parser.add_argument("--dtype", metavar="NAME", help="float16 by default")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction)


def from_options(options: argparse.Namespace, rng: np.random.Generator) -> Batch:
    """The batch that the command line asks for.

    Raises
    ------
    ValueError
        Options that contradict each other, or a value that no batch can have.
    """
    if options.example == "mixed":
        for name in ("seed", "batch_size", "prefix", "append"):
            if getattr(options, name) is not None:
                raise ValueError(f"--example mixed takes no --{name.replace('_', '-')}")
        batch = mixed()
    else:
        count = ISSUE_192_BATCH if options.batch_size is None else options.batch_size
        if count < 0:
            raise ValueError(f"--batch-size = {count}, expected at least 0")
        prefix = draw_lengths(rng, count, options.prefix or ISSUE_192_LENGTHS)
        append = draw_lengths(rng, count, options.append or ISSUE_192_LENGTHS)
        batch = Batch(append, prefix + append)
    if options.page_size is not None and options.page_size < 1:
        raise ValueError(f"--page-size = {options.page_size}, expected at least 1")
    shape = {name: getattr(options, name) for name in _SHAPE_FIELDS}
    return replace(batch, **{name: value for name, value in shape.items() if value is not None})


def _bounds(text: str) -> tuple[int, int]:
    """A length, or two with ".." between: the bounds of a range, both inclusive."""
    low, dots, high = text.partition("..")
    try:
        bounds = int(low), int(high if dots else low)
    except ValueError:
        bounds = -1, -1
    if not 0 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a length or LOW..HIGH")
    return bounds


def _running_sum(counts: IntArray) -> IntArray:
    """The sum of the counts before each one, and of all of them."""
    return np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
