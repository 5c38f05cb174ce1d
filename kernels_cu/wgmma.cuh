// The warpgroup's matrix product, 64 rows x N columns, and the tiles in shared memory it reads.
//
// A tile is rows in groups of eight, and a group is panels of 64 elements: [group][panel][8
// rows][128 bytes], where the 16-byte chunk c of a panel's row r lies at c ^ r (the 128-byte
// swizzle). It is what one 5-dimensional box of the copy engine writes for any number of groups,
// and what the matrix unit reads either way round: rows of Q and K with their elements as the inner
// dimension, rows of V with their elements as the outer one.
//
// Heads that are no multiple of 64 wide have panels of 32 elements, [8 rows][64 bytes], where chunk
// c of row r lies at c ^ r / 2 (the 64-byte swizzle).
#pragma once
#include "ptx_sm90.cuh"
#include "tile.cuh"

static_assert(!CUPAGED_KV_FLOAT8, "tiles of Q, K and V have elements of 16 bits");
constexpr int PANEL = HEAD_DIM_QK % 64 == 0 && HEAD_DIM_VO % 64 == 0 ? 64 : 32;  // elements
constexpr int PANEL_CHUNKS = PANEL / 8;
constexpr int PANEL_ROW = PANEL * 2;  // bytes
constexpr int PANEL_BYTES = 8 * PANEL_ROW;

// Where things lie in a tile of rows of HEAD_DIM elements, eight of which take 8 * ROW_BYTES.
template <int HEAD_DIM, int ROW_BYTES>
struct GroupedRows {
    static constexpr int BYTES = HEAD_DIM * 2;  // of a row's elements
    static constexpr int CHUNKS = BYTES / 16;
    static constexpr int STRIDE = ROW_BYTES;
    static constexpr int GROUP_BYTES = 8 * ROW_BYTES;
    static_assert(HEAD_DIM % PANEL == 0 && BYTES <= ROW_BYTES, "a row's panels lie in its group");
    static_assert(GROUP_BYTES % PANEL_BYTES == 0, "every panel begins where its swizzle does");

    // Byte offset of a row's 16-byte chunk.
    static __device__ __forceinline__ u32 offset(int row, int chunk) {
        return row / 8 * GROUP_BYTES + chunk / PANEL_CHUNKS * PANEL_BYTES + row % 8 * PANEL_ROW +
               ((chunk % PANEL_CHUNKS ^ row % 8 * PANEL_CHUNKS / 8) << 4);
    }
    // Of the same chunk, some `rows` further down, which are none of the bits of the row's number.
    static __device__ __forceinline__ u32 below(u32 offset, int rows) {
        return (offset ^ (rows % 8 * PANEL_CHUNKS / 8 << 4)) + rows / 8 * GROUP_BYTES +
               rows % 8 * PANEL_ROW;
    }

    // Matrix descriptor from the given address on (PTX ISA, "Asynchronous Warpgroup Level Matrix
    // Shared Memory Layout"): the address, the distance of panels side by side, which only an
    // operand whose inner dimension is the outer one has, the distance of groups, the swizzle.
    static __device__ __forceinline__ u64 descriptor(u32 address) {
        return static_cast<u64>(PANEL == 64 ? 1 : 2) << 62 |
               static_cast<u64>(GROUP_BYTES >> 4) << 32 | static_cast<u64>(PANEL_BYTES >> 4) << 16 |
               (address & 0x3ffff) >> 4;
    }
};
using QTile = GroupedRows<HEAD_DIM_QK, Q_ROW_BYTES>;
using KTile = GroupedRows<HEAD_DIM_QK, K_ROW_BYTES>;
using VTile = GroupedRows<HEAD_DIM_VO, V_ROW_BYTES>;

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Pins an accumulator here: nothing that reads it may be moved up before the wait.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) asm volatile("" : "+f"(d[n][c])::"memory");
}

// Keeps the compiler from computing with the value before this.
__device__ __forceinline__ void hide(u64& value) { asm volatile("" : "+l"(value)); }

#if CUPAGED_BFLOAT16
#define WGMMA_TYPES "f32.bf16.bf16"
#else
#define WGMMA_TYPES "f32.f16.f16"
#endif

#define ACC_4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define ACC_8(d, n) ACC_4(d, n), ACC_4(d, n + 1)
#define ACC_32(d, n) ACC_8(d, n), ACC_8(d, n + 2), ACC_8(d, n + 4), ACC_8(d, n + 6)
#define ACC_64(d, n) ACC_32(d, n), ACC_32(d, n + 8)

#define NUMBERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
    "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_40 NUMBERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NUMBERS_48 NUMBERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NUMBERS_64 NUMBERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
    "%60, %61, %62, %63"
#define NUMBERS_128 NUMBERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, " \
    "%76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, " \
    "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
    "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, " \
    "%125, %126, %127"

// d = a . b^T, or d += where `accumulate` isn't 0, over 16 elements: a has 64 rows in shared
// memory, b N. As with mma_m16n8k16, warp w of the group holds rows 16 * w and on.
#define WGMMA_SHARED(N, NUMBERS, A, B, ACCUMULATE, ...)                                          \
    __device__ __forceinline__ void wgmma(float (&d)[N / 8][4], u64 a, u64 b, int accumulate) { \
        asm volatile(                                                                            \
            "{\n.reg .pred add;\nsetp.ne.b32 add, " ACCUMULATE ", 0;\n"                          \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES                            \
            " {" NUMBERS "}, " A ", " B ", add, 1, 1, 0, 0;\n}"                                  \
            : __VA_ARGS__                                                                        \
            : "l"(a), "l"(b), "r"(accumulate));                                                  \
    }
WGMMA_SHARED(64, NUMBERS_32, "%32", "%33", "%34", ACC_32(d, 0))
WGMMA_SHARED(80, NUMBERS_40, "%40", "%41", "%42", ACC_32(d, 0), ACC_8(d, 8))
WGMMA_SHARED(128, NUMBERS_64, "%64", "%65", "%66", ACC_64(d, 0))

// d = a . b, or d += where `accumulate` isn't 0: a is 64 x 16 in registers, as mma_m16n8k16 has it,
// b 16 rows of N elements in shared memory.
#define WGMMA_REGISTERS(N, NUMBERS, A0, A1, A2, A3, B, ACCUMULATE, ...)                          \
    __device__ __forceinline__ void wgmma(float (&d)[N / 8][4], const Pair (&a)[4], u64 b,      \
                                          int accumulate) {                                      \
        asm volatile(                                                                            \
            "{\n.reg .pred add;\nsetp.ne.b32 add, " ACCUMULATE ", 0;\n"                          \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES                            \
            " {" NUMBERS "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", add, 1, 1, 1;\n}"          \
            : __VA_ARGS__                                                                        \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));              \
    }
WGMMA_REGISTERS(64, NUMBERS_32, "%32", "%33", "%34", "%35", "%36", "%37", ACC_32(d, 0))
WGMMA_REGISTERS(96, NUMBERS_48, "%48", "%49", "%50", "%51", "%52", "%53", ACC_32(d, 0), ACC_8(d, 8),
                ACC_8(d, 10))
WGMMA_REGISTERS(128, NUMBERS_64, "%64", "%65", "%66", "%67", "%68", "%69", ACC_64(d, 0))
WGMMA_REGISTERS(256, NUMBERS_128, "%128", "%129", "%130", "%131", "%132", "%133", ACC_64(d, 0),
                ACC_64(d, 16))
