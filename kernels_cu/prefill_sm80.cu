// Attention of a ragged batch over a paged key/value cache, for sm_80 and later: mma.sync,
// ldmatrix, and cp.async through a ring of shared-memory stages.
//
// A persistent grid walks the planner's work items. Block b begins with piece b; whoever is done
// takes the next one off a counter, so that items, which lie longest first, are scheduled
// longest first. The WARPS_Q x WARPS_KV warps of a block divide a tile's rows, or its keys.
#include "policy.cuh"

#include "fragments.cuh"
#include "kv_loader.cuh"
#include "results.cuh"
#include "softmax.cuh"

constexpr int WARP_KV = CTA_TILE_KV / WARPS_KV;  // keys of a tile that a warp works on
constexpr int Q_ROWS_PER_WARP = CTA_TILE_Q / NUM_WARPS;  // that a warp copies
constexpr int TILE_Q_BYTES = CTA_TILE_Q * Q_ROW_BYTES;
constexpr int STAGE_BYTES = CTA_TILE_KV * (K_ROW_BYTES + V_ROW_BYTES);
constexpr int LAST_STAGE = (NUM_STAGES - 1) * STAGE_BYTES;
static_assert(WARP_KV % 16 == 0, "P.V takes keys by 16");
static_assert(WARPS_KV == 1 || MMA_Q == 1 && WARPS_Q == 1, "only one 16-row block is shared");
static_assert(WARPS_KV * CTA_TILE_Q * (HEAD_DIM_VO + 1) * 4 <= NUM_STAGES * STAGE_BYTES ||
                  WARPS_KV == 1,
              "the warps' states are merged where the stages were");

// [MMA_Q 16-row blocks][blocks of 8 keys][a lane's four elements], as mma_m16n8k16 has them.
using Logits = float[MMA_Q][WARP_KV / 8][4];

// Copies the rows of q that the item's tile packs to shared memory; rows past the end are zeros.
__device__ __forceinline__ void load_q(const RowMap& rows, u32 q_tile, int warp, int lane) {
    static_assert(Q_ROWS_PER_WARP % QRows::PER_PASS == 0, "a pass must not leave its warp's rows");
    const Params& p = rows.p;
    const u32 offset = QRows::copy_offset(warp * Q_ROWS_PER_WARP, lane);
    const int chunk = lane % QRows::CHUNKS;
#pragma unroll 4
    for (int pass = 0; pass < Q_ROWS_PER_WARP / QRows::PER_PASS; ++pass) {
        const int row = warp * Q_ROWS_PER_WARP + pass * QRows::PER_PASS + lane / QRows::CHUNKS;
        const bool valid = rows.valid(row);
        const i64 source = valid ? rows.offset(row, p.q_stride_row, p.q_stride_head) : 0;
        if (Q_CHUNKS == QRows::CHUNKS || chunk < Q_CHUNKS)
            cp_async_16(q_tile + QRows::copy_pass(offset, pass), p.q + source + chunk * 8,
                        valid ? 16 : 0);
    }
}

// s = Q . K^T. q is this lane's fragment address of the warp's rows.
__device__ __forceinline__ void multiply_qk(Logits& s, u32 q, const Keys& keys) {
#pragma unroll
    for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
        for (int n = 0; n < WARP_KV / 8; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) s[i][n][c] = 0.0f;
#pragma unroll KFragment::UNROLL
    for (int d = 0; d < HEAD_DIM_QK / 16; d += KFragment::STEPS) {
        Pair a[KFragment::STEPS][MMA_Q][4];
#pragma unroll
        for (int step = 0; step < KFragment::STEPS; ++step)
#pragma unroll
            for (int i = 0; i < MMA_Q; ++i)
                load_q_fragment(a[step][i], q, i, KFragment::block(d, step));
#pragma unroll
        for (int n = 0; n < WARP_KV / 16; ++n) {
            const KFragment b(keys, n, d);
#pragma unroll
            for (int step = 0; step < KFragment::STEPS; ++step)
#pragma unroll
                for (int i = 0; i < MMA_Q; ++i) {
                    mma_m16n8k16(s[i][2 * n], a[step][i], b.at(step, 0, 0), b.at(step, 0, 1));
                    mma_m16n8k16(s[i][2 * n + 1], a[step][i], b.at(step, 1, 0), b.at(step, 1, 1));
                }
        }
    }
}

