// delta_inputs: everything the gated delta rule reads, for the rows that are replayed and the rows that are new.
//
// A gated delta-net layer runs a short causal convolution over its raw q|k|v columns before the delta rule. Both need
// the past: the convolution the last K-1 columns, the delta rule its state. This op owns the first of the two. Its
// `window` holds, per channel, [K-1 committed columns | up to 16 pending columns]: the rows of the last forward, of which
// a later commit keeps a prefix. The next step calls the op with the length n of that prefix, and the op
//   1. produces the inputs of the n kept rows once more (the delta rule replays them to move its state forward),
//   2. produces the inputs of the T new rows, whose convolution continues after the kept ones,
//   3. moves the window: the kept columns become history, the new ones become pending.
// Nothing is copied per row of state: what a rejected row leaves behind is a column that is overwritten.
//
//   q|k|v[t] = silu(sum_j weight[:, j] * column[t - (K-1) + j])        Qwen3.5 gated delta-net, steps 1 and 2
//   g[t]     = ssm_a * softplus(alpha[t] + dt_bias)                    log-decay per value head, <= 0
//   beta[t]  = sigmoid(beta_raw[t])
//
//   src[0]   x         (T, C) f32, raw q|k|v columns, C a multiple of 16; rows may be strided
//   src[1]   alpha     (T, Hv) f32          src[2]   beta_raw  (T, Hv) f32
//   src[3]   weight    (C, K) f32, K at most 16
//   src[4]   ssm_a     (Hv,) f32            src[5]   dt_bias   (Hv,) f32
//   src[6]   window    (K-1 + 16, C + 2 Hv) f32, persistent, updated in place
//   src[7]   counts    (2,) int32: n rows to replay (0..16), and how many of the T rows are real (0..T)
//   params   [0] keep: 1 = the new rows stay pending (T <= 16); 0 = they are committed at once (prefill, any T)
//   result   (16 + T, C + 2 Hv) f32: rows 0..n-1 replayed, rows 16..16+T-1 new; columns q|k|v|g|beta. Other rows undefined.
//
// A row's result does not depend on T nor on the rows beside it.
#pragma once

#include "ext.h"
