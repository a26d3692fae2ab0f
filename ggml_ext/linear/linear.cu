// linear on CUDA: up to 16 activation rows times quantised weights, bound by reading the weights once.
//
// The work is a list of units: one chunk of 256 columns of one tile of 32 to 128 weight rows, tiles of all weights one
// after the other, chunks of a tile in order. Every block takes a contiguous range of units of (nearly) equal bytes, so
// all of them finish together whatever the shapes are. A block keeps a ring of stages in shared memory, each holding
// the bytes of a unit's weights, exactly as they are in the file, and the packed activations of its chunk; cp.async
// fills the ring several units ahead. A warp computes 16 or 32 rows for all columns: weights become the A operand of
// mma in registers (linear_formats.cuh), activations are the B operand, sums stay in f32 registers.
//
// A tile that one block does not finish leaves partial sums in scratch memory; the block that arrives last adds them in
// the order of the chunks. How tiles are cut depends on shapes, types and device, never on T, and T <= 8 and T <= 16
// run the same arithmetic per column: that makes a row independent of the rows beside it.
//
// Measured on an H100 80GB HBM3 (3.35 TB/s), 2026-11-27, benchmarks/kernels/linear.cu, weights of the 27B geometry,
// pack included, T = 1 / 16, in TB/s of weight bytes and as a fraction of the bound: gate+up Q4_K 1.83 / 1.66 (55 / 50
// %), down Q6_K 1.60 / 1.46 (48 / 43 %), out Q4_K 1.02 / 0.93 (31 / 28 %), head Q6_K 1.96 / 1.78 (58 / 53 %), draft
// gate+up Q8_0 2.15 / 1.98 (64 / 59 %), gate+up F16 2.68 / 2.58 (80 / 77 %). Unpacking is not hidden.
//
// linear_formats.cuh holds the types of weights, pack.cuh the activations' layout, linear_plan.cuh the units,
// linear_multiply.cuh and linear_combine.cuh the steps of linear_kernel.cuh.
#include "linear_kernel.cuh"

#include <algorithm>
#include <climits>

namespace pydflash_linear {
namespace {

// ---- planning

// What the host needs to know about a format.
struct format_info {
    int  tile_rows, chunk_bytes, block;
    bool aligned;

    template <typename F> __host__ __device__ void operator()(F) {
        tile_rows = TILE_ROWS<F>, chunk_bytes = F::BYTES, block = F::BLOCK, aligned = F::ALIGNED;
    }
};

struct device_limits {
    int budget, blocks_per_sm;

