// Packed activations: the layout that the product kernel (linear_kernel.cuh) reads, and the kernels that write it.
//
// The K axis is cut into chunks of 256 values and a chunk into 64 units of 4 consecutive values. The rows of x are the
// columns of the tensor cores' B operand; 8 of them make a panel. A panel of one chunk holds
//
//   values   16 steps of mma.m16n8k16. In step s, lane (g = column, t) holds unit 16 t + s: a lane sees 64 consecutive
//            values in the course of a chunk, as it sees 64 consecutive weights. A unit is 4 halves in the order 0, 2,
//            1, 3, in which one bit mask unpacks nibbles. Steps 2i and 2i+1 of a lane are one 16-byte load.
//   sums     one more step that carries the sums of the 8 blocks of 32 values, for formats with a minimum per block:
//            lane (g, t) holds the sums of blocks 2t and 2t+1 as halves, then what rounding them to halves lost.
//   scales   the factor of each column, a power of two: value = factor * half.
//
// The values of a chunk are scaled so that the largest has a magnitude in [128, 256): no half and no sum overflows,
// and no scale of the whole row is needed, which would cost another pass.
//
// Launching bounds the kernels that write it. Measured on an H100 80GB HBM3, 2026-11-27, ncu, 27B geometry, 1 and 16 rows:
// rms_norm 4.4 and 4.3 us, gated_norm 3.3 and 3.5, swiglu 3.2 and 3.7, sigmoid_gate 3.4 and 3.5, plain 3.0 to 3.4; the
// 2.2 MB that swiglu reads at 16 rows would take 0.65 us (18 % of its time).
#pragma once

#include "linear.cuh"

#include <cuda_fp16.h>

namespace pydflash_linear {

constexpr int CHUNK        = 256;
constexpr int PANEL_COLS   = 8;
constexpr int LANES        = 32;
constexpr int STEP_PAIR    = LANES * 16;                 // bytes of two steps
constexpr int HALF_PANEL   = 4 * STEP_PAIR + 16;         // steps 0-7 or 8-15; 16 bytes of padding, see q6_k
constexpr int SUMS_OFFSET  = 2 * HALF_PANEL;
constexpr int SCALE_OFFSET = SUMS_OFFSET + LANES * 8;
constexpr int PANEL_BYTES  = SCALE_OFFSET + PANEL_COLS * 4;
static_assert(PANEL_BYTES % 16 == 0, "panels are copied in pieces of 16 bytes");

// One counter per block of the product kernel follows the panels. Packing zeroes them; every product leaves them zero.
constexpr int MAX_BLOCKS = 512;

__host__ __device__ constexpr int panels(int64_t T) { return T > PANEL_COLS ? 2 : 1; }
__host__ __device__ constexpr int64_t chunks(int64_t K) { return (K + CHUNK - 1) / CHUNK; }
__host__ __device__ constexpr int64_t panel_bytes(int64_t T, int64_t K) { return chunks(K) * panels(T) * PANEL_BYTES; }

#ifdef __CUDACC__

// The eight consecutive values that a source gives for (row, k): from x, or silu(gate) * up, or RMS-normalised x.
struct plain {
    const float * x;
    int64_t       stride;

    __device__ void load(int row, int64_t k, float (&v)[8]) const {
        const float4 * from = (const float4 *) (x + row * stride + k);
        const float4 a = from[0], b = from[1];
        v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w;
        v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
    }
};

struct swiglu {
    plain gate, up;

    __device__ void load(int row, int64_t k, float (&v)[8]) const {
        float u[8];
        gate.load(row, k, v);
        up.load(row, k, u);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = v[i] / (1.0f + expf(-v[i])) * u[i];
        }
    }
};

struct rms_norm {
    plain x, weight;
    float factor;  // 1 / sqrt(mean(x^2) + eps)

    __device__ void load(int row, int64_t k, float (&v)[8]) const {
        float w[8];
        x.load(row, k, v);
        weight.load(0, k, w);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = v[i] * factor * w[i];
        }
    }
};

// The gated norm of a delta-net's output: RMS norm of each head, times weight, times silu(z). The 16 lanes that share a
// head add up its squares; K must be whole chunks, so that no lane is missing.
struct gated_norm {
    static constexpr int HEAD = PYDFLASH_LINEAR_GATED_NORM_HEAD;

    plain o, z, weight;
    float eps;

    __device__ void load(int row, int64_t k, float (&v)[8]) const {
        float w[8], gate[8], sum = 0.0f;
        o.load(row, k, v);
        z.load(row, k, gate);
        weight.load(0, k % HEAD, w);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum = fmaf(v[i], v[i], sum);
        }
#pragma unroll
        for (int other = HEAD / 16; other > 0; other /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, other);
        }
        const float factor = 1.0f / sqrtf(sum / HEAD + eps);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = v[i] * factor * w[i] * (gate[i] / (1.0f + expf(-gate[i])));
        }
    }
};

// Attention's output times sigmoid(gate), the gate lying between the query heads: head h of row t starts at
// gate + t * row_stride + h * head_stride.
struct sigmoid_gate {
    plain         o;
    const float * gate;
    int64_t       row_stride, head_stride;
    int           head;  // values per head, a multiple of 8

