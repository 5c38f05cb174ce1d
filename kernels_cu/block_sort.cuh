// Sums, order and search among what a block of NUM_THREADS has in shared memory.
#pragma once
#include "types.cuh"

// The sum of the values of all threads up to this one. Thread 0's warp_sums[w], [NUM_THREADS / 32],
// become the sums up to each warp; the last one is that of all. A barrier has to come before the
// next call.
__device__ __forceinline__ int inclusive_sum(int value, int* warp_sums) {
    constexpr int NUM_WARPS = NUM_THREADS / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    for (int step = 1; step < WARP_SIZE; step *= 2) {
        const int before = __shfl_up_sync(~0u, value, step);
        if (lane >= step) value += before;
    }
    if (lane == WARP_SIZE - 1) warp_sums[warp] = value;
    __syncthreads();  // each warp's sum is there
    if (warp == 0) {
        int sum = lane < NUM_WARPS ? warp_sums[lane] : 0;
        for (int step = 1; step < WARP_SIZE; step *= 2) {
            const int before = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += before;
        }
        if (lane < NUM_WARPS) warp_sums[lane] = sum;
    }
    __syncthreads();  // and the sums up to each
    return value + (warp ? warp_sums[warp - 1] : 0);
}

// Adds the values of all threads to *sum, in shared memory.
template <typename T>
__device__ __forceinline__ void add_up(T* sum, T value) {
    for (int step = WARP_SIZE / 2; step > 0; step /= 2)
        value += __shfl_xor_sync(~0u, value, step);
    if (threadIdx.x % WARP_SIZE == 0) atomicAdd(sum, value);
}

// The smallest power of two that is at least n, and at least 1.
__device__ __forceinline__ int power_of_two(int n) { return n <= 1 ? 1 : 1 << (32 - __clz(n - 1)); }

// Sorts keys, all different or equal to ~0, in ascending order (Batcher 1968, "Sorting networks and
// their applications", the bitonic sorter). `length` is a power of two. Begins and ends with a
// barrier.
__device__ __forceinline__ void sort_in_block(u32* keys, int length) {
    __syncthreads();  // the keys are there
    for (int size = 2; size <= length; size *= 2)
        for (int stride = size / 2; stride > 0; stride /= 2) {
            for (int i = threadIdx.x; i < length / 2; i += NUM_THREADS) {
                const int low = 2 * i - (i & (stride - 1)), high = low + stride;
                const u32 a = keys[low], b = keys[high];
                if ((a > b) == ((low & size) == 0)) keys[low] = b, keys[high] = a;
            }
            // A warp's pairs lie in 64 neighbours where they are no more than 32 apart: then no
            // other warp has anything to do with them in the next step either.
            const int next = stride > 1 ? stride / 2 : size;
            if (max(stride, next) <= WARP_SIZE)
                __syncwarp();
            else
                __syncthreads();
        }
    __syncthreads();  // the order is there
}

// How many of ascending numbers are less than `bound`.
template <typename T>
__device__ __forceinline__ int count_below(const T* numbers, int count, T bound) {
    int low = 0;
    while (low < count) {
        const int middle = (low + count) / 2;
        if (numbers[middle] < bound)
            low = middle + 1;
        else
            count = middle;
    }
    return low;
}
