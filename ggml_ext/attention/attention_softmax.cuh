// The online softmax between the two products of attention: what a column may see of a tile, its running maximum, the
// weights P of the tile, and the running sums.
#pragma once

#include "attention_products.cuh"

namespace pydflash_attention {

static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ int slot_position(const job & j, int slot) {
    return slot >= j.slots ? -1 : j.slot_positions ? j.slot_positions[slot] : slot;
}

// Sets the scores that a column does not see to -infinity. The tile starts at slot `begin`.
template <int D, int NT>
static __device__ __forceinline__ void hide_unseen(const job & j, int begin, const columns_of<D, NT> & col,
                                                   scores<D, NT> & s, const place<D, NT> & at) {
    using S = tiling<D, NT>;
#pragma unroll
    for (int mt = 0; mt < S::MT; mt++) {
        const int slots = begin + 16 * (at.wm * S::MT + mt);
        const int low   = slot_position(j, slots + row_slot(at.g)), high = slot_position(j, slots + row_slot(at.g + 8));
#pragma unroll
        for (int i = 0; i < 4 * S::NTW; i++) {
            const int c = 8 * (at.wn * S::NTW + i / 4) + 2 * at.t + i % 2, kpos = i % 4 < 2 ? low : high;
            if (kpos < col.first[c] || kpos > col.last[c]) {
                s[mt][i / 4][i % 4] = -INFINITY;
            }
        }
    }
}

// Leaves the largest raw score of each column over the warp's slots. Factors are positive, so scaling can wait.
template <int D, int NT>
static __device__ __forceinline__ void gather_maxima(const scores<D, NT> & s, columns_of<D, NT> & col,
                                                     const place<D, NT> & at) {
    using S = tiling<D, NT>;
#pragma unroll
    for (int i = 0; i < 2 * S::NTW; i++) {
        float largest = -INFINITY;
#pragma unroll
        for (int mt = 0; mt < S::MT; mt++) {
            largest = fmaxf(largest, fmaxf(s[mt][i / 2][i % 2], s[mt][i / 2][2 + i % 2]));
        }
#pragma unroll
        for (int other = 4; other < 32; other *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
        }
        if (at.g == 0) {
            col.gather[at.wm][8 * (at.wn * S::NTW + i / 2) + 2 * at.t + i % 2] = largest;
        }
    }
}

// Turns scores into weights p = 2^(score - maximum), stores them as P, and moves the running maxima and sums.
template <int D, int NT>
static __device__ __forceinline__ void weigh_scores(const scores<D, NT> & s, char * p_tile, columns_of<D, NT> & col,
                                                    int parity, sums<D, NT> & sum, const place<D, NT> & at) {
    using S = tiling<D, NT>;
#pragma unroll
    for (int nt = 0; nt < S::NTW; nt++) {
        uint32_t word[S::MT][2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int c = 8 * (at.wn * S::NTW + nt) + 2 * at.t + e;
            float largest = col.gather[0][c];
#pragma unroll
            for (int m = 1; m < S::WM; m++) {
                largest = fmaxf(largest, col.gather[m][c]);
            }
            const float factor = col.factor[c], before = col.max[parity][c];
            const float now    = fmaxf(before, largest * factor);
            const float base   = now == -INFINITY ? 0.0f : now;
            const float alpha  = now == before ? 1.0f : exp2_fast(before - now);
            if (at.wm == 0 && at.g == 0) {
                col.max[parity ^ 1][c] = now;
                col.alpha[c]           = alpha;
            }
#pragma unroll
            for (int mt = 0; mt < S::MT; mt++) {
                const float low  = exp2_fast(fmaf(s[mt][nt][e], factor, -base));
                const float high = exp2_fast(fmaf(s[mt][nt][2 + e], factor, -base));
                sum[mt][nt][e] = fmaf(sum[mt][nt][e], alpha, low + high);
                word[mt][e]    = bits(__floats2half2_rn(low, high));
            }
        }
        // Word g of column 2t + e, where the B fragment of O^T has it; lanes with t >= 2 store the other column first,
        // so that a store meets 32 banks.
#pragma unroll
        for (int mt = 0; mt < S::MT; mt++) {
            const int tile = (at.wm * S::MT + mt) * NT + at.wn * S::NTW + nt;
            uint32_t * to =
                reinterpret_cast<uint32_t *>(p_tile) + tile * 64 + 16 * at.t + 2 * (at.g % 4) + at.g / 4;
            const int late = at.t / 2;
            to[8 * late]       = late ? word[mt][1] : word[mt][0];
            to[8 * (1 - late)] = late ? word[mt][0] : word[mt][1];
        }
    }
}

// Multiplies the output so far by what the new maxima make of it.
template <int D, int NT>
static __device__ __forceinline__ void rescale_output(output<D, NT> & o, const columns_of<D, NT> & col,
                                                      const place<D, NT> & at) {
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
        const float2 alpha = *reinterpret_cast<const float2 *>(&col.alpha[8 * nt + 2 * at.t]);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            o[i / 4][nt][i % 4] *= i % 2 ? alpha.y : alpha.x;
        }
    }
}

// Leaves each column's sum of P over 16 slots at a time, the same tree for every NT.
template <int D, int NT>
static __device__ __forceinline__ void gather_sums(const sums<D, NT> & sum, columns_of<D, NT> & col,
                                                   const place<D, NT> & at) {
    using S = tiling<D, NT>;
#pragma unroll
    for (int i = 0; i < S::MT * S::NTW * 2; i++) {
        const int mt = i / (2 * S::NTW), nt = i / 2 % S::NTW;
        float total = sum[mt][nt][i % 2];
#pragma unroll
        for (int other = 4; other < 32; other *= 2) {
            total += __shfl_xor_sync(0xffffffffu, total, other);
        }
        if (at.g == 0) {
            col.gather[at.wm * S::MT + mt][8 * (at.wn * S::NTW + nt) + 2 * at.t + i % 2] = total;
        }
    }
}

}  // namespace pydflash_attention
