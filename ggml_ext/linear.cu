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
#include "linear.cuh"
#include "linear_formats.cuh"

#include <algorithm>
#include <climits>

namespace pydflash_linear {
namespace {

constexpr int THREADS    = WARPS * LANES;
constexpr int MAX_STAGES = 5;                  // about 100 KiB in flight on an SM; more has nothing left to hide
constexpr int MIN_BUDGET = 93 * 1024;          // shared memory of a block: two stages of the largest format
constexpr int SLOT       = THREADS * 2 * 2 * 4;  // floats of a partial tile: 2 row tiles, 2 panels, 4 sums a lane

struct target {
    const char *  data;
    int64_t       rows, row_bytes;
    float *       out;
    int64_t       out_stride;
    const float * residual;
    int64_t       residual_stride;
    int           type;
};

struct plan {
    target     weights[PYDFLASH_LINEAR_MAX_WEIGHTS];
    int        first_unit[PYDFLASH_LINEAR_MAX_WEIGHTS + 1];
    int        n_weights, n_chunks, T, K;
    int        budget;                         // bytes of shared memory for the ring
    const char * packed;
    uint32_t * counters;                       // by the block that starts a tile; zero between products
    float *    partials;                       // two slots a block: a tile begun before it, a tile it does not end
    int        begin[MAX_BLOCKS + 1];          // block b computes units begin[b] .. begin[b + 1] - 1
};
static_assert(sizeof(plan) <= 4096, "the plan is passed by value");

template <typename F> constexpr int TILE_ROWS = F::WARPS * F::M_TILES * 16;
template <typename F> constexpr int WEIGHT_BYTES = TILE_ROWS<F> * F::STRIDE + F::skew(TILE_ROWS<F>);
template <typename F, int PANELS> constexpr int STAGE_BYTES = WEIGHT_BYTES<F> + PANELS * PANEL_BYTES;

// ---- copying

// 16 bytes to shared memory, of which the first `valid` come from global memory and the rest are zeros.
__device__ __forceinline__ void copy_piece(void * to, const void * from, int valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::
                     "r"((uint32_t) __cvta_generic_to_shared(to)), "l"(from), "r"(valid) : "memory");
}

__device__ __forceinline__ void end_copy_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N> __device__ __forceinline__ void wait_until_pending() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// Waits until at most n groups are still on their way.
__device__ __forceinline__ void wait_for_copies(int n) {
    switch (n) {
        case 0:  wait_until_pending<0>(); break;
        case 1:  wait_until_pending<1>(); break;
        case 2:  wait_until_pending<2>(); break;
        default: wait_until_pending<MAX_STAGES - 2>(); break;
    }
}

// The place of a unit in its weight.
struct position {
    int tile, chunk;

