"""Every check of `plan()`'s arguments, and how each one is worded.

Checks are vectorised; the offender is looked for only once something is known to be wrong.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cupaged.errors import CupagedWarning
from cupaged.schedule import Lengths
from cupaged.spec import SERVED_DTYPES, SERVED_HEAD_DIMS, AttentionSpec, KVLayout

HostIndex = npt.NDArray[Any]
IntArray = npt.NDArray[np.int32]

_POS_ENCODING_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")
_INT32_MAX = 2**31 - 1
_UNSIGNED = {np.dtype(np.int32): np.uint32, np.dtype(np.int64): np.uint64}
_BLOCK = 12288
#: Packed rows and keys are counted in int32, the spare ones of the last tile or split too. More
#: would not fit the memory of any GPU.
_MAX_ROWS = _MAX_KEYS = _MAX_INT = 2**30
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def positive_int(value: object, name: str) -> int:
    """`value` as an int of 1 to 2^30.

    Raises
    ------
    TypeError, ValueError
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {what(value)}, expected an int")
    if value < 1:
        raise ValueError(f"{name} = {value}, expected at least 1")
    if value > _MAX_INT:
        raise ValueError(f"{name} = {value}, expected at most {_MAX_INT}")
    return int(value)


def flag(value: object, name: str) -> bool:
    """`value` as a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {what(value)}, expected a bool")
    return bool(value)


def scale(value: object, name: str) -> float:
    """`value`, a number or an array of one element, as a finite number of float32's range."""
    try:
        # An array's own; of more than one element there is none.
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, (str, bytes, bool)):
            raise TypeError
        number = float(number)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {what(value)}, expected a number") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} = {number}, expected a finite number")
    if abs(number) > _MAX_FLOAT32:
        raise ValueError(f"{name} = {number}, expected at most {_MAX_FLOAT32:.4g} in magnitude")
    return number


def logit_scale(sm_scale: float, q_scale: object, k_scale: object) -> float:
    """What multiplies `q·k`, checked in all."""
    product = sm_scale
    if q_scale is not None:
        product *= scale(q_scale, "q_scale")
    if k_scale is not None:
        product *= scale(k_scale, "k_scale")
    # The kernels work in base 2, with the factor times log2(e).
    highest = _MAX_FLOAT32 / 2
    if abs(product) > highest:
        raise ValueError(
            f"sm_scale * q_scale * k_scale = {product}, expected at most {highest:.4g} in magnitude"
        )
    return product


def choice(value: object, name: str, choices: tuple[str, ...]) -> str:
    """`value` as one of `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {what(value)}, expected one of {_quoted(choices)}")
    if value not in choices:
        raise ValueError(f"{name} = {value!r}, expected one of {_quoted(choices)}")
    return value


def attention_spec(
    num_qo_heads: object,
    num_kv_heads: object,
    head_dim_qk: object,
    head_dim_vo: object,
    page_size: object,
    causal: object,
    sm_scale: object,
    dtypes: tuple[str, str, str],
    kv_layout: KVLayout,
) -> AttentionSpec:
    """Check what an attention call is, apart from its lengths.

    `dtypes` names those of q, of K and V, and of the output.
    """
    if sm_scale is not None:
        sm_scale = scale(sm_scale, "sm_scale")
    arguments = (
        *(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, causal),
        *(sm_scale, dtypes, kv_layout),
    )
    try:
        return _known_spec(*arguments)
    except TypeError:
        pass  # a wrong type; where it can't be hashed, that is yet to be said
    return _attention_spec(*arguments)


def _attention_spec(
    num_qo_heads: object,
    num_kv_heads: object,
    head_dim_qk: object,
    head_dim_vo: object,
    page_size: object,
    causal: object,
    sm_scale: float | None,
    dtypes: tuple[str, str, str],
    kv_layout: KVLayout,
) -> AttentionSpec:
    qo_heads = positive_int(num_qo_heads, "num_qo_heads")
    kv_heads = positive_int(num_kv_heads, "num_kv_heads")
    head_dim = positive_int(head_dim_qk, "head_dim_qk")
    head_dim_out = head_dim if head_dim_vo is None else positive_int(head_dim_vo, "head_dim_vo")
    if qo_heads % kv_heads:
        raise ValueError(
            f"num_qo_heads = {qo_heads}, expected a multiple of num_kv_heads = {kv_heads}"
        )
    if head_dim not in SERVED_HEAD_DIMS:
        raise NotImplementedError(
            f"head_dim_qk = {head_dim}, served are {_listed(SERVED_HEAD_DIMS)}"
        )
    if head_dim_out != head_dim:
        raise NotImplementedError(
            f"head_dim_vo = {head_dim_out} differs from head_dim_qk = {head_dim}, "
            "which no backend serves"
        )
    q_dtype, kv_dtype, o_dtype = dtypes
    if q_dtype not in SERVED_DTYPES:
        raise NotImplementedError(f"q_data_type = {q_dtype}, served are {_listed(SERVED_DTYPES)}")
    for name, dtype in (("kv_data_type", kv_dtype), ("o_data_type", o_dtype)):
        if dtype != q_dtype:
            raise NotImplementedError(
                f"{name} = {dtype} differs from q_data_type = {q_dtype}, which no backend serves"
            )
    return AttentionSpec(
        num_qo_heads=qo_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=positive_int(page_size, "page_size"),
        causal=flag(causal, "causal"),
        sm_scale=1 / math.sqrt(head_dim) if sm_scale is None else sm_scale,
        dtype=q_dtype,
        kv_layout=kv_layout,
    )


# The same few calls are planned again and again. An int is not taken for a bool that equals it.
_known_spec = lru_cache(maxsize=64, typed=True)(_attention_spec)


def pos_encoding_mode(value: object) -> None:
    """Refuse unknown modes, and the known ones that aren't served."""
    mode = choice(value, "pos_encoding_mode", _POS_ENCODING_MODES)
    if mode != "NONE":
        raise NotImplementedError(
            f"plan(): pos_encoding_mode={mode!r} is not served by any backend"
        )