// o += P . V. The weights of two neighbouring 8-column blocks are, lane for lane, an A operand.
__device__ __forceinline__ void multiply_pv(Output& o, const Logits& weights, u32 v) {
#pragma unroll
    for (int n = 0; n < WARP_KV / 16; ++n) {
        Pair a[MMA_Q][4];
#pragma unroll
        for (int i = 0; i < MMA_Q; ++i) {
            a[i][0] = pack_pair(weights[i][2 * n][0], weights[i][2 * n][1]);
            a[i][1] = pack_pair(weights[i][2 * n][2], weights[i][2 * n][3]);
            a[i][2] = pack_pair(weights[i][2 * n + 1][0], weights[i][2 * n + 1][1]);
            a[i][3] = pack_pair(weights[i][2 * n + 1][2], weights[i][2 * n + 1][3]);
        }
#pragma unroll
        for (int d = 0; d < HEAD_DIM_VO / 16; d += VFragment::STEPS) {
            const VFragment b(v, n, d);
#pragma unroll
            for (int step = 0; step < VFragment::STEPS; ++step)
#pragma unroll
                for (int i = 0; i < MMA_Q; ++i)
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        mma_m16n8k16(o[i][2 * (d + step) + c], a[i], b.at(step, c, 0),
                                     b.at(step, c, 1));
        }
    }
}

// The item's loop over its keys, for one KV head: what each warp has of the output and softmax.
__device__ __forceinline__ void attend(const Params& p, const Work& work, char* shared,
                                       Output& o, SoftmaxState& state) {
    const int warp = warp_index();
    const int lane = threadIdx.x % WARP_SIZE;
    const int warp_kv = warp % WARPS_KV;
    const int first_row = warp / WARPS_KV * MMA_Q * 16;
    const RowMap rows(p, work);
    const Visibility visible(p, work);
    const int last_row = first_row + MMA_Q * 16 - 1;
    const Span seen = visible.seen_by_all(rows.query(first_row), rows.query(last_row));

    // Shared memory: Q [CTA_TILE_Q] rows, then NUM_STAGES times K and V [CTA_TILE_KV] rows each.
    const u32 q_tile = shared_address(shared);
    const u32 stages = q_tile + TILE_Q_BYTES;
    KvLoader loader(p, work, visible.kv_begin(rows.query(0)), stages, warp, lane);
    int begin = work.item.kv_begin;  // first key of the tile at hand
    if (begin < loader.kv_end) load_q(rows, q_tile, warp, lane);
#pragma unroll
    for (int stage = 0; stage < NUM_STAGES - 1; ++stage) {
        const int ahead = begin + stage * CTA_TILE_KV;
        if (ahead < loader.kv_end) loader.load(ahead, stage * STAGE_BYTES, lane);
        cp_async_commit();
    }

    const u32 q_fragment = q_tile + first_row * Q_ROW_BYTES + q_fragment_offset(lane);
    const u32 k_fragment = stages + warp_kv * WARP_KV * K_ROW_BYTES + k_fragment_offset(lane);
    const u32 v_fragment =
        stages + TILE_K_BYTES + warp_kv * WARP_KV * V_ROW_BYTES + VRows::rows_first(lane);

    u32 stage = 0;  // of the tile at hand, in bytes
#pragma unroll 1
    for (; begin < loader.kv_end; begin += CTA_TILE_KV) {
        cp_async_wait<NUM_STAGES - 2>();
        if (CUPAGED_ROPE) {
            __syncwarp();  // the rows that the warp has copied are there for all its lanes
            if (begin == work.item.kv_begin)
                rotate_rows<QRows>(
                    p, shared, warp * Q_ROWS_PER_WARP, Q_ROWS_PER_WARP, lane,
                    [&](int row) { return visible.position(rows.query(row)); });
            // 8-bit keys are rotated as they are widened, see fragments.cuh.
            if (!CUPAGED_KV_FLOAT8)
                rotate_rows<KRows>(p, shared + TILE_Q_BYTES + stage, warp * ROWS_PER_WARP,
                                   ROWS_PER_WARP, lane, [&](int row) { return begin + row; });
        }
        // This tile has landed for every warp that reads it, and every such warp is done with the
        // tile before, whose stage the next copies overwrite. Warps that divide the keys copy just
        // the keys that they read, but all read the Q that all have copied.
        if (WARPS_KV == 1 || begin == work.item.kv_begin)
            __syncthreads();
        else
            __syncwarp();
        const int ahead = begin + (NUM_STAGES - 1) * CTA_TILE_KV;
        if (ahead < loader.kv_end)
            loader.load(ahead, stage == 0 ? LAST_STAGE : stage - STAGE_BYTES, lane);
        // A group for every tile, empty or not, keeps the count that the wait relies on.
        cp_async_commit();

        const u32 k = k_fragment + stage;
        const u32 v = v_fragment + stage;
        stage = stage == LAST_STAGE ? 0 : stage + STAGE_BYTES;
        const int first_key = begin + warp_kv * WARP_KV;
        const int end_key = first_key + WARP_KV;
        const bool all_visible = seen.has(first_key, end_key);
        // A warp whose rows see no key of its share has nothing to do here.
        if (!all_visible &&
            visible.none(rows.query(first_row), rows.query(last_row), first_key, end_key))
            continue;
        Logits s;
        multiply_qk(s, q_fragment, Keys{p, k, first_key, lane});
        transform(s, visible, rows, first_row, first_key, lane);
        if (!all_visible) visible.mask(s, rows, seen, first_row, first_key, lane);
        float factor[MMA_Q][2];
        if (state.raise(s, p.logit_scale, factor)) rescale(o, factor);
        state.weigh(s, p.logit_scale);
        multiply_pv(o, s, v);
    }
    state.finish(o, p.logit_scale, 1.0f);
}

