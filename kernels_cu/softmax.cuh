// The running softmax of a warp's rows (Milakov and Gimelshein 2018, "Online normalizer
// calculation for softmax"), in base 2 with the logit's scale folded into one multiply-add.
#pragma once
#include "ptx.cuh"
#include "ptx_convert.cuh"

// Logits may exceed the maximum that the weights are relative to by this power of two before the
// output is rescaled. Weights then reach 2^8, far from what 16-bit floats hold, and most tiles
// need no rescaling at all.
constexpr float RESCALE_THRESHOLD = 8.0f;

// A lane holds, of each of MMA_Q 16-row blocks, rows lane / 4 and lane / 4 + 8; four lanes share a
// row. `sum` is the lane's own share until finish() adds the four up.
struct SoftmaxState {
    float max[MMA_Q][2];  // of the unscaled logits; -inf where no key was seen
    float sum[MMA_Q][2];
    // What rounding to 16 bits has added to the weights of rows that see few keys, where none of
    // them is 1 for certain: a row that sees one key then has that key's value, exactly.
    float rounding[MMA_Q][2];

    __device__ __forceinline__ SoftmaxState() {
#pragma unroll
        for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                max[i][h] = NEG_INF;
                sum[i][h] = rounding[i][h] = 0.0f;
            }
    }

    // Takes in the logits' maxima. Where one of the warp's has grown by more than the threshold,
    // all rows move on to theirs, and the output has to be rescaled by `factor`: then it returns
    // true. `scale` is positive.
    template <int N>
    __device__ __forceinline__ bool raise(const float (&s)[MMA_Q][N][4], float scale,
                                          float (&factor)[MMA_Q][2]) {
        float top[MMA_Q][2];
        bool grown = false;
#pragma unroll
        for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float t = max[i][h];
#pragma unroll
                for (int n = 0; n < N; ++n) t = fmaxf(t, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
                t = fmaxf(t, __shfl_xor_sync(~0u, t, 1));
                t = fmaxf(t, __shfl_xor_sync(~0u, t, 2));
                top[i][h] = t;
                // From -inf to -inf this is NaN, and false.
                grown |= (t - max[i][h]) * scale > RESCALE_THRESHOLD;
            }
        // One decision a warp, so that the rescaling is a branch and not a multiplication by 1.
        if (!__any_sync(~0u, grown)) return false;
#pragma unroll
        for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float t = top[i][h];
                factor[i][h] = t == NEG_INF ? 1.0f : exp2_approx((max[i][h] - t) * scale);
                max[i][h] = t;
                sum[i][h] *= factor[i][h];
            }
        return true;
    }

    // Turns unscaled logits s into weights, in place.
    template <int N>
    __device__ __forceinline__ void weigh(float (&s)[MMA_Q][N][4], float scale) {
#pragma unroll
        for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                // A row that has seen no key has no maximum to subtract; its logits are all -inf.
                const float shift = max[i][h] == NEG_INF ? 0.0f : max[i][h] * scale;
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int c = 2 * h; c < 2 * h + 2; ++c) {
                        s[i][n][c] = exp2_approx(s[i][n][c] * scale - shift);
                        sum[i][h] += s[i][n][c];
                    }
            }
    }

    // Divides the output by the sums and multiplies it by `factor`; returns each row's log-sum-exp,
    // base 2, in `max`.
    template <int D>
    __device__ __forceinline__ void finish(float (&o)[MMA_Q][D][4], float scale, float factor) {
#pragma unroll
        for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float total = sum[i][h];
                total += __shfl_xor_sync(~0u, total, 1);
                total += __shfl_xor_sync(~0u, total, 2);
                float held = total;
                if (CUPAGED_BOUNDED) {
                    float change = rounding[i][h];
                    change += __shfl_xor_sync(~0u, change, 1);
                    held += change + __shfl_xor_sync(~0u, change, 2);
                }
                const float inverse = total == 0.0f ? 0.0f : factor / held;
                max[i][h] = total == 0.0f ? NEG_INF : max[i][h] * scale + log2_approx(total);
#pragma unroll
                for (int d = 0; d < D; ++d) {
                    o[i][d][2 * h] *= inverse;
                    o[i][d][2 * h + 1] *= inverse;
                }
            }
    }
};

// Rescales each row of the output by its factor.
template <int D>
__device__ __forceinline__ void rescale(float (&o)[MMA_Q][D][4], const float (&factor)[MMA_Q][2]) {
#pragma unroll
    for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
        for (int d = 0; d < D; ++d)
#pragma unroll
            for (int c = 0; c < 4; ++c) o[i][d][c] *= factor[i][c / 2];
}