    __device__ void advance(int n_chunks) {
        if (++chunk == n_chunks) {
            chunk = 0;
            tile++;
        }
    }
};

// Distance of a row's chunk from the 16-byte boundary before it.
template <typename F>
__device__ __forceinline__ int misalignment(const target & w, int64_t row, int chunk) {
    const uint32_t address = (uint32_t) (uintptr_t) w.data + (uint32_t) row * (uint32_t) w.row_bytes + chunk * F::BYTES;
    return F::ALIGNED ? 0 : address & 15;
}

// Enqueues the copies of one unit's weights. Rows and columns past the end become zero bytes, which are zero weights in
// every format.
template <typename F>
__device__ void copy_weights(uint8_t * stage, const target & w, position at, int K) {
    constexpr int PIECES = F::ALIGNED ? F::BYTES / 16 : (F::BYTES + 14 + 15) / 16;
    constexpr int TOTAL  = TILE_ROWS<F> * PIECES;

    const int chunk_bytes = min(F::BYTES, (K - at.chunk * CHUNK) * F::BYTES / CHUNK);
    // Unrolled no further: the compiler would keep every row's address in registers, and spill.
#pragma unroll 3
    for (int first = 0; first < TOTAL; first += THREADS) {
        const int i = first + threadIdx.x;
        if (TOTAL % THREADS != 0 && i >= TOTAL) {
            break;
        }
        const int     row   = i / PIECES, piece = i % PIECES;
        const int64_t m     = (int64_t) at.tile * TILE_ROWS<F> + row;
        const int     shift = misalignment<F>(w, m, at.chunk);
        const int     valid = m < w.rows ? min(max(shift + chunk_bytes - 16 * piece, 0), 16) : 0;
        const char *  from  = w.data + m * w.row_bytes + (int64_t) at.chunk * F::BYTES - shift + 16 * piece;
        copy_piece(stage + row * F::STRIDE + F::skew(row) + F::piece_offset(piece), valid ? from : w.data, valid);
    }
}

template <typename F, int PANELS>
__device__ __forceinline__ const char * panel_source(const plan & p, int chunk) {
    return p.packed + (int64_t) chunk * PANELS * PANEL_BYTES;
}

// Enqueues the copies of one chunk's activations.
template <typename F, int PANELS>
__device__ void copy_panels(uint8_t * stage, const plan & p, int chunk) {
    const char * from = panel_source<F, PANELS>(p, chunk);
    for (int i = threadIdx.x * 16; i < PANELS * PANEL_BYTES; i += THREADS * 16) {
        copy_piece(stage + WEIGHT_BYTES<F> + i, from + i, 16);
    }
}

// ---- arithmetic

__device__ __forceinline__ void mma(float (&c)[4], uint2 low, uint2 high, uint2 b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(b.x), "r"(b.y));
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], uint32_t low0, uint32_t high0, uint32_t low1, uint32_t high1,
                                         float2 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low0), "r"(high0), "r"(low1), "r"(high1), "r"(__float_as_uint(b.x)), "r"(__float_as_uint(b.y)));
}

// The tf32 form of a step: values 0 and 2 first, then 1 and 3, as the activations are ordered.
__device__ __forceinline__ void mma(float (&c)[4], uint4 low, uint4 high, uint2 b) {
    mma_tf32(c, low.x, high.x, low.z, high.z, __half22float2(as_half2(b.x)));
    mma_tf32(c, low.y, high.y, low.w, high.w, __half22float2(as_half2(b.y)));
}

// The sums of a warp's rows: [row tile][panel][sum], sums 0 and 1 for row g and columns 2t and 2t+1, 2 and 3 for g + 8.
template <typename F, int PANELS> using sums = float[F::M_TILES][PANELS][4];

// What the chunk's minima subtract: minimum of a block times the sum of its activations, before the row's factor.
template <typename F, int PANELS>
__device__ __forceinline__ void multiply_minima(const typename F::row (&rows)[2 * F::M_TILES], const char * panels,
                                                sums<F, PANELS> & result) {
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int n = 0; n < PANELS; n++) {
        const uint2 b = *(const uint2 *) (panels + n * PANEL_BYTES + SUMS_OFFSET + lane * 8);
#pragma unroll
        for (int m = 0; m < F::M_TILES; m++) {
            const uint32_t low = rows[2 * m].minima, high = rows[2 * m + 1].minima;
            mma(result[m][n], make_uint2(low, low), make_uint2(high, high), b);
        }
    }
}

