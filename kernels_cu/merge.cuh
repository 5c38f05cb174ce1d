// Results leaving a thread block: rows of out and lse, and the merging of partial states.
#pragma once
#include "params.cuh"
#include "tile.cuh"

// Where the rows of an item's query tile lie in q, out and lse.
struct RowMap {
    const Params& p;
    int packed_begin, packed_len;  // first packed row of the tile; packed rows of the request
    int qo_begin, first_head;      // first row of the request; first query head of the group

    __device__ __forceinline__ RowMap(const Params& p, const Work& work)
        : p(p), packed_begin(work.item.row_begin),
          packed_len(work.item.qo_len * p.gqa_group_size), qo_begin(work.item.qo_begin),
          first_head(work.kv_head * p.gqa_group_size) {}

    __device__ __forceinline__ bool valid(int row) const { return packed_begin + row < packed_len; }

    // Query of a tile's row, counted from the request's first.
    __device__ __forceinline__ int query(int row) const {
        return divide(packed_begin + row, p.group_magic, p.group_shift);
    }

    // Offset of a tile's row in a tensor [nnz_qo, num_qo_heads, ...] of the given strides.
    __device__ __forceinline__ i64 offset(int row, i64 stride_row, i64 stride_head) const {
        const int q = query(row);
        const int head = first_head + packed_begin + row - q * p.gqa_group_size;
        return (qo_begin + q) * stride_row + head * stride_head;
    }

    // Query head of a tile's row.
    __device__ __forceinline__ int head(int row) const {
        return first_head + packed_begin + row - query(row) * p.gqa_group_size;
    }

    // Takes in the sink of a row, a logit without a value: what is left of the row's output.
    // The log-sum-exp, base 2, grows by it; a row that sees no key stays as it is.
    __device__ __forceinline__ float add_sink(int row, float& lse) const {
        if (lse == NEG_INF) return 1.0f;
        const float sink = p.sinks[head(row)] * LOG2_E;
        const float top = fmaxf(lse, sink);
        const float weight = exp2_approx(lse - top);
        const float total = weight + exp2_approx(sink - top);
        lse = top + log2_approx(total);
        return weight / total;
    }

    __device__ __forceinline__ void write_lse(int row, float lse) const {
        if (p.lse != nullptr)
            p.lse[offset(row, p.lse_stride_row, p.lse_stride_head)] = lse * p.lse_scale;
    }
};

// Merges `count` states of ROWS rows of the tile, from first_row on, as far as the request has
// them: outputs [CTA_TILE_Q, HEAD_DIM_VO], normalised, and their log-sum-exps [CTA_TILE_Q], base 2,
// each state `out_stride` and `lse_stride` floats after the one before. Each of THREADS threads
// takes eight neighbouring columns of a row, and hands what it gets to
// sink(row, column, float (&values)[8], lse). States are added in their order, so the bits do not
// depend on which of them ended first. A state with an lse of -inf weighs nothing.
template <int ROWS, int THREADS, typename Sink>
__device__ __forceinline__ void merge_states(const RowMap& rows, int first_row, int thread,
                                             const float* out, const float* lse, i64 out_stride,
                                             i64 lse_stride, int count, Sink sink) {
    const int valid_rows = min(ROWS, rows.packed_len - rows.packed_begin - first_row);
    for (int i = thread; i < valid_rows * O_CHUNKS; i += THREADS) {
        const int row = first_row + i / O_CHUNKS;
        const int column = i % O_CHUNKS * 8;
        float top = NEG_INF;
        // Unrolled, so that the loads of several states are on their way together.
#pragma unroll 16
        for (int s = 0; s < count; ++s) top = fmaxf(top, lse[s * lse_stride + row]);
        const float shift = top == NEG_INF ? 0.0f : top;
        float total = 0.0f;
        float sum[8] = {};
#pragma unroll 16
        for (int s = 0; s < count; ++s) {
            const float weight = exp2_approx(lse[s * lse_stride + row] - shift);
            const float* source = out + s * out_stride + row * HEAD_DIM_VO + column;
            const Float4 low = *reinterpret_cast<const Float4*>(source);
            const Float4 high = *reinterpret_cast<const Float4*>(source + 4);
            total += weight;
            const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int c = 0; c < 8; ++c) sum[c] += weight * values[c];
        }
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[c] *= inverse;
        sink(row, column, sum, total == 0.0f ? NEG_INF : top + log2_approx(total));
    }
}

