"""What an attention bias says, xFormers' own or a twin, without importing xFormers.

A bias is known by its class's name; its lengths are the host's, in the lists whose names end in
`_py`, so that reading them waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cupaged import arrays, bands, validate
from cupaged.bands import Band
from cupaged.door import Batch, Index, Pages, Rows

Layout = Literal["dense", "blocks", "padded", "gappy", "paged", "paged gappy"]


class Form(NamedTuple):
    """A class of biases.

    Attributes
    ----------
    layout : str
        How the keys lie.
    corner : str
        Where the diagonal ends; "" where there is none.
    window : str
        The attributes that say how far from the diagonal a row sees: "_window_size", "sides" for
        `window_left` and `window_right`, or "" for all that is causal.
    """

    layout: Layout
    corner: Literal["", "top left", "bottom right"] = ""
    window: Literal["", "_window_size", "sides"] = ""


_TOP, _BOTTOM = "top left", "bottom right"  # type: Literal["top left"], Literal["bottom right"]

#: Each class's rows see what its `materialize()` leaves at 0.
FORMS: dict[str, Form] = {
    "LowerTriangularMask": Form("dense", _TOP),
    "LowerTriangularFromBottomRightMask": Form("dense", _BOTTOM),
    "LowerTriangularFromBottomRightLocalAttentionMask": Form("dense", _BOTTOM, "_window_size"),
    "LocalAttentionFromBottomRightMask": Form("dense", _BOTTOM, "sides"),
    "BlockDiagonalMask": Form("blocks"),
    "BlockDiagonalCausalMask": Form("blocks", _TOP),
    "BlockDiagonalCausalFromBottomRightMask": Form("blocks", _BOTTOM),
    "BlockDiagonalCausalLocalAttentionMask": Form("blocks", _TOP, "_window_size"),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": Form("blocks", _BOTTOM, "_window_size"),
    "BlockDiagonalPaddedKeysMask": Form("padded"),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": Form("padded", _BOTTOM),
    "BlockDiagonalLocalAttentionPaddedKeysMask": Form("padded", _BOTTOM, "sides"),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": Form("padded", _BOTTOM, "_window_size"),
    "PagedBlockDiagonalPaddedKeysMask": Form("paged"),
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": Form("paged", _BOTTOM),
    "PagedBlockDiagonalCausalLocalPaddedKeysMask": Form("paged", _BOTTOM, "_window_size"),
    "BlockDiagonalGappyKeysMask": Form("gappy"),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": Form("gappy", _BOTTOM),
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask": Form("gappy", _BOTTOM, "sides"),
    "PagedBlockDiagonalGappyKeysMask": Form("paged gappy"),
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": Form("paged gappy", _BOTTOM),
}

#: What says which keys a class's rows see.
_MASKING = ("materialize", "_create_block_mask", "_UNPAGED_TYPE")


class Reading(NamedTuple):
    """What a bias says.

    Attributes
    ----------
    key : Hashable
        All that `describe()` depends on.
    owners : tuple
        What `key` is about.
    describe : callable
    page_size : int, optional
        Where keys are in pages.
    """

    key: Hashable
    owners: tuple[Any, ...]
    describe: Callable[[], Batch]
    page_size: int | None = None


def read(bias: Any, batch: int, num_queries: int, num_keys: int, flat: bool) -> Reading:
    """Read a bias of a query `[batch, num_queries, ...]` and a key `[batch, num_keys, ...]`.

    `flat` says that keys are to be taken for rows of K one behind the other, all batches'; else
    each batch is to be a page.

    Raises
    ------
    NotImplementedError
        It is of no class in `FORMS`.
    ValueError
        It is for other shapes.
    """
    form = _form(bias)
    left, right = _window(bias, form)
    if form.layout == "dense":
        return _read_dense(form, left, right, batch, num_queries, num_keys, flat)
    q_start = tuple(bias.q_seqinfo.seqstart_py)
    k_start = tuple(bias.k_seqinfo.seqstart_py)
    k_len = () if form.layout == "blocks" else tuple(bias.k_seqinfo.seqlen_py)
    key: tuple[Any, ...] = (form, left, right, q_start, k_start, k_len)
    if batch != 1:
        raise ValueError(f"query has batch size {batch}, expected 1: {_of(bias)}")
    _check_rows("query", num_queries, q_start[-1], f"q_seqinfo.seqstart_py[-1] of {_of(bias)}")
    table: Index | None = None
    page_size = None
    if form.layout in ("paged", "paged gappy"):
        page_size = validate.positive_int(bias.page_size, "attn_bias.page_size")
        table = Index(bias.block_tables, "attn_bias.block_tables")
        key = (*key, page_size, table.key)
        if num_keys % page_size:
            raise ValueError(
                f"key has {num_keys} rows, expected a multiple of page_size = {page_size}"
            )
    else:
        _check_rows("key", num_keys, k_start[-1], f"k_seqinfo.seqstart_py[-1] of {_of(bias)}")

    def describe() -> Batch:
        qo_len = _differences(q_start)
        starts = np.array(k_start[:-1], np.int64)
        blocks = form.layout == "blocks"
        kv_len = _differences(k_start) if blocks else np.array(k_len, np.int64)
        if len(qo_len) != len(kv_len):
            raise ValueError(
                f"attn_bias has {len(qo_len)} blocks of queries and {len(kv_len)} of keys, "
                "expected as many"
            )
        if table is None or page_size is None:
            return Batch(_band(form, qo_len, kv_len, left, right), Rows(starts))
        if table.values.ndim != 2 or len(table.values) != len(qo_len):
            raise ValueError(
                f"attn_bias.block_tables has shape {table.values.shape}, expected "
                f"({len(qo_len)}, pages)"
            )
        if form.layout == "paged":
            starts = np.zeros_like(kv_len)
        else:
            kv_len = kv_len - starts  # what xFormers keeps here is where they end
        band = _band(form, qo_len, kv_len, left, right)
        return Batch(band, Pages(table.values, starts, page_size, table.name))

    return Reading(key, () if table is None else (table.x,), describe, page_size)


def _form(bias: Any) -> Form:
    if bias is None:
        return Form("dense")
    for kind in type(bias).__mro__:
        if kind.__name__ in FORMS:
            return FORMS[kind.__name__]
        if any(name in vars(kind) for name in _MASKING):
            break  # another mask than that of the class it comes from
    if arrays.framework(bias) != "other":
        raise NotImplementedError(
            f"attn_bias is an array of shape {tuple(bias.shape)}, served are None and masks"
        )
    raise NotImplementedError(f"attn_bias is {validate.what(bias)}, served are None and {_SERVED}")


_SERVED = ", ".join(FORMS)


def _window(bias: Any, form: Form) -> tuple[int | None, int | None]:
    """How many keys before and behind the diagonal a row sees; None for all."""
    if not form.corner:
        return None, None
    if form.window == "sides":
        return _at_least(0, bias, "window_left"), _at_least(0, bias, "window_right")
    if form.window:
        return _at_least(1, bias, form.window) - 1, 0
    return None, 0


def _at_least(least: int, bias: Any, name: str) -> int:
    """An attribute that xFormers' own classes don't check before they are materialized."""
    value = int(getattr(bias, name))
    if value < least:
        raise ValueError(f"attn_bias.{name} = {value}, expected at least {least}")
    return value


def _differences(starts: tuple[int, ...]) -> npt.NDArray[np.int64]:
    values = np.array(starts, np.int64)
    return values[1:] - values[:-1]


def _band(
    form: Form,
    qo_len: npt.NDArray[np.int64],
    kv_len: npt.NDArray[np.int64],
    left: int | None,
    right: int | None,
) -> Band:
    if form.corner == _TOP:
        return bands.top_left(qo_len, kv_len, left, right)
    return bands.bottom_right(qo_len, kv_len, left, right)


def _read_dense(
    form: Form,
    left: int | None,
    right: int | None,
    batch: int,
    num_queries: int,
    num_keys: int,
    flat: bool,
) -> Reading:
    """A bias that is the same for every element of the batch."""

    def describe() -> Batch:
        qo_len, kv_len = (np.full(batch, n, np.int64) for n in (num_queries, num_keys))
        number = np.arange(batch)
        keys: Rows | Pages = Rows(number * num_keys)
        if not flat:
            keys = Pages(number[:, None], np.zeros(batch, np.int64), num_keys, "key")
        return Batch(_band(form, qo_len, kv_len, left, right), keys)

    key = (form, left, right, batch, num_queries, num_keys, flat)
    return Reading(key, (), describe, None if flat else num_keys)


def _of(bias: Any) -> str:
    return f"attn_bias, {validate.what(bias)}"


def _check_rows(name: str, found: int, expected: int, why: str) -> None:
    if found != expected:
        raise ValueError(f"{name} has {found} rows, expected {expected} = {why}")
