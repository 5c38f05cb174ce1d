// Rotary position embedding (Su et al. 2021, "RoFormer"), LLaMA's way round: element d of a row
// turns with element d + HEAD_DIM_QK / 2. Rows of 16-bit elements are rotated where they lie in
// shared memory.
#pragma once
#include "params.cuh"
#include "tile.cuh"

constexpr int ROPE_CHUNKS = Q_CHUNKS / 2;  // of the first elements; the second's follow

#if CUPAGED_BFLOAT16
#define unpack_element unpack_bf16
#else
#define unpack_element unpack_f16
#endif

// Turns two pairs of elements, the first ones and the second ones, of a row at `position`. `turns`
// are those of the first: by 2^-64 of a turn for each position, which wrap as angles do.
__device__ __forceinline__ void rotate_pairs(Pair& first, Pair& second, const Turns& turns,
                                             int position) {
    float rotated[2][2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const u64 turned = turns.of[c] * static_cast<u64>(static_cast<i64>(position));
        const float angle = static_cast<int>(turned >> 32) * 1.46291808e-9f;  // 2 pi / 2^32
        const float sine = sin_approx(angle), cosine = cos_approx(angle);
        const float x = unpack_element(static_cast<u16>(first >> 16 * c));
        const float y = unpack_element(static_cast<u16>(second >> 16 * c));
        rotated[0][c] = x * cosine - y * sine;
        rotated[1][c] = y * cosine + x * sine;
    }
    first = pack_pair(rotated[0][0], rotated[0][1]);
    second = pack_pair(rotated[1][0], rotated[1][1]);
}

// Rotates a warp's rows, `num_rows` from `first_row` of a tile on, whose positions position(row)
// has.
template <typename R, typename Position>
__device__ __forceinline__ void rotate_rows(const Params& p, char* tile, int first_row,
                                            int num_rows, int lane, Position position) {
#pragma unroll 1
    for (int i = lane; i < num_rows * ROPE_CHUNKS; i += WARP_SIZE) {
        const int row = first_row + i / ROPE_CHUNKS;
        const int chunk = i % ROPE_CHUNKS;
        Chunk& low = *reinterpret_cast<Chunk*>(tile + R::offset(row, chunk));
        Chunk& high = *reinterpret_cast<Chunk*>(tile + R::offset(row, chunk + ROPE_CHUNKS));
        const Turns* const turns = p.rope_turns + chunk * 4;
        const int at = position(row);
        Chunk first = low, second = high;
        rotate_pairs(first.x, second.x, turns[0], at);
        rotate_pairs(first.y, second.y, turns[1], at);
        rotate_pairs(first.z, second.z, turns[2], at);
        rotate_pairs(first.w, second.w, turns[3], at);
        low = first;
        high = second;
    }
}