// Adds the product of this warp's rows with one chunk of the activations.
template <typename F, int PANELS>
__device__ void multiply_chunk(const uint8_t * stage, const target & w, position at, sums<F, PANELS> & total) {
    const int    warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    const char * panels = (const char *) stage + WEIGHT_BYTES<F>;

    typename F::row rows[2 * F::M_TILES];
#pragma unroll
    for (int i = 0; i < 2 * F::M_TILES; i++) {
        const int row = warp * F::M_TILES * 16 + i * 8 + g;
        rows[i].load(stage + row * F::STRIDE + F::skew(row) +
                         misalignment<F>(w, (int64_t) at.tile * TILE_ROWS<F> + row, at.chunk), t);
    }
    sums<F, PANELS> part = {};
#pragma unroll
    for (int pair = 0; pair < 8; pair++) {
        uint4 b[PANELS];
#pragma unroll
        for (int n = 0; n < PANELS; n++) {
            b[n] = F::activations(panels + n * PANEL_BYTES, pair, lane);
        }
#pragma unroll
        for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const auto low = rows[2 * m].weights(2 * pair + odd), high = rows[2 * m + 1].weights(2 * pair + odd);
#pragma unroll
                for (int n = 0; n < PANELS; n++) {
                    mma(part[m][n], low, high, odd ? make_uint2(b[n].z, b[n].w) : make_uint2(b[n].x, b[n].y));
                }
            }
        }
    }
    sums<F, PANELS> less = {};
    if constexpr (F::MINIMUM) {
        multiply_minima<F, PANELS>(rows, panels, less);
    }
#pragma unroll
    for (int n = 0; n < PANELS; n++) {
        const float2 column = *(const float2 *) (panels + n * PANEL_BYTES + SCALE_OFFSET + 8 * t);
#pragma unroll
        for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float factor = i % 2 ? column.y : column.x;
                if constexpr (F::MINIMUM) {
                    total[m][n][i] = fmaf(less[m][n][i], -factor * rows[2 * m + i / 2].minimum(), total[m][n][i]);
                }
                if constexpr (F::FLOAT_SCALE) {
                    factor *= rows[2 * m + i / 2].scale();
                }
                total[m][n][i] = fmaf(part[m][n][i], factor, total[m][n][i]);
            }
        }
    }
}

// ---- finishing a tile

// Writes product + residual for this warp's rows of a finished tile.
template <typename F, int PANELS>
__device__ void write_tile(const plan & p, const target & w, int tile, const sums<F, PANELS> & total) {
    const int     warp  = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int64_t first = (int64_t) tile * TILE_ROWS<F> + warp * F::M_TILES * 16 + lane / 4;
#pragma unroll
    for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
        for (int n = 0; n < PANELS; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int64_t row    = first + m * 16 + i / 2 * 8;
                const int     column = n * PANEL_COLS + lane % 4 * 2 + i % 2;
                if (row < w.rows && column < p.T) {
                    const float residual = w.residual ? w.residual[column * w.residual_stride + row] : 0.0f;
                    w.out[column * w.out_stride + row] = total[m][n][i] + residual;
                }
            }
        }
    }
}

template <int PANELS>
__device__ __forceinline__ float4 * slot_part(const plan & p, int slot, int m, int n) {
    return (float4 *) (p.partials + (int64_t) slot * SLOT) + (m * PANELS + n) * THREADS + threadIdx.x;
}

// Adds the partial sums that blocks first..last left of a tile, in that order: the block that began the tile, then
// those that went on with it.
template <typename F, int PANELS>
__device__ void add_partials(const plan & p, int first, int last, sums<F, PANELS> & total) {
#pragma unroll
    for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
        for (int n = 0; n < PANELS; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                total[m][n][i] = 0.0f;
            }
        }
    }
#pragma unroll 4
    for (int block = first; block <= last; block++) {
        const bool empty = p.begin[block] == p.begin[block + 1];
        const int  slot  = 2 * block + (block == first);
#pragma unroll
        for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
            for (int n = 0; n < PANELS; n++) {
                const float4 part = empty ? make_float4(0, 0, 0, 0) : __ldcg(slot_part<PANELS>(p, slot, m, n));
                total[m][n][0] += part.x;
                total[m][n][1] += part.y;
                total[m][n][2] += part.z;
                total[m][n][3] += part.w;
            }
        }
    }
}

