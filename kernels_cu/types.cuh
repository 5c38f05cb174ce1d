// The few names that a kernel needs and that NVRTC lacks without CUDA's headers, which would
// take longer to compile than the kernel itself.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// Two neighbouring 16-bit elements of a row, the first in the low half.
using Pair = u32;

constexpr int WARP_SIZE = 32;
constexpr float LOG2_E = 1.44269504f;
#define NEG_INF __int_as_float(0xff800000)  // NVRTC has no constexpr infinity


// 16 bytes, what one cp.async, one ldmatrix row and one vectorised store move.
struct alignas(16) Chunk {
    u32 x, y, z, w;
};
struct alignas(16) Float4 {
    float x, y, z, w;
};
struct alignas(8) Pairs {
    Pair first, second;
};
struct alignas(8) Float2 {
    float x, y;
};
