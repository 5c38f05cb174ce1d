// Conversions of single elements, one instruction each; those of pairs are in ptx.cuh.
#pragma once
#include "types.cuh"

__device__ __forceinline__ float unpack_f16(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// The upper half of a float32.
__device__ __forceinline__ float unpack_bf16(u16 x) {
    return __uint_as_float(static_cast<u32>(x) << 16);
}
