// argmax: the index of the largest value of each row, the first if several are equal.
//
//   src[0]   x   (T, C) f32; the last axis contiguous, rows strided
//   params   report
//   result   (T,) int32
//
// A row that holds a NaN, or whose largest value is infinite, has no largest value: the numerics that made it failed. Its
// result is -1 with `report`, else an index of the row, which stays valid as a row number of a table.
//
// ggml's own argmax leaves open which of equal values wins, and gives a row of a vocabulary to one block of CUDA threads.
#pragma once

#include "ext.h"
