// attention: softmax attention of query rows over a (quantised) key/value cache, exact in the width.
//
//   dst[t, h] = sum_s p[s] v[s, h'] / sum_s p[s],   p[s] = exp(scale * q[t, h] . k[s, h']),   s: the slots row t sees
//
// h' = h / (H / Hkv) is the key/value head of query head h. There is no mask tensor: what a row sees follows from the
// absolute positions. With qpos = positions[t] and kpos = slot_positions[s] (s itself without src[4]), row t sees
// slot s iff kpos >= 0 and
//
//   causal       kpos <= qpos   and, with a window W > 0,   qpos - kpos < W
//   not causal   everything     or,  with a window W > 0,   |qpos - kpos| < W
//
// With pages, rows of several sequences share the cache: row t belongs to sequence n = sequences[t], whose slot s is row
// pages[n, s / 256] * 256 + s % 256 of k and v and holds position s. Entries of pages that no row's span reaches are not
// read.
//
// A row with qpos < 0 is padding. The output of padding, and of a row that sees nothing, is zeros.
//
//   src[0]   q                (T, H, D) f32 contiguous; CUDA: T <= 16; D is 64, 128 or 256
//   src[1]   k                (P, Hkv * D) in any type of the cache (docs/kv-cache.md): one row per cache slot;
//                             P % 32 == 0; rows may be strided (the first P slots of a longer cache)
//   src[2]   v                (P, Hkv * D) as k; its type may differ from k's
//   src[3]   positions        (T,) int32
//   src[4]   slot_positions   (P,) int32, the position each slot holds, negative = empty; optional, or with pages:
//            pages            (S, N) int32, pages of k and v; P % 256 == 0
//   src[5]   sequences        (T,) int32, 0..S-1, rows of a sequence side by side; only with pages. CPU only
//   params   [0] scale > 0 (float)   [1] causal: 0 or 1   [2] window, 0 = none   [3] Hkv
//   result   (T, H, D) f32
//
// A row's result does not depend, bit for bit, on T, the other rows, P or the number of threads: slots that
// a row does not see contribute exactly nothing to it, whatever bytes they hold. The CPU and CUDA results differ by
// rounding: the CPU rounds q to the type that ggml's dot product with K's type takes (8 bits for quantised K), CUDA
// rounds q, p and the dequantised K and V to f16. CUDA saturates cached V, and cached bf16 K, at the range of f16
// (+-65504), and takes no f32 cache.
//
// Source of the online softmax: Milakov & Gimelshein 2018 (arXiv:1805.02867); of the split over the cache:
// flash-decoding (Dao et al. 2023).
#pragma once

#include "ext.h"

#ifdef __cplusplus
extern "C" {
#endif

// The positions [first, last] that a query row sees; empty (first > last) for padding.
struct pydflash_span { int32_t first, last; };

#ifdef __CUDACC__
__host__ __device__
#endif
static inline struct pydflash_span pydflash_attention_span(int32_t qpos, int32_t causal, int32_t window) {
    struct pydflash_span span = { 1, 0 };
    if (qpos >= 0) {
        span.first = window > 0 && qpos >= window ? qpos - window + 1 : 0;
        span.last  = causal ? qpos : window > 0 && qpos <= INT32_MAX - window ? qpos + window - 1 : INT32_MAX;
    }
    return span;
}

#ifdef __cplusplus
}
#endif
