// Tiles of rows in shared memory, and their fragments.
#pragma once
#include "elements.cuh"

#if CUPAGED_BFLOAT16
#define mma_m16n8k16 mma_m16n8k16_bf16
#define pack_pair pack_bf16
#else
#define mma_m16n8k16 mma_m16n8k16_f16
#define pack_pair pack_f16
#endif

// Rows of BYTES bytes, a power of two and at least 128. Heads that are no such power are padded
// to one: what lies behind their elements is neither written nor read. The sm_90 family has only
// its results in such rows; its Q, K and V lie as wgmma.cuh says.
//
// A row is CHUNKS chunks of 16 bytes. Chunk c of row r lies at chunk c ^ (r % 8) of its row, so
// that the eight rows of an 8 x 8 matrix lie in eight different groups of banks, and neither
// ldmatrix nor the copies into a tile conflict. A tile begins at a multiple of 128 bytes: address
// bits 4..6 are then the chunk's low bits alone, and moving by chunks or by whole groups of rows
// is an exclusive or.
template <int BYTES>
struct Rows {
    static constexpr int CHUNKS = BYTES / 16;
    // Rows of a tile that one instruction of a warp copies, 16 bytes a lane.
    static constexpr int PER_PASS = WARP_SIZE / CHUNKS;

    // Byte offset of a chunk in a tile.
    static __device__ __forceinline__ u32 offset(int row, int chunk) {
        return row * BYTES + ((chunk ^ (row % 8)) << 4);
    }

    // Where a lane copies to, and how the place moves: pass i of a warp that copies the rows from
    // `first_row` on has rows first_row + i * PER_PASS + lane / CHUNKS. The lane's own bits of
    // row % 8, those of first_row and those of i never overlap, so the swizzle of pass i is the
    // first pass's, exclusive-or what i adds.
    static __device__ __forceinline__ u32 copy_offset(int first_row, int lane) {
        return offset(first_row + lane / CHUNKS, lane % CHUNKS);
    }
    static __device__ __forceinline__ u32 copy_pass(u32 offset, int pass) {
        const int rows = pass * PER_PASS;
        return (offset ^ ((rows % 8) << 4)) + rows * BYTES;
    }

    // Lane's address of the block of 16 rows and two chunks at (row 0, chunk 0), as ldmatrix_x4
    // takes it. "Rows first": matrices 0 and 1 are rows 0..7 and 8..15 of chunk 0, as the A operand
    // wants them and, for a transposing load, the B operand. "Chunks first": matrices 0 and 1 are
    // chunks 0 and 1 of rows 0..7, as the B operand wants rows of K.
    static __device__ __forceinline__ u32 rows_first(int lane) {
        return offset(lane % 16, lane / 16);
    }
    static __device__ __forceinline__ u32 chunks_first(int lane) {
        return offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }

    // The same lane's address for the block at row 16 * i, chunk 2 * j.
    static __device__ __forceinline__ u32 at(u32 address, int i, int j) {
        return (address ^ (j % 4 * 32)) + j / 4 * 128 + i * 16 * BYTES;
    }
};

using QRows = Rows<Q_ROW_BYTES>;
using KRows = Rows<K_ROW_BYTES>;
using VRows = Rows<V_ROW_BYTES>;
using ORows = Rows<O_ROW_BYTES>;  // of results on their way out

// Chunks of a row that hold its elements.
constexpr int Q_CHUNKS = HEAD_DIM_QK / 8;
constexpr int K_CHUNKS = HEAD_DIM_QK * static_cast<int>(sizeof(KvElement)) / 16;
constexpr int V_CHUNKS = HEAD_DIM_VO * static_cast<int>(sizeof(KvElement)) / 16;
constexpr int O_CHUNKS = HEAD_DIM_VO / 8;
