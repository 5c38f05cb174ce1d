// What sm_90a adds: barriers in shared memory, the copy engine, warpgroups that give registers to
// each other. One function an instruction.
#pragma once
#include "ptx.cuh"

// A tensor map as cuTensorMapEncodeTiled makes it; opaque.
struct alignas(64) TensorMap {
    u64 words[16];
};

// The thread's index in its block and its lane, read anew each time: a value kept takes a register.
__device__ __forceinline__ int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}
__device__ __forceinline__ int lane_index() {
    int index;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(index));
    return index;
}

// A barrier is complete when `count` arrivals and all bytes that were announced have come; then its
// phase bit flips and it counts anew.
__device__ __forceinline__ void mbarrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes the initialised barriers known to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that the copy engine will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Arrives for this thread once all of its copies so far (cp.async) have landed; the arrival is one
// of those that the barrier counts from the start.
__device__ __forceinline__ void cp_async_arrive(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of the given parity is over. On a fresh barrier, parity 1 is.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
        "@!complete bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Whether the phase of the given parity is over; doesn't wait.
__device__ __forceinline__ bool mbarrier_is_over(u32 barrier, u32 parity) {
    u32 is_over;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(is_over)
        : "r"(barrier), "r"(parity)
        : "memory");
    return is_over != 0;
}

// Copies the box at the given coordinates to shared memory; its bytes count on the barrier. What
// lies outside of the tensor arrives as zeros.
__device__ __forceinline__ void copy_box_5d(u32 shared, const TensorMap* map, int c0, int c1,
                                            int c2, int c3, int c4, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(shared),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Writes 16 bytes of zeros.
__device__ __forceinline__ void store_zeros(u32 shared) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(shared), "r"(0) : "memory");
}

// Orders the ordinary accesses to shared memory that this thread has made or waited for before what
// it has the matrix unit or the copy engine do there.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Barrier `id` of the block's sixteen: waits for, or just counts towards, `threads` of them.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The warpgroup goes on with `registers` registers a thread.
template <int registers>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
