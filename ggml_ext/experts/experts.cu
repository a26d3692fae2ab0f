// experts on CUDA, the plain way. One warp computes one value of the result: the dot product of a row of x with a row
// of weights as they lie in the file, dequantised value by value, lane l taking values l, l + 32, ...; with logits, one
// such product for each selected expert, in the order of ids. Nothing is shared between rows of x: that makes them
// exact, and reads a weight once for every row that selects its expert. Arithmetic bounds it, about fifteen operations
// a weight. Measured on an H100 80GB HBM3 (3.35 TB/s), 2026-11-27, ncu, 8 of 256 experts of 512 x 2,048: Q4_K 26 us for 1 row
// (4.7 MB of weights, 5 % of the bound), 274 us for 16 rows (55 MB read, 6 %); Q6_K and the sum 25 and 262 us (8 and 10 %).
#include "experts.h"

#include "ext_cuda.cuh"

#include <cuda_bf16.h>

#define GGML_COMMON_DECL_CUDA
#include "ggml-common.h"

namespace {

constexpr int LANES = 32;
constexpr int WARPS = 8;  // values of the result in a block

// ---- weights: `value` is number i of a block of SIZE

template <typename T>
struct plain {
    using block = T;
    static constexpr int SIZE = 1;
    __device__ static float value(const block & b, int) { return (float) b; }
};

struct q8_0 {
    using block = block_q8_0;
    static constexpr int SIZE = QK8_0;
    __device__ static float value(const block & b, int i) { return __half2float(b.d) * b.qs[i]; }
};

struct q4_0 {
    using block = block_q4_0;
    static constexpr int SIZE = QK4_0;
    __device__ static float value(const block & b, int i) {
        const int both = b.qs[i % 16];
        return __half2float(b.d) * ((i < 16 ? both & 15 : both >> 4) - 8);
    }
};

// Value i of a Q4_K or Q5_K block, whose quant is q: eight 6-bit scales and minima share 12 bytes.
__device__ float scaled(half2 dm, const uint8_t * scales, int i, int q) {
    const int j     = i / 32;
    const int scale = j < 4 ? scales[j] & 63 : (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4;
    const int min   = j < 4 ? scales[j + 4] & 63 : scales[j + 4] >> 4 | (scales[j] >> 6) << 4;
    return __low2float(dm) * scale * q - __high2float(dm) * min;
}

struct q4_k {
    using block = block_q4_K;
    static constexpr int SIZE = QK_K;
    __device__ static float value(const block & b, int i) {
        const int both = b.qs[i / 64 * 32 + i % 32];
        return scaled(b.dm, b.scales, i, i % 64 < 32 ? both & 15 : both >> 4);
    }
};

struct q5_k {
    using block = block_q5_K;
    static constexpr int SIZE = QK_K;
    __device__ static float value(const block & b, int i) {
        const int both = b.qs[i / 64 * 32 + i % 32], fifth = b.qh[i % 32] >> i / 32 & 1;
        return scaled(b.dm, b.scales, i, (i % 64 < 32 ? both & 15 : both >> 4) | fifth << 4);
    }
};

struct q6_k {
    using block = block_q6_K;
    static constexpr int SIZE = QK_K;
    __device__ static float value(const block & b, int i) {
        const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
        const int both = b.ql[64 * half + 32 * (quarter % 2) + l];
        const int low  = quarter < 2 ? both & 15 : both >> 4;
        const int high = b.qh[32 * half + l] >> 2 * quarter & 3;
        return __half2float(b.d) * b.scales[8 * half + 2 * quarter + l / 16] * ((low | high << 4) - 32);
    }
};

// ---- the product

struct arguments {
    const float *   x;        // row of selection s at x + s / rows_of_x * K
    const char *    w;
    const int32_t * ids;
    const char *    logits;   // or nullptr
    float *         result;
    int64_t         K, M, expert_bytes, row_bytes, logits_bytes;
    int             k, rows_of_x;
};

// The same in every lane.
template <typename F>
__device__ float dot(const char * weights, const float * x, int64_t K) {
    const auto * blocks = (const typename F::block *) weights;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < K; i += LANES) {
        sum = fmaf(F::value(blocks[i / F::SIZE], (int) (i % F::SIZE)), x[i], sum);
    }
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, other);
    }
    return sum;
}

