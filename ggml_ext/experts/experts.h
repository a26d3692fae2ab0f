// experts: products of rows with the matrices of the experts that each row has selected, and their weighted sum.
//
//   y[t][j][m] = sum over i of x[t][j'][i] * W[ids[t][j]][m][i]        j' = j, or 0 where all experts read one row
//
//   without logits   result[t][j][m] = y[t][j][m]
//   with logits      result[t][m]    = sum over j of w[t][j] * y[t][j][m],
//                    w[t][j] = exp(logits[t][ids[t][j]]) / sum over i of exp(logits[t][ids[t][i]])
//
// w is the softmax over all experts, normalised over the selected ones. A mixture-of-experts layer is three products:
// gate and up without logits, down with them. One op for the whole layer would need a barrier between them, or every
// thread would have to repeat the first two.
//
//   src[0]   x        (T, 1, K) or (T, k, K) f32, contiguous
//   src[1]   W        (E, M, K) of the types of linear, with linear's bounds on K; rows contiguous
//   src[2]   ids      (T, k) int32, contiguous, each in 0..E-1
//   src[3]   logits   (T, E) f32; the last axis contiguous, rows strided; optional
//   params   none
//   result   (T, k, M) f32, or (T, M) with logits; contiguous
//
// T is free. A row's result does not depend on T nor on the other rows, bit for bit, whichever experts those have
// selected. The CPU rounds x as linear does, and y has the bits of linear's product with that expert's matrix; CUDA
// multiplies f32 with dequantised weights. The two agree up to that rounding.
#pragma once

#include "ext.h"
