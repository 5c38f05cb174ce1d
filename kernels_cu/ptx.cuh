// One function an instruction; no other file has inline PTX.
#pragma once
#include "types.cuh"

// Address of shared memory as the 32-bit number that shared-memory instructions take.
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory past the registers and L1; reads `bytes` of them (0 or 16)
// and fills the rest with zeros. Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(u32 shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared),
                 "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of this thread's committed groups are still under way.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8,
// and receives of each matrix row l / 4, elements 2 * (l % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4(Pair (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

// The same, each matrix transposed on its way.
__device__ __forceinline__ void ldmatrix_x4_trans(Pair (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

#if __CUDA_ARCH__ >= 900
// The way back: the four matrices from the lanes' registers to shared memory.
__device__ __forceinline__ void stmatrix_x4(u32 shared, const Pair (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
#endif

// d += a * b for a 16 x 16 (row major), b 16 x 8 (column major), d 16 x 8 in float32. Lane l holds
// of d rows l / 4 (d[0], d[1]) and l / 4 + 8 (d[2], d[3]), columns 2 * (l % 4) and the next.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const Pair (&a)[4], Pair b0,
                                                 Pair b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const Pair (&a)[4], Pair b0,
                                                  Pair b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ Pair pack_f16(float low, float high) {
    Pair pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ Pair pack_bf16(float low, float high) {
    Pair pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Bytes of two words, 0..3 of the first and 4..7 of the second, as the four digits of `which` name
// them, the lowest digit for the lowest byte.
__device__ __forceinline__ u32 permute_bytes(u32 first, u32 second, u32 which) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(first), "r"(second), "r"(which));
    return result;
}

// Products of two pairs of float16.
__device__ __forceinline__ Pair multiply_f16(Pair a, Pair b) {
    Pair product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

#if __CUDA_ARCH__ >= 890
// Two e4m3 floats as float16.
__device__ __forceinline__ Pair f16_from_e4m3(u16 two) {
    Pair pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(two));
    return pair;
}
#endif

// Eight bytes of shared memory.
__device__ __forceinline__ void load_8(Pair& first, Pair& second, u32 shared) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(first), "=r"(second)
                 : "r"(shared)
                 : "memory");
}

// 16 bytes of global memory, read where it says so: neither sooner nor kept for the next time.
__device__ __forceinline__ void load_now(u64 (&x)[2], const void* address) {
    asm volatile("ld.relaxed.cta.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(x[0]), "=l"(x[1])
                 : "l"(address)
                 : "memory");
}

// Sine and cosine of an angle in -pi..pi, within about 2^-20 of the exact value.
__device__ __forceinline__ float sin_approx(float x) {
    float y;
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float cos_approx(float x) {
    float y;
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, within about 2^-22 of the exact value; that of infinity is 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 2^x and log2(x), within about 2^-22 of the exact value; 2^-inf is 0, log2(0) is -inf.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The warp's index in its block, broadcast from a lane so that the compiler knows it for the same
// in all lanes and can keep what follows from it in uniform registers.
__device__ __forceinline__ int warp_index() {
    return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / WARP_SIZE, 0);
}