// Sink for a final result.
struct WriteResult {
    const RowMap& rows;
    __device__ __forceinline__ void operator()(int row, int column, const float (&values)[8],
                                               float lse) const {
        const Params& p = rows.p;
        float factor = p.v_scale;
        if (p.sinks != nullptr) factor *= rows.add_sink(row, lse);
        Chunk chunk;
        chunk.x = pack_pair(values[0] * factor, values[1] * factor);
        chunk.y = pack_pair(values[2] * factor, values[3] * factor);
        chunk.z = pack_pair(values[4] * factor, values[5] * factor);
        chunk.w = pack_pair(values[6] * factor, values[7] * factor);
        u16* target = p.out + rows.offset(row, p.out_stride_row, p.out_stride_head) + column;
        *reinterpret_cast<Chunk*>(target) = chunk;
        if (column == 0) rows.write_lse(row, lse);
    }
};

// Where a split's partial state lies.
struct PartialState {
    float* out;  // [CTA_TILE_Q, HEAD_DIM_VO]
    float* lse;  // [CTA_TILE_Q]

    __device__ __forceinline__ PartialState(const Params& p, int slot, int kv_head) {
        const i64 index = static_cast<i64>(slot) * p.num_kv_heads + kv_head;
        out = p.partial_out + index * (CTA_TILE_Q * HEAD_DIM_VO);
        lse = p.partial_lse + index * CTA_TILE_Q;
    }
};

// Sink for a partial state.
struct WritePartial {
    const PartialState& state;
    __device__ __forceinline__ void operator()(int row, int column, const float (&values)[8],
                                               float lse) const {
        float* target = state.out + row * HEAD_DIM_VO + column;
        *reinterpret_cast<Float4*>(target) = {values[0], values[1], values[2], values[3]};
        *reinterpret_cast<Float4*>(target + 4) = {values[4], values[5], values[6], values[7]};
        if (column == 0) state.lse[row] = lse;
    }
};

// Whether a split is the last of its tile to end, by which time all its partial states are there:
// the one that is merges them, so that no second launch has to wait for the slowest. `sync` is a
// barrier of the threads that call; one of them is the leader, `flag` is in shared memory.
template <typename Sync>
__device__ __forceinline__ bool is_last_split(int* counter, int num_splits, bool leader, int* flag,
                                              Sync sync) {
    __threadfence();  // this thread's part of the state is visible before the counter says so
    sync();           // ... and so is every thread's
    if (leader) {
        *flag = atomicAdd(counter, 1) == num_splits - 1;
        if (*flag) *counter = 0;  // for the next launch; nobody else counts here any more
    }
    sync();  // all know whether they are last
    const bool last = *flag;
    if (last) __threadfence();  // what the counter has counted is visible from here on
    return last;
}

// Merges all splits of ROWS rows of a tile, from first_row on, into the result.
template <int ROWS, int THREADS>
__device__ __forceinline__ void merge_partials(const Params& p, const Work& work, int first_row,
                                               int thread) {
    const RowMap rows(p, work);
    const PartialState first(p, work.item.first_partial, work.kv_head);
    const i64 heads = p.num_kv_heads;
    merge_states<ROWS, THREADS>(rows, first_row, thread, first.out, first.lse,
                                heads * CTA_TILE_Q * HEAD_DIM_VO, heads * CTA_TILE_Q,
                                work.item.num_splits, WriteResult{rows});
}
