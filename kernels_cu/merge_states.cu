// Merges attention states: outputs over disjoint sets of keys, each with its log-sum-exp, into the
// output and the log-sum-exp over all of the keys.
//
// A few lanes of a warp share a row and head, and take turns with its vectors: of 16 bytes, or of
// one element where rows are not aligned. All of them work out the weights.
#include "params.cuh"
#include "ptx.cuh"
#include "ptx_convert.cuh"

// A word holds ELEMENTS elements, the first in its low bits.
#if CUPAGED_FLOAT32
using Word = u32;
constexpr int ELEMENTS = 1;
#elif CUPAGED_ALIGNED
using Word = Pair;
constexpr int ELEMENTS = 2;
#else
using Word = u16;
constexpr int ELEMENTS = 1;
#endif

constexpr int WORDS = CUPAGED_ALIGNED ? 16 / sizeof(Word) : 1;

// What a lane loads and stores at a time.
struct alignas(WORDS * sizeof(Word)) Vector {
    Word words[WORDS];
};

// What of a lane's is on its way together: so many states, so many vectors of each.
constexpr int BATCH = 2;

// Strides are in bytes, and may be any; the last axis of v, v_rest and v_out is contiguous. v_out
// may be v, and s_out may be s.
struct Merge {
    const char* v;       // [num_rows, num_heads, head_dim], state 0
    const char* v_rest;  // [num_states - 1, num_rows, num_heads, head_dim], the others
    char* v_out;         // [num_rows, num_heads, head_dim]
    const char* s;       // float [num_rows, num_heads], base 2
    const char* s_rest;  // float [num_states - 1, num_rows, num_heads]
    char* s_out;         // float [num_rows, num_heads]
    const char* mask;    // one byte [num_rows], 0: the row stays as it is; or null
    i64 v_stride_row, v_stride_head;
    i64 v_rest_stride_state, v_rest_stride_row, v_rest_stride_head;
    i64 v_out_stride_row, v_out_stride_head;
    i64 s_stride_row, s_stride_head;
    i64 s_rest_stride_state, s_rest_stride_row, s_rest_stride_head;
    i64 s_out_stride_row, s_out_stride_head;
    i64 mask_stride;
    int num_states;
    int num_vectors;  // of a row and head
    int num_places;   // num_rows * num_heads
    int num_heads;
    u32 heads_magic, heads_shift;  // division by num_heads
    int lanes_log2;                // lanes that share a place, 1 to 32 of them
};

// Element `i` of a word.
__device__ __forceinline__ float unpack(Word word, int i) {
#if CUPAGED_FLOAT32
    return __uint_as_float(word);
#elif CUPAGED_BFLOAT16
    return __uint_as_float(i == 0 ? static_cast<u32>(word) << 16 : word & 0xffff0000u);
#else
    return unpack_f16(static_cast<u16>(word >> (16 * i)));
#endif
}

__device__ __forceinline__ Word pack(const float (&values)[ELEMENTS]) {
#if CUPAGED_FLOAT32
    return __float_as_uint(values[0]);
#elif CUPAGED_BFLOAT16
    return static_cast<Word>(pack_bf16(values[0], values[ELEMENTS - 1]));
#else
    return static_cast<Word>(pack_f16(values[0], values[ELEMENTS - 1]));
#endif
}

// The states of one row and head.
struct States {
    const char *v, *v_rest, *s, *s_rest;
    i64 v_step, s_step;
    int count;

    __device__ __forceinline__ States(const Merge& p, int row, int head)
        : v(p.v + row * p.v_stride_row + head * p.v_stride_head),
          v_rest(p.v_rest + row * p.v_rest_stride_row + head * p.v_rest_stride_head),
          s(p.s + row * p.s_stride_row + head * p.s_stride_head),
          s_rest(p.s_rest + row * p.s_rest_stride_row + head * p.s_rest_stride_head),
          v_step(p.v_rest_stride_state), s_step(p.s_rest_stride_state),
          count(NUM_STATES == 0 ? p.num_states : NUM_STATES) {}

    __device__ __forceinline__ float lse(int state) const {
        return *reinterpret_cast<const float*>(state == 0 ? s : s_rest + (state - 1) * s_step);
    }

    __device__ __forceinline__ const Vector* vectors(int state) const {
        return reinterpret_cast<const Vector*>(state == 0 ? v : v_rest + (state - 1) * v_step);
    }

    // The log-sum-exps of the states from `first` on; beyond the last one -inf, as of a state
    // without keys.
    __device__ __forceinline__ void lses(int first, float (&batch)[BATCH]) const {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) batch[i] = first + i < count ? lse(first + i) : NEG_INF;
    }

    // Vectors `index`, `index + lanes`, ... of the states from `first` on; beyond a row's end and
    // the last state undefined.
    __device__ __forceinline__ void load(int first, int index, int lanes, int num_vectors,
                                         Vector (&x)[BATCH][PER_LANE]) const {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (first + i >= count) continue;
            const Vector* const begin = vectors(first + i);
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j)
                if (index + j * lanes < num_vectors) x[i][j] = begin[index + j * lanes];
        }
    }
};

