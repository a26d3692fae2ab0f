// store_kv: a step's rows of K and V into their tables, each in the table's type.
//
//   k_table[rows[t]] = quantise(norm_rope(k[t]))            norm, RoPE and rotation as in norm_rope.h
//   v_table[rows[t]] = quantise(turbo_wht(v[t], v_group))   v_group 0: unrotated; never with signs
//
//   src[0]   k           (T, Hkv, D) f32; D is 64, 128 or 256; the last axis contiguous, other axes strided
//   src[1]   v           (T, Hkv, D) f32; as k
//   src[2]   weight      (D,) f32, K's norm
//   src[3]   positions   (T,) int32
//   src[4]   rows        (T,) int32, each within the tables
//   src[5]   k_table     (P, Hkv * D) in any type of the cache (docs/kv-cache.md); updated in place
//   src[6]   v_table     (P, Hkv * D) as k_table; its type may differ from k_table's
//   src[7]   signs       (2, k_group) f32; optional
//   params   [0..4] those of rope   [5] eps (float)   [6] k_group   [7] v_group: 0, 64, 128 or 256 dividing D
//   result   a view of k_table
//
// When several rows share a table row (padding), its contents are undefined. Otherwise the tables have the same bytes
// as after ggml's rms_norm, mul and set_rows around rope and turbo_wht, on either device.
#pragma once

#include "ext.h"
