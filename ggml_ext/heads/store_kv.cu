// store_kv on CUDA. One block takes one head of one row of K (blockIdx.z 0: norm, RoPE, rotation) or of V (1:
// rotation), one thread a value (norm_rope.cuh), and writes it in the table's type. A quantisation block is the 32
// values of one warp; the first lane packs it with ggml's own function, from shared memory. The kernel reads each value
// once and writes less than that; its launch bounds it while decoding, device memory in prefill.
// Measured on an H100 80GB HBM3 (3.35 TB/s), 2026-11-27, ncu, 4 heads of 256, 1 and 16 rows: f16 4.2 and 4.0 us, q4_0 K
// (rotated) and q8_0 V 5.1 and 5.0 us. The 200 KB of 16 rows would take 0.06 us: it is the launch that is paid.
#include "store_kv.h"
#include "ext_cuda.cuh"
#include "norm_rope.cuh"

#include "cpy-utils.cuh"  // ggml-cuda's quantize_f32_*_block

namespace {

struct source {
    const char * x;
    int64_t      head_bytes, row_bytes;
};

struct table {
    char *    rows;
    int64_t   row_bytes;
    ggml_type type;
};

struct arguments {
    source          k, v;
    table           k_table, v_table;
    const int32_t * rows;
    head_transform  head;
    int             v_group;
};

// How a row of a table holds the value of each thread: by itself, or in a block of the 32 of a warp.
template <typename T>
struct plain {
    template <int D>
    __device__ static void put(float v, char * row, int head, head_scratch<D> &) {
        ((T *) row)[head * D + threadIdx.x] = ggml_cuda_cast<T>(v);
    }
};

template <typename Block, void (*pack)(const float *, Block *)>
struct blocks {
    template <int D>
    __device__ static void put(float v, char * row, int head, head_scratch<D> & s) {
        const int i = threadIdx.x;
        __syncthreads();  // the rotation may still be reading
        s.values[i] = v;
        __syncwarp();
        if (i % 32 == 0) {
            pack(s.values + i, (Block *) row + head * (D / 32) + i / 32);
        }
    }
};

// Calls `visit` with how tables of a type hold values; false when no table has the type.
template <typename Visitor>
__host__ __device__ __forceinline__ bool with_layout(ggml_type type, Visitor && visit) {
    switch (type) {
        case GGML_TYPE_F32:  visit(plain<float>()); return true;
        case GGML_TYPE_F16:  visit(plain<half>()); return true;
        case GGML_TYPE_BF16: visit(plain<nv_bfloat16>()); return true;
        case GGML_TYPE_Q8_0: visit(blocks<block_q8_0, quantize_f32_q8_0_block>()); return true;
        case GGML_TYPE_Q4_0: visit(blocks<block_q4_0, quantize_f32_q4_0_block>()); return true;
        default: return false;
    }
}

template <int D>
__device__ void put(float v, const table & t, int64_t row, int head, head_scratch<D> & s) {
    with_layout(t.type, [&](auto layout) { layout.template put<D>(v, t.rows + row * t.row_bytes, head, s); });
}

template <int D>
__device__ float load(const source & from, int head, int row) {
    return ((const float *) (from.x + head * from.head_bytes + row * from.row_bytes))[threadIdx.x];
}

template <int D>
__global__ void __launch_bounds__(D) store_kv(arguments a) {
    __shared__ head_scratch<D> s;
    release_successor();
    wait_for_predecessor();
    const int     head = blockIdx.x, row = blockIdx.y;
    const int64_t to   = a.rows[row];
    if (blockIdx.z == 0) {
        put<D>(transform_block<D>(load<D>(a.k, head, row), row, a.head, s), a.k_table, to, head, s);
    } else {
        const float v = load<D>(a.v, head, row);
        put<D>(a.v_group ? rotate_block<D>(v, a.v_group, nullptr, s) : v, a.v_table, to, head, s);
    }
}

bool is_source(const ggml_tensor * x) {
    return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float);
}

struct nothing {
    template <typename Layout> __host__ __device__ void operator()(Layout) const {}
};

bool is_table(const ggml_tensor * t) {
    return with_layout(t->type, nothing());
}

bool supports(const ggml_tensor * node) {
    const int64_t size = node->src[0]->ne[0];
    return (size == 64 || size == 128 || size == 256) && node->src[0]->ne[2] <= 65535 && is_source(node->src[0]) &&
           is_source(node->src[1]) && is_table(node->src[5]) && is_table(node->src[6]);
}

source source_of(const ggml_tensor * x) {
    return { (const char *) x->data, (int64_t) x->nb[1], (int64_t) x->nb[2] };
}

table table_of(const ggml_tensor * t) {
    return { (char *) t->data, (int64_t) t->nb[1], t->type };
}

bool launch(pydflash_cuda * cuda, ggml_tensor * node) {
    const ggml_tensor * k = node->src[0];
    arguments a;
    a.k = source_of(k);
    a.v = source_of(node->src[1]);
    a.k_table = table_of(node->src[5]);
    a.v_table = table_of(node->src[6]);
    a.rows    = (const int32_t *) node->src[4]->data;
    a.v_group = pydflash_node_params(node)[PYDFLASH_ROPE_PARAMS + 2];
    a.head.weight      = (const float *) node->src[2]->data;
    a.head.positions   = (const int32_t *) node->src[3]->data;
    a.head.signs       = node->src[7] ? (const float *) node->src[7]->data : nullptr;
    a.head.eps         = pydflash_node_param_f32(node, PYDFLASH_ROPE_PARAMS);
    a.head.group       = pydflash_node_params(node)[PYDFLASH_ROPE_PARAMS + 1];
    a.head.rope        = rope_frequencies_of(node);
    auto run = [&](auto kernel) {
        const dim3 grid((unsigned) k->ne[1], (unsigned) k->ne[2], 2);
        return launch_early(cuda, kernel, grid, (unsigned) k->ne[0], 0, a);
    };
    switch (k->ne[0]) {
        case 64:  return run(store_kv<64>);
        case 128: return run(store_kv<128>);
        case 256: return run(store_kv<256>);
        default:  return false;
    }
}

}  // namespace

const pydflash_cuda_op pydflash_cuda_store_kv = { launch, supports };
