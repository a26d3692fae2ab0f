// sigmoid_gate: the output gate of gated attention. For the CPU only.
//
//   y = x * sigmoid(gate)
//
//   src[0]   x      (..., C) f32, up to four axes; the last axis contiguous, other axes strided
//   src[1]   gate   as x, with its own strides
//   result   x's shape, f32 contiguous
//
// ggml's sigmoid is scalar on the CPU and needs a contiguous copy. On CUDA fuse.cu fuses ggml's nodes, so that this op
// has no kernel there and is refused.
//
// A row's result does not depend on the rows beside it.
#pragma once

#include "ext.h"
