"""The benchmark's own CUDA: random numbers drawn on the GPU, and the plainest reading and copying.

A cache of some gigabytes is drawn here in milliseconds; on the host it would take longer than all
measurements of it.
"""

from __future__ import annotations

import functools
from typing import Any

SOURCE = r"""
// The finaliser of splitmix64: neighbouring counters give bits that have nothing in common.
__device__ unsigned long long mixed(unsigned long long x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// out: [pairs], two 16-bit floats each, normal with mean 0 and variance 1 (Box and Muller).
extern "C" __global__ void fill_normal(unsigned* out, long long pairs, unsigned long long seed,
                                       int bfloat16) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < pairs; i += step) {
        const unsigned long long bits = mixed(seed + (i + 1) * 0x9e3779b97f4a7c15ull);
        // 24 bits each: in (0, 1], so that the logarithm is finite, and in [0, 2), times pi.
        const float uniform = (float)((unsigned)(bits >> 40) + 1) * 0x1p-24f;
        const float angle = (float)((unsigned)bits & 0xffffff) * 0x1p-23f;
        const float radius = sqrtf(-2.0f * logf(uniform));
        float sine, cosine;
        sincospif(angle, &sine, &cosine);
        const float low = radius * cosine, high = radius * sine;
        unsigned packed;
        if (bfloat16) {
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        } else {
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        }
        out[i] = packed;
    }
}

// data: [count]
// out: [1], written only where all bits together give one number of 2^32, so that the loads can't
// be left out.
extern "C" __global__ void __launch_bounds__(512, 3)
read_all(const uint4* data, long long count, unsigned* out) {
    const long long step = (long long)gridDim.x * blockDim.x;
    unsigned seen = 0;
#pragma unroll 1
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += 4 * step) {
        uint4 some[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const long long at = i + j * step;
            some[j] = data[at < count ? at : i];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) seen ^= some[j].x ^ some[j].y ^ some[j].z ^ some[j].w;
    }
    if (seen == 0x9e3779b9u) *out = seen;
}

// target, source: [count], apart from each other
extern "C" __global__ void __launch_bounds__(512, 3)
copy_all(uint4* __restrict__ target, const uint4* __restrict__ source, long long count) {
    const long long step = (long long)gridDim.x * blockDim.x;
#pragma unroll 1
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += 4 * step) {
        uint4 some[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const long long at = i + j * step;
            some[j] = source[at < count ? at : i];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const long long at = i + j * step;
            if (at < count) target[at] = some[j];
        }
    }
}
"""

#: What a block of these kernels has, and how many blocks an SM holds: 1,536 threads, which all do.
THREADS = 512
BLOCKS_PER_SM = 3

#: Bytes that `read_all` and `copy_all` take at a time: what they are given is a multiple of it.
VECTOR_BYTES = 16


@functools.cache
def module() -> Any:
    """The compiled kernels, for the current device."""
    import cupy

    return cupy.RawModule(code=SOURCE, options=("--std=c++17",))


@functools.cache
def function(name: str) -> Any:
    """One of the kernels."""
    return module().get_function(name)


def launch(name: str, num_sms: int, count: int, arguments: tuple[Any, ...]) -> None:
    """Start a kernel on CuPy's current stream, with a thread for each element or a full GPU."""
    blocks = min(-(-count // THREADS), num_sms * BLOCKS_PER_SM)
    function(name)((blocks,), (THREADS,), arguments)
