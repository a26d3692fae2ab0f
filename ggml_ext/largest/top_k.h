// top_k: where the k largest values of each row lie, the largest first; of equal ones, the first.
//
//   src[0]   x   (T, C) f32; the last axis contiguous, rows strided
//   params   [0] k, 1 <= k <= C
//   result   (T, k) int32
//
// The indices of a row are distinct and lie in 0..C-1 whatever the row holds, NaN included. ggml's own leaves open
// which of equal values it takes, so that a router's choice could differ between devices.
#pragma once

#include "ext.h"
