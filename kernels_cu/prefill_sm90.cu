// Attention of a ragged batch over a paged key/value cache, for sm_90a: wgmma, the copy engine,
// and warpgroups with roles of their own.
//
// A persistent grid of one block an SM walks the planner's work items, as in prefill_sm80.cu. One
// warpgroup brings the data; each of the others computes 64 of the tile's rows. A warpgroup issues
// the next tile's Q.K^T before this tile's P.V, and does the next softmax while the second is
// under way; and the warpgroups take turns, so that one's softmax is under the other's products
// (Shah et al. 2024, "FlashAttention-3").
#include "policy.cuh"

#include "producer_sm90.cuh"
#include "results.cuh"
#include "speculation_sm90.cuh"

// Widths of the output at which more than the next logits is worth having while products are under
// way.
constexpr bool MIDDLE_WIDTH = HEAD_DIM_VO == 96 || HEAD_DIM_VO == 128;

// Blocks of 16 keys whose weights are computed while the product with the last tile's is under way,
// which holds the registers that they go to: as many as find room elsewhere.
constexpr int EARLY_BLOCKS = !MIDDLE_WIDTH ? 0 : CUPAGED_SOFT_CAP ? 1 : CTA_TILE_KV / 32;

// Whether the next tiles are looked for while the products with these are under way, so that nothing
// is waited for between them. With a soft cap, and at other widths of the output, it was no faster.
constexpr bool LOOKS_AHEAD = MIDDLE_WIDTH && !CUPAGED_SOFT_CAP;

// The right to issue products, which the consumers hand around; in a kernel without turns, each
// has it always.
struct Turn {
    int consumer;

    __device__ __forceinline__ void take() const {
        if (CUPAGED_TURNS) named_barrier_sync(turn_barrier(consumer), 2 * WARPGROUP);
    }
    __device__ __forceinline__ void pass() const {
        if (!CUPAGED_TURNS) return;
        const int next = consumer == NUM_CONSUMERS - 1 ? 0 : consumer + 1;
        named_barrier_arrive(turn_barrier(next), 2 * WARPGROUP);
    }
};

// Starts s = Q . K^T. q: the warpgroup's 64 rows; k: the tile.
__device__ __forceinline__ void start_qk(Logits& s, u64 q, u64 k) {
#pragma unroll
    for (int d = 0; d < HEAD_DIM_QK / 16; ++d) {
        constexpr int IN_PANEL = PANEL / 16;
        const int step = (d / IN_PANEL * PANEL_BYTES + d % IN_PANEL * 32) >> 4;
        wgmma(s[0], q + step, k + step, d > 0);
    }
}

// Starts o += P . V.
__device__ __forceinline__ void start_pv(Output& o, const Weights& weights, u64 v) {
#pragma unroll
    for (int n = 0; n < CTA_TILE_KV / 16; ++n)
        wgmma(o[0], weights[n], v + (n * 2 * VTile::GROUP_BYTES >> 4), 1);
}

// A consumer's places in the rings, which outlast a piece of work.
struct Consumer {
    const Params& p;
    Barriers& barriers;
    u32 q_tiles, kv_tiles;
    Turn turn;
    PlaceKv at;      // of the tile in the ring that is released next

    // Found anew where they are needed: the loop over the keys has no registers for them.
    __device__ __forceinline__ int lane() const { return lane_index(); }
    __device__ __forceinline__ int first_row() const {
        return (thread_index() - WARPGROUP) / WARP_SIZE * 16;
    }

    // Descriptor of a stage's tile: K's or V's.
    template <typename Tile>
    __device__ __forceinline__ u64 tile(PlaceKv place) const {
        return Tile::descriptor(kv_tiles + place.stage * TILE_KV_BYTES);
    }
    // Waits for the tile of a stage.
    __device__ __forceinline__ void wait_tile(PlaceKv place) const {
        wait_full(barriers.kv_full, place.stage, place.round);
        if (!CUPAGED_PAGE_ALIGNED) fence_async_proxy();  // cp.async wrote as ordinary stores do
    }
    // Whether the tile of a stage has come.
    __device__ __forceinline__ bool has_tile(PlaceKv place) const {
        return is_full(barriers.kv_full, place.stage, place.round);
    }
    __device__ __forceinline__ void release() {
        arrive_warp(&barriers.kv_empty[at.stage], lane());
        at.advance();
    }

