// What a warp reads of tiles in shared memory for mma_m16n8k16.
//
// 16-bit elements come as ldmatrix has them. 8-bit ones come two in the place of one, and are
// widened in registers: of a row of K a lane then holds four neighbouring elements, where the
// product wants two pairs eight apart, and of V two neighbouring columns, where it wants one. The
// order in which a product adds up elements is free, so Q is read in K's order; and the output's columns
// are put in order as they leave, see results.cuh.
#pragma once
#include "tile.cuh"

#if !CUPAGED_KV_FLOAT8

__device__ __forceinline__ u32 q_fragment_offset(int lane) { return QRows::rows_first(lane); }

// Rows 16 * i and on, elements 16 * d and on.
__device__ __forceinline__ void load_q_fragment(Pair (&a)[4], u32 q, int i, int d) {
    ldmatrix_x4(a, QRows::at(q, i, d));
}

// B operands of 16 keys from 16 * n on, and 16 elements from 16 * d on.
struct KFragment {
    static constexpr int STEPS = 1;  // 16 elements each
    Pair b[4];

    __device__ __forceinline__ KFragment(u32 k, int n, int d) { ldmatrix_x4(b, KRows::at(k, n, d)); }
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

struct KFragment {
    static constexpr int STEPS = 2;
    Pair b[4];  // 4 elements each: [first or last 8 keys][step]

    __device__ __forceinline__ KFragment(u32 k, int n, int d) {
        ldmatrix_x4(b, KRows::at(k, n, d / 2));
    }
    __device__ __forceinline__ Pair at(int step, int keys, int half) const {
        return widen(b[2 * keys + step], half);
    }
};

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
