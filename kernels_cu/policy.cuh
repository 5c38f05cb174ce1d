// What differs by feature: which keys a row sees, and what becomes of its logits. Every feature is a
// constant of the prologue, so that one that is off costs nothing.
#pragma once
#include "merge.cuh"
#include "params.cuh"

// What the products of queries and keys go through before the softmax, which then multiplies with
// what is left of the factor.
#define CUPAGED_TRANSFORMED (CUPAGED_SOFT_CAP || CUPAGED_ALIBI)

// Whether tiles may have keys that no row of a request sees, or of a query tile.
#define CUPAGED_HIDES (CUPAGED_WINDOW || CUPAGED_CUSTOM_MASK)

// Keys from `begin` to before `end` that some rows see, but for a custom mask.
struct Span {
    int begin, end;

    __device__ __forceinline__ bool has(int first, int last) const {
        return !CUPAGED_CUSTOM_MASK && last <= end && (!CUPAGED_WINDOW || first >= begin);
    }
};

struct Visibility {
    const Params& p;
    const Item& item;
    int item_end;    // keys of the item end here
    int causal_end;  // first key that the request's query 0 does not see
    int step;        // by how much later queries see more

    __device__ __forceinline__ Visibility(const Params& p, const Work& work)
        : p(p),
          item(work.item),
          item_end(work.item.kv_end),
          causal_end(work.item.kv_len - (p.causal ? work.item.qo_len - 1 : 0)),
          step(p.causal ? 1 : 0) {}

    // Where a query stands among the keys.
    __device__ __forceinline__ int position(int query) const {
        return item.kv_len - item.qo_len + query;
    }

    // The first key, of the item's, that a query of the request no longer sees.
    __device__ __forceinline__ int kv_end(int query) const {
        return min(causal_end + query * step, item_end);
    }

    // The first key that a query's window shows it.
    __device__ __forceinline__ int kv_begin(int query) const {
        return position(query) - p.window_left;
    }

    // What all queries from `first` to `last` see.
    __device__ __forceinline__ Span seen_by_all(int first, int last) const {
        return {CUPAGED_WINDOW ? kv_begin(last) : 0, kv_end(first)};
    }

    // Whether none of them sees any; a custom mask is not asked.
    __device__ __forceinline__ bool none(int first, int last, int begin, int end) const {
        return begin >= kv_end(last) || (CUPAGED_WINDOW && end <= kv_begin(first));
    }

    // Sets logits s of a warp's rows, from first_row of the tile on, and keys, from first_key on,
    // to -inf where the row does not see the key. `seen` is what all the rows see.
    template <int N>
    __device__ __forceinline__ void mask(float (&s)[MMA_Q][N][4], const RowMap& rows,
                                         const Span& seen, int first_row, int first_key,
                                         int lane) const {
        // With a window few tiles have both ends, and comparing takes as long as the softmax.
        const bool has_end = !CUPAGED_WINDOW || first_key + N * 8 > seen.end;
        const bool has_begin = CUPAGED_WINDOW && first_key < seen.begin;
#pragma unroll
        for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int query = rows.query(first_row + i * 16 + h * 8 + lane / 4);
                const int first = first_key + lane % 4 * 2;
                if (has_end) {
                    const int end = kv_end(query) - first;
#pragma unroll
                    for (int n = 0; n < N; ++n)
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (n * 8 + c >= end) s[i][n][2 * h + c] = NEG_INF;
                }
                if (has_begin) {
                    const int begin = kv_begin(query) - first;
#pragma unroll
                    for (int n = 0; n < N; ++n)
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (n * 8 + c < begin) s[i][n][2 * h + c] = NEG_INF;
                }
                if (CUPAGED_CUSTOM_MASK) {
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        const u32 bits = mask_bits(query, first_key + n * 8) >> lane % 4 * 2;
                        if (!(bits & 1)) s[i][n][2 * h] = NEG_INF;
                        if (!(bits & 2)) s[i][n][2 * h + 1] = NEG_INF;
                    }
                }
            }
    }

    // The custom mask's bits of a query and eight keys. Those of keys that there are none of, or
    // of a query, may be anything.
    __device__ __forceinline__ u32 mask_bits(int query, int key) const {
        const u8* const bytes = p.mask_bits + p.mask_begin[item.request];
        const i64 last = (static_cast<i64>(item.qo_len) * item.kv_len - 1) / 8;
        const i64 bit = static_cast<i64>(query) * item.kv_len + key;
        const u32 low = bytes[min(bit / 8, last)];
        const u32 high = bytes[min(bit / 8 + 1, last)];
        return (low | high << 8) >> bit % 8;
    }
};

