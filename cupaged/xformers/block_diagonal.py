"""Twins of the biases whose keys lie one request behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cupaged import validate
from cupaged.xformers.seqlens import (
    SeqLenInfo,
    check_batch,
    check_lists,
    check_windows,
    concatenated,
)

_Bias = TypeVar("_Bias", bound="AttentionBias")
_Blocks = TypeVar("_Blocks", bound="BlockDiagonalMask")


class AttentionBias:
    """What every bias is."""

    def to(self: _Bias, device: Any) -> _Bias:
        """The bias itself: it is on the host, and serves every device."""
        return self


class LowerTriangularMask(AttentionBias):
    """Row `i` sees keys `j <= i`: aligned to the top left."""

    def __init__(self, device: Any = None) -> None:
        pass  # there is nothing to put anywhere, as in xFormers


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Row `i` sees keys `j <= num_keys - num_queries + i`."""

    def make_local_attention(
        self, window_size: int
    ) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """The same with a window of `window_size` keys, the row's own counted."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass(eq=False)
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """The same with a window of `_window_size` keys, the row's own counted."""

    _window_size: int

    def __post_init__(self) -> None:
        validate.positive_int(self._window_size, "window_size")


@dataclass(eq=False)
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Rows see `window_left` keys before the bottom right diagonal to `window_right` behind."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        check_windows(self.window_left, self.window_right)


@dataclass(eq=False)
class BlockDiagonalMask(AttentionBias):
    """Rows see all keys of their request.

    Attributes
    ----------
    q_seqinfo, k_seqinfo : SeqLenInfo
    """

    q_seqinfo: Any
    k_seqinfo: Any
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls: type[_Blocks], q_seqlen: Any, kv_seqlen: Any = None, *, device: Any = None
    ) -> _Blocks:
        """Of requests with so many queries and so many keys each.

        Parameters
        ----------
        q_seqlen : sequence of int [batch]
        kv_seqlen : sequence of int [batch], optional
            As many keys as queries where not given.
        device
            For xFormers' callers.

        Raises
        ------
        TypeError, ValueError
            Lengths that are none; names the argument and the request.
        """
        q_seqinfo = SeqLenInfo.from_seqlens(q_seqlen, "q_seqlen")
        if kv_seqlen is None:
            return cls(q_seqinfo, q_seqinfo)
        k_seqinfo = SeqLenInfo.from_seqlens(kv_seqlen, "kv_seqlen")
        check_batch(q_seqinfo, len(k_seqinfo.seqstart_py) - 1)
        return cls(q_seqinfo, k_seqinfo)

    @classmethod
    def from_tensor_list(cls: type[_Blocks], tensors: Sequence[Any]) -> tuple[_Blocks, Any]:
        """The bias of arrays `[batch, rows, ...]`, and the arrays as one, `[1, all rows, ...]`."""
        sizes = [x.shape[0] for x in tensors]
        bias = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])])
        bias._batch_sizes = sizes
        return bias, concatenated(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls: type[_Blocks],
        tensors_q: Sequence[Any],
        tensors_k: Sequence[Any],
        tensors_v: Sequence[Any] | None = None,
    ) -> tuple[_Blocks, Any, Any, Any]:
        """The bias of queries and keys in lists, and each list as one array.

        Parameters
        ----------
        tensors_q : sequence of array [batch, queries, ...]
        tensors_k, tensors_v : sequence of array [batch, keys, ...]
            As many, of the same batches; values are optional.

        Returns
        -------
        bias : cls
        q, k, v : array [1, all rows, ...]
            v is None where no values were given.

        Raises
        ------
        TypeError, ValueError
            Lists that don't fit each other; names the array.
        """
        check_lists(tensors_q, tensors_k, tensors_v)
        sizes = [x.shape[0] for x in tensors_q]
        q_seqlen, kv_seqlen = (
            [x.shape[1] for x in tensors for _ in range(x.shape[0])]
            for tensors in (tensors_q, tensors_k)
        )
        bias = cls.from_seqlens(q_seqlen, kv_seqlen)
        bias._batch_sizes = sizes
        q, k = concatenated(tensors_q, "tensors_q"), concatenated(tensors_k, "tensors_k")
        v = None if tensors_v is None else concatenated(tensors_v, "tensors_v")
        return bias, q, k, v

    def split(self, tensor: Any) -> list[Any]:
        """Cut `[1, all rows, ...]` into the arrays that `from_tensor_list()` was given."""
        return self.split_queries(tensor)

    def split_queries(self, tensor: Any) -> list[Any]:
        """Cut `[1, all queries, ...]` into one array a request."""
        parts: list[Any] = self.q_seqinfo.split(tensor, self._batch_sizes)
        return parts

    def split_kv(self, tensor: Any) -> list[Any]:
        """Cut `[1, all keys, ...]` into one array a request."""
        parts: list[Any] = self.k_seqinfo.split(tensor, self._batch_sizes)
        return parts

    def make_causal(self) -> BlockDiagonalCausalMask:
        """The same, causal from the top left of each block."""
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """The same, causal from the bottom right of each block."""
        return BlockDiagonalCausalFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes
        )

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        """The same, causal from the top left of each block, with a window."""
        return BlockDiagonalCausalLocalAttentionMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        """The same, causal from the bottom right of each block, with a window."""
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )


@dataclass(eq=False)
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Row `i` of a request sees its keys `j <= i`: aligned to the top left."""


@dataclass(eq=False)
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Row `i` of a request sees its keys `j <= kv_len - qo_len + i`."""

    def __post_init__(self) -> None:
        q_start, k_start = self.q_seqinfo.seqstart_py, self.k_seqinfo.seqstart_py
        for r in range(len(q_start) - 1):
            queries, keys = q_start[r + 1] - q_start[r], k_start[r + 1] - k_start[r]
            if keys < queries:
                raise ValueError(
                    f"kv_seqlen[{r}] = {keys}, expected at least {queries} = q_seqlen[{r}]"
                )


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Row `i` of a request sees its keys `i - _window_size < j <= i`."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        validate.positive_int(self._window_size, "window_size")


@dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Row `i` of a request sees `_window_size` keys, the last of them `kv_len - qo_len + i`."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.positive_int(self._window_size, "window_size")
