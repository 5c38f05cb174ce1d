// The warpgroup's matrix product, 64 rows x N columns, and the tiles in shared memory it reads.
//
// A tile is rows of HEAD_DIM elements in groups of eight: [group][HEAD_DIM / 64][8 rows][128
// bytes], every group a multiple of 1,024 bytes, in which the 16-byte chunk c of row r lies at c ^
// r (the 128-byte swizzle). It is what one 5-dimensional box of the copy engine writes for any
// number of groups, and what the matrix unit reads either way round: rows of Q and K with their
// elements as the inner dimension, rows of V with their elements as the outer one.
#pragma once
#include "ptx_sm90.cuh"
#include "tile.cuh"

static_assert(HEAD_DIM_QK == HEAD_DIM_VO && Q_CHUNKS == QRows::CHUNKS && !CUPAGED_KV_FLOAT8,
              "tiles of Q, K and V lie alike");
constexpr int HEAD_DIM = HEAD_DIM_QK;
constexpr int ROW_BYTES = Q_ROW_BYTES;
constexpr int ROW_CHUNKS = QRows::CHUNKS;
constexpr int ROWS_PER_PASS = QRows::PER_PASS;
constexpr int GROUP_BYTES = 8 * ROW_BYTES;  // of eight rows
constexpr int PANEL_BYTES = 1024;           // eight rows of 64 elements

// Byte offset of a row's 16-byte chunk in a tile.
__device__ __forceinline__ u32 grouped_offset(int row, int chunk) {
    return row / 8 * GROUP_BYTES + chunk / 8 * PANEL_BYTES + row % 8 * 128 +
           ((chunk % 8 ^ row % 8) << 4);
}

// Matrix descriptor of a tile from the given address on (PTX ISA, "Asynchronous Warpgroup Level
// Matrix Shared Memory Layout"): the address, the distance of panels side by side, which only an
// operand whose inner dimension is the outer one has, the distance of groups, 128-byte swizzle.
__device__ __forceinline__ u64 tile_descriptor(u32 address) {
    return static_cast<u64>(1) << 62 | static_cast<u64>(GROUP_BYTES >> 4) << 32 |
           static_cast<u64>(PANEL_BYTES >> 4) << 16 | (address & 0x3ffff) >> 4;
}

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
#define NUMBERS_64 NUMBERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
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
WGMMA_REGISTERS(128, NUMBERS_64, "%64", "%65", "%66", "%67", "%68", "%69", ACC_64(d, 0))
WGMMA_REGISTERS(256, NUMBERS_128, "%128", "%129", "%130", "%131", "%132", "%133", ACC_64(d, 0),
                ACC_64(d, 16))
