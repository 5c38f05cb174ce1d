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
constexpr int TILE_Q_BYTES = CTA_TILE_Q * Q_ROW_BYTES;
// A tile of K or of V.
constexpr int TILE_KV_BYTES =
    CTA_TILE_KV * (K_ROW_BYTES > V_ROW_BYTES ? K_ROW_BYTES : V_ROW_BYTES);
static_assert(O_ROW_BYTES <= Q_ROW_BYTES, "results leave by way of their rows of Q");
static_assert(CTA_TILE_Q == NUM_CONSUMERS * 64 && MMA_Q == 1, "a warpgroup computes 64 rows");
static_assert(NUM_THREADS == (NUM_CONSUMERS + 1) * WARPGROUP, "one warpgroup more brings the data");

constexpr int NUM_PRODUCER_WARPS = WARPGROUP / WARP_SIZE;
#if CUPAGED_PAGE_ALIGNED
// The first two warps have K and V brought by the copy engine, each every other box: asking for a
// box takes a warp so long that one could hardly keep up where a page is 16 keys. The others copy
// Q, and the third takes the pieces of work besides.
constexpr int KV_WARPS = 2;
constexpr int FIRST_Q_WARP = 2;
constexpr int KV_ARRIVALS = KV_WARPS;
#else
// Every warp copies its share of Q, and of K or V; the first takes the pieces of work besides. A
// thread's copies arrive on their own.
constexpr int FIRST_Q_WARP = 0;
constexpr int KV_WARPS = NUM_PRODUCER_WARPS;
// Some warps copy K and the others V: 7% faster at head_dim 128, 2 and 3% slower at 64 and 256.
constexpr bool BY_KIND = HEAD_DIM_QK == 128 && HEAD_DIM_VO == 128;
constexpr int ROW_WARPS = BY_KIND ? KV_WARPS / 2 : KV_WARPS;  // that share a tile
constexpr int KV_ARRIVALS = ROW_WARPS * WARP_SIZE;
#endif
constexpr int Q_WARPS = NUM_PRODUCER_WARPS - FIRST_Q_WARP;

// Registers a thread, multiples of 8, in all no more than the block is launched with. Copying row
// by row takes more than asking for boxes, and so does cutting boxes both of K and of V.
constexpr int LAUNCH_REGISTERS = 65536 / NUM_THREADS / 8 * 8;
constexpr bool BRINGS_HARD = CUPAGED_PAGE_ALIGNED ? CUPAGED_WINDOW && CUPAGED_SOFT_CAP
                                                  : HEAD_DIM_VO == 128;
constexpr int PRODUCER_REGISTERS = NUM_CONSUMERS == 3 ? 32 : BRINGS_HARD ? 56 : 40;
constexpr int CONSUMER_REGISTERS = NUM_CONSUMERS == 3 ? 160 : BRINGS_HARD ? 224 : 232;
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
    u64 cut[2];  // a warp's boxes of a tile have come, and some rows of it are to be cleared
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

__device__ __forceinline__ int num_kv_tiles(const Item& item) {
    return (item.kv_end - item.kv_begin + CTA_TILE_KV - 1) / CTA_TILE_KV;
}
