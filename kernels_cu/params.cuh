// What the host hands to a kernel. cupaged/kernel_spec.py mirrors these structs as NumPy dtypes, and
// cupaged/source.py ends every source with assertions that both lie alike.
#pragma once
#include "elements.cuh"
#include "item.cuh"

// By how much of a turn, in units of 2^-64, a position rotates two neighbouring elements.
struct alignas(16) Turns {
    u64 of[2];
};

// Strides are in elements, and may be any; the last axis of every tensor is contiguous.
struct Params {
    const u16* q;        // [nnz_qo, num_qo_heads, HEAD_DIM_QK]
    const KvElement* k;  // [num_pages, page_size, num_kv_heads, HEAD_DIM_QK], whatever the layout
    const KvElement* v;  // [num_pages, page_size, num_kv_heads, HEAD_DIM_VO]
    u16* out;            // [nnz_qo, num_qo_heads, HEAD_DIM_VO]
    float* lse;          // [nnz_qo, num_qo_heads], or null
    i64 q_stride_row, q_stride_head;
    i64 k_stride_page, k_stride_token, k_stride_head;
    i64 v_stride_page, v_stride_token, v_stride_head;
    i64 out_stride_row, out_stride_head;
    i64 lse_stride_row, lse_stride_head;
    const Item* items;        // [num_items]
    const int* page_indices;  // [page_begin of a request + its pages]
    float* partial_out;       // [slots, num_kv_heads, CTA_TILE_Q, HEAD_DIM_VO], normalised
    float* partial_lse;       // [slots, num_kv_heads, CTA_TILE_Q], base 2
    int* merge_counters;      // [split tiles, num_kv_heads], zero between launches
    // [3]: next piece of work, and blocks that are done, both zero between launches; num_items of a
    // plan that may change while its launch, recorded in a CUDA graph, may not.
    int* work_counters;
    const u8* mask_bits;        // of each request [qo_len * kv_len] bits, the lowest of a byte first
    const int* mask_begin;      // [batch]: byte of mask_bits that a request's begin at
    // With a mask: [batch] where a request's words begin in here; these, of [kv_len] bits each, the
    // lowest of a word first: whether any of its rows sees the key.
    const u32* seen_keys;
    const float* alibi_slopes;  // [num_qo_heads], times log2(e)
    const Turns* rope_turns;    // [HEAD_DIM_QK / 4]
    int num_items;              // -1: work_counters has it
    int num_kv_heads, gqa_group_size, page_size, causal, window_left;
    u32 group_magic, group_shift;  // division by gqa_group_size
    u32 page_magic, page_shift;    // division by page_size
    float cap_scale;     // bound of the logits, times log2(e)
    const float* sinks;  // [num_qo_heads], or null
    int negate_logits;   // the factor of the logits is -logit_scale
    // What the softmax multiplies logits with, more than 0: |sm_scale * q_scale * k_scale| *
    // log2(e); where they are transformed before, see policy.cuh, what is left to multiply with.
    float logit_scale;
    float inner_scale;  // what the transformation multiplies products with
    // With a soft cap: products x whose square is less than `cap_square` become x * p(x^2 -
    // cap_square) times log2(e), p with these two coefficients.
    float cap_square, cap_ratio[2];
    float v_scale;
    float lse_scale;  // 1 for base 2, ln(2) for base e
};

// A piece of work: an item for one KV head. Its numbers are read where they are needed and not
// kept, since they are not worth registers during the loop over the keys.
struct Work {
    Item item;
    int kv_head;

    __device__ __forceinline__ Work(const Params& p, int piece)
        : item(p.items[piece / p.num_kv_heads]), kv_head(piece % p.num_kv_heads) {}
};

// Pieces of work of a launch.
__device__ __forceinline__ int num_pieces(const Params& p) {
    return (p.num_items < 0 ? p.work_counters[2] : p.num_items) * p.num_kv_heads;
}

// n / divisor for 0 <= n < 2^31, by a multiplication with ceil(2^(31 + ceil(log2(divisor))) /
// divisor) (Granlund and Montgomery 1994, "Division by invariant integers using multiplication").
// A magic number of 0 stands for the divisor 1.
__device__ __forceinline__ int divide(int n, u32 magic, u32 shift) {
    return magic == 0 ? n : static_cast<int>(__umulhi(static_cast<u32>(n), magic) >> shift);
}
