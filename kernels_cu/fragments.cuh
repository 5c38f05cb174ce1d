// What a warp reads of tiles in shared memory for mma_m16n8k16.
//
// 16-bit elements come as ldmatrix has them. 8-bit ones come two in the place of one, and are
// widened in registers: of a row of K a lane then holds four neighbouring elements, where the
// product wants two pairs eight apart, and of V two neighbouring columns, where it wants one. The
// order in which a product adds up elements is free, so Q is read in K's order; and the output's columns
// are put in order as they leave, see results.cuh.
#pragma once
#include "rope.cuh"

// A warp's keys of a tile of K.
struct Keys {
    const Params& p;
    u32 address;    // the first one's row, and this lane's k_fragment_offset()
    int first_key;  // the first one's place in the request
    int lane;
};

#if !CUPAGED_KV_FLOAT8

__device__ __forceinline__ u32 q_fragment_offset(int lane) { return QRows::rows_first(lane); }
__device__ __forceinline__ u32 k_fragment_offset(int lane) { return KRows::chunks_first(lane); }

// Rows 16 * i and on, elements 16 * d and on.
__device__ __forceinline__ void load_q_fragment(Pair (&a)[4], u32 q, int i, int d) {
    ldmatrix_x4(a, QRows::at(q, i, d));
}

// B operands of 16 keys from 16 * n on, and STEPS times 16 elements.
struct KFragment {
    static constexpr int STEPS = 1;
    static constexpr int UNROLL = HEAD_DIM_QK / 16;  // of the loop over fragments
    Pair b[4];

    // Which 16 elements of a row a step of the d-th fragment has; d goes by STEPS.
    static __device__ __forceinline__ int block(int d, int) { return d; }

    __device__ __forceinline__ KFragment(const Keys& keys, int n, int d) {
        ldmatrix_x4(b, KRows::at(keys.address, n, d));
    }
    // Of the first or the last eight keys; of the operand's two registers one.
    __device__ __forceinline__ Pair at(int, int keys, int half) const { return b[2 * keys + half]; }
};

// B operands of 16 keys from 16 * n on, and 16 columns from 16 * d on.
struct VFragment {
    static constexpr int STEPS = 1;  // 16 columns each
    Pair b[4];

    __device__ __forceinline__ VFragment(u32 v, int n, int d) {
        ldmatrix_x4_trans(b, VRows::at(v, n, d));
    }
    // Of the first or the last eight columns; of the operand's two registers one.
    __device__ __forceinline__ Pair at(int, int columns, int half) const {
        return b[2 * columns + half];
    }
};

#else

// Of row lane / 4 and elements 4 * (lane % 4) on.
__device__ __forceinline__ u32 q_fragment_offset(int lane) {
    return QRows::offset(lane / 4, lane % 4 / 2) + lane % 2 * 8;
}

__device__ __forceinline__ void load_q_fragment(Pair (&a)[4], u32 q, int i, int d) {
    const u32 place = QRows::at(q, i, d);
    load_8(a[0], a[2], place);
    load_8(a[1], a[3], place + 8 * Q_ROW_BYTES);
}

#if !CUPAGED_ROPE

__device__ __forceinline__ u32 k_fragment_offset(int lane) { return KRows::chunks_first(lane); }

struct KFragment {
    static constexpr int STEPS = 2;
    static constexpr int UNROLL = HEAD_DIM_QK / 16;
    Pair b[4];  // 4 elements each: [first or last 8 keys][step]

    static __device__ __forceinline__ int block(int d, int step) { return d + step; }

    __device__ __forceinline__ KFragment(const Keys& keys, int n, int d) {
        ldmatrix_x4(b, KRows::at(keys.address, n, d / 2));
    }
    __device__ __forceinline__ Pair at(int step, int keys, int half) const {
        return widen(b[2 * keys + step], half);
    }
};

#else

// Of a row's beginning: where a chunk lies in it depends on which half of the elements it is of.
__device__ __forceinline__ u32 k_fragment_offset(int lane) {
    return (lane % 8 + lane / 16 * 8) * K_ROW_BYTES;
}

// Rotated in registers, as 16-bit elements have no room where 8-bit ones lie: so a fragment has 16
// of a row's first elements, and the 16 that turn with them.
struct KFragment {
    static constexpr int STEPS = 2;
    static constexpr int UNROLL = 1;  // else the angles of several take too many registers
    Pair b[2][STEPS][2];  // [first or last 8 keys][step][half]

    static __device__ __forceinline__ int block(int d, int step) {
        return d / 2 + step * (K_CHUNKS / 2);
    }

    __device__ __forceinline__ KFragment(const Keys& keys, int n, int d) {
        const int lane = keys.lane;
        Pair four[4];  // [first or last 8 keys][step]
        const int chunk = block(d, lane / 8 % 2) ^ lane % 8;  // swizzled, see Rows
        ldmatrix_x4(four, keys.address + n * 16 * K_ROW_BYTES + chunk * 16);
        const Turns* const turns = keys.p.rope_turns + block(d, 0) * 8 + lane % 4 * 2;
#pragma unroll
        for (int eight = 0; eight < 2; ++eight)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Pair(&pairs)[STEPS][2] = b[eight];
                pairs[0][half] = widen(four[2 * eight], half);
                pairs[1][half] = widen(four[2 * eight + 1], half);
                // Loaded again for each key: kept, they would take registers that there are too few
                // of, and they are in the L1 cache.
                Turns here;
                load_now(here.of, turns + half);
                rotate_pairs(pairs[0][half], pairs[1][half], here,
                             keys.first_key + n * 16 + eight * 8 + lane / 4);
            }
    }
    __device__ __forceinline__ Pair at(int step, int keys, int half) const {
        return b[keys][step][half];
    }
};
#endif

// The even columns of a step are its first eight, the odd ones its last.
struct VFragment {
    static constexpr int STEPS = 2;
    Pair b[4];  // 2 columns of 2 keys each: [step][first or last 8 keys]

    __device__ __forceinline__ VFragment(u32 v, int n, int d) {
        ldmatrix_x4_trans(b, VRows::at(v, n, d / 2));
        // Column by column instead of key by key.
#pragma unroll
        for (Pair& four : b) four = permute_bytes(four, 0, 0x3120);
    }
    __device__ __forceinline__ Pair at(int step, int columns, int half) const {
        return widen(b[2 * step + half], columns);
    }
};
#endif
