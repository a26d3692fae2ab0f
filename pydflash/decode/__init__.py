"""Decoding: the two loops, how a token is drawn, and what a generation reports."""

from pydflash.decode.loops import autoregressive, speculative
from pydflash.decode.sampling import Law, MaskFunction, Sampler, numerics_failed
from pydflash.decode.stats import FinishReason, Stats, Step, collect
from pydflash.sampling_params import SamplingParams

__all__ = [
    "FinishReason",
    "Law",
    "MaskFunction",
    "Sampler",
    "SamplingParams",
    "Stats",
    "Step",
    "autoregressive",
    "collect",
    "numerics_failed",
    "speculative",
]
