// argmax: where the largest value of each row lies; of equal ones, the first.
//
//   src[0]   x   (T, C) f32, no NaN; the last axis contiguous, rows strided
//   result   (T,) int32
//
// ggml's own argmax leaves open which of equal values wins, and gives a row of a vocabulary to one block of CUDA threads.
#pragma once

#include "ext.h"
