// What norm_rope and store_kv do to one head: a block of D threads, one value each.
//
// The bits are those of ggml's rms_norm_f32 (norm.cu), rope.cu and turbo_wht.cu one after the other, which take the
// same sums in the same order: squares over a warp, then over the warps; butterflies from the lowest bit of the index
// up. Where a compiler may contract to one fused multiply-add it is told: never a product before a sum.
#pragma once

#include "rope.cuh"

#include "common.cuh"  // ggml-cuda's block_reduce

struct head_transform {
    const float *    weight;
    const int32_t *  positions;
    const float *    signs;  // or nullptr
    int              group;
    float            eps;
    rope_frequencies rope;
};

template <int D>
struct head_scratch {
    float values[D];
    float sums[D / 32];
};

// The Walsh-Hadamard transform of groups of `group` values, thread i of the block holding value i.
template <int D>
static __device__ float hadamard_block(float v, int group, head_scratch<D> & s) {
    const int i = threadIdx.x;
#pragma unroll
    for (int half = 1; half < 32; half *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, v, half);
        v = (i & half) ? other - v : v + other;
    }
#pragma unroll
    for (int half = 32; half < D; half *= 2) {
        if (half < group) {
            __syncthreads();
            s.values[i] = v;
            __syncthreads();
            const float other = s.values[i ^ half];
            v = (i & half) ? other - v : v + other;
        }
    }
    return v * (group == 64 ? 0.125f : group == 128 ? 0.08838834764831845f : 0.0625f);
}

// turbo_wht, forward. `signs` may be nullptr.
template <int D>
static __device__ float rotate_block(float v, int group, const float * signs, head_scratch<D> & s) {
    const int i = threadIdx.x & (group - 1);
    v = hadamard_block<D>(v * (signs ? signs[i] : 1.0f), group, s);
    return v * (signs ? signs[group + i] : 1.0f);
}

// NEOX pairs (i, i + dims/2) turned by the row's position.
template <int D>
static __device__ float turn_block(float v, int position, const rope_frequencies & f, head_scratch<D> & s) {
    const int i = threadIdx.x, half = f.dims / 2;
    s.values[i] = v;
    __syncthreads();
    return i < f.dims ? turn(v, s.values[i < half ? i + half : i - half], i, position, f) : v;
}

template <int D>
static __device__ float transform_block(float x, int row, const head_transform & h, head_scratch<D> & s) {
    const float sum   = block_reduce<block_reduce_method::SUM, D>(__fmul_rn(x, x), s.sums);
    const float scale = rsqrtf(sum / D + h.eps);  // D is a power of two: the division is exact
    const float n     = __fmul_rn(__fmul_rn(scale, x), h.weight[threadIdx.x]);
    const float v     = turn_block<D>(n, h.positions[row], h.rope, s);
    return h.group ? rotate_block<D>(v, h.group, h.signs, s) : v;
}
