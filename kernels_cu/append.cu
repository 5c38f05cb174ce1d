// Copies the keys and values of new tokens to their slots in a paged cache, for sm_80 and later.
//
// A row is one token: K's and V's num_kv_heads * head_dim elements, taken as units of UNIT_BYTES,
// the largest that every address is a multiple of. 2^lanes_shift neighbouring threads take the
// units of a row, blockIdx.y saying which part of it, and each thread takes the same unit of up to
// ROWS_PER_THREAD rows. Its loads do not wait for the slots: while the data is on its way, the
// block's first threads find the slot of a row each.
#include "params.cuh"

#if CUPAGED_UNIT_BYTES == 16
using Unit = Chunk;
#elif CUPAGED_UNIT_BYTES == 8
using Unit = u64;
#elif CUPAGED_UNIT_BYTES == 4
using Unit = u32;
#elif CUPAGED_UNIT_BYTES == 2
using Unit = u16;
#else
using Unit = unsigned char;
#endif
static_assert(sizeof(Unit) == CUPAGED_UNIT_BYTES);

// Strides are in bytes, and may be any multiples of UNIT_BYTES; the last axis is contiguous.
struct Append {
    const char* append_key;    // [num_rows, num_kv_heads, head_dim]
    const char* append_value;  // the same
    char* k;                   // [num_pages, page_size, num_kv_heads, head_dim], any layout
    char* v;                   // the same
    i64 key_stride_row, key_stride_head;
    i64 value_stride_row, value_stride_head;
    i64 k_stride_page, k_stride_token, k_stride_head;
    i64 v_stride_page, v_stride_token, v_stride_head;
    int num_rows;
    int row_units, head_units;   // units of a row of K, and of a head
    u32 head_magic, head_shift;  // division by head_units
    int lanes_shift;
};

// Where a token goes.
struct Slot {
    int page;  // -1: nowhere
    int in_page;
};

#if CUPAGED_SLOTS_IN_LAUNCH
// Found by the host, and so few that they come with the launch.
struct Slots {
    Slot of_row[LAUNCH_ROWS];
};
#elif CUPAGED_SLOTS_IN_MEMORY
// Found by the host.
struct Slots {
    const Slot* of_row;  // [num_rows]
};
#else
// A caller's array of int32, or of int64 where it is wide.
struct IndexArray {
    const char* data;
    i64 stride;  // in bytes
    int wide;

    __device__ __forceinline__ i64 operator[](i64 i) const {
        const char* at = data + i * stride;
        return wide ? *reinterpret_cast<const i64*>(at) : *reinterpret_cast<const int*>(at);
    }
};

// To be looked up here.
struct Slots {
    IndexArray batch_indices, positions;  // [num_rows]
    IndexArray kv_indices;                // [num_indices]
    IndexArray kv_indptr;                 // [batch + 1]
    IndexArray kv_last_page_len;          // [batch]
    i64 num_indices;
    int batch, num_pages, page_size;
    u32 page_magic, page_shift;  // division by page_size
};
#endif

// The slot of a row.
__device__ __forceinline__ Slot find(const Slots& slots, int row) {
#if CUPAGED_SLOTS_IN_LAUNCH || CUPAGED_SLOTS_IN_MEMORY
    return slots.of_row[row];
#else
    // The arrays may have changed since the host saw them, or it never did: whatever they hold, no
    // entry outside them is read, and a row that is not a token of its request goes nowhere.
    constexpr Slot nowhere = {-1, 0};
    const i64 request = slots.batch_indices[row];
    const i64 long_position = slots.positions[row];
    if (request < 0 || request >= slots.batch) return nowhere;
    if (long_position >> 31 != 0) return nowhere;  // negative, or longer than any request
    const int position = static_cast<int>(long_position);
    const i64 begin = slots.kv_indptr[request];
    const i64 end = slots.kv_indptr[request + 1];
    const i64 last_page_len = slots.kv_last_page_len[request];
    if (begin < 0 || begin >= end || end > slots.num_indices) return nowhere;
    if (last_page_len < 1 || last_page_len > slots.page_size) return nowhere;
    if (position >= (end - begin - 1) * slots.page_size + last_page_len) return nowhere;
    const int index = divide(position, slots.page_magic, slots.page_shift);
    const i64 page = slots.kv_indices[begin + index];
    if (page < 0 || page >= slots.num_pages) return nowhere;
    return {static_cast<int>(page), position - index * slots.page_size};
#endif
}

// Nobody reads the source again soon: let it be the first to leave the caches.
__device__ __forceinline__ Unit load(const char* source) {
#if CUPAGED_UNIT_BYTES == 16
    const uint4 unit = __ldcs(reinterpret_cast<const uint4*>(source));
    return {unit.x, unit.y, unit.z, unit.w};
#else
    return __ldcs(reinterpret_cast<const Unit*>(source));
#endif
}

__device__ __forceinline__ void store(char* target, Unit unit) {
    *reinterpret_cast<Unit*>(target) = unit;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, CTAS_PER_SM)
    cupaged_append(const __grid_constant__ Append p, const __grid_constant__ Slots slots) {
    // [ROWS_PER_THREAD][rows_at_once], which is the whole of it where a row has one lane.
    __shared__ Slot found[ROWS_PER_THREAD * NUM_THREADS];
    const int thread = threadIdx.x;
    const int rows_at_once = NUM_THREADS >> p.lanes_shift;  // that a block takes side by side
    const int thread_row = thread >> p.lanes_shift;
    const int first_row = blockIdx.x * rows_at_once;
    const int row_step = gridDim.x * rows_at_once;
    const int lanes = 1 << p.lanes_shift;
    const int unit = (blockIdx.y << p.lanes_shift) + (thread & (lanes - 1));
    const bool in_row = unit < p.row_units;
    const int head = divide(unit, p.head_magic, p.head_shift);
    const int in_head = (unit - head * p.head_units) * CUPAGED_UNIT_BYTES;

    const char* key_source = p.append_key + head * p.key_stride_head + in_head;
    const char* value_source = p.append_value + head * p.value_stride_head + in_head;
    Unit key[ROWS_PER_THREAD], value[ROWS_PER_THREAD];
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
        const int row = first_row + i * row_step + thread_row;
        if (in_row && row < p.num_rows) {
            key[i] = load(key_source + row * p.key_stride_row);
            value[i] = load(value_source + row * p.value_stride_row);
        }
    }
#pragma unroll 1  // seldom more than once
    for (int i = thread; i < ROWS_PER_THREAD * rows_at_once; i += NUM_THREADS) {
        // rows_at_once is a power of two.
        const int pass = i >> (31 - __clz(rows_at_once));
        const int row = first_row + pass * row_step + (i & (rows_at_once - 1));
        found[i] = row < p.num_rows ? find(slots, row) : Slot{-1, 0};
    }
    __syncthreads();  // the slots have been found
    char* key_target = p.k + head * p.k_stride_head + in_head;
    char* value_target = p.v + head * p.v_stride_head + in_head;
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
        const Slot slot = found[i * rows_at_once + thread_row];
        if (in_row && slot.page >= 0) {
            store(key_target + slot.page * p.k_stride_page + slot.in_page * p.k_stride_token,
                  key[i]);
            store(value_target + slot.page * p.v_stride_page + slot.in_page * p.v_stride_token,
                  value[i]);
        }
    }
}
