// The product kernel (linear.cu describes it): a ring of stages in shared memory, filled several units ahead.
#pragma once

#include "async_copy.cuh"
#include "linear_combine.cuh"

namespace pydflash_linear {

// ---- copying

// Enqueues the copies of one unit's weights. Rows and columns past the end become zero bytes, which are zero weights in
// every format.
template <typename F>
static __device__ void copy_weights(uint8_t * stage, const target & w, position at, int K) {
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
        uint8_t *     to    = stage + row * F::STRIDE + F::skew(row) + F::piece_offset(piece);
        copy_async_or_zero(to, valid ? from : w.data, valid);
    }
}

template <typename F, int PANELS>
static __device__ __forceinline__ const char * panel_source(const plan & p, int chunk) {
    return p.packed + (int64_t) chunk * PANELS * PANEL_BYTES;
}

// Enqueues the copies of one chunk's activations.
template <typename F, int PANELS>
static __device__ void copy_panels(uint8_t * stage, const plan & p, int chunk) {
    const char * from = panel_source<F, PANELS>(p, chunk);
    for (int i = threadIdx.x * 16; i < PANELS * PANEL_BYTES; i += THREADS * 16) {
        copy_async_or_zero(stage + WEIGHT_BYTES<F> + i, from + i, 16);
    }
}

// Waits until at most n groups are still on their way.
static __device__ __forceinline__ void wait_for_at_most(int n) {
    switch (n) {
        case 0:  wait_for_copies<0>(); break;
        case 1:  wait_for_copies<1>(); break;
        case 2:  wait_for_copies<2>(); break;
        default: wait_for_copies<MAX_STAGES - 2>(); break;
    }
}

// ---- the kernel

// Fills `ahead` stages with the units from `begin` on, none from `end` on; `next` moves to the unit after those.
template <typename F, int PANELS>
static __device__ __forceinline__ void fill_ring(const plan & p, const target & w, int begin, int end, int ahead,
                                                 position & next, uint8_t * ring) {
    constexpr int STAGE = STAGE_BYTES<F, PANELS>;

    position early = next;
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
    for (int i = 0; i < ahead && begin + i < end; i++, early.advance(p.n_chunks)) {
        const uint4 * from = (const uint4 *) panel_source<F, PANELS>(p, early.chunk);
        uint4 *       to   = (uint4 *) (ring + i * STAGE + WEIGHT_BYTES<F>);
        for (int k = threadIdx.x; k < PANELS * PANEL_BYTES / 16; k += THREADS) {
            to[k] = from[k];
        }
    }
}

// Computes units begin..end-1, all of weight number `index`.
template <typename F, int PANELS>
static __device__ void stream_units(const plan & p, int index, int begin, int end, uint8_t * ring) {
    constexpr int STAGE = STAGE_BYTES<F, PANELS>;
    static_assert(2 * STAGE <= MIN_BUDGET, "a ring needs two stages");

    const target & w      = p.weights[index];
    const int      stages = min(MAX_STAGES, p.budget / STAGE);
    const int      ahead  = stages - 1;
    const bool     computes = threadIdx.x / LANES < F::WARPS;

    position at = { (begin - p.first_unit[index]) / p.n_chunks, (begin - p.first_unit[index]) % p.n_chunks };
    position next = at;

    __syncthreads();  // the ring may still be in use for the weight before
    fill_ring<F, PANELS>(p, w, begin, end, ahead, next, ring);
    sums<F, PANELS> total = {};
    int stage = 0;
    for (int unit = begin; unit < end; unit++) {
        wait_for_at_most(ahead - 1);
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

}  // namespace pydflash_linear
