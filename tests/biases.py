"""Attention biases drawn at random: xFormers' own and the twins of the same names."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

Array = np.ndarray[Any, Any]

#: Name → (how its keys lie, where its diagonal ends, how wide it is).
KINDS = {
    "LowerTriangularMask": ("dense", "top left", ""),
    "LowerTriangularFromBottomRightMask": ("dense", "bottom right", ""),
    "LowerTriangularFromBottomRightLocalAttentionMask": ("dense", "bottom right", "size"),
    "LocalAttentionFromBottomRightMask": ("dense", "bottom right", "sides"),
    "BlockDiagonalMask": ("blocks", "", ""),
    "BlockDiagonalCausalMask": ("blocks", "top left", ""),
    "BlockDiagonalCausalFromBottomRightMask": ("blocks", "bottom right", ""),
    "BlockDiagonalCausalLocalAttentionMask": ("blocks", "top left", "size"),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": ("blocks", "bottom right", "size"),
    "BlockDiagonalPaddedKeysMask": ("padded", "", ""),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": ("padded", "bottom right", ""),
    "BlockDiagonalLocalAttentionPaddedKeysMask": ("padded", "bottom right", "sides"),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": ("padded", "bottom right", "size"),
    "BlockDiagonalGappyKeysMask": ("gappy", "", ""),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": ("gappy", "bottom right", ""),
    "PagedBlockDiagonalPaddedKeysMask": ("paged", "", ""),
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": ("paged", "bottom right", ""),
    "PagedBlockDiagonalGappyKeysMask": ("paged gappy", "", ""),
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": ("paged gappy", "bottom right", ""),
}

#: What there is beside `BlockDiagonalMask`'s constructor.
MAKES = {
    "BlockDiagonalCausalMask": ("make_causal",),
    "BlockDiagonalCausalFromBottomRightMask": ("make_causal_from_bottomright",),
    "BlockDiagonalCausalLocalAttentionMask": ("make_local_attention", "window_size"),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (
        "make_local_attention_from_bottomright",
        "window_size",
    ),
}


@dataclass(frozen=True)
class Drawn:
    """A bias, before it is of any library.

    Attributes
    ----------
    name : str
    qo_len, kv_len : list of int [batch]
    begin : list of int [batch]
        First key of each request, of all of K's or of its pages'.
    num_keys : int
        Rows of K.
    room : int
        Keys that a request has room for.
    page_size : int
        0 where there are no pages.
    table : int32 [batch, pages]
    left, right : int
        Of a window with two sides; `left` is of all windows.
    """

    name: str
    qo_len: list[int]
    kv_len: list[int]
    begin: list[int]
    num_keys: int
    room: int
    page_size: int
    table: Array
    left: int
    right: int

    @property
    def num_queries(self) -> int:
        return sum(self.qo_len)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        ends = np.cumsum([0, *self.qo_len]).tolist()
        return list(pairwise(ends))

    def bias(self, masks: Any, table: Any = None) -> Any:
        """The bias, of xFormers' masks or of the twins, with a framework's page table."""
        layout, _, width = KINDS[self.name]
        kind, window_size = getattr(masks, self.name), self.left + 1
        if layout == "dense":
            sizes = {"": (), "size": (window_size,), "sides": (self.left, self.right)}
            return kind(*sizes[width])
        if layout == "blocks":
            plain = masks.BlockDiagonalMask.from_seqlens(self.qo_len, self.kv_len)
            if self.name == "BlockDiagonalMask":
                return plain
            make, *windows = MAKES[self.name]
            return getattr(plain, make)(*(window_size for _ in windows))
        if layout == "padded":
            if width == "size":
                return kind.from_seqlens_local(self.qo_len, self.room, self.kv_len, window_size)
            if width == "sides":
                return kind.from_seqlens_local(
                    self.qo_len, self.room, self.kv_len, self.left, self.right
                )
            return kind.from_seqlens(self.qo_len, self.room, self.kv_len)
        if layout == "gappy":
            return kind.from_seqlens(self.qo_len, [*self.begin, self.num_keys], self.kv_len)
        if layout == "paged":
            return kind.from_seqlens(self.qo_len, self.kv_len, table, self.page_size)
        # Its from_seqlens() always fails in xFormers 0.0.35; this is how users make one.
        starts = [r * self.room + begin for r, begin in enumerate(self.begin)]
        gappy = masks.BlockDiagonalGappyKeysMask.from_seqlens(
            self.qo_len, [*starts, len(starts) * self.room], self.kv_len
        )
        return gappy.make_paged(table, self.page_size, self.room, kind)

    def places(self, r: int) -> Array:
        """The rows of K at which request `r`'s keys are."""
        place = self.begin[r] + np.arange(self.kv_len[r])
        if not self.page_size:
            return place
        page, in_page = np.divmod(place, self.page_size)
        return self.table[r, page] * self.page_size + in_page

    def poison(self, *arrays: Array) -> None:
        """NaN in all rows of K or V that are no request's."""
        own = [self.places(r) for r in range(len(self.kv_len))]
        others = np.setdiff1d(np.arange(self.num_keys), np.concatenate(own))
        for x in arrays:
            x[others] = np.nan

    def seen(self) -> Array:
        """Bool [queries, keys]: by the letter of what the classes say of themselves."""
        _, corner, width = KINDS[self.name]
        seen = np.zeros((self.num_queries, self.num_keys), np.bool_)
        for r, (first_row, end) in enumerate(self.blocks):
            keys, places = self.kv_len[r], self.places(r)
            shift = keys - self.qo_len[r] if corner == "bottom right" else 0
            for i in range(end - first_row):
                for j in range(keys):
                    ahead = j - (i + shift)
                    if corner and ahead > (self.right if width == "sides" else 0):
                        continue
                    if width and -ahead > self.left:
                        continue
                    seen[first_row + i, places[j]] = True
        return seen