    // Passes a tile of K or V by, and the turn of a tile that this warpgroup has no use for.
    __device__ __forceinline__ void pass_by() {
        wait_tile(at);
        release();
    }
    __device__ __forceinline__ void pass_turn() const {
        turn.take();
        turn.pass();
    }

    // Goes through the tiles of a piece of work none of whose rows are this warpgroup's, or of
    // which they see no key.
    __device__ __forceinline__ void skip(const Item& item) {
#pragma unroll 1
        for (int tiles = num_kv_tiles(item); tiles > 0; --tiles) {
            pass_turn();
            pass_by();
            pass_by();
        }
    }

    // The loop over the keys, for one KV head: what the warp has of the output and softmax.
    __device__ __forceinline__ void attend(const Work& work, int q_stage, Output& o,
                                           SoftmaxState& state) {
        const RowMap rows(p, work);
        const Visibility visible(p, work);
        const float scale = p.logit_scale;
        int tiles = num_kv_tiles(work.item);
        int begin = work.item.kv_begin + (tiles - 1) * CTA_TILE_KV;  // of the tile at hand
        // Tiles behind all that the warpgroup's rows see, which come first, and in front of it.
        const int top = turn.consumer * 64;
        const int seen_end = visible.kv_end(rows.query(top + 63)) - work.item.kv_begin;
        const int behind = tiles - (max(seen_end, 0) + CTA_TILE_KV - 1) / CTA_TILE_KV;
        int ahead = 0;
        if (CUPAGED_WINDOW) {
            const int hidden = visible.kv_begin(rows.query(top)) - work.item.kv_begin;
            ahead = max(hidden, 0) / CTA_TILE_KV;
        }
        if (behind + ahead >= tiles) {
            skip(work.item);
            state.finish(o, scale, 1.0f);
            return;
        }
        tiles -= behind + ahead;
        begin -= behind * CTA_TILE_KV;
#pragma unroll 1
        for (int i = 0; i < behind; ++i) {
            pass_turn();
            pass_by();             // K of this tile
            if (i > 0) pass_by();  // V of the one before
        }
        const Span seen = visible.seen_by_all(rows.query(first_row()), rows.query(first_row() + 15));
        u64 q = QTile::descriptor(q_tiles + q_stage * TILE_Q_BYTES +
                                  turn.consumer * 64 * Q_ROW_BYTES);

        Logits s;
        Weights weights;
        float factor[1][2];
        // What becomes of a tile's products before they are weights.
        const auto prepare = [&] {
            transform(s, visible, rows, first_row(), begin, lane());
            if (!seen.has(begin, begin + CTA_TILE_KV))
                visible.mask(s, rows, seen, first_row(), begin, lane());
        };

        wait_tile(at);
        turn.take();
        wgmma_fence();
        start_qk(s, q, tile<KTile>(at));
        wgmma_commit();
        turn.pass();
        wgmma_wait<0>();
        pin(s[0]);
        release();
        if (behind > 0) pass_by();  // V of the last of those
        // Weights as they are without speculation.
        const auto weigh = [&] {
            state.weigh(s, scale);
            pack(weights, s);
            if (BOUNDED) note_rounding(state, s, weights);
        };
        prepare();
        if (BOUNDED)
            state.max[0][0] = state.max[0][1] = 0.0f;
        else
            state.raise(s, scale, factor);
        weigh();

        // With a soft cap, the keys that there is hope for: those that all of the warp's rows see,
        // as masks are for capped logits, of which there are none yet. Where one tile's products
        // are too large to be capped in short, the next one's will be.
        Span hoped = seen;
        bool has_both = false;  // K of the tile at hand and V of the one before, for certain
#pragma unroll 1
        while (--tiles > 0) {
            begin -= CTA_TILE_KV;
            hide(q);  // else the descriptor of each step is kept, which takes too many registers
            PlaceKv after = at;
            if (!has_both) wait_full(barriers.kv_full, at.stage, at.round);
            if (LOOKS_AHEAD) {
                after.advance();
                if (!has_both) wait_full(barriers.kv_full, after.stage, after.round);
            }
            if (!CUPAGED_PAGE_ALIGNED) fence_async_proxy();  // as in wait_tile()
            const u64 k = tile<KTile>(at);
            turn.take();
            wgmma_fence();
            start_qk(s, q, k);
            wgmma_commit();
            if (!LOOKS_AHEAD) {
                after.advance();
                wait_tile(after);
                wgmma_fence();
            }
            start_pv(o, weights, tile<VTile>(after));
            wgmma_commit();
            turn.pass();
            if (LOOKS_AHEAD) {
                after.advance();
                const bool has_k = has_tile(after);
                after.advance();
                const bool has_v = has_tile(after);
                has_both = has_k && has_v;
                // For the same reason as below; without a window the compiler does without.
                if (CUPAGED_WINDOW) has_both = __all_sync(~0u, has_both);
            }
            wgmma_wait<1>();
            pin(s[0]);
            release();
            // The warp's rows are all of a mind, but a vote lets the compiler know: descriptors
            // then stay in uniform registers.
            const bool hope =
                !CUPAGED_SOFT_CAP || __all_sync(~0u, hoped.has(begin, begin + CTA_TILE_KV));
            if (!CUPAGED_SOFT_CAP) prepare();
            Speculation speculation(state, p);
            float early[EARLY_BLOCKS + 1][4][2];  // C++ has no array of none
            if (hope) {
#pragma unroll
                for (int n = 0; n < EARLY_BLOCKS; ++n) speculation.weigh(s, n, early[n]);
            }
            wgmma_wait<0>();
            pin(o[0]);
            release();
            if (hope) {
#pragma unroll
                for (int n = 0; n < EARLY_BLOCKS; ++n) pack(weights[n], early[n]);
#pragma unroll
                for (int n = EARLY_BLOCKS; n < CTA_TILE_KV / 16; ++n) {
                    float late[4][2];
                    speculation.weigh(s, n, late);
                    pack(weights[n], late);
                }
            }
            if (!hope || !speculation.holds(state)) {
                if (CUPAGED_SOFT_CAP) {
                    if (hope && !speculation.all_small()) hoped.end = -1;
                    prepare();
                }
                if (!BOUNDED && state.raise(s, scale, factor)) rescale(o, factor);
                weigh();
            }
        }
        if (CUPAGED_WINDOW && ahead > 0) {
            pass_turn();
            pass_by();  // K of the first of these
        }
        wait_tile(at);
        wgmma_fence();
        start_pv(o, weights, tile<VTile>(at));
        wgmma_commit();
        wgmma_wait<0>();
        pin(o[0]);
        release();
        if (CUPAGED_WINDOW) {
#pragma unroll 1
            for (int i = 1; i < ahead; ++i) {
                pass_turn();
                pass_by();  // K of this tile
                pass_by();  // V of the one before
            }
            if (ahead > 0) pass_by();
        }
        state.finish(o, scale, work.item.num_splits == 1 ? p.v_scale : 1.0f);
    }