// Writes what attend() found: the result, or the split's partial state.
__device__ __forceinline__ void store(const Params& p, const Work& work, char* shared,
                                      Output& o, SoftmaxState& state) {
    const Item& item = work.item;
    const int warp = warp_index();
    const int lane = threadIdx.x % WARP_SIZE;
    const RowMap rows(p, work);
    const PartialState partial(p, item.first_partial + item.split, work.kv_head);
    if (WARPS_KV > 1) {
        constexpr int STATE_FLOATS = CTA_TILE_Q * HEAD_DIM_VO;
        float* states = reinterpret_cast<float*>(shared + TILE_Q_BYTES);
        float* lses = states + WARPS_KV * STATE_FLOATS;
        __syncthreads();  // every warp is done with the stages, where the states now go
        write_state(states + warp * STATE_FLOATS, lses + warp * CTA_TILE_Q, o, state, 0, lane);
        __syncthreads();  // all states are there
        if (item.num_splits == 1)
            merge_states<CTA_TILE_Q, NUM_THREADS>(rows, 0, threadIdx.x, states, lses, STATE_FLOATS,
                                                  CTA_TILE_Q, WARPS_KV, WriteResult{rows});
        else
            merge_states<CTA_TILE_Q, NUM_THREADS>(rows, 0, threadIdx.x, states, lses, STATE_FLOATS,
                                                  CTA_TILE_Q, WARPS_KV, WritePartial{partial});
    } else if (item.num_splits == 1) {
        __syncwarp();  // every lane has read its last of the warp's rows of Q
        write_rows(rows, o, state, p.v_scale, shared, warp * MMA_Q * 16, lane);
    } else {
        write_state(partial.out, partial.lse, o, state, warp * MMA_Q * 16, lane);
    }
}

// Counts a split as done; the last one of its tile merges them all.
__device__ __forceinline__ void merge_splits(const Params& p, const Work& work, int* flag) {
    int* counter =
        p.merge_counters + static_cast<i64>(work.item.merge) * p.num_kv_heads + work.kv_head;
    if (is_last_split(counter, work.item.num_splits, threadIdx.x == 0, flag,
                      [] { __syncthreads(); }))
        merge_partials<CTA_TILE_Q, NUM_THREADS>(p, work, 0, threadIdx.x);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, CTAS_PER_SM)
    cupaged_prefill(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    // In shared memory and not in registers, which the loop over the keys needs to the last one.
    __shared__ int piece, is_last_split;

    if (threadIdx.x == 0) piece = blockIdx.x;
    __syncthreads();  // the first piece is known
    while (piece < num_pieces(p)) {
        Output o = {};
        SoftmaxState state;
        attend(p, Work(p, piece), shared, o, state);
        // Asked for now, needed when the results are written: the counter's latency is hidden.
        int next_piece = 0;
        if (threadIdx.x == 0) next_piece = gridDim.x + atomicAdd(p.work_counters, 1);
        const Work work(p, piece);
        store(p, work, shared, o, state);
        if (work.item.num_splits > 1) merge_splits(p, work, &is_last_split);
        __syncthreads();  // all are done with the item and the shared memory
        if (threadIdx.x == 0) piece = next_piece;
        __syncthreads();  // all see the next piece
    }
    // The last block to leave sets the counters back for the next launch: no other block will
    // ask for work, since each has counted itself out after its last request.
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(p.work_counters + 1, 1) == gridDim.x - 1)
            p.work_counters[0] = p.work_counters[1] = 0;
    }
}
