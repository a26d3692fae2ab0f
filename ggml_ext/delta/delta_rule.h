// delta_rule: the gated delta rule over the rows that are replayed and the rows that are new.
//
//   per value head, with k-head h % Hk (v-heads are tiled), q and k L2-normalised:
//   S <- exp(g) S;   d = beta (v - S^T k);   S <- S + k d^T;   o = S^T q / sqrt(D)          Gated Delta Networks, eq. 10
//
// The state S is that of the last committed token. The op first replays the n kept rows of the previous step (see
// delta_inputs.h), stores the state there, and goes on through the new rows without storing, so a row that is rejected
// later was never written. With keep = 0 (prefill) the state after the last new row is stored instead. Each sequence of
// the step has a state of its own.
//
//   src[0]   inputs   (16 N + T, C + 2 Hv) f32 from delta_inputs, of N sequences; C = (2 Hk + Hv) D; columns
//                     q | k | v | g | beta
//   src[1]   states   (slots, Hv, D + 1, D) f32, persistent, updated in place: T in rows 0..D-1, [h][value column][key
//                     row], and in row D the scale of each value column, the same in all columns of a head. S transposed
//                     is scale * T; how an implementation splits it is its own choice. A scale of 0 is read as 1, so
//                     that zeros are a state S = 0.
//   src[2]   counts   (N, 2) int32 per sequence: rows to replay, real new rows
//   src[3]   slots    (N,) int32, all different: whose state is whose; CUDA takes N = 1
//   params   [0] keep   [1] Hk   [2] D   [3] eps of the L2 norm, x / sqrt(sum x^2 + eps)
//   result   (T, Hv * D) f32; rows beyond the real ones are zero
//
// A row's result depends neither on T nor on the rows after it.
#pragma once

#include "ext.h"
