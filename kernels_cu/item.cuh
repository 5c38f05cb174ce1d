// What the planner hands to the kernels; cupaged/kernel_spec.py mirrors it as a NumPy dtype.
#pragma once
#include "types.cuh"

// One query tile of one request against one range of its keys, for every KV head, and where the
// request lies: one record to wait for, and no other after it. Rows are packed: row
// i * gqa_group_size + g is query i under the g-th query head of the KV head's group.
struct alignas(16) Item {
    int request;        // its number
    int row_begin;      // first packed row
    int kv_begin;       // first key, inclusive
    int kv_end;         // last key, exclusive; kv_begin where no row of the tile sees a key
    int split;          // which split of its query tile this is, of ...
    int num_splits;     // 1: it writes the result; more: a partial state
    int first_partial;  // partial-state slot of split 0
    int merge;          // its tile's place in merge_counters
    int qo_begin;       // the request's first row of q and out
    int qo_len;         // its query rows
    int kv_len;         // its keys
    int page_begin;     // its first entry of page_indices
};
