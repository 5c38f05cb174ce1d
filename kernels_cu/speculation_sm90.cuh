// From a tile's products to weights in the registers that wgmma takes them from.
#pragma once
#include "params.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

using Logits = float[1][CTA_TILE_KV / 8][4];
using Weights = Pair[CTA_TILE_KV / 16][4];  // P as the A operand of each 16 keys

// Capped logits are so small that weights relative to 1, and their sums, are within what bfloat16
// and float32 hold: there is no maximum to look for, to subtract or to rescale by.
constexpr bool BOUNDED = CUPAGED_BOUNDED;

__device__ __forceinline__ void pack(Weights& weights, const Logits& s) {
#pragma unroll
    for (int n = 0; n < CTA_TILE_KV / 16; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c)
            weights[n][c] =
                pack_pair(s[0][2 * n + c / 2][c % 2 * 2], s[0][2 * n + c / 2][c % 2 * 2 + 1]);
}

__device__ __forceinline__ void pack(Pair (&weights)[4], const float (&pairs)[4][2]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) weights[c] = pack_pair(pairs[c][0], pairs[c][1]);
}

// Adds up by how much packing has changed weights.
__device__ __forceinline__ void note_rounding(SoftmaxState& state, const Logits& s,
                                              const Weights& weights) {
#pragma unroll
    for (int n = 0; n < CTA_TILE_KV / 16; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float(&exact)[4] = s[0][2 * n + c / 2];
            const Pair pair = weights[n][c];
            state.rounding[0][c % 2] +=
                (unpack_bf16(static_cast<u16>(pair)) - exact[c % 2 * 2]) +
                (unpack_bf16(static_cast<u16>(pair >> 16)) - exact[c % 2 * 2 + 1]);
        }
}

// The softmax of a tile in the hope that no row's maximum has grown beyond the threshold, as most
// tiles' have not: weights relative to the maxima so far need no maximum of the tile. A lane's sum
// of weights shows where the hope was in vain, or where a row has seen no key before and has no
// maximum: either makes it large or NaN. The logits are still there then.
//
// With a soft cap, in the hope too that no product is large: then the cap is a polynomial, whose
// last multiplication is the one that the weights need anyway. Where the cap is BOUNDED that is all
// there is to hope for.
struct Speculation {
    const Params& p;
    float shift[2];
    float sum[2] = {};
    int small = -1;  // negative as long as all products are

    __device__ __forceinline__ Speculation(const SoftmaxState& state, const Params& p)
        : p(p), shift{state.max[0][0] * p.logit_scale, state.max[0][1] * p.logit_scale} {}

    // The logarithm of a product's weight in a lane's first or second row.
    __device__ __forceinline__ float logarithm(float x, int row) {
        if (!CUPAGED_SOFT_CAP) return x * p.logit_scale - shift[row];
        const float beyond = x * x - p.cap_square;
        small &= __float_as_int(beyond);
        const float ratio = p.cap_ratio[1] * beyond + p.cap_ratio[0];
        return x * ratio - shift[row];
    }

    // The weights of 16 keys, in pairs: [rows lane / 4 and lane / 4 + 8, twice][two neighbours].
    __device__ __forceinline__ void weigh(const Logits& s, int n, float (&pairs)[4][2]) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                pairs[c][i] =
                    exp2_approx(logarithm(s[0][2 * n + c / 2][c % 2 * 2 + i], c % 2));
            sum[c % 2] += pairs[c][0] + pairs[c][1];
        }
    }

    // Whether all of the warp's products were as small as a soft cap hopes.
    __device__ __forceinline__ bool all_small() const {
        return !CUPAGED_SOFT_CAP || __all_sync(~0u, small < 0);
    }

    // Whether it was right for all of the warp's rows; then the sums are added to the state's.
    __device__ __forceinline__ bool holds(SoftmaxState& state) const {
        constexpr float LARGE = 1 << static_cast<int>(RESCALE_THRESHOLD);
        bool vain = CUPAGED_SOFT_CAP && small >= 0;
        if (!BOUNDED) vain |= !(sum[0] <= LARGE) || !(sum[1] <= LARGE);
        if (__any_sync(~0u, vain)) return false;
        state.sum[0][0] += sum[0];
        state.sum[0][1] += sum[1];
        return true;
    }
};
