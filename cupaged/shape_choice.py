"""Which requests take which shape of query tile, and why.

Pure functions of the lengths and of the machine's size; no arrays on any GPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cupaged.item_table import IntArray, int32
from cupaged.kernel_spec import KernelConfig
from cupaged.tiles import Shape

#: A request of at most this many packed rows takes the "short" shape. Above it, the second and
#: third 16-row tile read K and V again, and the long shape's spare rows are the lesser waste.
SHORT_MAX_ROWS = 32

#: A batch whose requests have no more keys than this may take the "brief" shape: the ten requests
#: of FlashInfer issue 192 took 9.4 µs with it on an H200, and 9.8 with the "long" one.
BRIEF_MAX_KEYS = 256

#: Short requests ride along in long tiles where that adds at most this share to the work: a tile
#: of their own would be a launch of its own.
_RIDE_ALONG = 0.1
_RIDE_ALONG_FEW_WAVES = 0.5
_FEW_WAVES = 4
#: Packed rows that the work of long tiles is reckoned in, whatever theirs are.
LONG_ROWS = 128


def choose_shapes(
    qo_len: IntArray,
    kv_len: IntArray,
    group: int,
    fewest: int,
    num_rows: int,
    num_kv_heads: int,
    slots: int,
    carries_short: bool,
    by_request: bool,
) -> dict[Shape, npt.NDArray[np.intp] | None]:
    """Which requests take which shape of query tile, where not all take the "short" one.

    Parameters
    ----------
    qo_len, kv_len : int32 [batch]
        Queries and keys of each request. Some request has more than `SHORT_MAX_ROWS` packed rows.
    group : int
        Packed rows of a query.
    fewest, num_rows : int
        Packed rows of the request that has the fewest, and of all.
    num_kv_heads : int
    slots : int
        Thread blocks of the long shape that run at once.
    carries_short : bool
        The long shape's kernel reads K and V about as fast for few rows as for many: then short
        requests ride along always. `bench/NOTES-sm90.md` says where that pays and where it
        doesn't.
    by_request : bool
        Decide each request by its own length alone, so that its bits don't depend on the batch.

    Returns
    -------
    dict
        Shape → indices of requests, in order; None for all of them. Only shapes that occur.
    """
    if fewest > SHORT_MAX_ROWS or (carries_short and not by_request):
        return {"long": None}
    packed_len = qo_len * int32(group)
    short = packed_len <= int32(SHORT_MAX_ROWS)
    if fewest == 0:
        short &= packed_len > int32(0)
    if not by_request and _ride_along(packed_len, kv_len, short, num_rows, num_kv_heads, slots):
        return {"long": None}
    (indices,) = short.nonzero()
    if len(indices) == 0:
        return {"long": None}
    return {"long": (packed_len > int32(SHORT_MAX_ROWS)).nonzero()[0], "short": indices}


def _ride_along(
    packed_len: IntArray,
    kv_len: IntArray,
    short: npt.NDArray[np.bool_],
    num_rows: int,
    num_kv_heads: int,
    slots: int,
) -> bool:
    """Whether the short requests had better take long tiles too.

    A shape of their own would be a launch of its own, with its own ragged end. They ride along
    where they add little to the work, as the keys that tiles read tell it; and in a batch of few
    waves, which such an end costs more, also where they add more, if none is the longest of all.
    """
    short_keys = kv_len * short
    long_keys = kv_len - short_keys
    short_work = int(np.add.reduce(short_keys, dtype=np.int64))
    # In float64 NumPy's dot product is fastest, and can't overflow.
    long_work = float(long_keys.astype(np.float64).dot(packed_len)) / LONG_ROWS
    if short_work <= _RIDE_ALONG * long_work:
        return True
    tiles = num_rows // LONG_ROWS + len(packed_len)  # at most
    if tiles * num_kv_heads > _FEW_WAVES * slots or short_work > _RIDE_ALONG_FEW_WAVES * long_work:
        return False
    return bool(short_keys[short_keys.argmax()] <= long_keys[long_keys.argmax()])


def is_brief(kv_len: IntArray, num_rows: int, config: KernelConfig, num_slots: int) -> bool:
    """Whether a batch has few keys a request, and a piece of work a thread block at most.

    Parameters
    ----------
    kv_len : int32 [batch]
    num_rows : int
        Packed query rows of all requests.
    config : KernelConfig
        Of the brief shape.
    num_slots : int
        Items that run at once.
    """
    items = num_rows // config.cta_tile_q + len(kv_len)  # at most
    return items <= num_slots and int(kv_len[kv_len.argmax()]) <= BRIEF_MAX_KEYS
