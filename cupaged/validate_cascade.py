"""Every check of a cascade's levels beside each other, and how each one is worded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged import arrays, validate_lengths
from cupaged.schedule import Lengths
from cupaged.spec import AttentionSpec
from cupaged.validate import what
from cupaged.validate_lengths import PREFILL_NAMES, and_others, any_repeats, count_entries

IntArray = npt.NDArray[np.int32]


class Level(NamedTuple):
    """The requests of a level, checked.

    Attributes
    ----------
    lengths : Lengths
    page_indices : int32 [paged_kv_indptr[-1]]
    highest_page : int
        The highest page number, -1 where there is none.
    last_page_len : int array [batch], on the host
    """

    lengths: Lengths
    page_indices: IntArray
    highest_page: int
    last_page_len: npt.NDArray[Any]

    @property
    def index_arrays(self) -> tuple[IntArray, IntArray, IntArray, npt.NDArray[Any]]:
        """As `plan()` of a level takes them."""
        qo_indptr, paged_kv_indptr = self.lengths.qo_indptr, self.lengths.paged_kv_indptr
        return qo_indptr, paged_kv_indptr, self.page_indices, self.last_page_len

    def check_pages(self, num_pages: int) -> None:
        """Check the page table against a cache of `num_pages` pages."""
        validate_lengths.page_range(
            self.page_indices, self.highest_page, self.lengths, num_pages, PREFILL_NAMES
        )


@contextmanager
def of_level(number: int | None) -> Iterator[None]:
    """Let errors say which level they are of, unless they are of none in particular."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        if number is None:
            raise
        raise type(error)(f"level {number}: {error}") from error


def one_each(values: Any, name: str, num_levels: int) -> Sequence[Any]:
    """Check a list with something for each level."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} is {what(values)}, expected a list: one entry for each level")
    if len(values) != num_levels:
        raise ValueError(
            f"{name} has {count_entries(len(values))}, expected {num_levels}: one for each level"
        )
    return values


def level(index_arrays: Sequence[Any], spec: AttentionSpec) -> Level:
    """Check one level's arrays, as `plan()` of a wrapper of its own does.

    `index_arrays` are its qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len.
    """
    indptr_name, indices_name, last_name, *_ = PREFILL_NAMES
    names = ("qo_indptr", indptr_name, indices_name, last_name)
    qo_indptr, paged_kv_indptr, indices, last_page_len = (
        arrays.import_index(array, name) for array, name in zip(index_arrays, names, strict=True)
    )
    lengths = validate_lengths.lengths(qo_indptr, paged_kv_indptr, last_page_len, spec)
    pages, highest = validate_lengths.page_indices(indices, lengths, PREFILL_NAMES)
    return Level(lengths, pages, highest, last_page_len)


def features(spec: AttentionSpec, num_levels: int) -> None:
    """Refuse features that need a row's place among the keys, which over several levels is none."""
    if num_levels == 1:
        return
    for name, off in (("window_left", -1), ("pos_encoding_mode", "NONE")):
        value = getattr(spec, name)
        if value != off:
            raise NotImplementedError(
                f"{name} = {value!r} with num_levels = {num_levels}: a row has no place among the "
                "keys of a level"
            )


def plan_options(spec: AttentionSpec) -> dict[str, Any]:
    """Arguments of `plan()` of each level's wrapper, but for `causal`."""
    options = {
        "sm_scale": spec.sm_scale,
        "window_left": spec.window_left,
        "logits_soft_cap": spec.logits_soft_cap,
        "pos_encoding_mode": spec.pos_encoding_mode,
        "q_data_type": spec.dtype,
        "kv_data_type": spec.kv_dtype,
    }
    if spec.pos_encoding_mode == "ROPE_LLAMA":
        options |= {"rope_scale": spec.rope_scale, "rope_theta": spec.rope_theta}
    return options


