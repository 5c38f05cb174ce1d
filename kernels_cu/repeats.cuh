// Whether a request of a page table has a page twice.
#pragma once
#include "types.cuh"

struct Repeats {
    const int* pages;   // [indptr[batch]]
    const int* indptr;  // [batch + 1]
    u32* answers;       // [batch], in the host's memory
    u32 none;           // the answer of a request that has no page twice; ~none where it has
    int num_words;      // all pages, 32 a word
};

// Answers for one request. All threads of the block call it; `seen`, [num_words], is shared memory.
__device__ __forceinline__ void find_repeats(const Repeats& r, int request, u32* seen) {
    for (int i = threadIdx.x; i < r.num_words; i += NUM_THREADS) seen[i] = 0;
    __syncthreads();  // no page has been seen
    u32 again = 0;
    const int end = r.indptr[request + 1];
    for (int i = r.indptr[request] + threadIdx.x; i < end; i += NUM_THREADS) {
        const u32 page = r.pages[i];
        const u32 bit = 1u << page % 32;  // a bit a page
        again |= atomicOr(&seen[page / 32], bit) & bit;
    }
    const bool twice = __syncthreads_or(again != 0);  // whichever thread found it
    if (threadIdx.x == 0) r.answers[request] = twice ? ~r.none : r.none;
}