    __device__ void load(int row, int64_t k, float (&v)[8]) const {
        float g[8];
        o.load(row, k, v);
        plain{ gate + k / head * head_stride, row_stride }.load(row, k % head, g);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = v[i] / (1.0f + expf(-g[i]));
        }
    }
};

// The power of two that brings a magnitude into [128, 256), and its inverse, both normal numbers.
__device__ __forceinline__ void chunk_scale(float magnitude, float & scale, float & inverse) {
    const int exponent = max((int) (__float_as_uint(magnitude) >> 23) - 127, -119);
    scale   = __uint_as_float((uint32_t) (127 + 7 - exponent) << 23);
    inverse = __uint_as_float((uint32_t) (127 - 7 + exponent) << 23);
}

// One warp packs one chunk of one column: lane l holds the values 8 l .. 8 l + 7, which are two units of the same lane
// of the fragment and two consecutive steps, hence one 16-byte store.
template <typename Source>
__device__ void pack_chunk(const Source & source, int64_t chunk, int column, int64_t T, int64_t K, char * packed) {
    const int     lane  = threadIdx.x % LANES;
    const int64_t k     = chunk * CHUNK + lane * 8;
    char *        panel = packed + (chunk * panels(T) + column / PANEL_COLS) * PANEL_BYTES;
    const int     g     = column % PANEL_COLS;

    float v[8] = {};
    if (column < T && k < K) {
        source.load(column, k, v);
    }
    float magnitude = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        magnitude = fmaxf(magnitude, fabsf(v[i]));
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        magnitude = fmaxf(magnitude, __shfl_xor_sync(0xffffffffu, magnitude, other));
    }
    float scale, inverse;
    chunk_scale(magnitude, scale, inverse);

    __half h[8];
    float  sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        h[i] = __float2half_rn(v[i] * scale);
        sum += __half2float(h[i]);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);

    union { __half half[8]; uint4 bits; } units = {
        { h[0], h[2], h[1], h[3], h[4], h[6], h[5], h[7] },
    };
    const int owner = lane / 8, pair = lane % 8;
    *(uint4 *) (panel + pair / 4 * HALF_PANEL + pair % 4 * STEP_PAIR + (g * 4 + owner) * 16) = units.bits;

    if (lane % 4 == 0) {
        const int    block = lane / 4;
        const __half high  = __float2half_rn(sum);
        __half *     sums  = (__half *) (panel + SUMS_OFFSET + (g * 4 + block / 2) * 8) + block % 2;
        sums[0] = high;
        sums[2] = __float2half_rn(sum - __half2float(high));
    }
    if (lane == 0) {
        ((float *) (panel + SCALE_OFFSET))[g] = inverse;
    }
}

__device__ __forceinline__ void clear_counters(int64_t T, int64_t K, char * packed) {
    uint32_t * counters = (uint32_t *) (packed + panel_bytes(T, K));
    for (int i = threadIdx.x; i < MAX_BLOCKS; i += blockDim.x) {
        counters[i] = 0;
    }
}

constexpr int PACK_WARPS = 8;

// Any source whose values are independent: a warp for every (chunk, column).
template <typename Source>
__global__ void __launch_bounds__(PACK_WARPS * LANES) pack_kernel(Source source, int64_t T, int64_t K, char * packed) {
    release_successor();
    wait_for_predecessor();
    const int64_t item = (int64_t) blockIdx.x * PACK_WARPS + threadIdx.x / LANES;
    const int     cols = panels(T) * PANEL_COLS;
    if (item < chunks(K) * cols) {
        pack_chunk(source, item / cols, (int) (item % cols), T, K, packed);
    }
    if (blockIdx.x == 0) {
        clear_counters(T, K, packed);
    }
}

constexpr int NORM_WARPS = 32;

// RMS norm: a block for every column, because the sum of squares runs over the row. The order of the sum depends on K
// only.
static __global__ void __launch_bounds__(NORM_WARPS * LANES)
pack_rms_norm_kernel(plain x, plain weight, float eps, int64_t T, int64_t K, char * packed) {
    release_successor();
    wait_for_predecessor();
    __shared__ float of_warp[NORM_WARPS];
    const int column = blockIdx.x, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;

    float sum = 0.0f;
    for (int64_t k = (int64_t) threadIdx.x * 8; column < T && k < K; k += NORM_WARPS * LANES * 8) {
        float v[8];
        x.load(column, k, v);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum = fmaf(v[i], v[i], sum);
        }
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, other);
    }
    if (lane == 0) {
        of_warp[warp] = sum;
    }
    __syncthreads();
    sum = of_warp[lane];
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, other);
    }
    const rms_norm source = { x, weight, 1.0f / sqrtf(sum / (float) K + eps) };
    for (int64_t chunk = warp; chunk < chunks(K); chunk += NORM_WARPS) {
        pack_chunk(source, chunk, column, T, K, packed);
    }
    if (column == 0) {
        clear_counters(T, K, packed);
    }
}

#endif

}  // namespace pydflash_linear