def nested(levels: Sequence[Level]) -> None:
    """Check that the levels share their rows, and that every group is whole ones of the next level.

    Raises
    ------
    ValueError
        Names the level, the row and the request.
    """
    rows = levels[0].lengths.nnz_qo
    for number, found in enumerate(levels[1:], 1):
        if found.lengths.nnz_qo != rows:
            raise ValueError(
                f"level {number}: qo_indptr[-1] = {found.lengths.nnz_qo}, expected {rows} as at "
                "level 0: all levels have the same rows of q"
            )
    for number in range(len(levels) - 1):
        coarse, fine = (levels[i].lengths.qo_indptr for i in (number, number + 1))
        inside = fine[np.searchsorted(fine, coarse)] != coarse
        if inside.any():
            i = int(inside.argmax())
            request = int(np.searchsorted(fine, coarse[i])) - 1
            raise ValueError(
                f"level {number}: qo_indptr[{i}] = {coarse[i]}, which is inside of request "
                f"{request} of level {number + 1}, rows {fine[request]}..{fine[request + 1] - 1}: "
                "expected a request to be whole ones of the next level"
            )


def mistakes(levels: Sequence[Level], causal: bool) -> list[str]:
    """What is legal and almost surely not meant, in words."""
    found = []
    last = len(levels) - 1
    if causal:
        lengths = levels[last].lengths
        short = np.flatnonzero(lengths.qo_len > lengths.kv_len)
        if len(short):
            r = int(short[0])
            qo_len, kv_len = int(lengths.qo_len[r]), int(lengths.kv_len[r])
            found.append(
                f"level {last}: request {r} has {qo_len} queries and {kv_len} keys"
                f"{and_others(len(short) - 1)}: with causal=True its first {qo_len - kv_len} rows "
                "see none of them, and all keys of the other levels. Are the queries' own keys in "
                "the last level, and counted in its paged_kv_indptr and paged_kv_last_page_len?"
            )
    # The cheap question first: does any page occur twice at all?
    pages = np.concatenate([level.page_indices for level in levels])
    if any_repeats(pages, int(pages.max(initial=-1))):
        for number in range(len(levels)):
            for above in range(number + 1):
                found += _repeated(levels, above, number)
    return found


def _repeated(levels: Sequence[Level], above: int, number: int) -> list[str]:
    """Pages of a level that the same rows have in a level above, or twice in the level itself."""
    level, request = levels[number], _request_of_page(levels[number])
    pages = level.page_indices.astype(np.int64)
    stride = max(level.highest_page, levels[above].highest_page) + 1
    if above == number:
        keys = request * stride + pages
        repeated = np.ones(len(keys), np.bool_)
        repeated[np.unique(keys, return_index=True)[1]] = False
        words = "twice"
    else:
        upper = levels[above]
        # Where a request has no rows, nothing is attended to.
        rows, begins = level.lengths.qo_len, level.lengths.qo_indptr[:-1]
        group = np.searchsorted(upper.lengths.qo_indptr, begins, side="right") - 1
        keys = group[request] * stride + pages
        repeated = np.isin(keys, _request_of_page(upper) * stride + upper.page_indices)
        repeated &= rows[request] > 0
        words = f"which level {above} has for the same rows"
    if not repeated.any():
        return []
    i = int(repeated.argmax())
    others = and_others(len(np.unique(request[repeated])) - 1)
    tail = (
        "Was another page meant in paged_kv_indices?"
        if above == number
        else "Does it repeat the shared prefix?"
    )
    comma = "" if above == number else ","
    return [
        f"level {number}: request {request[i]} has page {pages[i]}{comma} {words}{others}: its "
        f"keys will be attended to twice. {tail}"
    ]


def _request_of_page(level: Level) -> npt.NDArray[np.intp]:
    """Which request each entry of the page table belongs to."""
    counts = np.diff(level.lengths.paged_kv_indptr)
    return np.arange(len(counts)).repeat(counts)