    explicit device_limits(int device) {
        int per_sm = 0, per_block = 0;
        cudaDeviceGetAttribute(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
        cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        // A block also occupies 1 KiB of system memory and the kernel's static variables.
        const int half = per_sm / 2 - 1024 - 128;
        blocks_per_sm  = half >= MIN_BUDGET ? 2 : 1;
        budget         = blocks_per_sm == 2 ? half : per_block - 128;
    }
};

// Cuts the units of all weights into ranges of equal bytes, one for each block. Returns the number of blocks.
int divide_units(plan & p, const int64_t (&unit_bytes)[PYDFLASH_LINEAR_MAX_WEIGHTS], int max_blocks) {
    int64_t first_byte[PYDFLASH_LINEAR_MAX_WEIGHTS + 1] = {};
    for (int i = 0; i < p.n_weights; i++) {
        first_byte[i + 1] = first_byte[i] + (p.first_unit[i + 1] - p.first_unit[i]) * unit_bytes[i];
    }
    const int units  = p.first_unit[p.n_weights];
    const int blocks = std::min(std::min(max_blocks, MAX_BLOCKS), units);
    for (int block = 0, weight = 0; block < blocks; block++) {
        const int64_t at = first_byte[p.n_weights] * block / blocks;
        while (at >= first_byte[weight + 1]) {
            weight++;
        }
        p.begin[block] = p.first_unit[weight] + (int) ((at - first_byte[weight]) / unit_bytes[weight]);
    }
    p.begin[blocks] = units;
    return blocks;
}

template <int PANELS>
bool launch_multiply(pydflash_cuda * cuda, const plan & p, int blocks, const device_limits & limits) {
    return limits.budget >= MIN_BUDGET &&
           cudaFuncSetAttribute(multiply_kernel<PANELS>, cudaFuncAttributeMaxDynamicSharedMemorySize, p.budget) ==
               cudaSuccess &&
           cudaFuncSetAttribute(multiply_kernel<PANELS>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared) == cudaSuccess &&
           launch_early(cuda, multiply_kernel<PANELS>, blocks, THREADS, (size_t) p.budget, p);
}

bool valid_size(int64_t T, int64_t K) {
    return T >= 1 && T <= PYDFLASH_EXACT_ROWS && K >= 32 && K % 32 == 0 && K < INT_MAX / 1024;
}

bool aligned16(const void * pointer, int64_t stride) {
    return (uintptr_t) pointer % 16 == 0 && stride % 4 == 0;
}

template <typename Source>
bool launch_pack(pydflash_cuda * cuda, const Source & source, int64_t T, int64_t K, void * packed) {
    const int64_t items  = chunks(K) * panels(T) * PANEL_COLS;
    const int     blocks = (int) ((items + PACK_WARPS - 1) / PACK_WARPS);
    return launch_early(cuda, pack_kernel<Source>, blocks, PACK_WARPS * LANES, 0, source, T, K, (char *) packed);
}

}  // namespace
}  // namespace pydflash_linear

using namespace pydflash_linear;

bool pydflash_linear_supports(int type, int64_t row_bytes, int64_t K) {
    format_info info = {};
    if (!valid_size(1, K) || !with_format(type, info)) {
        return false;
    }
    return row_bytes % (info.aligned ? 16 : 2) == 0 && K % info.block == 0;
}

size_t pydflash_linear_packed_size(int64_t T, int64_t K) {
    return (size_t) panel_bytes(T, K) + MAX_BLOCKS * sizeof(uint32_t);
}

size_t pydflash_linear_scratch_size(const pydflash_cuda * cuda) {
    return (size_t) std::min(2 * cuda->sm_count, MAX_BLOCKS) * 2 * SLOT * sizeof(float);
}

bool pydflash_linear_pack(pydflash_cuda * cuda, const float * x, int64_t x_stride, int64_t T, int64_t K,
                          void * packed) {
    return valid_size(T, K) && aligned16(x, x_stride) && launch_pack(cuda, plain { x, x_stride }, T, K, packed);
}

bool pydflash_linear_pack_swiglu(pydflash_cuda * cuda, const float * gate, int64_t gate_stride, const float * up,
                                 int64_t up_stride, int64_t T, int64_t K, void * packed) {
    return valid_size(T, K) && aligned16(gate, gate_stride) && aligned16(up, up_stride) &&
           launch_pack(cuda, swiglu { { gate, gate_stride }, { up, up_stride } }, T, K, packed);
}

bool pydflash_linear_pack_gated_norm(pydflash_cuda * cuda, const float * o, const float * z, const float * weight,
                                     float eps, int64_t T, int64_t K, void * packed) {
    return valid_size(T, K) && K % CHUNK == 0 && aligned16(o, K) && aligned16(z, K) && aligned16(weight, 0) &&
           launch_pack(cuda, gated_norm { { o, K }, { z, K }, { weight, 0 }, eps }, T, K, packed);
}

bool pydflash_linear_pack_sigmoid_gate(pydflash_cuda * cuda, const float * o, const float * gate, int64_t row_stride,
                                       int64_t head_stride, int head, int64_t T, int64_t K, void * packed) {
    return valid_size(T, K) && head % 8 == 0 && head_stride % 4 == 0 && aligned16(o, K) &&
           aligned16(gate, row_stride) &&
           launch_pack(cuda, sigmoid_gate { { o, K }, gate, row_stride, head_stride, head }, T, K, packed);
}

bool pydflash_linear_pack_rms_norm(pydflash_cuda * cuda, const float * x, int64_t x_stride, const float * weight,
                                   float eps, int64_t T, int64_t K, void * packed) {
    if (!valid_size(T, K) || !aligned16(x, x_stride) || !aligned16(weight, 0)) {
        return false;
    }
    return launch_early(cuda, pack_rms_norm_kernel, panels(T) * PANEL_COLS, NORM_WARPS * LANES, 0,
                        plain { x, x_stride }, plain { weight, 0 }, eps, T, K, (char *) packed);
}

bool pydflash_linear_multiply(pydflash_cuda * cuda, void * packed, int64_t T, int64_t K,
                              const pydflash_linear_weight * weights, int n_weights, void * scratch) {
    if (!valid_size(T, K) || n_weights < 1 || n_weights > PYDFLASH_LINEAR_MAX_WEIGHTS) {
        return false;
    }
    plan p;
    p.n_weights = n_weights, p.n_chunks = (int) chunks(K), p.T = (int) T, p.K = (int) K;
    p.packed    = (const char *) packed;
    p.counters  = (uint32_t *) ((char *) packed + panel_bytes(T, K));
    p.partials  = (float *) scratch;

    int64_t unit_bytes[PYDFLASH_LINEAR_MAX_WEIGHTS] = {};
    p.first_unit[0] = 0;
    for (int i = 0; i < n_weights; i++) {
        const pydflash_linear_weight & w = weights[i];
        format_info info = {};
        if (!pydflash_linear_supports(w.type, w.row_bytes, K) || !with_format(w.type, info) ||
            (uintptr_t) w.data % (info.aligned ? 16 : 2) != 0) {
            return false;
        }
        p.weights[i] = { (const char *) w.data, w.rows, w.row_bytes, w.out, w.out_stride, w.residual, w.residual_stride,
                         w.type };
        const int64_t tiles = (w.rows + info.tile_rows - 1) / info.tile_rows;
        unit_bytes[i]       = (int64_t) info.tile_rows * info.chunk_bytes;
        p.first_unit[i + 1] = p.first_unit[i] + (int) (tiles * p.n_chunks);
    }
    const device_limits limits(cuda->device);
    p.budget = limits.budget;
    const int blocks = divide_units(p, unit_bytes, cuda->sm_count * limits.blocks_per_sm);
    return panels(T) == 1 ? launch_multiply<1>(cuda, p, blocks, limits) : launch_multiply<2>(cuda, p, blocks, limits);
}

// ---- the op

static bool supports(const ggml_tensor * node) {
    const ggml_tensor * x = node->src[0];
    const ggml_tensor * w = node->src[1];
    return x->type == GGML_TYPE_F32 && node->type == GGML_TYPE_F32 && x->ne[1] >= 1 &&
           x->ne[1] <= PYDFLASH_EXACT_ROWS && x->ne[2] * x->ne[3] * w->ne[2] * w->ne[3] == 1 &&
           x->ne[0] == w->ne[0] && x->nb[0] == sizeof(float) && x->nb[1] % 16 == 0 &&
           pydflash_linear_supports(w->type, (int64_t) w->nb[1], w->ne[0]);
}

static bool launch(pydflash_cuda * cuda, ggml_tensor * node) {
    const ggml_tensor * x = node->src[0];
    const ggml_tensor * w = node->src[1];
    const int64_t       K = x->ne[0], T = x->ne[1];

    void * packed  = cuda->alloc(cuda, pydflash_linear_packed_size(T, K));
    void * scratch = cuda->alloc(cuda, pydflash_linear_scratch_size(cuda));

    pydflash_linear_weight weight = {};
    weight.data       = w->data;
    weight.type       = w->type;
    weight.rows       = w->ne[1];
    weight.row_bytes  = (int64_t) w->nb[1];
    weight.out        = (float *) node->data;
    weight.out_stride = (int64_t) (node->nb[1] / sizeof(float));
    return pydflash_linear_pack(cuda, (const float *) x->data, (int64_t) (x->nb[1] / sizeof(float)), T, K, packed) &&
           pydflash_linear_multiply(cuda, packed, T, K, &weight, 1, scratch);
}

const pydflash_cuda_op pydflash_cuda_linear = { launch, supports };
