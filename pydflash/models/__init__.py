"""Models: one module an architecture, what they share, and what a file becomes when it is loaded."""

from pydflash.models.accounting import account
from pydflash.models.base import ModelConfig, Network
from pydflash.models.loading import ARCHITECTURES, Model, load_model
from pydflash.models.weights import Progress, Weights, find_tensors

__all__ = [
    "ARCHITECTURES",
    "Model",
    "ModelConfig",
    "Network",
    "Progress",
    "Weights",
    "account",
    "find_tensors",
    "load_model",
]
