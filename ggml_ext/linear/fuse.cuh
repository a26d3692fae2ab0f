// Runs of graph nodes that CUDA launches as one pack and one product kernel (linear.cuh). The graph itself stays as the
// model file reads, and every node of it can run alone; fusing skips launches and round trips, nothing else.
//
//   rms_norm, mul, linear*                     norm, and up to four projections of it
//   swiglu, linear [, add]                     the MLP's product, and the residual
//   rms_norm, mul, silu, mul, linear [, add]   a delta-net's gated norm and output projection
//   cont, sigmoid, mul, linear [, add]         attention's output gate and output projection
//   linear* [, add]                            whatever else is projected
#pragma once

#include "ext_cuda.cuh"

struct ggml_cgraph;

// Launches the run that starts at node i, if one does; returns how many nodes after i it covered, 0 for none.
int pydflash_fuse(struct pydflash_cuda * cuda, struct ggml_cgraph * cgraph, int i);
