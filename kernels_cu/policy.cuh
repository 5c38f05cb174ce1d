// What differs by feature: which keys a row sees, and what becomes of its logits. Windows, soft
// caps, masks, biases and sinks belong here, as constants of the prologue, so that a feature that
// is off costs nothing.
#pragma once
#include "params.cuh"
#include "merge.cuh"

struct Visibility {
    int item_end;    // keys of the item end here
    int causal_end;  // first key that the request's query 0 does not see
    int step;        // by how much later queries see more

    __device__ __forceinline__ Visibility(const Params& p, const Work& work)
        : item_end(work.item.kv_end),
          causal_end(work.item.kv_len - (p.causal ? work.item.qo_len - 1 : 0)),
          step(p.causal ? 1 : 0) {}

    // The first key, of the item's, that a query of the request no longer sees.
    __device__ __forceinline__ int kv_end(int query) const {
        return min(causal_end + query * step, item_end);
    }

    // Sets logits s of a warp's rows, from first_row of the tile on, and keys, from first_key on,
    // to -inf where the row does not see the key.
    template <int N>
    __device__ __forceinline__ void mask(float (&s)[MMA_Q][N][4], const RowMap& rows, int first_row,
                                         int first_key, int lane) const {
#pragma unroll
        for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = first_row + i * 16 + h * 8 + lane / 4;
                const int end = kv_end(rows.query(row)) - first_key - lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        if (n * 8 + c >= end) s[i][n][2 * h + c] = NEG_INF;
            }
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
