// The kernels that PYDFLASH_CUDA_KERNELS=needed leaves out of ggml's CUDA back end: which nodes would need one, and
// bodies for what the remaining files still name. vendor/ggml.cmake lists the files and says why none is ever called.
//
// No header of ggml-cuda is included: one that declares `extern template` forbids defining it here.
#include "contract.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>

struct ggml_backend_cuda_context;
struct ggml_cuda_mm_fusion_args_host;
struct mmq_args;
struct CUstream_st;
using context = ggml_backend_cuda_context;

// --- Which nodes can run ---------------------------------------------------------------------------------------------

static bool wide(const ggml_tensor * rows) {
    return rows->ne[1] > PYDFLASH_EXACT_ROWS;
}

static bool has_product(ggml_type weight) {
    switch (weight) {
        case GGML_TYPE_F32: case GGML_TYPE_F16: case GGML_TYPE_BF16:  // cuBLAS
        case GGML_TYPE_Q4_0: case GGML_TYPE_Q8_0: case GGML_TYPE_Q4_K: case GGML_TYPE_Q5_K: case GGML_TYPE_Q6_K:
            return true;
        default:
            return false;
    }
}

static bool has_attention(const ggml_tensor * q, int32_t sparse_slots) {
    return (q->ne[0] == 64 || q->ne[0] == 128 || q->ne[0] == 256) && sparse_slots == 0;
}

// Asked by the back end's supports_op (hooks/supports_op.hook) for each node of ggml's own.
bool pydflash_cuda_was_built(const ggml_tensor * node, bool tensor_cores) {
    switch (node->op) {
        case GGML_OP_MUL_MAT:
            return wide(node->src[1]) && has_product(node->src[0]->type);
        case GGML_OP_FLASH_ATTN_EXT:
            return tensor_cores && wide(node->src[0]) && has_attention(node->src[0], node->op_params[4]);
        case GGML_OP_MUL_MAT_ID:
            return false;
        default:
            return true;
    }
}

// --- Which kernel a product takes: never one of these ----------------------------------------------------------------

bool ggml_cuda_should_use_mmf(ggml_type, int, int, const int64_t *, const size_t *, int, bool) { return false; }
bool ggml_cuda_should_use_mmvf(ggml_type, int, const int64_t *, const size_t *, int64_t)       { return false; }
bool ggml_cuda_should_use_mmvq(ggml_type, int, int64_t)                                        { return false; }
int  get_mmvq_mmid_max_batch(ggml_type, int)                                                   { return 0; }

// --- What is named and never called ----------------------------------------------------------------------------------

[[noreturn]] static void left_out(const char * kernel) {
    GGML_ABORT("%s was left out of this build (PYDFLASH_CUDA_KERNELS=needed)", kernel);
}

void ggml_cuda_mul_mat_f(context &, const ggml_tensor *, const ggml_tensor *, const ggml_tensor *, ggml_tensor *) {
    left_out(__func__);
}

void ggml_cuda_mul_mat_vec_f(context &, const ggml_tensor *, const ggml_tensor *, const ggml_tensor *, ggml_tensor *,
                             const ggml_cuda_mm_fusion_args_host *) {
    left_out(__func__);
}

void ggml_cuda_mul_mat_vec_q(context &, const ggml_tensor *, const ggml_tensor *, const ggml_tensor *, ggml_tensor *,
                             const ggml_cuda_mm_fusion_args_host *) {
    left_out(__func__);
}

template <ggml_type type, ggml_prec precision>
void mul_mat_q_case(context &, const mmq_args &, CUstream_st *) {
    left_out(__func__);
}

#define MMQ(type, precision) template void mul_mat_q_case<type, precision>(context &, const mmq_args &, CUstream_st *);
MMQ(GGML_TYPE_Q1_0,    GGML_PREC_Q8)
MMQ(GGML_TYPE_Q2_0,    GGML_PREC_Q8)
MMQ(GGML_TYPE_Q4_1,    GGML_PREC_Q8)
MMQ(GGML_TYPE_Q5_0,    GGML_PREC_Q8)
MMQ(GGML_TYPE_Q5_1,    GGML_PREC_Q8)
MMQ(GGML_TYPE_Q2_K,    GGML_PREC_Q8)
MMQ(GGML_TYPE_Q3_K,    GGML_PREC_Q8)
MMQ(GGML_TYPE_IQ1_S,   GGML_PREC_Q8)
MMQ(GGML_TYPE_IQ2_XXS, GGML_PREC_Q8)
MMQ(GGML_TYPE_IQ2_XS,  GGML_PREC_Q8)
MMQ(GGML_TYPE_IQ2_S,   GGML_PREC_Q8)
MMQ(GGML_TYPE_IQ3_XXS, GGML_PREC_Q8)
MMQ(GGML_TYPE_IQ3_S,   GGML_PREC_Q8)
MMQ(GGML_TYPE_IQ4_NL,  GGML_PREC_Q8)
MMQ(GGML_TYPE_IQ4_XS,  GGML_PREC_Q8)
MMQ(GGML_TYPE_MXFP4,   GGML_PREC_Q8)
MMQ(GGML_TYPE_MXFP4,   GGML_PREC_Q4)
MMQ(GGML_TYPE_NVFP4,   GGML_PREC_Q8)
MMQ(GGML_TYPE_NVFP4,   GGML_PREC_Q4)

void ggml_cuda_flash_attn_ext_tile(context &, ggml_tensor *) {
    left_out(__func__);
}

template <int D, ggml_type K, ggml_type V>
void ggml_cuda_flash_attn_ext_vec_case(context &, ggml_tensor *) {
    left_out(__func__);
}

#define VEC(D) template void ggml_cuda_flash_attn_ext_vec_case<D, GGML_TYPE_F16, GGML_TYPE_F16>(context &, ggml_tensor *);
VEC(64) VEC(128) VEC(256)

template <int DKQ, int DV, int ncols1, int ncols2>
void ggml_cuda_flash_attn_ext_mma_f16_case(context &, ggml_tensor *) {
    left_out(__func__);
}

#define MMA(DKQ, DV, ncols1, ncols2) \
    template void ggml_cuda_flash_attn_ext_mma_f16_case<DKQ, DV, ncols1, ncols2>(context &, ggml_tensor *);
#define MMA_GROUPED_8_AND_16(D) \
    MMA(D, D, 4, 2) MMA(D, D, 2, 4) MMA(D, D, 1, 8) MMA(D, D, 8, 2) MMA(D, D, 4, 4) MMA(D, D, 2, 8)
#ifdef PYDFLASH_CUDA_TURING
#define MMA_GROUPED(D) MMA_GROUPED_8_AND_16(D)
#else
#define MMA_GROUPED(D) MMA_GROUPED_8_AND_16(D) MMA(D, D, 16, 2) MMA(D, D, 8, 4) MMA(D, D, 4, 8)
#endif
#define MMA_ALL(D) MMA_GROUPED(D) MMA(D, D, 8, 1) MMA(D, D, 16, 1)
MMA_ALL(64) MMA_ALL(80) MMA_ALL(96) MMA_ALL(112) MMA_ALL(128) MMA_ALL(256)
MMA_GROUPED(512)
MMA(576, 512, 4, 4) MMA(576, 512, 1, 16) MMA(576, 512, 2, 16) MMA(576, 512, 4, 16)
MMA(576, 512, 1, 32) MMA(576, 512, 2, 32) MMA(320, 256, 1, 32) MMA(320, 256, 2, 32)
#ifndef PYDFLASH_CUDA_TURING
MMA(576, 512, 8, 4)
#endif
