// Tiles of HEAD_DIM-element rows in shared memory, and their fragments.
//
// A row is HEAD_DIM / 8 chunks of 16 bytes. Chunk c of row r lies at chunk c ^ (r % 8) of its row,
// so that the eight rows of an 8 x 8 matrix lie in eight different groups of banks, and neither
// ldmatrix nor the copies into a tile conflict. A tile begins at a multiple of 128 bytes: address
// bits 4..6 are then the chunk's low bits alone, and moving by chunks or by whole groups of rows
// is an exclusive or.
#pragma once
#include "ptx.cuh"

constexpr int ROW_BYTES = HEAD_DIM * 2;
constexpr int ROW_CHUNKS = ROW_BYTES / 16;
// Rows of a tile that one instruction of a warp copies, 16 bytes a lane.
constexpr int ROWS_PER_PASS = WARP_SIZE / ROW_CHUNKS;

#if CUPAGED_BFLOAT16
#define mma_m16n8k16 mma_m16n8k16_bf16
#define pack_pair pack_bf16
#else
#define mma_m16n8k16 mma_m16n8k16_f16
#define pack_pair pack_f16
#endif

// Byte offset of a chunk in a tile.
__device__ __forceinline__ u32 tile_offset(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ (row % 8)) << 4);
}

// Where a lane copies to, and how the place moves: pass i of a warp that copies the rows from
// `first_row` on has rows first_row + i * ROWS_PER_PASS + lane / ROW_CHUNKS. The lane's own bits
// of row % 8, those of first_row and those of i never overlap, so the swizzle of pass i is the
// first pass's, exclusive-or what i adds.
__device__ __forceinline__ u32 copy_offset(int first_row, int lane) {
    return tile_offset(first_row + lane / ROW_CHUNKS, lane % ROW_CHUNKS);
}
__device__ __forceinline__ u32 copy_pass(u32 offset, int pass) {
    const int rows = pass * ROWS_PER_PASS;
    return (offset ^ ((rows % 8) << 4)) + rows * ROW_BYTES;
}

// Lane's address of the 16 x 16 block at (row 0, column 0), as ldmatrix_x4 takes it. "Rows first":
// matrices 0 and 1 are rows 0..7 and 8..15 of columns 0..7, as the A operand wants them and, for
// a transposing load, the B operand. "Columns first": matrices 0 and 1 are columns 0..7 and 8..15
// of rows 0..7, as the B operand wants rows of K.
__device__ __forceinline__ u32 fragment_rows_first(int lane) {
    return tile_offset(lane % 16, lane / 16);
}
__device__ __forceinline__ u32 fragment_columns_first(int lane) {
    return tile_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// The same lane's address for the block at row 16 * i, column 16 * j.
__device__ __forceinline__ u32 fragment_at(u32 address, int i, int j) {
    return (address ^ (j % 4 * 32)) + j / 4 * 128 + i * 16 * ROW_BYTES;
}
