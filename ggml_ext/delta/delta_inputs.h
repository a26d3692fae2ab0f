// delta_inputs: everything the gated delta rule reads, for the rows that are replayed and the rows that are new.
//
// A gated delta-net layer runs a short causal convolution over its raw q|k|v columns before the delta rule. Both need
// the past: the convolution the last K-1 columns, the delta rule its state. This op owns the first of the two. Its
// window holds, per channel, [K-1 committed columns | up to 16 pending columns]: the rows of the last forward, of which
// a later commit keeps a prefix. The next step calls the op with the length n of that prefix, and the op
//   1. produces the inputs of the n kept rows once more (the delta rule replays them to move its state forward),
//   2. produces the inputs of the T new rows, whose convolution continues after the kept ones,
//   3. moves the window: the kept columns become history, the new ones become pending.
// Nothing is copied per row of state: what a rejected row leaves behind is a column that is overwritten.
//
// A step may have rows of several sequences, those of sequence i behind those of sequence i - 1. Each has a window of
// its own, `slots[i]` of the table, and its own counts; what follows is said of one.
//
//   q|k|v[t] = silu(sum_j weight[:, j] * column[t - (K-1) + j])        Qwen3.5 gated delta-net, steps 1 and 2
//   g[t]     = ssm_a * softplus(alpha[t] + dt_bias)                    log-decay per value head, <= 0
//   beta[t]  = sigmoid(beta_raw[t])
//
//   src[0]   x         (T, C) f32, raw q|k|v columns, C a multiple of 16; rows may be strided
//   src[1]   alpha     (T, Hv) f32          src[2]   beta_raw  (T, Hv) f32
//   src[3]   weight    (C, K) f32, K at most 16
//   src[4]   ssm_a     (Hv,) f32            src[5]   dt_bias   (Hv,) f32
//   src[6]   windows   (slots, K-1 + 16, C + 2 Hv) f32, persistent, updated in place
//   src[7]   counts    (S, 2) int32 per sequence: n rows to replay (0..16), and how many of the T rows are its (at most
//                      16 where they stay pending); the sum over sequences is at most T, and the rest padding
//   src[8]   slots     (S,) int32, all different; CUDA takes S = 1
//   params   [0] keep: 1 = the new rows stay pending; 0 = they are committed at once (prefill, any number)
//   result   (16 S + T, C + 2 Hv) f32: rows 16 i + 0..n-1 replayed of sequence i, from row 16 S on the new rows; columns
//            q|k|v|g|beta. Other rows undefined.
//
// A row's result does not depend on T, on S, nor on the rows beside it.
#pragma once

#include "ext.h"