// A negative factor turns the largest product into the smallest logit: flip the products, and the
// softmax can go on with the factor's magnitude.
template <int N>
__device__ __forceinline__ void negate(float (&s)[MMA_Q][N][4]) {
#pragma unroll
    for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) s[i][n][c] = -s[i][n][c];
}

// tanh(s * scale), in place. Where all of a warp's arguments are small, as almost all are, a
// polynomial fitted to tanh(x) / x over x^2 is within 5e-7, and leaves the unit for exponentials to
// the softmax; elsewhere it is 1 - 2 / (1 + e^(2x)), which has infinities right, too.
template <int N>
__device__ __forceinline__ void soft_cap(float (&s)[MMA_Q][N][4], float scale) {
    constexpr float SMALL = 0.75f;
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) largest = fmaxf(largest, fabsf(s[i][n][c]));
    if (__all_sync(~0u, largest * fabsf(scale) <= SMALL)) {
#pragma unroll
        for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const float x = s[i][n][c] * scale;
                    const float square = x * x;
                    float ratio = 0.01295073f;
                    ratio = ratio * square - 0.05008019f;
                    ratio = ratio * square + 0.13259831f;
                    ratio = ratio * square - 0.33328348f;
                    ratio = ratio * square + 0.99999946f;
                    s[i][n][c] = x * ratio;
                }
    } else {
#pragma unroll
        for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const float power = exp2_approx(s[i][n][c] * scale * (2.0f * LOG2_E));
                    s[i][n][c] = 1.0f - 2.0f * reciprocal_approx(1.0f + power);
                }
    }
}

// Adds to s * scale what ALiBi adds for each key's distance from the row, in base 2 (Press et al.
// 2022, "Train short, test long").
template <int N>
__device__ __forceinline__ void add_bias(float (&s)[MMA_Q][N][4], float scale,
                                         const Visibility& visible, const RowMap& rows,
                                         int first_row, int first_key, int lane) {
#pragma unroll
    for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first_row + i * 16 + h * 8 + lane / 4;
            const float slope = rows.valid(row) ? rows.p.alibi_slopes[rows.head(row)] : 0.0f;
            const int distance = first_key + lane % 4 * 2 - visible.position(rows.query(row));
            const float nearest = slope * static_cast<float>(distance);
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float& x = s[i][n][2 * h + c];
                    x = x * scale + (slope * (n * 8 + c) + nearest);
                }
        }
}

// What becomes of the products of a warp's rows, from first_row of the tile on, and keys, from
// first_key on, before those are hidden that a row does not see.
template <int N>
__device__ __forceinline__ void transform(float (&s)[MMA_Q][N][4], const Visibility& visible,
                                          const RowMap& rows, int first_row, int first_key,
                                          int lane) {
    const Params& p = rows.p;
#if CUPAGED_SOFT_CAP
    soft_cap(s, p.inner_scale);
#endif
#if CUPAGED_ALIBI
    add_bias(s, CUPAGED_SOFT_CAP ? p.cap_scale : p.inner_scale, visible, rows, first_row, first_key,
             lane);
#endif
    if (!CUPAGED_TRANSFORMED && p.negate_logits) negate(s);
}
