// How the warpgroups of a block work together: the first brings what the others compute with.
//
// Shared memory holds Q in NUM_Q_STAGES stages, tiles of K and of V in NUM_STAGES more, and this.
// Every stage has a barrier that says it is full and one that says it is empty again; whoever fills
// a stage waits for the second, whoever reads it for the first. Tiles of K and V share a ring, in
// the order in which they are used: the first tile's K, the second's K, the first's V, the third's
// K ...
#pragma once
#include "params.cuh"
#include "wgmma.cuh"

constexpr int WARPGROUP = 128;
constexpr int NUM_CONSUMERS = NUM_WARPS / 4;  // warpgroups that compute, of 64 rows each
constexpr int TILE_Q_BYTES = CTA_TILE_Q * ROW_BYTES;
constexpr int TILE_KV_BYTES = CTA_TILE_KV * ROW_BYTES;
static_assert(CTA_TILE_Q == NUM_CONSUMERS * 64 && MMA_Q == 1, "a warpgroup computes 64 rows");
static_assert(NUM_THREADS == (NUM_CONSUMERS + 1) * WARPGROUP, "one warpgroup more brings the data");

// Registers a thread, multiples of 8, in all no more than the block is launched with. Copying row
// by row takes more than asking for boxes.
constexpr int LAUNCH_REGISTERS = 65536 / NUM_THREADS / 8 * 8;
constexpr bool MORE_FOR_ROWS = !CUPAGED_PAGE_ALIGNED && HEAD_DIM == 128;
constexpr int PRODUCER_REGISTERS = NUM_CONSUMERS == 3 ? 32 : MORE_FOR_ROWS ? 56 : 40;
constexpr int CONSUMER_REGISTERS = NUM_CONSUMERS == 3 ? 160 : MORE_FOR_ROWS ? 224 : 232;
static_assert(PRODUCER_REGISTERS + CONSUMER_REGISTERS * NUM_CONSUMERS <=
                  LAUNCH_REGISTERS * (NUM_CONSUMERS + 1),
              "nobody may wait for registers that nobody gives");

// Pieces of work that are known at a time: what is being computed, what is being brought for, and
// what is being looked up.
constexpr int NUM_WORK_STAGES = 4;

struct Barriers {
    u64 work_full[NUM_WORK_STAGES], work_empty[NUM_WORK_STAGES];
    u64 q_full[NUM_Q_STAGES], q_empty[NUM_Q_STAGES];
    u64 kv_full[NUM_STAGES], kv_empty[NUM_STAGES];
    u64 v_tail[2];  // a warp's boxes of a V tile have come, and some of it is to be cleared
};

struct Control {
    Barriers barriers;
    alignas(16) Work work[NUM_WORK_STAGES];  // a kv_head of -1 ends the work
    int is_last_split[NUM_CONSUMERS];
};

// Named barriers; 0 is __syncthreads().
__device__ __forceinline__ int turn_barrier(int consumer) { return 1 + consumer; }
__device__ __forceinline__ int consumer_barrier(int consumer) {
    return 1 + NUM_CONSUMERS + consumer;
}

// A place in a ring of stages, and the parity of the round that it is in.
template <int STAGES>
struct Place {
    int stage = 0;
    u32 round = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            round ^= 1;
        }
    }
};
using PlaceWork = Place<NUM_WORK_STAGES>;
using PlaceQ = Place<NUM_Q_STAGES>;
using PlaceKv = Place<NUM_STAGES>;

__device__ __forceinline__ void wait_full(const u64* full, int stage, u32 round) {
    mbarrier_wait(shared_address(full + stage), round);
}
__device__ __forceinline__ bool is_full(const u64* full, int stage, u32 round) {
    return mbarrier_is_over(shared_address(full + stage), round);
}
__device__ __forceinline__ void wait_empty(const u64* empty, int stage, u32 round) {
    mbarrier_wait(shared_address(empty + stage), round ^ 1);
}

// One arrival for all lanes of the warp.
__device__ __forceinline__ void arrive_warp(u64* barrier, int lane) {
    __syncwarp();  // every lane has done what the arrival tells
    if (lane == 0) mbarrier_arrive(shared_address(barrier));
}