@st.composite
def drawn_biases(draw: Any, name: str | None = None, longest: int = 24) -> Drawn:
    """Any bias that xFormers can make, of the class `name` where there is one."""
    name = draw(st.sampled_from(sorted(KINDS))) if name is None else name
    layout, corner, width = KINDS[name]
    batch = 1 if layout == "dense" else draw(st.integers(1, 4))
    lengths = st.lists(st.integers(0, longest), min_size=batch, max_size=batch)
    qo_len, kv_len = draw(lengths), draw(lengths)
    left = draw(st.integers(0, longest))
    right = draw(st.integers(0, longest // 2))
    if layout == "blocks" and corner == "bottom right":
        kv_len = [max(pair) for pair in zip(qo_len, kv_len, strict=True)]  # it insists
    if layout == "blocks" and corner == "top left" and width:
        # It insists that each row sees a key.
        kv_len = [max(n - left, m, 1) for n, m in zip(qo_len, kv_len, strict=True)]
    page_size, pages = 0, 0
    begin = np.cumsum([0, *kv_len])[:-1].tolist()
    num_keys, room = sum(kv_len), max(kv_len)
    if layout == "padded":
        room = max(kv_len) + draw(st.integers(1, 4))
        begin, num_keys = [r * room for r in range(batch)], batch * room
    elif layout == "gappy":
        gaps = draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch))
        begin = (np.array(begin) + np.cumsum(gaps)).tolist()
        num_keys += sum(gaps) + draw(st.integers(0, 3))
    elif layout in ("paged", "paged gappy"):
        page_size = draw(st.sampled_from([1, 4, 16]))
        begin = [0] * batch
        if layout == "paged gappy":
            begin = draw(st.lists(st.integers(0, 20), min_size=batch, max_size=batch))
        most = max(b + m for b, m in zip(begin, kv_len, strict=True)) + 1
        pages = -(-most // page_size)
        room = pages * page_size
        spare = draw(st.integers(0, 2))
        num_keys = (batch * pages + spare) * page_size
    numbers = draw(st.permutations(range(num_keys // page_size))) if page_size else []
    table = np.array(numbers[: batch * pages], np.int32).reshape(batch, pages)
    return Drawn(name, qo_len, kv_len, begin, num_keys, room, page_size, table, left, right)