// The logarithm of the sum of exp over the selected logits of a row.
__device__ float log_sum_exp(const float * logits, const int32_t * ids, int k) {
    float peak = -INFINITY, sum = 0.0f;
    for (int j = 0; j < k; j++) { peak = fmaxf(peak, logits[ids[j]]); }
    for (int j = 0; j < k; j++) { sum += expf(logits[ids[j]] - peak); }
    return peak + logf(sum);
}

template <typename F>
__global__ void __launch_bounds__(LANES * WARPS) experts(const arguments a) {
    release_successor();
    wait_for_predecessor();
    const int64_t m = (int64_t) blockIdx.y * WARPS + threadIdx.y;
    if (m >= a.M) {
        return;
    }
    // Selections begin..end - 1 make this value.
    const int64_t begin  = a.logits ? (int64_t) blockIdx.x * a.k : blockIdx.x;
    const int64_t end    = a.logits ? begin + a.k : begin + 1;
    const float * logits = a.logits ? (const float *) (a.logits + blockIdx.x * a.logits_bytes) : nullptr;
    const float   whole  = a.logits ? log_sum_exp(logits, a.ids + begin, a.k) : 0.0f;
    float         sum    = 0.0f;
    for (int64_t s = begin; s < end; s++) {
        const int32_t expert  = a.ids[s];
        const char *  weights = a.w + expert * a.expert_bytes + m * a.row_bytes;
        const float   product = dot<F>(weights, a.x + s / a.rows_of_x * a.K, a.K);
        sum = a.logits ? fmaf(expf(logits[expert] - whole), product, sum) : product;
    }
    if (threadIdx.x == 0) {
        a.result[blockIdx.x * a.M + m] = sum;
    }
}

using kernel = void (*)(arguments);

// The kernel of a weight type, or nullptr.
kernel kernel_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_K: return experts<q4_k>;
        case GGML_TYPE_Q5_K: return experts<q5_k>;
        case GGML_TYPE_Q6_K: return experts<q6_k>;
        case GGML_TYPE_Q8_0: return experts<q8_0>;
        case GGML_TYPE_Q4_0: return experts<q4_0>;
        case GGML_TYPE_F16:  return experts<plain<half>>;
        case GGML_TYPE_BF16: return experts<plain<nv_bfloat16>>;
        case GGML_TYPE_F32:  return experts<plain<float>>;
        default: return nullptr;
    }
}

bool supports(const ggml_tensor * node) {
    const ggml_tensor * x = node->src[0], * w = node->src[1], * ids = node->src[2];
    return x->type == GGML_TYPE_F32 && ids->type == GGML_TYPE_I32 && kernel_of(w->type) != nullptr &&
           (w->ne[1] + WARPS - 1) / WARPS <= 65535;
}

bool launch(pydflash_cuda * cuda, ggml_tensor * node) {
    const ggml_tensor * x = node->src[0], * w = node->src[1], * ids = node->src[2], * logits = node->src[3];
    arguments a;
    a.x      = (const float *) x->data;
    a.w      = (const char *) w->data;
    a.ids    = (const int32_t *) ids->data;
    a.logits = logits ? (const char *) logits->data : nullptr;
    a.result = (float *) node->data;
    a.K = w->ne[0], a.M = w->ne[1];
    a.expert_bytes = (int64_t) w->nb[2], a.row_bytes = (int64_t) w->nb[1];
    a.logits_bytes = logits ? (int64_t) logits->nb[1] : 0;
    a.k         = (int) ids->ne[0];
    a.rows_of_x = x->ne[1] == 1 ? a.k : 1;
    const dim3 grid((unsigned) (logits ? ids->ne[1] : ids->ne[0] * ids->ne[1]), (unsigned) ((a.M + WARPS - 1) / WARPS));
    return launch_early(cuda, kernel_of(w->type), grid, dim3(LANES, WARPS), 0, a);
}

}  // namespace

const pydflash_cuda_op pydflash_cuda_experts = { launch, supports };