// What the states of one row and head weigh, relative to the highest log-sum-exp.
struct Weights {
    float shift = NEG_INF;  // what is subtracted: the highest, once all are known
    float total = 0.0f;
    float inverse = 0.0f;  // of the total
    int live = 0;          // states with keys, as their log-sum-exps tell; NaN is one
    int last = 0;          // the last of them

    __device__ __forceinline__ void raise(int first, const float (&s)[BATCH]) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            shift = fmaxf(shift, s[i]);
            if (s[i] != NEG_INF) {
                last = first + i;
                ++live;
            }
        }
    }

    // 0 for a state without keys, even among nothing but NaN.
    __device__ __forceinline__ float of(float s) const {
        return s == NEG_INF ? 0.0f : exp2_approx(s - shift);
    }

    __device__ __forceinline__ void add(const float (&s)[BATCH]) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) total += of(s[i]);
    }
};

// A lane's part of the output.
struct Sum {
    float values[PER_LANE][WORDS][ELEMENTS] = {};

    // Adds the states of a batch, each times its weight. What weighs nothing may hold anything:
    // 0 * NaN is not 0.
    __device__ __forceinline__ void add(const Weights& weights, const float (&s)[BATCH],
                                        const Vector (&x)[BATCH][PER_LANE]) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const float weight = weights.of(s[i]) * weights.inverse;
            if (weight == 0.0f) continue;
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j)
#pragma unroll
                for (int w = 0; w < WORDS; ++w)
#pragma unroll
                    for (int e = 0; e < ELEMENTS; ++e)
                        values[j][w][e] += weight * unpack(x[i][j].words[w], e);
        }
    }

    __device__ __forceinline__ Vector vector(int j) const {
        Vector packed;
#pragma unroll
        for (int w = 0; w < WORDS; ++w) packed.words[w] = pack(values[j][w]);
        return packed;
    }
};

// Merges one lane's part of a row and head, every `lanes`-th vector from `lane` on, and returns the
// log-sum-exp. `out` may be where state 0 is: each vector is read before it is written.
__device__ __forceinline__ float merge(const States& states, Vector* out, int num_vectors, int lane,
                                       int lanes) {
    // Asked for before it is known what they weigh: one wait for memory instead of two.
    Vector x[BATCH][PER_LANE];
    states.load(0, lane, lanes, num_vectors, x);
    float s[BATCH], more[BATCH];
    states.lses(0, s);
    Weights weights;
    weights.raise(0, s);
#pragma unroll 1
    for (int first = BATCH; first < states.count; first += BATCH) {
        states.lses(first, more);
        weights.raise(first, more);
    }
    if (weights.live == 1) {  // it is the result, to the bit
#pragma unroll 1
        for (int i = lane; i < num_vectors; i += lanes) out[i] = states.vectors(weights.last)[i];
        return states.lse(weights.last);
    }
    weights.add(s);
#pragma unroll 1
    for (int first = BATCH; first < states.count; first += BATCH) {
        states.lses(first, more);
        weights.add(more);
    }
    if (weights.live > 0) weights.inverse = __fdividef(1.0f, weights.total);
#pragma unroll 1
    for (int i = lane; i < num_vectors; i += PER_LANE * lanes) {
        Sum sum;
        if (i != lane) states.load(0, i, lanes, num_vectors, x);
        sum.add(weights, s, x);
#pragma unroll 1
        for (int first = BATCH; first < states.count; first += BATCH) {
            states.lses(first, more);
            states.load(first, i, lanes, num_vectors, x);
            sum.add(weights, more, x);
        }
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j)
            if (i + j * lanes < num_vectors) out[i + j * lanes] = sum.vector(j);
    }
    return weights.live == 0 ? NEG_INF : weights.shift + log2_approx(weights.total);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, CTAS_PER_SM)
    cupaged_merge_states(const __grid_constant__ Merge p) {
    const int lanes = 1 << p.lanes_log2;
    const int lane = threadIdx.x & (lanes - 1);
    const int place = blockIdx.x * (NUM_THREADS >> p.lanes_log2) + (threadIdx.x >> p.lanes_log2);
    const int row = divide(place, p.heads_magic, p.heads_shift);
    const int head = place - row * p.num_heads;
    bool taken = place < p.num_places;
    if (taken && p.mask != nullptr) taken = p.mask[row * p.mask_stride] != 0;
    float lse = 0.0f;
    if (taken) {
        char* const out = p.v_out + row * p.v_out_stride_row + head * p.v_out_stride_head;
        lse =
            merge(States(p, row, head), reinterpret_cast<Vector*>(out), p.num_vectors, lane, lanes);
    }
    __syncwarp();  // every lane has read the log-sum-exps of its place, one of which s_out may be
    if (taken && lane == 0)
        *reinterpret_cast<float*>(p.s_out + row * p.s_out_stride_row + head * p.s_out_stride_head) =
            lse;
}
