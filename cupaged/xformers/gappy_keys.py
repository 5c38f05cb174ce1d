"""Twins of the biases whose keys lie anywhere, in K or in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from cupaged import validate
from cupaged.xformers.block_diagonal import AttentionBias
from cupaged.xformers.seqlens import GappySeqInfo, SeqLenInfo, check_batch, lengths

_Gappy = TypeVar("_Gappy", bound="BlockDiagonalGappyKeysMask")
_PagedGappy = TypeVar("_PagedGappy", bound="PagedBlockDiagonalGappyKeysMask")


@dataclass(eq=False)
class BlockDiagonalGappyKeysMask(AttentionBias):
    """Rows see the keys of their request, which lie anywhere."""

    q_seqinfo: Any
    k_seqinfo: Any

    @classmethod
    def from_seqlens(
        cls: type[_Gappy], q_seqlen: Any, kv_seqstarts: Any, kv_seqlen: Any, *, device: Any = None
    ) -> _Gappy:
        """Of requests with so many queries each, and so many keys from a row of K on.

        `kv_seqstarts` [batch + 1] ends with the number of K's rows.
        """
        q_seqinfo = SeqLenInfo.from_seqlens(q_seqlen, "q_seqlen")
        starts, counts = lengths(kv_seqstarts, "kv_seqstarts"), lengths(kv_seqlen, "kv_seqlen")
        check_batch(q_seqinfo, len(counts))
        if len(starts) != len(counts) + 1:
            raise ValueError(
                f"kv_seqstarts has {len(starts)} entries, expected {len(counts) + 1} = batch + 1"
            )
        return cls(q_seqinfo, GappySeqInfo(starts, counts))

    def make_paged(
        self,
        block_tables: Any,
        page_size: int,
        notional_padding: int,
        paged_type: type[_PagedGappy],
    ) -> _PagedGappy:
        """The same over pages: request `r` has K's rows from `r * notional_padding` on."""
        page_size = validate.positive_int(page_size, "page_size")
        if validate.positive_int(notional_padding, "notional_padding") % page_size:
            raise ValueError(
                f"notional_padding = {notional_padding}, expected a multiple of "
                f"page_size = {page_size}"
            )
        starts = [
            start - r * notional_padding for r, start in enumerate(self.k_seqinfo.seqstart_py[:-1])
        ]
        return paged_type(
            *(self.q_seqinfo, _gappy_pages(starts, self.k_seqinfo.seqlen_py)),
            *(block_tables, page_size),
        )


@dataclass(eq=False)
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """The same, causal from the bottom right."""


@dataclass(eq=False)
class PagedBlockDiagonalGappyKeysMask(AttentionBias):
    """Rows see so many keys of their request's pages, from a key of these on.

    Attributes as `PagedBlockDiagonalPaddedKeysMask` has them; `k_seqinfo` is a `GappySeqInfo`.
    """

    q_seqinfo: Any
    k_seqinfo: Any
    block_tables: Any
    page_size: int

    @classmethod
    def from_seqlens(
        cls: type[_PagedGappy],
        q_seqlen: Any,
        kv_seqstarts: Any,
        kv_seqlen: Any,
        block_tables: Any,
        page_size: int,
        *,
        device: Any = None,
    ) -> _PagedGappy:
        """Of requests with so many queries and keys each.

        The keys of request `r` begin with key `kv_seqstarts[r]` of its pages.
        """
        q_seqinfo = SeqLenInfo.from_seqlens(q_seqlen, "q_seqlen")
        starts, counts = lengths(kv_seqstarts, "kv_seqstarts"), lengths(kv_seqlen, "kv_seqlen")
        check_batch(q_seqinfo, len(counts))
        if len(starts) != len(counts):
            raise ValueError(
                f"kv_seqstarts has {len(starts)} entries, expected {len(counts)} = batch"
            )
        page_size = validate.positive_int(page_size, "page_size")
        return cls(q_seqinfo, _gappy_pages(starts, counts), block_tables, page_size)


@dataclass(eq=False)
class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """The same, causal from the bottom right."""


def _gappy_pages(starts: list[int], counts: list[int]) -> GappySeqInfo:
    """What xFormers keeps of keys in pages: where they begin, and where they end."""
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    return GappySeqInfo([*starts, -1], ends)