// Leaves this block's share of a tile for the last of its blocks. True in that block, with the sum of all shares in
// `total`. tile_unit is the first unit of the tile.
template <typename F, int PANELS>
__device__ bool combine(const plan & p, int tile_unit, sums<F, PANELS> & total) {
    __shared__ bool arrived_last;

    int first = blockIdx.x, last = blockIdx.x;
    while (p.begin[first] > tile_unit) {
        first--;
    }
    while (p.begin[last + 1] < tile_unit + p.n_chunks) {
        last++;
    }
    const bool computes = threadIdx.x / LANES < F::WARPS;
    if (computes) {
        const int slot = 2 * blockIdx.x + (blockIdx.x == first);
#pragma unroll
        for (int m = 0; m < F::M_TILES; m++) {
#pragma unroll
            for (int n = 0; n < PANELS; n++) {
                const float(&c)[4] = total[m][n];
                *slot_part<PANELS>(p, slot, m, n) = make_float4(c[0], c[1], c[2], c[3]);
            }
        }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int shares = 0;
        for (int block = first; block <= last; block++) {
            shares += p.begin[block] < p.begin[block + 1];
        }
        arrived_last = (int) atomicAdd(p.counters + first, 1u) == shares - 1;
        if (arrived_last) {
            p.counters[first] = 0;
        }
    }
    __syncthreads();
    if (!arrived_last) {
        return false;
    }
    __threadfence();
    if (computes) {
        add_partials<F, PANELS>(p, first, last, total);
    }
    return true;
}

// ---- the kernel

// Computes units begin..end-1, all of weight number `index`.
template <typename F, int PANELS>
__device__ void stream_units(const plan & p, int index, int begin, int end, uint8_t * ring) {
    constexpr int STAGE = STAGE_BYTES<F, PANELS>;
    static_assert(2 * STAGE <= MIN_BUDGET, "a ring needs two stages");

    const target & w      = p.weights[index];
    const int      stages = min(MAX_STAGES, p.budget / STAGE);
    const int      ahead  = stages - 1;
    const bool     computes = threadIdx.x / LANES < F::WARPS;

    position at = { (begin - p.first_unit[index]) / p.n_chunks, (begin - p.first_unit[index]) % p.n_chunks };
    position next = at;

    __syncthreads();  // the ring may still be in use for the weight before
    for (int i = 0; i < ahead; i++) {
        if (begin + i < end) {
            copy_weights<F>(ring + i * STAGE, w, next, p.K);
            next.advance(p.n_chunks);
        }
        end_copy_group();
    }
    // The weights above do not depend on earlier kernels; everything below does. The first panels are copied without
    // cp.async because its groups complete in order: the first unit would wait for the weights of all of them.
    wait_for_predecessor();
    position early = at;
    for (int i = 0; i < ahead && begin + i < end; i++, early.advance(p.n_chunks)) {
        const uint4 * from = (const uint4 *) panel_source<F, PANELS>(p, early.chunk);
        uint4 *       to   = (uint4 *) (ring + i * STAGE + WEIGHT_BYTES<F>);
        for (int k = threadIdx.x; k < PANELS * PANEL_BYTES / 16; k += THREADS) {
            to[k] = from[k];
        }
    }

    sums<F, PANELS> total = {};
    int stage = 0;
    for (int unit = begin; unit < end; unit++) {
        wait_for_copies(ahead - 1);
        __syncthreads();
        if (unit + ahead < end) {
            uint8_t * free_stage = ring + (stage == 0 ? ahead : stage - 1) * STAGE;
            copy_weights<F>(free_stage, w, next, p.K);
            copy_panels<F, PANELS>(free_stage, p, next.chunk);
            next.advance(p.n_chunks);
        }
        end_copy_group();

        if (computes) {
            multiply_chunk<F, PANELS>(ring + stage * STAGE, w, at, total);
        }
        if (at.chunk == p.n_chunks - 1 || unit == end - 1) {
            const int  tile_unit = unit - at.chunk;
            const bool whole     = tile_unit >= begin && at.chunk == p.n_chunks - 1;
            if ((whole || combine<F, PANELS>(p, tile_unit, total)) && computes) {
                write_tile<F, PANELS>(p, w, at.tile, total);
            }
#pragma unroll
            for (int i = 0; i < F::M_TILES * PANELS * 4; i++) {
                (&total[0][0][0])[i] = 0.0f;
            }
        }
        at.advance(p.n_chunks);
        stage = stage == ahead ? 0 : stage + 1;
    }
}