    // Writes what attend() found: the result, or the split's partial state, and merges the splits
    // of the warpgroup's rows where this one ends last.
    __device__ __forceinline__ void store(const Work& work, char* q_tile, Output& o,
                                          SoftmaxState& state, int* is_last) {
        const auto sync = [&] { named_barrier_sync(consumer_barrier(turn.consumer), WARPGROUP); };
        const int num_splits = work.item.num_splits;
        if (num_splits == 1) {
            sync();  // the warpgroup has read its last of Q
            write_rows(RowMap(p, work), o, state, 1.0f, q_tile, first_row(), lane());
            return;
        }
        const PartialState partial(p, work.item.first_partial + work.item.split, work.kv_head);
        write_state(partial.out, partial.lse, o, state, first_row(), lane());
        const i64 merge = static_cast<i64>(work.item.merge) * p.num_kv_heads + work.kv_head;
        const int thread = thread_index() % WARPGROUP;
        if (is_last_split(p.merge_counters + merge * NUM_CONSUMERS + turn.consumer, num_splits,
                          thread == 0, is_last, sync))
            merge_partials<64, WARPGROUP>(p, work, turn.consumer * 64, thread);
    }
};

__device__ __forceinline__ void init_barriers(Barriers& barriers) {
    for (int i = 0; i < NUM_WORK_STAGES; ++i) {
        mbarrier_init(shared_address(&barriers.work_full[i]), WARP_SIZE);
        mbarrier_init(shared_address(&barriers.work_empty[i]), (NUM_WARPS + KV_WARPS) * WARP_SIZE);
    }
    for (int i = 0; i < NUM_Q_STAGES; ++i) {
        mbarrier_init(shared_address(&barriers.q_full[i]), Q_WARPS * WARP_SIZE);
        mbarrier_init(shared_address(&barriers.q_empty[i]), NUM_WARPS * WARP_SIZE);
    }
    for (int i = 0; i < NUM_STAGES; ++i) {
        mbarrier_init(shared_address(&barriers.kv_full[i]), KV_ARRIVALS);
        mbarrier_init(shared_address(&barriers.kv_empty[i]), NUM_WARPS);
    }
    for (u64& cut : barriers.cut) mbarrier_init(shared_address(&cut), 1);
    fence_mbarrier_init();
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    cupaged_prefill(const __grid_constant__ Params p, const __grid_constant__ TensorMap k_map,
                    const __grid_constant__ TensorMap v_map) {
    // Q [NUM_Q_STAGES] tiles, K and V [NUM_STAGES] tiles, Control.
    extern __shared__ __align__(1024) char shared[];
    const u32 q_tiles = shared_address(shared);
    const u32 kv_tiles = q_tiles + NUM_Q_STAGES * TILE_Q_BYTES;
    constexpr int TILES_BYTES = NUM_Q_STAGES * TILE_Q_BYTES + NUM_STAGES * TILE_KV_BYTES;
    Control& control = *reinterpret_cast<Control*>(shared + TILES_BYTES);
    static_assert(TILES_BYTES + sizeof(Control) <= SHARED_BYTES, "KernelConfig.shared_bytes");

    const int warp = warp_index();
    if (warp < NUM_PRODUCER_WARPS) {
        const int lane = lane_index();
        if (warp == 0 && lane == 0) init_barriers(control.barriers);
        if (CUPAGED_PAGE_ALIGNED && warp == 1 && lane == 0) {
            prefetch_tensor_map(&k_map);
            prefetch_tensor_map(&v_map);
        }
        Claims claims(p, warp == FIRST_Q_WARP, lane);
        __syncthreads();  // the barriers are initialised
        give_registers<PRODUCER_REGISTERS>();
        produce(p, &k_map, &v_map, claims, control, q_tiles, kv_tiles, warp, lane);
    } else {
        __syncthreads();  // the barriers are initialised
        take_registers<CONSUMER_REGISTERS>();
        const int consumer = warp / 4 - 1;
        Consumer me{p, control.barriers, q_tiles, kv_tiles, Turn{consumer}};
        if (consumer == NUM_CONSUMERS - 1) me.turn.pass();  // the first one's first turn
        PlaceQ q_at;
        for (PlaceWork at;; at.advance(), q_at.advance()) {
            wait_full(control.barriers.work_full, at.stage, at.round);
            const Work& work = control.work[at.stage];
            if (work.kv_head < 0) break;
            wait_full(control.barriers.q_full, q_at.stage, q_at.round);
            fence_async_proxy();  // cp.async wrote Q as ordinary stores do
            if (!RowMap(p, work).valid(consumer * 64)) {
                me.skip(work.item);
            } else if (num_kv_tiles(work.item) == 0) {
                write_empty(RowMap(p, work), me.first_row(), me.lane());
            } else {
                Output o = {};
                SoftmaxState state;
                me.attend(work, q_at.stage, o, state);
                me.store(work, shared + q_at.stage * TILE_Q_BYTES, o, state,
                         &control.is_last_split[consumer]);
            }
            // Every thread for itself: it is its own reading that is over.
            mbarrier_arrive(shared_address(&control.barriers.q_empty[q_at.stage]));
            mbarrier_arrive(shared_address(&control.barriers.work_empty[at.stage]));
        }
    }
}
