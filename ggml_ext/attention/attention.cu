// attention on CUDA, split over the cache (flash-decoding). One block computes, for one key/value head, one chunk of
// the cache and a group of query columns, the unnormalised output and its softmax statistics; a second kernel merges
// the chunks in order. A column is one (row, query head) pair of the key/value head: with H / Hkv = 6, 16 rows make
// 96.
//
// The products are transposed, S^T = K Q^T and O^T = V^T P^T, so that cache slots and head dimensions are the M axis
// of mma.m16n8k16 and the columns its N axis of 8: one row costs 8 columns, not 16, and each cached byte is
// dequantised from shared memory straight into the A fragment of the warp that needs it. K and V tiles arrive by
// cp.async in their cached format; K of the next tile travels during softmax and P V, V during Q K. The warps of a
// block divide the slots for S^T (16 or 32 each) and the dimensions for O^T (32 each: one quantisation block). Shared
// memory holds Q and P in fragment order; S^T and O^T live in registers.
//
// Exactness. Chunks and tiles are cut at fixed slots, an element of S^T or O^T is one chain of mma over ascending
// slots or dimensions whatever the number of columns, row sums are gathered per 16 slots in a fixed order, and what a
// column does not see enters as p = 0 against a finite v. So neither T, nor P, nor the other columns can change a
// bit.
//
// Bounds: device memory for one row; for 16 rows of 24 heads of 256 the tensor cores, 12.9 GFLOP for 32,768 slots.
// Measured on an H100 80GB HBM3 (3.35 TB/s), 2026-11-27, both kernels, as what 131,072 slots add to a decode step of
// the 27B geometry: f16 8.6 GB in 3.26 ms = 2.6 TB/s, 79 % of the bound; q4_0 K and q8_0 V 3.5 GB in 2.42 ms = 1.4
// TB/s, 43 %: unpacking is not hidden. Over 512 slots (ncu) a layer's `attend` takes 8.7 to 9.1 us for one row and 11.1 to
// 12.0 us for 16, `merge` 4.0 and 4.4 us: launches and one block's latency, not bytes.
//
// kv_formats.cuh holds the types of the cache, attention_job.cuh chunks and tiles, attention_products.cuh and
// attention_softmax.cuh the steps of attention_kernel.cuh.
#include "attention_launch.cuh"

using namespace pydflash_attention;

namespace {

bool read_node(const ggml_tensor * node, job * j) {
    const ggml_tensor * q = node->src[0], * k = node->src[1], * v = node->src[2], * slot_positions = node->src[4];
    const int32_t * params = pydflash_node_params(node);
    if (!has_format(k->type) || !has_format(v->type)) {
        return false;
    }
    j->q              = (const float *) q->data;
    j->k              = (const char *) k->data;
    j->v              = (const char *) v->data;
    j->positions      = (const int32_t *) node->src[3]->data;
    j->slot_positions = slot_positions ? (const int32_t *) slot_positions->data : nullptr;
    j->out            = (float *) node->data;
    j->k_type         = k->type;
    j->v_type         = v->type;
    j->k_stride       = (int64_t) k->nb[1];
    j->v_stride       = (int64_t) v->nb[1];
    j->rows           = (int) q->ne[2];
    j->heads          = (int) q->ne[1];
    j->kv_heads       = params[3];
    j->slots          = (int) k->ne[1];
    j->chunks         = chunk_count(j->slots);
    j->causal         = params[1];
    j->window         = params[2];
    j->scale_log2     = pydflash_node_param_f32(node, 0) * LOG2_E;
    return j->rows <= PYDFLASH_EXACT_ROWS && q->type == GGML_TYPE_F32 && j->slots % PYDFLASH_SLOT_STEP == 0;
}

int shared_limit(int device) {
    int bytes = 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
}

bool supports(const ggml_tensor * node) {
    job j;
    int device = 0;
    return !node->src[5] && read_node(node, &j) && cudaGetDevice(&device) == cudaSuccess &&
           fits(j, (int) node->src[0]->ne[0], shared_limit(device));
}

bool launch(pydflash_cuda * cuda, ggml_tensor * node) {
    job j;
    if (!read_node(node, &j)) {
        return false;
    }
    const int head_size = (int) node->src[0]->ne[0];
    void * scratch = cuda->alloc(cuda, scratch_bytes(j.rows * j.heads, j.chunks, head_size));
    return launch_job(cuda, j, head_size, scratch, shared_limit(cuda->device));
}

}  // namespace

const pydflash_cuda_op pydflash_cuda_attention = { launch, supports };
