// The exact-width matrix product on CUDA, for callers that fuse (linear.h states the contract).
//
// A product is two launches: one rounds and packs the activations into the order in which tensor cores read them, one
// streams up to four weight matrices past them. Whatever produces the activations can be fused into the first launch,
// a residual addition into the second. All functions enqueue on cuda->stream, allocate nothing, may be captured into a
// CUDA graph, and return false (having launched nothing) when they do not support what they are given.
#pragma once

#include "ext_cuda.cuh"
#include "linear.h"

// One weight matrix and where its product goes: out[t * out_stride + m]. Strides count floats. With `residual` the
// result is product + residual[t * residual_stride + m]; residual and out may be the same memory.
struct pydflash_linear_weight {
    const void *  data;
    int           type;       // enum ggml_type
    int64_t       rows;       // M
    int64_t       row_bytes;  // distance of two rows in bytes
    float *       out;
    int64_t       out_stride;
    const float * residual;
    int64_t       residual_stride;
};

#define PYDFLASH_LINEAR_MAX_WEIGHTS     4
#define PYDFLASH_LINEAR_GATED_NORM_HEAD 128  // the head size that pydflash_linear_pack_gated_norm takes

// Whether a weight of this type, row distance and number of columns can be multiplied.
bool pydflash_linear_supports(int type, int64_t row_bytes, int64_t K);

// Bytes of the packed activations of T rows of K values (256-byte aligned memory), and of the scratch that a multiply
// needs (256-byte aligned, contents undefined before and after; one multiply at a time).
size_t pydflash_linear_packed_size(int64_t T, int64_t K);
size_t pydflash_linear_scratch_size(const struct pydflash_cuda * cuda);

// The pack launches, 1 <= T <= 16, K % 32 == 0. Rows are 16-byte aligned; strides count floats.
// x itself; RMS norm x / sqrt(mean(x^2) + eps) * weight, weight (K) f32; SwiGLU silu(gate) * up.
bool pydflash_linear_pack(struct pydflash_cuda * cuda, const float * x, int64_t x_stride, int64_t T, int64_t K,
                          void * packed);
bool pydflash_linear_pack_rms_norm(struct pydflash_cuda * cuda, const float * x, int64_t x_stride, const float * weight,
                                   float eps, int64_t T, int64_t K, void * packed);
bool pydflash_linear_pack_swiglu(struct pydflash_cuda * cuda, const float * gate, int64_t gate_stride, const float * up,
                                 int64_t up_stride, int64_t T, int64_t K, void * packed);

// silu(z) * weight * (o / rms of each head of PYDFLASH_LINEAR_GATED_NORM_HEAD values), K % 256 == 0; o * sigmoid(gate),
// the gate of head h of row t at gate + t * row_stride + h * head_stride, heads of `head` values.
bool pydflash_linear_pack_gated_norm(struct pydflash_cuda * cuda, const float * o, const float * z,
                                     const float * weight, float eps, int64_t T, int64_t K, void * packed);
bool pydflash_linear_pack_sigmoid_gate(struct pydflash_cuda * cuda, const float * o, const float * gate,
                                       int64_t row_stride, int64_t head_stride, int head, int64_t T, int64_t K,
                                       void * packed);

// Multiplies 1 to 4 weights of K columns with packed activations, in one launch. A packed buffer may be multiplied any
// number of times, one multiply after the other.
bool pydflash_linear_multiply(struct pydflash_cuda * cuda, void * packed, int64_t T, int64_t K,
                              const struct pydflash_linear_weight * weights, int n_weights, void * scratch);
