"""What kernels read of a variant beside their parameters."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from test_schedule import lengths_of
from test_schedule_variants import Case, cases

from cupaged.variant_tables import most_seen_words, seen_keys


@given(cases(max_qo=60, max_kv=200).filter(lambda case: case.bits is not None))
def test_keys_that_any_row_of_their_request_sees(case: Case) -> None:
    """By bits, request after request, each from a word on that the first words tell."""
    assert case.mask is not None
    lengths = lengths_of(case.spec, case.batch)
    table = seen_keys(case.spec, case.mask, lengths)
    assert table.dtype == np.int32
    end = len(case.batch)
    for r, (qo_len, kv_len) in enumerate(case.batch):
        words = -(-kv_len // 32) if qo_len else 0
        assert table[r] == end
        bits = np.unpackbits(table[end : end + words].view(np.uint8), bitorder="little")
        if words:
            np.testing.assert_array_equal(bits[:kv_len], case.visible(r).any(axis=0))
        end += words
    assert len(table) == end
    keys = sum(kv_len for _, kv_len in case.batch)
    for most_keys in (keys, 2**40):
        assert end <= most_seen_words(len(case.batch), len(case.mask.bits), most_keys)
