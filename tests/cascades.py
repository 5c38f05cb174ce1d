"""Random cascades: levels of groups over one cache, and what attention over them must return.

The oracle sees no levels: it attends to the keys of all levels, put one behind the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import batches
import numpy as np
import oracle
from hypothesis import strategies as st
from oracle import Formula

import cupaged

Array = np.ndarray[Any, Any]

#: Of a weight, by an LSE in float32 and approximate exponentials, for each unit of the LSE.
_LSE_ERROR = 2.0**-20


@dataclass(frozen=True, slots=True)
class Cascade:
    """A planned call's arrays.

    Attributes
    ----------
    flat : Batch
        The groups of all levels, level by level, as requests; those of the last level alone have
        rows.
    members : tuple of tuple of int
        Of each level but the last: how many groups of the next level each group is made of.
    """

    flat: batches.Batch
    members: tuple[tuple[int, ...], ...]

    @property
    def num_levels(self) -> int:
        return len(self.members) + 1

    @property
    def sizes(self) -> list[int]:
        """Groups of each level."""
        above = [len(counts) for counts in self.members]
        return [*above, len(self.flat.qo_len) - sum(above)]

    def groups(self, level: int) -> range:
        """Places of a level's groups in the flat batch."""
        begin = sum(self.sizes[:level])
        return range(begin, begin + self.sizes[level])

    def rows(self, level: int) -> list[int]:
        """Rows of q that each group of a level has."""
        found = [self.flat.qo_len[r] for r in self.groups(self.num_levels - 1)]
        for counts in self.members[level:][::-1]:
            ends = np.cumsum([0, *counts])
            found = [sum(found[a:b]) for a, b in pairwise(ends)]
        return found

    def path(self, request: int) -> list[int]:
        """Places of the groups that a request of the last level belongs to, its own last."""
        found = [request]
        for counts in self.members[::-1]:
            found.append(int(np.searchsorted(np.cumsum(counts), found[-1], side="right")))
        return [self.groups(level)[i] for level, i in enumerate(found[::-1])]

    def level(self, level: int) -> tuple[Array, Array, Array, Array]:
        """A level's index arrays."""
        part = slice(self.groups(level).start, self.groups(level).stop)
        alone = replace(
            self.flat,
            qo_len=tuple(self.rows(level)),
            kv_len=self.flat.kv_len[part],
            pages=self.flat.pages[part],
        )
        return alone.index_arrays

    @property
    def index_arrays(self) -> tuple[list[Array], ...]:
        """As `plan()` takes them."""
        levels = [self.level(i) for i in range(self.num_levels)]
        return tuple(list(arrays) for arrays in zip(*levels, strict=True))

    def plan(self, wrapper: Any, **options: Any) -> None:
        """Plan the cascade, from index arrays on the host."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cupaged.CupagedWarning)
            wrapper.plan(
                *self.index_arrays,
                *self.flat.geometry,
                **{"q_data_type": self.flat.dtype, **options},
            )

    def on(self, asarray: Callable[[Array], Any]) -> Cascade:
        return replace(self, flat=self.flat.on(asarray))


def build(
    rng: np.random.Generator,
    qo_len: Sequence[int],
    kv_len: Sequence[Sequence[int]],
    members: Sequence[Sequence[int]],
    **options: Any,
) -> Cascade:
    """A random cascade.

    Parameters
    ----------
    qo_len : sequence of int
        Rows of each request of the last level.
    kv_len : sequence of sequence of int
        Of each level: keys of each group.
    members : sequence of sequence of int
        Of each level but the last: how many groups of the next level each group is made of.
    options
        Of `batches.build()`.
    """
    flat_kv = [n for lengths in kv_len for n in lengths]
    flat_qo = [*[0] * (len(flat_kv) - len(qo_len)), *qo_len]
    flat = batches.build(rng, flat_qo, flat_kv, **options)
    return Cascade(flat, tuple(map(tuple, members)))


def check(
    cascade: Cascade,
    out: Array,
    lse: Array | None = None,
    causal: bool = False,
    sm_scale: float | None = None,
    **features: Any,
) -> None:
    """Hold a call's result to attention over all keys of a row, put one behind the other.

    An error may be as large as the largest that the accuracy rule allows of one of the levels on
    its own, and by one rounding of the result larger, since each level's output is rounded; and by
    as much as the weights are wrong.
    """
    flat, begin = cascade.flat, 0
    every = Formula(causal=causal, sm_scale=sm_scale, **features)
    whole = Formula(sm_scale=sm_scale, **features)
    for request in range(cascade.sizes[-1]):
        path = cascade.path(request)
        q, *_ = flat.gathered(path[-1])
        rows = slice(begin, begin + len(q))
        begin = rows.stop
        if not len(q):
            continue
        keys = [flat.gathered(place)[1:] for place in path]
        k, v = (np.concatenate(parts) for parts in zip(*keys, strict=True))
        expected, expected_lse = oracle.attend(q, k, v, every)
        what = f"request {request} ({len(q)} queries, {[len(x) for x, _ in keys]} keys)"
        if lse is not None:
            allowed_lse = oracle.lse_tolerance(q, k, every)
            oracle.assert_lse_close(lse[rows], expected_lse, f"lse of {what}", allowed_lse)
        got = out[rows].astype(np.float64)
        assert out.dtype == batches.DTYPES[flat.dtype]
        assert np.isfinite(got).all(), what
        seen = np.isfinite(expected_lse).any(axis=1)
        assert (got[~seen] == 0).all(), f"{what}: a row that sees no key is not 0"
        allowed, largest = 0.0, 0.0
        for i, (level_k, level_v) in enumerate(keys):
            formula = every if i == len(keys) - 1 else whole
            level, _ = oracle.attend(q, level_k, level_v, formula)
            plain = oracle.plain_same_dtype(q, level_k, level_v, formula)
            allowed = max(allowed, oracle.tolerance(level, plain))
            largest = max(largest, np.abs(level).max(initial=0))
        logits = np.abs(np.where(np.isfinite(expected_lse), expected_lse, 0)).max(initial=0)
        allowed += largest * (oracle.UNIT_ROUNDOFF[flat.dtype] + _LSE_ERROR * (4 + logits))
        error = np.abs(got - expected).max()
        assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}"
    assert len(out) == begin


@st.composite
def calls(draw: st.DrawFn, max_requests: int = 6, max_kv: int = 60) -> tuple[Cascade, bool]:
    """Random cascades of 1 to 4 levels, and whether they are causal."""
    causal = draw(st.booleans())
    num_levels = draw(st.integers(1, 4))
    sizes = [draw(st.integers(0, max_requests))]
    members: list[list[int]] = []
    for _ in range(num_levels - 1):
        # Groups of what there is so far; some of them are of nothing.
        cuts = sorted(draw(st.lists(st.integers(0, sizes[0]), max_size=4)))
        members.insert(0, [b - a for a, b in zip([0, *cuts], [*cuts, sizes[0]], strict=True)])
        sizes.insert(0, len(members[0]))
    length = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 33]), st.integers(0, max_kv))
    kv_len = [[draw(length) for _ in range(size)] for size in sizes]
    qo_len = [
        draw(st.integers(0, min(keys, 12) if causal and keys else 12 * (not causal)))
        for keys in kv_len[-1]
    ]
    cascade = build(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        qo_len,
        kv_len,
        members,
        page_size=draw(st.sampled_from([1, 3, 16, 32])),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 3, 4])),
        head_dim=draw(st.sampled_from([64, 128])),
        dtype=draw(st.sampled_from(["float16", "bfloat16"])),
        kv_layout=draw(st.sampled_from(["NHD", "HND"])),
        cache_form=draw(st.sampled_from(batches.CACHE_FORMS)),
        q_form=draw(st.sampled_from(batches.Q_FORMS)),
        index_dtype=draw(st.sampled_from([np.int32, np.int64])),
    )
    return cascade, causal
