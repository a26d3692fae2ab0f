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

// The runs above, in their order.
enum pydflash_fused_kind {
    PYDFLASH_FUSED_RMS_NORM,
    PYDFLASH_FUSED_SWIGLU,
    PYDFLASH_FUSED_GATED_NORM,
    PYDFLASH_FUSED_SIGMOID_GATE,
    PYDFLASH_FUSED_LINEAR,
    PYDFLASH_FUSED_KINDS,
};

// Launches the run that starts at node i, if one does; returns how many nodes after i it covered, 0 for none.
int pydflash_fuse(struct pydflash_cuda * cuda, struct ggml_cgraph * cgraph, int i);

// How many runs of a kind were launched in this process. One captured into a CUDA graph counts once, however often the
// graph is replayed. A pattern that no longer matches costs speed and changes no result, so that tests count.
extern "C" int64_t pydflash_fused_runs(int kind);