// Calls `visit` with a value of the format of a ggml type; false when the type has none.
template <typename Visitor>
__host__ __device__ __forceinline__ bool with_format(int type, Visitor && visit) {
    switch (type) {
        case GGML_TYPE_Q4_K: visit(q4_k()); return true;
        case GGML_TYPE_Q5_K: visit(q5_k()); return true;
        case GGML_TYPE_Q6_K: visit(q6_k()); return true;
        case GGML_TYPE_Q8_0: visit(q8_0()); return true;
        case GGML_TYPE_Q4_0: visit(q4_0()); return true;
        case GGML_TYPE_F16:  visit(f16());  return true;
        case GGML_TYPE_BF16: visit(bf16()); return true;
        case GGML_TYPE_F32:  visit(f32());  return true;
        default: return false;
    }
}

template <int PANELS>
struct stream_visitor {
    const plan & p;
    int          index, begin, end;
    uint8_t *    ring;

    template <typename F> __host__ __device__ void operator()(F) const {
#ifdef __CUDA_ARCH__
        stream_units<F, PANELS>(p, index, begin, end, ring);
#endif
    }
};

// Two blocks on an SM where its shared memory allows that, hence the bound on registers.
template <int PANELS>
__global__ void __launch_bounds__(THREADS, 2) multiply_kernel(const __grid_constant__ plan p) {
    extern __shared__ __align__(128) uint8_t ring[];
    release_successor();
    for (int i = 0; i < p.n_weights; i++) {
        const int begin = max(p.begin[blockIdx.x], p.first_unit[i]);
        const int end   = min(p.begin[blockIdx.x + 1], p.first_unit[i + 1]);
        if (begin < end) {
            with_format(p.weights[i].type, stream_visitor<PANELS> { p, i, begin, end, ring });
        }
    }
}

// ---- planning

// What the host has to know about a format.
struct format_info {
    int  tile_rows, chunk_bytes;
    bool aligned;

    template <typename F> __host__ __device__ void operator()(F) {
        tile_rows = TILE_ROWS<F>, chunk_bytes = F::BYTES, aligned = F::ALIGNED;
    }
};

struct device_limits {
    int budget, blocks_per_sm;

    explicit device_limits(int device) {
        int per_sm = 0, per_block = 0;
        cudaDeviceGetAttribute(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
        cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        // A block also occupies 1 KiB of system memory and our static variables.
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
    const bool super_block = type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K || type == GGML_TYPE_Q6_K;
    return row_bytes % (info.aligned ? 16 : 2) == 0 && (!super_block || K % CHUNK == 0);
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
    return valid_size(T, K) && head % 8 == 0 && aligned16(o, K) && aligned16(gate, row_stride) && head_stride % 4 == 0 &&
           launch_pack(cuda, sigmoid_gate { { o, K }, gate, row_stride, head_stride, head }, T, K, packed);
}

bool pydflash_linear_pack_rms_norm(pydflash_cuda * cuda, const float * x, int64_t x_stride, const float * weight,
                                   float eps, int64_t T, int64_t K, void * packed) {
    if (!valid_size(T, K) || !aligned16(x, x_stride) || !aligned16(weight, 0)) {
        return false;
    }
    return launch_early(cuda, pack_rms_norm_kernel, panels(T) * PANEL_COLS, NORM_WARPS * LANES, 0, plain { x, x_stride },
                        plain { weight, 0 }, eps, T, K, (char *) packed);
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
