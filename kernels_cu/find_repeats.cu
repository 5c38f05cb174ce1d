// Whether a request of a page table has a page twice, for sm_80 and later: one block a request.
#include "repeats.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    cupaged_find_repeats(const __grid_constant__ Repeats r) {
    extern __shared__ u32 seen[];  // [num_words]
    find_repeats(r, blockIdx.x, seen);
}
