// A warp's rows leaving its registers: as a result, or as a state of their own.
#pragma once
#include "merge.cuh"
#include "softmax.cuh"

// A warp's output: [MMA_Q 16-row blocks][blocks of 8 columns][a lane's four elements], as
// mma_m16n8k16 and wgmma have them. With 8-bit elements of V, of each 16 columns the first block
// has the even ones and the second the odd ones, so that a lane holds four in a row.
using Output = float[MMA_Q][HEAD_DIM_VO / 8][4];

#if CUPAGED_KV_FLOAT8
// A lane's four neighbouring columns of the d-th 16, of its first or second row.
__device__ __forceinline__ Float4 neighbours(const Output& o, int i, int d, int h) {
    return {o[i][2 * d][2 * h], o[i][2 * d + 1][2 * h], o[i][2 * d][2 * h + 1],
            o[i][2 * d + 1][2 * h + 1]};
}
#endif

// Takes in the sinks of a warp's rows.
__device__ __forceinline__ void add_sinks(const RowMap& rows, Output& o, SoftmaxState& state,
                                          int first_row, int lane) {
    float factor[MMA_Q][2];
#pragma unroll
    for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first_row + i * 16 + h * 8 + lane / 4;
            factor[i][h] = rows.valid(row) ? rows.add_sink(row, state.max[i][h]) : 1.0f;
        }
    rescale(o, factor);
}

// Writes a warp's rows of the result, times a factor, by way of its rows of the Q tile, which
// nobody reads any more: fragments go in, rows come out by 16 bytes a lane.
__device__ __forceinline__ void write_rows(const RowMap& rows, Output& o,
                                           SoftmaxState& state, float factor, char* q_tile,
                                           int first_row, int lane) {
    constexpr int ROWS = MMA_Q * 16;
    const Params& p = rows.p;
    char* const tile = q_tile + first_row * Q_ROW_BYTES;
    if (p.sinks != nullptr) add_sinks(rows, o, state, first_row, lane);
#pragma unroll
    for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
        for (int d = 0; d < HEAD_DIM_VO / 16; ++d) {
#if CUPAGED_KV_FLOAT8
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const Float4 four = neighbours(o, i, d, h);
                const int row = i * 16 + h * 8 + lane / 4;
                char* const place = tile + ORows::offset(row, 2 * d + lane % 4 / 2) + lane % 2 * 8;
                *reinterpret_cast<Pairs*>(place) = {pack_pair(four.x * factor, four.y * factor),
                                                    pack_pair(four.z * factor, four.w * factor)};
            }
#else
            Pair block[4];
#pragma unroll
            for (int c = 0; c < 4; ++c)
                block[c] = pack_pair(o[i][2 * d + c / 2][c % 2 * 2] * factor,
                                     o[i][2 * d + c / 2][c % 2 * 2 + 1] * factor);
#if __CUDA_ARCH__ >= 900
            stmatrix_x4(ORows::at(shared_address(tile) + ORows::rows_first(lane), i, d), block);
#else
#pragma unroll
            for (int c = 0; c < 4; ++c)
                *reinterpret_cast<Pair*>(tile +
                                         ORows::offset(i * 16 + c % 2 * 8 + lane / 4,
                                                       2 * d + c / 2) +
                                         lane % 4 * 4) = block[c];
#endif
#endif
        }
#pragma unroll
    for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first_row + i * 16 + h * 8 + lane / 4;
            if (lane % 4 == 0 && rows.valid(row)) rows.write_lse(row, state.max[i][h]);
        }
    // Each lane finds one row's place; the lanes that write a row have it from one of them.
    const int chunk = lane % ORows::CHUNKS;
    const int mine = first_row + chunk * ORows::PER_PASS + lane / ORows::CHUNKS;
    const i64 found =
        rows.valid(mine) ? rows.offset(mine, p.out_stride_row, p.out_stride_head) : -1;
    __syncwarp();  // the warp's rows are whole
    // Several passes' chunks are read before any is written, so that one wait serves them all. The
    // accumulators have left their registers by now.
    constexpr int PASSES = ROWS / ORows::PER_PASS, AT_ONCE = PASSES < 8 ? PASSES : 8 / MMA_Q;
    static_assert(PASSES <= ORows::CHUNKS && PASSES % AT_ONCE == 0, "a lane finds one row");
    const u32 origin = ORows::copy_offset(0, lane);
#pragma unroll 1
    for (int first = 0; first < PASSES; first += AT_ONCE) {
        Chunk chunks[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            chunks[i] = *reinterpret_cast<const Chunk*>(tile + ORows::copy_pass(origin, first + i));
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const i64 offset = __shfl_sync(~0u, found, first + i, ORows::CHUNKS);
            if (offset >= 0 && chunk < O_CHUNKS)
                *reinterpret_cast<Chunk*>(p.out + offset + chunk * 8) = chunks[i];
        }
    }
}

// Writes a warp's 16 rows of the result of a tile that sees no key: zeros.
__device__ __forceinline__ void write_empty(const RowMap& rows, int first_row, int lane) {
    const Params& p = rows.p;
#pragma unroll 1
    for (int i = lane; i < 16 * O_CHUNKS; i += WARP_SIZE) {
        const int row = first_row + i / O_CHUNKS;
        const int chunk = i % O_CHUNKS;
        if (!rows.valid(row)) return;
        const i64 offset = rows.offset(row, p.out_stride_row, p.out_stride_head);
        *reinterpret_cast<Chunk*>(p.out + offset + chunk * 8) = {};
        if (chunk == 0) rows.write_lse(row, NEG_INF);
    }
}

// Writes a warp's rows as a state of their own: out [rows, HEAD_DIM_VO] and lse [rows], at row 0 of
// the block's tile.
__device__ __forceinline__ void write_state(float* out, float* lse, const Output& o,
                                            const SoftmaxState& state, int first_row, int lane) {
#pragma unroll
    for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first_row + i * 16 + h * 8 + lane / 4;
#if CUPAGED_KV_FLOAT8
#pragma unroll
            for (int d = 0; d < HEAD_DIM_VO / 16; ++d)
                *reinterpret_cast<Float4*>(out + row * HEAD_DIM_VO + d * 16 + lane % 4 * 4) =
                    neighbours(o, i, d, h);
#else
#pragma unroll
            for (int d = 0; d < HEAD_DIM_VO / 8; ++d)
                *reinterpret_cast<Float2*>(out + row * HEAD_DIM_VO + d * 8 + lane % 4 * 2) = {
                    o[i][d][2 * h], o[i][d][2 * h + 1]};
#endif
            if (lane % 4 == 0) lse[row] = state.max[i][h];
        }
}
