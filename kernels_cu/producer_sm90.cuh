// The warpgroup that brings the data: it takes pieces of work off the counter, and fills the stages
// of Q, K and V, far ahead of the warpgroups that compute where the stages allow it.
#pragma once
#include "kv_loader_sm90.cuh"

// The pieces of work of a block, as one of its warps takes them and writes them down for all. A
// piece is looked up well before its place among the pieces of work is free.
struct Claims {
    const Params& p;
    int piece;      // the one that is looked up
    int word;       // of it, this lane's part; -1 where there is none
    int following;  // on lane 0, the piece after it, a number that comes only much later
    PlaceWork at;

    // Only one warp `takes` them.
    __device__ __forceinline__ Claims(const Params& p, bool takes, int lane)
        : p(p), piece(blockIdx.x) {
        if (takes) look_up(lane);
    }

    __device__ __forceinline__ bool more() const { return piece < num_pieces(p); }

    // Whether no block has a second piece: then nobody asks for one.
    __device__ __forceinline__ bool all_first() const {
        return num_pieces(p) <= static_cast<int>(gridDim.x);
    }

    __device__ __forceinline__ void look_up(int lane) {
        word = -1;
        following = 0;
        if (!more()) return;
        if (lane == 0) following = gridDim.x + (all_first() ? 0 : atomicAdd(p.work_counters, 1));
        // Lanes 0..11 read the item, 12 has the head.
        if (lane < 12) word = reinterpret_cast<const int*>(p.items + piece / p.num_kv_heads)[lane];
        if (lane == 12) word = piece % p.num_kv_heads;
    }

    // Writes the piece down and looks the next one up. False where there was none, which is written
    // down too.
    __device__ __forceinline__ bool next(Control& control, int lane) {
        wait_empty(control.barriers.work_empty, at.stage, at.round);
        if (lane < 13) reinterpret_cast<int*>(&control.work[at.stage])[lane] = word;
        mbarrier_arrive(shared_address(&control.barriers.work_full[at.stage]));
        at.advance();
        if (!more()) return false;
        piece = __shfl_sync(~0u, following, 0);
        look_up(lane);
        return true;
    }

    // The last block to leave sets the counters back for the next launch: no other block will ask
    // for work, since each has counted itself out after its last request.
    __device__ __forceinline__ void finish(int lane) {
        if (lane > 0 || all_first()) return;
        __threadfence();
        if (atomicAdd(p.work_counters + 1, 1) == gridDim.x - 1)
            p.work_counters[0] = p.work_counters[1] = 0;
    }
};
static_assert(sizeof(Item) == 48, "look_up() reads it by words");

// Starts the copies of the rows of q that the tile packs, as one of Q_WARPS warps; instead of rows
// past the end, whose results nobody wants, the last row again.
__device__ __forceinline__ void copy_q(const Params& p, const Work& work, u32 tile, int warp,
                                       int lane) {
    constexpr int ROWS = Q_WARPS * WARP_SIZE;  // that all the lanes find
    static_assert(CTA_TILE_Q % (ROWS / 2) == 0, "the last round is a whole one or a half");
    const RowMap rows(p, work);
    const int last = rows.packed_len - 1 - rows.packed_begin;
#pragma unroll 1
    for (int first = 0; first < CTA_TILE_Q; first += ROWS) {
        const int row = min(first + row_to_find<Q_WARPS>(warp, lane), last);
        const i64 found = rows.offset(row, p.q_stride_row, p.q_stride_head);
        const u32 part = tile + first / 8 * QTile::GROUP_BYTES;
        if (first + ROWS <= CTA_TILE_Q)
            copy_rows<QTile, Q_WARPS, ROW_LANES>(part, p.q, found, warp, lane);
        else
            copy_rows<QTile, Q_WARPS, ROW_LANES / 2>(part, p.q, found, warp, lane);
    }
}

#if CUPAGED_PAGE_ALIGNED
__device__ __forceinline__ void produce(const Params& p, const TensorMap* k_map,
                                        const TensorMap* v_map, Claims& claims, Control& control,
                                        u32 q_tiles, u32 kv_tiles, int warp, int lane) {
    Barriers& barriers = control.barriers;
    PlaceWork at;
    if (warp < KV_WARPS) {
        BoxLoader loader(p, barriers, kv_tiles, k_map, v_map, warp, lane);
        for (;; at.advance()) {
            wait_full(barriers.work_full, at.stage, at.round);
            const Work& work = control.work[at.stage];
            if (work.kv_head < 0) break;
            loader.load(work, lane);
            mbarrier_arrive(shared_address(&barriers.work_empty[at.stage]));
        }
    } else {
        bool more = warp == FIRST_Q_WARP && claims.next(control, lane);
        for (PlaceQ q_at;; at.advance(), q_at.advance()) {
            wait_full(barriers.work_full, at.stage, at.round);
            const Work& work = control.work[at.stage];
            if (work.kv_head < 0) break;
            wait_empty(barriers.q_empty, q_at.stage, q_at.round);
            copy_q(p, work, q_tiles + q_at.stage * TILE_Q_BYTES, warp - FIRST_Q_WARP, lane);
            cp_async_arrive(shared_address(&barriers.q_full[q_at.stage]));
            if (more) more = claims.next(control, lane);
        }
        if (warp == FIRST_Q_WARP) claims.finish(lane);
    }
}
#else
__device__ __forceinline__ void produce(const Params& p, const TensorMap*, const TensorMap*,
                                        Claims& claims, Control& control, u32 q_tiles, u32 kv_tiles,
                                        int warp, int lane) {
    Barriers& barriers = control.barriers;
    RowLoader<BY_KIND, ROW_WARPS> loader(p, barriers, kv_tiles, warp, lane);
    PlaceWork at;
    bool more = warp == FIRST_Q_WARP && claims.next(control, lane);
    for (PlaceQ q_at;; at.advance(), q_at.advance()) {
        // One ahead of the copies, which would else wait for its answer.
        if (more) more = claims.next(control, lane);
        wait_full(barriers.work_full, at.stage, at.round);
        const Work& work = control.work[at.stage];
        if (work.kv_head < 0) break;
        wait_empty(barriers.q_empty, q_at.stage, q_at.round);
        // Not the warp and lane that are kept: a register less during the copies, which have no
        // more.
        copy_q(p, work, q_tiles + q_at.stage * TILE_Q_BYTES, thread_index() / WARP_SIZE,
               lane_index());
        cp_async_arrive(shared_address(&barriers.q_full[q_at.stage]));
        loader.load(work);
        mbarrier_arrive(shared_address(&barriers.work_empty[at.stage]));
    }
    if (warp == FIRST_Q_WARP) claims.finish(lane);
}
#endif