def _indptr(indptr: HostIndex, name: str) -> tuple[IntArray, IntArray]:
    """Check an indptr array; a copy of its values, and their differences."""
    if indptr.ndim != 1 or len(indptr) == 0:
        raise ValueError(f"{name} has shape {indptr.shape}, expected (batch + 1,)")
    values = indptr.copy()
    counts = values[1:] - values[:-1]
    # Where 0 comes first and is the lowest, no difference has wrapped around.
    rising = len(counts) == 0 or (values.argmin() == 0 and counts[counts.argmin()] >= 0)
    if values[0] != 0 or not rising:
        _indptr_error(indptr, name)
    if values[-1] > _INT32_MAX:
        raise ValueError(f"{name}[{len(counts)}] = {values[-1]}, expected at most {_INT32_MAX}")
    return values.astype(np.int32, copy=False), counts.astype(np.int32, copy=False)


def _indptr_error(indptr: HostIndex, name: str) -> None:
    if indptr[0] != 0:
        raise ValueError(f"{name}[0] = {indptr[0]}, expected 0")
    r = int((indptr[1:] < indptr[:-1]).argmax())
    raise ValueError(
        f"{name}[{r + 1}] = {indptr[r + 1]} (end of request {r}), "
        f"expected at least {indptr[r]} = {name}[{r}]"
    )


def lengths(
    qo_indptr: HostIndex,
    paged_kv_indptr: HostIndex,
    paged_kv_last_page_len: HostIndex,
    spec: AttentionSpec,
) -> Lengths:
    """Check the arrays that say how long each request is.

    Parameters
    ----------
    qo_indptr, paged_kv_indptr : int32 or int64 [batch + 1], on the host
    paged_kv_last_page_len : int32 or int64 [batch], on the host

    Raises
    ------
    ValueError
        Names the array, the request, what was expected and what came.
    """
    page_size = spec.page_size
    qo, qo_len = _indptr(qo_indptr, "qo_indptr")
    kv, pages = _indptr(paged_kv_indptr, "paged_kv_indptr")
    if len(qo) != len(kv):
        raise ValueError(
            f"paged_kv_indptr has {_entries(len(kv))}, expected {len(qo)} = batch + 1: "
            f"qo_indptr has {_entries(len(qo))}"
        )
    batch = len(qo_len)
    last = paged_kv_last_page_len
    if last.shape != (batch,):
        raise ValueError(
            f"paged_kv_last_page_len has shape {last.shape}, "
            f"expected ({batch},): qo_indptr has {_entries(len(qo))}"
        )
    if batch == 0:
        return Lengths(qo, kv, qo_len, pages)
    if int(qo[-1]) * spec.num_qo_heads > _MAX_ROWS:
        raise ValueError(
            f"qo_indptr[{batch}] = {qo[-1]} query rows of {spec.num_qo_heads} heads, "
            f"expected at most {_MAX_ROWS} rows times heads in a call"
        )
    if last[last.argmin()] < 1 or last[last.argmax()] > page_size:
        # A request without pages may say 0; its length is ignored.
        lowest = pages > 0
        wrong = (last < lowest) | (last > page_size)
        if wrong.any():
            r = int(wrong.argmax())
            raise ValueError(
                f"paged_kv_last_page_len[{r}] = {last[r]}, "
                f"expected {int(lowest[r])}..{page_size} (page_size={page_size})"
            )
    if int(kv[-1]) * page_size > _MAX_KEYS:  # else no request has that many
        r = int(pages.argmax())
        if int(pages[r]) * page_size > _MAX_KEYS:
            raise ValueError(
                f"paged_kv_indptr: request {r} has {pages[r]} pages of {page_size} tokens, "
                f"expected at most {_MAX_KEYS} tokens"
            )
    kv_len = (pages - 1) * page_size
    kv_len += last
    # Without pages that makes no more than 0.
    return Lengths(qo, kv, qo_len, np.maximum(kv_len, 0, out=kv_len))


