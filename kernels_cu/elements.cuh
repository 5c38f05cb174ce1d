// Elements of K and V, and how 8-bit ones become the 16-bit floats that the matrix unit takes.
#pragma once
#include "ptx.cuh"
#include "ptx_convert.cuh"

#define CUPAGED_KV_FLOAT8 (CUPAGED_KV_E4M3 || CUPAGED_KV_E5M2)

#if !CUPAGED_KV_FLOAT8
using KvElement = u16;
#else
using KvElement = u8;

// Two neighbouring 8-bit floats, the first in the low byte, as float16; exact.
__device__ __forceinline__ Pair widen_to_f16(u32 two) {
#if CUPAGED_KV_E5M2
    // The upper half of a float16.
    return permute_bytes(two, 0, 0x1404);
#elif __CUDA_ARCH__ >= 890
    return f16_from_e4m3(static_cast<u16>(two));
#else
    // Sign, and the exponent and mantissa where a float16 has them: 2^8 times too small, as its
    // exponent has another bias. The one that would be 480 is NaN.
    const u32 spread = permute_bytes(two, 0, 0x1404);
    const u32 magnitude = (spread & 0x7f007f00) >> 1;
    const u32 is_nan = ((magnitude + 0x00800080) >> 14 & 0x00010001) * 0x7e00;
    return (multiply_f16(magnitude, 0x5c005c00) | is_nan) | (spread & 0x80008000);
#endif
}

// The low or the high two of four 8-bit floats, as the 16-bit floats of q; exact.
__device__ __forceinline__ Pair widen(u32 four, bool high) {
    const Pair pair = widen_to_f16(high ? four >> 16 : four);
#if CUPAGED_BFLOAT16
    return pack_bf16(unpack_f16(static_cast<u16>(pair)), unpack_f16(static_cast<u16>(pair >> 16)));
#else
    return pair;
#endif
}
#endif
