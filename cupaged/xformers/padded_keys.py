"""Twins of the biases whose keys lie in room for more, and of those whose keys lie in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from cupaged import validate
from cupaged.xformers.block_diagonal import AttentionBias
from cupaged.xformers.seqlens import PaddedSeqLenInfo, SeqLenInfo, check_batch, check_windows

_Padded = TypeVar("_Padded", bound="BlockDiagonalPaddedKeysMask")
_Paged = TypeVar("_Paged", bound="PagedBlockDiagonalPaddedKeysMask")


@dataclass(eq=False)
class BlockDiagonalPaddedKeysMask(AttentionBias):
    """Rows see the used keys of their request, which has room for `kv_padding`."""

    q_seqinfo: Any
    k_seqinfo: Any

    @classmethod
    def from_seqlens(
        cls: type[_Padded],
        q_seqlen: Any,
        kv_padding: int,
        kv_seqlen: Any,
        causal_diagonal: Any = None,
        *,
        device: Any = None,
    ) -> _Padded:
        """Of requests with so many queries each, and so many keys used of `kv_padding`.

        `causal_diagonal` and `device` are for xFormers' callers; it has no use for the first
        itself.
        """
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen))

    def make_local_attention(
        self, window_left: int, window_right: int
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        """The same with a window on either side of the bottom right diagonal."""
        return BlockDiagonalLocalAttentionPaddedKeysMask(
            self.q_seqinfo, self.k_seqinfo, window_left, window_right
        )

    def make_paged(self, block_tables: Any, page_size: int, paged_type: type[_Paged]) -> _Paged:
        """The same over pages, `block_tables` [batch, pages]."""
        padding = _room(block_tables, page_size)
        k_seqinfo = PaddedSeqLenInfo.from_seqlens_padded(self.k_seqinfo.seqlen_py, padding)
        return paged_type(self.q_seqinfo, k_seqinfo, block_tables, page_size)


@dataclass(eq=False)
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The same, causal from the bottom right."""

    causal_diagonal: Any = None


@dataclass(eq=False)
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The same with a window on either side of the bottom right diagonal."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        check_windows(self.window_left, self.window_right)

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Any, kv_padding: int, kv_seqlen: Any, window_left: int, window_right: int
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        """As `from_seqlens()`, with the window."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen), window_left, window_right)


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The same, causal from the bottom right, with a window of `_window_size` keys."""

    _window_size: int

    def __post_init__(self) -> None:
        validate.positive_int(self._window_size, "window_size")

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Any, kv_padding: int, kv_seqlen: Any, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionPaddedKeysMask:
        """As `from_seqlens()`, with the window."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen), window_size)


@dataclass(eq=False)
class PagedBlockDiagonalPaddedKeysMask(AttentionBias):
    """Rows see the used keys of their request, which lie in pages.

    Attributes
    ----------
    q_seqinfo : SeqLenInfo
    k_seqinfo : PaddedSeqLenInfo
    block_tables : int array [batch, pages]
    page_size : int
    """

    q_seqinfo: Any
    k_seqinfo: Any
    block_tables: Any
    page_size: int

    @classmethod
    def from_seqlens(
        cls: type[_Paged],
        q_seqlen: Any,
        kv_seqlen: Any,
        block_tables: Any,
        page_size: int,
        *,
        device: Any = None,
    ) -> _Paged:
        """Of requests with so many queries and so many keys each."""
        padding = _room(block_tables, page_size)
        return cls(*_padded(q_seqlen, padding, kv_seqlen), block_tables, page_size)


@dataclass(eq=False)
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """The same, causal from the bottom right."""


def _room(block_tables: Any, page_size: Any) -> int:
    """Keys that a request's pages have room for."""
    shape = getattr(block_tables, "shape", None)
    if shape is None:
        kind = validate.what(block_tables)
        raise TypeError(f"block_tables is {kind}, expected an int array [batch, pages]")
    if len(shape) != 2:
        raise ValueError(f"block_tables has shape {tuple(shape)}, expected (batch, pages)")
    return int(shape[1]) * validate.positive_int(page_size, "page_size")


def _padded(q_seqlen: Any, kv_padding: int, kv_seqlen: Any) -> tuple[SeqLenInfo, PaddedSeqLenInfo]:
    q_seqinfo = SeqLenInfo.from_seqlens(q_seqlen, "q_seqlen")
    k_seqinfo = PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding)
    check_batch(q_seqinfo, len(k_seqinfo.seqlen_py))
    return q_seqinfo, k_seqinfo
