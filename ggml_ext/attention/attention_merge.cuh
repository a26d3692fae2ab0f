// The kernel that merges the chunks of attention into the result.
#pragma once

#include "attention_softmax.cuh"
#include "ext_cuda.cuh"

namespace pydflash_attention {

// The largest value of a block of D threads, in all of them.
template <int D>
static __device__ __forceinline__ float block_largest(float largest, float (&maxima)[D / 32]) {
    const int tid = threadIdx.x;
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
    }
    if (tid % 32 == 0) {
        maxima[tid / 32] = largest;
    }
    __syncthreads();
    for (int i = 0; i < D / 32; i++) {
        largest = fmaxf(largest, maxima[i]);
    }
    return largest;
}

// The weight of every chunk, 2^(its maximum - the largest maximum), and its sum times that weight.
template <int D>
static __device__ __forceinline__ void weigh_chunks(const job & j, int item, float (&maxima)[D / 32],
                                                    float2 * weights) {
    const int      tid   = threadIdx.x;
    const float2 * stats = j.stats + (int64_t) item * j.chunks;
    float largest = -INFINITY;
    for (int c = tid; c < j.chunks; c += D) {
        largest = fmaxf(largest, stats[c].x);
    }
    largest = block_largest<D>(largest, maxima);
    for (int c = tid; c < j.chunks; c += D) {
        const float2 s      = stats[c];
        const float  weight = s.x == -INFINITY ? 0.0f : exp2_fast(s.x - largest);
        weights[c] = make_float2(weight, weight * s.y);
    }
    __syncthreads();
}

// One block merges one (row, head): four interleaved sums over the chunks in order, then those four in order.
constexpr int MERGE_LANES = 4;

template <int D>
__global__ void __launch_bounds__(D) merge(const __grid_constant__ job j) {
    static_assert(D / 4 * MERGE_LANES == D, "one thread per four dimensions and sum");
    extern __shared__ float2 weights[];  // (chunks,): weight, weighted sum
    __shared__ float4 outs[MERGE_LANES][D / 4];
    __shared__ float  sums[MERGE_LANES], maxima[D / 32];

    release_successor();
    wait_for_predecessor();
    const int item = blockIdx.x, tid = threadIdx.x, four = tid % (D / 4), part = tid / (D / 4);
    float4 * out = reinterpret_cast<float4 *>(j.out + (int64_t) item * D);
    weigh_chunks<D>(j, item, maxima, weights);

    const float4 * partials = reinterpret_cast<const float4 *>(j.partials + (int64_t) item * j.chunks * D) + four;
    float4 o   = make_float4(0, 0, 0, 0);
    float  sum = 0.0f;
#pragma unroll 8
    for (int c = part; c < j.chunks; c += MERGE_LANES) {
        const float2 w = weights[c];
        if (w.x != 0.0f) {  // chunks that no row saw were not written
            const float4 x = partials[c * (D / 4)];
            o.x = fmaf(w.x, x.x, o.x), o.y = fmaf(w.x, x.y, o.y), o.z = fmaf(w.x, x.z, o.z), o.w = fmaf(w.x, x.w, o.w);
            sum += w.y;
        }
    }
    outs[part][four] = o;
    if (four == 0) {
        sums[part] = sum;
    }
    __syncthreads();
    if (part == 0) {
        for (int i = 1; i < MERGE_LANES; i++) {
            const float4 x = outs[i][four];
            o.x += x.x, o.y += x.y, o.z += x.z, o.w += x.w;
            sum += sums[i];
        }
        const bool  empty   = j.positions[item / j.heads] < 0 || sum == 0.0f;
        const float inverse = empty ? 0.0f : 1.0f / sum;
        out[four] = empty ? make_float4(0, 0, 0, 0)
                          : make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse);
    }
}

}  // namespace pydflash_attention