def page_indices(indices: HostIndex, lengths: Lengths) -> tuple[IntArray, int]:
    """Check the page table as far as it can be without the cache.

    Returns
    -------
    indices : int32 [paged_kv_indptr[-1]]
        A copy.
    highest : int
        The highest page number, -1 where there is none.
    """
    needed = int(lengths.paged_kv_indptr[-1])
    if indices.ndim != 1:
        raise ValueError(f"paged_kv_indices has shape {indices.shape}, expected one axis")
    if len(indices) < needed:
        raise ValueError(
            f"paged_kv_indices has {_entries(len(indices))}, "
            f"expected at least {needed} = paged_kv_indptr[-1]"
        )
    if needed == 0:
        return np.empty(0, np.int32), -1
    indices = indices[:needed]
    # As unsigned numbers, negative ones are the highest of all.
    unsigned = indices.view(_UNSIGNED[indices.dtype])
    highest = int(unsigned[unsigned.argmax()])
    if highest > _INT32_MAX:
        if np.minimum.reduce(indices) < 0:
            i = int((indices < 0).argmax())
            raise ValueError(f"{_page(indices, i, lengths)}, expected at least 0")
        i = int(indices.argmax())
        raise ValueError(f"{_page(indices, i, lengths)}, expected at most {_INT32_MAX}")
    return indices.astype(np.int32), highest


def page_range(indices: HostIndex, highest: int, lengths: Lengths, num_pages: int) -> None:
    """Check the page table against a cache of `num_pages` pages."""
    if highest >= num_pages:
        i = int((indices >= num_pages).argmax())
        expected = f"0..{num_pages - 1}" if num_pages else "none"
        raise ValueError(
            f"{_page(indices, i, lengths)}, expected {expected}: the cache holds {num_pages} pages"
        )


def warn_of_mistakes(
    spec: AttentionSpec, lengths: Lengths, indices: IntArray, highest: int
) -> None:
    """Warn of input that is legal and almost surely not meant."""
    if spec.causal:
        short = lengths.qo_len > lengths.kv_len
        count = int(np.count_nonzero(short))
        if count:
            r = int(short.argmax())
            qo_len, kv_len = int(lengths.qo_len[r]), int(lengths.kv_len[r])
            warnings.warn(
                f"request {r} has {qo_len} queries and {kv_len} keys{_and_others(count - 1)}: with "
                f"causal=True its first {qo_len - kv_len} rows see no key, and will be 0. Were the "
                "new keys and values appended to the cache, and counted in paged_kv_indptr and "
                "paged_kv_last_page_len?",
                CupagedWarning,
                stacklevel=3,
            )
    _warn_of_repeated_pages(lengths, indices, highest)


def _warn_of_repeated_pages(lengths: Lengths, indices: IntArray, highest: int) -> None:
    if len(indices) < 2:
        return
    # The cheap question first: does any page occur twice in the batch at all?
    seen = np.zeros(highest + 1, np.bool_)
    for begin in range(0, len(indices), _BLOCK):  # small enough to stay in the cache
        seen[indices[begin : begin + _BLOCK].astype(np.intp)] = True
    if np.count_nonzero(seen) == len(indices):
        return
    pages = np.diff(lengths.paged_kv_indptr)
    request = np.arange(len(pages)).repeat(pages)
    keys = request * len(seen) + indices
    order = np.argsort(keys, kind="stable")
    repeats = np.flatnonzero(np.diff(keys[order]) == 0)
    if len(repeats) == 0:
        return
    first, again = int(order[repeats[0]]), int(order[repeats[0] + 1])
    r = int(request[first])
    others = len(np.unique(request[order[repeats]])) - 1
    begin = int(lengths.paged_kv_indptr[r])
    warnings.warn(
        f"request {r} has page {indices[first]} twice, as its pages {first - begin} and "
        f"{again - begin}{_and_others(others)}: its keys will be attended to twice. Was another "
        "page meant in paged_kv_indices?",
        CupagedWarning,
        stacklevel=4,
    )


def _page(indices: HostIndex, i: int, lengths: Lengths) -> str:
    r = int(np.searchsorted(lengths.paged_kv_indptr, i, side="right")) - 1
    place = i - int(lengths.paged_kv_indptr[r])
    return f"paged_kv_indices[{i}] = {indices[i]} (request {r}, its page {place})"


def _and_others(count: int) -> str:
    return f" (and {count} more requests like it)" if count else ""


def _entries(count: int) -> str:
    """A count of entries in words."""
    return f"{count} entry" if count == 1 else f"{count} entries"


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))


def _quoted(values: tuple[str, ...]) -> str:
    return ", ".join(map(repr, values))


def what(value: object) -> str:
    """The type of a value, in words."""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
